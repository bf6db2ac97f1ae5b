"""The schedule: blocks cover the mask exactly once, travel plans carry exactly what is needed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysp.attention import SequenceLayout
from raysp.attention.itinerary import Itinerary, least_itinerary
from raysp.attention.schedule import NO_ROWS, Block, Rows, Segments, needed_rows, pair_blocks

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def mask_of(layout: SequenceLayout, causal: bool) -> torch.Tensor:
    documents = torch.cat([torch.full((length,), index) for index, length in enumerate(layout.lengths)])
    mask = documents[:, None] == documents[None, :]
    return mask.tril() if causal else mask


def count_block(counts: torch.Tensor, block: Block, q_tokens: torch.Tensor, k_tokens: torch.Tensor) -> None:
    queries, keys = q_tokens[block.queries.index], k_tokens[block.keys.index]
    for rows, columns in block.segments.pieces():
        seen = torch.ones(len(queries[rows]), len(keys[columns]), dtype=torch.int64)
        counts[queries[rows][:, None], keys[columns][None, :]] += seen.tril() if block.causal else seen


@settings(max_examples=120, deadline=None)
@given(LENGTHS, st.integers(1, 6), st.sampled_from(["zigzag", "contiguous"]), st.booleans())
def test_blocks_of_all_pairs_cover_the_mask_exactly_once(
    lengths: list[int], degree: int, order: str, causal: bool
) -> None:
    layout = SequenceLayout(lengths, degree, order)
    counts = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.int64)
    for query_rank in range(degree):
        for key_rank in range(degree):
            for block in pair_blocks(layout, query_rank, key_rank, causal=causal):
                tokens = layout.token_indices(query_rank), layout.token_indices(key_rank)
                count_block(counts, block, *tokens)
                assert not block.causal or block.segments.cu_q == block.segments.cu_k
    assert torch.equal(counts, mask_of(layout, causal).long())


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(2, 5), st.booleans())
def test_key_parts_split_the_blocks_without_overlap(lengths: list[int], degree: int, causal: bool) -> None:
    layout = SequenceLayout(lengths, degree)
    for query_rank in range(degree):
        for key_rank in range(degree):
            whole, split = (torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.int64) for _ in range(2))
            tokens = layout.token_indices(query_rank), layout.token_indices(key_rank)
            for block in pair_blocks(layout, query_rank, key_rank, causal=causal):
                count_block(whole, block, *tokens)
            for part in range(3):
                for block in pair_blocks(layout, query_rank, key_rank, causal=causal, key_part=part):
                    count_block(split, block, *tokens)
            assert torch.equal(whole, split)


@pytest.mark.parametrize("causal", [True, False])
def test_one_document_is_one_block_per_hop(causal: bool) -> None:
    layout = SequenceLayout([64], degree=4)
    for query_rank in range(4):
        for key_rank in range(4):
            assert len(pair_blocks(layout, query_rank, key_rank, causal=causal)) == 1


def test_contiguous_causal_hops_from_later_ranks_carry_nothing() -> None:
    layout = SequenceLayout([64], degree=4, order="contiguous")
    assert pair_blocks(layout, 1, 2, causal=True) == ()
    assert needed_rows((), side="keys") == NO_ROWS


def test_documents_on_one_rank_never_travel() -> None:
    layout = SequenceLayout([5, 3, 6, 4], degree=4)
    for side in ("keys", "queries"):
        assert least_itinerary(layout, side=side, causal=False, with_return=True).rows_moved(with_return=True) == 0


@settings(max_examples=80, deadline=None)
@given(
    LENGTHS,
    st.integers(2, 6),
    st.sampled_from([1, -1]),
    st.sampled_from(["keys", "queries"]),
    st.sampled_from(["zigzag", "contiguous"]),
    st.booleans(),
)
def test_travelling_rows_hold_what_every_later_visitor_needs(
    lengths: list[int], degree: int, direction: int, side: str, order: str, causal: bool
) -> None:
    route = Itinerary(SequenceLayout(lengths, degree, order), direction, side, causal)
    for owner in range(degree):
        for hop in range(1, degree):
            assert route.owner(route.visitor(owner, hop), hop) == owner
            for later in range(hop, degree):
                _assert_inside(route.touched(owner, later), route.outbound(owner, hop))
            for earlier in range(1, hop + 1):
                _assert_inside(route.touched(owner, earlier), route.collected(owner, hop))


def _assert_inside(inner: Rows, outer: Rows) -> None:
    assert not len(inner) or (outer.start <= inner.start and inner.stop <= outer.stop)


@pytest.mark.parametrize("degree", [2, 4, 8])
@pytest.mark.parametrize("side", ["keys", "queries"])
def test_causal_zigzag_moves_three_quarters(degree: int, side: str) -> None:
    layout = SequenceLayout([64 * degree], degree)
    full = (degree - 1) * layout.num_tokens
    assert (
        least_itinerary(layout, side=side, causal=True, with_return=False).rows_moved(with_return=False) == 0.75 * full
    )
    assert least_itinerary(layout, side=side, causal=False, with_return=False).rows_moved(with_return=False) == full


def test_backward_trims_the_wider_sums_rather_than_the_keys() -> None:
    layout = SequenceLayout([64], degree=4)
    assert least_itinerary(layout, side="keys", causal=True, with_return=False).direction == -1
    assert least_itinerary(layout, side="keys", causal=True, with_return=True).direction == 1


def test_segment_bounds_are_kept_on_a_device() -> None:
    segments = Segments((0, 3, 5), (0, 1, 7))
    assert segments.on(torch.device("cpu")) is segments.on(torch.device("cpu"))
    assert segments.on(torch.device("cpu"))[1].tolist() == [0, 1, 7]
    assert (segments.max_q, segments.max_k) == (3, 6)
