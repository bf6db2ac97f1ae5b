"""When the ranks share parameters and gradients: in every layer, or once per step.

``per-layer``: FSDP2 gathers a layer's parameters when it runs and reduces its gradients right after, so every rank must
run every layer of every micro-batch. ``per-step``: parameters are gathered once, gradients stay whole on each rank, and
one reduction ends the step; in between a rank meets nobody but its SP groups, so it may skip a micro-batch.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from raysp.errors import RayspError
from raysp.train.model import LanguageModelLoss


def share_per_layer(model: LanguageModelLoss) -> None:
    """Gather and free parameters layer by layer, and reduce gradients in every backward pass; local, no collective."""
    root = _root(model)
    root.set_requires_gradient_sync(True)
    root.set_reshard_after_backward(True)
    root.set_reshard_after_forward(True)
    # FSDP's own default for a root: its backward pass begins right after its forward pass.
    root.set_reshard_after_forward(False, recurse=False)


def gather_parameters(model: LanguageModelLoss) -> None:
    """Make every parameter whole until ``reduce_gradients`` or ``shard_parameters``; collective over all ranks.

    From here on forward and backward passes communicate nothing of the model, and gradients add up on this rank (in the
    dtype of the reduction).
    """
    root = _root(model)
    root.set_requires_gradient_sync(False)
    root.set_reshard_after_backward(False)
    root.set_reshard_after_forward(False)
    for module in _sharded_modules(model):
        module.unshard()


def reduce_gradients(model: LanguageModelLoss, *, has_gradients: bool) -> None:
    """Sum over all ranks what their backward passes left, and shard parameters again; collective over all ranks.

    FSDP reduces in a backward pass, and a rank may have run none, so all ranks run one that adds zero: its end reduces
    every layer, in the same order everywhere.

    Args:
        model: After ``gather_parameters``.
        has_gradients: Whether this rank ran a backward pass; one that did not contributes zeros.

    Raises:
        RayspError: A parameter was left without gradient: this torch does not reduce as expected.
    """
    root = _root(model)
    root.set_requires_gradient_sync(True)
    root.set_reshard_after_backward(True)
    model.zero_loss(every_parameter=not has_gradients).backward()
    left = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    if left:
        raise RayspError(
            f"{left[0]} and {len(left) - 1} other parameters got no gradient at the end of the step; expected all to. "
            f"torch {torch.__version__} may not support planner.sync = 'per-step'; use 'per-layer'."
        )


def shard_parameters(model: LanguageModelLoss) -> None:
    """Free every whole parameter; local. After passes without a backward FSDP leaves some of them whole."""
    for module in _sharded_modules(model):
        module.reshard()


def unsharded_state_bytes(num_parameters: int, dtype: str) -> float:
    """Bytes that a rank holds more under ``per-step``: all parameters as computed with, all gradients as reduced.

    Args:
        num_parameters: Of the whole model.
        dtype: ``train.dtype``.
    """
    parameter_bytes, gradient_bytes = {"bf16": (2, 4), "fp32": (4, 4), "fp64": (8, 8)}[dtype]
    return float(num_parameters * (parameter_bytes + gradient_bytes))


def _root(model: nn.Module) -> FSDPModule:
    if not isinstance(model, FSDPModule):
        raise RayspError("the model is not sharded; call shard_model first.")
    return model


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
