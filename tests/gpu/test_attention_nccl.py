"""Parallel attention over NCCL on two GPUs, bf16, against fp64 full attention.

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

from nccl_ranks import HEAD_SIZES, METHODS, NUM_RANKS, serve

Errors = dict[tuple[str, bool, int], list[tuple[float, float]]]

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < NUM_RANKS, reason="needs two GPUs with NCCL")


@pytest.fixture(scope="module")
def errors_by_rank() -> dict[int, Errors]:
    """All cases, run once by two processes."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=serve, args=(rank, store.port, "cuda", results)) for rank in range(NUM_RANKS)]
    for process in processes:
        process.start()
    try:
        answers = dict(results.get(timeout=180) for _ in processes)
    except queue.Empty:
        pytest.fail("a rank gave no answer within 180 s")
    finally:
        for process in processes:
            process.kill()
            process.join()
    failures = [answer for answer in answers.values() if isinstance(answer, str)]
    assert not failures, "\n".join(failures)
    return answers


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_bf16_is_as_exact_as_one_gpu(
    errors_by_rank: dict[int, Errors], method: str, causal: bool, head_size: int
) -> None:
    for errors in errors_by_rank.values():
        for name, (found, alone) in zip(("out", "dq", "dk", "dv"), errors[method, causal, head_size], strict=True):
            assert found < 1.5 * alone + 1e-6, (name, found, alone)
