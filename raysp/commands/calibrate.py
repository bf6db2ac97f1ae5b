"""``raysp calibrate``: measure the cost model of a configuration's model on its workers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from raysp.commands.output import terminal
from raysp.config import load_config
from raysp.tracking.console import ConsoleReporter


def run(config_path: Path, overrides: Sequence[str], output: Path) -> None:
    """Measure, show the residuals, write the cost model.

    Args:
        config_path: TOML file.
        overrides: ``key=value`` of ``--set``.
        output: JSON file to write.
    """
    config = load_config(config_path, overrides)
    from raysp.cluster.driver import measure_cost_model

    console = terminal()
    fit = measure_cost_model(config, on_event=ConsoleReporter(console).handle)
    table = Table(title="measured and fitted", title_justify="left")
    for heading in ("degree", "sequences", "tokens", "longest", "measured s", "fitted s", "error"):
        table.add_column(heading, justify="right")
    for residual in fit.residuals:
        sample = residual.sample
        table.add_row(
            str(sample.degree),
            str(len(sample.lengths)),
            f"{sum(sample.lengths):,}",
            f"{max(sample.lengths):,}",
            f"{sample.time_s:.3f}",
            f"{residual.predicted_s:.3f}",
            f"{residual.relative_error:+.1%}",
        )
    console.print(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    fit.cost_model.save(output)
    console.print(f'cost model written to {output}; use it with planner.cost_model = "{output}"', soft_wrap=True)
