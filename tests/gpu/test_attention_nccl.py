"""Parallel attention over NCCL on two GPUs, bf16, against fp64 full attention.

Run with ``pytest tests/gpu``; skips where there are fewer than two GPUs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from nccl_ranks import METHODS, Case, all_cases, run_cases
from rank_pair import NUM_RANKS, answers_of

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < NUM_RANKS, reason="needs two GPUs with NCCL")


@pytest.fixture(scope="module")
def answers() -> list[Any]:
    """All cases, run once by two processes."""
    return answers_of(run_cases, timeout_s=500)


@pytest.mark.parametrize(
    "case", all_cases() if torch.cuda.is_available() else [Case(method) for method in METHODS], ids=str
)
def test_bf16_is_as_exact_as_one_gpu(answers: list[Any], case: Case) -> None:
    """dk and dv are sums, in fp32, of what kernel calls on both ranks rounded to bf16; one GPU rounds once less."""
    errors, _ = answers[0]
    limit = 1.2 if case.causal else 1.3
    for name, (found, alone) in zip(("out", "dq", "dk", "dv"), errors[case], strict=True):
        assert found <= (limit if name in ("out", "dq") else 1.3) * alone + 1e-6, (name, found / alone)


@pytest.mark.parametrize("method", METHODS)
def test_deterministic_calls_give_the_same_bits(answers: list[Any], method: str) -> None:
    for _, bits in answers:
        assert all(same for (_, name), same in bits.items() if name == method)
