"""What single ranks do in the NCCL attention tests; apart from them, so that spawned ranks can import it by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from rank_pair import NUM_RANKS

from raysp.attention import SequenceLayout, parallel_attention, reference_attention
from raysp.attention.kernels import fa4
from raysp.comm import Communicators

METHODS = ("ring", "bidirectional_ring", "token_ring", "all_gather", "ulysses")
LENGTHS = (1, 63, 127, 2000, 900)
KEY_LENGTHS = (300, 1, 90, 700, 2100)


@dataclass(frozen=True)
class Case:
    """One problem; without ``key_lengths`` queries and keys are the same tokens."""

    method: str
    kernel: str = "aten"
    causal: bool = True
    window: int | None = None
    key_lengths: tuple[int, ...] | None = None
    num_heads: int = 8
    num_key_heads: int = 2
    head_size: int = 128
    lengths: tuple[int, ...] = LENGTHS


def all_cases() -> list[Case]:
    """Every method with every kernel of this machine, each mask, and some head counts and sizes."""
    kernels = ["aten", *(["fa4"] if fa4.is_installed() else [])]
    cases = []
    for kernel in kernels:
        for method in METHODS:
            cases += [
                Case(method, kernel),
                Case(method, kernel, lengths=(4096,)),
                Case(method, kernel, causal=False),
                Case(method, kernel, window=150),
                Case(method, kernel, causal=False, key_lengths=KEY_LENGTHS),
                Case(method, kernel, num_heads=4, num_key_heads=4, head_size=64),
            ]
    # Every head size is a kernel of its own, which FlashAttention-4 compiles first.
    cases += [Case("ring", kernel, num_heads=6, num_key_heads=1, head_size=256) for kernel in kernels]
    cases += [Case(method, "aten", head_size=20) for method in METHODS]
    return cases


def rms_errors(comms: Communicators, case: Case) -> list[tuple[float, float]]:
    """Per tensor (out, dq, dk, dv) the RMS error of this rank's rows: of the method, and of one-GPU bf16 attention."""
    rank, device = comms.global_rank, comms.device
    generator = torch.Generator(device).manual_seed(0)
    key_lengths = case.key_lengths or case.lengths
    shapes = [
        (sum(case.lengths), case.num_heads),
        (sum(key_lengths), case.num_key_heads),
        (sum(key_lengths), case.num_key_heads),
        (sum(case.lengths), case.num_heads),
    ]
    inputs = [torch.randn(*shape, case.head_size, generator=generator, device=device).bfloat16() for shape in shapes]
    layout, kv_layout = SequenceLayout(case.lengths, NUM_RANKS), SequenceLayout(key_lengths, NUM_RANKS)
    rows, key_rows = (each.token_indices(rank).to(device) for each in (layout, kv_layout))
    mask = {"causal": case.causal, "window": case.window}

    def gradients(tensors: list[torch.Tensor], run: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        leaves = [tensor.requires_grad_() for tensor in tensors[:3]]
        out = run(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]

    def cross(degree: int) -> SequenceLayout | None:
        return None if case.key_lengths is None else SequenceLayout(key_lengths, degree)

    truth = gradients(
        [tensor.double() for tensor in inputs],
        lambda q, k, v: reference_attention(q, k, v, case.lengths, **mask, key_lengths=case.key_lengths),
    )
    alone = gradients(
        [tensor.clone() for tensor in inputs],
        lambda q, k, v: parallel_attention(
            q, k, v, layout=SequenceLayout(case.lengths, 1), group=None, kernel=case.kernel, kv_layout=cross(1), **mask
        ),
    )
    found = gradients(
        [inputs[0][rows], inputs[1][key_rows], inputs[2][key_rows], inputs[3][rows]],
        lambda q, k, v: parallel_attention(
            q, k, v, layout=layout, group=comms.communicator((0, 1)), method=case.method, kernel=case.kernel,
            kv_layout=cross(NUM_RANKS), **mask,
        ),
    )  # fmt: skip
    # Over all rows of all ranks: a rank with few rows says little.
    errors = torch.tensor(
        [
            [float((mine.double() - exact[index]).pow(2).sum()), float((one - exact)[index].pow(2).sum()), mine.numel()]
            for mine, one, exact, index in zip(found, alone, truth, (rows, rows, key_rows, key_rows), strict=True)
        ],
        device=device,
    )
    dist.all_reduce(errors)
    return [((a / n) ** 0.5, (b / n) ** 0.5) for a, b, n in errors.tolist()]


def same_bits(comms: Communicators, kernel: str, method: str) -> bool:
    """Whether two deterministic calls give the same bits, forward and backward."""
    device = comms.device
    layout = SequenceLayout(LENGTHS, NUM_RANKS)
    generator = torch.Generator(device).manual_seed(comms.global_rank)
    num_rows = layout.local_tokens(comms.global_rank)
    q, k, v, dout = (
        torch.randn(num_rows, heads, 128, generator=generator, device=device).bfloat16() for heads in (8, 2, 2, 8)
    )
    results = []
    for _ in range(2):
        leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        out = parallel_attention(
            *leaves, layout=layout, group=comms.communicator((0, 1)), method=method, kernel=kernel, deterministic=True
        )
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def run_cases(comms: Communicators) -> tuple[dict[Case, list[tuple[float, float]]], dict[tuple[str, str], bool]]:
    """Errors by case, and same bits by kernel and method."""
    errors = {case: rms_errors(comms, case) for case in all_cases()}
    kernels = {case.kernel for case in all_cases()}
    return errors, {
        (kernel, method): same_bits(comms, kernel, method) for kernel in sorted(kernels) for method in METHODS
    }
