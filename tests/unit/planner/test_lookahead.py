"""Planning ahead: cached plans fit their batch, deadlines give incumbents, dead processes are replaced, none is left."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sized
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

import planner.lookahead
import planner.plan_cache
import planner.planner_process
from planner import (
    InfeasibleError,
    PlanCache,
    PlanError,
    PlanRequest,
    PlanService,
    PlanServiceError,
    StepPlan,
    plan_request,
    validate_plan,
)
from planner.lookahead import _MAX_DEATHS
from planner.planner_process import Finished, Incumbent, Job, PlannerProcess, Stop, Warm, _finished, _Inbox

from .planner_cases import long_tail, make_model

_MODEL = make_model()


def _request(lengths: list[int] | None = None, **changes: Any) -> PlanRequest:
    values: dict[str, Any] = {"num_ranks": 8, "cost_model": _MODEL, "node_limit": 1, **changes}
    return PlanRequest(lengths=tuple(lengths or long_tail(24, seed=1)), **values)


def _shuffled(request: PlanRequest, seed: int) -> PlanRequest:
    lengths = list(request.lengths)
    random.Random(seed).shuffle(lengths)
    return dataclasses.replace(request, lengths=tuple(lengths))


def _shapes(plan: StepPlan, lengths: tuple[int, ...]) -> list[list[tuple[tuple[int, ...], list[int]]]]:
    """What a plan is, apart from the numbering of the sequences."""
    return [
        [(group.ranks, sorted(lengths[i] for i in group.sequences)) for group in micro_batch.groups]
        for micro_batch in plan.micro_batches
    ]


def _wait_until(holds: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    end_s = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.01)
    return True


def _has(items: Sized, num: int) -> bool:
    return len(items) == num


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    # A zombie whose new parent has not looked yet runs no more.
    return state != "Z"


class TestPlanCache:
    def test_hit_is_valid_for_another_order_with_repeated_lengths(self) -> None:
        request = _request([5000, 300, 300, 9000, 300, 5000, 300, 40, 9000, 300])
        plan = plan_request(request)
        cache = PlanCache()
        cache.put(request, plan)
        for seed in range(5):
            other = _shuffled(request, seed)
            found = cache.get(other)
            assert found is not None
            assert validate_plan(found, other.lengths, _MODEL) == []
            assert _shapes(found, other.lengths) == _shapes(plan, request.lengths)
        again = cache.get(request)
        assert again is not None
        assert validate_plan(again, request.lengths, _MODEL) == []

    @pytest.mark.parametrize(
        "changes",
        [
            {"lengths": (*long_tail(24, seed=1)[1:], 17)},
            {"lengths": (*long_tail(24, seed=1), 17)},
            {"num_ranks": 4},
            {"cost_model": make_model(b1_s=0.03)},
            {"policy": "batch-adaptive"},
            {"degrees": "any"},
            {"seed": 1},
            {"node_limit": 2},
            {"node_limit": None},
            {"attention": "ring"},
        ],
    )
    def test_another_question_is_no_hit(self, changes: dict[str, Any]) -> None:
        request = _request()
        cache = PlanCache()
        cache.put(request, plan_request(request))
        assert cache.get(dataclasses.replace(request, **changes)) is None

    def test_naming_the_attention_of_the_cost_model_changes_nothing(self) -> None:
        assert _request(attention=_MODEL.attention).key == _request().key

    def test_least_recently_used_plan_goes_first(self) -> None:
        requests = [_request([100 * (i + 1), 50]) for i in range(3)]
        cache = PlanCache(2)
        for request in requests[:2]:
            cache.put(request, plan_request(request))
        assert cache.get(requests[0]) is not None
        cache.put(requests[2], plan_request(requests[2]))
        assert [cache.get(request) is not None for request in requests] == [True, False, True]
        assert len(cache) == 2

    def test_size_zero_keeps_nothing(self) -> None:
        cache = PlanCache(0)
        cache.put(_request(), plan_request(_request()))
        assert cache.get(_request()) is None


class TestPlanRequest:
    def test_same_lengths_in_any_order_give_the_same_plan(self) -> None:
        request = _request()
        plan = plan_request(request)
        other = _shuffled(request, 3)
        assert _shapes(plan_request(other), other.lengths) == _shapes(plan, request.lengths)

    @pytest.mark.parametrize("lengths", [(), (3, 0), (3, True), (3, 2.0)])
    def test_bad_lengths_are_refused_at_once(self, lengths: tuple[Any, ...]) -> None:
        with pytest.raises(PlanError):
            PlanRequest(lengths=lengths, num_ranks=2, cost_model=_MODEL)

    def test_error_names_the_sequence_of_the_batch(self) -> None:
        with pytest.raises(InfeasibleError, match="sequence 2 has 99999999 tokens"):
            plan_request(_request([10, 20, 99999999]))


@pytest.fixture(scope="module")
def service() -> Iterator[PlanService]:
    with PlanService(max_ahead=3) as shared:
        assert shared.wait_until_warm(120)
        yield shared


class TestWithProcesses:
    def test_plans_are_those_of_the_foreground_and_repeats_come_from_the_cache(self, service: PlanService) -> None:
        requests = [_request(long_tail(20, seed=seed)) for seed in (5, 6)]
        for step, request in enumerate([*requests, _shuffled(requests[0], 1)]):
            service.submit(step, request)
        planned = [service.result(step) for step in range(3)]
        assert [item.source for item in planned] == ["planned", "planned", "cache"]
        assert [item.plan.plan_id for item in planned[:2]] == [plan_request(request).plan_id for request in requests]
        assert validate_plan(planned[2].plan, _shuffled(requests[0], 1).lengths, _MODEL) == []
        assert planned[2].solve_time_s == 0.0
        service.submit(7, requests[1])
        assert service.result(7).source == "cache"

    def test_error_belongs_to_its_step_and_keeps_its_class(self, service: PlanService) -> None:
        service.submit(0, _request([10, 99999999]))
        service.submit(1, _request([30, 20]))
        service.submit(2, _request([30, 20], policy="wonderful"))
        with pytest.raises(InfeasibleError, match="sequence 1 has 99999999 tokens"):
            service.result(0)
        assert service.result(1).source == "planned"
        with pytest.raises(PlanError, match="wonderful"):
            service.result(2)

    def test_killed_process_is_replaced_and_its_request_planned_again(self, service: PlanService) -> None:
        [pid] = service.process_ids
        os.kill(pid, signal.SIGSTOP)
        service.submit(0, _request(long_tail(20, seed=8)))
        os.kill(pid, signal.SIGKILL)
        assert service.result(0).source == "planned"
        [replacement] = service.process_ids
        assert replacement != pid
        assert not _is_running(pid)

    def test_deadline_does_not_wait_for_a_process_that_hangs(self, service: PlanService) -> None:
        assert service.wait_until_warm(120)
        request = _request(long_tail(40, seed=9), node_limit=None, time_limit_s=0.2)
        [pid] = service.process_ids
        os.kill(pid, signal.SIGSTOP)
        try:
            service.submit(0, request)
            planned = service.result(0, deadline_s=0.05)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert planned.source == "incumbent"
        assert validate_plan(planned.plan, request.lengths, _MODEL) == []
        # The late plan is there for the next batch with these lengths.
        service.submit(1, _shuffled(request, 1))
        assert service.result(1).source in ("cache", "planned")
        service.submit(2, request)
        assert service.result(2).source == "cache"

    def test_interrupt_from_the_terminal_is_ignored(self, service: PlanService) -> None:
        assert service.wait_until_warm(120)
        before = service.process_ids
        os.kill(before[0], signal.SIGINT)
        service.submit(0, _request(long_tail(20, seed=10)))
        assert service.result(0).source == "planned"
        assert service.process_ids == before

    def test_slow_request_gives_its_incumbent_and_close_leaves_no_process(self) -> None:
        request = _request(long_tail(3000, seed=2), num_ranks=64, node_limit=None, time_limit_s=60.0)
        with PlanService(num_processes=2, deadline_s=0.01) as service:
            assert service.wait_until_warm(120)
            pids = service.process_ids
            service.submit(0, request)
            planned = service.result(0)
            assert planned.source == "incumbent"
            assert planned.waited_s < 20
            assert validate_plan(planned.plan, request.lengths, _MODEL) == []
            # Still planned: nobody else wants the process.
            service.submit(1, request)
        assert len(pids) == 2
        assert not any(_is_running(pid) for pid in pids)
        with pytest.raises(PlanServiceError, match="closed"):
            service.result(1)
        with pytest.raises(PlanServiceError, match="closed"):
            service.submit(2, request)
        service.close()

    def test_processes_end_with_an_owner_that_is_killed(self, tmp_path: Path) -> None:
        # A script without a __main__ guard, as multiprocessing's spawn does not survive it.
        script = tmp_path / "owner.py"
        script.write_text(
            "import time\nfrom planner import PlanService\nservice = PlanService(num_processes=1)\n"
            "assert service.wait_until_warm(120)\nprint(*service.process_ids, flush=True)\ntime.sleep(600)\n",
            encoding="utf-8",
        )
        with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as owner:
            assert owner.stdout is not None
            [pid] = map(int, owner.stdout.readline().split())
            assert _is_running(pid)
            owner.kill()
        assert _wait_until(lambda: not _is_running(pid))

    def test_process_that_cannot_start_is_an_error_that_says_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(planner.planner_process, "_START", "raise SystemExit('nothing installed here')")
        with PlanService() as service:
            service.submit(0, _request())
            with pytest.raises(PlanServiceError, match=r"exit status 1; it wrote: nothing installed here"):
                service.result(0)


class _ScriptedProcess(PlannerProcess):
    """A process that reports what the test says."""

    started: list[_ScriptedProcess]

    def __init__(self, *, niceness: int = 0) -> None:
        self.connection, self.child_end = Pipe()
        self.started.append(self)

    @property
    def pid(self) -> int:
        return -len(self.started)

    def kill(self) -> None:
        self.child_end.close()

    def end(self) -> str:
        self.connection.close()
        return "killed by signal 9"


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[_ScriptedProcess]:
    monkeypatch.setattr(_ScriptedProcess, "started", [], raising=False)
    monkeypatch.setattr(planner.lookahead, "PlannerProcess", _ScriptedProcess)
    return _ScriptedProcess.started


def _timed(seed: int) -> PlanRequest:
    return _request(long_tail(20, seed=seed), node_limit=None, time_limit_s=0.0)


class TestWithScriptedProcesses:
    def test_no_more_steps_than_max_ahead_are_outstanding(self, processes: list[_ScriptedProcess]) -> None:
        with PlanService(max_ahead=2) as service:
            assert service.can_submit
            service.submit(0, _timed(1))
            with pytest.raises(PlanServiceError, match="step 0 was submitted already"):
                service.submit(0, _timed(1))
            service.submit(1, _timed(2))
            assert not service.can_submit
            with pytest.raises(PlanServiceError, match=r"steps \[0, 1\] are outstanding"):
                service.submit(2, _timed(3))
            service.result(0, deadline_s=0.0)
            assert service.can_submit
            service.submit(2, _timed(3))
            with pytest.raises(PlanServiceError, match="step 0 was not submitted"):
                service.result(0)

    def test_deadline_gives_the_incumbent_and_the_late_plan_goes_to_the_cache(
        self, processes: list[_ScriptedProcess]
    ) -> None:
        request = _timed(1)
        canonical = plan_request(request.canonical())
        incumbent = dataclasses.replace(canonical, reason="incumbent")
        with PlanService() as service:
            child = processes[0].child_end
            child.send(Warm())
            service.submit(0, request)
            job = child.recv()
            child.send(Incumbent(job.job_id, incumbent))
            # Sent on the same connection, so what comes before has been taken when the plan of this one is there.
            planned = service.result(0, deadline_s=0.5)
            assert (planned.source, planned.plan.reason) == ("incumbent", "incumbent")
            assert validate_plan(planned.plan, request.lengths, _MODEL) == []
            service.submit(1, _shuffled(request, 1))
            child.send(Finished(job.job_id, canonical, None))
            assert service.result(1).source == "cache"
            service.submit(2, _shuffled(request, 2))
            assert service.result(2).source == "cache"
            assert not child.poll()

    def test_abandoned_search_is_stopped_when_another_request_waits_and_is_not_cached(
        self, processes: list[_ScriptedProcess]
    ) -> None:
        slow, waiting = _timed(1), _timed(2)
        with PlanService(max_ahead=2) as service:
            child = processes[0].child_end
            service.submit(0, slow)
            job = child.recv()
            service.submit(1, waiting)
            assert not child.poll()
            assert service.result(0, deadline_s=0.0).source == "incumbent"
            assert child.recv() == Stop(job.job_id)
            child.send(Finished(job.job_id, plan_request(slow.canonical()), None))
            job = child.recv()
            assert job.request == waiting.canonical()
            service.submit(2, slow)
            child.send(Finished(job.job_id, plan_request(waiting.canonical()), None))
            assert service.result(1).source == "planned"
            job = child.recv()
            assert job.request == slow.canonical()

    def test_request_that_nobody_waits_for_any_more_is_not_begun(self, processes: list[_ScriptedProcess]) -> None:
        first, dropped, last = (_timed(seed) for seed in (1, 2, 3))
        with PlanService(max_ahead=3) as service:
            child = processes[0].child_end
            for step, request in enumerate((first, dropped, last)):
                service.submit(step, request)
            assert service.result(1, deadline_s=0.0).source == "incumbent"
            child.send(Finished(child.recv().job_id, plan_request(first.canonical()), None))
            assert child.recv().request == last.canonical()

    def test_node_limit_waits_for_the_plan_whatever_the_deadline(self, processes: list[_ScriptedProcess]) -> None:
        request = _request()
        with PlanService(deadline_s=0.0) as service:
            child = processes[0].child_end
            service.submit(0, request)
            job = child.recv()
            plan = plan_request(request.canonical())
            child.send(Incumbent(job.job_id, dataclasses.replace(plan, reason="incumbent")))
            child.send(Finished(job.job_id, plan, None))
            assert service.result(0).source == "planned"

    def test_request_that_kills_every_process_is_an_error(self, processes: list[_ScriptedProcess]) -> None:
        with PlanService() as service:
            service.submit(0, _timed(1))
            for death in range(_MAX_DEATHS):
                assert _wait_until(partial(_has, processes, death + 1))
                processes[death].child_end.send(Warm())
                assert processes[death].child_end.recv().request == _timed(1).canonical()
                processes[death].kill()
            with pytest.raises(PlanServiceError, match="died 3 times over one batch of 20 sequences"):
                service.result(0)
            assert _wait_until(partial(_has, processes, _MAX_DEATHS + 1))
            child = processes[-1].child_end
            service.submit(1, _timed(2))
            child.send(Finished(child.recv().job_id, plan_request(_timed(2).canonical()), None))
            assert service.result(1).source == "planned"


def test_process_reports_incumbents_and_its_clock_ends_a_stopped_search(monkeypatch: pytest.MonkeyPatch) -> None:
    request = _request()
    plan = plan_request(request.canonical())
    inbox_end, inbox_owner = Pipe()
    reports, child_end = Pipe()
    inbox = _Inbox(inbox_end, owner_pid=os.getppid())
    rounds = 0

    def search(
        lengths: tuple[int, ...], *, on_incumbent: Callable[[StepPlan], None], clock: Callable[[], float], **_: Any
    ) -> StepPlan:
        nonlocal rounds
        started_s = clock()
        on_incumbent(plan)
        while clock() < started_s + 3600.0:
            rounds += 1
            if rounds == 10:
                inbox.take(Stop(6))
            elif rounds == 20:
                inbox.take(Stop(7))
        return plan

    monkeypatch.setattr(planner.plan_cache, "plan_step", search)
    with inbox_end, inbox_owner, reports, child_end:
        assert _finished(Job(7, request), inbox, child_end) == Finished(7, plan, None)
        assert reports.recv() == Incumbent(7, plan)
    assert rounds == 20


@pytest.mark.parametrize("values", [{"num_processes": 0}, {"max_ahead": 0}, {"deadline_s": -1.0}, {"cache_size": -1}])
def test_bad_settings_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        PlanService(**values)
