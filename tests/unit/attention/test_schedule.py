"""The schedule: blocks cover the mask exactly once, travel plans carry exactly what is needed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import AttentionWork
from planner.attention_shards import Shards
from raysp.attention import SequenceLayout
from raysp.attention.blocks import NO_ROWS, Block, Rows, Segments
from raysp.attention.itinerary import Itinerary, least_itinerary
from raysp.attention.kernels.eager import visible_keys
from raysp.attention.mask import DocumentMask
from raysp.attention.schedule import Schedule, schedule_of

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=6)
ORDERS = st.sampled_from(["zigzag", "contiguous"])
MASKS = st.one_of(
    st.sampled_from([DocumentMask(True), DocumentMask(False)]),
    st.integers(1, 45).map(lambda window: DocumentMask(True, window)),
)
CPU = torch.device("cpu")


def documents_of(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def mask_of(schedule: Schedule) -> torch.Tensor:
    queries, keys = documents_of(schedule.layout.lengths), documents_of(schedule.key_layout.lengths)
    seen = queries[:, None] == keys[None, :]
    if schedule.mask.causal:
        seen = seen.tril()
    return seen if schedule.mask.window is None else seen.triu(1 - schedule.mask.window)


def count_block(counts: torch.Tensor, block: Block, q_tokens: torch.Tensor, k_tokens: torch.Tensor) -> None:
    queries, keys = q_tokens[block.queries.index], k_tokens[block.keys.index]
    if block.pick is not None:
        keys = keys[block.pick.on(CPU)]
    assert len(queries) == block.segments.cu_q[-1]
    assert len(keys) == block.segments.cu_k[-1]
    for rows, columns in block.segments.pieces():
        seen = visible_keys(len(queries[rows]), len(keys[columns]), block.mask, CPU)
        assert seen.any(dim=1).all()
        counts[queries[rows][:, None], keys[columns][None, :]] += seen.long()


def counts_of(schedule: Schedule) -> torch.Tensor:
    return torch.zeros(schedule.layout.num_tokens, schedule.key_layout.num_tokens, dtype=torch.int64)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 6), ORDERS, MASKS, st.sampled_from([1, 2, 3]))
def test_blocks_of_all_pairs_cover_the_mask_exactly_once(
    lengths: list[int], degree: int, order: str, mask: DocumentMask, merged: int
) -> None:
    layout = SequenceLayout(lengths, degree * merged, order).coarsened(merged)
    schedule = schedule_of(layout, mask)
    counts = counts_of(schedule)
    for query_rank in range(degree):
        for key_rank in range(degree):
            for block in schedule.pair(query_rank, key_rank):
                count_block(counts, block, layout.token_indices(query_rank), layout.token_indices(key_rank))
    assert torch.equal(counts, mask_of(schedule).long())


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 6), ORDERS, MASKS)
def test_gathered_rows_cover_the_mask_exactly_once(
    lengths: list[int], degree: int, order: str, mask: DocumentMask
) -> None:
    layout = SequenceLayout(lengths, degree, order)
    schedule = schedule_of(layout, mask)
    counts = counts_of(schedule)
    for rank in range(degree):
        gathered = schedule.gathered(rank)
        buffer = torch.full((gathered.offsets[-1],), -1, dtype=torch.int64)
        for owner, rows in enumerate(gathered.from_rank):
            start = gathered.offsets[owner]
            buffer[start : start + len(rows)] = layout.token_indices(owner)[rows.index]
        assert len(gathered.blocks) <= 1
        for block in gathered.blocks:
            count_block(counts, block, layout.token_indices(rank), buffer)
        for block in gathered.apart:
            assert block.queries == Rows(len(gathered.from_rank[rank]), layout.local_tokens(rank))
            count_block(counts, block, layout.token_indices(rank), layout.token_indices(rank))
        assert gathered.cover(layout.local_tokens(rank))
    assert torch.equal(counts, mask_of(schedule).long())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=5), st.integers(1, 5), ORDERS)
def test_cross_attention_covers_every_pair_of_a_document(
    lengths: list[tuple[int, int]], degree: int, order: str
) -> None:
    layouts = [SequenceLayout([pair[side] for pair in lengths], degree, order) for side in (0, 1)]
    schedule = schedule_of(layouts[0], DocumentMask(False), layouts[1])
    counts = counts_of(schedule)
    for query_rank in range(degree):
        for key_rank in range(degree):
            for block in schedule.pair(query_rank, key_rank):
                count_block(counts, block, layouts[0].token_indices(query_rank), layouts[1].token_indices(key_rank))
    assert torch.equal(counts, mask_of(schedule).long())


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(2, 5), ORDERS, MASKS)
def test_rows_used_are_those_of_the_blocks(lengths: list[int], degree: int, order: str, mask: DocumentMask) -> None:
    schedule = schedule_of(SequenceLayout(lengths, degree, order), mask)
    for query_rank in range(degree):
        for key_rank in range(degree):
            for side in ("queries", "keys"):
                rows = NO_ROWS
                for block in schedule.pair(query_rank, key_rank):
                    rows = rows.hull(block.queries if side == "queries" else block.keys)
                assert schedule.rows_used(query_rank, key_rank, side=side) == rows


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(2, 5), MASKS)
def test_key_parts_split_the_blocks_without_overlap(lengths: list[int], degree: int, mask: DocumentMask) -> None:
    layout = SequenceLayout(lengths, degree)
    schedule = schedule_of(layout, mask)
    whole, split = counts_of(schedule), counts_of(schedule)
    for query_rank in range(degree):
        for key_rank in range(degree):
            tokens = layout.token_indices(query_rank), layout.token_indices(key_rank)
            for block in schedule.pair(query_rank, key_rank):
                count_block(whole, block, *tokens)
            for part in range(3):
                for block in schedule.pair(query_rank, key_rank, part):
                    count_block(split, block, *tokens)
    assert torch.equal(whole, split)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[64], [64, 3, 900, 17, 200]])
def test_a_hop_is_one_kernel_call(causal: bool, lengths: list[int]) -> None:
    schedule = schedule_of(SequenceLayout(lengths, degree=4), DocumentMask(causal))
    for query_rank in range(4):
        for key_rank in range(4):
            assert len(schedule.pair(query_rank, key_rank)) == 1


def test_one_document_is_read_where_it_lies() -> None:
    for causal in (True, False):
        schedule = schedule_of(SequenceLayout([64], degree=4), DocumentMask(causal))
        for query_rank in range(4):
            for key_rank in range(4):
                (block,) = schedule.pair(query_rank, key_rank)
                assert block.pick is None
                assert len(block.segments.cu_q) == 2


@settings(max_examples=80, deadline=None)
@given(LENGTHS, st.integers(2, 5), ORDERS, MASKS)
def test_a_pick_names_a_row_at_most_twice_and_once_on_each_side(
    lengths: list[int], degree: int, order: str, mask: DocumentMask
) -> None:
    schedule = schedule_of(SequenceLayout(lengths, degree, order), mask)
    blocks = [block for q in range(degree) for k in range(degree) for block in schedule.pair(q, k)]
    blocks += [block for rank in range(degree) for block in schedule.gathered(rank).blocks]
    for pick in (block.pick for block in blocks if block.pick is not None):
        for side in (pick.index[: pick.cut], pick.index[pick.cut :]):
            assert len(set(side.tolist())) == len(side)


def test_hops_outside_the_window_carry_nothing() -> None:
    schedule = schedule_of(SequenceLayout([1600], degree=8), DocumentMask(True, window=100))
    full = schedule_of(SequenceLayout([1600], degree=8), DocumentMask(True))
    assert schedule.pair(0, 3) == ()
    routes = [least_itinerary(schedule, side="keys", with_return=False, key_part=part) for part in (0, 1)]
    assert [route.direction for route in routes] == [1, -1]
    # 99 keys before each chunk but the document's first, which is nobody's neighbour; the middle two share a rank.
    assert sum(route.rows_moved(with_return=False) for route in routes) == 14 * 99
    everything = least_itinerary(full, side="keys", with_return=False)
    assert everything.rows_moved(with_return=False) == 0.75 * 7 * 1600


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 4), st.integers(1, 4), ORDERS)
def test_a_coarsened_layout_holds_what_its_ranks_held(lengths: list[int], degree: int, factor: int, order: str) -> None:
    layout = SequenceLayout(lengths, degree * factor, order)
    coarse = layout.coarsened(factor)
    assert coarse.degree == degree
    for rank in range(degree):
        tokens = torch.cat([layout.token_indices(rank * factor + place) for place in range(factor)])
        assert sorted(coarse.token_indices(rank).tolist()) == sorted(tokens.tolist())


def test_contiguous_causal_hops_from_later_ranks_carry_nothing() -> None:
    schedule = schedule_of(SequenceLayout([64], degree=4, order="contiguous"), DocumentMask(True))
    assert schedule.pair(1, 2) == ()
    assert schedule.rows_used(1, 2, side="keys") == NO_ROWS


def test_documents_on_one_rank_never_travel() -> None:
    schedule = schedule_of(SequenceLayout([5, 3, 6, 4], degree=4), DocumentMask(False))
    for side in ("keys", "queries"):
        assert least_itinerary(schedule, side=side, with_return=True).rows_moved(with_return=True) == 0


@settings(max_examples=80, deadline=None)
@given(
    LENGTHS,
    st.integers(2, 6),
    st.sampled_from([1, -1]),
    st.sampled_from(["keys", "queries"]),
    ORDERS,
    MASKS,
)
def test_travelling_rows_hold_what_every_later_visitor_needs(
    lengths: list[int], degree: int, direction: int, side: str, order: str, mask: DocumentMask
) -> None:
    route = Itinerary(schedule_of(SequenceLayout(lengths, degree, order), mask), direction, side)
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
    for causal, share in ((True, 0.75), (False, 1.0)):
        route = least_itinerary(schedule_of(layout, DocumentMask(causal)), side=side, with_return=False)
        assert route.rows_moved(with_return=False) == share * full


def test_backward_trims_the_wider_sums_rather_than_the_keys() -> None:
    schedule = schedule_of(SequenceLayout([64], degree=4), DocumentMask(True))
    assert least_itinerary(schedule, side="keys", with_return=False).direction == -1
    assert least_itinerary(schedule, side="keys", with_return=True).direction == 1


def test_segment_bounds_are_kept_on_a_device() -> None:
    segments = Segments((0, 3, 5), (0, 1, 7))
    assert segments.on(torch.device("cpu")) is segments.on(torch.device("cpu"))
    assert segments.on(torch.device("cpu"))[1].tolist() == [0, 1, 7]
    assert (segments.max_q, segments.max_k) == (3, 6)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.one_of(st.integers(1, 30), st.integers(60, 150)), min_size=1, max_size=9),
    st.integers(2, 5),
    st.none() | st.integers(1, 90),
    st.sampled_from([1, 2]),
)
def test_the_planner_counts_the_work_and_the_rows_of_the_schedule(
    lengths: list[int], degree: int, window: int | None, merged: int
) -> None:
    schedule = schedule_of(SequenceLayout(lengths, degree * merged).coarsened(merged), DocumentMask(True, window))
    work = AttentionWork(
        degree=degree * merged, num_heads=1, num_key_heads=1, head_size=1, lengths=tuple(lengths), window=window
    )
    shards = Shards(work, 0.0, merged=merged)
    for part in (None, 0, 1):
        counted, picked = shards.pairs(part).padded_pairs, shards.pairs(part).picked_rows
        for query_rank, key_rank in itertools.product(range(degree), repeat=2):
            blocks = [
                block
                for one in ((0, 2) if part == 0 else (part,))
                for block in schedule.pair(query_rank, key_rank, one)
            ]
            assert counted[query_rank, key_rank] == pytest.approx(sum(map(pairs_of, blocks)), abs=1e-6)
            if window is None and part is None:
                in_order = sum(len(block.pick.index) for block in blocks if block.pick is not None)
                assert picked[query_rank, key_rank] == in_order
    for counted, work_of in ((shards.gathered(), "blocks"), (shards.apart(), "apart")):
        blocks_of = [getattr(schedule.gathered(rank), work_of) for rank in range(degree)]
        assert counted.padded_pairs == pytest.approx(
            np.array([sum(map(pairs_of, each)) for each in blocks_of]), abs=1e-6
        )
        assert counted.num_calls.tolist() == [len(each) for each in blocks_of]
    read = [sum(block.segments.cu_k[-1] for block in schedule.gathered(rank).blocks) for rank in range(degree)]
    assert (shards.gathered().picked_rows >= np.array(read)).all()
    if window is None:
        for owner, other in itertools.permutations(range(degree), 2):
            assert shards.keys.needed[owner, other] == len(schedule.rows_used(other, owner, side="keys"))
            assert shards.queries.needed[owner, other] == len(schedule.rows_used(owner, other, side="queries"))


def pairs_of(block: Block) -> int:
    return sum(
        int(visible_keys(rows.stop - rows.start, keys.stop - keys.start, block.mask, CPU).sum())
        for rows, keys in block.segments.pieces()
    )
