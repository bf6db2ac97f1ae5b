"""What a forward pass keeps for its backward pass, counted rather than estimated; works on CPU too."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def saved_activation_bytes(forward: Callable[[], torch.Tensor], model: nn.Module) -> int:
    """Bytes of distinct storages that autograd saves during ``forward``, without the model's own parameters.

    Args:
        forward: Runs the pass and returns a scalar; it is also run backward, so collectives stay matched.
        model: Its parameters and buffers are not counted; gradients that the pass leaves are dropped.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.buffers()]}
    sizes: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # so that no storage is freed and its address reused while counting

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not (tensor.is_leaf and tensor.requires_grad):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
                kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    loss.backward()
    model.zero_grad(set_to_none=True)
    return sum(sizes.values())
