"""A sketch of sequence lengths: streaming, mergeable, of bounded memory, with quantiles of a stated relative error.

Lengths are counted in bins whose ends grow by a constant factor ``g = 2**(1/m)``, with the smallest integer ``m`` for
which ``(g-1)/(g+1)`` is at most the relative error. Powers of two are therefore ends of bins, and what the sketch says
about them (tails, histogram) is exact. Short lengths have a bin each.

Source: DDSketch (arXiv:1908.10693), section 2, with bins aligned to powers of two.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.errors import LengthsError
from planner.length_profile import LengthBucket, LengthProfile, TailShare
from planner.strict_json import as_int, as_list, as_number, check_keys

SCHEMA_VERSION = 1
MAX_POWER = 50
"""Lengths go up to 2**50 tokens."""

_MIN_ERROR, _MAX_ERROR = 1e-4, 0.25


class LengthSketch:
    """Counts and tokens of sequences by length; all figures are exact, and quantiles within the relative error.

    Counts and tokens are exact below 2**53, until `decay` makes weights of them.

    Attributes:
        relative_error: Bound of ``|quantile - true quantile| / true quantile``.
        min_tokens: Shortest length ever added, also after `decay`; 0 while there is none.
        max_tokens: Longest length ever added; 0 while there is none.
    """

    def __init__(self, *, relative_error: float = 0.01) -> None:
        """Make an empty sketch.

        Args:
            relative_error: Of quantiles; 0.0001 to 0.25. The default takes about 1,600 bins, 26 kB.

        Raises:
            LengthsError: `relative_error` is outside.
        """
        if not _MIN_ERROR <= relative_error <= _MAX_ERROR:
            raise LengthsError(f"relative_error is {relative_error}; expected {_MIN_ERROR} to {_MAX_ERROR}.")
        self.relative_error = float(relative_error)
        self.min_tokens = 0
        self.max_tokens = 0
        self._ends = _bin_ends(self.relative_error)
        self._counts: NDArray[np.float64] = np.zeros(len(self._ends))
        self._tokens: NDArray[np.float64] = np.zeros(len(self._ends))

    @classmethod
    def of(cls, lengths: ArrayLike, *, relative_error: float = 0.01) -> LengthSketch:
        """Make a sketch of `lengths`, in tokens; see `add`."""
        sketch = cls(relative_error=relative_error)
        sketch.add(lengths)
        return sketch

    @property
    def num_sequences(self) -> float:
        """Sequences added: a whole number until `decay`."""
        return float(self._counts.sum())

    @property
    def num_tokens(self) -> float:
        """Their tokens: a whole number until `decay`."""
        return float(self._tokens.sum())

    def add(self, lengths: ArrayLike) -> None:
        """Add sequences.

        Args:
            lengths: Tokens of each, 1 to 2**50; none is fine.

        Raises:
            LengthsError: A length is no integer or outside; nothing is added then.
        """
        values = np.asarray(lengths).ravel()
        if not values.size:
            return
        if values.dtype.kind not in "iu":
            raise LengthsError(f"lengths are of type {values.dtype}; expected integers.")
        low, high = int(values.min()), int(values.max())
        if low < 1 or high > 1 << MAX_POWER:
            wrong = low if low < 1 else high
            raise LengthsError(f"a sequence has {wrong} tokens; expected 1 to 2**{MAX_POWER}. Drop empty documents.")
        bins = np.searchsorted(self._ends, values)
        self._counts += np.bincount(bins, minlength=len(self._ends))
        self._tokens += np.bincount(bins, weights=values.astype(np.float64), minlength=len(self._ends))
        self._widen(low, high)

    def merge(self, other: LengthSketch) -> None:
        """Add all that `other` holds; the order of merges does not matter.

        Raises:
            LengthsError: The relative errors differ.
        """
        if other.relative_error != self.relative_error:
            raise LengthsError(
                f"cannot merge a sketch of relative error {other.relative_error} into one of {self.relative_error}; "
                "make both with the same."
            )
        self._counts += other._counts
        self._tokens += other._tokens
        if other.max_tokens:
            self._widen(other.min_tokens, other.max_tokens)

    def decay(self, factor: float) -> None:
        """Multiply the weight of everything in the sketch, so that later sequences count for more.

        Args:
            factor: Above 0, at most 1.

        Raises:
            LengthsError: `factor` is outside.
        """
        if not 0 < factor <= 1:
            raise LengthsError(f"the factor of a decay is {factor}; expected above 0 and at most 1.")
        self._counts *= factor
        self._tokens *= factor

    def copy(self) -> LengthSketch:
        """Return a sketch of the same content that changes on its own."""
        other = LengthSketch(relative_error=self.relative_error)
        other.merge(self)
        return other

    def quantile(self, q: ArrayLike) -> NDArray[np.float64]:
        """Return the lengths, in tokens, that at least the shares `q` of the sequences do not exceed.

        Args:
            q: Probabilities, 0 to 1, of any shape.

        Returns:
            Lengths of the shape of `q`, within the relative error of the nearest rank from below.

        Raises:
            LengthsError: The sketch is empty, or one of `q` is outside.
        """
        return self._quantile(self._counts, q)

    def token_quantile(self, q: ArrayLike) -> NDArray[np.float64]:
        """Return the lengths, in tokens, such that sequences up to there hold the shares `q` of all tokens.

        See `quantile` for arguments and errors.
        """
        return self._quantile(self._tokens, q)

    def tail(self, above: int) -> TailShare:
        """Return the shares of the sequences, and of their tokens, that are longer than `above` tokens.

        Exact where `above` is a power of two; elsewhere the lengths in the bin of `above` are taken as uniform.

        Raises:
            LengthsError: The sketch is empty.
        """
        self._require_content()
        if above < 1 or above >= self.max_tokens:
            share = float(above < 1)
            return TailShare(above, share, share)
        place = int(np.searchsorted(self._ends, above))
        low, high = self._lows()[place], self._ends[place]
        part = (high - above) / (high - low + 1)
        count = self._counts[place + 1 :].sum() + self._counts[place] * part
        tokens = self._tokens[place + 1 :].sum() + self._tokens[place] * part * (above + 1 + high) / (low + high)
        return TailShare(above, float(count / self.num_sequences), float(tokens / self.num_tokens))

    def cumulative_shares(self) -> NDArray[np.float64]:
        """Return the share of sequences up to the end of each bin; equal relative errors have equal bins."""
        self._require_content()
        return np.asarray(np.cumsum(self._counts) / self.num_sequences, dtype=np.float64)

    def profile(self) -> LengthProfile:
        """Summarise as `LengthProfile.of` does: exact but for p50, p90 and p99; weights are rounded after `decay`.

        Raises:
            LengthsError: The sketch is empty.
        """
        p50, p90, p99 = (round(float(q)) for q in self.quantile((0.5, 0.9, 0.99)))
        powers = range((self.min_tokens - 1).bit_length(), (self.max_tokens - 1).bit_length() + 1)
        return LengthProfile(
            num_sequences=round(self.num_sequences),
            num_tokens=round(self.num_tokens),
            min_tokens=self.min_tokens,
            p50_tokens=p50,
            p90_tokens=p90,
            p99_tokens=p99,
            max_tokens=self.max_tokens,
            mean_tokens=self.num_tokens / self.num_sequences,
            tails=tuple(self.tail(1 << power) for power in powers[:-1]),
            buckets=tuple(self._bucket(power) for power in powers),
        )

    def to_content(self) -> dict[str, Any]:
        """Return JSON content: bins that are not empty, as the longest length of the bin, sequences, tokens."""
        full = np.flatnonzero(self._counts)
        rows = zip(self._ends[full], self._counts[full], self._tokens[full], strict=True)
        return {
            "schema_version": SCHEMA_VERSION,
            "relative_error": self.relative_error,
            "min_tokens": self.min_tokens,
            "max_tokens": self.max_tokens,
            "bins": [[int(end), _plain(count), _plain(tokens)] for end, count, tokens in rows],
        }

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> LengthSketch:
        """Read what `to_content` gave, strictly.

        Raises:
            LengthsError: Malformed, or of another version.
        """
        keys = ("schema_version", "relative_error", "min_tokens", "max_tokens", "bins")
        check_keys(content, required=keys, optional=(), what="length sketch", error=LengthsError)
        version = as_int(content["schema_version"], "schema_version", LengthsError)
        if version != SCHEMA_VERSION:
            raise LengthsError(f"length sketch has schema_version {version}; expected {SCHEMA_VERSION}.")
        sketch = cls(relative_error=as_number(content["relative_error"], "relative_error", LengthsError))
        last = -1
        for row, item in enumerate(as_list(content["bins"], "bins", LengthsError)):
            last = sketch._read_bin(as_list(item, f"bins[{row}]", LengthsError), f"bins[{row}]", after=last)
        sketch.min_tokens = as_int(content["min_tokens"], "min_tokens", LengthsError)
        sketch.max_tokens = as_int(content["max_tokens"], "max_tokens", LengthsError)
        full = np.flatnonzero(sketch._counts)
        lows, ends = sketch._lows(), sketch._ends
        if len(full):
            fits = 1 <= sketch.min_tokens <= ends[full[0]] and lows[full[-1]] <= sketch.max_tokens <= 1 << MAX_POWER
        else:
            fits = sketch.min_tokens == sketch.max_tokens == 0
        if not fits:
            raise LengthsError(
                f"length sketch has min_tokens {sketch.min_tokens} and max_tokens {sketch.max_tokens}, which do not fit "
                "its bins; expected the file as it was written."
            )
        return sketch

    def _read_bin(self, row: list[Any], key: str, *, after: int) -> int:
        if len(row) != 3:
            raise LengthsError(f"{key} has {len(row)} values; expected a length, sequences and tokens.")
        end = as_int(row[0], f"{key}[0]", LengthsError, minimum=1)
        count = as_number(row[1], f"{key}[1]", LengthsError, positive=True)
        tokens = as_number(row[2], f"{key}[2]", LengthsError, positive=True)
        place = int(np.searchsorted(self._ends, end))
        if place >= len(self._ends) or self._ends[place] != end or place <= after:
            raise LengthsError(f"{key}[0] is {end}; expected the ends of bins, ascending, each once.")
        # Weights of a decayed sketch are rounded.
        if not self._lows()[place] * count * (1 - 1e-9) <= tokens <= end * count * (1 + 1e-9):
            raise LengthsError(f"{key} has {tokens} tokens in {count} sequences; no such lengths are in that bin.")
        self._counts[place], self._tokens[place] = count, tokens
        return place

    def _quantile(self, weights: NDArray[np.float64], q: ArrayLike) -> NDArray[np.float64]:
        self._require_content()
        wanted = np.asarray(q, dtype=np.float64)
        if not ((wanted >= 0) & (wanted <= 1)).all():
            raise LengthsError("a quantile's probability lies outside of 0 to 1; expected 0 to 1.")
        full = np.flatnonzero(weights)
        reached = np.cumsum(weights[full])
        # The product may come out a little above a whole rank that it stands for.
        ranks = wanted * reached[-1] * (1 - 1e-12)
        place = full[np.searchsorted(reached, ranks).clip(max=len(full) - 1)]
        low, high = self._lows()[place].astype(np.float64), self._ends[place].astype(np.float64)
        # The value whose relative error is the same at both ends of the bin.
        return np.asarray((2 * low * high / (low + high)).clip(self.min_tokens, self.max_tokens), dtype=np.float64)

    def _bucket(self, power: int) -> LengthBucket:
        low, high = (1 << (power - 1)) + 1 if power else 1, 1 << power
        inside = slice(int(np.searchsorted(self._ends, low)), int(np.searchsorted(self._ends, high)) + 1)
        count, tokens = float(self._counts[inside].sum()), float(self._tokens[inside].sum())
        return LengthBucket(
            low, high, round(count), round(tokens), count / self.num_sequences, tokens / self.num_tokens
        )

    def _widen(self, low: int, high: int) -> None:
        self.min_tokens = min(self.min_tokens or low, low)
        self.max_tokens = max(self.max_tokens, high)

    def _lows(self) -> NDArray[np.int64]:
        return np.concatenate([np.ones(1, dtype=np.int64), self._ends[:-1] + 1])

    def _require_content(self) -> None:
        if not self.max_tokens:
            raise LengthsError("there are no lengths in the sketch; expected at least one sequence.")


@lru_cache(maxsize=8)
def _bin_ends(relative_error: float) -> NDArray[np.int64]:
    """Longest length of each bin, ascending, the powers of two among them."""
    per_power = math.ceil(math.log(2) / math.log((1 + relative_error) / (1 - relative_error)))
    inner = np.exp2(np.arange(per_power * MAX_POWER) / per_power)
    ends = np.unique(np.concatenate([np.floor(inner).astype(np.int64), 1 << np.arange(MAX_POWER + 1)]))
    ends.flags.writeable = False
    return ends


def _plain(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)
