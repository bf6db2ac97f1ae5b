"""Tables, targets and the plot of the attention benchmark, from its rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.attention_cases import DENSE, ERROR, MEMORY, SPEED, tokens_text
from benchmarks.attention_simulation import simulation_markdown
from benchmarks.attention_targets import Target, case_key

Row = dict[str, Any]
_SPEED_HEADINGS = (
    "row", "kernel", "forward ms", "share", "both ms", "share", "above ideal ms", "sent MB", "peak MB", "formula MB",
)  # fmt: skip
_ERROR_HEADINGS = ("row", "kernel", "out", "dq", "dk", "dv", "largest / one GPU")
_MEMORY_HEADINGS = ("row", "kernel", "steps", "growth bytes", "peak MB", "formula MB", "peak / formula")
_HEADINGS = {SPEED: _SPEED_HEADINGS, ERROR: _ERROR_HEADINGS, MEMORY: _MEMORY_HEADINGS}
_COLOURS = (
    "#332288",
    "#117733",
    "#44aa99",
    "#88ccee",
    "#ddaa33",
    "#cc6677",
    "#882255",
    "#aa4499",
    "#999999",
    "#000000",
)


def show_case(name: str, rows: Sequence[Row], console: Console) -> None:
    """Print the table of one case; ``rows`` are judged."""
    made = [row for row in rows if "failure" not in row]
    if made:
        headings = _HEADINGS[made[0]["kind"]]
        table = Table(title=name, title_justify="left", box=None, padding=(0, 2), header_style="bold")
        for place, heading in enumerate(headings):
            table.add_column(heading, justify="left" if place < 2 else "right")
        for row in _sorted(made):
            table.add_row(*_cells(row))
        console.print(table)
    for reason, labels in _failures(rows).items():
        console.print(f"not run, {reason}: {', '.join(labels)}", style="dim", markup=False, highlight=False)


def show_targets(lines: Sequence[Target], console: Console) -> None:
    """Print what is met and what is not."""
    for line in lines:
        console.print(str(line), style="green" if line.is_met else "red", markup=False, highlight=False)


def markdown(result: dict[str, Any]) -> str:
    """The whole result as a document."""
    lines = [f"`{result['command']}` at {result['commit']} on {result['hardware']}; torch {result['torch']}.", ""]
    if "simulation" in result:
        return "\n".join([*lines, *simulation_markdown(result["simulation"])]) + "\n"
    for link, speed in result["links"].items():
        if speed:
            rate, latency = speed["bytes_per_s"] / 2**30, speed["latency_s"] * 1e6
            lines.append(f"- {link}: {rate:.1f} GiB/s each way at once, {latency:.0f} us for 1 KiB")
    lines += [f"- {line}" for line in result["targets"]]
    lines += [
        "",
        f"Causal, {result['degree']} ranks. Times are medians of {result['rounds']} interleaved measurements, of the slowest "
        "rank. `share`: one GPU's time for the whole problem on the same kernel / ranks / time. `both`: forward and "
        "backward. `above ideal`: both, less its ideal. `sent`: by each rank in both. `peak`: beyond the inputs, in both.",
    ]
    for rows in _by_case(result["rows"]).values():
        first = rows[0]
        kind = {SPEED: "", ERROR: ", error against fp64", MEMORY: ", many steps"}[first["kind"]]
        what = "one document" if first["mix"] == DENSE else f"{first['num_documents']} documents of {first['mix']}"
        title = (
            f"{first['link']}, {first['heads']} heads, {tokens_text(first['tokens_per_rank'])} per rank, {what}{kind}"
        )
        lines += ["", f"## {title}", ""]
        made = _sorted(row for row in rows if "failure" not in row)
        lines += _markdown_table(_HEADINGS[first["kind"]], map(_cells, made)) if made else []
        lines += ["", *(f"Not run, {reason}: {', '.join(names)}." for reason, names in _failures(rows).items())]
    return "\n".join(lines).rstrip() + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Share of the ideal over tokens per rank: a panel for each link and mix, for the first heads and kernel."""
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["kind"] == SPEED and "both_share" in row]
    if not rows:
        return
    heads, kernel = rows[0]["heads"], rows[0]["kernel"]
    rows = [row for row in rows if row["heads"] == heads and row["kernel"] == kernel and row["name"] != "one GPU"]
    links, mixes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("link", "mix"))
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure = Figure(figsize=(4.2 * len(mixes) + 2.5, 3.4 * len(links) + 0.4), layout="constrained")
    panels = figure.subplots(max(1, len(links)), max(1, len(mixes)), squeeze=False, sharex=True)
    handles: dict[str, Any] = {}
    for line, link in enumerate(links):
        for column, mix in enumerate(mixes):
            axes = panels[line][column]
            for place, name in enumerate(names):
                points = sorted(
                    (row["tokens_per_rank"], row["both_share"])
                    for row in rows
                    if (row["link"], row["mix"], row["name"]) == (link, mix, name)
                )
                if not points:
                    continue
                is_ours = name.startswith("raysp")
                handles[name] = axes.plot(
                    *zip(*points, strict=True), "-" if is_ours else "--", marker="o" if is_ours else "x", markersize=4,
                    color=_COLOURS[place % len(_COLOURS)], linewidth=2.5 if name == "raysp auto" else 1.2,
                )[0]  # fmt: skip
            axes.axhline(1.0, color="black", linewidth=0.8)
            axes.set_xscale("log", base=2)
            ticks = sorted({row["tokens_per_rank"] for row in rows})
            axes.set_xticks(ticks, [tokens_text(tick) for tick in ticks], minor=False)
            axes.set_ylim(0, 1.05)
            axes.grid(alpha=0.3)
            axes.set_title(f"{link}, {mix}", fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("tokens per rank")
    for axes in panels[:, 0]:
        axes.set_ylabel("share of ideal, both")
    figure.suptitle(f"{result['hardware']}: {heads} heads, {kernel}, forward and backward", fontsize=11)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=120)


def _by_case(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(case_key(row), []).append(row)
    return cases


def _sorted(rows: Iterable[Row]) -> list[Row]:
    """By kernel, the fastest first."""
    return sorted(rows, key=lambda row: (row["kernel"], row.get("both_s", 0.0), row["name"]))


def _failures(rows: Sequence[Row]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if "failure" in row:
            reasons.setdefault(row["failure"], []).append(f"{row['name']} ({row['kernel']})")
    return reasons


def _cells(row: Row) -> list[str]:
    labels = [row["name"], row["kernel"]]
    if row["kind"] == ERROR:
        return [*labels, *(f"{error:.2e}" for error in row["rms_error"].values()), _ratio(row.get("rms_ratio"))]
    memory = [_megabytes(row.get("peak_bytes")), _megabytes(row.get("formula_bytes"))]
    if row["kind"] == MEMORY:
        fit = row["peak_bytes"] / row["formula_bytes"] if row.get("formula_bytes") else None
        return [*labels, str(row["num_steps"]), str(row["growth_bytes"]), *memory, _ratio(fit)]
    above = row.get("both_above_ideal_s")
    return [
        *labels,
        f"{row['forward_s'] * 1e3:.3f}",
        _percent(row.get("forward_share")),
        f"{row['both_s'] * 1e3:.3f}",
        _percent(row.get("both_share")),
        "-" if above is None else f"{above * 1e3:.3f}",
        _megabytes(row.get("sent_both_bytes")),
        *memory,
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _megabytes(value: float | None) -> str:
    return f"{value / 1e6:.1f}" if value else "-"


def _markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)]
