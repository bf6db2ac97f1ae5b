"""A certified lower bound of the step by an integer program over time levels, valid for every split of the batch.

A micro-batch of time C is on the level l with ``E_l < C <= E_{l+1}``. Micro-batches, groups and sequences are counted by
level, kind and bucket instead of one by one, so every plan is a solution and the least objective is a bound:

    minimise  sum_l T_l                     T_l: seconds of the micro-batches on level l, m_l their number (whole)
    E_l m_l <= T_l <= E_{l+1} m_l                                          the lowest E counts as 0 where it is not fixed_k
    R[l,k] = d_k n[l,k],  sum_k R[l,k] <= N m_l                            ranks
    sum_q x[q,l,k] over l, k = sequences of q                              every sequence
    sum_q work[q,k] x[q,l,k] + fixed_k R[l,k] <= E_{l+1} R[l,k]            no group ends after its micro-batch
    sum_k (sum_q work[q,k] x[q,l,k] + fixed_k R[l,k]) <= N T_l             rank-seconds
    sum_q s_q x[q,l,k] <= capacity_k R[l,k]                                memory
    sum_q u(q) x[q,l,k] <= n[l,k]                                          whole sequences do not share groups at will

The last row is there for several dual feasible functions u of a sequence's share of a group's memory or time: any
sequences that fit one group have u-values of at most 1 in sum. Levels that the solution uses are cut finer and the
program is solved again while time is left.

A bucket's sequences count as a mixture of its shortest and its longest length, so that tokens are exact; their times are
the chord between the two, lowered until it is below all of them. Where many degrees are allowed, kinds of similar degree
count as one that is as good as the best of them in every respect.

Sources: FlexSP (arXiv:2412.01523), section 4, for the aggregation of equal groups; Fekete and Schepers, "New classes of
fast lower bounds for bin packing problems" (2001), for dual feasible functions.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.bound_buckets import buckets_of, chord, dual_feasible, merged_kinds
from planner.budget import Budget
from planner.problem import Draft, Problem
from planner.solver import SolveLimits, SolverOutcome, solve

# Solver tolerances are about 1e-7 of the scaled objective; a certified bound stays clear of them.
_SLACK = 2e-5
_MIP_GAP = 1e-3
_FIRST_LEVELS = 6
_MAX_ROUNDS = 40
# Without a clock.
_COUNTED_ROUNDS = 2
# A bound this close to the plan needs no more work.
_CLOSE = 1e-3
_FINEST_LEVEL = 1.008
_LOWEST_EDGE = 1e-4
# No single program gets more, so that an interrupted search ends soon.
_LONGEST_SOLVE_S = 10.0
# Groups of a kind are whole in the program where at most so many fit a micro-batch.
_FEW_GROUPS = 8
# Micro-batches of the incumbent within this factor share a level.
_FAR = 1.05


@dataclass(frozen=True)
class LevelBound:
    """What the programs proved.

    Attributes:
        bound_s: Lower bound of the step, the fixed part included; 0 if nothing was proven.
        rounds: Programs solved.
        note: Why there is no bound, for people; else empty.
    """

    bound_s: float
    rounds: int
    note: str = ""


def level_bound(
    problem: Problem,
    incumbent: Draft,
    budget: Budget,
    solvers: Sequence[str],
    time_limit_s: float | None,
) -> LevelBound:
    """Bound the time of every plan under per-layer from below.

    Args:
        problem: The batch; the longest sequence fits some kind.
        incumbent: A known plan; no better one is slower, and levels are cut near its micro-batches.
        budget: Clock, node limit and seed.
        solvers: In order of preference.
        time_limit_s: Seconds for all programs; `None` with a node limit.
    """
    makespans_s = [problem.makespan_s(micro_batch) for micro_batch in incumbent]
    if math.fsum(makespans_s) <= 0:
        return LevelBound(0.0, 0)
    model = _LevelModel(problem, makespans_s)
    start_s = budget.clock()
    bound, note, rounds = 0.0, "", 0
    max_rounds = _MAX_ROUNDS if time_limit_s is not None else _COUNTED_ROUNDS
    while rounds < max_rounds:
        left_s = None if time_limit_s is None else time_limit_s - (budget.clock() - start_s)
        if budget.cancelled.is_set() or (left_s is not None and left_s < 0.02):
            break
        program, variables = model.build()
        limits = SolveLimits(
            None if left_s is None else min(left_s, _LONGEST_SOLVE_S), budget.node_limit, budget.seed, _MIP_GAP
        )
        outcome = solve(program, limits=limits, solvers=solvers)
        rounds += 1
        if outcome.bound is not None:
            bound = max(bound, outcome.bound - _SLACK)
        elif not outcome.solver:
            note = outcome.message
            break
        if bound >= 1 - _CLOSE or outcome.objective is None or not model.refine(outcome, variables):
            break
    return LevelBound(min(bound, 1.0) * model.scale_s + problem.step_fixed_s if bound > 0 else 0.0, rounds, note)


class _LevelModel:
    """The program and its levels; times in units of the incumbent."""

    def __init__(self, problem: Problem, makespans_s: Sequence[float]) -> None:
        self.problem = problem
        self.scale_s = incumbent_s = math.fsum(makespans_s)
        self.kinds = merged_kinds(problem)
        tokens = np.asarray(problem.lengths, dtype=np.int64)
        self.buckets = buckets_of(tokens, [kind.max_tokens for kind in self.kinds])
        alone_s = np.full(len(tokens), math.inf)
        for kind in self.kinds:
            alone_s = np.minimum(alone_s, np.where(tokens <= kind.max_tokens, kind.time + kind.fixed_s, math.inf))
        # Edges far below the step would be coefficients that solvers take for nothing.
        self.least_s = min(kind.fixed_s for kind in self.kinds)
        least = max(self.least_s, _LOWEST_EDGE * incumbent_s)
        slowest = float(alone_s.max()) * (1 - 1e-9)
        edges = {least, slowest, *np.geomspace(least * 1.3, incumbent_s, _FIRST_LEVELS)[:-1].tolist()}
        edges |= _near(makespans_s)
        self.edges = sorted(edge for edge in edges if least <= edge < incumbent_s * (1 - 1e-9)) or [least]
        self.top = incumbent_s * (1 + 1e-6)
        self._parts = [[chord(bucket, kind) for bucket in self.buckets] for kind in self.kinds]

    def build(self) -> tuple[Any, dict[tuple[str, int], Any]]:
        """Return the `pulp.LpProblem` and the variables ``m`` and ``T`` of each level."""
        pulp = importlib.import_module("pulp")
        program = pulp.LpProblem("levels", pulp.LpMinimize)
        uppers = [*self.edges[1:], self.top]
        variables: dict[tuple[str, int], Any] = {}
        for level, low in enumerate(self.edges):
            # Every micro-batch has a sequence.
            num = min(len(self.problem.lengths), math.floor(self.scale_s / low * (1 + 1e-9)))
            variables["m", level] = program.add_variable(f"m_{level}", lowBound=0, upBound=num, cat=pulp.LpInteger)
            variables["T", level] = program.add_variable(f"T_{level}", lowBound=0)
        program += pulp.lpSum(variables["T", level] for level in range(len(self.edges)))
        short: list[list[Any]] = [[] for _ in self.buckets]
        long: list[list[Any]] = [[] for _ in self.buckets]
        for level, (low, high) in enumerate(zip(self.edges, uppers, strict=True)):
            count, total = variables["m", level], variables["T", level]
            # T is in units of the scale, edges in seconds.
            if level > 0 or low <= self.least_s:
                program += total - low / self.scale_s * count >= 0
            program += total - high / self.scale_s * count <= 0
            ranks: list[tuple[Any, float]] = []
            work: list[tuple[Any, float]] = []
            by_pool: dict[frozenset[int], tuple[list[tuple[Any, float]], list[tuple[Any, float]]]] = {}
            for k, kind in enumerate(self.kinds):
                made = self._add_groups(pulp, program, level, high, k, short, long)
                if made is None:
                    continue
                rank_terms, work_terms = made
                ranks += rank_terms
                work += work_terms
                pool_ranks, pool_work = by_pool.setdefault(kind.pool, ([], []))
                pool_ranks += rank_terms
                pool_work += work_terms
            pools = {frozenset(range(len(self.problem.cluster.nodes))): (ranks, work)}
            for pool in by_pool:
                inside = [terms for other, terms in by_pool.items() if other <= pool]
                pools[pool] = ([t for r, _ in inside for t in r], [t for _, w in inside for t in w])
            for pool, (pool_ranks, pool_work) in pools.items():
                size = sum(self.problem.cluster.nodes[node].num_gpus for node in pool)
                program += pulp.LpAffineExpression([*pool_ranks, (count, -size)]) <= 0
                program += pulp.LpAffineExpression([*pool_work, (total, -size)]) <= 0
        for bucket, shorts, longs in zip(self.buckets, short, long, strict=True):
            program += pulp.LpAffineExpression([(x, 1.0) for x in shorts]) >= bucket.num_short
            if bucket.num_long > 0:
                program += pulp.LpAffineExpression([(x, 1.0) for x in longs]) >= bucket.num_long
        least = self.problem.min_micro_batches
        program += pulp.lpSum(variables["m", level] for level in range(len(self.edges))) >= least
        return program, variables

    def refine(self, outcome: SolverOutcome, variables: dict[tuple[str, int], Any]) -> bool:
        """Cut the levels that the solution uses; say whether there was one to cut."""
        uppers = [*self.edges[1:], self.top]
        added: list[float] = []
        for level, (low, high) in enumerate(zip(self.edges, uppers, strict=True)):
            count = outcome.values.get(variables["m", level].name, 0.0)
            if count < 1e-6 or high / low < _FINEST_LEVEL:
                continue
            mean_s = outcome.values.get(variables["T", level].name, 0.0) / count * self.scale_s
            cut = mean_s * 1.004
            if not low * 1.002 < cut < high * 0.999:
                cut = min(low * 1.01, (low + high) / 2)
            added.append(cut)
            if high / cut > 1.3:
                added.append(math.sqrt(cut * high))
        self.edges = sorted({*self.edges, *added})
        return bool(added)

    def _add_groups(
        self, pulp: Any, program: Any, level: int, high: float, k: int, short: list[list[Any]], long: list[list[Any]]
    ) -> tuple[list[tuple[Any, float]], list[tuple[Any, float]]] | None:
        """Add the groups of one kind on one level; return the terms of their ranks and of their rank-seconds."""
        kind = self.kinds[k]
        room_s = high - kind.fixed_s
        if room_s <= 0:
            return None
        dealt: list[tuple[int, Any, Any, int]] = []
        for q, bucket in enumerate(self.buckets):
            least_s = self._parts[k][q][2]
            by_time = math.inf if least_s <= 0 else room_s / least_s * (1 + 1e-9)
            most = int(min(by_time, kind.max_tokens / bucket.short_tokens, len(bucket.members)))
            if most < 1:
                continue
            x = program.add_variable(f"x_{q}_{level}_{k}", lowBound=0, upBound=bucket.num_short)
            y = (
                program.add_variable(f"y_{q}_{level}_{k}", lowBound=0, upBound=bucket.num_long)
                if bucket.num_long
                else None
            )
            short[q].append(x)
            if y is not None:
                long[q].append(y)
            dealt.append((q, x, y, most))
        if not dealt:
            return None
        # Whole groups matter where a micro-batch has few of them; elsewhere they only cost time.
        whole = kind.least_degree * _FEW_GROUPS >= self.problem.num_ranks
        groups = program.add_variable(f"n_{level}_{k}", lowBound=0, cat=pulp.LpInteger if whole else pulp.LpContinuous)
        if kind.least_degree == kind.most_degree:
            ranks, per_group = groups, float(kind.least_degree)
        else:
            ranks, per_group = program.add_variable(f"r_{level}_{k}", lowBound=0), 1.0
            program += ranks - kind.least_degree * groups >= 0
            program += ranks - kind.most_degree * groups <= 0
        work: list[tuple[Any, float]] = []
        held: list[tuple[Any, float]] = []
        for q, x, y, most in dealt:
            bucket, (short_work, long_work, _) = self.buckets[q], self._parts[k][q]
            work.append((x, short_work / self.scale_s))
            held.append((x, bucket.short_tokens))
            row = [(x, 1.0), (groups, -float(most))]
            if y is not None:
                work.append((y, long_work / self.scale_s))
                held.append((y, bucket.long_tokens))
                row.append((y, 1.0))
            if most < min(len(bucket.members), 21):
                program += pulp.LpAffineExpression(row) <= 0
        fixed_work = (ranks, kind.fixed_s * per_group / self.scale_s)
        program += pulp.LpAffineExpression([*work, (ranks, -room_s * per_group / self.scale_s)]) <= 0
        if kind.tokens_per_rank < math.inf:
            unit = kind.tokens_per_rank * per_group
            program += pulp.LpAffineExpression([*((x, s / unit) for x, s in held), (ranks, -1.0)]) <= 0
        for weights in self._packing_rows(k, room_s, [q for q, _, _, _ in dealt]):
            packed = [(groups, -1.0)]
            for (_, x, y, _), weight in zip(dealt, weights, strict=True):
                if weight > 0:
                    packed.append((x, weight))
                    if y is not None:
                        packed.append((y, weight))
            program += pulp.LpAffineExpression(packed) <= 0
        return [(ranks, per_group)], [*work, fixed_work]

    def _packing_rows(self, k: int, room_s: float, places: Sequence[int]) -> list[list[float]]:
        """Return the values of dual feasible functions that bind several buckets."""
        kind = self.kinds[k]
        of_memory = np.asarray([self.buckets[q].short_tokens for q in places]) / kind.max_tokens
        of_time = np.asarray([self._parts[k][q][2] for q in places]) / room_s * (1 - 1e-9)
        rows: dict[tuple[float, ...], None] = {}
        for share in (of_memory, of_time):
            for weights in dual_feasible(share):
                if np.count_nonzero(weights) >= 2:
                    rows.setdefault(tuple(weights.tolist()))
        return [list(row) for row in rows]


def _near(makespans_s: Sequence[float]) -> set[float]:
    """Return an edge just above every makespan that is not close to a shorter one."""
    edges: list[float] = []
    for makespan_s in sorted(makespans_s):
        if not edges or makespan_s > edges[-1] * _FAR:
            edges.append(makespan_s * 1.003)
    return set(edges)
