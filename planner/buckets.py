"""Merging similar lengths into buckets, so that an integer program needs one variable per bucket and group.

A bucket stands for its sequences by the longest of them: what fits and is fast enough for the bucket does so for them.
The edges minimise the tokens that this overstates, by dynamic programming over the sorted distinct lengths:

    err[k][q] = min over j < k of err[j][q-1] + sum_{i=j+1..k} (s_k - s_i)

Source: FlexSP (arXiv:2412.01523), section 4.1 (sequence bucketing).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.errors import LengthsError


@dataclass(frozen=True)
class Bucket:
    """Sequences that one integer variable per group stands for.

    Attributes:
        length: The longest of them, in tokens; all count as this.
        members: Indices into the lengths that were bucketed, longest first.
    """

    length: int
    members: tuple[int, ...]


@dataclass(frozen=True)
class Bucketing:
    """Buckets by descending length.

    Attributes:
        buckets: None empty; every sequence in one.
        error_tokens: Tokens by which the buckets overstate their sequences.
        token_error: The same as a share of all tokens.
    """

    buckets: tuple[Bucket, ...]
    error_tokens: int
    token_error: float


def bucket_lengths(lengths: Sequence[int], num_buckets: int) -> Bucketing:
    """Merge `lengths` into at most `num_buckets` buckets with the least overstated tokens.

    With at least as many buckets as distinct lengths nothing is merged and the error is 0.

    Args:
        lengths: Tokens of every sequence, at least one.
        num_buckets: Buckets at most, at least 1.

    Raises:
        LengthsError: No lengths or no buckets.
    """
    if not lengths or num_buckets < 1:
        raise LengthsError(
            f"cannot put {len(lengths)} lengths into {num_buckets} buckets; expected at least 1 of both."
        )
    distinct, counts = np.unique(np.asarray(lengths, dtype=np.int64), return_counts=True)
    ends = _bucket_ends(distinct, counts, min(num_buckets, len(distinct)))
    members: list[list[int]] = [[] for _ in ends]
    place = np.searchsorted(distinct[ends], np.asarray(lengths, dtype=np.int64))
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        members[int(place[index])].append(index)
    buckets = tuple(Bucket(int(distinct[end]), tuple(ids)) for end, ids in zip(ends, members, strict=True))[::-1]
    total = sum(lengths)
    error = sum(bucket.length * len(bucket.members) for bucket in buckets) - total
    return Bucketing(buckets, error, error / total)


def _bucket_ends(distinct: np.ndarray, counts: np.ndarray, num_buckets: int) -> list[int]:
    """Return the index of the longest distinct length of every bucket, ascending."""
    size = len(distinct)
    num_before = np.concatenate([[0], np.cumsum(counts)])
    tokens_before = np.concatenate([[0], np.cumsum(counts * distinct)])
    # err[k] for the current q: the first k distinct lengths in q buckets. int64 is exact for any real corpus.
    unreachable = np.iinfo(np.int64).max // 4
    err = np.full(size + 1, unreachable, dtype=np.int64)
    err[0] = 0
    choices = np.zeros((num_buckets + 1, size + 1), dtype=np.int64)
    for q in range(1, num_buckets + 1):
        following = np.full(size + 1, unreachable, dtype=np.int64)
        for k in range(q, size + 1):
            j = slice(q - 1, k)
            overstated = distinct[k - 1] * (num_before[k] - num_before[j]) - (tokens_before[k] - tokens_before[j])
            candidates = err[j] + overstated
            best = int(np.argmin(candidates))
            following[k], choices[q, k] = candidates[best], best + q - 1
        err = following
    ends: list[int] = []
    k = size
    for q in range(num_buckets, 0, -1):
        ends.append(k - 1)
        k = int(choices[q, k])
    return ends[::-1]
