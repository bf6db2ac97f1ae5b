"""Whether the lengths of a batch still come from where those before came from.

Two checks share the stated rate of false alarms. By sequences: the two-sample Kolmogorov-Smirnov distance, which sees
the body of the distribution. By tokens: a few long sequences hold much of the work and leave that distance as it was,
so the tail is checked on its own, above each power of two. In a heavy tail the token share of one batch has no usable
standard error (one sequence can hold a third of the batch), but between two powers of two lengths differ by at most a
factor of two, so tokens go with the number of sequences, and two numbers have an exact conditional (binomial) test.

Symbols: ``n`` sequences of the batch, ``m`` of the reference, ``a`` false alarms per batch of either check.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from planner.errors import LengthsError
from planner.length_sketch import LengthSketch

TAIL_SEQUENCE_SHARE = 0.05
"""The tail begins at the first power of two that at most this share of the sequences exceeds."""

# Beyond this many the normal distribution is as good, and needs no array.
_EXACT_TRIALS = 1_000_000
# Sums of floats say no more than that a probability is below this.
_NEGLIGIBLE = 1e-12


@dataclass(frozen=True, kw_only=True)
class LengthDrift:
    """How a batch compares with the reference.

    Attributes:
        statistic: Kolmogorov-Smirnov distance: the largest difference of the cumulative shares of sequences, 0 to 1.
        threshold: What it must exceed.
        by_sequences: Whether it does.
        tail_above_tokens: The power of two, in the tail, above which the number of sequences differs most; none where
            the tail is empty.
        tail_token_share: Share of the batch's tokens above it, 0 to 1.
        reference_token_share: Share of the reference's tokens above it.
        tail_p_value: Probability of so large a difference without drift, corrected for the powers of two looked at.
        tail_p_threshold: What it must fall below.
        by_tokens: Whether it does, and the token shares differ enough to matter.
        rebased: Whether the reference was replaced by the last batches.
        reason: One line for people.
    """

    statistic: float
    threshold: float
    by_sequences: bool
    tail_above_tokens: int | None
    tail_token_share: float
    reference_token_share: float
    tail_p_value: float
    tail_p_threshold: float
    by_tokens: bool
    rebased: bool
    reason: str

    @property
    def drifted(self) -> bool:
        """Whether either check says so."""
        return self.by_sequences or self.by_tokens


def compare_lengths(
    batch: LengthSketch,
    reference: LengthSketch,
    *,
    false_alarm_rate: float = 0.01,
    min_difference: float = 0.02,
    reference_sequences: float | None = None,
) -> LengthDrift:
    """Say whether two sketches hold lengths of one distribution.

    ``threshold = sqrt(-ln(a/2)/2) * sqrt((n + m)/(n*m))``

    Args:
        batch: Independent sequences.
        reference: What to compare them with, of the same relative error.
        false_alarm_rate: Chance of drift being reported where there is none, half of it by either check.
        min_difference: Differences of shares (of sequences, of tokens) up to here are no drift, however significant.
        reference_sequences: Effective number of sequences of a reference with weights; none takes its weight.

    Raises:
        LengthsError: A sketch is empty, the relative errors differ, or a rate is outside of 0 to 1.
    """
    if not 0 < false_alarm_rate < 1 or not 0 <= min_difference < 1:
        raise LengthsError(
            f"false_alarm_rate is {false_alarm_rate} and min_difference {min_difference}; expected between 0 and 1."
        )
    if batch.relative_error != reference.relative_error:
        raise LengthsError("cannot compare sketches of different relative errors; make both with the same.")
    rate = false_alarm_rate / 2
    n, m = batch.num_sequences, reference_sequences or reference.num_sequences
    statistic = float(np.abs(batch.cumulative_shares() - reference.cumulative_shares()).max())
    threshold = max(math.sqrt(-math.log(rate / 2) / 2 * (n + m) / (n * m)), min_difference)
    above, p_value = _tail_test(batch, reference, n, m)
    share, before = (sketch.tail(above).token_share if above else 0.0 for sketch in (batch, reference))
    by_sequences, by_tokens = statistic > threshold, p_value < rate and abs(share - before) > min_difference
    parts = []
    if by_sequences:
        parts.append(
            f"median {_median(batch):,} tokens instead of {_median(reference):,} "
            f"(Kolmogorov-Smirnov distance {statistic:.3f}, threshold {threshold:.3f})"
        )
    if by_tokens:
        parts.append(
            f"{share:.1%} of tokens in sequences above {above:,} instead of {before:.1%} (p {_shown(p_value)})"
        )
    agreed = (
        f"no drift: Kolmogorov-Smirnov distance {statistic:.3f}, threshold {threshold:.3f}; tail p {_shown(p_value)}"
    )
    return LengthDrift(
        statistic=statistic,
        threshold=threshold,
        by_sequences=by_sequences,
        tail_above_tokens=above,
        tail_token_share=share,
        reference_token_share=before,
        tail_p_value=p_value,
        tail_p_threshold=rate,
        by_tokens=by_tokens,
        rebased=False,
        reason="lengths drifted: " + "; ".join(parts) if parts else agreed,
    )


class DriftDetector:
    """Compares every batch with an exponentially decayed reference of the batches before.

    Batches that drifted stay out of the reference, until `patience` of them in a row replace it.
    """

    def __init__(
        self,
        reference: LengthSketch | None = None,
        *,
        false_alarm_rate: float = 0.01,
        min_difference: float = 0.02,
        decay: float = 0.98,
        patience: int = 3,
    ) -> None:
        """Make a detector.

        Args:
            reference: Lengths to expect; none takes the first batch. It is copied.
            false_alarm_rate: See `compare_lengths`.
            min_difference: See `compare_lengths`.
            decay: Weight that the reference keeps at each batch; above 0, at most 1. 0.98 remembers about 100 batches.
            patience: Drifted batches in a row that replace the reference; at least 1.

        Raises:
            LengthsError: `decay` or `patience` is outside.
        """
        if not 0 < decay <= 1 or patience < 1:
            raise LengthsError(f"decay is {decay} and patience {patience}; expected 0 < decay <= 1 and patience >= 1.")
        self._false_alarm_rate = false_alarm_rate
        self._min_difference = min_difference
        self._decay = decay
        self._patience = patience
        self._reference: LengthSketch | None = None
        self._squared_weights = 0.0
        self._drifted: list[LengthSketch] = []
        if reference is not None and reference.max_tokens:
            self._rebase([reference])

    @property
    def reference(self) -> LengthSketch | None:
        """A copy of what batches are compared with; none before the first."""
        return None if self._reference is None else self._reference.copy()

    def observe(self, lengths: ArrayLike) -> LengthDrift:
        """Compare one batch and take it in.

        Args:
            lengths: Tokens of its sequences; at least one.

        Raises:
            LengthsError: No lengths, or malformed ones; the detector stays as it was.
        """
        error = 0.01 if self._reference is None else self._reference.relative_error
        batch = LengthSketch.of(lengths, relative_error=error)
        if not batch.max_tokens:
            raise LengthsError("there are no lengths in the batch; expected at least one sequence.")
        if self._reference is None:
            self._rebase([batch])
            return _first(self._false_alarm_rate)
        drift = compare_lengths(
            batch,
            self._reference,
            false_alarm_rate=self._false_alarm_rate,
            min_difference=self._min_difference,
            # Kish: weights that differ count for fewer sequences.
            reference_sequences=self._reference.num_sequences**2 / self._squared_weights,
        )
        if not drift.drifted:
            self._reference.decay(self._decay)
            self._reference.merge(batch)
            self._squared_weights = self._decay**2 * self._squared_weights + batch.num_sequences
            self._drifted.clear()
            return drift
        self._drifted.append(batch)
        if len(self._drifted) < self._patience:
            return drift
        count = len(self._drifted)
        self._rebase(self._drifted)
        batches = "this batch" if count == 1 else f"the last {count} batches"
        return replace(drift, rebased=True, reason=f"{drift.reason}; {batches} are the reference from here on")

    def _rebase(self, batches: list[LengthSketch]) -> None:
        reference = LengthSketch(relative_error=batches[0].relative_error)
        for batch in batches:
            reference.merge(batch)
        self._reference, self._drifted = reference, []
        self._squared_weights = reference.num_sequences


def _tail_test(batch: LengthSketch, reference: LengthSketch, n: float, m: float) -> tuple[int | None, float]:
    """The power of two with the least likely number of sequences above, and that likelihood, corrected."""
    longest = max(batch.max_tokens, reference.max_tokens)
    found: list[tuple[float, int]] = []
    for power in range((longest - 1).bit_length()):
        inside, outside = batch.tail(1 << power).sequence_share * n, reference.tail(1 << power).sequence_share * m
        if inside + outside <= TAIL_SEQUENCE_SHARE * (n + m):
            found.append((_binomial_p_value(round(inside), round(inside + outside), n / (n + m)), 1 << power))
    if not found:
        return None, 1.0
    p_value, above = min(found)
    return above, min(1.0, p_value * len(found))


def _binomial_p_value(successes: int, trials: int, probability: float) -> float:
    """Two-sided p-value of `successes` in `trials`: twice the smaller tail."""
    if trials == 0:
        return 1.0
    if trials > _EXACT_TRIALS:
        spread = math.sqrt(trials * probability * (1 - probability))
        return math.erfc(max(0.0, abs(successes - trials * probability) - 0.5) / spread / math.sqrt(2))
    steps = np.arange(1, trials + 1)
    odds = math.log(probability) - math.log1p(-probability)
    logs = np.concatenate([[0.0], np.cumsum(np.log((trials - steps + 1) / steps) + odds)])
    masses = np.exp(logs + trials * math.log1p(-probability))
    return float(min(1.0, 2 * min(masses[: successes + 1].sum(), masses[successes:].sum())))


def _first(false_alarm_rate: float) -> LengthDrift:
    return LengthDrift(
        statistic=0.0,
        threshold=1.0,
        by_sequences=False,
        tail_above_tokens=None,
        tail_token_share=0.0,
        reference_token_share=0.0,
        tail_p_value=1.0,
        tail_p_threshold=false_alarm_rate / 2,
        by_tokens=False,
        rebased=True,
        reason="the first batch is the reference",
    )


def _median(sketch: LengthSketch) -> int:
    return round(float(sketch.quantile(0.5)))


def _shown(p_value: float) -> str:
    return f"{p_value:.2g}" if p_value >= _NEGLIGIBLE else f"below {_NEGLIGIBLE:g}"
