"""The GPUs of a job: nodes with their speed and memory, and where the groups of one micro-batch go.

Ranks are numbered node by node. Placement is greedy and knows no times: it answers which ranks a group of a kind gets,
or that it found none. Ranks left over are idle in that micro-batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from planner.errors import PlanError
from planner.group_kind import GroupKind
from planner.strict_json import as_int, as_list, as_number, as_object, check_keys, parse_object

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Node:
    """GPUs of one kind behind one fast link.

    Attributes:
        num_gpus: Ranks on the node.
        speed: Relative to the GPU that the cost model was measured on.
        memory_limit_bytes: What one rank may use; `None`: the cost model's limit.
    """

    num_gpus: int
    speed: float = 1.0
    memory_limit_bytes: float | None = None

    def __post_init__(self) -> None:
        as_int(self.num_gpus, "num_gpus", PlanError, minimum=1)
        object.__setattr__(self, "speed", as_number(self.speed, "speed", PlanError, positive=True))
        if self.memory_limit_bytes is not None:
            limit = as_number(self.memory_limit_bytes, "memory_limit_bytes", PlanError, positive=True)
            object.__setattr__(self, "memory_limit_bytes", limit)

    def serves(self, kind: GroupKind) -> bool:
        """Say whether the GPUs are as fast and as large as `kind` demands."""
        limit = math.inf if self.memory_limit_bytes is None else self.memory_limit_bytes
        return self.speed >= kind.speed and limit >= _demanded_bytes(kind)


@dataclass(frozen=True)
class Cluster:
    """The nodes of a job, in the order of their ranks."""

    nodes: tuple[Node, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", tuple(self.nodes))
        if not self.nodes:
            raise PlanError("the cluster has no nodes; expected at least one.")

    @classmethod
    def uniform(cls, num_ranks: int, gpus_per_node: int | None = None) -> Cluster:
        """Return equal nodes of `gpus_per_node`, the last one with what is left; `None`: one node."""
        as_int(num_ranks, "num_ranks", PlanError, minimum=1)
        if gpus_per_node is None:
            return cls((Node(num_ranks),))
        as_int(gpus_per_node, "gpus_per_node", PlanError, minimum=1)
        full, rest = divmod(num_ranks, gpus_per_node)
        return cls((Node(gpus_per_node),) * full + ((Node(rest),) if rest else ()))

    @cached_property
    def num_ranks(self) -> int:
        """Ranks of the job."""
        return sum(node.num_gpus for node in self.nodes)

    @cached_property
    def classes(self) -> tuple[tuple[float, float | None], ...]:
        """The different ``(speed, memory_limit_bytes)`` of the nodes, in the order of their first rank."""
        return tuple(dict.fromkeys((node.speed, node.memory_limit_bytes) for node in self.nodes))

    @property
    def is_uniform(self) -> bool:
        """Whether every GPU has the same speed and memory."""
        return len(self.classes) == 1

    def node_of_rank(self, rank: int) -> int:
        """Return the index of the node that `rank` is on."""
        if not 0 <= rank < self.num_ranks:
            raise PlanError(f"rank is {rank}; expected 0 to {self.num_ranks - 1}.")
        return self._node_of_rank[rank]

    def kind_at(self, kind: GroupKind, ranks: Iterable[int]) -> GroupKind:
        """Return `kind` with the topology, the least speed and the least memory of `ranks`.

        A node without a limit does not lower the group's.
        """
        indices = {self.node_of_rank(rank) for rank in ranks}
        nodes = [self.nodes[index] for index in indices]
        limits = [node.memory_limit_bytes for node in nodes if node.memory_limit_bytes is not None]
        return kind._replace(
            spans_nodes=len(nodes) > 1,
            speed=min(node.speed for node in nodes),
            memory_limit_bytes=min(limits, default=None),
        )

    def fits(self, kinds: Sequence[GroupKind]) -> bool:
        """Say whether `place` finds ranks for all groups at the same time."""
        if sum(kind.degree for kind in kinds) > self.num_ranks:
            return False
        if len(self.nodes) == 1:
            return all(self.nodes[0].serves(kind) for kind in kinds)
        return self.place(kinds) is not None

    def place(self, kinds: Sequence[GroupKind]) -> list[tuple[int, ...]] | None:
        """Return disjoint ranks for groups that run at the same time.

        A kind that does not span nodes gets ranks of one node; every rank is as fast and as large as its kind demands.
        In descending degree from rank 0 on where that serves, else best-fit decreasing; groups larger than every node
        take whole nodes first.

        Args:
            kinds: One for each group.

        Returns:
            Ascending ranks in step with `kinds`; `None` where no placement was found, although one may exist.
        """
        if sum(kind.degree for kind in kinds) > self.num_ranks:
            return None
        in_sequence = self._in_sequence(kinds)
        if in_sequence is not None:
            return in_sequence
        for order, preference, whole_first in itertools.product(_ORDERS, _PREFERENCES, (True, False)):
            packing = _Packing(self.nodes, preference)
            if packing.pack(kinds, sorted(range(len(kinds)), key=lambda g: order(kinds[g])), whole_first):
                return self._ranks(kinds, packing.takes)
        return None

    def to_content(self) -> dict[str, Any]:
        """Return the JSON content, every key present."""
        nodes = [
            {"num_gpus": node.num_gpus, "speed": node.speed, "memory_limit_bytes": node.memory_limit_bytes}
            for node in self.nodes
        ]
        return {"schema_version": SCHEMA_VERSION, "nodes": nodes}

    @classmethod
    def from_content(cls, content: Any, *, what: str = "cluster") -> Cluster:
        """Read a cluster strictly; `speed` and `memory_limit_bytes` of a node are optional.

        Raises:
            PlanError: Unknown or missing key, wrong type, other schema version, or no nodes.
        """
        content = as_object(content, what, PlanError)
        check_keys(content, required=("schema_version", "nodes"), optional=(), what=what, error=PlanError)
        version = content["schema_version"]
        if version != SCHEMA_VERSION or isinstance(version, (bool, float)):
            raise PlanError(f"{what} has schema_version {version!r}; this raysp reads version {SCHEMA_VERSION}.")
        nodes = []
        for index, item in enumerate(as_list(content["nodes"], f"{what}.nodes", PlanError)):
            key = f"{what}.nodes[{index}]"
            node = as_object(item, key, PlanError)
            optional = ("speed", "memory_limit_bytes")
            check_keys(node, required=("num_gpus",), optional=optional, what=key, error=PlanError)
            try:
                nodes.append(Node(**node))
            except PlanError as cause:
                raise PlanError(f"{key}: {cause}") from cause
        return cls(tuple(nodes))

    @classmethod
    def from_json(cls, text: str, *, what: str = "cluster") -> Cluster:
        """Read the JSON of `to_content`; see `from_content`."""
        return cls.from_content(parse_object(text, what=what, error=PlanError), what=what)

    @classmethod
    def load(cls, path: str | Path) -> Cluster:
        """Read a cluster file; errors name the file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as cause:
            raise PlanError(f"cannot read cluster {path}: {cause}. Give a JSON file that lists nodes.") from cause
        return cls.from_json(text, what=f"cluster {path}")

    @cached_property
    def _first_ranks(self) -> tuple[int, ...]:
        return tuple(itertools.accumulate((node.num_gpus for node in self.nodes[:-1]), initial=0))

    @cached_property
    def _node_of_rank(self) -> tuple[int, ...]:
        return tuple(index for index, node in enumerate(self.nodes) for _ in range(node.num_gpus))

    def _in_sequence(self, kinds: Sequence[GroupKind]) -> list[tuple[int, ...]] | None:
        """Ranks in descending degree from 0 on, which with powers of two are aligned; `None` where that breaks a rule."""
        placed: list[tuple[int, ...]] = [()] * len(kinds)
        start = 0
        for g in sorted(range(len(kinds)), key=lambda g: -kinds[g].degree):
            kind = kinds[g]
            first, last = self._node_of_rank[start], self._node_of_rank[start + kind.degree - 1]
            if first != last and not kind.spans_nodes:
                return None
            if not all(node.serves(kind) for node in self.nodes[first : last + 1]):
                return None
            placed[g] = tuple(range(start, start + kind.degree))
            start += kind.degree
        return placed

    def _ranks(self, kinds: Sequence[GroupKind], takes: dict[int, dict[int, int]]) -> list[tuple[int, ...]]:
        """Turn counts per group and node into ranks, the largest share of a node first, so that shares are aligned."""
        shares = [(node, count, g) for g, counts in takes.items() for node, count in counts.items()]
        next_rank = list(self._first_ranks)
        ranks: list[list[int]] = [[] for _ in kinds]
        for node, count, g in sorted(shares, key=lambda share: (share[0], -share[1], share[2])):
            ranks[g] += range(next_rank[node], next_rank[node] + count)
            next_rank[node] += count
        return [tuple(sorted(found)) for found in ranks]


class _Packing:
    """GPUs taken so far: which group takes how many of which node."""

    def __init__(self, nodes: Sequence[Node], preference: Callable[[Node, int], tuple[float, ...]]) -> None:
        self._nodes = nodes
        self._free = [node.num_gpus for node in nodes]
        self._preference = preference
        self.takes: dict[int, dict[int, int]] = {}

    def pack(self, kinds: Sequence[GroupKind], order: Sequence[int], whole_first: bool) -> bool:
        """Give every group its GPUs; `False` where one gets none."""
        largest = max(node.num_gpus for node in self._nodes)
        self.takes = {g: {} for g in order}
        spanning = [g for g in order if kinds[g].spans_nodes]
        if whole_first:
            for g in spanning:
                if kinds[g].degree > largest:
                    self._take_whole_nodes(g, kinds[g])
        inside = all(self._take_inside(g, kinds[g]) for g in order if not kinds[g].spans_nodes)
        # Last, because what others leave over on any nodes will do.
        return inside and all(self._take_rest(g, kinds[g]) for g in spanning)

    def _take(self, g: int, node: int, count: int) -> None:
        self._free[node] -= count
        self.takes[g][node] = self.takes[g].get(node, 0) + count

    def _serving(self, kind: GroupKind) -> list[int]:
        nodes = [index for index, node in enumerate(self._nodes) if self._free[index] and node.serves(kind)]
        return sorted(nodes, key=lambda index: (*self._preference(self._nodes[index], self._free[index]), index))

    def _take_whole_nodes(self, g: int, kind: GroupKind) -> None:
        rest = kind.degree
        for node in self._serving(kind):
            if self._free[node] == self._nodes[node].num_gpus <= rest:
                rest -= self._free[node]
                self._take(g, node, self._free[node])

    def _take_inside(self, g: int, kind: GroupKind) -> bool:
        node = next((index for index in self._serving(kind) if self._free[index] >= kind.degree), None)
        if node is not None:
            self._take(g, node, kind.degree)
        return node is not None

    def _take_rest(self, g: int, kind: GroupKind) -> bool:
        rest = kind.degree - sum(self.takes[g].values())
        # Few nodes, so few links: the fullest rests first.
        for node in sorted(self._serving(kind), key=lambda index: -self._free[index]):
            count = min(rest, self._free[node])
            if count:
                rest -= count
                self._take(g, node, count)
        return rest == 0


def _demanded_bytes(kind: GroupKind) -> float:
    return 0.0 if kind.memory_limit_bytes is None else kind.memory_limit_bytes


def _by_degree(kind: GroupKind) -> tuple[float, ...]:
    return (-kind.degree, -kind.speed, -_demanded_bytes(kind))


def _by_demand(kind: GroupKind) -> tuple[float, ...]:
    return (-kind.speed, -_demanded_bytes(kind), -kind.degree)


def _tightest(node: Node, free: int) -> tuple[float, ...]:
    return (free, node.speed)


def _plainest(node: Node, free: int) -> tuple[float, ...]:
    return (node.speed, math.inf if node.memory_limit_bytes is None else node.memory_limit_bytes, free)


_ORDERS = (_by_degree, _by_demand)
_PREFERENCES = (_plainest, _tightest)
