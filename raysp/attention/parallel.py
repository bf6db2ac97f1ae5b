"""The entry point: checks the inputs, picks method and kernel, and ties the method's backward into autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raysp.attention.chooser import make_method, resolve_method_name
from raysp.attention.kernels import resolve_kernel
from raysp.attention.layout import SequenceLayout
from raysp.attention.methods.call import AttentionCall, Method
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
        method: ``ring``, ``bidirectional_ring``, ``token_ring``, ``all_gather``, ``ulysses`` or ``auto``.
        causal: A token sees its document up to itself; otherwise all of its document.
        window: Not supported yet.
        scale: Factor of the scores; ``D**-0.5`` by default.
        kernel: ``aten``, ``eager`` or ``auto``.
        deterministic: Same bits on every run. Merges always have a fixed order; this concerns the kernel.
        kv_layout: Not supported yet.

    Returns:
        ``[local_tokens, Hq, D]`` in the dtype of ``q``; differentiable once in ``q``, ``k``, ``v``.

    Raises:
        InputError: An argument cannot be used; the message says which and why.
        RankTimeoutError: A rank of the group did not take part in time.
    """
    if window is not None:
        raise InputError(f"window = {window} is not supported yet; expected None. Train with full attention.")
    if kv_layout is not None:
        raise InputError("kv_layout is not supported yet; expected None: keys laid out as the queries are.")
    communicator = _communicator(group, layout)
    _check_tensors(q, k, v, layout.local_tokens(communicator.group_rank), communicator.group_rank)
    name = resolve_method_name(method, degree=layout.degree, num_heads=q.shape[1], num_key_heads=k.shape[1])
    call = AttentionCall(
        layout=layout,
        group=communicator,
        num_key_heads=k.shape[1],
        kernel=resolve_kernel(kernel, device=q.device, dtype=q.dtype, head_size=q.shape[2]),
        causal=causal,
        scale=q.shape[2] ** -0.5 if scale is None else float(scale),
        deterministic=deterministic,
    )
    return _ParallelAttention.apply(q, k, v, call, make_method(name))


class _ParallelAttention(torch.autograd.Function):
    """Forward and backward of any method."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, method: Method) -> Tensor:
        out, saved = method.forward(call, q, k, v)
        ctx.save_for_backward(*saved)
        ctx.call = call
        ctx.method = method
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv = ctx.method.backward(ctx.call, ctx.saved_tensors, dout.contiguous())
        dtype = dout.dtype
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), None, None


def _communicator(group: ProcessGroup | Communicator | None, layout: SequenceLayout) -> Communicator:
    if group is None or layout.degree == 1:
        if layout.degree != 1:
            raise InputError(
                f"group is None for a layout of degree {layout.degree}; expected the process group of its ranks."
            )
        return Communicator.alone()
    communicator = group if isinstance(group, Communicator) else Communicator.wrap(group)
    if communicator.degree != layout.degree:
        raise InputError(
            f"the group has {communicator.degree} ranks and the layout degree {layout.degree}; expected the same. "
            "Build the layout with the degree of the group that runs it."
        )
    return communicator


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, num_rows: int, group_rank: int) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape:
        raise InputError(f"shapes {shapes}; expected q [tokens, Hq, D] and k, v both [tokens, Hk, D].")
    if q.shape[0] != num_rows or k.shape[0] != num_rows:
        raise InputError(
            f"shapes {shapes} on group rank {group_rank}; expected {num_rows} rows, the layout's local_tokens. Select "
            "rows with layout.token_indices(group_rank)."
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
