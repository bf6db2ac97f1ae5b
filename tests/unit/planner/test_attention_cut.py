"""The zigzag cut: all tokens, ranks level in tokens and in work, and as few cut documents as that allows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import load_distribution
from planner.attention_cut import ZigzagCut, zigzag_cut

LENGTHS = st.lists(st.one_of(st.integers(1, 40), st.integers(100, 3000)), min_size=1, max_size=20)


def work_of_ranks(cut: ZigzagCut) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of each rank: causal ones, and all."""
    stops = np.cumsum(cut.chunk_rows, axis=1)
    starts = stops - cut.chunk_rows
    by_chunk = ((stops * (stops + 1) - starts * (starts + 1)) // 2).sum(axis=0)
    first, second = np.split(by_chunk, 2)
    whole = cut.whole_rows
    causal = first + second[::-1] + (whole * (whole + 1) // 2).sum(axis=1)
    return causal, (cut.rows * cut.lengths).sum(axis=1)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(2, 9))
def test_every_token_is_on_a_rank_and_ranks_are_level(lengths: list[int], degree: int) -> None:
    cut = zigzag_cut(lengths, degree)
    assert cut.rows.sum(axis=0).tolist() == lengths
    assert (cut.chunk_rows[cut.is_cut] >= 1).all()
    assert not cut.chunk_rows[~cut.is_cut].any()
    if (cut.lengths >= 2 * degree).all():
        rows = cut.rows.sum(axis=1)
        assert rows.max() - rows.min() <= 1
    if (cut.lengths[~cut.is_cut] >= 2 * degree).any():
        causal, full = work_of_ranks(cut)
        assert causal.max() <= 1.02 * causal.mean()
        assert full.max() <= 1.05 * full.mean()
    else:
        # Equal chunks.
        assert (np.ptp(cut.chunk_rows[cut.is_cut], axis=1) <= 1).all()


def test_long_documents_make_up_for_what_short_ones_leave_uneven() -> None:
    cut = zigzag_cut([300, 20000, 280, 310, 500, 305, 295], 2)
    assert cut.is_cut.tolist() == [False, True, False, False, False, False, False]
    assert cut.rows.sum(axis=1).tolist() == [10995, 10995]
    causal, _ = work_of_ranks(cut)
    assert causal.max() / causal.mean() == pytest.approx(1.0, abs=1e-3)


def test_one_document_is_cut_into_equal_chunks() -> None:
    assert zigzag_cut([64], 4).chunk_rows.tolist() == [[8] * 8]
    assert (np.ptp(zigzag_cut([1003], 4).chunk_rows, axis=1) <= 1).all()


@pytest.mark.parametrize("degree", [2, 4, 8])
@pytest.mark.parametrize("mix", ["wlbllm-128k", "prolong"])
def test_of_real_lengths_few_are_cut(mix: str, degree: int) -> None:
    lengths = load_distribution(mix).sample(20 * degree, seed=0, max_length=8192 * degree).tolist()
    cut = zigzag_cut(lengths, degree)
    assert cut.is_cut.sum() < 0.25 * len(lengths)
    causal, _ = work_of_ranks(cut)
    assert causal.max() < 1.001 * causal.mean()


def test_groups_of_neighbours_hold_what_their_ranks_held() -> None:
    cut = zigzag_cut([5000, 120, 90, 700, 60, 45, 2], 8)
    joined = cut.coarsened(4)
    assert joined.rows.tolist() == cut.rows.reshape(2, 4, -1).sum(axis=1).tolist()
    assert joined.whole_rank.tolist() == [rank // 4 if rank >= 0 else -1 for rank in cut.whole_rank.tolist()]
