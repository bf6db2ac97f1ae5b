"""Planning ahead in background processes, so that training does not wait for plans.

`PlanService` takes requests for coming steps and gives back a plan for each: planned in the background, out of the
cache, or, where a deadline has passed, the best plan so far. What runs in the processes is in
`planner.planner_process`, what a cached plan is good for in `planner.plan_cache`.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Literal, cast

from planner.errors import PlanError, PlannerError
from planner.plan import StepPlan
from planner.plan_cache import PlanCache, PlanRequest, own_error, plan_request, renumbered
from planner.planner_process import Finished, Incumbent, Job, PlannerProcess, Report, Stop, Warm

Source = Literal["planned", "cache", "incumbent"]

_MAX_DEATHS = 3


class PlanServiceError(PlannerError):
    """The plan service cannot do what was asked: too many steps ahead, an unknown step, closed, dead processes."""


@dataclass(frozen=True)
class Planned:
    """The plan of one step, and how it came about.

    Attributes:
        step: As submitted.
        plan: In the sequence ids of the request.
        source: ``"planned"`` for this step; ``"cache"``: an earlier step with the same lengths; ``"incumbent"``: the
            best plan when the deadline had passed.
        waited_s: How long `PlanService.result` took.
        solve_time_s: How long planning for this step took; 0 for a cached plan.
    """

    step: int
    plan: StepPlan
    source: Source
    waited_s: float
    solve_time_s: float


@dataclass(eq=False)
class _Task:
    """A request in canonical order that some steps wait for."""

    task_id: int
    request: PlanRequest
    num_waiting: int = 0
    num_deaths: int = 0
    is_stopped: bool = False
    incumbent: StepPlan | None = None
    plan: StepPlan | None = None
    error: Exception | None = None

    @property
    def is_done(self) -> bool:
        return self.plan is not None or self.error is not None


@dataclass(eq=False)
class _Worker:
    process: PlannerProcess
    task: _Task | None = None
    is_warm: bool = False


@dataclass(frozen=True, eq=False)
class _Ticket:
    """A submitted step: its plan where the cache had it, else its task and whether that was made for another step."""

    request: PlanRequest
    cached: StepPlan | None = None
    task: _Task | None = None
    is_shared: bool = False


@dataclass(eq=False)
class _State:
    """Everything that the caller's threads and the service's own share, under one lock."""

    waiting: deque[_Task] = field(default_factory=deque)
    tasks: dict[Hashable, _Task] = field(default_factory=dict)
    tickets: dict[int, _Ticket] = field(default_factory=dict)
    workers: list[_Worker] = field(default_factory=list)
    num_tasks: int = 0
    num_cold_deaths: int = 0
    is_closed: bool = False
    fault: Exception | None = None


class PlanService:
    """Plans several steps ahead in background processes. Use as a context manager.

    A step is submitted, and its plan is taken once; as many as `max_ahead` steps may lie between. Requests are planned
    in the order in which they came. When the deadline of a step has passed and its plan is taken unfinished, the
    search goes on for the cache as long as no other request waits for the process, and is ended when one does, so that
    steps that are shorter than the search get the whole time of a step each.

    Methods may be called from several threads. A process that dies is replaced and its request planned again.

    Args:
        num_processes: Background processes; each plans one request at a time on one core.
        max_ahead: Steps that may be submitted and not taken.
        cache_size: Plans kept for batches with the same lengths; 0 keeps none.
        deadline_s: Seconds that `result` waits before it gives the best plan so far; `None`: until the plan is there.
            Requests with a node limit always wait: their plan must not depend on the clock.
        niceness: Added to that of the processes, so that they yield to others.
    """

    def __init__(
        self,
        *,
        num_processes: int = 1,
        max_ahead: int = 2,
        cache_size: int = 256,
        deadline_s: float | None = None,
        niceness: int = 0,
    ) -> None:
        for name, value in (("num_processes", num_processes), ("max_ahead", max_ahead)):
            if value < 1:
                raise PlanError(f"{name} is {value}; expected at least 1.")
        self._max_ahead = max_ahead
        self._deadline_s = _checked_deadline(deadline_s)
        self._niceness = niceness
        self._cache = PlanCache(cache_size)
        self._state = _State()
        self._changed = threading.Condition()
        try:
            for _ in range(num_processes):
                self._state.workers.append(_Worker(PlannerProcess(niceness=niceness)))
        except BaseException:
            self.close()
            raise
        self._thread = threading.Thread(target=self._listen, name="plan-service", daemon=True)
        self._thread.start()

    def __enter__(self) -> PlanService:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def can_submit(self) -> bool:
        """Whether one more step may be submitted before a plan is taken."""
        with self._changed:
            return not self._state.is_closed and len(self._state.tickets) < self._max_ahead

    @property
    def process_ids(self) -> tuple[int, ...]:
        """The background processes at this moment."""
        with self._changed:
            return tuple(worker.process.pid for worker in self._state.workers)

    def wait_until_warm(self, timeout_s: float) -> bool:
        """Wait until every process has loaded the planner; say whether that was within `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_warm() or self._fault() is not None, timeout_s)
            return self._is_warm()

    def submit(self, step: int, request: PlanRequest) -> None:
        """Have a step planned in the background. Returns at once.

        Raises:
            PlanServiceError: `max_ahead` steps are outstanding, this step is among them, or the service is closed.
        """
        with self._changed:
            state = self._state
            if state.is_closed:
                raise PlanServiceError("the plan service is closed.")
            if step in state.tickets:
                raise PlanServiceError(f"step {step} was submitted already; take its plan first.")
            if len(state.tickets) >= self._max_ahead:
                raise PlanServiceError(
                    f"step {step} is more than {self._max_ahead} ahead: steps {sorted(state.tickets)} are outstanding. "
                    "Take a plan first, or raise max_ahead."
                )
            cached = self._cache.get(request)
            if cached is not None:
                state.tickets[step] = _Ticket(request, cached=cached)
                return
            task = state.tasks.get(request.key)
            is_shared = task is not None
            if task is None:
                task = _Task(state.num_tasks, request.canonical())
                state.num_tasks += 1
                state.tasks[request.key] = task
                state.waiting.append(task)
            task.num_waiting += 1
            state.tickets[step] = _Ticket(request, task=task, is_shared=is_shared)
            self._dispatch()

    def result(self, step: int, *, deadline_s: float | None = None) -> Planned:
        """Take the plan of a submitted step.

        Args:
            step: As submitted.
            deadline_s: In place of the service's.

        Returns:
            The plan; after the deadline the best one so far, or, where there is none because the process has not got
            that far, one that is made here without searching.

        Raises:
            PlannerError: As `plan_step`, sequences named by the ids of the request.
            PlanServiceError: The step is unknown, the service is closed, or its processes died repeatedly.
        """
        started_s = time.monotonic()
        limit_s = self._deadline_s if deadline_s is None else _checked_deadline(deadline_s)
        with self._changed:
            ticket = self._state.tickets.get(step)
            if ticket is None:
                raise PlanServiceError(f"step {step} was not submitted, or its plan was taken already.")
            task = ticket.task
            if task is not None:
                self._changed.wait_for(
                    lambda: task.is_done or self._fault() is not None,
                    None if ticket.request.node_limit is not None else limit_s,
                )
                if not task.is_done and (fault := self._fault()) is not None:
                    raise fault
                task.num_waiting -= 1
            del self._state.tickets[step]
            self._dispatch()
            plan, error = (task.plan or task.incumbent, task.error) if task is not None else (ticket.cached, None)
            source = _source(ticket)
        if isinstance(error, PlanServiceError):
            raise error
        if error is not None:
            raise own_error(ticket.request, error)
        if plan is None:
            plan = plan_request(dataclasses.replace(ticket.request, time_limit_s=0.0))
        elif task is not None:
            plan = renumbered(plan, ticket.request.canonical_ids)
        solve_time_s = 0.0 if source == "cache" else plan.solve_time_s
        return Planned(step, plan, source, time.monotonic() - started_s, solve_time_s)

    def close(self) -> None:
        """End the processes and everything they started. Steps that are outstanding have no plan any more."""
        with self._changed:
            if self._state.is_closed:
                return
            self._state.is_closed = True
            workers, self._state.workers = self._state.workers, []
            self._changed.notify_all()
        for worker in workers:
            worker.process.kill()
        # The thread wakes up because the processes are gone; only then may their connections be closed.
        if thread := getattr(self, "_thread", None):
            thread.join()
        for worker in workers:
            worker.process.end()

    def _is_warm(self) -> bool:
        return bool(self._state.workers) and all(worker.is_warm for worker in self._state.workers)

    def _fault(self) -> Exception | None:
        return PlanServiceError("the plan service is closed.") if self._state.is_closed else self._state.fault

    def _dispatch(self) -> None:
        """Give waiting tasks to idle processes, and make room for those that wait on."""
        state = self._state
        for task in [task for task in state.waiting if not task.num_waiting]:
            state.waiting.remove(task)
            del state.tasks[task.request.key]
        for worker in sorted(state.workers, key=lambda worker: not worker.is_warm):
            if worker.task is None and state.waiting:
                worker.task = state.waiting.popleft()
                worker.process.send(Job(worker.task.task_id, worker.task.request))
        abandoned = [worker for worker in state.workers if worker.task is not None and not worker.task.num_waiting]
        for worker, _ in zip(abandoned, state.waiting, strict=False):
            if worker.task is not None and not worker.task.is_stopped:
                worker.task.is_stopped = True
                del state.tasks[worker.task.request.key]
                worker.process.send(Stop(worker.task.task_id))

    def _listen(self) -> None:
        """Take what the processes report, until the service is closed."""
        try:
            while True:
                with self._changed:
                    by_connection = {worker.process.connection: worker for worker in self._state.workers}
                if not by_connection:
                    return
                for connection in wait(list(by_connection)):
                    worker = by_connection[cast("Connection", connection)]
                    report = worker.process.receive()
                    with self._changed:
                        if self._state.is_closed:
                            return
                        self._take(worker, report)
                        self._changed.notify_all()
        except Exception as error:
            # Without this thread no step would ever be planned; whoever waits must know.
            with self._changed:
                self._state.fault = error
                self._changed.notify_all()

    def _take(self, worker: _Worker, report: Report | None) -> None:
        state, task = self._state, worker.task
        match report:
            case None:
                self._replace(worker)
            case Warm():
                worker.is_warm = True
                state.num_cold_deaths = 0
            case Incumbent(plan=plan) if task is not None:
                task.incumbent = plan
            case Finished(plan=plan, error=error) if task is not None:
                worker.task = None
                task.plan, task.error = plan, error
                if not task.is_stopped:
                    del state.tasks[task.request.key]
                    # A search that was ended early is not what an equal request should get.
                    if plan is not None:
                        self._cache.put(task.request, plan)
        self._dispatch()

    def _replace(self, worker: _Worker) -> None:
        """Put another process in place of one that died, and plan again what it had begun."""
        state, task = self._state, worker.task
        how = worker.process.end()
        state.workers.remove(worker)
        if task is not None:
            task.num_deaths += 1
            if task.is_stopped:
                pass
            elif task.num_deaths >= _MAX_DEATHS:
                task.error = PlanServiceError(
                    f"the planner process died {task.num_deaths} times over one batch of {len(task.request.lengths)} "
                    f"sequences, the last time with {how}. Look for memory that ran out, or plan in the foreground "
                    "with `raysp plan`."
                )
                del state.tasks[task.request.key]
            else:
                state.waiting.appendleft(task)
        if not worker.is_warm:
            state.num_cold_deaths += 1
        if state.num_cold_deaths >= _MAX_DEATHS:
            state.fault = PlanServiceError(
                f"planner processes died {state.num_cold_deaths} times while they started, the last time with {how}."
            )
        else:
            state.workers.append(_Worker(PlannerProcess(niceness=self._niceness)))


def _source(ticket: _Ticket) -> Source:
    if ticket.task is None:
        return "cache"
    if not ticket.task.is_done:
        return "incumbent"
    return "cache" if ticket.is_shared else "planned"


def _checked_deadline(deadline_s: float | None) -> float | None:
    if deadline_s is not None and not deadline_s >= 0:
        raise PlanError(f"deadline_s is {deadline_s!r}; expected a number of seconds of at least 0.")
    return deadline_s
