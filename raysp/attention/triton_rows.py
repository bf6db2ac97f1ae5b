"""Row operations of parallel attention in Triton, for CUDA: each reads and writes its tensors once.

Imported only where they run. Strides are free but for a contiguous last dimension.

Symbols: T rows, H heads, D head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS_OF_MERGE = 16


@triton.jit
def _merge_kernel(  # type: ignore[no-untyped-def]
    out, lse, other_out, other_lse, num_rows, head_size,
    out_row, out_head, other_row, other_head, lse_head, lse_row, other_lse_head, other_lse_row,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    in_rows = rows < num_rows
    inside = in_rows[:, None] & (columns < head_size)[None, :]
    rows = rows.to(tl.int64)
    a_lse = tl.load(lse + head * lse_head + rows * lse_row, mask=in_rows, other=0.0)
    b_lse = tl.load(other_lse + head * other_lse_head + rows * other_lse_row, mask=in_rows, other=0.0)
    highest = tl.maximum(a_lse, b_lse)
    # Rows that saw no key on either side stay empty.
    empty = highest == float("-inf")
    shift = tl.where(empty, 0.0, highest)
    a_weight, b_weight = tl.exp(a_lse - shift), tl.exp(b_lse - shift)
    total = a_weight + b_weight
    weight = tl.where(empty, 0.0, b_weight / tl.where(empty, 1.0, total))
    a_at = out + rows[:, None] * out_row + head * out_head + columns[None, :]
    b_at = other_out + rows[:, None] * other_row + head * other_head + columns[None, :]
    a = tl.load(a_at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_at, mask=inside, other=0.0).to(tl.float32)
    merged = a - weight[:, None] * (a - b)
    tl.store(a_at, merged.to(out.dtype.element_ty), mask=inside)
    merged_lse = tl.where(empty, float("-inf"), shift + tl.log(tl.where(empty, 1.0, total)))
    tl.store(lse + head * lse_head + rows * lse_row, merged_lse, mask=in_rows)


def merge_into(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """See ``raysp.attention.merge.merge_into``; ``lse`` and ``other_lse`` are fp32."""
    num_rows, num_heads, head_size = out.shape
    other_lse = other_lse.to(torch.float32)
    grid = (triton.cdiv(num_rows, _ROWS_OF_MERGE), num_heads)
    _launch(
        _merge_kernel, grid, out.device, out, lse, other_out, other_lse, num_rows, head_size,
        out.stride(0), out.stride(1), other_out.stride(0), other_out.stride(1),
        lse.stride(0), lse.stride(1), other_lse.stride(0), other_lse.stride(1),
        ROWS=_ROWS_OF_MERGE, WIDTH=triton.next_power_of_2(head_size),
    )  # fmt: skip


@triton.jit
def _pick_kernel(  # type: ignore[no-untyped-def]
    k_picked, v_picked, k_own, v_own, k_others, v_others, index, num_picked, num_own,
    ROW_SIZE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    in_rows = rows < num_picked
    source = tl.load(index + rows, mask=in_rows, other=0)
    is_own = source < num_own
    inside = in_rows[:, None] & (columns < ROW_SIZE)[None, :]
    from_own, from_others = inside & is_own[:, None], inside & (source >= num_own)[:, None]
    own_at = source[:, None] * ROW_SIZE + columns[None, :]
    others_at = (source - num_own)[:, None] * ROW_SIZE + columns[None, :]
    at = rows[:, None] * ROW_SIZE + columns[None, :]
    own = tl.load(k_own + own_at, mask=from_own, other=0.0)
    tl.store(
        k_picked + at,
        tl.where(is_own[:, None], own, tl.load(k_others + others_at, mask=from_others, other=0.0)),
        mask=inside,
    )
    own = tl.load(v_own + own_at, mask=from_own, other=0.0)
    tl.store(
        v_picked + at,
        tl.where(is_own[:, None], own, tl.load(v_others + others_at, mask=from_others, other=0.0)),
        mask=inside,
    )


def pick_of_two(
    own: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor], index: Tensor, picked: tuple[Tensor, Tensor]
) -> None:
    """See ``raysp.attention.picked.pick_rows_of_two``; ``index`` is int64, ``picked`` contiguous and written."""
    num_own, *shape = own[0].shape
    row_size = math.prod(shape)
    width, rows = _tile(row_size)
    _launch(
        _pick_kernel, (triton.cdiv(len(index), rows), triton.cdiv(row_size, width)), index.device,
        picked[0], picked[1], *(x.contiguous() for x in (*own, *others)), index, len(index), num_own,
        ROW_SIZE=row_size, ROWS=rows, WIDTH=width,
    )  # fmt: skip


@triton.jit
def _sum_kernel(  # type: ignore[no-untyped-def]
    k_total, v_total, k_picked, v_picked, places, num_rows, num_places,
    ROW_SIZE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    in_places = rows < num_places
    first = tl.load(places + rows, mask=in_places, other=-1)
    second = tl.load(places + num_places + rows, mask=in_places, other=-1)
    in_columns = (columns < ROW_SIZE)[None, :]
    has_first, has_second = (first >= 0)[:, None] & in_columns, (second >= 0)[:, None] & in_columns
    first_at = first[:, None] * ROW_SIZE + columns[None, :]
    second_at = second[:, None] * ROW_SIZE + columns[None, :]
    at, inside = rows[:, None] * ROW_SIZE + columns[None, :], (rows < num_rows)[:, None] & in_columns
    a = tl.load(k_picked + first_at, mask=has_first, other=0.0).to(tl.float32)
    tl.store(k_total + at, a + tl.load(k_picked + second_at, mask=has_second, other=0.0).to(tl.float32), mask=inside)
    a = tl.load(v_picked + first_at, mask=has_first, other=0.0).to(tl.float32)
    tl.store(v_total + at, a + tl.load(v_picked + second_at, mask=has_second, other=0.0).to(tl.float32), mask=inside)


def sum_picked(k_picked: Tensor, v_picked: Tensor, places: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Give picked rows back to where they came from; a row that was read twice gets the sum, one not read gets 0.

    Args:
        k_picked: ``[picked, H, D]``.
        v_picked: Like ``k_picked``.
        places: int64 ``[2, rows]``, where each row was read, or -1; rows beyond were not read.
        num_rows: Rows of the result.

    Returns:
        Two tensors ``[num_rows, H, D]``, fp32.
    """
    shape = k_picked.shape[1:]
    total = k_picked.new_empty((2, num_rows, *shape), dtype=torch.float32)
    row_size = math.prod(shape)
    width, rows = _tile(row_size)
    _launch(
        _sum_kernel, (triton.cdiv(num_rows, rows), triton.cdiv(row_size, width)), places.device,
        total[0], total[1], k_picked.contiguous(), v_picked.contiguous(), places, num_rows, places.shape[1],
        ROW_SIZE=row_size, ROWS=rows, WIDTH=width,
    )  # fmt: skip
    return total[0], total[1]


def _tile(row_size: int) -> tuple[int, int]:
    """Columns and rows of a program: some ten thousand numbers."""
    width = min(1024, triton.next_power_of_2(row_size))
    return width, max(1, 8192 // width)


@triton.jit
def _dots_kernel(  # type: ignore[no-untyped-def]
    dots, a, b, num_rows, head_size, a_row, a_head, b_row, b_head, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    in_rows = rows < num_rows
    inside = in_rows[:, None] & (columns < head_size)[None, :]
    left = tl.load(a + rows[:, None] * a_row + head * a_head + columns[None, :], mask=inside, other=0.0)
    right = tl.load(b + rows[:, None] * b_row + head * b_head + columns[None, :], mask=inside, other=0.0)
    value = tl.sum(left.to(tl.float32) * right.to(tl.float32), axis=1)
    tl.store(dots + head * num_rows + rows, value, mask=in_rows)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the rows of ``[T, H, D]`` tensors: fp32 ``[H, T]``."""
    num_rows, num_heads, head_size = a.shape
    dots = torch.empty((num_heads, num_rows), dtype=torch.float32, device=a.device)
    grid = (triton.cdiv(num_rows, _ROWS_OF_MERGE), num_heads)
    _launch(
        _dots_kernel, grid, a.device, dots, a, b, num_rows, head_size,
        a.stride(0), a.stride(1), b.stride(0), b.stride(1),
        ROWS=_ROWS_OF_MERGE, WIDTH=triton.next_power_of_2(head_size),
    )  # fmt: skip
    return dots


def _launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **constants: int) -> None:
    if not min(grid):
        return
    if torch.cuda.current_device() == device.index:
        kernel[grid](*arguments, **constants)
        return
    with torch.cuda.device(device):
        kernel[grid](*arguments, **constants)
