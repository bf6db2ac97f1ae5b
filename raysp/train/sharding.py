"""FSDP2 over all ranks of the run, whatever SP groups they form; gradients are summed, never averaged."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from raysp.errors import InputError
from raysp.train.model import LanguageModelLoss


def shard_model(model: LanguageModelLoss, *, mesh: Any, compute_dtype: torch.dtype | None) -> None:
    """Shard every decoder layer and the rest, in place.

    The gradient of a parameter becomes the sum over ranks: the loss is already divided by the step's target tokens.

    Args:
        model: Whole on every rank, equal on all.
        mesh: One-dimensional device mesh of all ranks.
        compute_dtype: Parameters are cast to it for compute; gradients are reduced in fp32. ``None``: no cast.

    Raises:
        InputError: The model does not keep its decoder layers in ``model.layers``.
    """
    policy = MixedPrecisionPolicy()
    if compute_dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    layers = getattr(getattr(model.model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(model.model, "lm_head"):
        raise InputError(
            f"{type(model.model).__name__} has no model.layers and lm_head; expected a decoder of the Llama family."
        )
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "zero_loss")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
