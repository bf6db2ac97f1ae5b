"""torch's CPU flash attention, tile by tile: blockwise softmax, scores are never formed as a whole.

Its causal mask starts at the top left whatever the shape, so a segment whose keys begin before its queries becomes a full
tile and a causal square; bands are cut into tiles of some hundred queries with a mask each. bf16 and fp16 compute in
fp32. It crashes the process on an empty tensor, so empty tiles are left out here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from raysp.attention.blocks import Segments
from raysp.attention.kernels.delta import given_output
from raysp.attention.kernels.eager import visible_keys
from raysp.attention.mask import SegmentMask
from raysp.attention.merge import accumulation_dtype, merge_into

_ROWS_OF_BAND = 256


@dataclass(frozen=True)
class _Tile:
    """One call of the operator; without a ``band``, ``causal`` says what is masked. ``more``: its rows had keys before."""

    rows: slice
    keys: slice
    causal: bool = False
    band: SegmentMask | None = None
    more: bool = False


@dataclass(frozen=True)
class AtenCpuKernel:
    """See ``raysp.attention.kernels.contract.Kernel``."""

    name: str = "aten"

    def forward(
        self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, segments: Segments, *, mask: SegmentMask, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attend inside each segment; the contract's forward."""
        dtype = accumulation_dtype(q_THD.dtype)
        num_rows, num_heads, _ = q_THD.shape
        q, k, v = (x.to(dtype) for x in (q_THD, k_THD, v_THD))
        out = torch.zeros(q.shape, dtype=dtype, device=q.device)
        lse = torch.full((num_heads, num_rows), float("-inf"), dtype=dtype, device=q.device)
        for tile in _tiles(segments, mask):
            tile_out, tile_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _batched(q[tile.rows]), _batched(k[tile.keys]), _batched(v[tile.keys]), 0.0, tile.causal,
                attn_mask=_additive(tile, q), scale=scale,
            )  # fmt: skip
            tile_out, tile_lse = tile_out[0].transpose(0, 1), tile_lse[0]
            if tile.more:
                merge_into(out[tile.rows], lse[:, tile.rows], tile_out, tile_lse)
            else:
                out[tile.rows], lse[:, tile.rows] = tile_out, tile_lse
        return out, lse

    def backward(
        self,
        dout_THD: Tensor,
        q_THD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
        out_THD: Tensor | None,
        lse_HT: Tensor,
        delta_HT: Tensor | None,
        segments: Segments,
        *,
        mask: SegmentMask,
        scale: float,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the block; the contract's backward."""
        dtype = accumulation_dtype(q_THD.dtype)
        dout, q, k, v, lse = (x.to(dtype) for x in (dout_THD, q_THD, k_THD, v_THD, lse_HT))
        out = given_output(dout, None if out_THD is None else out_THD.to(dtype), delta_HT)
        num_key_heads = k.shape[1]
        group = q.shape[1] // num_key_heads
        dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
        for tile in _tiles(segments, mask):
            # Key heads are repeated here: not every torch sums the gradient of shared key heads.
            k_batched, v_batched = (_batched(x[tile.keys].repeat_interleave(group, dim=1)) for x in (k, v))
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _batched(dout[tile.rows]), _batched(q[tile.rows]), k_batched, v_batched, _batched(out[tile.rows]),
                lse[:, tile.rows].unsqueeze(0).contiguous(), 0.0, tile.causal, attn_mask=_additive(tile, q), scale=scale,
            )  # fmt: skip
            dq[tile.rows] += grads[0][0].transpose(0, 1)
            for target, gradient in ((dk, grads[1]), (dv, grads[2])):
                target[tile.keys] += gradient[0].unflatten(0, (num_key_heads, group)).sum(dim=1).transpose(0, 1)
        return dq, dk, dv


def _tiles(segments: Segments, mask: SegmentMask) -> Iterator[_Tile]:
    """Cut every segment into tiles that the operator can mask."""
    for rows, keys in segments.pieces():
        num_rows, num_keys = rows.stop - rows.start, keys.stop - keys.start
        if mask.is_full:
            yield _Tile(rows, keys)
        elif mask.is_causal and num_keys >= num_rows:
            square = keys.stop - num_rows
            if square > keys.start:
                yield _Tile(rows, slice(keys.start, square))
            yield _Tile(rows, slice(square, keys.stop), causal=True, more=square > keys.start)
        else:
            yield from _band_tiles(rows, keys, mask)


def _band_tiles(rows: slice, keys: slice, mask: SegmentMask) -> Iterator[_Tile]:
    diagonal = (keys.stop - keys.start) - (rows.stop - rows.start)
    # The operator says nothing of rows that see no key.
    begin, end = rows.start, rows.stop
    if mask.right is not None:
        begin = max(begin, rows.start - diagonal - mask.right)
    if mask.left is not None:
        end = min(end, rows.start + (keys.stop - keys.start) - diagonal + mask.left)
    for start in range(begin, end, _ROWS_OF_BAND):
        stop = min(start + _ROWS_OF_BAND, end)
        first, last = keys.start + start - rows.start + diagonal, keys.start + stop - 1 - rows.start + diagonal
        low = keys.start if mask.left is None else max(keys.start, first - mask.left)
        high = keys.stop if mask.right is None else min(keys.stop, last + mask.right + 1)
        if low < high:
            # Counted from the tile's own last query and last key.
            shift = (high - 1) - last
            left = None if mask.left is None else mask.left + shift
            right = None if mask.right is None else mask.right - shift
            yield _Tile(slice(start, stop), slice(low, high), band=SegmentMask(left, right))


def _additive(tile: _Tile, like: Tensor) -> Tensor | None:
    if tile.band is None:
        return None
    num_rows, num_keys = tile.rows.stop - tile.rows.start, tile.keys.stop - tile.keys.start
    hidden = ~visible_keys(num_rows, num_keys, tile.band, like.device)
    return torch.zeros(num_rows, num_keys, dtype=like.dtype).masked_fill(hidden, float("-inf"))


def _batched(rows_THD: Tensor) -> Tensor:
    """``[T, H, D]`` as ``[1, H, T, D]``, without a copy."""
    return rows_THD.transpose(0, 1).unsqueeze(0)
