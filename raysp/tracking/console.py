"""The run as a person reads it in a terminal or a log file."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.table import Table

from raysp.tracking.events import (
    BatchCompared,
    CheckpointSaved,
    CostModelRefitted,
    Event,
    LengthsDrifted,
    LinksMeasured,
    PhaseProgressed,
    PhaseStarted,
    StepFinished,
    ValidationFinished,
    WarningRaised,
    rate_text,
)

_TABLE_STEPS = 50


class ConsoleReporter:
    """Prints events.

    Args:
        console: Where to.
        detail: ``"table"`` prints the groups of every step, ``"line"`` one line per step, ``"auto"`` the former for
            runs of up to 50 steps.
    """

    def __init__(self, console: Console, *, detail: str = "auto") -> None:
        self._console = console
        self._detail = detail
        self._phase = ""
        self._progress: tuple[Progress, TaskID] | None = None

    def handle(self, event: Event) -> None:
        """Print one event."""
        match event:
            case PhaseStarted():
                self._phase = event.text
                self._console.print(f"[dim]• {escape(event.text)}[/dim]", highlight=False)
            case PhaseProgressed():
                self._show_progress(event)
            case WarningRaised():
                self._console.print(f"[yellow]warning:[/yellow] {escape(event.text)}", highlight=False)
            case LinksMeasured():
                self._console.print(f"[dim]• {escape(links_text(event))}[/dim]", highlight=False)
            case StepFinished():
                self._step(event)
            case LengthsDrifted():
                self._console.print(f"  batch of step {event.step}: {escape(event.text)}", highlight=False)
            case CostModelRefitted():
                self._console.print(
                    f"  cost model {event.sha256[:12]} from step {event.step} on: {escape(event.text)}", highlight=False
                )
            case ValidationFinished():
                self._console.print(
                    f"  validation after step {event.step}: loss {event.loss:.4f} over {event.num_targets:,} tokens",
                    highlight=False,
                )
            case CheckpointSaved():
                self._console.print(f"  checkpoint after step {event.step}: {escape(event.path)}", highlight=False)
            case BatchCompared():
                pass  # shown together, by comparison_table

    def _show_progress(self, event: PhaseProgressed) -> None:
        """A bar while the phase lasts; it leaves no trace, in a log file in particular."""
        if self._progress is None:
            progress = Progress(console=self._console, transient=True, disable=not self._console.is_terminal)
            self._progress = progress, progress.add_task(escape(self._phase), total=event.total)
            progress.start()
        progress, task = self._progress
        progress.update(task, completed=event.done)
        if event.done >= event.total:
            progress.stop()
            self._progress = None

    def _step(self, event: StepFinished) -> None:
        mfu = f" · mfu {event.mfu:.1%}" if event.mfu is not None else ""
        self._console.print(
            f"[bold]step {event.step}/{event.num_steps}[/bold] loss {event.loss:.4f} · {event.num_tokens:,} tokens in "
            f"{event.num_sequences} sequences · predicted {event.predicted_step_time_s:.2f} s, measured "
            f"{event.step_time_s:.2f} s · {event.tokens_per_s:,.0f} tokens/s{mfu}",
            highlight=False,
        )
        if self._detail == "table" or (self._detail == "auto" and event.num_steps <= _TABLE_STEPS):
            self._console.print(step_table(event))


def links_text(event: LinksMeasured) -> str:
    """The links between workers in one line; nodes are named where there are several."""
    has_nodes = bool(event.of_kind(True))
    kinds = [(False, "inside nodes" if has_nodes else "between workers"), (True, "between nodes")]
    medians = ", ".join(
        f"{rate_text(event.median_bandwidth_bytes_per_s(crosses_nodes))} {where}"
        for crosses_nodes, where in kinds
        if event.of_kind(crosses_nodes)
    )
    if len(event.links) == 1:
        return f"links: {medians}"
    slowest = event.slowest
    ends = slowest.ends_text() if has_nodes else "ranks {} and {}".format(*slowest.ranks)
    return f"links: {medians}, slowest {rate_text(slowest.bandwidth_bytes_per_s)} between {ends}"


def step_table(event: StepFinished) -> Table:
    """The SP groups of one step: degree x count, method, sequences, tokens, predicted beside measured time."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("micro-batch", no_wrap=True)
    for heading in ("degree x count", "attention", "sequences", "tokens", "predicted s", "measured s"):
        table.add_column(heading, justify="left" if heading == "attention" else "right", no_wrap=True)
    for index, micro_batch in enumerate(event.micro_batches):
        for row, shape in enumerate(micro_batch.shapes):
            table.add_row(
                str(index + 1) if row == 0 else "",
                f"{shape.degree} x {shape.count}",
                shape.attention,
                f"{shape.num_sequences:,}",
                f"{shape.num_tokens:,}",
                f"{shape.predicted_time_s:.2f}",
                f"{micro_batch.measured_time_s:.2f}" if row == 0 else "",
            )
    return table


def comparison_table(rows: Sequence[BatchCompared]) -> Table:
    """The same batches under two policies: groups (degree x count, micro-batches apart by a bar), times, losses."""
    run, other = rows[0].run.policy, rows[0].other.policy
    table = Table(title=f"the same batches: {run} against {other}", header_style="bold", title_justify="left")
    table.add_column("batch", justify="right")
    for heading in ("policy", "groups"):
        table.add_column(heading)
    for heading in ("tokens", "longest", "predicted s", "measured s", "speed-up", "loss"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        speed_up = f"{row.other.measured_time_s / row.run.measured_time_s:.2f}x"
        for index, measured in enumerate((row.run, row.other)):
            table.add_row(
                str(row.batch) if index == 0 else "",
                measured.policy,
                measured.groups,
                f"{row.num_tokens:,}" if index == 0 else "",
                f"{row.longest:,}" if index == 0 else "",
                f"{measured.predicted_time_s:.2f}",
                f"{measured.measured_time_s:.2f}",
                speed_up if index == 0 else "",
                f"{measured.loss:.7f}",
            )
    return table


def geometric_mean_speed_up(rows: Sequence[BatchCompared]) -> float:
    """Of the other policy's measured time over the run's; above 1 the run's policy is faster."""
    logs = [math.log(row.other.measured_time_s / row.run.measured_time_s) for row in rows]
    return math.exp(sum(logs) / len(logs))
