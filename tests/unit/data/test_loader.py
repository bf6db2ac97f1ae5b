import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysp.data import BatchLoader, Cursor
from raysp.errors import InputError

lengths_lists = st.lists(st.integers(min_value=1, max_value=100), min_size=1, max_size=30)
budgets = st.one_of(
    st.fixed_dictionaries({"tokens_per_step": st.integers(min_value=1, max_value=400)}),
    st.fixed_dictionaries({"sequences_per_step": st.integers(min_value=1, max_value=40)}),
)


def ids_drawn(loader, *, at_least):
    drawn, cursor = [], Cursor()
    while len(drawn) < at_least:
        batch = loader.batch_at(cursor)
        drawn += batch.sequence_ids
        cursor = batch.next_cursor
    return drawn


@settings(deadline=None)
@given(lengths=lengths_lists, budget=budgets, seed=st.integers(min_value=0, max_value=2**40))
def test_every_sequence_exactly_once_per_pass(lengths, budget, seed):
    ids = [3 * index + 1 for index in range(len(lengths))]
    drawn = ids_drawn(BatchLoader(ids, lengths, seed=seed, **budget), at_least=3 * len(ids))
    for number in range(3):
        assert Counter(drawn[number * len(ids) : (number + 1) * len(ids)]) == Counter(ids)


@settings(deadline=None)
@given(lengths=lengths_lists, budget=budgets, seed=st.integers(min_value=0, max_value=100))
def test_a_batch_is_a_function_of_seed_and_cursor(lengths, budget, seed):
    ids = list(range(len(lengths)))
    loader = BatchLoader(ids, lengths, seed=seed, **budget)
    batches, cursor = [], Cursor()
    for _ in range(5):
        batches.append((cursor, loader.batch_at(cursor)))
        cursor = batches[-1][1].next_cursor
    # Another loader, the ids given in another order, the batches asked for backwards.
    fresh = BatchLoader(ids[::-1], lengths[::-1], seed=seed, **budget)
    for saved, batch in reversed(batches):
        restored = Cursor.from_dict(json.loads(json.dumps(saved.to_dict())))
        assert fresh.batch_at(restored) == batch


@settings(deadline=None)
@given(lengths=lengths_lists, budget=st.integers(min_value=1, max_value=400))
def test_token_budget_is_filled_until_the_next_would_exceed_it(lengths, budget):
    loader = BatchLoader(range(len(lengths)), lengths, seed=0, tokens_per_step=budget)
    cursor = Cursor()
    for _ in range(6):
        batch = loader.batch_at(cursor)
        assert batch.lengths == tuple(lengths[index] for index in batch.sequence_ids)
        assert len(batch.lengths) >= 1
        assert batch.num_tokens <= budget or len(batch.lengths) == 1
        cursor = batch.next_cursor
        assert batch.num_tokens + loader.batch_at(cursor).lengths[0] > budget


@settings(deadline=None)
@given(lengths=lengths_lists, count=st.integers(min_value=1, max_value=70))
def test_sequence_budget_is_met_also_across_passes(lengths, count):
    loader = BatchLoader(range(len(lengths)), lengths, seed=1, sequences_per_step=count)
    batch = loader.batch_at(Cursor())
    assert len(batch.sequence_ids) == count
    passes, position = divmod(count, len(lengths))
    assert batch.next_cursor in (Cursor(passes, position), Cursor(passes - 1, len(lengths)))


def test_passes_and_seeds_have_orders_of_their_own():
    loader = BatchLoader(range(50), [1] * 50, seed=0, sequences_per_step=50)
    first, second = (loader.batch_at(Cursor(number, 0)).sequence_ids for number in range(2))
    other = BatchLoader(range(50), [1] * 50, seed=1, sequences_per_step=50).batch_at(Cursor()).sequence_ids
    assert len({first, second, other, tuple(range(50))}) == 4


def test_the_order_is_the_same_on_every_machine():
    loader = BatchLoader(range(8), [1] * 8, seed=0, sequences_per_step=8)
    assert loader.batch_at(Cursor()).sequence_ids == (7, 3, 6, 0, 1, 4, 5, 2)


def test_a_sequence_longer_than_the_budget_is_a_batch_alone():
    loader = BatchLoader([0], [1000], seed=0, tokens_per_step=10)
    batch = loader.batch_at(Cursor())
    assert (batch.sequence_ids, batch.next_cursor) == ((0,), Cursor(1, 0))


def test_ids_and_lengths_are_plain_integers():
    batch = BatchLoader(np.arange(3), np.array([4, 5, 6]), seed=0, sequences_per_step=2).batch_at(Cursor())
    assert all(type(value) is int for value in (*batch.sequence_ids, *batch.lengths))


@pytest.mark.parametrize(
    ("ids", "lengths", "budget", "message"),
    [
        ([], [], {"tokens_per_step": 5}, "no sequence to train on; expected at least 1"),
        ([0, 1], [5], {"tokens_per_step": 5}, "1 lengths for 2 sequence ids"),
        ([1, 1], [5, 5], {"tokens_per_step": 5}, "1 sequence ids are repeated"),
        ([7, 8], [5, 0], {"tokens_per_step": 5}, "sequence 8 has 0 tokens; expected at least 1"),
        ([0], [5], {}, "give exactly one of data.tokens_per_step and data.sequences_per_step"),
        ([0], [5], {"tokens_per_step": 5, "sequences_per_step": 1}, "give exactly one"),
        ([0], [5], {"tokens_per_step": 0}, "data.tokens_per_step is 0; expected at least 1"),
    ],
)
def test_bad_arguments_are_refused(ids, lengths, budget, message):
    with pytest.raises(InputError, match=message):
        BatchLoader(ids, lengths, seed=0, **budget)


@pytest.mark.parametrize("values", [{}, {"pass_index": 0}, {"pass_index": 0, "position": -1}, {"pass_index": "0"}])
def test_unreadable_cursor_is_refused(values):
    with pytest.raises(InputError, match="expected pass_index and position"):
        Cursor.from_dict(values)


def test_cursor_behind_the_data_is_refused():
    loader = BatchLoader(range(3), [1] * 3, seed=0, sequences_per_step=1)
    with pytest.raises(InputError, match=r"a pass has 3 sequences\. The data changed since"):
        loader.batch_at(Cursor(0, 4))
