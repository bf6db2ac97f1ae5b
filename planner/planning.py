"""`plan_step`: the one entry point of planning, from lengths to a placed `StepPlan`."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

from planner.baselines import batch_adaptive_draft, feasible_static_degrees, static_draft
from planner.bounds import step_lower_bound_s
from planner.budget import Budget
from planner.cluster import Cluster
from planner.cost_model import CostModel
from planner.errors import PlanError
from planner.gang import GangResult, batch_adaptive_gang, gang_search, static_gang
from planner.gang_schedule import GangGroup, schedule
from planner.group_kind import GroupKind
from planner.plan import CostModelReference, GroupPlan, MicroBatchPlan, Outcome, StepPlan
from planner.portfolio import SearchResult, adaptive_search
from planner.problem import DraftMicroBatch, Problem, allowed_kinds, check_longest_fits, make_problem
from planner.solver import missing_solvers
from planner.warm_up import warm_up

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
    cluster: Cluster | None = None,
    num_threads: int = 2,
    on_incumbent: Callable[[StepPlan], None] | None = None,
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
        sync: ``"per-layer"``: all ranks meet in every micro-batch, the step costs the sum of the slowest groups.
            ``"per-step"``: parameters stay unsharded, ranks meet in their groups and once per step; see
            `planner.gang`.
        degrees: ``"powers-of-two"``, or ``"any"`` for methods such as ring that run at every degree.
        time_limit_s: Seconds after which searching stops. The homogeneous plans are always finished, so a plan comes
            back even at 0, and late where that alone takes longer. The first call of a process loads the compiled
            loops before its clock starts, and the first after an installation compiles them, which takes some seconds.
        node_limit: Branch-and-bound nodes of each integer program, and chunks of up to 20,000 proposals of each annealing
            run. When given, `time_limit_s` and the clock are ignored: equal inputs give equal plans on every machine,
            `solve_time_s` aside.
        seed: Seed of annealing and solver.
        attention: Parallel attention method in place of the cost model's; without it, groups choose among those that
            the cost model has.
        solvers: Names of PuLP solvers in order of preference; the next is used where one is missing. Empty: none.
        cluster: Nodes with their GPUs, speeds and memory; none: equal nodes of the cost model's `gpus_per_node`.
        num_threads: Threads of the search, 1 or 2.
        on_incumbent: Called with a first plan after some milliseconds and with clearly better ones, from this thread.
        clock: Monotonic seconds, for tests.

    Returns:
        A plan whose `outcome` is ``"optimal"`` only where proven.

    Raises:
        PlanError: An argument is malformed.
        InfeasibleError: A sequence fits no group that the policy and the ranks allow.

    Source:
        FlexSP (arXiv:2412.01523), sections 4 and 5.
    """
    problem = make_problem(lengths, num_ranks, cost_model, attention, degrees, sync=sync, cluster=cluster)
    warm_up(sync)
    started_s = clock()
    budget = Budget.start(time_limit_s, node_limit, seed, clock)

    absent = missing_solvers(solvers)

    def planned(result: SearchResult | GangResult) -> StepPlan:
        if absent and policy == "adaptive" and not result.exact:
            why = f"solver not installed: {', '.join(absent)}"
            result = dataclasses.replace(result, reason=f"{result.reason}; {why}")
        return _step_plan(problem, result, cluster, solve_time_s=max(0.0, clock() - started_s))

    def report(result: SearchResult | GangResult) -> None:
        if on_incumbent is not None:
            on_incumbent(planned(result))

    if policy == "adaptive":
        check_longest_fits(problem)
        search = gang_search if sync == "per-step" else adaptive_search
        return planned(search(problem, budget, tuple(solvers), num_threads=num_threads, on_better=report))
    if policy == "batch-adaptive":
        check_longest_fits(problem)
        return planned(batch_adaptive_gang(problem) if sync == "per-step" else _batch_adaptive(problem))
    problem, degree = _with_static_degree(problem, policy, attention)
    if sync == "per-step":
        return planned(static_gang(problem, degree))
    return planned(SearchResult(static_draft(problem, degree), False, f"static degree {degree}"))


def _batch_adaptive(problem: Problem) -> SearchResult:
    draft = batch_adaptive_draft(problem)
    return SearchResult(draft, False, f"best single degree for this batch: {problem.degrees[draft[0][0].kind]}")


def _with_static_degree(problem: Problem, policy: str, attention: str | None) -> tuple[Problem, int]:
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
    if degree in problem.degrees:
        return problem, degree
    # A static degree is the user's word, also where the degree rule would not propose it.
    every = allowed_kinds(problem.cluster, problem.cost_model, attention, "any")
    kinds = tuple(kind for kind in every if kind.degree == degree)
    if not kinds:
        method = problem.cost_model.attention if attention is None else attention
        raise PlanError(
            f"policy is {policy!r}, but {method} cannot share {problem.cost_model.num_heads} heads among "
            f"{degree} ranks; use a degree that divides them or another attention method."
        )
    allowed = tuple(sorted([*problem.kinds, *kinds], key=lambda kind: kind.degree))
    return dataclasses.replace(problem, kinds=allowed), degree


def _step_plan(
    problem: Problem, result: SearchResult | GangResult, cluster: Cluster | None, *, solve_time_s: float
) -> StepPlan:
    if isinstance(result, GangResult):
        micro_batches = tuple(_micro_batch_of(problem, groups) for groups in result.micro_batches)
        timed = ([(group.ranks, group.predicted_time_s) for group in each.groups] for each in micro_batches)
        step_time_s = schedule(timed).last_end_s + problem.step_fixed_s
        proven_s = result.lower_bound_s
    else:
        micro_batches = tuple(_placed_micro_batch(problem, micro_batch) for micro_batch in result.draft)
        step_time_s = math.fsum(each.predicted_time_s for each in micro_batches) + problem.step_fixed_s
        proven_s = max(step_lower_bound_s(problem), result.lower_bound_s)
    bound_s = step_time_s if result.exact else min(proven_s, step_time_s)
    proven = step_time_s <= bound_s * (1 + _PROOF_TOLERANCE)
    outcome: Outcome = "optimal" if proven else "feasible"
    plan = StepPlan(
        plan_id="",
        num_ranks=problem.num_ranks,
        num_sequences=len(problem.lengths),
        sync=problem.sync,
        cost_model=CostModelReference(problem.cost_model.name, problem.cost_model.sha256),
        micro_batches=micro_batches,
        predicted_step_time_s=step_time_s,
        lower_bound_s=bound_s,
        outcome=outcome,
        solve_time_s=solve_time_s,
        cluster=None if cluster is None else problem.cluster,
        reason=result.reason,
    )
    return plan.with_plan_id()


def _placed_micro_batch(problem: Problem, micro_batch: DraftMicroBatch) -> MicroBatchPlan:
    ordered = sorted(micro_batch, key=lambda group: (-problem.degrees[group.kind], min(group.sequences)))
    kinds = [problem.kinds[group.kind] for group in ordered]
    places = problem.cluster.place(kinds)
    if places is None:
        raise PlanError(f"no ranks were found for groups of degrees {[kind.degree for kind in kinds]}.")
    return _micro_batch_of(
        problem, [GangGroup(g.kind, ranks, g.sequences) for g, ranks in zip(ordered, places, strict=True)]
    )


def _micro_batch_of(problem: Problem, placed: Sequence[GangGroup]) -> MicroBatchPlan:
    groups = tuple(placed_group(problem, problem.kinds[g.kind], g.ranks, g.sequences) for g in placed)
    return MicroBatchPlan(predicted_time_s=max(group.predicted_time_s for group in groups), groups=groups)


def placed_group(problem: Problem, kind: GroupKind, ranks: tuple[int, ...], sequences: tuple[int, ...]) -> GroupPlan:
    """Return a group on its ranks, with the time and memory of the GPUs that it really has."""
    model, lengths = problem.cost_model, [problem.lengths[i] for i in sequences]
    actual = problem.cluster.kind_at(kind, ranks)
    memory_bytes = model.kind_memory_bytes(sum(lengths), actual, problem.num_ranks, problem.sync)
    return GroupPlan(
        ranks=ranks,
        degree=kind.degree,
        attention=kind.attention,
        sequences=tuple(sorted(sequences)),
        num_tokens=sum(lengths),
        predicted_time_s=model.kind_time_s(lengths, actual, problem.sync),
        predicted_memory_bytes=round(memory_bytes),
        recompute=kind.recompute,
    )
