"""Full attention in fp64, document by document, and how far each candidate is from it.

Written apart from raysp's own reference, so that the two cannot share a mistake.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.attention_cases import ONE_GPU, Case

TENSORS = ("out", "dq", "dk", "dv")


def attention_fp64(whole: Sequence[Tensor], lengths: Sequence[int]) -> tuple[Tensor, ...]:
    """Causal attention and its gradients: out, dq, dk, dv of all tokens, fp64.

    Args:
        whole: ``q [S, Hq, D]``, ``k``, ``v [S, Hk, D]`` and the gradient of the output.
        lengths: Tokens of every document.
    """
    q, k, v = (x.detach().double().requires_grad_() for x in whole[:3])
    copies = q.shape[1] // k.shape[1]
    outs, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        keys, values = (x[rows].repeat_interleave(copies, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[rows], keys) * q.shape[2] ** -0.5
        hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, values))
        start += length
    out = torch.cat(outs)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), whole[3].double())


def errors_against_fp64(case: Case, ready: Sequence[Any], whole: Sequence[Tensor]) -> list[tuple[Any, dict[str, Any]]]:
    """Relative RMS errors over all ranks, and their ratio to those of one GPU on the same kernel.

    Args:
        case: The shape.
        ready: Prepared candidates, the one-GPU rows among them.
        whole: q, k, v and the gradient of the output, of all tokens.

    Returns:
        Each candidate with ``rms_error`` by tensor and ``rms_ratio``, the largest ratio of the four.
    """
    truth = attention_fp64(whole, case.lengths)
    errors = {prepared.label: _relative_errors(prepared, truth) for prepared in ready}
    alone = {
        prepared.candidate.kernel: errors[prepared.label] for prepared in ready if prepared.candidate.name == ONE_GPU
    }
    rows = []
    for prepared in ready:
        error = errors[prepared.label]
        # A method with a kernel of its own is compared with the first kernel.
        base = alone.get(prepared.candidate.kernel) or next(iter(alone.values()), None)
        row: dict[str, Any] = {"rms_error": error}
        if base is not None:
            row["rms_ratio"] = max(error[name] / base[name] for name in TENSORS)
        rows.append((prepared, row))
    return rows


def _relative_errors(prepared: Any, truth: Sequence[Tensor]) -> dict[str, float]:
    with prepared.candidate.region():
        found = prepared.both()
    tokens = prepared.candidate.tokens.to(truth[0].device)
    sums = []
    for name, tensor, exact in zip(TENSORS, found, truth, strict=True):
        rows = exact[tokens]
        if tensor.shape != rows.shape:
            raise RuntimeError(f"{prepared.label}: {name} has shape {list(tensor.shape)}; expected {list(rows.shape)}.")
        sums += [(tensor.double() - rows).square().sum(), rows.square().sum()]
    totals = torch.stack(sums).cpu()
    dist.all_reduce(totals)
    return {name: float((totals[2 * i] / totals[2 * i + 1]).sqrt()) for i, name in enumerate(TENSORS)}
