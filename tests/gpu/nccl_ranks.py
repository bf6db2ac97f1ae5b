"""What single ranks do in the NCCL attention test; apart from it, so that spawned ranks can import it by name."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from raysp.attention import SequenceLayout, parallel_attention, reference_attention
from raysp.comm import Communicators, init_process

METHODS = ("ring", "bidirectional_ring", "token_ring", "all_gather", "ulysses")
LENGTHS = (1, 63, 127, 2000, 900)
HEAD_SIZES = (128, 20)
NUM_RANKS = 2


def rms_errors(comms: Communicators, method: str, causal: bool, head_size: int) -> list[tuple[float, float]]:
    """Per tensor (out, dq, dk, dv) the RMS error of this rank's rows: of the method, and of one-GPU bf16 attention."""
    rank, device = comms.global_rank, comms.device
    generator = torch.Generator(device).manual_seed(0)
    inputs = [
        torch.randn(sum(LENGTHS), heads, head_size, generator=generator, device=device).bfloat16()
        for heads in (8, 2, 2, 8)
    ]
    layout = SequenceLayout(LENGTHS, NUM_RANKS)
    rows = layout.token_indices(rank).to(device)

    def gradients(tensors: list[torch.Tensor], run: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        leaves = [tensor.requires_grad_() for tensor in tensors[:3]]
        out = run(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]

    truth = gradients(
        [tensor.double() for tensor in inputs], lambda q, k, v: reference_attention(q, k, v, LENGTHS, causal)
    )
    alone = gradients(
        [tensor.clone() for tensor in inputs],
        lambda q, k, v: parallel_attention(
            q, k, v, layout=SequenceLayout(LENGTHS, 1), group=None, causal=causal, kernel="aten"
        ),
    )
    found = gradients(
        [tensor[rows] for tensor in inputs],
        lambda q, k, v: parallel_attention(
            q, k, v, layout=layout, group=comms.group((0, 1)), method=method, causal=causal
        ),
    )
    return [
        (float((mine.double() - exact[rows]).pow(2).mean().sqrt()), float((one - exact)[rows].pow(2).mean().sqrt()))
        for mine, one, exact in zip(found, alone, truth, strict=True)
    ]


def serve(rank: int, port: int, device_type: str, results: Any) -> None:
    """Run every case on this rank's device and put (rank, errors by case) or (rank, traceback)."""
    try:
        device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)
        if device_type == "cuda":
            torch.cuda.set_device(device)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
        comms = init_process(store, global_rank=rank, world_size=NUM_RANKS, device=device, timeout_s=60.0)
        errors = {
            (method, causal, head_size): rms_errors(comms, method, causal, head_size)
            for method in METHODS
            for causal in (True, False)
            for head_size in HEAD_SIZES
        }
        comms.close()
        results.put((rank, errors))
    except Exception:  # whatever failed, the test reports it
        results.put((rank, traceback.format_exc()))
