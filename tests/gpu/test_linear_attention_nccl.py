"""Linear attention over NCCL on two GPUs against the recurrence in fp64.

Run with ``pytest tests/gpu``; skips where there are fewer than two GPUs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from linear_nccl_ranks import LinearCase, all_cases, run_cases
from rank_pair import NUM_RANKS, answers_of

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < NUM_RANKS, reason="needs two GPUs with NCCL")

# Rows of bf16 are rounded on their way in and out; sums are kept in fp32.
LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}


@pytest.fixture(scope="module")
def answers() -> list[dict[LinearCase, dict[str, float]]]:
    """All cases, run once by two processes."""
    return answers_of(run_cases, timeout_s=300)


@pytest.mark.parametrize("case", all_cases(), ids=str)
def test_methods_equal_the_recurrence(answers: list[dict[LinearCase, dict[str, float]]], case: LinearCase) -> None:
    for rank, errors in enumerate(answers):
        assert max(errors[case].values()) < LIMITS[case.dtype], (rank, errors[case])
