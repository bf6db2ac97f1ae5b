"""What a solver said, never more: time-outs, crashes, missing solvers."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from planner import plan_step, validate_plan
from planner import solver as solver_module
from planner.buckets import bucket_lengths
from planner.integer_program import build_program, possible_slots
from planner.problem import make_problem
from planner.solver import SolveLimits, SolverOutcome, solve

from .planner_cases import long_tail, make_model


def hard_program() -> Any:
    """A program that neither solver finishes within a few nodes."""
    lengths = long_tail(60, seed=11, median=3000, sigma=0.8)
    problem = make_problem(lengths, 16, make_model(memory_limit_bytes=1e9), None, "powers-of-two")
    bucketing = bucket_lengths(lengths, 16)
    return build_program(problem, bucketing, possible_slots(problem, len(lengths)), scale_s=0.05)


def test_stopping_at_the_node_limit_is_never_optimal() -> None:
    # PuLP itself raises KeyError(kSolutionLimit) here.
    outcome = solve(hard_program(), limits=SolveLimits(node_limit=1), solvers=["HiGHS"])
    assert outcome.solver == "HiGHS"
    assert outcome.status in ("feasible", "unknown")


def test_time_out_before_any_incumbent_is_unknown_and_holds_no_values() -> None:
    outcome = solve(hard_program(), limits=SolveLimits(time_limit_s=0.0), solvers=["HiGHS"])
    assert outcome.status == "unknown"
    assert outcome.objective is None
    assert outcome.values == {}
    assert "without an incumbent" in outcome.message


def test_cbc_without_an_incumbent_is_unknown_and_holds_no_values() -> None:
    outcome = solve(hard_program(), limits=SolveLimits(time_limit_s=0.0), solvers=["CBC"])
    assert outcome.solver == "CBC"
    assert outcome.status == "unknown"
    assert outcome.values == {}


@pytest.mark.parametrize(
    ("sol_status", "expected"),
    [(1, "optimal"), (2, "feasible"), (0, "unknown"), (-1, "infeasible"), (-2, "infeasible")],
)
def test_only_sol_status_counts(monkeypatch: pytest.MonkeyPatch, sol_status: int, expected: str) -> None:
    import pulp

    class Timed:
        """Answers as PuLP's solvers do after a time-out: LpStatus is "Optimal" whatever happened."""

        def __init__(self, **options: Any) -> None:
            pass

        def available(self) -> bool:
            return True

        def actualSolve(self, model: Any) -> int:
            for variable in model.variables():
                variable.varValue = 7.0
            model.assignStatus(pulp.LpStatusOptimal, sol_status)
            return int(pulp.LpStatusOptimal)

    monkeypatch.setattr(solver_module, "_cbc_class", lambda pulp: Timed)
    model = pulp.LpProblem("tiny", pulp.LpMinimize)
    x = model.add_variable("x", lowBound=3)
    model += x
    outcome = solve(model, limits=SolveLimits(), solvers=["CBC"])
    assert outcome.status == expected
    assert (outcome.objective is not None) == (expected in ("optimal", "feasible"))
    if outcome.objective is None:
        assert outcome.values == {}


def test_missing_and_crashing_solvers_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*arguments: Any) -> SolverOutcome:
        raise RuntimeError("killed")

    monkeypatch.setattr(solver_module, "_solve_highs", crash)
    outcome = solve(hard_program(), limits=SolveLimits(), solvers=["HiGHS", "Gurobi"])
    assert outcome.status == "unknown"
    assert "HiGHS: RuntimeError: killed" in outcome.message
    assert "Gurobi: not a solver known here" in outcome.message


@pytest.mark.parametrize("failure", ["crash", "unknown", "infeasible", "nonsense"])
def test_plan_survives_a_failing_solver_and_says_so(monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    def fail(model: Any, limits: SolveLimits, start: Any) -> SolverOutcome:
        if failure == "crash":
            raise OSError("solver died")
        if failure == "nonsense":
            values = {variable.name: 1.0 for variable in model.variables()}
            return SolverOutcome("optimal", 0.1, None, values, "HiGHS")
        return SolverOutcome(failure, None, None, {}, "HiGHS", f"said {failure}")  # type: ignore[arg-type]

    monkeypatch.setattr(solver_module, "_solve_highs", fail)
    lengths = long_tail(40, seed=9)
    plan = plan_step(lengths, 6, make_model(), solvers=["HiGHS"], node_limit=5)
    assert validate_plan(plan, lengths, make_model()) == []
    expected = {"crash": "solver died", "nonsense": "refused"}.get(failure, f"said {failure}")
    assert expected in plan.reason
    assert plan.outcome == "feasible"


def test_plan_without_the_first_solver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highspy", None)
    lengths = long_tail(40, seed=9)
    plan = plan_step(lengths, 6, make_model(), node_limit=5)
    assert validate_plan(plan, lengths, make_model()) == []
    assert "solver not installed: HiGHS" in plan.reason
    assert "not installed" not in plan_step(lengths[:3], 6, make_model()).reason


def test_outcome_of_the_second_solver_says_what_became_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highspy", None)
    outcome = solve(hard_program(), limits=SolveLimits(time_limit_s=0.2), solvers=["HiGHS", "CBC"])
    assert outcome.solver == "CBC"
    assert outcome.message.startswith("HiGHS: ModuleNotFoundError")


# PuLP hides from CBC's answer whether a model is infeasible or only unfinished; then it must not be called infeasible.
@pytest.mark.parametrize(("solver", "expected"), [("HiGHS", "infeasible"), ("CBC", "unknown")])
def test_infeasible_is_said_only_where_proven(solver: str, expected: str) -> None:
    import pulp

    model = pulp.LpProblem("none", pulp.LpMinimize)
    x = model.add_variable("x", lowBound=0, upBound=1, cat=pulp.LpInteger)
    model += x
    model += 2 * x == 1
    outcome = solve(model, limits=SolveLimits(), solvers=[solver])
    assert outcome.status == expected
    assert outcome.objective is None
    assert outcome.values == {}
