"""``raysp lengths``: how long the sequences are, as a table and as a plot."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from planner import LengthProfile, read_lengths
from raysp.commands.output import print_json, terminal, write_file
from raysp.errors import InputError

_BAR_CHARS = 24


def lengths(source: Path, *, plot: Path | None, as_json: bool, max_length: int | None, drop_empty: bool) -> None:
    """Show the distribution of a lengths file, a Parquet file or a dataset folder.

    Raises:
        InputError: The dataset cannot be used, or the plot is no PNG.
        planner.LengthsError: The lengths file is malformed.
    """
    if plot is not None and plot.suffix.lower() != ".png":
        raise InputError(f"--plot {plot} is not a .png file; expected a name that ends in .png. Change it.")
    values = _read(source, max_length=max_length, drop_empty=drop_empty)
    profile = LengthProfile.of(values)
    if plot is not None:
        write_file(plot, plot_png(profile, title=str(source)))
    if as_json:
        print_json(asdict(profile))
        return
    console = terminal()
    console.print(
        f"{profile.num_sequences:,} sequences, {profile.num_tokens:,} tokens; length: min {profile.min_tokens:,}, "
        f"p50 {profile.p50_tokens:,}, mean {profile.mean_tokens:,.0f}, p90 {profile.p90_tokens:,}, "
        f"p99 {profile.p99_tokens:,}, max {profile.max_tokens:,}",
        soft_wrap=True,
    )
    console.print(profile_table(profile))
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


def plot_png(profile: LengthProfile, *, title: str) -> bytes:
    """The histogram as a PNG: sequences above, tokens below, over the length in powers of two."""
    from matplotlib.figure import Figure

    rows = profile.rows()
    figure = Figure(figsize=(8, 6), layout="constrained")
    figure.suptitle(f"{title}: {profile.num_sequences:,} sequences, {profile.num_tokens:,} tokens", fontsize=11)
    places = range(len(rows))
    panels = figure.subplots(2, 1, sharex=True)
    for axes, counts, label, colour in (
        (panels[0], [row.num_sequences for row in rows], "sequences", "#4477aa"),
        (panels[1], [row.num_tokens for row in rows], "tokens", "#cc6677"),
    ):
        axes.bar(places, counts, width=0.9, color=colour)
        axes.set_ylabel(label)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    panels[1].set_xticks(list(places), [_short(row.high) for row in rows])
    panels[1].set_xlabel("sequence length in tokens, up to (log2 scale; each bar starts above the one before)")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _read(source: Path, *, max_length: int | None, drop_empty: bool) -> Sequence[int]:
    if source.is_dir() or source.suffix == ".parquet":
        from raysp.data.dataset import TokenDataset

        dataset = TokenDataset.open(source, max_length=max_length, drop_empty=drop_empty)
        return [int(length) for length in dataset.sequence_lengths]
    return read_lengths(source)


def _short(tokens: int) -> str:
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if tokens >= size:
            return f"{tokens // size}{unit}"
    return str(tokens)
