"""The entry point: checks the inputs, picks method and kernel, and ties the method's backward into autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raysp.attention.chooser import Choice, choose
from raysp.attention.differentiable import differentiable_once
from raysp.attention.kernels import resolve_kernel
from raysp.attention.layout import SequenceLayout
from raysp.attention.mask import DocumentMask
from raysp.attention.methods.call import AttentionCall
from raysp.attention.schedule import schedule_of
from raysp.comm import Communicator, ProcessGroup
from raysp.errors import InputError


def parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: SequenceLayout,
    group: ProcessGroup | Communicator | None,
    method: str = "auto",
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    kernel: str = "auto",
    deterministic: bool = False,
    kv_layout: SequenceLayout | None = None,
) -> Tensor:
    """Exact softmax attention of packed documents whose tokens are spread over the ranks of a group.

    All ranks of the group call this together, with the same arguments but for their own rows.

    Args:
        q: ``[local_tokens, Hq, D]``, this rank's rows in the layout's local order; fp64, fp32, bf16 or fp16.
        k: ``[local_tokens, Hk, D]``; Hk divides Hq.
        v: Like ``k``.
        layout: Which tokens this rank holds. Reuse one object for all layers: it keeps the index maps.
        group: Process group, or a ``Communicator`` that counts bytes; ``None`` at degree 1. A group made elsewhere must
            have run one collective on NCCL.
        method: One of ``raysp.attention.METHODS``; ``auto`` predicts the times of all and takes the least.
        causal: A token sees its document up to itself; otherwise all of its document.
        window: W: a token sees the last W tokens up to itself, itself included; needs ``causal``.
        scale: Factor of the scores; ``D**-0.5`` by default.
        kernel: One of ``raysp.attention.KERNELS``.
        deterministic: Same bits on every run, whatever arrives first. Merges always have a fixed order; this concerns the
            kernel.
        kv_layout: Which rows of ``k`` and ``v`` this rank holds, where documents have other key lengths than query
            lengths (cross attention); same degree and number of documents, not causal. The queries' layout by default.

    Returns:
        ``[local_tokens, Hq, D]`` in the dtype of ``q``; differentiable once in ``q``, ``k``, ``v``.

    Raises:
        InputError: An argument cannot be used; the message says which and why.
        RankTimeoutError: A rank of the group did not take part in time.
    """
    keys = layout if kv_layout is None else kv_layout
    _check_mask(causal, window, layout, kv_layout)
    communicator = Communicator.of(group, layout.degree)
    _check_tensors(q, k, v, layout, keys, communicator.group_rank)
    call = AttentionCall(
        schedule=schedule_of(layout, DocumentMask(causal, window), keys),
        group=communicator,
        num_key_heads=k.shape[1],
        kernel=resolve_kernel(kernel, device=q.device, dtype=q.dtype, head_size=q.shape[2]),
        scale=q.shape[2] ** -0.5 if scale is None else float(scale),
        deterministic=deterministic,
    )
    choice = choose(
        method,
        schedule=call.schedule,
        group=communicator,
        kernel=call.kernel,
        num_heads=q.shape[1],
        num_key_heads=k.shape[1],
        head_size=q.shape[2],
        dtype=q.dtype,
        device=q.device,
    )
    return _ParallelAttention.apply(q, k, v, call, choice)


class _ParallelAttention(torch.autograd.Function):
    """Forward and backward of any method."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, choice: Choice) -> Tensor:
        out, saved = choice.forward.forward(call, q, k, v)
        ctx.save_for_backward(*saved)
        ctx.call = call
        ctx.method = choice.backward
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv = ctx.method.backward(ctx.call, ctx.saved_tensors, dout.contiguous())
        dtype = dout.dtype
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), None, None


def _check_mask(causal: bool, window: int | None, layout: SequenceLayout, kv_layout: SequenceLayout | None) -> None:
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise InputError(f"window is {window!r}; expected the number of keys that a query sees, at least 1, or None.")
    if window is not None and not causal:
        raise InputError(f"window = {window} with causal = False; expected a causal call. Set causal = True.")
    if kv_layout is None:
        return
    if kv_layout.degree != layout.degree or len(kv_layout.lengths) != len(layout.lengths):
        raise InputError(
            f"kv_layout has degree {kv_layout.degree} and {len(kv_layout.lengths)} documents, layout degree "
            f"{layout.degree} and {len(layout.lengths)}; expected the same of both. Build both for one micro-batch."
        )
    if causal and kv_layout != layout:
        raise InputError("kv_layout differs from layout in a causal call; expected causal = False for cross attention.")


def _check_tensors(
    q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, keys: SequenceLayout, group_rank: int
) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape:
        raise InputError(f"shapes {shapes}; expected q [tokens, Hq, D] and k, v both [tokens, Hk, D].")
    for names, tensor, cut, what in (("q", q, layout, "layout"), ("k, v", k, keys, "kv_layout")):
        num_rows = cut.local_tokens(group_rank)
        if tensor.shape[0] != num_rows:
            what = "layout" if keys is layout else what
            raise InputError(
                f"shapes {shapes} on group rank {group_rank}; expected {num_rows} rows of {names}, the {what}'s "
                f"local_tokens. Select rows with {what}.token_indices(group_rank)."
            )
    if q.shape[2] != k.shape[2]:
        raise InputError(f"shapes {shapes}; expected one head size for q, k and v.")
    if q.shape[1] < 1 or k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise InputError(
            f"{q.shape[1]} query heads and {k.shape[1]} key heads; expected key heads that divide the query heads."
        )
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise InputError(f"dtypes q {q.dtype}, k {k.dtype}, v {v.dtype}; expected one floating-point dtype.")
    if not q.device == k.device == v.device:
        raise InputError(f"devices q {q.device}, k {k.device}, v {v.device}; expected one device.")
