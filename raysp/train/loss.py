"""Cross-entropy from hidden states without ever holding the logits of more than a chunk of rows.

Symbols: T rows (tokens of one rank), E hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from raysp.attention.differentiable import differentiable_once
from raysp.errors import InputError, MissingExtraError

IGNORED_LABEL = -100


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of token losses; gradients are formed chunk by chunk in the forward pass, so logits live once."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TE: torch.Tensor, weight_VE: torch.Tensor, labels_T: torch.Tensor, chunk_rows: int
    ) -> torch.Tensor:
        accumulate = torch.promote_types(hidden_TE.dtype, torch.float32)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        rows = (labels_T != IGNORED_LABEL).nonzero().squeeze(1)
        total = torch.zeros((), dtype=accumulate, device=hidden_TE.device)
        grad_hidden = torch.zeros_like(hidden_TE) if needs_grad else None
        grad_weight = torch.zeros_like(weight_VE, dtype=accumulate) if needs_grad else None
        for chunk in rows.split(chunk_rows):
            hidden = hidden_TE[chunk]
            labels = labels_T[chunk].unsqueeze(1)
            log_probs = torch.log_softmax((hidden @ weight_VE.T).to(accumulate), dim=-1)
            total -= log_probs.gather(1, labels).sum()
            if grad_hidden is not None and grad_weight is not None:
                grad_logits = log_probs.exp_()
                grad_logits.scatter_add_(1, labels, -torch.ones_like(labels, dtype=accumulate))
                grad_logits = grad_logits.to(hidden.dtype)
                grad_hidden[chunk] = grad_logits @ weight_VE
                grad_weight += grad_logits.T @ hidden
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VE.dtype))
        return total

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            grad_hidden * grad_total.to(grad_hidden.dtype),
            grad_weight * grad_total.to(grad_weight.dtype),
            None,
            None,
        )


def summed_cross_entropy(
    hidden_TE: torch.Tensor, weight_VE: torch.Tensor, labels_T: torch.Tensor, *, chunk_rows: int, kernel: str
) -> torch.Tensor:
    """Sum over rows of ``-log softmax(hidden @ weight.T)[label]``.

    Args:
        hidden_TE: ``[T, E]`` last hidden states of this rank.
        weight_VE: ``[V, E]`` output embedding.
        labels_T: ``[T]`` int64, ``-100`` where a row has no target. All rows may be without one.
        chunk_rows: Rows whose logits exist at the same time.
        kernel: ``"chunked"`` or ``"liger"`` (see :func:`resolve_loss_kernel`).

    Returns:
        Scalar, fp32 (fp64 for fp64 inputs), differentiable in ``hidden_TE`` and ``weight_VE``.
    """
    if kernel == "liger":
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        loss: torch.Tensor = LigerFusedLinearCrossEntropyFunction.apply(
            hidden_TE,
            weight_VE,
            labels_T,
            None,  # bias
            None,  # class weights
            IGNORED_LABEL,
            0.0,  # z loss
            0.0,  # label smoothing
            "sum",
            None,  # soft cap
            False,  # return z loss
            torch.float32,  # gradient accumulation
        )[0]
        return loss.float()
    total: torch.Tensor = _ChunkedCrossEntropy.apply(hidden_TE, weight_VE, labels_T, chunk_rows)
    return total


def resolve_loss_kernel(name: str, *, device: torch.device, dtype: torch.dtype) -> str:
    """Choose the cross-entropy: Liger's fused kernel on CUDA where it is installed, else the chunked one.

    Raises:
        MissingExtraError: ``"liger"`` was asked for and is not installed.
        InputError: ``"liger"`` was asked for where it cannot run (CPU, fp64).
    """
    if name == "chunked":
        return name
    usable = device.type == "cuda" and dtype != torch.float64
    if name == "liger" and not usable:
        raise InputError(
            f"train.loss_kernel = 'liger' cannot run on {device.type} in {dtype}; expected CUDA in bf16 or fp32. "
            "Use 'auto' or 'chunked'."
        )
    try:
        import liger_kernel.ops.fused_linear_cross_entropy  # noqa: F401
    except ImportError as error:
        if name == "liger":
            raise MissingExtraError("train.loss_kernel = 'liger' needs `pip install 'raysp[gpu]'`.") from error
        return "chunked"
    return "liger" if usable else "chunked"
