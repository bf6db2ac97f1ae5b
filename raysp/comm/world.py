"""Operations over all ranks that training needs besides attention: a device mesh for sharding, sums of scalars."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def world_mesh(device: torch.device, world_size: int) -> DeviceMesh:
    """The one-dimensional mesh of all ranks, over the world's process group."""
    return init_device_mesh(device.type, (world_size,))


def all_reduce_sum(tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Sum ``tensor`` over the ranks of ``group``, in place."""
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
