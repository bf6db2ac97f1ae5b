"""Reading picked key rows, from one tensor or from two, and giving their gradients back to the rows."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from raysp.attention.blocks import Pick
from raysp.attention.merge import accumulation_dtype
from raysp.comm import Lease


def pick_rows(rows: Tensor, pick: Pick, lease: Lease | None = None, place: int = 0) -> Tensor:
    """Pick rows in the pick's order.

    Args:
        rows: ``[rows, ...]``.
        pick: Which.
        lease: Where the result comes from, which is then valid until the next pick for this place; new memory by default.
        place: Tells results apart that are needed at the same time.

    Returns:
        ``[picked, ...]``.
    """
    picked = _picked(rows, pick, lease, place)
    return torch.index_select(rows, 0, pick.on(rows.device), out=picked)


def pick_rows_of_two(
    own: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor], pick: Pick, lease: Lease | None = None
) -> tuple[Tensor, Tensor]:
    """Pick keys and values from own rows and the rows of others, as if one lay behind the other.

    Args:
        own: Keys and values ``[own rows, H, D]``; heads of a row without gaps.
        others: Likewise ``[rows of others, H, D]``.
        pick: Rows below the number of own rows are own ones.
        lease: As in ``pick_rows``, for the places 0 and 1.

    Returns:
        Keys and values ``[picked, H, D]``.
    """
    index = pick.on(own[0].device)
    k, v = (_picked(x, pick, lease, place) for place, x in enumerate(own))
    if own[0].is_cuda:
        importlib.import_module("raysp.attention.triton_rows").pick_of_two(own, others, index, (k, v))
        return k, v
    for picked, both in zip((k, v), zip(own, others, strict=True), strict=True):
        torch.index_select(torch.cat(both), 0, index, out=picked)
    return k, v


def return_rows(k_picked: Tensor, v_picked: Tensor, pick: Pick, num_rows: int) -> tuple[Tensor, Tensor]:
    """The reverse for gradients: a row that was read twice gets the sum, one that was not read gets 0.

    Args:
        k_picked: ``[picked, H, D]``, gradient of picked keys.
        v_picked: Of picked values.
        pick: What was read.
        num_rows: Rows that were read from.

    Returns:
        Two tensors ``[num_rows, H, D]`` in fp32 or fp64. Equal inputs give equal bits.
    """
    places = pick.places(k_picked.device)
    if k_picked.is_cuda and k_picked.dtype != torch.float64:
        rows = importlib.import_module("raysp.attention.triton_rows")
        summed: tuple[Tensor, Tensor] = rows.sum_picked(k_picked, v_picked, places, num_rows)
        return summed
    dk, dv = (return_rows_of_one(x, pick, num_rows) for x in (k_picked, v_picked))
    return dk, dv


def return_rows_of_one(picked: Tensor, pick: Pick, num_rows: int) -> Tensor:
    """``return_rows`` of a single tensor, in plain torch."""
    index, dtype = pick.on(picked.device), accumulation_dtype(picked.dtype)
    total = torch.zeros((num_rows, *picked.shape[1:]), dtype=dtype, device=picked.device)
    # Each side names a row at most once, so the additions have one order.
    total.index_add_(0, index[: pick.cut], picked[: pick.cut].to(dtype))
    return total.index_add_(0, index[pick.cut :], picked[pick.cut :].to(dtype))


def _picked(rows: Tensor, pick: Pick, lease: Lease | None, place: int) -> Tensor:
    shape = (len(pick.index), *rows.shape[1:])
    return rows.new_empty(shape) if lease is None else lease.empty(("picked", place), shape, rows.dtype)
