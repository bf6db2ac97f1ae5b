"""``raysp explain``: what bounds a plan, what its long sequences cost, and what would change that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

from planner import CostModel, PlanExplanation, explain_plan
from raysp.commands.output import print_json, terminal
from raysp.commands.plan import read_valid


def explain(
    plan_file: Path,
    lengths_file: Path,
    cost_model: CostModel,
    *,
    what_if_time_limit_s: float | None,
    node_limit: int | None,
    as_json: bool,
) -> None:
    """Explain a plan; ``what_if_time_limit_s`` none: without what-ifs.

    Raises:
        InputError: The plan is not valid for the batch.
    """
    made, lengths = read_valid(plan_file, lengths_file, cost_model)
    errors = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("planning again: {task.description}"))
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("", total=None)
        explanation = explain_plan(
            made,
            lengths,
            cost_model,
            with_what_ifs=what_if_time_limit_s is not None,
            what_if_time_limit_s=what_if_time_limit_s or 0.0,
            node_limit=node_limit,
            on_progress=lambda what: progress.update(task, description=what),
        )
    if as_json:
        print_json(explanation.to_content())
        return
    _show(explanation)


def micro_batch_table(explanation: PlanExplanation) -> Table:
    """One row for each micro-batch: its slowest group, and where that group's time goes."""
    headings = ("s", "groups (count x degree)", "tokens", "idle", "slowest", "quad/lin/comm/fixed %")
    table = _table("micro-batch", right=headings)
    for number, item in enumerate(explanation.micro_batches):
        total_s = item.parts.total_s
        table.add_row(
            str(number),
            f"{item.time_s:.3f}",
            " + ".join(f"{count}x{degree}" for degree, count in item.shape),
            f"{item.num_tokens:,}",
            f"{item.idle_share:.0%}",
            f"degree {item.bottleneck.degree}{' across nodes' if item.spans_nodes else ''}",
            " / ".join(f"{part_s / total_s:.0%}".rstrip("%") for part_s in item.parts) if total_s > 0 else "-",
        )
    return table


def sequence_table(explanation: PlanExplanation) -> Table:
    """One row for each long sequence: what it costs."""
    headings = (
        "tokens",
        "micro-batch",
        "degree",
        "s",
        "of group",
        "GPU time",
        "cost/token",
        "saves s",
        "replanned s",
    )
    table = _table("sequence", right=headings)
    for item in explanation.long_sequences:
        table.add_row(
            str(item.sequence),
            f"{item.num_tokens:,}",
            str(item.micro_batch),
            str(item.degree),
            f"{item.time_s:.3f}",
            f"{item.group_share:.0%}",
            f"{item.gpu_time_share:.1%}",
            f"{item.relative_cost_per_token:.2f}x",
            f"{item.saved_s:.3f}",
            "" if item.replanned_saved_s is None else f"{item.replanned_saved_s:.3f}",
        )
    return table


def what_if_table(explanation: PlanExplanation) -> Table:
    """One row for each changed condition."""
    table = _table("what if", right=("step s", "change"), left=("note",))
    for row in explanation.what_ifs:
        # Why a synchronisation wins has a line of its own.
        told = row.name.startswith("sync-") and explanation.sync_comparison is not None
        time = "-" if row.step_time_s is None else f"{row.step_time_s:.3f}"
        table.add_row(row.what, time, row.change_text(), "" if told else row.note)
    return table


def alternative_table(explanation: PlanExplanation) -> Table:
    """One row for each policy that uses one degree for the batch."""
    table = _table("policy", right=("step s", "/ this plan"))
    for other in explanation.alternatives:
        if other.time_s is None:
            table.add_row(other.policy, "does not fit", "-")
        else:
            ratio = f"{other.time_s / explanation.step_time_s:.2f}x" if explanation.step_time_s > 0 else "-"
            table.add_row(other.policy, f"{other.time_s:.3f}", ratio)
    return table


def _show(explanation: PlanExplanation) -> None:
    console = terminal()

    def line(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    line(explanation.summary_line())
    console.print(micro_batch_table(explanation))
    for number, item in enumerate(explanation.micro_batches):
        line(f"why {number}: {item.why()}")
    for text in explanation.rank_lines():
        line(text)
    line("\nlong sequences (what the step saves without one of them, the others where they are):")
    console.print(sequence_table(explanation))
    if explanation.what_ifs:
        line(f"\n{explanation.what_if_heading()}")
        console.print(what_if_table(explanation))
    if explanation.sync_comparison is not None:
        line(f"sync: {explanation.sync_comparison.reason}")
    line("\none degree for the whole batch:")
    console.print(alternative_table(explanation))


def _table(first: str, *, right: Sequence[str], left: Sequence[str] = ()) -> Table:
    table = Table(box=None, padding=(0, 2), collapse_padding=True, header_style="bold")
    table.add_column(first)
    for heading in right:
        table.add_column(heading, justify="right")
    for heading in left:
        table.add_column(heading, overflow="fold")
    return table
