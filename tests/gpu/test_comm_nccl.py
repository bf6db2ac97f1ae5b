"""Messages and measured links over NCCL on two GPUs.

Run with ``pytest tests/gpu``; skips where there are fewer than two GPUs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from comm_nccl_ranks import Answer, run_all
from rank_pair import NUM_RANKS, answers_of

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < NUM_RANKS, reason="needs two GPUs with NCCL")


@pytest.fixture(scope="module")
def answers() -> list[Answer]:
    """Everything, run once by two processes."""
    return answers_of(run_all, timeout_s=150)


def test_a_rank_without_messages_is_not_waited_for(answers: list[Answer]) -> None:
    assert [answer.one_way for answer in answers] == [[0.0, 0.0], [5.0, 5.0]]


def test_exchange_follows_its_stream_and_precedes_what_comes_after_the_wait(answers: list[Answer]) -> None:
    assert all(answer.in_order for answer in answers)


def test_link_is_measured_alike_on_both_ranks_quickly_and_uncounted(answers: list[Answer]) -> None:
    first, second = answers
    assert (first.link, first.pairs) == (second.link, second.pairs)
    assert first.link.bandwidth_bytes_per_s > 1e8
    assert 1e-6 < first.link.latency_s < 1e-2
    assert first.counted_bytes == second.counted_bytes == 0
    assert max(first.again_s, second.again_s) < 0.3, answers
    # The first one also makes connections, which an exchange of the run would otherwise.
    assert max(first.first_s, second.first_s) < 3.0, answers
