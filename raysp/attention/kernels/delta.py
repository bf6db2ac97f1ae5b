"""``delta = rowsum(dout * out)``, and standing in for an output that did not travel.

Flash kernels take ``out`` in their backward only to form ``delta = rowsum(dout * out)``. Where only ``delta`` is known,
a sparse output with the same row sums does as well: put ``delta / dout_j`` at the largest entry j of ``dout``, and
what rounding leaves over at the next entries. Two entries in bf16 reach 2**-17, three full fp32.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from raysp.attention.merge import accumulation_dtype


def output_with_delta(dout_THD: Tensor, delta_HT: Tensor) -> Tensor:
    """Make an output whose product with ``dout`` has the row sums ``delta``.

    Args:
        dout_THD: ``[T, H, D]``; a row of zeros has ``delta`` 0.
        delta_HT: ``[H, T]``.

    Returns:
        ``[T, H, D]`` in the dtype of ``dout``.
    """
    dtype = accumulation_dtype(dout_THD.dtype)
    num_entries = min(1 if dout_THD.dtype == dtype else 3, dout_THD.shape[-1])
    indices = dout_THD.abs().topk(num_entries, dim=-1).indices
    entries = dout_THD.gather(-1, indices).to(dtype)
    rest = delta_HT.transpose(0, 1).to(dtype)
    out = torch.zeros_like(dout_THD)
    for index in range(num_entries):
        entry = entries[..., index]
        value = torch.where(entry == 0, torch.zeros_like(rest), rest / entry).to(dout_THD.dtype)
        # fp16 may overflow at a tiny entry; the rest then stays as small as it is.
        value = torch.where(value.isfinite(), value, torch.zeros_like(value))
        out.scatter_(-1, indices[..., index : index + 1], value.unsqueeze(-1))
        rest = rest - value.to(dtype) * entry
    return out


def output_delta(dout_THD: Tensor, out_THD: Tensor) -> Tensor:
    """Row sums of ``dout * out``: ``[H, T]`` in fp32 or fp64, contiguous."""
    dtype = accumulation_dtype(out_THD.dtype)
    if out_THD.is_cuda and dtype == torch.float32:
        delta: Tensor = importlib.import_module("raysp.attention.triton_rows").row_dots(dout_THD, out_THD)
        return delta
    return (dout_THD.to(dtype) * out_THD.to(dtype)).sum(dim=-1).transpose(0, 1).contiguous()


def given_delta(dout_THD: Tensor, out_THD: Tensor | None, delta_HT: Tensor | None) -> Tensor:
    """The delta that was given, or that follows from the output.

    Raises:
        ValueError: Neither was given.
    """
    if delta_HT is not None:
        return delta_HT
    if out_THD is None:
        raise ValueError("a kernel's backward got neither out nor delta; expected at least one of them.")
    return output_delta(dout_THD, out_THD)


def given_output(dout_THD: Tensor, out_THD: Tensor | None, delta_HT: Tensor | None) -> Tensor:
    """The output that was given, or one with the delta that was.

    Raises:
        ValueError: Neither was given.
    """
    return output_with_delta(dout_THD, given_delta(dout_THD, out_THD, delta_HT)) if out_THD is None else out_THD
