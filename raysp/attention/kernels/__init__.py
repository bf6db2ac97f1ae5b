"""Block kernels, and the rule that picks one.

``fa4`` and ``fa2``: FlashAttention from the packages ``flash-attn-4`` and ``flash-attn``. ``aten``: the flash attention
that ships with torch, on CPU and GPU. ``eager``: the reference. ``auto`` picks by device, dtype and head size. Every
kernel keeps the contract of ``contract.Kernel``.
"""

from __future__ import annotations

import functools

import torch

from raysp.attention.kernels import fa2, fa4
from raysp.attention.kernels.aten_cpu import AtenCpuKernel
from raysp.attention.kernels.aten_cuda import AtenCudaKernel
from raysp.attention.kernels.contract import Kernel
from raysp.attention.kernels.eager import EagerKernel
from raysp.errors import InputError

KERNELS = ("auto", "fa4", "fa2", "aten", "eager")
MAX_FLASH_HEAD_SIZE = 256
_MODULES = {"fa4": fa4, "fa2": fa2}


@functools.cache
def resolve_kernel(name: str, *, device: torch.device, dtype: torch.dtype, head_size: int) -> Kernel:
    """Find the kernel for these inputs.

    ``auto``: on CUDA, for bf16 and fp16, the first of ``fa4``, ``fa2`` and ``aten`` that is installed and has kernels for
    the GPU and the head size, else ``eager``; on CPU ``aten``.

    Raises:
        InputError: The kernel is unknown, not installed, or cannot run these inputs.
    """
    if name not in KERNELS:
        raise InputError(f"kernel {name!r} is unknown; expected one of {', '.join(KERNELS)}.")
    if name == "eager":
        return EagerKernel()
    if name in _MODULES:
        _check_flash(name, device, dtype, head_size)
        return fa4.FlashAttention4Kernel() if name == "fa4" else fa2.FlashAttention2Kernel()
    if device.type == "cpu":
        return AtenCpuKernel()
    half = dtype in (torch.bfloat16, torch.float16)
    flash_runs = device.type == "cuda" and half and head_size <= MAX_FLASH_HEAD_SIZE
    if name == "aten" and not flash_runs:
        raise InputError(
            f"kernel 'aten' on {device.type} cannot run {dtype} with head size {head_size}; expected bf16 or fp16 and "
            f"a head size up to {MAX_FLASH_HEAD_SIZE} on CUDA. Use kernel = 'eager' or another dtype."
        )
    if not flash_runs:
        return EagerKernel()
    if name == "auto":
        for package in _MODULES:
            if _refusal(package, device, dtype, head_size) is None:
                return resolve_kernel(package, device=device, dtype=dtype, head_size=head_size)
    return AtenCudaKernel()


def _check_flash(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> None:
    refusal = _refusal(name, device, dtype, head_size)
    if refusal is not None:
        raise InputError(refusal)


def _refusal(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Why ``fa4`` or ``fa2`` cannot run these inputs; ``None`` if it can."""
    module = _MODULES[name]
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return (
            f"kernel {name!r} cannot run {dtype} on {device.type}; expected bf16 or fp16 on CUDA. Use kernel = 'auto' or "
            "another dtype."
        )
    if head_size > module.MAX_HEAD_SIZE or head_size % module.HEAD_SIZE_MULTIPLE:
        return (
            f"kernel {name!r} cannot run head size {head_size}; expected a multiple of {module.HEAD_SIZE_MULTIPLE} up to "
            f"{module.MAX_HEAD_SIZE}. Use kernel = 'aten' or 'eager'."
        )
    if not module.is_installed():
        return (
            f"kernel {name!r} needs the package {module.PACKAGE}, which is not installed; expected it beside raysp. "
            f"Install raysp[{name}], or use kernel = 'auto'."
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < module.LOWEST_CAPABILITY:
        found, lowest = (".".join(map(str, version)) for version in (capability, module.LOWEST_CAPABILITY))
        return (
            f"kernel {name!r} has no kernels for compute capability {found}; expected {lowest} or newer. Use kernel = "
            "'aten'."
        )
    return None


__all__ = ["KERNELS", "Kernel", "resolve_kernel"]
