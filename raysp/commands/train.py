"""``raysp train``: run the configuration, show what happens, say at the end what happened and where to look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from raysp.commands.output import terminal
from raysp.config import Config, load_config
from raysp.tracking.console import ConsoleReporter, comparison_table, geometric_mean_speed_up

if TYPE_CHECKING:
    from raysp.cluster.driver import RunSummary


def run(config_path: Path, overrides: Sequence[str], resume: str | None) -> None:
    """Train.

    Args:
        config_path: TOML file.
        overrides: ``key=value`` of ``--set``.
        resume: ``--resume``; ``None`` keeps ``checkpoint.resume``.
    """
    config = load_config(config_path, [*overrides, *([f"checkpoint.resume={resume}"] if resume else [])])
    from raysp.cluster.driver import train

    console = terminal()
    summary = train(config, on_event=ConsoleReporter(console).handle)
    _print_summary(console, config, summary)


def _print_summary(console: Console, config: Config, summary: RunSummary) -> None:
    if summary.comparisons:
        console.print()
        console.print(comparison_table(summary.comparisons))
        ratio = geometric_mean_speed_up(summary.comparisons)
        other = summary.comparisons[0].other.policy
        largest = max(abs(row.run.loss / row.other.loss - 1) for row in summary.comparisons)
        verdict = "faster than" if ratio > 1.005 else "slower than" if ratio < 0.995 else "level with"
        console.print(
            f"{config.planner.policy} is {verdict} {other} on these batches: {ratio:.2f}x (geometric mean, measured); "
            f"the losses differ by at most {largest:.0e}.",
            highlight=False,
            soft_wrap=True,
        )
    console.print()
    steps = summary.last_step - summary.first_step
    if steps == 0:
        console.print(f"nothing to train: step {summary.last_step} of {config.train.num_steps} was already done")
    else:
        console.print(
            f"[bold]trained steps {summary.first_step + 1} to {summary.last_step}[/bold]: loss {summary.last_loss:.4f}, "
            f"{summary.num_tokens:,} tokens in {summary.train_time_s:.1f} s "
            f"({summary.num_tokens / summary.train_time_s:,.0f} tokens/s) on {config.cluster.num_workers} workers",
            highlight=False,
            soft_wrap=True,
        )
    if summary.checkpoint:
        console.print(f"  checkpoint   {summary.checkpoint}", highlight=False, soft_wrap=True)
    if summary.run_id:
        console.print(f"  MLflow run   {summary.run_id} in experiment {config.tracking.experiment!r}", highlight=False)
        console.print(
            f"  look at it   mlflow ui --backend-store-uri {summary.tracking_uri}", highlight=False, soft_wrap=True
        )
