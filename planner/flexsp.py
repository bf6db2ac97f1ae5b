"""FlexSP's own formulation, as the baseline that raysp is compared with: buckets, every group, one MILP a micro-batch.

Sorted lengths are cut into contiguous micro-batches; each is bucketed (16 buckets) and solved over groups p of every
power-of-two degree d, N/d copies of each (2N-1 of them: 127 at N = 64):

    minimise C
    x[q,p] whole, m[p] 0 or 1; for every group p of degree d:
      sum_p x[q,p] = n_q                                           every sequence once
      sum_q share(q,d)*x[q,p] + fixed(1) + (fixed(d)-fixed(1))*m[p] <= C     time
      sum_q s_q*x[q,p] <= max_tokens(d)*m[p]                       memory, and the link between sequences and group
      sum_p d*m[p] <= N                                            ranks

As in the paper there is no first incumbent, no cut between identical groups and no search beside the program; buckets
count as their longest sequence inside the program, and the result is judged with the real lengths. What differs: the
paper solves with SCIP, this with HiGHS on one thread (or CBC); where the paper leaves open what happens without an
incumbent in time, the best homogeneous LPT (longest processing time first) fill of the micro-batch is taken.

Source: FlexSP (arXiv:2412.01523), sections 4.1 and 4.2.
"""

from __future__ import annotations

import heapq
import importlib
import math
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from planner.buckets import Bucketing, bucket_lengths
from planner.cluster import Cluster
from planner.cost_model import CostModel
from planner.errors import InfeasibleError, PlanError
from planner.group_kind import GroupKind
from planner.micro_batches import split_contiguous
from planner.plan import CostModelReference, GroupPlan, MicroBatchPlan, StepPlan
from planner.solver import SolveLimits, SolverOutcome, solve

NUM_BUCKETS = 16
# Counts tried: the first that is feasible and two more.
_NUM_COUNTS = 3
# A shared machine may give a solver a small part of a core; beyond this many times its CPU time it ends all the same.
_WALL_PER_CPU = 40.0
_RELATIVE_GAP = 1e-4


class FilledGroup(NamedTuple):
    """A group of a micro-batch: its degree and the places of its sequences among the lengths."""

    degree: int
    members: tuple[int, ...]


@dataclass(frozen=True)
class MicroBatchTask:
    """One micro-batch to solve, as a value that travels to a worker process; fields as in `flexsp_plan`."""

    lengths: tuple[int, ...]
    num_ranks: int
    cost_model: CostModel
    solver_cpu_s: float
    num_buckets: int
    seed: int
    solvers: tuple[str, ...]


@dataclass(frozen=True)
class SolvedMicroBatch:
    """The groups found for a micro-batch; empty if nothing holds it.

    Attributes:
        groups: Members are places in the task's lengths.
        makespan_s: Predicted seconds of the slowest group with the real lengths; infinite without groups.
        ending: ``"optimal"``, ``"time-limited"`` (an incumbent without proof), ``"fallback"`` (no incumbent).
    """

    groups: tuple[FilledGroup, ...]
    makespan_s: float
    ending: str


def flexsp_plan(
    lengths: Sequence[int],
    num_ranks: int,
    cost_model: CostModel,
    *,
    solver_cpu_s: float = 10.0,
    num_buckets: int = NUM_BUCKETS,
    micro_batch_counts: Sequence[int] | None = None,
    num_processes: int = 1,
    seed: int = 0,
    solvers: Sequence[str] = ("HiGHS", "CBC"),
) -> StepPlan:
    """Plan one step as FlexSP does; see the top of this file.

    Args:
        lengths: Tokens of every sequence of the global batch; the index is the sequence id.
        num_ranks: Ranks of the job.
        cost_model: Predicts time and memory.
        solver_cpu_s: Seconds for each micro-batch's program: CPU time of the solver's single thread with HiGHS, wall
            time with CBC, which offers nothing else.
        num_buckets: Buckets of each micro-batch at most.
        micro_batch_counts: Numbers of micro-batches to try, the best is taken; by default the first feasible one from
            ceil(tokens / capacity) up and the next two.
        num_processes: Micro-batches of one count that are solved at the same time, each in a process of its own.
        seed: Seed of the solver.
        solvers: Names of PuLP solvers in order of preference. Empty: every micro-batch falls back.

    Returns:
        A plan; `reason` counts how the programs of its micro-batches ended.

    Raises:
        PlanError: No lengths, or no count given is feasible.
        InfeasibleError: The longest sequence fits no group.
    """
    started_s = time.monotonic()
    if not lengths or min(lengths) < 1 or num_ranks < 1:
        raise PlanError(f"{len(lengths)} lengths on {num_ranks} ranks; expected at least one of both, all positive.")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    descending = [int(lengths[i]) for i in order]
    capacity = _capacity_tokens(descending[0], num_ranks, cost_model)
    first = min(len(descending), max(1, -(-sum(descending) // capacity)))
    counts: Iterable[int] = range(first, len(descending) + 1) if micro_batch_counts is None else micro_batch_counts
    wanted = _NUM_COUNTS if micro_batch_counts is None else len(micro_batch_counts)

    def task(run: slice) -> MicroBatchTask:
        part = tuple(descending[run])
        return MicroBatchTask(part, num_ranks, cost_model, solver_cpu_s, num_buckets, seed, tuple(solvers))

    best: list[tuple[slice, SolvedMicroBatch]] = []
    best_s = math.inf
    num_feasible = num_programs = 0
    tried: set[int] = set()
    with _pool(num_processes) as pool:
        apply: Callable[..., Iterable[SolvedMicroBatch]] = map if pool is None else pool.map
        for count in counts:
            runs = split_contiguous(descending, count)
            # The smallest maximum may need fewer micro-batches than wanted; that count has had its turn.
            if len(runs) in tried:
                continue
            tried.add(len(runs))
            solved = list(zip(runs, apply(solve_micro_batch, [task(run) for run in runs]), strict=True))
            num_programs += len(runs)
            total_s = math.fsum(item.makespan_s for _, item in solved)
            num_feasible += math.isfinite(total_s)
            if total_s < best_s:
                best, best_s = solved, total_s
            if num_feasible == wanted:
                break
    if not best:
        raise PlanError(f"no micro-batch count of {list(counts)} holds the batch; expected larger ones. Change them.")
    return assembled_plan(
        lengths,
        [
            [FilledGroup(group.degree, tuple(order[run][i] for i in group.members)) for group in item.groups]
            for run, item in best
        ],
        num_ranks,
        cost_model,
        solve_time_s=time.monotonic() - started_s,
        reason=_reason([item.ending for _, item in best], num_programs, solver_cpu_s),
    )


def solve_micro_batch(task: MicroBatchTask) -> SolvedMicroBatch:
    """Solve one micro-batch: the program, or where it leaves no incumbent the best homogeneous fill."""
    bucketing = bucket_lengths(task.lengths, task.num_buckets)
    slots = possible_groups(task.num_ranks, task.cost_model)
    outcome = _solved(build_program(task, bucketing, slots), task)
    groups = _read(outcome, bucketing, slots)
    if groups and _fits(task, groups):
        ending = "optimal" if outcome.status == "optimal" else "time-limited"
        return SolvedMicroBatch(groups, _makespan_s(task, groups), ending)
    fills = [fill for degree in sorted(set(slots)) if (fill := _homogeneous_fill(task, degree))]
    if not fills:
        return SolvedMicroBatch((), math.inf, "fallback")
    fill = min(fills, key=lambda groups: _makespan_s(task, groups))
    return SolvedMicroBatch(fill, _makespan_s(task, fill), "fallback")


def possible_groups(num_ranks: int, cost_model: CostModel) -> list[int]:
    """Return the degree of every group that may exist: floor(N/d) copies of each power of two, largest first."""
    powers = [1 << power for power in reversed(range(num_ranks.bit_length()))]
    return [d for d in powers if cost_model.allows_degree(d) for _ in range(num_ranks // d)]


def build_program(task: MicroBatchTask, bucketing: Bucketing, slots: Sequence[int]) -> Any:
    """Build the `pulp.LpProblem` of a micro-batch over groups of the degrees `slots`.

    Times are in units of the micro-batch's work on one rank shared by all, so that solver tolerances are relative.
    """
    pulp = importlib.import_module("pulp")
    model = task.cost_model
    lengths = [bucket.length for bucket in bucketing.buckets]
    share_s = {
        (q, d): float(seconds)
        for d in set(slots)
        for q, seconds in enumerate(model.sequence_times_s(lengths, _kind(d, model)))
    }
    fixed_s = {degree: model.kind_fixed_s(_kind(degree, model)) for degree in {1, *slots}}
    work_s = sum(share_s[q, min(slots)] * len(bucket.members) for q, bucket in enumerate(bucketing.buckets))
    scale_s = work_s / task.num_ranks + fixed_s[1] or 1.0
    num_tokens = sum(bucket.length * len(bucket.members) for bucket in bucketing.buckets)
    program = pulp.LpProblem("flexsp", pulp.LpMinimize)
    makespan = program.add_variable("C", lowBound=0)
    program += makespan
    exists = [program.add_variable(f"m_{p}", cat=pulp.LpBinary) for p in range(len(slots))]
    dealt = {
        (q, p): program.add_variable(_x(q, p), lowBound=0, upBound=len(bucket.members), cat=pulp.LpInteger)
        for q, bucket in enumerate(bucketing.buckets)
        for p in range(len(slots))
    }
    for q, bucket in enumerate(bucketing.buckets):
        program += pulp.lpSum(dealt[q, p] for p in range(len(slots))) == len(bucket.members)
    for p, degree in enumerate(slots):
        # Without a memory limit the row still says that a group with sequences exists.
        capacity = min(max(1, model.max_tokens(degree, task.num_ranks)), num_tokens)
        time_s = pulp.lpSum(share_s[q, degree] / scale_s * dealt[q, p] for q in range(len(bucketing.buckets)))
        extra_s = fixed_s[degree] - fixed_s[1]
        program += time_s + fixed_s[1] / scale_s + extra_s / scale_s * exists[p] <= makespan
        loads = (bucket.length / capacity * dealt[q, p] for q, bucket in enumerate(bucketing.buckets))
        program += pulp.lpSum(loads) <= exists[p]
    program += pulp.lpSum(degree * exists[p] for p, degree in enumerate(slots)) <= task.num_ranks
    return program


def _solved(program: Any, task: MicroBatchTask) -> SolverOutcome:
    others = [name for name in task.solvers if name != "HiGHS"]
    if len(others) < len(task.solvers):
        stop_after_cpu_s(program, task.solver_cpu_s)
        limits = SolveLimits(max(1.0, _WALL_PER_CPU * task.solver_cpu_s), None, task.seed, _RELATIVE_GAP)
        outcome = solve(program, limits=limits, solvers=["HiGHS"])
        if outcome.solver:
            return outcome
    return solve(program, limits=SolveLimits(task.solver_cpu_s, None, task.seed, _RELATIVE_GAP), solvers=others)


def stop_after_cpu_s(program: Any, cpu_s: float) -> None:
    """Make HiGHS stop a PuLP model after `cpu_s` seconds of CPU time of the thread that solves it.

    HiGHS itself limits wall time only, which on a shared machine would weaken the baseline. PuLP assigns the solver
    object to the model just before it runs; that is where the interrupt is attached.
    """
    kind = type(program)

    class CpuLimited(kind):  # type: ignore[misc, valid-type]
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "solverModel" and value is not None:
                started_s = time.thread_time()

                def interrupt(event: Any) -> None:
                    if time.thread_time() - started_s >= cpu_s:
                        event.interrupt()

                value.cbMipInterrupt += interrupt
                value.cbSimplexInterrupt += interrupt

    program.__class__ = CpuLimited


def _read(outcome: SolverOutcome, bucketing: Bucketing, slots: Sequence[int]) -> tuple[FilledGroup, ...]:
    """Return the groups of an incumbent; none if there is no incumbent or it misses a sequence."""
    if outcome.objective is None:
        return ()
    members: list[list[int]] = [[] for _ in slots]
    for q, bucket in enumerate(bucketing.buckets):
        position = 0
        for p in range(len(slots)):
            count = round(outcome.values.get(_x(q, p), 0.0))
            members[p] += bucket.members[position : position + count]
            position += count
        if position != len(bucket.members):
            return ()
    return tuple(FilledGroup(degree, tuple(ids)) for degree, ids in zip(slots, members, strict=True) if ids)


def _fits(task: MicroBatchTask, groups: Sequence[FilledGroup]) -> bool:
    return sum(group.degree for group in groups) <= task.num_ranks and all(
        sum(task.lengths[i] for i in group.members) <= task.cost_model.max_tokens(group.degree, task.num_ranks)
        for group in groups
    )


def _homogeneous_fill(task: MicroBatchTask, degree: int) -> tuple[FilledGroup, ...]:
    """Deal the sequences, longest first, each to the group with the least time that has room; none if one has not."""
    room = task.cost_model.max_tokens(degree, task.num_ranks)
    share_s = task.cost_model.sequence_times_s(task.lengths, _kind(degree, task.cost_model)).tolist()
    members: list[list[int]] = [[] for _ in range(task.num_ranks // degree)]
    tokens = [0] * len(members)
    heap = [(0.0, group) for group in range(len(members))]
    for i in sorted(range(len(task.lengths)), key=lambda i: (-task.lengths[i], i)):
        full: list[tuple[float, int]] = []
        while heap and tokens[heap[0][1]] + task.lengths[i] > room:
            full.append(heapq.heappop(heap))
        if not heap:
            return ()
        time_s, group = heapq.heappop(heap)
        members[group].append(i)
        tokens[group] += task.lengths[i]
        for item in ((time_s + share_s[i], group), *full):
            heapq.heappush(heap, item)
    return tuple(FilledGroup(degree, tuple(ids)) for ids in members if ids)


def _makespan_s(task: MicroBatchTask, groups: Iterable[FilledGroup]) -> float:
    model = task.cost_model
    return max(model.kind_time_s([task.lengths[i] for i in g.members], _kind(g.degree, model)) for g in groups)


def _capacity_tokens(longest: int, num_ranks: int, model: CostModel) -> int:
    """Return the tokens that one micro-batch can hold at most."""
    room = {degree: model.max_tokens(degree, num_ranks) for degree in possible_groups(num_ranks, model)}
    degree = max(room, key=lambda d: room[d])
    if longest > room[degree]:
        raise InfeasibleError(
            f"a sequence has {longest} tokens, but {num_ranks} ranks in a group of degree {degree} hold "
            f"{max(0, room[degree])}. Use more ranks, raise the memory limit or split documents."
        )
    return max(1, math.floor(max(tokens / d for d, tokens in room.items()) * num_ranks * (1 + 1e-12)))


def assembled_plan(
    lengths: Sequence[int],
    micro_batches: Sequence[Sequence[FilledGroup]],
    num_ranks: int,
    model: CostModel,
    *,
    solve_time_s: float = 0.0,
    reason: str = "",
) -> StepPlan:
    """Give groups their ranks and predicted numbers; members are sequence ids.

    Raises:
        PlanError: The groups of a micro-batch need more ranks than there are.
    """
    cluster = Cluster.uniform(num_ranks, model.gpus_per_node)
    placed = tuple(_placed(lengths, groups, cluster, model) for groups in micro_batches)
    step_time_s = math.fsum(item.predicted_time_s for item in placed) + model.step_fixed_s()
    plan = StepPlan(
        plan_id="",
        num_ranks=num_ranks,
        num_sequences=len(lengths),
        sync="per-layer",
        cost_model=CostModelReference(model.name, model.sha256),
        micro_batches=placed,
        predicted_step_time_s=step_time_s,
        lower_bound_s=min(step_time_s, _lower_bound_s(lengths, num_ranks, model)),
        outcome="feasible",
        solve_time_s=solve_time_s,
        reason=reason,
    )
    return plan.with_plan_id()


def _placed(
    lengths: Sequence[int], groups: Sequence[FilledGroup], cluster: Cluster, model: CostModel
) -> MicroBatchPlan:
    ordered = sorted(groups, key=lambda group: (-group.degree, min(group.members)))
    # Descending powers of two from rank 0 on are aligned; the ranks then say which groups do span nodes.
    ranks_of = cluster.place([_kind(group.degree, model)._replace(spans_nodes=True) for group in ordered])
    if ranks_of is None:
        raise PlanError(f"groups of {sum(group.degree for group in groups)} ranks; {cluster.num_ranks} exist.")
    plans: list[GroupPlan] = []
    for group, ranks in zip(ordered, ranks_of, strict=True):
        tokens = [lengths[i] for i in group.members]
        kind = cluster.kind_at(_kind(group.degree, model), ranks)
        plans.append(
            GroupPlan(
                ranks=ranks,
                degree=group.degree,
                attention=kind.attention,
                sequences=tuple(sorted(group.members)),
                num_tokens=sum(tokens),
                predicted_time_s=model.kind_time_s(tokens, kind),
                predicted_memory_bytes=round(model.kind_memory_bytes(sum(tokens), kind, cluster.num_ranks)),
            )
        )
    return MicroBatchPlan(max(plan.predicted_time_s for plan in plans), tuple(plans))


def _kind(degree: int, model: CostModel) -> GroupKind:
    kind = model.primary_kind(degree)
    return kind._replace(spans_nodes=model.gpus_per_node is not None and degree > model.gpus_per_node)


def _lower_bound_s(lengths: Sequence[int], num_ranks: int, model: CostModel) -> float:
    """Return the work of every sequence at the degree that does it with least, spread over all ranks."""
    distinct, counts = np.unique(np.asarray(lengths, dtype=np.int64), return_counts=True)
    work_s = np.full(len(distinct), np.inf)
    for degree in set(possible_groups(num_ranks, model)):
        # Inside a node, which is never slower.
        seconds = degree * model.sequence_times_s(distinct, model.primary_kind(degree))
        held = distinct <= model.max_tokens(degree, num_ranks)
        work_s = np.where(held, np.minimum(work_s, seconds), work_s)
    first = max(1, -(-sum(lengths) // _capacity_tokens(max(lengths), num_ranks, model)))
    total_s = float(counts @ work_s) / num_ranks + first * model.fixed_s(1) + model.step_fixed_s()
    return total_s * (1 - 1e-12)


def _reason(endings: Sequence[str], num_programs: int, solver_cpu_s: float) -> str:
    counts = Counter(endings)
    told = [f"{counts[ending]} {ending}" for ending in ("optimal", "time-limited", "fallback") if counts[ending]]
    return f"FlexSP: {', '.join(told)} of {len(endings)} programs ({num_programs} tried, {solver_cpu_s:g} s each)"


def _pool(num_processes: int) -> Any:
    if num_processes <= 1:
        return nullcontext()
    return ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn"))


def _x(bucket: int, group: int) -> str:
    return f"x_{bucket}_{group}"
