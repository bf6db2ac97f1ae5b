"""Running a PuLP model: HiGHS or CBC, and an outcome that says no more than what was proven.

Traps this file exists for (PuLP 3.3): `LpStatus` says "Optimal" after a time-out, only `sol_status` tells optimal from
feasible; failed solves leave numbers in `.value()`; HiGHS stopping at a node limit raises `KeyError` inside PuLP;
`warmStart` is ignored for HiGHS. HiGHS is therefore asked itself, through PuLP's own model building.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["optimal", "feasible", "unknown", "infeasible"]

# Solvers prove optimality within their tolerances, not exactly.
_OPTIMAL_GAP = 1e-6
_SEED_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class SolverOutcome:
    """What a solver can answer for.

    Attributes:
        status: ``"optimal"``: proven within tolerance. ``"feasible"``: an incumbent without proof. ``"unknown"``:
            stopped without an incumbent, missing or crashed; says nothing about the model. ``"infeasible"``: proven.
        objective: Value of the incumbent; `None` without one.
        bound: Certified bound of the objective; `None` if the solver gives none.
        values: Variables of the incumbent by name; empty without one.
        solver: Which solver answered; empty if none could.
        message: Why, for people.
    """

    status: Status
    objective: float | None
    bound: float | None
    values: Mapping[str, float]
    solver: str
    message: str = ""


@dataclass(frozen=True)
class SolveLimits:
    """When a solver stops: seconds and nodes, each `None` for no limit; and the seed of its heuristics."""

    time_limit_s: float | None = None
    node_limit: int | None = None
    seed: int = 0
    relative_gap: float = 1e-6


def solve(
    model: Any, *, limits: SolveLimits, solvers: Sequence[str], start: Mapping[str, float] | None = None
) -> SolverOutcome:
    """Minimise a PuLP model with the first of `solvers` that answers.

    Args:
        model: A `pulp.LpProblem` that minimises.
        limits: When to stop.
        solvers: ``"HiGHS"`` and ``"CBC"`` in order of preference; a missing or crashing one is passed over.
        start: A feasible value of every variable by name, as a first incumbent (HiGHS only).

    Returns:
        The outcome; ``"unknown"`` with the reasons if no solver could run.
    """
    reasons: list[str] = []
    for name in solvers:
        run = {"HiGHS": _solve_highs, "CBC": _solve_cbc}.get(name)
        if run is None:
            reasons.append(f"{name}: not a solver known here (HiGHS, CBC)")
            continue
        # Solvers fail in many ways (missing wheels, dead processes, KeyError inside PuLP); plans survive them.
        try:
            outcome = run(model, limits, start)
        except Exception as cause:
            reasons.append(f"{name}: {type(cause).__name__}: {cause}")
            continue
        return dataclasses.replace(outcome, message="; ".join([*reasons, outcome.message])) if reasons else outcome
    return SolverOutcome("unknown", None, None, {}, "", "no solver answered (" + "; ".join(reasons) + ")")


def missing_solvers(solvers: Sequence[str]) -> tuple[str, ...]:
    """Return those of `solvers` that are known here and whose package is not installed."""
    packages = {"HiGHS": "highspy", "CBC": "pulp"}
    return tuple(name for name in solvers if name in packages and importlib.util.find_spec(packages[name]) is None)


def _solve_highs(model: Any, limits: SolveLimits, start: Mapping[str, float] | None) -> SolverOutcome:
    pulp, highspy = importlib.import_module("pulp"), importlib.import_module("highspy")
    options: dict[str, Any] = {"random_seed": limits.seed % _SEED_LIMIT}
    if limits.node_limit is not None:
        options["mip_max_nodes"] = limits.node_limit
    solver = pulp.HiGHS(msg=False, threads=1, gapRel=limits.relative_gap, timeLimit=limits.time_limit_s, **options)
    solver.createAndConfigureSolver(model)
    solver.buildSolverModel(model)
    highs = model.solverModel
    variables = model.variables()
    if start is not None:
        solution = highspy.HighsSolution()
        solution.col_value = [start[variable.name] for variable in variables]
        highs.setSolution(solution)
    solver.callSolver(model)
    info, highs_status = highs.getInfo(), highs.getModelStatus()
    if highs_status == highspy.HighsModelStatus.kInfeasible:
        return SolverOutcome("infeasible", None, None, {}, "HiGHS")
    bound = info.mip_dual_bound if math.isfinite(info.mip_dual_bound) else None
    # 2 is kSolutionStatusFeasible; without it the column values are left-overs.
    if info.primal_solution_status != 2 or not math.isfinite(info.objective_function_value):
        return SolverOutcome("unknown", None, bound, {}, "HiGHS", f"stopped without an incumbent ({highs_status.name})")
    columns = list(highs.getSolution().col_value)
    values = {variable.name: columns[variable.index] for variable in variables}
    finished = highs_status == highspy.HighsModelStatus.kOptimal
    objective = float(info.objective_function_value)
    return _with_incumbent(finished, objective, bound, values, "HiGHS", highs_status.name)


def _solve_cbc(model: Any, limits: SolveLimits, start: Mapping[str, float] | None) -> SolverOutcome:
    pulp = importlib.import_module("pulp")
    options = [f"randomCbcSeed {limits.seed % _SEED_LIMIT + 1}"]
    kind = _cbc_class(pulp)
    with warnings.catch_warnings():
        # PuLP 3.3 deprecates the class of its bundled CBC, but has no other way to it.
        warnings.simplefilter("ignore", DeprecationWarning)
        solver = kind(
            msg=False,
            threads=1,
            gapRel=limits.relative_gap,
            timeLimit=limits.time_limit_s,
            maxNodes=limits.node_limit,
            options=options,
        )
    if not solver.available():
        raise RuntimeError("not installed")
    model.solve(solver)
    sol_status = model.sol_status
    if sol_status in (pulp.LpSolutionInfeasible, pulp.LpSolutionUnbounded):
        return SolverOutcome("infeasible", None, None, {}, "CBC")
    if sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return SolverOutcome("unknown", None, None, {}, "CBC", "stopped without an incumbent")
    values = {variable.name: float(variable.value()) for variable in model.variables()}
    objective = float(pulp.value(model.objective))
    finished = sol_status == pulp.LpSolutionOptimal
    # CBC calls optimal what is within the gap, and says nothing of its bound.
    bound = objective - limits.relative_gap * max(1.0, abs(objective)) if finished else None
    return _with_incumbent(finished, objective, bound, values, "CBC", f"sol_status {sol_status}")


def _cbc_class(pulp: Any) -> Any:
    return pulp.PULP_CBC_CMD


def _with_incumbent(
    finished: bool, objective: float, bound: float | None, values: Mapping[str, float], solver: str, message: str
) -> SolverOutcome:
    gap = math.inf if bound is None else objective - bound
    proven = finished and gap <= 2 * _OPTIMAL_GAP * max(1.0, abs(objective))
    return SolverOutcome("optimal" if proven else "feasible", objective, bound, values, solver, message)
