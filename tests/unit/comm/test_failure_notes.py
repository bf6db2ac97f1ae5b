"""Notes of failed exchanges: which rank the chain of accusations leads to."""

from __future__ import annotations

import threading
import time

from torch.distributed import HashStore

from raysp.comm.failure_notes import FailureNote, find_root_cause, post_note, root_cause


def _lost(*accused: int) -> FailureNote:
    return FailureNote(accused, False, "closed")


def _late(*accused: int) -> FailureNote:
    return FailureNote(accused, True, "timed out")


def test_chain_leads_to_the_rank_without_a_note() -> None:
    notes = {3: _lost(2), 2: _lost(1), 1: _lost(0)}
    for rank in notes:
        cause = root_cause(rank, notes)
        assert cause.ranks == (0,)
        assert cause.reporter == 1


def test_notes_off_the_chain_are_left_out() -> None:
    assert root_cause(1, {1: _lost(0), 5: _lost(6)}).ranks == (0,)


def test_two_dead_ranks_are_both_named() -> None:
    assert root_cause(3, {3: _lost(2, 0), 2: _lost(1)}).ranks == (0, 1)


def test_broken_connection_decides_over_a_late_rank() -> None:
    cause = root_cause(3, {3: _late(4, 2), 2: _lost(1)})
    assert cause.ranks == (1,)
    assert not cause.note.timed_out


def test_link_that_broke_between_living_ranks_is_told_as_each_side_saw_it() -> None:
    notes = {0: _lost(1), 1: _lost(0)}
    assert root_cause(0, notes).ranks == (1,)
    assert root_cause(1, notes).ranks == (0,)


def test_a_note_that_comes_a_little_later_is_followed() -> None:
    store = HashStore()
    post_note(store, 2, _lost(1))
    later = threading.Timer(0.2, post_note, (store, 1, _lost(0)))
    later.start()
    try:
        assert find_root_cause(store, 2, _lost(1), note_wait_s=1.0).ranks == (0,)
    finally:
        later.join()


def test_waiting_for_a_note_ends() -> None:
    start_s = time.monotonic()
    cause = find_root_cause(HashStore(), 1, _lost(0), note_wait_s=0.1)
    assert (cause.ranks, cause.reporter) == ((0,), 1)
    assert time.monotonic() - start_s < 5.0
