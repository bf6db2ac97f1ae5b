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


@pytest.fixture
def quartet() -> Iterator[GlooPool]:
    """Four ranks of their own, for tests that break them."""
    pool = GlooPool(size=4)
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
    for rank, (gathered, traded) in enumerate(gloo_pool.run(ranks.uneven_collectives)):
        assert gathered == [1.0, 2.0, 2.0, 3.0, 3.0, 3.0]
        assert traded == [float(source) for source in range(4) for _ in range(rank)]


def test_barrier_names_the_missing_rank(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(ranks.barrier_without_rank_2) == [(2,), (2,), (), (2,)]


def test_exchange_names_the_silent_rank(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(ranks.exchange_without_peer)[0] == (1,)


def test_exchange_names_the_rank_that_died(pair: GlooPool) -> None:
    with pytest.raises(RankFailedError, match="rank 1: EOFError") as failure:
        pair.run(ranks.exchange_with_dying_peer)
    assert "--- rank 0" not in str(failure.value)


def test_halves_of_a_group_exchange_at_once_and_count_together(gloo_pool: GlooPool) -> None:
    answers = gloo_pool.run(ranks.exchanged_within_halves)
    # Rows arrive in the order of the subset's ranks: (0, 2) and (3, 1).
    for (traded, received, sent_bytes), peer, expected in zip(
        answers, (2, 3, 0, 1), ([0.0, 2.0], [3.0, 1.0], [0.0, 2.0], [3.0, 1.0]), strict=True
    ):
        assert traded == expected
        assert received == [peer + 10.0] * 2
        assert sent_bytes == 4 + 2 * 4


def test_subsets_that_cannot_be_are_refused(gloo_pool: GlooPool) -> None:
    for rank, messages in enumerate(gloo_pool.run(ranks.errors_of_bad_subsets)):
        assert f"ranks [{rank}, {rank}] are no part of a group of degree 4" in messages[0]
        assert f"ranks [{rank}, 9] are no part of a group of degree 4" in messages[1]
        assert (
            f"group rank {rank} asked for the ranks [{(rank + 1) % 4}]; expected a part that contains it" in messages[2]
        )


@pytest.mark.parametrize("dying_rank", [0, 2])
def test_every_rank_names_the_one_that_died_in_mid_exchange(quartet: GlooPool, dying_rank: int) -> None:
    answers = quartet.run_until_death(ranks.ring_whose_rank_dies, dying_rank, True)
    assert set(answers) == set(range(4)) - {dying_rank}
    for named, text, took_s in answers.values():
        assert named == (dying_rank,), text
        assert took_s < 20.0


def test_without_a_store_every_failing_rank_names_its_direct_peer(quartet: GlooPool) -> None:
    # Nothing closes connections here, so the ranks that wait for a living one would wait for the time-out.
    answers = quartet.run_until_death(ranks.ring_whose_rank_dies, 1, False, ranks_that_answer=(0, 2))
    assert {named for named, _, _ in answers.values()} == {(1,)}


def test_every_rank_names_the_silent_one_at_the_end_of_the_chain(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(ranks.chain_whose_rank_is_silent) == [(), (), (1,), (1,)]


def test_measured_link_is_the_same_on_all_ranks_kept_and_not_counted(gloo_pool: GlooPool) -> None:
    answers = gloo_pool.run(ranks.measured_link)
    assert len({link for link, _, _, _ in answers}) == 1
    for link, is_kept, sent_bytes, took_s in answers:
        assert is_kept
        assert sent_bytes == 0
        assert 1e6 < link.bandwidth_bytes_per_s < 1e12
        assert 1e-6 < link.latency_s < 1.0
        # A fraction of a second on an idle machine.
        assert took_s < 10.0


def test_halves_of_a_group_are_measured_apart(gloo_pool: GlooPool) -> None:
    first, second, third, fourth = gloo_pool.run(ranks.measured_halves)
    assert first == second
    assert third == fourth
    assert first != third


@pytest.mark.parametrize("nodes", [None, ("a", "a", "b", "b")])
def test_links_of_neighbours_are_the_same_on_all_ranks(gloo_pool: GlooPool, nodes: tuple[str, ...] | None) -> None:
    answers = gloo_pool.run(ranks.measured_pairs, nodes)
    assert all(answer == answers[0] for answer in answers)
    assert [pair.ranks for pair in answers[0]] == [(0, 1), (1, 2), (2, 3), (0, 3)]
    assert all(pair.link.bandwidth_bytes_per_s > 1e6 and pair.link.latency_s > 0 for pair in answers[0])


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
