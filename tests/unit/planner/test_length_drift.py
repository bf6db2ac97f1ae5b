"""Drift of lengths: few false alarms, quick detection of body and tail, rebasing."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from planner import DriftDetector, LengthsError, LengthSketch, compare_lengths, load_distribution
from planner.length_drift import _binomial_p_value

BATCH = 512
WIKIPEDIA = load_distribution("wikipedia").sample(200_000, seed=0)
PROLONG = load_distribution("prolong").sample(50_000, seed=1)
LONG = load_distribution("long-documents").sample(10_000, seed=2)


def batches(lengths: np.ndarray, count: int, *, seed: int, size: int = BATCH) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.choice(lengths, size) for _ in range(count)]


@pytest.mark.parametrize(("lengths", "size"), [(WIKIPEDIA, BATCH), (PROLONG, BATCH), (WIKIPEDIA, 64)])
def test_false_alarms_stay_below_two_per_cent(lengths: np.ndarray, size: int) -> None:
    detector = DriftDetector()
    alarms = [detector.observe(batch).drifted for batch in batches(lengths, 500, seed=4, size=size)]
    assert sum(alarms) <= 10


def test_a_switch_of_corpus_is_seen_at_once_and_becomes_the_reference() -> None:
    detector = DriftDetector()
    for batch in batches(WIKIPEDIA, 40, seed=5):
        detector.observe(batch)
    after = [detector.observe(batch) for batch in batches(PROLONG, 12, seed=6)]
    assert [drift.drifted for drift in after[:3]] == [True, True, True]
    assert [drift.rebased for drift in after] == [False, False, True] + [False] * 9
    assert not any(drift.drifted for drift in after[3:])
    assert "instead of" in after[0].reason
    assert "the last 3 batches are the reference" in after[2].reason


def test_a_few_long_sequences_are_seen_by_tokens_only() -> None:
    detector = DriftDetector(LengthSketch.of(WIKIPEDIA))
    for ordinary, long in zip(batches(WIKIPEDIA, 3, seed=7), batches(LONG, 3, seed=8, size=12), strict=True):
        drift = detector.observe(np.concatenate([ordinary[12:], long]))
        assert (drift.by_sequences, drift.by_tokens, drift.drifted) == (False, True, True)
        assert drift.tail_above_tokens is not None
        assert drift.tail_token_share > 2 * drift.reference_token_share
        assert "of tokens in sequences above" in drift.reason


def test_one_strange_batch_neither_enters_nor_replaces_the_reference() -> None:
    detector = DriftDetector()
    for batch in batches(WIKIPEDIA, 10, seed=9):
        detector.observe(batch)
    before = detector.reference
    assert detector.observe(PROLONG[:BATCH]).drifted
    after = detector.reference
    assert before is not None
    assert after is not None
    assert after.to_content() == before.to_content()
    assert not detector.observe(WIKIPEDIA[:BATCH]).drifted
    strange = [detector.observe(PROLONG[:BATCH]) for _ in range(2)]
    assert not any(drift.rebased for drift in strange)


def test_the_reference_follows_and_forgets() -> None:
    detector = DriftDetector(decay=0.5, patience=1)
    first = detector.observe([10] * 100)
    assert (first.drifted, first.rebased, first.reason) == (False, True, "the first batch is the reference")
    for _ in range(3):
        assert not detector.observe([10] * 100).drifted
    reference = detector.reference
    assert reference is not None
    assert reference.num_sequences == pytest.approx(100 * (1 + 0.5 + 0.25 + 0.125))
    assert detector.observe([10_000] * 100).rebased
    reference = detector.reference
    assert reference is not None
    assert reference.num_tokens == 1_000_000


def test_a_given_reference_is_copied() -> None:
    given = LengthSketch.of(WIKIPEDIA)
    detector = DriftDetector(given)
    given.add([1 << 40])
    reference = detector.reference
    assert reference is not None
    assert reference.max_tokens == WIKIPEDIA.max()


def test_statistic_is_the_kolmogorov_smirnov_distance() -> None:
    left, right = np.array([1, 2, 3, 4]), np.array([3, 4, 5, 6, 7])
    points = np.arange(8)
    by_hand = max(abs((left <= x).mean() - (right <= x).mean()) for x in points)
    drift = compare_lengths(LengthSketch.of(left), LengthSketch.of(right), false_alarm_rate=0.1)
    assert drift.statistic == pytest.approx(by_hand)
    assert drift.threshold == pytest.approx(math.sqrt(-math.log(0.025) / 2 * 9 / 20))


def test_differences_that_do_not_matter_are_no_drift_however_significant() -> None:
    generator = np.random.default_rng(0)
    left, right = (LengthSketch.of(generator.integers(1000, high, 1_000_000)) for high in (2000, 2010))
    assert not compare_lengths(left, right).drifted
    assert compare_lengths(left, right, min_difference=0).by_sequences


@pytest.mark.parametrize(("trials", "probability"), [(0, 0.3), (1, 0.3), (9, 0.01), (20, 0.5)])
def test_binomial_p_value_sums_the_smaller_tail(trials: int, probability: float) -> None:
    masses = [math.comb(trials, k) * probability**k * (1 - probability) ** (trials - k) for k in range(trials + 1)]
    for successes in range(trials + 1):
        tails = sum(masses[: successes + 1]), sum(masses[successes:])
        assert _binomial_p_value(successes, trials, probability) == pytest.approx(min(1, 2 * min(tails)))


def test_binomial_p_value_of_many_trials_goes_on_smoothly() -> None:
    for successes in (499_000, 500_000, 501_200):
        exact, normal = (_binomial_p_value(successes, trials, 0.5) for trials in (1_000_000, 1_000_001))
        assert normal == pytest.approx(exact, rel=0.02)


def test_bad_arguments_are_refused() -> None:
    sketch = LengthSketch.of([5])
    for keywords in ({"decay": 0}, {"decay": 1.5}, {"patience": 0}):
        with pytest.raises(LengthsError, match="decay is"):
            DriftDetector(**keywords)
    with pytest.raises(LengthsError, match="no lengths in the batch"):
        DriftDetector().observe([])
    for rate, difference in itertools.chain(((rate, 0.1) for rate in (0, 1)), ((0.1, d) for d in (-1, 1))):
        with pytest.raises(LengthsError, match="false_alarm_rate"):
            compare_lengths(sketch, sketch, false_alarm_rate=rate, min_difference=difference)
    with pytest.raises(LengthsError, match="relative errors"):
        compare_lengths(sketch, LengthSketch.of([5], relative_error=0.1))
    with pytest.raises(LengthsError, match="no lengths in the sketch"):
        compare_lengths(sketch, LengthSketch())
