"""What kind of sequence-parallel group runs: everything besides its sequences that its time and memory depend on."""

from __future__ import annotations

from typing import NamedTuple


class GroupKind(NamedTuple):
    """The kind of a group; groups of one kind are interchangeable for a search.

    Attributes:
        degree: Ranks of the group.
        attention: Parallel attention method; ``"local"`` at degree 1.
        recompute: Name of the recompute policy; ``"default"``: the cost model's primary constants.
        spans_nodes: Some of its ranks are on different nodes.
        speed: Relative speed of its slowest GPU; 1.0 is the GPU that the cost model was measured on.
        memory_limit_bytes: Least limit among its GPUs; `None`: the cost model's limit.
    """

    degree: int
    attention: str = "local"
    recompute: str = "default"
    spans_nodes: bool = False
    speed: float = 1.0
    memory_limit_bytes: float | None = None
