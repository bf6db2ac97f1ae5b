"""Two ranks, one to a GPU, that run one function and hand its answer back; apart, so that ranks can import it by name."""

from __future__ import annotations

import multiprocessing
import queue
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from raysp.comm import Communicators, init_process

NUM_RANKS = 2


def answers_of(run: Callable[[Communicators], Any], *, device_type: str = "cuda", timeout_s: float) -> list[Any]:
    """Call ``run(comms)`` on both ranks and return what they answer, in rank order.

    Args:
        run: Top-level function of an importable module.
        device_type: ``cpu`` is for dry runs over gloo.
        timeout_s: Longest wait for both.

    Raises:
        AssertionError: A rank raised, the message holds its traceback, or gave no answer in time.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_serve, args=(run, rank, store.port, device_type, results)) for rank in range(NUM_RANKS)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=timeout_s) for _ in processes)
    except queue.Empty:
        raise AssertionError(f"a rank gave no answer within {timeout_s:.0f} s") from None
    finally:
        for process in processes:
            process.kill()
            process.join()
    failures = [value for succeeded, value in found.values() if not succeeded]
    if failures:
        raise AssertionError("\n".join(failures))
    return [found[rank][1] for rank in range(NUM_RANKS)]


def _serve(run: Callable[[Communicators], Any], rank: int, port: int, device_type: str, results: Any) -> None:
    """Put (rank, (True, answer)) or (rank, (False, traceback))."""
    try:
        device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)
        if device_type == "cuda":
            torch.cuda.set_device(device)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
        comms = init_process(store, global_rank=rank, world_size=NUM_RANKS, device=device, timeout_s=60.0)
        answer = run(comms)
        comms.close()
        results.put((rank, (True, answer)))
    except Exception:  # whatever failed, the test reports it
        results.put((rank, (False, traceback.format_exc())))
