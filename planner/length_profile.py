"""How long the sequences are: quantiles, the shares of the long tail, and a lengths file's reading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from planner.errors import LengthsError

# Lengths have fewer than 16 digits: their sums and squares stay within 64 bits and floats.
_LENGTH_DIGITS = 15
LENGTH_LIMIT = 10**_LENGTH_DIGITS


@dataclass(frozen=True)
class TailShare:
    """What lies above a power of two: how many sequences, how many tokens, as shares of all (0 to 1)."""

    above_tokens: int
    sequence_share: float
    token_share: float


@dataclass(frozen=True)
class LengthBucket:
    """One row of the histogram: lengths from `low` to `high` tokens, both included.

    Attributes:
        low: Shortest length of the row.
        high: Longest length of the row, a power of two.
        num_sequences: Sequences in it.
        num_tokens: Their tokens.
        sequence_share: Share of all sequences, 0 to 1.
        token_share: Share of all tokens, 0 to 1.
    """

    low: int
    high: int
    num_sequences: int
    num_tokens: int
    sequence_share: float
    token_share: float


@dataclass(frozen=True)
class LengthProfile:
    """Summary of a list of lengths, in tokens. Quantiles are lengths that occur (nearest rank from below)."""

    num_sequences: int
    num_tokens: int
    min_tokens: int
    p50_tokens: int
    p90_tokens: int
    p99_tokens: int
    max_tokens: int
    mean_tokens: float
    tails: tuple[TailShare, ...]
    buckets: tuple[LengthBucket, ...]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> LengthProfile:
        """Summarise `lengths`.

        Args:
            lengths: Tokens of every sequence, at least one, each at least 1.

        Raises:
            LengthsError: No lengths, or one below 1.
        """
        tokens = np.sort(np.asarray(lengths, dtype=np.int64))
        if len(tokens) == 0:
            raise LengthsError("there are no lengths; expected at least one sequence.")
        if tokens[0] < 1:
            raise LengthsError(f"a sequence has {tokens[0]} tokens; expected at least 1. Drop empty documents.")
        total = int(tokens.sum())
        p50, p90, p99 = (int(q) for q in np.quantile(tokens, (0.5, 0.9, 0.99), method="inverted_cdf"))
        buckets = _histogram(tokens, total)
        return cls(
            num_sequences=len(tokens),
            num_tokens=total,
            min_tokens=int(tokens[0]),
            p50_tokens=p50,
            p90_tokens=p90,
            p99_tokens=p99,
            max_tokens=int(tokens[-1]),
            mean_tokens=total / len(tokens),
            tails=tuple(_tail(tokens, total, bucket.high) for bucket in buckets[:-1]),
            buckets=buckets,
        )

    def rows(self) -> list[LengthBucket]:
        """Return the rows of a histogram table, shortest first, without gaps between the shortest and longest."""
        return list(self.buckets)


def read_lengths(path: str | Path, *, drop_empty: bool = False) -> list[int]:
    """Read a lengths file: one integer (tokens) per line; the sequence id is the 0-based line number.

    Args:
        path: Text file. A line break at the very end is fine, an empty line elsewhere is not: it would shift the ids.
        drop_empty: Leave out lengths of 0, instead of refusing them; the ids are then places in what is left.

    Raises:
        LengthsError: Unreadable or empty file, or a line that is not an integer of at least 1, with its number.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as cause:
        raise LengthsError(f"cannot read lengths file {path}: {cause}. Expected one integer per line.") from cause
    if not lines:
        raise LengthsError(f"lengths file {path} is empty; expected one integer (tokens) per line.")
    lengths = [_length_of(line, number, path, 0 if drop_empty else 1) for number, line in enumerate(lines, start=1)]
    kept = [length for length in lengths if length] if drop_empty else lengths
    if not kept:
        raise LengthsError(f"lengths file {path} has lengths of 0 only; expected at least one sequence with tokens.")
    return kept


def _length_of(line: str, number: int, path: str | Path, least: int) -> int:
    text = line.strip()
    # int() would take 1_000, +5 and digits of other scripts; a file that has them is not what it seems.
    if not (text.isascii() and text.isdigit()):
        shown = text if len(text) <= 40 else text[:37] + "..."
        hint = (
            "Drop empty documents." if text.removeprefix("-").isdigit() else "Expected one integer (tokens) per line."
        )
        raise LengthsError(f"{path} line {number} is {shown!r}; expected an integer of at least 1. {hint}")
    if len(text) > _LENGTH_DIGITS:
        raise LengthsError(f"{path} line {number} is {text[:40]}; expected fewer than 16 digits.")
    length = int(text)
    if length < least:
        raise LengthsError(f"{path} line {number} is {text}; expected an integer of at least 1. Drop empty documents.")
    return length


def _histogram(tokens: np.ndarray, total: int) -> tuple[LengthBucket, ...]:
    first, last = (int(edge - 1).bit_length() for edge in (tokens[0], tokens[-1]))
    buckets = []
    for power in range(first, last + 1):
        low, high = (1 << (power - 1)) + 1 if power else 1, 1 << power
        inside = tokens[np.searchsorted(tokens, low) : np.searchsorted(tokens, high, side="right")]
        held = int(inside.sum())
        buckets.append(LengthBucket(low, high, len(inside), held, len(inside) / len(tokens), held / total))
    return tuple(buckets)


def _tail(tokens: np.ndarray, total: int, above: int) -> TailShare:
    longer = tokens[np.searchsorted(tokens, above, side="right") :]
    return TailShare(above, len(longer) / len(tokens), int(longer.sum()) / total)
