"""A distribution of sequence lengths as a quantile table: its quantiles, tails and samples, and its strict JSON.

Between two points of the table the logarithm of the length is linear in the probability, that is, lengths are
log-uniform there; all figures follow from that by integration. The tables that ship are in
`planner.distribution_library`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.errors import LengthsError
from planner.length_profile import TailShare
from planner.strict_json import as_int, as_list, as_number, as_str, check_keys, parse_object

SCHEMA_VERSION = 1

_TEXTS = ("name", "source", "licence", "derivation")
_KEYS = (*_TEXTS, "schema_version", "num_sequences", "mean_tokens", "quantiles")


@dataclass(frozen=True, kw_only=True)
class LengthDistribution:
    """Quantiles of the lengths of a corpus, with where they come from.

    Attributes:
        name: What `planner.load_distribution` takes.
        num_sequences: Sequences that the table was made from.
        mean_tokens: Their mean length, in tokens; `table_mean_tokens` is that of the table.
        source: Where the lengths were published.
        licence: SPDX identifier of that publication.
        derivation: How the table was made from them, for people.
        probabilities: Ascending from 0 to 1.
        lengths: Length in tokens below which that share of the sequences lies; not descending, each at least 1.
    """

    name: str
    num_sequences: int
    mean_tokens: float
    source: str
    licence: str
    derivation: str
    probabilities: tuple[float, ...]
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the table.

        Raises:
            LengthsError: It is malformed.
        """
        shares = np.asarray(self.probabilities, dtype=np.float64)
        tokens = np.asarray(self.lengths, dtype=np.int64)
        if len(shares) != len(tokens) or len(shares) < 2:
            raise LengthsError(
                f"distribution {self.name} has {len(shares)} probabilities and {len(tokens)} lengths; expected as many "
                "of both, at least 2."
            )
        if shares[0] != 0 or shares[-1] != 1 or (np.diff(shares) <= 0).any():
            raise LengthsError(f"distribution {self.name}: probabilities must ascend from 0 to 1.")
        if tokens[0] < 1 or (np.diff(tokens) < 0).any():
            raise LengthsError(f"distribution {self.name}: lengths must not descend and be at least 1.")

    def quantile(self, u: ArrayLike) -> NDArray[np.int64]:
        """Return the lengths below which the shares `u` of the sequences lie, in tokens, of the shape of `u`.

        Args:
            u: Probabilities, 0 to 1.

        Raises:
            LengthsError: One of `u` lies outside.
        """
        wanted = np.asarray(u, dtype=np.float64)
        if not ((wanted >= 0) & (wanted <= 1)).all():
            raise LengthsError("a quantile's probability lies outside of 0 to 1; expected 0 to 1.")
        exact = np.exp(np.interp(wanted, self._shares, self._logs))
        return np.asarray(np.rint(exact).clip(self.lengths[0], self.lengths[-1]), dtype=np.int64)

    def sample(self, num: int, *, seed: int, max_length: int | None = None, min_length: int = 1) -> NDArray[np.int64]:
        """Draw sequence lengths; equal arguments give equal lengths.

        Args:
            num: Sequences to return.
            seed: Of numpy's default generator.
            max_length: Longer documents are split by `split_lengths`, never dropped; none splits nothing.
            min_length: Shortest document to draw: the distribution is that of the documents with at least this many
                tokens. The rest of a split document may be shorter.

        Returns:
            `num` lengths in tokens, in the order drawn, the pieces of a document side by side.

        Raises:
            LengthsError: `num` is negative, `max_length` below 1, or no document has `min_length` tokens.
        """
        if num < 0:
            raise LengthsError(f"cannot draw {num} lengths; expected at least 0.")
        if min_length > self.lengths[-1]:
            raise LengthsError(
                f"min_length is {min_length}, but the longest document of {self.name} has {self.lengths[-1]} tokens; "
                "lower it."
            )
        lowest = 1 - self.tail(min_length - 1).sequence_share
        drawn = np.random.default_rng(seed).random(num)
        documents = self.quantile(lowest + (1 - lowest) * drawn).clip(min=min_length)
        return documents if max_length is None else split_lengths(documents, max_length)[:num]

    @cached_property
    def table_mean_tokens(self) -> float:
        """Mean length of the table, in tokens, by integration."""
        return float(self._masses.sum())

    def tail(self, above: int) -> TailShare:
        """Return the shares of the sequences, and of their tokens, that are longer than `above` tokens."""
        if above < self.lengths[0]:
            return TailShare(above, 1.0, 1.0)
        if above >= self.lengths[-1]:
            return TailShare(above, 0.0, 0.0)
        segment = int(np.searchsorted(self._logs, np.log(above), side="right")) - 1
        step = (np.log(above) - self._logs[segment]) / (self._logs[segment + 1] - self._logs[segment])
        left = self._shares[segment]
        share = left + step * (self._shares[segment + 1] - left)
        below = self._masses[:segment].sum() + _mass(share - left, np.float64(self.lengths[segment]), np.float64(above))
        return TailShare(above, float(1 - share), float(1 - below / self._masses.sum()))

    @cached_property
    def tails(self) -> tuple[TailShare, ...]:
        """What lies above each power of two, from the shortest length to the longest."""
        powers = range((self.lengths[0] - 1).bit_length(), (self.lengths[-1] - 1).bit_length())
        return tuple(self.tail(1 << power) for power in powers)

    def to_json(self) -> str:
        """Return the JSON text: one quantile on each line."""
        head = {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "source": self.source,
            "licence": self.licence,
            "derivation": self.derivation,
            "num_sequences": self.num_sequences,
            "mean_tokens": self.mean_tokens,
        }
        rows = ",\n".join(
            f"    [{share!r}, {length}]" for share, length in zip(self.probabilities, self.lengths, strict=True)
        )
        text = json.dumps(head, indent=2, allow_nan=False)
        return f'{text[:-2]},\n  "quantiles": [\n{rows}\n  ]\n}}\n'

    @classmethod
    def from_json(cls, text: str, *, what: str = "distribution") -> LengthDistribution:
        """Read a distribution strictly.

        Args:
            text: What `to_json` wrote.
            what: What it is, for the message of an error.

        Raises:
            LengthsError: Malformed.
        """
        content = parse_object(text, what=what, error=LengthsError)
        check_keys(content, required=_KEYS, optional=(), what=what, error=LengthsError)
        version = as_int(content["schema_version"], "schema_version", LengthsError)
        if version != SCHEMA_VERSION:
            raise LengthsError(f"{what} has schema_version {version}; expected {SCHEMA_VERSION}. Build it again.")
        points = [
            _point(row, f"quantiles[{i}]")
            for i, row in enumerate(as_list(content["quantiles"], "quantiles", LengthsError))
        ]
        return cls(
            **{key: as_str(content[key], key, LengthsError) for key in _TEXTS},
            num_sequences=as_int(content["num_sequences"], "num_sequences", LengthsError, minimum=1),
            mean_tokens=as_number(content["mean_tokens"], "mean_tokens", LengthsError, positive=True),
            probabilities=tuple(share for share, _ in points),
            lengths=tuple(length for _, length in points),
        )

    @cached_property
    def _shares(self) -> NDArray[np.float64]:
        return np.asarray(self.probabilities, dtype=np.float64)

    @cached_property
    def _logs(self) -> NDArray[np.float64]:
        return np.log(np.asarray(self.lengths, dtype=np.float64))

    @cached_property
    def _masses(self) -> NDArray[np.float64]:
        """Tokens of each segment, per sequence of the distribution."""
        edges = np.asarray(self.lengths, dtype=np.float64)
        return _mass(np.diff(self._shares), edges[:-1], edges[1:])


def split_lengths(lengths: ArrayLike, max_length: int) -> NDArray[np.int64]:
    """Split lengths above `max_length` into pieces of `max_length` and the rest; the tokens stay the same.

    Args:
        lengths: Tokens of every document.
        max_length: Tokens that a sequence may have; at least 1.

    Returns:
        Lengths in tokens: the pieces of each document side by side, the rest last.

    Raises:
        LengthsError: `max_length` is below 1.
    """
    if max_length < 1:
        raise LengthsError(f"max_length is {max_length}; expected at least 1. Raise it, or leave it out.")
    documents = np.asarray(lengths, dtype=np.int64)
    counts = -(-documents // max_length)
    pieces = np.full(int(counts.sum()), max_length, dtype=np.int64)
    pieces[np.cumsum(counts) - 1] = documents - (counts - 1) * max_length
    return pieces


def _mass(share: Any, low: Any, high: Any) -> NDArray[np.float64]:
    """Integrate log-uniform lengths from `low` to `high` over a probability of `share`."""
    ratio = np.log(np.maximum(high, low) / low)
    safe = np.where(ratio > 0, ratio, 1.0)
    return np.asarray(share * np.where(ratio > 0, (high - low) / safe, low), dtype=np.float64)


def _point(row: Any, key: str) -> tuple[float, int]:
    pair = as_list(row, key, LengthsError)
    if len(pair) != 2:
        raise LengthsError(f"{key} has {len(pair)} values; expected a probability and a length.")
    return as_number(pair[0], f"{key}[0]", LengthsError), as_int(pair[1], f"{key}[1]", LengthsError, minimum=1)
