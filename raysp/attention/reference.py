"""Full attention on one rank, the truth that parallel methods are tested against."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from raysp.attention.layout import SequenceLayout
from raysp.attention.parallel import parallel_attention


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    causal: bool = True,
    scale: float | None = None,
    *,
    window: int | None = None,
    key_lengths: Sequence[int] | None = None,
) -> Tensor:
    """Attend with the eager kernel to whole documents.

    Args:
        q: ``[sum(lengths), Hq, D]``, documents one after the other.
        k: ``[sum(lengths), Hk, D]``.
        v: Like ``k``.
        lengths: Tokens of every document.
        causal: A token sees its document up to itself.
        scale: Factor of the scores; ``D**-0.5`` by default.
        window: A token sees the last ``window`` tokens up to itself; needs ``causal``.
        key_lengths: Keys of every document, for cross attention; ``lengths`` by default.

    Returns:
        ``[sum(lengths), Hq, D]``; differentiable. Memory grows with the square of the longest document.
    """
    layout = SequenceLayout(lengths, degree=1)
    kv_layout = None if key_lengths is None else SequenceLayout(key_lengths, degree=1)
    return parallel_attention(
        q,
        k,
        v,
        layout=layout,
        group=None,
        causal=causal,
        window=window,
        scale=scale,
        kernel="eager",
        kv_layout=kv_layout,
    )
