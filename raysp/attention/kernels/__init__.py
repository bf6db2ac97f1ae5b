"""Block kernels, and the rule that picks one.

``aten``: flash attention that ships with torch, on CPU and GPU. ``eager``: the reference. ``auto`` picks by device and
dtype. Every kernel keeps the contract of ``contract.Kernel``.
"""

from __future__ import annotations

import torch

from raysp.attention.kernels.aten_cpu import AtenCpuKernel
from raysp.attention.kernels.aten_cuda import AtenCudaKernel
from raysp.attention.kernels.contract import Kernel
from raysp.attention.kernels.eager import EagerKernel
from raysp.errors import InputError

KERNELS = ("auto", "aten", "eager")
LATER_KERNELS = {"fa4": "flash-attn-4", "fa2": "flash-attn"}
MAX_FLASH_HEAD_SIZE = 256


def resolve_kernel(name: str, *, device: torch.device, dtype: torch.dtype, head_size: int) -> Kernel:
    """Find the kernel for these inputs.

    ``auto``: on CUDA ``aten`` for bf16 and fp16 with a head size up to 256, else ``eager``; on CPU ``aten``.

    Raises:
        InputError: The kernel is unknown, not supported yet, or cannot run these inputs.
    """
    if name in LATER_KERNELS:
        raise InputError(
            f"kernel {name!r} ({LATER_KERNELS[name]}) is not supported yet; expected one of {', '.join(KERNELS)}."
        )
    if name not in KERNELS:
        raise InputError(f"kernel {name!r} is unknown; expected one of {', '.join(KERNELS)}.")
    on_cuda = device.type == "cuda"
    flash_runs = device.type == "cpu" or (
        on_cuda and dtype in (torch.bfloat16, torch.float16) and head_size <= MAX_FLASH_HEAD_SIZE
    )
    if name == "aten" and not flash_runs:
        raise InputError(
            f"kernel 'aten' on {device.type} cannot run {dtype} with head size {head_size}; expected bf16 or fp16 and "
            f"a head size up to {MAX_FLASH_HEAD_SIZE} on CUDA. Use kernel = 'eager' or another dtype."
        )
    if name == "eager" or not flash_runs:
        return EagerKernel()
    return AtenCudaKernel() if on_cuda else AtenCpuKernel()


__all__ = ["KERNELS", "Kernel", "resolve_kernel"]
