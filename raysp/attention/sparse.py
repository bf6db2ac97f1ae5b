"""Sparse ring self-attention: Linformer over shards, with communication that does not depend on the length.

Keys and values of a document of L tokens are projected to k rows per head. Each rank projects its own tokens; the
partial sums are added up over the group, and every query then sees the k rows. The gradient of the projected rows is
summed the same way. Not causal, and another function than full attention: an approximation that models are trained with.

Symbols: L tokens of a document, k projected rows, Hq, Hk heads, D head size.

Sources: Sequence Parallelism (arXiv:2105.13120), section 3.3; Linformer (arXiv:2006.04768).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raysp.attention.differentiable import differentiable_once
from raysp.attention.layout import SequenceLayout
from raysp.attention.merge import accumulation_dtype
from raysp.attention.parallel import parallel_attention
from raysp.comm import Communicator, ProcessGroup, start_all_gather_rows
from raysp.errors import InputError


def sparse_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_projection: Tensor,
    value_projection: Tensor,
    *,
    layout: SequenceLayout,
    group: ProcessGroup | Communicator | None,
    scale: float | None = None,
) -> Tensor:
    """Attention of every query to the projected keys of its document, whose tokens are spread over a group.

    All ranks of the group call this together.

    Args:
        q: ``[local_tokens, Hq, D]``, this rank's rows in the layout's local order.
        k: ``[local_tokens, Hk, D]``; Hk divides Hq.
        v: Like ``k``.
        key_projection: ``[Hk, k, L]``, the weight of each position; L at least the longest document. Equal on all ranks;
            each rank returns its part of the gradient, the group's sum is the whole.
        value_projection: Like ``key_projection``.
        layout: Which tokens this rank holds.
        group: Process group or ``Communicator``; ``None`` at degree 1.
        scale: Factor of the scores; ``D**-0.5`` by default.

    Returns:
        ``[local_tokens, Hq, D]``; differentiable once in all tensors.

    Raises:
        InputError: Shapes do not fit.
    """
    longest = max(layout.lengths)
    for name, projection in (("key_projection", key_projection), ("value_projection", value_projection)):
        if projection.dim() != 3 or projection.shape[0] != k.shape[1] or projection.shape[2] < longest:
            raise InputError(
                f"{name} has shape {list(projection.shape)}; expected [{k.shape[1]}, projected rows, at least {longest}], "
                "key heads by rows by positions of the longest document."
            )
    if key_projection.shape[1] != value_projection.shape[1]:
        raise InputError(
            f"key_projection has {key_projection.shape[1]} projected rows and value_projection "
            f"{value_projection.shape[1]}; expected the same."
        )
    communicator = Communicator.of(group, layout.degree)
    documents = torch.bucketize(
        layout.token_indices(communicator.group_rank), torch.tensor(layout.lengths).cumsum(0), right=True
    )
    rows = torch.argsort(documents, stable=True).to(q.device)
    counts = torch.bincount(documents, minlength=len(layout.lengths)).tolist()
    positions = layout.positions(communicator.group_rank).to(q.device)[rows]
    projected = [
        _SumOverRanks.apply(_projected(x[rows], projection, positions, counts), communicator)
        for x, projection in ((k, key_projection), (v, value_projection))
    ]
    present = [document for document, count in enumerate(counts) if count]
    if not present:
        # No query here, but the others' sums need this rank's gradient: a zero that depends on everything.
        return q + sum(x.sum() for x in projected) * 0
    num_rows = key_projection.shape[1]
    out = parallel_attention(
        q[rows],
        *(x[present].flatten(0, 1) for x in projected),
        layout=SequenceLayout([counts[document] for document in present], degree=1),
        kv_layout=SequenceLayout([num_rows] * len(present), degree=1),
        group=None,
        causal=False,
        scale=scale,
    )
    return out[torch.argsort(rows)]


def _projected(x_THD: Tensor, projection: Tensor, positions: Tensor, counts: list[int]) -> Tensor:
    """This rank's part of every document's projected rows: ``[documents, k, Hk, D]``; rows come document by document."""
    parts = []
    for rows, where in zip(x_THD.split(counts), positions.split(counts), strict=True):
        parts.append(torch.einsum("hkt,thd->khd", projection[:, :, where].to(rows.dtype), rows))
    return torch.stack(parts)


class _SumOverRanks(torch.autograd.Function):
    """Sum over the ranks of a group, in rank order; the gradient of a sum that all use is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: Communicator) -> Tensor:
        ctx.group = group
        return _summed(partial, group)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None


def _summed(partial: Tensor, group: Communicator) -> Tensor:
    wide = partial.to(accumulation_dtype(partial.dtype)).contiguous()
    gathered, pending = start_all_gather_rows(wide, [wide.shape[0]] * group.degree, group)
    pending.wait()
    return gathered.unflatten(0, (group.degree, -1)).sum(dim=0).to(partial.dtype)
