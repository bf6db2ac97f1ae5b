"""In which order a model's rows lie on the ranks of a group, and in which its softmax layers attend; pure.

States of linear attention run along the tokens, so models that have it lie in contiguous runs. Causal softmax attention
is level among ranks in zigzag only, unless a method gives every rank all tokens of some heads.
"""

from __future__ import annotations

from dataclasses import dataclass

# Every rank attends over whole documents, so the cut of the tokens is of no consequence.
_INDIFFERENT = ("local", "ulysses")


@dataclass(frozen=True)
class LayoutDecision:
    """How a micro-batch lies and attends.

    Attributes:
        order: Of the model's rows, positions and labels.
        attention_order: In which softmax layers run; where it differs, q, k, v and the output change places.
        method: Of softmax attention.
        reason: Why.
    """

    order: str
    attention_order: str
    method: str
    reason: str


def decide_layout(
    *, num_linear_layers: int, num_softmax_layers: int, method: str, degree: int, num_heads: int, num_key_heads: int
) -> LayoutDecision:
    """Choose the orders for one group.

    Args:
        num_linear_layers: Layers with linear attention; with any, rows lie in contiguous runs.
        num_softmax_layers: Layers with softmax attention.
        method: Parallel attention method that was planned, or ``auto``.
        degree: Ranks of the group.
        num_heads: Query heads of the softmax layers.
        num_key_heads: Key heads of them.

    Returns:
        The decision; ``auto`` becomes ``ulysses`` in a hybrid whose heads divide by the degree.
    """
    if not num_linear_layers:
        return LayoutDecision("zigzag", "zigzag", method, "softmax attention alone, level in zigzag order")
    if not num_softmax_layers or degree == 1:
        return LayoutDecision("contiguous", "contiguous", method, "states run along the tokens")
    if method == "auto" and num_heads % degree == 0 and num_key_heads % degree == 0:
        method = "ulysses"
    if method in _INDIFFERENT:
        reason = "linear layers need contiguous runs, and ulysses does not care: nothing changes places"
        return LayoutDecision("contiguous", "contiguous", method, reason)
    reason = f"linear layers need contiguous runs; {method} is level in zigzag order, so its rows change places"
    return LayoutDecision("contiguous", "zigzag", method, reason)
