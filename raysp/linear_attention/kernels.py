"""Which local operator runs: plain torch, or flash-linear-attention's Triton kernels."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch

from raysp.errors import InputError
from raysp.linear_attention.torch_operator import TorchOperator

if TYPE_CHECKING:
    from raysp.linear_attention.rates import MakeOperator

KERNELS = ("auto", "torch", "fla")
_FLA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLA_LARGEST_KEY = 256


def resolve_kernel(name: str, *, device: torch.device, dtype: torch.dtype, key_size: int) -> MakeOperator:
    """Find the local operator; ``auto`` is ``fla`` where it is installed and runs these tensors, otherwise ``torch``.

    Raises:
        InputError: It is unknown, not installed, or does not run these tensors.
    """
    if name not in KERNELS:
        raise InputError(f"linear attention kernel {name!r} is unknown; expected one of {', '.join(KERNELS)}.")
    is_installed = importlib.util.find_spec("fla") is not None and importlib.util.find_spec("triton") is not None
    runs = device.type == "cuda" and dtype in _FLA_DTYPES and key_size <= _FLA_LARGEST_KEY
    if name == "torch" or (name == "auto" and not (is_installed and runs)):
        return TorchOperator
    if not is_installed:
        raise InputError("kernel 'fla' is not installed; expected fla-core. Run pip install 'raysp[fla]'.")
    if not runs:
        raise InputError(
            f"kernel 'fla' cannot run {dtype} with key size {key_size} on {device.type}; expected CUDA, bf16, fp16 or fp32 "
            f"and key size at most {_FLA_LARGEST_KEY}. Use kernel = 'torch'."
        )
    from raysp.linear_attention.fla_operator import FlaOperator

    return FlaOperator
