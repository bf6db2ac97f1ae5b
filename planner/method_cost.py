"""Parts of a cost model: what a parallel attention method and a recompute policy cost, and their strict JSON.

A table is a tuple of ``(degree, seconds per token/degree)`` pairs, degrees ascending and above 1. A degree that is not
listed uses the next listed one; above the largest, the largest. An empty table: communication costs nothing.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from planner.errors import CostModelError
from planner.strict_json import as_int, as_list, as_number, as_object, as_str, check_keys

METHOD_NAMES = ("ring", "bidirectional_ring", "token_ring", "all_gather", "ulysses", "ulysses_ring", "rsa")
DEFAULT_RECOMPUTE = "default"

Table = tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class MethodCost:
    """Communication of one parallel attention method.

    Attributes:
        name: One of `METHOD_NAMES`.
        communication_s: Table for groups inside a node.
        between_nodes_s: Table for groups whose ranks are on different nodes; empty: see `link_s`.
        overlap: Share (0 to 1) of a sequence's quadratic compute that hides its communication.
        fixed_s: Further seconds per micro-batch of a group of degree above 1 (latency of its hops).
    """

    name: str
    communication_s: Table = ()
    between_nodes_s: Table = ()
    overlap: float = 0.0
    fixed_s: float = 0.0

    def __post_init__(self) -> None:
        check_method_name(self.name, "methods name")
        where = f"method {self.name}: "
        object.__setattr__(self, "communication_s", checked_table(self.communication_s, f"{where}communication_s"))
        object.__setattr__(self, "between_nodes_s", checked_table(self.between_nodes_s, f"{where}between_nodes_s"))
        object.__setattr__(self, "overlap", as_share(self.overlap, f"{where}overlap"))
        object.__setattr__(self, "fixed_s", as_number(self.fixed_s, f"{where}fixed_s", CostModelError))
        check_links(self.communication_s, self.between_nodes_s, where)

    def constant_s(self, degree: int, spans_nodes: bool, gpus_per_node: int | None) -> float:
        """Return the seconds of communication per (token/degree) of a group by `link_s`; 0 for degree 1."""
        return link_s(self.communication_s, self.between_nodes_s, degree, spans_nodes, gpus_per_node)

    def to_content(self) -> dict[str, Any]:
        """Return the JSON content, every key present."""
        return {
            "name": self.name,
            "communication_s": table_content(self.communication_s),
            "between_nodes_s": table_content(self.between_nodes_s),
            "overlap": self.overlap,
            "fixed_s": self.fixed_s,
        }


@dataclass(frozen=True, kw_only=True)
class RecomputePolicy:
    """What recomputing activations in the backward pass costs and saves, beside the primary constants.

    Attributes:
        name: Any name; ``"default"`` stands for the primary constants and is taken.
        bytes_per_token: Activation memory of one token on the rank that holds it.
        compute_factor: Multiplies quadratic and linear compute.
        communication_factor: Multiplies communication.
    """

    name: str
    bytes_per_token: float
    compute_factor: float = 1.0
    communication_factor: float = 1.0

    def __post_init__(self) -> None:
        as_str(self.name, "recompute_policies name", CostModelError)
        for key in ("bytes_per_token", "compute_factor", "communication_factor"):
            what = f"recompute policy {self.name}: {key}"
            positive = key == "compute_factor"
            object.__setattr__(self, key, as_number(getattr(self, key), what, CostModelError, positive=positive))

    def to_content(self) -> dict[str, Any]:
        """Return the JSON content, every key present."""
        return {
            "name": self.name,
            "bytes_per_token": self.bytes_per_token,
            "compute_factor": self.compute_factor,
            "communication_factor": self.communication_factor,
        }


def link_s(inside: Table, between: Table, degree: int, spans_nodes: bool, gpus_per_node: int | None) -> float:
    """Return the constant of a group's links from the tables inside a node and between nodes; 0 for degree 1.

    A group that spans nodes although a node could hold it, where nothing was measured between nodes, is charged
    as the smallest listed degree above a node's GPUs: that is the narrowest link that was measured.

    Args:
        inside: Table for groups inside a node.
        between: Table for groups whose ranks are on different nodes, or empty.
        degree: Ranks of the group.
        spans_nodes: Its ranks are on different nodes.
        gpus_per_node: Of the cluster that was measured, or `None`.
    """
    if degree == 1:
        return 0.0
    if not spans_nodes:
        return listed_s(inside, degree)
    if between:
        return listed_s(between, degree)
    if gpus_per_node is not None and any(listed > gpus_per_node for listed, _ in inside):
        return listed_s(inside, max(degree, gpus_per_node + 1))
    return listed_s(inside, degree)


def listed_s(table: Table, degree: int) -> float:
    """Return a table's constant for `degree`, by the rule for degrees that are not listed."""
    if not table:
        return 0.0
    index = bisect.bisect_left(table, (degree, -1.0))
    return table[min(index, len(table) - 1)][1]


def checked_table(pairs: Iterable[tuple[int, float]], key: str) -> Table:
    """Return a table as integers and floats, or raise `CostModelError` naming `key`."""
    table = tuple(
        (
            as_int(degree, f"{key} degree", CostModelError, minimum=2),
            as_number(seconds, f"{key}[{degree}]", CostModelError),
        )
        for degree, seconds in pairs
    )
    if any(left[0] >= right[0] for left, right in itertools.pairwise(table)):
        raise CostModelError(f"{key} lists degrees {[d for d, _ in table]}; expected them ascending.")
    return table


def check_links(inside: Table, between: Table, where: str) -> None:
    """Refuse a link between nodes that is faster than the one inside a node, at any degree."""
    if not between:
        return
    for degree in sorted({degree for degree, _ in (*inside, *between)}):
        near_s, far_s = listed_s(inside, degree), listed_s(between, degree)
        if far_s < near_s:
            raise CostModelError(
                f"{where}between_nodes_s gives {far_s} s at degree {degree}, below the {near_s} s inside a node; "
                "expected at least as much, because no link between nodes is faster. Measure both again, and list "
                "every degree that spans nodes."
            )


def check_method_name(name: Any, key: str) -> None:
    """Raise `CostModelError` unless `name` is one of `METHOD_NAMES`."""
    as_str(name, key, CostModelError)
    if name not in METHOD_NAMES:
        raise CostModelError(f"{key} is {name!r}; expected one of {', '.join(METHOD_NAMES)}.")


def as_share(value: Any, key: str) -> float:
    """Return `value` as a float if it is a number from 0 to 1."""
    number = as_number(value, key, CostModelError)
    if number > 1:
        raise CostModelError(f"{key} is {number}; expected a share from 0 to 1.")
    return number


def table_content(table: Table) -> dict[str, float]:
    """Return the JSON object of a table."""
    return {str(degree): seconds for degree, seconds in table}


def read_table(value: Any, key: str) -> Table:
    """Return the table of a JSON object whose keys are degrees; `checked_table` checks the values."""
    table = as_object(value, key, CostModelError)
    for text in table:
        if not (text.isascii() and text.isdigit()):
            raise CostModelError(f'{key} has the key {text!r}; expected a degree such as "4".')
    return tuple(sorted((int(text), seconds) for text, seconds in table.items()))


def read_methods(value: Any) -> tuple[MethodCost, ...]:
    """Read the JSON array ``methods`` of a cost model."""
    methods = []
    for index, item in enumerate(as_list(value, "methods", CostModelError)):
        key = f"methods[{index}]"
        content = as_object(item, key, CostModelError)
        optional = ("communication_s", "between_nodes_s", "overlap", "fixed_s")
        check_keys(content, required=("name",), optional=optional, what=key, error=CostModelError)
        tables = {name: read_table(content[name], f"{key}.{name}") for name in optional[:2] if name in content}
        methods.append(MethodCost(**{**content, **tables}))
    return tuple(methods)


def read_recompute_policies(value: Any) -> tuple[RecomputePolicy, ...]:
    """Read the JSON array ``recompute_policies`` of a cost model."""
    policies = []
    for index, item in enumerate(as_list(value, "recompute_policies", CostModelError)):
        key = f"recompute_policies[{index}]"
        content = as_object(item, key, CostModelError)
        required, optional = ("name", "bytes_per_token"), ("compute_factor", "communication_factor")
        check_keys(content, required=required, optional=optional, what=key, error=CostModelError)
        policies.append(RecomputePolicy(**content))
    return tuple(policies)
