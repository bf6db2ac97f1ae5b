"""All workers of an epoch: started in a placement group, called together, blamed by rank when one fails."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raysp.cluster.ray_session import WorkerResources
from raysp.cluster.rendezvous import Rendezvous
from raysp.cluster.worker import Worker, WorkerInfo, WorkerSpec
from raysp.config import Config
from raysp.errors import RayspError, WorkerFailedError, first_line

# A dead peer breaks the others' collectives; the death itself is reported a moment later.
_BLAME_GRACE_S = 5.0


class WorkerGroup:
    """One actor per rank. Use as a context manager: leaving it kills every actor.

    Args:
        config: The resolved configuration.
        model_config: The transformers configuration.
        resources: What each worker reserves.
    """

    def __init__(self, config: Config, model_config: Any, resources: WorkerResources) -> None:
        self.size = config.cluster.num_workers
        self._config = config
        self._model_config = model_config
        self._resources = resources
        self._placement: Any = None
        self._rendezvous: Any = None
        self._actors: list[Any] = []
        self.infos: list[WorkerInfo] = []

    def __enter__(self) -> WorkerGroup:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]], *, timeout_s: float, what: str) -> list[Any]:
        """Call a method on every rank and wait for all of them.

        Args:
            method: Name of a :class:`Worker` method.
            arguments: One tuple per rank.
            timeout_s: Longest wait for the last of them.
            what: Named in errors, e.g. ``"step 7"``.

        Returns:
            The results by rank.

        Raises:
            WorkerFailedError: A worker died or did not answer in time; names the ranks and ``what``.
            RayspError: What a worker raised, when it raised an error of raysp.
        """
        refs = [getattr(actor, method).remote(*args) for actor, args in zip(self._actors, arguments, strict=True)]
        deadline = time.monotonic() + timeout_s
        pending = list(refs)
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, min(1.0, deadline - time.monotonic())))
            if any(_error_of(ref) is not None for ref in done):
                raise self._blame(refs, what)
            if pending and not done and time.monotonic() >= deadline:
                raise self._overdue([refs.index(ref) for ref in pending], timeout_s, what)
        results: list[Any] = ray.get(refs)
        return results

    def call_same(self, method: str, *args: Any, timeout_s: float, what: str) -> list[Any]:
        """:meth:`call` with the same arguments on every rank."""
        return self.call(method, [args] * self.size, timeout_s=timeout_s, what=what)

    def _start(self) -> None:
        timeout_s = self._config.cluster.start_timeout_s
        self._placement = placement_group([self._resources.bundle()] * self.size, strategy="PACK")
        try:
            ray.get(self._placement.ready(), timeout=timeout_s)
        except GetTimeoutError as error:
            raise WorkerFailedError(
                f"no room for {self.size} workers of {self._resources.bundle()} within {timeout_s:g} s; the cluster "
                f"has {_free()} free. Wait for other jobs, lower cluster.num_workers, or raise "
                "cluster.start_timeout_s."
            ) from error
        self._rendezvous = (
            ray.remote(Rendezvous).options(num_cpus=0).remote(loopback=self._resources.is_local, timeout_s=timeout_s)
        )
        host, port = ray.get(self._rendezvous.address.remote(), timeout=timeout_s)
        actor_class: Any = ray.remote(concurrency_groups={"control": 1})(Worker)  # type: ignore[call-overload]
        self._actors = [
            actor_class.options(
                num_cpus=self._resources.num_cpus,
                num_gpus=self._resources.num_gpus,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=self._placement, placement_group_bundle_index=rank
                ),
            ).remote()
            for rank in range(self.size)
        ]
        specs = [
            WorkerSpec(
                config=self._config,
                model_config=self._model_config,
                global_rank=rank,
                world_size=self.size,
                store_host=host,
                store_port=port,
                device=self._resources.device,
                num_threads=self._config.cluster.threads_per_worker or max(1, int(self._resources.num_cpus)),
                loopback=self._resources.is_local,
                comm_timeout_s=max(1800.0, 2 * (self._config.cluster.step_timeout_s or 0.0)),
            )
            for rank in range(self.size)
        ]
        self.infos = self.call(
            "setup", [(spec,) for spec in specs], timeout_s=timeout_s, what="the start of the workers"
        )

    def _stop(self) -> None:
        for actor in [*self._actors, self._rendezvous]:
            if actor is not None:
                with contextlib.suppress(RayError, ValueError):
                    ray.kill(actor)
        self._actors = []
        if self._placement is not None:
            with contextlib.suppress(RayError, ValueError):
                remove_placement_group(self._placement)

    def _blame(self, refs: list[Any], what: str) -> RayspError:
        """The error that caused the others: a death first, then an error of raysp, then whatever was raised."""
        ray.wait(refs, num_returns=len(refs), timeout=_BLAME_GRACE_S)
        failures = [(rank, error) for rank, ref in enumerate(refs) if (error := _error_of(ref)) is not None]
        died = [rank for rank, error in failures if isinstance(error, RayActorError)]
        if died:
            first = next(error for rank, error in failures if rank == died[0])
            return WorkerFailedError(
                f"{_ranks(died)} died during {what}: {first_line(first).rstrip('.')}. Look at the worker's log and its "
                "node's memory; the run resumes from the last checkpoint."
            )
        for _, error in failures:
            cause = error.cause if isinstance(error, RayTaskError) else error
            if isinstance(cause, RayspError):
                return cause
        rank, error = failures[0]
        cause = error.cause if isinstance(error, RayTaskError) else error
        others = [other for other, _ in failures[1:]]
        return WorkerFailedError(
            f"{_ranks([rank])} failed during {what}: {type(cause).__name__}: {first_line(cause).rstrip('.')}"
            + (f" ({_ranks(others)} failed too)" if others else "")
        )

    def _overdue(self, ranks: list[int], timeout_s: float, what: str) -> WorkerFailedError:
        activities = []
        for rank in ranks:
            try:
                activity = ray.get(self._actors[rank].activity.remote(), timeout=2.0)
            except RayError:
                activity = "no answer"
            activities.append(f"rank {rank}: {activity}")
        return WorkerFailedError(
            f"{_ranks(ranks)} did not finish {what} within {timeout_s:.0f} s ({'; '.join(activities)}). "
            "Raise cluster.step_timeout_s if such steps are expected."
        )


def _error_of(ref: Any) -> BaseException | None:
    """The error a finished call ended with; ``None`` when it succeeded or is not finished."""
    finished, _ = ray.wait([ref], timeout=0)
    if not finished:
        return None
    try:
        ray.get(ref)
    except (RayError, RayspError) as error:
        return error
    return None


def _free() -> str:
    free = {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(free.items())) or "nothing"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
