"""Memory of raysp's methods: a formula for the peak of one forward and backward, and a check that steps leave nothing.

The formula counts buffers that live at once at the worst point of the backward, beyond q, k, v and the gradient of the
output: the output, sums, block results, keys or queries on the way, and the kernel's own workspace. Row statistics (LSE,
delta) are counted with the kernel.

Symbols: q, kv bytes of this rank's queries, and of its keys and values together, in the input dtype; N degree.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.attention_candidates import Candidate
from benchmarks.attention_cases import Case

_WARM_UP_STEPS = 20


def peak_formula(case: Case, candidate: Candidate, degree: int, item_bytes: int) -> int | None:
    """Predicted peak in bytes of one rank; None for a method without a formula."""
    row_bytes = case.tokens_per_rank * case.head_size * item_bytes
    q, kv = case.num_heads * row_bytes, 2 * case.num_key_heads * row_bytes
    # Sums of more than two terms are kept in fp32.
    wide = 1 if degree == 2 else 4 / item_bytes
    method = candidate.name.partition(" ")[2]
    if method in ("ring", "bidirectional_ring"):
        # out, dq, dq of a block; dk and dv at home and of a block, keys here, and on a longer ring the keys that
        # arrive and the sums that leave and arrive.
        held = (2 + wide) * q + (2 + wide + (0 if degree == 2 else 1 + 2 * wide)) * kv
    elif method == "token_ring":
        # out, dq, dq of a block, q and dout here and, on a longer ring, arriving, a dq that comes home.
        held = (5 + wide + (0 if degree == 2 else 2)) * q + (1 + wide) * kv
    elif method == "all_gather":
        # out and dq; the others' keys, all keys in the order of the call (those of first chunks twice), their gradients.
        picked = degree + 0.5
        held = 2 * q + (degree - 1 + 2 * picked) * kv
        return round(held + _workspace_bytes(case, candidate.kernel, q, picked * kv, item_bytes))
    elif method == "ulysses":
        # out and its gradient twice, as tokens and as heads, q and dq as heads and two messages; k, v and gradients.
        held = 6 * q + 3 * kv
    else:
        return None
    return round(held + _workspace_bytes(case, candidate.kernel, q, kv, item_bytes))


def steps_without_growth(prepared: Any, num_steps: int, device: torch.device) -> dict[str, Any]:
    """Run forward and backward many times.

    Returns:
        ``growth_bytes`` between the first steps and the last one, the ``peak_bytes`` over all, and the formula's.
    """
    held: list[int] = []
    is_cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated() if is_cuda else 0
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    with prepared.candidate.region():
        for _ in range(num_steps):
            prepared.both()
            held.append(torch.cuda.memory_allocated() if is_cuda else 0)
        if is_cuda:
            torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before if is_cuda else 0
    first = held[min(_WARM_UP_STEPS, num_steps) - 1]
    growth, peak = prepared.agreed([held[-1] - first, peak])
    return {
        "num_steps": num_steps, "growth_bytes": int(growth), "peak_bytes": int(peak),
        "formula_bytes": prepared.formula_bytes(),
    }  # fmt: skip


def _workspace_bytes(case: Case, kernel: str, q: int, kv: int, item_bytes: int) -> float:
    """What the kernel's backward allocates beside its results."""
    grouped = case.num_heads != case.num_key_heads
    statistics = 3 * 4 * case.num_heads * case.tokens_per_rank
    wide = 4 / item_bytes
    if kernel == "fa4":
        # dq is summed in fp32; so are dk and dv where several query heads share a key head.
        return wide * q + (wide * kv if grouped else 0) + statistics
    # FlashAttention-2: dq in fp32; dk and dv of every query head before they are summed.
    return wide * q + (2 * q if grouped else 0) + statistics
