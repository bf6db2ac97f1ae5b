"""Lengths: profile, file reading, buckets, micro-batch splits."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import LengthProfile, LengthsError, bucket_lengths, read_lengths
from planner.micro_batches import candidate_counts, split_contiguous

MANY = st.lists(st.integers(1, 300), min_size=1, max_size=40)
FEW = st.lists(st.integers(1, 60), min_size=1, max_size=7)


def test_profile_of_known_lengths() -> None:
    profile = LengthProfile.of([1, 2, 3, 4, 5, 6, 7, 8, 9, 955])
    assert (profile.num_sequences, profile.num_tokens, profile.mean_tokens) == (10, 1000, 100.0)
    assert (profile.min_tokens, profile.p50_tokens, profile.p90_tokens, profile.p99_tokens) == (1, 5, 9, 955)
    assert profile.max_tokens == 955
    tails = {tail.above_tokens: tail for tail in profile.tails}
    assert tails[8].sequence_share == 0.2
    assert tails[8].token_share == 0.964
    assert [row.high for row in profile.rows()] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]


@given(MANY)
def test_histogram_covers_every_sequence_once(lengths: list[int]) -> None:
    rows = LengthProfile.of(lengths).rows()
    assert sum(row.num_sequences for row in rows) == len(lengths)
    assert sum(row.num_tokens for row in rows) == sum(lengths)
    assert sum(row.token_share for row in rows) == pytest.approx(1.0)
    assert all(right.low == left.high + 1 for left, right in itertools.pairwise(rows))
    assert rows[0].low <= min(lengths) <= rows[0].high
    assert rows[-1].low <= max(lengths) <= rows[-1].high


@pytest.mark.parametrize("lengths", [[], [0], [5, -1]])
def test_profile_refuses_empty_and_non_positive(lengths: list[int]) -> None:
    with pytest.raises(LengthsError):
        LengthProfile.of(lengths)


def test_lengths_file_is_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text("5\n 17 \n3")
    assert read_lengths(path) == [5, 17, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("5\n0\n", "line 2 is 0"),
        ("5\n-3\n", "line 2 is '-3'"),
        ("5\n\n6\n", "line 2 is ''"),
        ("5\nabc\n", "line 2 is 'abc'"),
        ("1.5\n", r"line 1 is '1\.5'"),
        ("1_000\n", "line 1 is '1_000'"),
        ("9" * 30, "fewer than 16 digits"),
    ],
)
def test_malformed_lengths_file_names_line_and_value(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text(text)
    with pytest.raises(LengthsError, match=message):
        read_lengths(path)


def test_byte_order_mark_is_no_length_and_empty_documents_are_dropped_on_request(tmp_path: Path) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text("\ufeff5\n0\n7\n", encoding="utf-8")
    assert read_lengths(path, drop_empty=True) == [5, 7]
    with pytest.raises(LengthsError, match="line 2 is 0; expected an integer of at least 1"):
        read_lengths(path)
    path.write_text("0\n0\n")
    with pytest.raises(LengthsError, match="lengths of 0 only"):
        read_lengths(path, drop_empty=True)


def test_missing_and_binary_lengths_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LengthsError, match="cannot read"):
        read_lengths(tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LengthsError, match="cannot read"):
        read_lengths(tmp_path / "binary")


@settings(max_examples=60, deadline=None)
@given(lengths=FEW, num_buckets=st.integers(1, 5))
def test_buckets_overstate_as_little_as_any_cut(lengths: list[int], num_buckets: int) -> None:
    bucketing = bucket_lengths(lengths, num_buckets)
    ordered = sorted(lengths)
    cuts = (
        c
        for parts in range(num_buckets)
        for c in itertools.combinations(range(1, len(ordered)), min(parts, len(ordered) - 1))
    )
    best = min(
        sum((right - left) * ordered[right - 1] for left, right in itertools.pairwise([0, *cut, len(ordered)]))
        for cut in cuts
    )
    assert bucketing.error_tokens == best - sum(lengths)
    assert bucketing.token_error == pytest.approx((best - sum(lengths)) / sum(lengths))


@given(lengths=MANY, num_buckets=st.integers(1, 50))
def test_buckets_hold_every_sequence_once_and_never_understate(lengths: list[int], num_buckets: int) -> None:
    bucketing = bucket_lengths(lengths, num_buckets)
    assert sorted(i for b in bucketing.buckets for i in b.members) == list(range(len(lengths)))
    assert len(bucketing.buckets) <= num_buckets
    assert all(max(lengths[i] for i in b.members) == b.length for b in bucketing.buckets)
    if num_buckets >= len(set(lengths)):
        assert bucketing.error_tokens == 0


def test_buckets_refuse_nothing_to_do() -> None:
    with pytest.raises(LengthsError):
        bucket_lengths([], 3)
    with pytest.raises(LengthsError):
        bucket_lengths([5], 0)


@settings(max_examples=60, deadline=None)
@given(lengths=FEW, count=st.integers(1, 7))
def test_split_is_contiguous_and_levels_the_tokens(lengths: list[int], count: int) -> None:
    runs = split_contiguous(lengths, count)
    assert [i for run in runs for i in range(run.start, run.stop)] == list(range(len(lengths)))
    assert 1 <= len(runs) <= count
    best = min(
        max(sum(lengths[left:right]) for left, right in itertools.pairwise([0, *cut, len(lengths)]))
        for parts in range(min(count, len(lengths)))
        for cut in itertools.combinations(range(1, len(lengths)), parts)
    )
    assert max(sum(lengths[run]) for run in runs) == best


def test_counts_rise_from_the_minimum_to_one_sequence_each() -> None:
    assert list(candidate_counts(3, 40)) == [3, 4, 5, 6, 7, 14, 28, 40]
    assert list(candidate_counts(1, 1)) == [1]
    assert list(candidate_counts(9, 2)) == [2]
