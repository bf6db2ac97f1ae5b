"""The length sketch: error bound of quantiles, exactness of the rest, merges, decay, JSON."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import LengthProfile, LengthsError, LengthSketch, load_distribution
from planner.length_sketch import MAX_POWER

LENGTHS = st.lists(st.one_of(st.integers(1, 300), st.integers(1, 1 << MAX_POWER)), min_size=1, max_size=60)
WIKIPEDIA = load_distribution("wikipedia").sample(20_000, seed=3)


@settings(deadline=None)
@given(lengths=LENGTHS, ranks=st.lists(st.integers(1, 60), min_size=1), error=st.sampled_from([0.001, 0.01, 0.1]))
def test_quantiles_are_within_the_relative_error_of_the_true_rank(
    lengths: list[int], ranks: list[int], error: float
) -> None:
    sketch = LengthSketch.of(lengths, relative_error=error)
    ordered = np.sort(lengths)
    wanted = np.array([min(rank, len(lengths)) for rank in ranks])
    true = ordered[wanted - 1]
    assert (np.abs(sketch.quantile(wanted / len(lengths)) - true) <= error * true * (1 + 1e-9)).all()


@settings(deadline=None)
@given(lengths=LENGTHS)
def test_short_lengths_extremes_and_totals_are_exact(lengths: list[int]) -> None:
    sketch = LengthSketch.of(lengths)
    assert (sketch.min_tokens, sketch.max_tokens) == (min(lengths), max(lengths))
    assert float(sketch.quantile(0)) == pytest.approx(min(lengths), rel=0.01)
    assert sketch.num_sequences == len(lengths)
    if sum(lengths) < 2**53:
        assert sketch.num_tokens == sum(lengths)
    short = [length for length in lengths if length <= 30]
    if short:
        assert sorted(short) == [
            float(q) for q in LengthSketch.of(short).quantile((np.arange(len(short)) + 0.5) / len(short))
        ]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 1 << 30), min_size=1, max_size=60))
def test_profile_is_that_of_the_lengths_but_for_three_quantiles(lengths: list[int]) -> None:
    exact, sketched = LengthProfile.of(lengths), LengthSketch.of(lengths).profile()
    for name in ("num_sequences", "num_tokens", "min_tokens", "max_tokens", "mean_tokens"):
        assert getattr(sketched, name) == getattr(exact, name)
    for name in ("p50_tokens", "p90_tokens", "p99_tokens"):
        value = getattr(exact, name)
        # One per cent, and then rounded to whole tokens.
        assert getattr(sketched, name) == pytest.approx(value, rel=0, abs=0.01 * value + 0.5)
    assert [tail.above_tokens for tail in sketched.tails] == [tail.above_tokens for tail in exact.tails]
    for mine, theirs in zip(sketched.tails, exact.tails, strict=True):
        assert (mine.sequence_share, mine.token_share) == pytest.approx((theirs.sequence_share, theirs.token_share))
    assert [(row.low, row.high, row.num_sequences, row.num_tokens) for row in sketched.buckets] == [
        (row.low, row.high, row.num_sequences, row.num_tokens) for row in exact.buckets
    ]


def test_default_error_is_one_per_cent_at_every_quantile_of_a_corpus() -> None:
    q = (np.arange(len(WIKIPEDIA)) + 0.5) / len(WIKIPEDIA)
    sketched = LengthSketch.of(WIKIPEDIA).quantile(q)
    assert np.abs(sketched / np.sort(WIKIPEDIA) - 1).max() <= 0.01


def test_token_quantile_divides_the_tokens() -> None:
    sketch = LengthSketch.of(WIKIPEDIA)
    half = float(sketch.token_quantile(0.5))
    assert WIKIPEDIA[half * 1.01 < WIKIPEDIA].sum() <= WIKIPEDIA.sum() / 2 <= WIKIPEDIA[half * 0.99 <= WIKIPEDIA].sum()
    assert half > 4 * float(sketch.quantile(0.5))
    assert sketch.token_quantile([[0.1, 0.9]]).shape == (1, 2)


def test_tail_is_exact_at_powers_of_two_and_close_elsewhere() -> None:
    sketch = LengthSketch.of(WIKIPEDIA)
    for above, tolerance in ((4096, 1e-12), (32768, 1e-12), (5000, 2e-3), (30000, 2e-3)):
        tail, longer = sketch.tail(above), WIKIPEDIA[above < WIKIPEDIA]
        assert tail.sequence_share == pytest.approx(len(longer) / len(WIKIPEDIA), abs=tolerance)
        assert tail.token_share == pytest.approx(longer.sum() / WIKIPEDIA.sum(), abs=tolerance)
    assert sketch.tail(0).token_share == 1
    assert sketch.tail(int(WIKIPEDIA.max())).token_share == 0


@settings(deadline=None)
@given(parts=st.lists(st.lists(st.integers(1, 1 << 20), max_size=20), min_size=1, max_size=5))
def test_merges_equal_one_sketch_of_all(parts: list[list[int]]) -> None:
    merged, streamed = LengthSketch(), LengthSketch()
    for part in reversed(parts):
        merged.merge(LengthSketch.of(part))
    for part in parts:
        streamed.add(part)
    whole = LengthSketch.of(np.array([length for part in parts for length in part], dtype=np.int64))
    assert merged.to_content() == streamed.to_content() == whole.to_content()


def test_decay_weighs_later_sequences_more_and_copies_are_apart() -> None:
    sketch = LengthSketch.of([100] * 90)
    before = sketch.copy()
    sketch.decay(0.1)
    sketch.add([1000] * 9)
    assert sketch.num_sequences == pytest.approx(18)
    assert sketch.num_tokens == pytest.approx(9 * 100 + 9 * 1000)
    assert sketch.tail(512).sequence_share == pytest.approx(0.5)
    assert sketch.profile().num_sequences == 18
    assert before.num_sequences == 90
    for factor in (0, 1.1):
        with pytest.raises(LengthsError, match="decay"):
            sketch.decay(factor)


@pytest.mark.parametrize("factor", [1, 0.3])
def test_json_round_trip(factor: float) -> None:
    sketch = LengthSketch.of(WIKIPEDIA)
    sketch.decay(factor)
    back = LengthSketch.from_content(json.loads(json.dumps(sketch.to_content())))
    assert back.to_content() == sketch.to_content()
    assert back.profile() == sketch.profile()
    empty = LengthSketch().to_content()
    assert LengthSketch.from_content(empty).to_content() == empty


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema_version=2), "schema_version 2; expected 1"),
        (lambda c: c.pop("bins"), "lacks the key"),
        (lambda c: c.update(more=1), "unknown key"),
        (lambda c: c.update(relative_error=0.5), "relative_error is 0.5"),
        (lambda c: c.update(min_tokens=60), "do not fit"),
        (lambda c: c.update(max_tokens=1), "do not fit"),
        (lambda c: c.update(bins=[]), "do not fit"),
        (lambda c: c["bins"].reverse(), r"bins\[1\]\[0\] is 5; expected the ends"),
        (lambda c: c["bins"][0].__setitem__(1, 0), "above 0"),
        (lambda c: c["bins"][0].__setitem__(2, 11), "no such lengths"),
        (lambda c: c["bins"][1].__setitem__(0, 1 << 60), "expected the ends"),
        (lambda c: c["bins"].append([1]), "1 values"),
        (lambda c: c["bins"].append(7), "JSON array"),
    ],
)
def test_malformed_json_is_refused(change: Callable[[dict], object], message: str) -> None:
    content = LengthSketch.of([5, 5, 5000]).to_content()
    change(content)
    with pytest.raises(LengthsError, match=message):
        LengthSketch.from_content(content)


def test_bad_lengths_leave_the_sketch_as_it_was() -> None:
    sketch = LengthSketch.of([7])
    before = sketch.to_content()
    for wrong in ([3, 0], [-1], [(1 << MAX_POWER) + 1], [1.5], ["7"]):
        with pytest.raises(LengthsError):
            sketch.add(wrong)
    sketch.add([])
    assert sketch.to_content() == before
    with pytest.raises(LengthsError, match=r"relative error 0\.1"):
        sketch.merge(LengthSketch(relative_error=0.1))
    with pytest.raises(LengthsError, match="probability"):
        sketch.quantile(1.5)
    for error in (0, 0.9, float("nan")):
        with pytest.raises(LengthsError, match="relative_error"):
            LengthSketch(relative_error=error)


@pytest.mark.parametrize("ask", [lambda s: s.quantile(0.5), lambda s: s.tail(5), lambda s: s.profile()])
def test_an_empty_sketch_answers_nothing(ask: Callable[[LengthSketch], object]) -> None:
    with pytest.raises(LengthsError, match="no lengths in the sketch"):
        ask(LengthSketch())
