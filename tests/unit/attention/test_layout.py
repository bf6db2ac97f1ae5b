"""SequenceLayout: every token once, ranks level, values that compare by value."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raysp.attention import SequenceLayout
from raysp.errors import InputError

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=8)
DEGREES = st.integers(1, 7)
ORDERS = st.sampled_from(["zigzag", "contiguous"])


@settings(max_examples=150, deadline=None)
@given(LENGTHS, DEGREES, ORDERS)
def test_every_token_lives_on_exactly_one_rank(lengths: list[int], degree: int, order: str) -> None:
    layout = SequenceLayout(lengths, degree, order)
    per_rank = [layout.token_indices(rank) for rank in range(degree)]
    assert sorted(torch.cat(per_rank).tolist()) == list(range(layout.num_tokens))
    assert [len(tokens) for tokens in per_rank] == [layout.local_tokens(rank) for rank in range(degree)]
    assert all(tokens.dtype == torch.int64 for tokens in per_rank)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, DEGREES, ORDERS)
def test_positions_count_from_the_start_of_each_document(lengths: list[int], degree: int, order: str) -> None:
    layout = SequenceLayout(lengths, degree, order)
    natural = torch.cat([torch.arange(length) for length in lengths])
    for rank in range(degree):
        assert torch.equal(layout.positions(rank), natural[layout.token_indices(rank)])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(14, 400), min_size=1, max_size=12), DEGREES, ORDERS)
def test_ranks_are_level_to_one_token_where_documents_can_be_cut(lengths: list[int], degree: int, order: str) -> None:
    layout = SequenceLayout(lengths, degree, order)
    counts = [layout.local_tokens(rank) for rank in range(degree)]
    assert max(counts) - min(counts) <= 1


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(2, 7))
def test_ranks_differ_by_less_than_one_uncut_document(lengths: list[int], degree: int) -> None:
    layout = SequenceLayout(lengths, degree)
    counts = [layout.local_tokens(rank) for rank in range(degree)]
    assert max(counts) - min(counts) < 2 * degree


def test_zigzag_gives_a_rank_its_first_chunk_and_its_mirrored_chunk() -> None:
    layout = SequenceLayout([16, 8], degree=2)
    assert layout.token_indices(0).tolist() == [0, 1, 2, 3, 16, 17, 12, 13, 14, 15, 22, 23]
    assert layout.token_indices(1).tolist() == [4, 5, 6, 7, 18, 19, 8, 9, 10, 11, 20, 21]
    assert layout.positions(1).tolist() == [4, 5, 6, 7, 2, 3, 8, 9, 10, 11, 4, 5]


def test_contiguous_cuts_the_joined_documents_into_runs() -> None:
    layout = SequenceLayout([5, 2, 4], degree=3, order="contiguous")
    assert [layout.token_indices(rank).tolist() for rank in range(3)] == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10]]


def test_documents_shorter_than_the_chunks_stay_whole_and_come_last() -> None:
    layout = SequenceLayout([7, 20, 3], degree=4)
    holders = [rank for rank in range(4) if 0 in layout.token_indices(rank).tolist()]
    assert len(holders) == 1
    assert layout.token_indices(holders[0]).tolist()[-7:] == list(range(7))


def test_degree_1_keeps_the_natural_order() -> None:
    layout = SequenceLayout([3, 40, 1], degree=1)
    assert layout.token_indices(0).tolist() == list(range(44))


def test_a_group_may_have_more_ranks_than_tokens() -> None:
    for order in ("zigzag", "contiguous"):
        layout = SequenceLayout([1], degree=4, order=order)
        assert sorted(layout.local_tokens(rank) for rank in range(4)) == [0, 0, 0, 1]
        empty = next(rank for rank in range(4) if layout.local_tokens(rank) == 0)
        assert layout.token_indices(empty).shape == (0,)


def test_layouts_are_values() -> None:
    layout = SequenceLayout([5, 9], 2)
    layout.token_indices(0)
    same = SequenceLayout((5, 9), degree=2)
    assert layout == same
    assert hash(layout) == hash(same)
    assert pickle.loads(pickle.dumps(layout)) == layout
    assert layout != SequenceLayout([5, 9], 2, order="contiguous")


def test_index_maps_are_built_once() -> None:
    layout = SequenceLayout([50, 9], 2)
    assert layout.token_indices(1) is layout.token_indices(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([5, 0], 2), "document 1 has 0 tokens"),
        (([], 2), "no documents"),
        (([5], 0), "degree is 0"),
        (([5], 2, "striped"), "'striped' is unknown"),
    ],
)
def test_bad_layouts_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SequenceLayout(*arguments)


def test_a_rank_outside_the_group_is_refused() -> None:
    with pytest.raises(InputError, match="group rank 2"):
        SequenceLayout([5], 2).token_indices(2)
