"""Ulysses: all-to-alls turn a shard of the tokens with all heads into all tokens with a share of the heads.

Attention is then local. With more ranks than key heads, key heads are replicated: each rank gets the one that its query
heads read, and the owner of the rows sums the gradients of the copies.

Symbols: N degree, T local rows, S all tokens, Hq, Hk heads, h query heads of a rank.

Source: DeepSpeed Ulysses (arXiv:2309.14509).
"""

from __future__ import annotations

import torch
from torch import Tensor

from raysp.attention.layout import SequenceLayout
from raysp.attention.merge import accumulation_dtype
from raysp.attention.methods.call import AttentionCall, Saved
from raysp.attention.methods.local import document_gradients
from raysp.attention.schedule import document_block
from raysp.comm import all_to_all_rows
from raysp.errors import InputError


class Ulysses:
    """See ``raysp.attention.methods.call.Method``."""

    def forward(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        """Trade tokens for heads, attend, trade back."""
        check_heads(call.layout.degree, q.shape[1], k.shape[1])
        num_copies = max(1, call.layout.degree // call.num_key_heads)
        q_all = _to_heads(call, q)
        k_all, v_all = (_to_heads(call, x.repeat_interleave(num_copies, dim=1)) for x in (k, v))
        block = document_block(call.layout, causal=call.causal)
        out, lse = call.kernel.forward(q_all, k_all, v_all, block.segments, causal=call.causal, scale=call.scale)
        return _to_tokens(call, out), (q_all, k_all, v_all, out, lse)

    def backward(self, call: AttentionCall, saved: Saved, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same trades in reverse."""
        q, k, v, out, lse = saved
        dout_all = _to_heads(call, dout)
        dq, dk, dv = document_gradients(call, q, k, v, out, lse, dout_all)
        dk, dv = (_sum_copies(call, _to_tokens(call, x.to(k.dtype))) for x in (dk, dv))
        return _to_tokens(call, dq.to(q.dtype)), dk, dv


def heads_divide(degree: int, num_heads: int, num_key_heads: int) -> bool:
    """Whether each rank can have an equal share of the heads."""
    return num_heads % degree == 0 and (num_key_heads % degree == 0 or degree % num_key_heads == 0)


def check_heads(degree: int, num_heads: int, num_key_heads: int) -> None:
    """Refuse heads that cannot be shared out.

    Raises:
        InputError: Names heads and degree.
    """
    if num_heads % degree:
        raise InputError(
            f"ulysses cannot share {num_heads} query heads over a group of degree {degree}; expected a degree that "
            f"divides {num_heads}. Use another degree, or method 'ring', which runs any degree."
        )
    if not heads_divide(degree, num_heads, num_key_heads):
        raise InputError(
            f"ulysses cannot share {num_key_heads} key heads over a group of degree {degree}; expected one to divide "
            "the other. Use another degree, or method 'ring', which runs any degree."
        )


def _sum_copies(call: AttentionCall, gradient: Tensor) -> Tensor:
    """``[T, copies*Hk, D]`` -> ``[T, Hk, D]`` in fp32 or fp64."""
    wide = gradient.to(accumulation_dtype(gradient.dtype))
    return wide.unflatten(1, (call.num_key_heads, -1)).sum(dim=2)


def _to_heads(call: AttentionCall, local: Tensor) -> Tensor:
    """``[T, H, D]`` of this rank's tokens -> ``[S, H/N, D]`` of this rank's heads, natural token order."""
    degree = call.layout.degree
    by_rank = local.unflatten(1, (degree, -1)).transpose(0, 1).flatten(0, 1)
    counts = [call.layout.local_tokens(rank) for rank in range(degree)]
    joined = all_to_all_rows(by_rank, [local.shape[0]] * degree, counts, call.group)
    return joined.index_select(0, _natural_order(call.layout, local.device)[0])


def _to_tokens(call: AttentionCall, shared: Tensor) -> Tensor:
    """The inverse: ``[S, h, D]`` of this rank's heads -> ``[T, N*h, D]`` of this rank's tokens."""
    degree = call.layout.degree
    by_rank = shared.index_select(0, _natural_order(call.layout, shared.device)[1])
    counts = [call.layout.local_tokens(rank) for rank in range(degree)]
    mine = counts[call.group_rank]
    joined = all_to_all_rows(by_rank, counts, [mine] * degree, call.group)
    return joined.unflatten(0, (degree, mine)).transpose(0, 1).flatten(1, 2)


def _natural_order(layout: SequenceLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each global token lies in the concatenation of the ranks' rows, and the inverse map; int64 ``[S]``."""

    def build() -> tuple[Tensor, Tensor]:
        tokens = torch.cat([layout.token_indices(rank) for rank in range(layout.degree)])
        return torch.argsort(tokens).to(device), tokens.to(device)

    return layout.memo(("natural_order", device), build)
