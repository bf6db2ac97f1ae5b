"""``raysp calibrate``: a cost model measured on the workers of a configuration, or fitted to samples in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from planner import CalibrationFit, fit_cost_model, read_samples
from raysp.commands.output import terminal, write_file
from raysp.errors import InputError


@dataclass(frozen=True)
class SamplesRequest:
    """What samples do not say, none where the option was not given; see `planner.fit_cost_model`."""

    num_gpus: int | None
    memory_limit_bytes: float | None
    model_state_bytes: float | None
    bytes_per_token: float | None
    unsharded_state_bytes: float | None
    attention: str | None
    num_heads: int | None
    num_kv_heads: int | None
    gpus_per_node: int | None

    def given(self) -> list[str]:
        """The options that were given, as on the command line."""
        return [f"--{name.replace('_', '-')}" for name, value in vars(self).items() if value is not None]


def run(
    config: Path | None, overrides: Sequence[str], samples: Path | None, request: SamplesRequest, output: Path
) -> None:
    """Measure or read, show the residuals, write the cost model.

    Args:
        config: TOML file; its model is measured on its workers.
        overrides: ``key=value`` of ``--set``.
        samples: CSV or JSON file to read instead.
        request: Beside the samples.
        output: JSON file to write.

    Raises:
        InputError: Not exactly one source, or options of the other one.
        planner.CalibrationError: The samples are malformed, or the fit is bad.
    """
    if (config is None) == (samples is None):
        given = "neither" if config is None else "both"
        raise InputError(f"{given} of --config FILE and --samples FILE given; expected exactly one. Correct that.")
    console = terminal()
    if config is not None:
        fit = _measured(config, overrides, request, console)
    elif samples is not None:
        fit = _fitted(samples, overrides, request, output.stem)
    console.print(residual_table(fit))
    console.print(
        f"error {fit.mean_relative_error:.1%} on average, at most {fit.max_relative_error:.1%}; r2 {fit.r2:.4f}"
    )
    for note in fit.notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
    write_file(output, fit.cost_model.to_json())
    use = f'planner.cost_model = "{output}"' if config is not None else f"--cost-model {output}"
    console.print(f"cost model written to {output}; use it with {use}", soft_wrap=True, markup=False)


def residual_table(fit: CalibrationFit) -> Table:
    """One row for each sample: measured and fitted time."""
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
    return table


def _measured(path: Path, overrides: Sequence[str], request: SamplesRequest, console: Console) -> CalibrationFit:
    from raysp.config import load_config

    if request.given():
        raise InputError(f"{request.given()[0]} goes with --samples; expected it in the configuration. Leave it out.")
    config = load_config(path, overrides)
    from raysp.cluster.driver import measure_cost_model
    from raysp.tracking.console import ConsoleReporter

    return measure_cost_model(config, on_event=ConsoleReporter(console).handle)


def _fitted(path: Path, overrides: Sequence[str], request: SamplesRequest, name: str) -> CalibrationFit:
    if overrides:
        raise InputError("--set goes with --config; expected options such as --num-heads. Leave it out.")
    if request.num_gpus is None or request.memory_limit_bytes is None or request.model_state_bytes is None:
        raise InputError(
            "--samples needs --num-gpus, --memory-limit-bytes and --model-state-bytes: samples do not say on how many "
            "GPUs the model states were sharded, nor what they and a GPU hold. Give all three."
        )
    return fit_cost_model(
        read_samples(path),
        name=name,
        num_ranks=request.num_gpus,
        model_state_bytes_total=request.model_state_bytes,
        memory_limit_bytes=request.memory_limit_bytes,
        bytes_per_token=request.bytes_per_token,
        attention="ulysses" if request.attention is None else request.attention,
        num_heads=request.num_heads,
        num_kv_heads=request.num_kv_heads,
        gpus_per_node=request.gpus_per_node,
        unsharded_state_bytes=request.unsharded_state_bytes,
    )
