"""Messages and measured links over NCCL on two GPUs.

Run with ``pytest tests/gpu``; skips where there are fewer than two GPUs.
"""

from __future__ import annotations

import multiprocessing
import queue
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from comm_nccl_ranks import NUM_RANKS, Answer, serve

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < NUM_RANKS, reason="needs two GPUs with NCCL")


def run_ranks(device_type: str) -> list[Answer]:
    """What every rank found, in rank order."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=serve, args=(rank, store.port, device_type, results)) for rank in range(NUM_RANKS)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=150) for _ in processes)
    except queue.Empty:
        pytest.fail("a rank gave no answer within 150 s")
    finally:
        for process in processes:
            process.kill()
            process.join()
    failures = [answer for answer in found.values() if isinstance(answer, str)]
    assert not failures, "\n".join(failures)
    return [found[rank] for rank in range(NUM_RANKS)]


@pytest.fixture(scope="module")
def answers() -> list[Answer]:
    """Everything, run once by two processes."""
    return run_ranks("cuda")


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
