"""One planning problem as a value: the batch, the cluster, the kinds of groups that are allowed, their costs as tables.

A draft is a plan before placement: micro-batches of groups of sequence ids, without ranks or predicted numbers. Every
search of this package takes a `Problem` and returns drafts; `Problem.step_time_s` is the one judge between them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.cluster import Cluster, Node
from planner.cost_model import SYNCS, CostModel
from planner.errors import CostModelError, InfeasibleError, PlanError
from planner.group_kind import GroupKind
from planner.length_profile import LENGTH_LIMIT
from planner.method_cost import METHOD_NAMES

# Ranks up to which a first plan takes seconds, at worst half a minute; every degree has tables of its own.
_MOST_RANKS = {"powers-of-two": 1 << 16, "any": 1 << 12}
DEGREE_RULES = tuple(_MOST_RANKS)

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


class DraftGroup(NamedTuple):
    """A group without ranks: its kind, as a place in `Problem.kinds`, and the ids of its sequences."""

    kind: int
    sequences: tuple[int, ...]


DraftMicroBatch = tuple[DraftGroup, ...]
Draft = tuple[DraftMicroBatch, ...]


@dataclass(frozen=True)
class Problem:
    """A batch to plan.

    Attributes:
        lengths: Tokens of every sequence; the index is the sequence id.
        cluster: The GPUs.
        cost_model: Predicts time and memory.
        kinds: What groups may be, degrees ascending; none is worse than another of its degree in every respect.
        sync: ``"per-layer"`` or ``"per-step"``.
    """

    lengths: tuple[int, ...]
    cluster: Cluster
    cost_model: CostModel
    kinds: tuple[GroupKind, ...]
    sync: str = "per-layer"

    @property
    def num_ranks(self) -> int:
        """Ranks of the job."""
        return self.cluster.num_ranks

    @cached_property
    def degrees(self) -> tuple[int, ...]:
        """Degree of every kind."""
        return tuple(kind.degree for kind in self.kinds)

    @cached_property
    def max_tokens(self) -> tuple[int, ...]:
        """Tokens that a group of each kind holds."""
        return tuple(self.cost_model.kind_max_tokens(kind, self.num_ranks, self.sync) for kind in self.kinds)

    @cached_property
    def fixed_s(self) -> tuple[float, ...]:
        """Seconds of a group of each kind before its first sequence."""
        return tuple(self.cost_model.kind_fixed_s(kind, self.sync) for kind in self.kinds)

    @cached_property
    def share_s(self) -> FloatArray:
        """Seconds that each sequence adds to a group of each kind, shape [kinds, sequences]."""
        tokens = np.asarray(self.lengths, dtype=np.float64)
        return np.stack([self.cost_model.sequence_times_s(tokens, kind) for kind in self.kinds])

    @cached_property
    def step_fixed_s(self) -> float:
        """Seconds of the step outside of its micro-batches."""
        return self.cost_model.step_fixed_s(self.sync)

    @cached_property
    def descending(self) -> tuple[int, ...]:
        """Sequence ids, longest first; equal lengths in the order of their ids."""
        return tuple(sorted(range(len(self.lengths)), key=lambda i: (-self.lengths[i], i)))

    @cached_property
    def capacity(self) -> int:
        """Tokens that one micro-batch can hold at most, over every shape of groups."""
        # Whole tokens per group make capacity not quite proportional to degree, hence the best per-rank value.
        per_rank = max(tokens / degree for degree, tokens in zip(self.degrees, self.max_tokens, strict=True))
        return max(1, math.floor(per_rank * self.num_ranks * (1 + 1e-12)))

    @property
    def min_micro_batches(self) -> int:
        """Micro-batches that memory forces."""
        return max(1, -(-sum(self.lengths) // self.capacity))

    def kinds_of_degree(self, degree: int) -> list[int]:
        """Return the places of the kinds of one degree."""
        return [k for k, d in enumerate(self.degrees) if d == degree]

    def group_time_s(self, group: DraftGroup) -> float:
        """Predicted seconds of one group."""
        lengths = [self.lengths[i] for i in group.sequences]
        return self.cost_model.kind_time_s(lengths, self.kinds[group.kind], self.sync)

    def makespan_s(self, micro_batch: DraftMicroBatch) -> float:
        """Predicted seconds of one micro-batch: its slowest group."""
        return max(self.group_time_s(group) for group in micro_batch)

    def step_time_s(self, draft: Draft) -> float:
        """Predicted seconds of the whole step under per-layer, the fixed part included."""
        return math.fsum([self.makespan_s(micro_batch) for micro_batch in draft]) + self.step_fixed_s

    def fits(self, draft: Draft) -> bool:
        """Say whether every group holds its sequences and every micro-batch has ranks for its groups."""
        for micro_batch in draft:
            if not self.cluster.fits([self.kinds[group.kind] for group in micro_batch]):
                return False
            for group in micro_batch:
                if sum(self.lengths[i] for i in group.sequences) > self.max_tokens[group.kind]:
                    return False
        return True

    def restricted(self, kinds: Sequence[int]) -> Problem:
        """Return the problem with only these kinds."""
        return dataclasses.replace(self, kinds=tuple(self.kinds[k] for k in kinds))


def make_problem(
    lengths: Sequence[int],
    num_ranks: int,
    cost_model: CostModel,
    attention: str | None = None,
    degrees: str = "powers-of-two",
    *,
    sync: str = "per-layer",
    cluster: Cluster | None = None,
) -> Problem:
    """Check the inputs of a plan and build the `Problem`.

    Raises:
        PlanError: No sequences, a length or a count that is not a positive integer, an unknown degree rule, sync or
            method, more ranks than can be planned for, or a cluster of another number of ranks.
        CostModelError: The predicted time of a sequence is not finite.
        InfeasibleError: The model states alone exceed the memory limit.
    """
    if isinstance(num_ranks, bool) or not isinstance(num_ranks, (int, np.integer)) or num_ranks < 1:
        raise PlanError(f"num_ranks is {num_ranks!r}; expected an integer of at least 1.")
    if degrees not in DEGREE_RULES:
        raise PlanError(f"degrees is {degrees!r}; expected one of {', '.join(DEGREE_RULES)}.")
    if num_ranks > _MOST_RANKS[degrees]:
        raise PlanError(
            f"num_ranks is {num_ranks}; expected at most {_MOST_RANKS[degrees]} with degrees {degrees!r}. "
            "Plan for one replica of the job."
        )
    if sync not in SYNCS:
        raise PlanError(f"sync {sync!r} is unknown; expected one of {', '.join(SYNCS)}.")
    if attention is not None and attention not in METHOD_NAMES:
        raise PlanError(f"attention is {attention!r}; expected one of {', '.join(METHOD_NAMES)}.")
    tokens = checked_lengths(lengths)
    nodes = _checked_cluster(cluster, int(num_ranks), cost_model)
    try:
        states = cost_model.state_bytes(nodes.num_ranks, sync)
    except CostModelError as cause:
        raise PlanError(str(cause)) from cause
    limit = max(_limit_bytes(node, cost_model) for node in nodes.nodes)
    if states > limit:
        raise InfeasibleError(
            f"the model states need {states:.0f} bytes on each of {nodes.num_ranks} ranks with sync {sync}; the memory "
            f"limit is {limit:.0f} bytes. Use more ranks or raise the limit."
        )
    kinds = allowed_kinds(nodes, cost_model, attention, degrees)
    problem = Problem(tokens, nodes, cost_model, kinds, sync)
    _check_finite(problem)
    return problem.restricted(_undominated(problem))


def allowed_kinds(
    cluster: Cluster, cost_model: CostModel, attention: str | None, degree_rule: str
) -> tuple[GroupKind, ...]:
    """Return every kind of group that the cluster can form, degrees ascending.

    A kind's speed and memory are demands: it may run on any GPUs at least as good. A group within the size of a node
    stays inside one.
    """
    methods = cost_model.attentions if attention is None else (attention,)
    policies = ("default", *(policy.name for policy in cost_model.recompute_policies))
    kinds = []
    for speed, limit in _demands(cluster):
        serving = [
            node.num_gpus
            for node in cluster.nodes
            if node.serves(GroupKind(1, "local", "default", False, speed, limit))
        ]
        for degree in degrees_up_to(sum(serving), degree_rule):
            spans = degree > max(serving)
            possible = ("local",) if degree == 1 else methods
            for method in possible:
                if degree == 1 or cost_model.allows_degree(degree, attention=method):
                    kinds += [GroupKind(degree, method, policy, spans, speed, limit) for policy in policies]
    return tuple(sorted(kinds, key=lambda kind: kind.degree))


def degrees_up_to(num_ranks: int, rule: str) -> list[int]:
    """Return the degrees of a rule, ascending."""
    return list(range(1, num_ranks + 1)) if rule == "any" else [1 << p for p in range(num_ranks.bit_length())]


def checked_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """Return the lengths as plain integers, or raise `PlanError` naming the sequence."""
    if len(lengths) == 0:
        raise PlanError("the batch has no sequences; expected at least one length.")
    checked = []
    for index, length in enumerate(lengths):
        if isinstance(length, bool) or not isinstance(length, (int, np.integer)) or length < 1:
            raise PlanError(
                f"sequence {index} has length {length!r}; expected an integer of at least 1. Drop empty documents."
            )
        if length >= LENGTH_LIMIT:
            raise PlanError(f"sequence {index} has a length of 16 digits or more; expected fewer.")
        checked.append(int(length))
    return tuple(checked)


def check_longest_fits(problem: Problem) -> None:
    """Raise `InfeasibleError` if the longest sequence fits no allowed group."""
    longest = problem.descending[0]
    length = problem.lengths[longest]
    k = max(range(len(problem.kinds)), key=lambda k: problem.max_tokens[k])
    kind, holds = problem.kinds[k], problem.max_tokens[k]
    if length <= holds:
        return
    model = problem.cost_model
    needed = model.kind_memory_bytes(length, kind, problem.num_ranks, problem.sync)
    raise InfeasibleError(
        f"sequence {longest} has {length} tokens and needs {needed:.0f} bytes on each rank of a group of degree "
        f"{kind.degree}, the largest that {problem.num_ranks} ranks allow here; the memory limit is "
        f"{model.kind_limit_bytes(kind):.0f} bytes, which holds {holds} tokens. Use more ranks, allow larger "
        f"degrees, raise the memory limit, or split documents at {holds} tokens (data.max_length)."
    )


def _check_finite(problem: Problem) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(problem.share_s).all(axis=0)
        total_s = float(problem.share_s.sum()) + sum(problem.fixed_s)
    if finite.all() and math.isfinite(total_s):
        return
    worst = problem.descending[0] if finite.all() else int(np.argmin(finite))
    raise CostModelError(
        f"cost model {problem.cost_model.name!r} predicts no finite time for sequence {worst} of "
        f"{problem.lengths[worst]} tokens; its constants are too large. Calibrate again."
    )


def _checked_cluster(cluster: Cluster | None, num_ranks: int, cost_model: CostModel) -> Cluster:
    if cluster is None:
        return Cluster.uniform(num_ranks, cost_model.gpus_per_node)
    if cluster.num_ranks != num_ranks:
        raise PlanError(
            f"the cluster has {cluster.num_ranks} GPUs, but num_ranks is {num_ranks}; expected the same number."
        )
    if all(node.memory_limit_bytes is None for node in cluster.nodes):
        return cluster
    # Among nodes with a limit, one without means the cost model's.
    return Cluster(
        tuple(dataclasses.replace(node, memory_limit_bytes=_limit_bytes(node, cost_model)) for node in cluster.nodes)
    )


def _limit_bytes(node: Node, cost_model: CostModel) -> float:
    return cost_model.memory_limit_bytes if node.memory_limit_bytes is None else node.memory_limit_bytes


def _demands(cluster: Cluster) -> list[tuple[float, float | None]]:
    """Return the pairs of speed and memory that a group can have: those of the nodes and the least of any two."""
    found = set(cluster.classes)
    for first in cluster.classes:
        for second in cluster.classes:
            limits = [limit for limit in (first[1], second[1]) if limit is not None]
            found.add((min(first[0], second[0]), min(limits, default=None)))
    return sorted(found, key=lambda pair: (-pair[0], -(pair[1] or 0.0)))


def _undominated(problem: Problem) -> list[int]:
    """Return the kinds that hold something and are not worse in all respects than another with their ranks."""
    kept: list[int] = []
    by_demand: dict[tuple[int, float, float | None], list[int]] = {}
    for k, kind in enumerate(problem.kinds):
        if problem.max_tokens[k] >= 1:
            by_demand.setdefault((kind.degree, kind.speed, kind.memory_limit_bytes), []).append(k)
    for rivals in by_demand.values():
        kept += [k for k in rivals if not any(_dominates(problem, other, k) for other in rivals if other != k)]
    # Every kind too small for a token: keep them, and the check of the longest sequence says so.
    return sorted(kept) or list(range(len(problem.kinds)))


def _dominates(problem: Problem, better: int, worse: int) -> bool:
    share_s = problem.share_s
    no_worse = (
        problem.max_tokens[better] >= problem.max_tokens[worse]
        and problem.fixed_s[better] <= problem.fixed_s[worse]
        and bool(np.all(share_s[better] <= share_s[worse]))
    )
    if not no_worse:
        return False
    same = (
        problem.max_tokens[better] == problem.max_tokens[worse]
        and problem.fixed_s[better] == problem.fixed_s[worse]
        and bool(np.all(share_s[better] == share_s[worse]))
    )
    # Of two equal ones the first stays.
    return not same or better < worse
