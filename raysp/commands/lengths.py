"""``raysp lengths``: how long the sequences are, as a table and as a plot, and how two sources differ."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from planner import LengthDrift, LengthProfile, LengthSketch, compare_lengths, load_distribution
from raysp.commands.length_sources import distribution_of, read_length_source
from raysp.commands.output import print_json, terminal, write_file
from raysp.errors import InputError

_BAR_CHARS = 24
# What the table would print as 100 %.
_ALL = 0.99995
_SEQUENCES, _TOKENS = "#4477aa", "#cc6677"


@dataclass(frozen=True)
class _Source:
    title: str
    lengths: Sequence[int]
    profile: LengthProfile
    sketch: LengthSketch
    sampled_from: str | None

    @classmethod
    def read(cls, place: Path, *, seed: int, max_length: int | None, drop_empty: bool) -> _Source:
        lengths = read_length_source(place, seed=seed, max_length=max_length, drop_empty=drop_empty)
        return cls(str(place), lengths, LengthProfile.of(lengths), LengthSketch.of(lengths), distribution_of(place))

    def content(self) -> dict[str, Any]:
        return {**asdict(self.profile), "sampled_from": self.sampled_from}

    def describe(self, console: Console) -> None:
        profile = self.profile
        if self.sampled_from is not None:
            table = load_distribution(self.sampled_from)
            console.print(
                f"{self.title}: a sample of {profile.num_sequences:,} from the table that ships with raysp; "
                f"{table.num_sequences:,} documents, mean {table.mean_tokens:,.0f} tokens. Source: {table.source}, "
                f"{table.licence}",
                soft_wrap=True,
                markup=False,
            )
        console.print(
            f"{profile.num_sequences:,} sequences, {profile.num_tokens:,} tokens; length: min {profile.min_tokens:,}, "
            f"p50 {profile.p50_tokens:,}, mean {profile.mean_tokens:,.0f}, p90 {profile.p90_tokens:,}, "
            f"p99 {profile.p99_tokens:,}, max {profile.max_tokens:,}",
            soft_wrap=True,
        )


def lengths(
    source: Path,
    *,
    plot: Path | None,
    as_json: bool,
    max_length: int | None,
    drop_empty: bool,
    against: Path | None = None,
) -> None:
    """Show the lengths of a file, a dataset or a shipped distribution, and whether another source has the same.

    Raises:
        InputError: A dataset cannot be used, a source does not exist, or the plot is no PNG.
        planner.LengthsError: A lengths file is malformed.
    """
    if plot is not None and plot.suffix.lower() != ".png":
        raise InputError(f"--plot {plot} is not a .png file; expected a name that ends in .png. Change it.")
    shown = _Source.read(source, seed=0, max_length=max_length, drop_empty=drop_empty)
    other = drift = None
    if against is not None:
        # Another seed: a distribution against itself is two samples, not one.
        other = _Source.read(against, seed=1, max_length=max_length, drop_empty=drop_empty)
        drift = compare_lengths(shown.sketch, other.sketch)
    if plot is not None:
        compared = None if other is None else (other.title, other.lengths)
        write_file(plot, plot_png(shown.lengths, title=shown.title, against=compared))
    if as_json:
        difference = {"against": other.content(), "drift": _drift_content(drift)} if other and drift else {}
        print_json({**shown.content(), **difference})
        return
    console = terminal()
    shown.describe(console)
    console.print(profile_table(shown.profile))
    if other and drift:
        _print_drift(console, shown, other, drift)
    if plot is not None:
        console.print(f"plot written to {plot}", soft_wrap=True, markup=False)


def profile_table(profile: LengthProfile) -> Table:
    """The histogram: sequences and tokens by powers of two of the length."""
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("length (tokens)", justify="right")
    for heading in ("sequences", "share", "tokens", "share"):
        table.add_column(heading, justify="right")
    table.add_column("share of tokens")
    for row in profile.rows():
        table.add_row(
            f"{row.low:,} - {row.high:,}" if row.low < row.high else f"{row.high:,}",
            f"{row.num_sequences:,}",
            f"{row.sequence_share:.1%}",
            f"{row.num_tokens:,}",
            f"{row.token_share:.1%}",
            "█" * round(row.token_share * _BAR_CHARS),
        )
    return table


def drift_table(sketch: LengthSketch, other: LengthSketch) -> Table:
    """Shares of sequences and tokens above the powers of two, side by side with those of another source."""
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for heading in ("above (tokens)", "sequences", "against", "tokens", "against"):
        table.add_column(heading, justify="right")
    first = (min(sketch.min_tokens, other.min_tokens) - 1).bit_length()
    last = (max(sketch.max_tokens, other.max_tokens) - 1).bit_length()
    for power in range(first, last):
        mine, theirs = sketch.tail(1 << power), other.tail(1 << power)
        shares = (mine.sequence_share, theirs.sequence_share, mine.token_share, theirs.token_share)
        if min(shares) < _ALL:
            table.add_row(f"{1 << power:,}", *(f"{share:.2%}" for share in shares))
    return table


def plot_png(lengths: Sequence[int], *, title: str, against: tuple[str, Sequence[int]] | None = None) -> bytes:
    """A plot as PNG: shares of sequences and of tokens by powers of two, and below both cumulative shares.

    Args:
        lengths: Tokens of every sequence.
        title: What they are.
        against: Title and lengths of another source, dashed in the lower panel.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    profile = LengthProfile.of(lengths)
    rows = profile.rows()
    figure = Figure(figsize=(9, 7), layout="constrained")
    figure.suptitle(f"{title}: {profile.num_sequences:,} sequences, {profile.num_tokens:,} tokens", fontsize=11)
    histogram, curves = figure.subplots(2, 1, sharex=True)
    # A bar pair stands in the middle of its row of lengths, which ends at the power of two.
    middles = [row.high.bit_length() - 1.5 for row in rows]
    for shares, offset, label, colour in (
        ([row.sequence_share for row in rows], -0.21, "sequences", _SEQUENCES),
        ([row.token_share for row in rows], 0.21, "tokens", _TOKENS),
    ):
        histogram.bar([middle + offset for middle in middles], shares, width=0.4, color=colour, label=label)
    histogram.set_ylabel("share in each power of two")
    drawn = [(title, lengths, "-")] + ([(*against, "--")] if against else [])
    for name, values, style in drawn:
        suffix = f" ({name})" if against else ""
        for weights, label, colour in ((None, "sequences", _SEQUENCES), (values, "tokens", _TOKENS)):
            curves.plot(*_cumulative(values, weights), style, color=colour, label=label + suffix)
    curves.set_ylabel("cumulative share up to the length")
    curves.set_ylim(0, 1.02)
    longest = max(max(values) for _, values, _ in drawn)
    shortest = min(min(values) for _, values, _ in drawn)
    ticks = range(max(0, (shortest - 1).bit_length() - 1), (longest - 1).bit_length() + 1)
    curves.set_xticks(list(ticks), [_short(1 << power) for power in ticks], fontsize=9)
    curves.set_xlabel("sequence length in tokens (log2 scale)")
    for axes in (histogram, curves):
        axes.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _cumulative(lengths: Sequence[int], weights: Sequence[int] | None) -> tuple[np.ndarray, np.ndarray]:
    values = np.sort(np.asarray(lengths, dtype=np.int64))
    reached = np.arange(1, len(values) + 1) if weights is None else np.cumsum(values)
    # One point for each length that occurs; a plot shows no more than a few thousand of them.
    last = np.flatnonzero(np.diff(values, append=values[-1] + 1))
    last = last[np.unique(np.linspace(0, len(last) - 1, 4000).astype(int))]
    return np.log2(values[last]), reached[last] / reached[-1]


def _print_drift(console: Console, shown: _Source, other: _Source, drift: LengthDrift) -> None:
    console.print(f"\nagainst {other.title}", soft_wrap=True, markup=False)
    other.describe(console)
    console.print(drift_table(shown.sketch, other.sketch))
    console.print(drift.reason, soft_wrap=True, markup=False)


def _drift_content(drift: LengthDrift) -> dict[str, Any]:
    return {"drifted": drift.drifted, **asdict(drift)}


def _short(tokens: int) -> str:
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if tokens >= size:
            return f"{tokens // size}{unit}"
    return str(tokens)
