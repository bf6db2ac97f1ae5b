"""A pool of gloo ranks that tests hand functions to; started once, because a fresh process costs seconds.

A task is a top-level function ``fn(comms, *args)``; it is pickled by name, so it lives in a module of this folder.
Every wait is bounded. A rank that hangs or dies takes the pool down, and the next task starts a new one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from raysp.comm import init_process

TRANSPORT_TIMEOUT_S = 40.0


class RankFailedError(AssertionError):
    """A task raised on some rank, or a rank gave no answer; the message holds every rank's traceback."""


class GlooPool:
    """Runs functions on gloo ranks ``0 .. size-1`` of one world."""

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []
        self._store: dist.TCPStore | None = None

    @property
    def store_port(self) -> int:
        """Port of the store that the ranks met at; starts the pool if need be."""
        if self._store is None:
            self._start()
        return self._store.port

    def run(self, fn: Callable[..., Any], *args: Any, world: int | None = None, timeout_s: float = 60.0) -> list[Any]:
        """Call ``fn(comms, *args)`` on ranks ``0 .. world-1`` and return their results in rank order.

        Args:
            fn: Top-level function of an importable module. ``comms`` is the rank's ``Communicators`` of the whole pool;
                a task on fewer ranks asks it for ``comms.communicator(range(world))``.
            args: Pickled to every rank.
            world: Ranks that run the task; all by default.
            timeout_s: Longest wait for all results together.

        Raises:
            RankFailedError: Some rank raised, died, or gave no answer in time.
        """
        if not self._processes:
            self._start()
        pipes = self._pipes[: self.size if world is None else world]
        for pipe in pipes:
            pipe.send((fn, args))
        deadline_s = time.monotonic() + timeout_s
        answers: list[tuple[bool, Any]] = []
        for rank, pipe in enumerate(pipes):
            try:
                if not pipe.poll(max(0.0, deadline_s - time.monotonic())):
                    raise TimeoutError(f"no answer within {timeout_s} s")
                answers.append(pipe.recv())
            except (TimeoutError, EOFError, OSError) as error:
                answers.append((False, f"rank {rank}: {type(error).__name__}: {error}"))
        failures = [f"--- rank {rank}\n{value}" for rank, (succeeded, value) in enumerate(answers) if not succeeded]
        if failures:
            # Ranks that failed may have left messages behind; nobody should meet them.
            self.stop()
            raise RankFailedError("\n".join(failures))
        return [value for _, value in answers]

    def run_until_death(
        self,
        fn: Callable[..., Any],
        *args: Any,
        ranks_that_answer: Sequence[int] | None = None,
        timeout_s: float = 60.0,
    ) -> dict[int, Any]:
        """Call ``fn(comms, *args)`` on all ranks, some of which die of it, and return the others' results by rank.

        Args:
            fn: As in ``run``.
            args: As in ``run``.
            ranks_that_answer: Whom to wait for; all by default.
            timeout_s: Longest wait for all results together.

        Raises:
            RankFailedError: Some rank raised, or neither died nor answered in time.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((fn, args))
        deadline_s = time.monotonic() + timeout_s
        results = {}
        for rank in range(self.size) if ranks_that_answer is None else ranks_that_answer:
            if not self._pipes[rank].poll(max(0.0, deadline_s - time.monotonic())):
                raise RankFailedError(f"rank {rank}: no answer within {timeout_s} s")
            with contextlib.suppress(EOFError, OSError):
                succeeded, value = self._pipes[rank].recv()
                if not succeeded:
                    raise RankFailedError(f"--- rank {rank}\n{value}")
                results[rank] = value
        self.stop()
        return results

    def stop(self) -> None:
        """End all ranks; the next ``run`` starts new ones."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            # Ranks hold nothing that outlives a test; waiting for the transport to wind down would cost seconds.
            process.kill()
            process.join()
        self._processes, self._pipes, self._store = [], [], None

    def _start(self) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            arguments = (rank, self.size, self._store.port, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=TRANSPORT_TIMEOUT_S))
    comms = init_process(store, global_rank=rank, world_size=size, timeout_s=TRANSPORT_TIMEOUT_S)
    while True:
        try:
            fn, args = pipe.recv()
        except (EOFError, OSError):
            break
        try:
            answer = (True, fn(comms, *args))
        except Exception:  # a task may raise anything; the test that gave it out reports it
            answer = (False, traceback.format_exc())
        pipe.send(answer)
    comms.close()
