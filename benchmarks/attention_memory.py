"""Memory of raysp's methods: a formula for the peak of one forward and backward, and a check that steps leave nothing.

The formula counts buffers that live at once at the worst point of the backward, beyond q, k, v and the gradient of the
output: the output, sums, block results, buffers, and the kernel's own workspace. Buffers (keys or queries on the way,
results on their way home, keys in the order of a call) stay from call to call, so all of both passes count at once; see
`buffer_formula`. Row statistics (LSE, delta) are counted with the kernel.

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
    buffers = buffer_formula(case, method, degree, item_bytes)
    if buffers is None:
        return None
    picked = _picked_share(case, method, degree)
    if method == "all_gather":
        # out and dq, with packed documents dq of a block; gradients of the keys in the order of the call.
        held = (3 if len(case.lengths) > 1 else 2) * q + picked * kv
    elif method == "ulysses":
        # out as tokens, and as heads: q, out, its gradient and dq; k and v and their gradients.
        held = 5 * q + 2 * kv
    else:
        # out, dq, dq of a block; dk and dv at home and of a block.
        held = (2 + wide) * q + (1 + wide + picked) * kv
    kernel_kv = picked * kv if method == "all_gather" else kv
    return round(held + buffers + _workspace_bytes(case, candidate.kernel, q, kernel_kv, item_bytes))


def buffer_formula(case: Case, method: str, degree: int, item_bytes: int) -> float | None:
    """Predicted bytes of the buffers that a forward and backward leave for the next; None for a method without a formula.

    Rows are counted as if a rank's needed all of another's, which is so for the rank that needs most.
    """
    row_bytes = case.tokens_per_rank * case.head_size * item_bytes
    q, kv = case.num_heads * row_bytes, 2 * case.num_key_heads * row_bytes
    picked = _picked_share(case, method, degree) * kv
    wide = 4 / item_bytes
    if method in ("ring", "bidirectional_ring"):
        # Keys that arrive, on a longer ring beside those that leave. Sums that arrive and, from four ranks on, those of
        # this hop and of the one before.
        is_single = degree == 2 and len(case.lengths) == 1
        sums = (1 if is_single else wide) + (0 if degree == 2 else wide if degree == 3 else 2 * wide)
        # Half of the heads are copied before they leave.
        kept = kv if method == "bidirectional_ring" else 0
        return (1 if degree == 2 else 2) * kv + sums * kv + picked + kept
    if method == "token_ring":
        # q and its output gradient, arriving and on a longer ring leaving; a result that comes home.
        return (3 if degree == 2 else 5) * q + picked
    if method == "all_gather":
        # The others' keys, all in the order of the call, and gradients that come home.
        return (degree - 1) * (1 + wide) * kv + picked
    if method == "ulysses":
        # q, k and v by rank, leaving and arriving.
        return 2 * (q + max(1, degree / case.num_key_heads) * kv)
    return None


def _picked_share(case: Case, method: str, degree: int) -> float:
    """Keys that are copied into the order of a call, as a multiple of a rank's keys; those of first chunks twice."""
    if method == "all_gather":
        return degree + 0.5
    return 1.5 if len(case.lengths) > 1 and method != "ulysses" else 0


def steps_without_growth(prepared: Any, num_steps: int, device: torch.device) -> dict[str, Any]:
    """Run forward and backward many times.

    Returns:
        ``growth_bytes`` between the first steps and the last one, the ``peak_bytes`` over all, and the formula's.
    """
    held: list[int] = []
    is_cuda = device.type == "cuda"
    prepared.forget_buffers()
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
