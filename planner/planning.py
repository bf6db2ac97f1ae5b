"""`plan_step`: the one entry point of planning, from lengths to a placed `StepPlan`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from planner.baselines import batch_adaptive_draft, feasible_static_degrees, static_draft
from planner.bounds import step_lower_bound_s
from planner.budget import Budget
from planner.cost_model import CostModel
from planner.errors import PlanError
from planner.placement import place
from planner.plan import LOCAL_ATTENTION, CostModelReference, GroupPlan, MicroBatchPlan, Outcome, StepPlan
from planner.portfolio import SearchResult, adaptive_search
from planner.problem import Draft, DraftMicroBatch, Problem, check_longest_fits, make_problem

DEFAULT_SOLVERS = ("HiGHS", "CBC")

# A plan within this share of the bound is proven optimal: what is left is rounding.
_PROOF_TOLERANCE = 1e-9


def plan_step(
    lengths: Sequence[int],
    num_ranks: int,
    cost_model: CostModel,
    *,
    policy: str = "adaptive",
    sync: str = "per-layer",
    degrees: str = "powers-of-two",
    time_limit_s: float = 2.0,
    node_limit: int | None = None,
    seed: int = 0,
    attention: str | None = None,
    solvers: Sequence[str] = DEFAULT_SOLVERS,
    clock: Callable[[], float] = time.monotonic,
) -> StepPlan:
    """Plan one training step: micro-batches, their SP groups, the groups' ranks and sequences.

    The plan costs ``sum over micro-batches of the slowest group``; with ``policy="adaptive"`` it is never predicted
    slower than any static degree or the best degree for this batch.

    Args:
        lengths: Tokens of every sequence of the global batch; the index is the sequence id.
        num_ranks: Ranks of the job, any number from 1 on.
        cost_model: Predicts time and memory.
        policy: ``"adaptive"``; ``"static:D"`` (groups of D everywhere); ``"static:auto"`` (the smallest degree that
            holds the longest sequence); ``"batch-adaptive"`` (the best single degree for this batch).
        sync: ``"per-layer"``: all ranks meet in every micro-batch.
        degrees: ``"powers-of-two"``, or ``"any"`` for methods such as ring that run at every degree.
        time_limit_s: Seconds after which searching stops. The homogeneous plans are always finished, so a plan comes
            back even at 0, and late where that alone takes longer.
        node_limit: Branch-and-bound nodes of each integer program. When given, `time_limit_s` and the clock are
            ignored: equal inputs give equal plans on every machine, `solve_time_s` aside.
        seed: Seed of the solver.
        attention: Parallel attention method in place of the cost model's.
        solvers: Names of PuLP solvers in order of preference; the next is used where one is missing. Empty: none.
        clock: Monotonic seconds, for tests.

    Returns:
        A plan whose `outcome` is ``"optimal"`` only where proven.

    Raises:
        PlanError: An argument is malformed.
        InfeasibleError: A sequence fits no group that the policy and the ranks allow.

    Source:
        FlexSP (arXiv:2412.01523), sections 4 and 5.
    """
    started_s = clock()
    budget = Budget.start(time_limit_s, node_limit, seed, clock)
    if sync != "per-layer":
        hint = "is not supported yet; use 'per-layer'" if sync == "per-step" else "is unknown; expected 'per-layer'"
        raise PlanError(f"sync {sync!r} {hint}.")
    problem = make_problem(lengths, num_ranks, cost_model, attention, degrees)
    if policy == "adaptive":
        check_longest_fits(problem)
        result = adaptive_search(problem, budget, tuple(solvers))
    elif policy == "batch-adaptive":
        check_longest_fits(problem)
        draft = batch_adaptive_draft(problem)
        result = SearchResult(draft, False, f"best single degree for this batch: {draft[0][0].degree}")
    else:
        problem, degree = _with_static_degree(problem, policy)
        result = SearchResult(static_draft(problem, degree), False, f"static degree {degree}")
    return _step_plan(problem, result, sync, solve_time_s=max(0.0, clock() - started_s))


def _with_static_degree(problem: Problem, policy: str) -> tuple[Problem, int]:
    kind, _, text = policy.partition(":") if isinstance(policy, str) else ("", "", "")
    if kind != "static" or not (text == "auto" or (text.isascii() and text.isdigit())):
        raise PlanError(
            f"policy is {policy!r}; expected adaptive, batch-adaptive, static:auto or static:D such as static:4."
        )
    if text == "auto":
        check_longest_fits(problem)
        return problem, feasible_static_degrees(problem)[0]
    degree = int(text)
    if not 1 <= degree <= problem.num_ranks:
        raise PlanError(
            f"policy is {policy!r}, but there are {problem.num_ranks} ranks; expected a degree from 1 to that."
        )
    if not problem.cost_model.allows_degree(degree, attention=problem.attention):
        raise PlanError(
            f"policy is {policy!r}, but {problem.attention} cannot share {problem.cost_model.num_heads} heads among "
            f"{degree} ranks; use a degree that divides them or another attention method."
        )
    # A static degree is the user's word, also where the degree rule would not propose it.
    allowed = tuple(sorted({*problem.degrees, degree}))
    return Problem(problem.lengths, problem.num_ranks, problem.cost_model, problem.attention, allowed), degree


def _step_plan(problem: Problem, result: SearchResult, sync: str, *, solve_time_s: float) -> StepPlan:
    step_time_s = problem.step_time_s(result.draft)
    proven_s = max(step_lower_bound_s(problem), result.lower_bound_s)
    bound_s = step_time_s if result.exact else min(proven_s, step_time_s)
    proven = step_time_s <= bound_s * (1 + _PROOF_TOLERANCE)
    outcome: Outcome = "optimal" if proven else "feasible"
    plan = StepPlan(
        plan_id="",
        num_ranks=problem.num_ranks,
        num_sequences=len(problem.lengths),
        sync=sync,
        cost_model=CostModelReference(problem.cost_model.name, problem.cost_model.sha256),
        micro_batches=_placed(problem, result.draft),
        predicted_step_time_s=step_time_s,
        lower_bound_s=bound_s,
        outcome=outcome,
        solve_time_s=solve_time_s,
        reason=result.reason,
    )
    return plan.with_plan_id()


def _placed(problem: Problem, draft: Draft) -> tuple[MicroBatchPlan, ...]:
    return tuple(_placed_micro_batch(problem, micro_batch) for micro_batch in draft)


def _placed_micro_batch(problem: Problem, micro_batch: DraftMicroBatch) -> MicroBatchPlan:
    ordered = sorted(micro_batch, key=lambda group: (-group.degree, min(group.sequences)))
    model = problem.cost_model
    groups: list[GroupPlan] = []
    for group, ranks in zip(ordered, place([group.degree for group in ordered]), strict=True):
        lengths = [problem.lengths[i] for i in group.sequences]
        groups.append(
            GroupPlan(
                ranks=ranks,
                degree=group.degree,
                attention=LOCAL_ATTENTION if group.degree == 1 else problem.attention,
                sequences=tuple(sorted(group.sequences)),
                num_tokens=sum(lengths),
                predicted_time_s=model.group_time_s(lengths, group.degree),
                predicted_memory_bytes=round(model.group_memory_bytes(lengths, group.degree, problem.num_ranks)),
            )
        )
    return MicroBatchPlan(predicted_time_s=problem.makespan_s(micro_batch), groups=tuple(groups))
