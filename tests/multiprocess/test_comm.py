"""Communicators and messages between gloo ranks: groups, uneven rows, time-outs and deaths that name the rank."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import comm_ranks as ranks
import pytest
import torch
from gloo_pool import GlooPool, RankFailedError

from raysp.comm import RankLostError, RankTimeoutError


@pytest.fixture
def pair() -> Iterator[GlooPool]:
    """Two ranks of their own, for tests that break them."""
    pool = GlooPool(size=2)
    yield pool
    pool.stop()


def test_members_of_unequally_many_groups_still_meet(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(ranks.groups_in_uneven_orders) == [3.0, 1.0, 2.0, 3.0]


def test_groups_are_kept_and_a_single_rank_needs_none(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(ranks.group_identity) == [(True, True, True)] * 4


def test_groups_that_cannot_be_are_refused(gloo_pool: GlooPool) -> None:
    for messages in gloo_pool.run(ranks.errors_of_bad_groups):
        assert "[1, 0] is not a set of ranks" in messages[0]
        assert "[0, 9] is not a set of ranks" in messages[1]
        assert "expected a group that contains it" in messages[2]
        assert "expected at most 0 groups" in messages[3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", [4])
def test_exchange_keeps_order_and_skips_empty_messages(gloo_pool: GlooPool, world: int, dtype: torch.dtype) -> None:
    for rank, (found, sent_bytes) in enumerate(gloo_pool.run(ranks.exchanged, dtype)):
        previous, following = (rank - 1) % world, (rank + 1) % world
        assert found == [previous] * 3 + [previous + 10.0] * 2 + [following + 20.0]
        assert sent_bytes == 6 * dtype.itemsize


def test_messages_between_two_ranks_keep_their_order(pair: GlooPool) -> None:
    for rank, (found, _) in enumerate(pair.run(ranks.exchanged, torch.float32)):
        other = 1 - rank
        assert found == [other] * 3 + [other + 10.0] * 2 + [other + 20.0]


def test_collectives_over_uneven_rows(gloo_pool: GlooPool) -> None:
    offsets = [0, 0, 1, 3, 6]
    for rank, (gathered, summed, traded) in enumerate(gloo_pool.run(ranks.uneven_collectives)):
        assert gathered == [1.0, 2.0, 2.0, 3.0, 3.0, 3.0]
        assert summed == [10.0 * row for row in range(offsets[rank], offsets[rank + 1])]
        assert traded == [float(source) for source in range(4) for _ in range(rank)]


def test_barrier_names_the_missing_rank(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(ranks.barrier_without_rank_2) == [(2,), (2,), (), (2,)]


def test_exchange_names_the_silent_rank(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(ranks.exchange_without_peer)[0] == (1,)


def test_exchange_names_the_rank_that_died(pair: GlooPool) -> None:
    with pytest.raises(RankFailedError, match="rank 1: EOFError") as failure:
        pair.run(ranks.exchange_with_dying_peer)
    assert "--- rank 0" not in str(failure.value)


@pytest.mark.parametrize("ending", ["close", "abort"])
def test_the_next_epoch_forms_on_the_same_store(pair: GlooPool, ending: str) -> None:
    assert pair.run(ranks.next_epoch, pair.store_port, ending) == [(3.0, 3.0), (3.0, 3.0)]


@pytest.mark.parametrize(
    "error",
    [
        RankTimeoutError(operation="barrier", missing_ranks=[3, 5], timeout_s=2.5),
        RankLostError(operation="exchange", lost_ranks=[1], reason="closed"),
    ],
)
def test_errors_survive_pickling(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)
