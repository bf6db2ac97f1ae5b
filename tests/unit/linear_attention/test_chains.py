"""Who shares documents with whom, and who sends states to whom."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysp.attention import SequenceLayout
from raysp.errors import InputError
from raysp.linear_attention.chains import Links, backward_links, chain_of, forward_links, local_pieces

layouts = st.builds(
    lambda lengths, degree: SequenceLayout(lengths, degree, "contiguous"),
    st.lists(st.integers(1, 30), min_size=1, max_size=12),
    st.integers(1, 9),
)


def test_one_document_over_four_ranks_is_one_chain() -> None:
    layout = SequenceLayout([8], 4, "contiguous")
    assert chain_of(layout, 0) == (0, 1, 2, 3)
    assert forward_links(layout, 0) == Links((), (1, 2, 3), False)
    assert forward_links(layout, 2) == Links((0, 1), (3,), True)
    assert backward_links(layout, 2) == Links((3,), (1, 0), True)
    assert backward_links(layout, 3) == Links((), (2, 1, 0), False)


def test_rank_between_two_documents_takes_one_and_gives_the_other() -> None:
    layout = SequenceLayout([3, 3], 3, "contiguous")  # 0 0 | 0 1 | 1 1
    assert forward_links(layout, 1) == Links((0,), (2,), False)
    assert backward_links(layout, 1) == Links((2,), (0,), False)


def test_documents_that_end_at_borders_link_nobody() -> None:
    layout = SequenceLayout([2, 2, 2], 3, "contiguous")
    assert all(forward_links(layout, rank) == Links((), (), False) for rank in range(3))


def test_ranks_without_tokens_are_in_no_chain() -> None:
    layout = SequenceLayout([2], 5, "contiguous")
    holders = [rank for rank in range(5) if layout.local_tokens(rank)]
    assert chain_of(layout, 0) == tuple(holders)
    for rank in set(range(5)) - set(holders):
        assert local_pieces(layout, rank).lengths == ()
        assert forward_links(layout, rank) == Links((), (), False)


@given(layouts)
def test_every_source_has_the_taker_among_its_targets(layout: SequenceLayout) -> None:
    for links in (forward_links, backward_links):
        sent = {(rank, target) for rank in range(layout.degree) for target in links(layout, rank).targets}
        taken = {(source, rank) for rank in range(layout.degree) for source in links(layout, rank).sources}
        assert sent == taken


@given(layouts)
def test_all_sources_but_the_first_only_pass_states_through(layout: SequenceLayout) -> None:
    for links, rank in itertools.product((forward_links, backward_links), range(layout.degree)):
        sources = links(layout, rank).sources
        passing = [links(layout, source).passes_through for source in sources]
        assert passing == [False] * len(sources[:1]) + [True] * len(sources[1:])


def test_zigzag_is_refused() -> None:
    with pytest.raises(InputError, match="expected 'contiguous'"):
        local_pieces(SequenceLayout([10], 2), 0)
