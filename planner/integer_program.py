"""The integer program of one micro-batch: how many sequences of each bucket go to each group that may exist.

    minimise C
    x[q,g] whole, y[g] 0 or 1; for every possible group g, of degree d:
      sum_g x[q,g] = n_q                              every sequence once
      sum_q share(q,g)*x[q,g] + fixed(g)*y[g] <= C    time
      sum_q s_q*x[q,g] <= max_tokens(g)*y[g]          memory
      sum_g d*y[g] <= N                               ranks
      groups of one kind in descending time            breaks the symmetry of identical groups

Times are in units of the incumbent's makespan and tokens in those of a group's capacity, so that solver tolerances
are relative. Buckets stand for their longest sequence, and results are judged again with the real lengths.

Source: FlexSP (arXiv:2412.01523), section 4.1.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from planner.buckets import Bucketing, bucket_lengths
from planner.budget import Budget
from planner.problem import DraftGroup, DraftMicroBatch, Problem
from planner.solver import SolveLimits, SolverOutcome, solve

# Beyond this many integers HiGHS holds nothing good within seconds, and LPT is close already.
MAX_INTEGERS = 700
_MAX_DISTINCT = 24
_NUM_BUCKETS = 16
# Nobody waits for the last tenth of a per cent.
_RELATIVE_GAP = 1e-3
_BOUND_SLACK = 1e-5


@dataclass(frozen=True)
class ProgramResult:
    """A micro-batch, never slower than the one given.

    Attributes:
        micro_batch: The better one of incumbent and solution.
        outcome: What the solver said; `None` if the program was too large to try.
        note: For people; empty if there is nothing to tell.
        bound_s: Lower bound of the makespan of these sequences in one micro-batch, over all shapes; 0 if the program
            left something out (merged lengths, fewer groups).
    """

    micro_batch: DraftMicroBatch
    outcome: SolverOutcome | None
    note: str
    bound_s: float = 0.0


@dataclass(frozen=True)
class Slot:
    """A group that may exist: its kind and its place among those of that kind."""

    kind: int
    place: int


def improve_with_program(
    problem: Problem,
    incumbent: DraftMicroBatch,
    bound_s: float,
    time_limit_s: float | None,
    budget: Budget,
    solvers: Sequence[str],
) -> ProgramResult:
    """Try to make one micro-batch faster by an integer program.

    Args:
        problem: The batch.
        incumbent: A feasible micro-batch; its sequences are dealt anew.
        bound_s: A lower bound of its makespan.
        time_limit_s: Seconds for the solver, `None` with a node limit.
        budget: Node limit and seed.
        solvers: In order of preference.
    """
    ids = [i for group in incumbent for i in group.sequences]
    lengths = [problem.lengths[i] for i in ids]
    distinct = len(set(lengths))
    bucketing = bucket_lengths(lengths, distinct if distinct <= _MAX_DISTINCT else _NUM_BUCKETS)
    slots = _slots_within(problem, incumbent, bucketing)
    if not slots:
        return ProgramResult(incumbent, None, "")
    limits = SolveLimits(time_limit_s, budget.node_limit, budget.seed, _RELATIVE_GAP)
    incumbent_s = problem.makespan_s(incumbent)
    program = build_program(problem, bucketing, slots, scale_s=incumbent_s, bound_s=bound_s)
    start = _start_values(problem, bucketing, slots, incumbent, ids, incumbent_s)
    outcome = solve(program, limits=limits, solvers=solvers, start=start)
    complete = bucketing.error_tokens == 0 and len(slots) == len(possible_slots(problem, len(ids)))
    # Solver tolerances are about 1e-7 of the scaled objective; a certified bound stays clear of them.
    proven_s = (outcome.bound - _BOUND_SLACK) * incumbent_s if complete and outcome.bound is not None else 0.0
    if outcome.objective is None:
        return ProgramResult(incumbent, outcome, outcome.message, proven_s)
    micro_batch = read_solution(outcome.values, bucketing, slots, ids)
    if micro_batch is None or not problem.fits((micro_batch,)):
        return ProgramResult(
            incumbent, outcome, f"{outcome.solver}: solution refused, it breaks a constraint", proven_s
        )
    if problem.makespan_s(micro_batch) >= incumbent_s:
        return ProgramResult(incumbent, outcome, "", proven_s)
    return ProgramResult(micro_batch, outcome, f"improved by {outcome.solver}", proven_s)


def possible_slots(problem: Problem, num_sequences: int) -> list[Slot]:
    """Return every group that any shape of the ranks can have: floor(N/d) of each kind, at most one per sequence."""
    counts = [min(problem.num_ranks // degree, num_sequences) for degree in problem.degrees]
    return [Slot(k, place) for k, count in enumerate(counts) for place in range(count)]


def build_program(
    problem: Problem, bucketing: Bucketing, slots: Sequence[Slot], *, scale_s: float, bound_s: float = 0.0
) -> Any:
    """Build the `pulp.LpProblem` of a micro-batch; its objective is the makespan in units of `scale_s`."""
    pulp = importlib.import_module("pulp")
    program = pulp.LpProblem("micro_batch", pulp.LpMinimize)
    makespan = program.add_variable("C", lowBound=bound_s / scale_s * (1 - 1e-9))
    program += makespan
    exists = [program.add_variable(_y(g), cat=pulp.LpBinary) for g in range(len(slots))]
    dealt: dict[tuple[int, int], Any] = {}
    for q, bucket in enumerate(bucketing.buckets):
        for g, slot in enumerate(slots):
            most = min(len(bucket.members), problem.max_tokens[slot.kind] // bucket.length)
            if most > 0:
                dealt[q, g] = program.add_variable(_x(q, g), lowBound=0, upBound=most, cat=pulp.LpInteger)
        program += pulp.lpSum(dealt[q, g] for g in range(len(slots)) if (q, g) in dealt) == len(bucket.members)
    program += pulp.lpSum(problem.degrees[s.kind] * exists[g] for g, s in enumerate(slots)) <= problem.num_ranks
    loads: list[Any] = []
    for g, slot in enumerate(slots):
        inside = [(q, dealt[q, g]) for q in range(len(bucketing.buckets)) if (q, g) in dealt]
        lengths = [bucketing.buckets[q].length for q, _ in inside]
        capacity = problem.max_tokens[slot.kind]
        seconds = [_share_s(problem, length, slot.kind) / scale_s for length in lengths]
        time = pulp.lpSum(s * x for s, (_, x) in zip(seconds, inside, strict=True))
        load = pulp.lpSum(length / capacity * x for length, (_, x) in zip(lengths, inside, strict=True))
        program += time + problem.fixed_s[slot.kind] / scale_s * exists[g] <= makespan
        program += load <= exists[g]
        if capacity > 100 * sum(len(b.members) * b.length for b in bucketing.buckets):
            # Memory says next to nothing here; the link between sequences and the group must be its own row.
            for _, x in inside:
                program += x <= x.upBound * exists[g]
        loads.append(time)
        if slot.place > 0:
            program += exists[g] <= exists[g - 1]
            program += loads[g] <= loads[g - 1]
    return program


def read_solution(
    values: Mapping[str, float], bucketing: Bucketing, slots: Sequence[Slot], ids: Sequence[int]
) -> DraftMicroBatch | None:
    """Return the groups of a solution, or `None` if it does not deal every sequence exactly once."""
    members: list[list[int]] = [[] for _ in slots]
    for q, bucket in enumerate(bucketing.buckets):
        position = 0
        for g in range(len(slots)):
            count = round(values.get(_x(q, g), 0.0))
            members[g] += [ids[i] for i in bucket.members[position : position + count]]
            position += count
        if position != len(bucket.members):
            return None
    return tuple(DraftGroup(slot.kind, tuple(group)) for slot, group in zip(slots, members, strict=True) if group)


def _slots_within(problem: Problem, incumbent: DraftMicroBatch, bucketing: Bucketing) -> list[Slot]:
    """Return every possible group if the program stays small, else the incumbent's and a few more, else none."""
    num_sequences = sum(len(bucket.members) for bucket in bucketing.buckets)
    slots = possible_slots(problem, num_sequences)
    if len(slots) * len(bucketing.buckets) <= MAX_INTEGERS:
        return slots
    used = [group.kind for group in incumbent]
    near = [s for s in slots if s.place < used.count(s.kind) + (2 if problem.degrees[s.kind] > 1 else 4)]
    return near if len(near) * len(bucketing.buckets) <= MAX_INTEGERS else []


def _start_values(
    problem: Problem,
    bucketing: Bucketing,
    slots: Sequence[Slot],
    incumbent: DraftMicroBatch,
    ids: Sequence[int],
    scale_s: float,
) -> dict[str, float] | None:
    """Return the incumbent as values of the program's variables, or `None` if its buckets overflow memory."""
    bucket_of = {ids[i]: q for q, bucket in enumerate(bucketing.buckets) for i in bucket.members}
    filled: dict[int, list[list[int]]] = {}
    for group in incumbent:
        counts = [0] * len(bucketing.buckets)
        for i in group.sequences:
            counts[bucket_of[i]] += 1
        filled.setdefault(group.kind, []).append(counts)
    lengths = [bucket.length for bucket in bucketing.buckets]
    start = {_x(q, g): 0.0 for q in range(len(lengths)) for g in range(len(slots))}
    start.update({_y(g): 0.0 for g in range(len(slots))})
    makespan = 0.0
    for g, slot in enumerate(slots):
        same = sorted(filled.get(slot.kind, []), key=lambda counts: -_load_s(problem, counts, lengths, slot.kind))
        if slot.place >= len(same):
            continue
        counts = same[slot.place]
        if sum(n * s for n, s in zip(counts, lengths, strict=True)) > problem.max_tokens[slot.kind]:
            return None
        start[_y(g)] = 1.0
        start.update({_x(q, g): float(n) for q, n in enumerate(counts)})
        time_s = _load_s(problem, counts, lengths, slot.kind) + problem.fixed_s[slot.kind]
        makespan = max(makespan, time_s / scale_s)
    start["C"] = makespan
    return start


def _load_s(problem: Problem, counts: Sequence[int], lengths: Sequence[int], kind: int) -> float:
    return sum(n * _share_s(problem, s, kind) for n, s in zip(counts, lengths, strict=True))


def _share_s(problem: Problem, length: int, kind: int) -> float:
    return float(problem.cost_model.sequence_times_s((length,), problem.kinds[kind])[0])


def _x(bucket: int, group: int) -> str:
    return f"x_{bucket}_{group}"


def _y(group: int) -> str:
    return f"y_{group}"
