"""``raysp simulate``: what policies and cluster sizes would do for the lengths of a corpus, without a GPU."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from planner import (
    CostModel,
    MarginalValue,
    PolicySummary,
    SimulatedStep,
    Simulation,
    draw_batches,
    marginal_value,
    simulate,
)
from planner.simulation import ADAPTIVE, BATCH_ADAPTIVE, BEST_STATIC, FLEXSP, STATIC, check_policies
from raysp.commands.length_sources import read_length_source
from raysp.commands.output import print_json, terminal, write_file
from raysp.commands.plan import measured_num_gpus
from raysp.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES = {ADAPTIVE: "raysp", FLEXSP: "FlexSP", BATCH_ADAPTIVE: "batch-adaptive", BEST_STATIC: "best static"}
_COLOURS = {BEST_STATIC: "#999999", BATCH_ADAPTIVE: "#4477aa", FLEXSP: "#ddaa33", ADAPTIVE: "#117733"}
_DEFAULT_GPUS_PER_NODE = 8


@dataclass(frozen=True)
class SimulateRequest:
    """The options of ``raysp simulate``; ``num_gpus`` empty: by the cost model, ``policies`` none: the usual ones."""

    num_gpus: tuple[int, ...]
    batch_size: int
    num_batches: int
    policies: tuple[str, ...] | None
    max_length: int | None
    flexsp_cpu_s: float
    time_limit_s: float
    seed: int
    marginal: bool


def read_num_gpus(values: Sequence[str]) -> tuple[int, ...]:
    """Read ``--num-gpus``: numbers, or lists of them such as ``8,16,64``.

    Raises:
        InputError: One is not an integer of at least 1.
    """
    texts = [text.strip() for value in values for text in value.split(",")]
    for text in texts:
        if not (text.isascii() and text.isdigit() and 0 < len(text) <= 6 and int(text) > 0):
            raise InputError(
                f"--num-gpus has {text!r}; expected integers of at least 1, such as 8,16,64. Correct that."
            )
    return tuple(dict.fromkeys(int(text) for text in texts))


def run(
    source: str,
    cost_model: CostModel,
    request: SimulateRequest,
    *,
    output: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Simulate, and show and write what was asked for; after Ctrl-C what is done until then.

    Raises:
        InputError: Bad options or lengths.
        KeyboardInterrupt: Ctrl-C, after what is done has been shown.
    """
    if plot is not None and plot.suffix.lower() != ".png":
        raise InputError(f"--plot {plot} is not a .png file; expected a name that ends in .png. Change it.")
    policies = _policies(request)
    num_gpus = request.num_gpus or (measured_num_gpus(cost_model),)
    wanted = request.batch_size * request.num_batches
    lengths = read_length_source(source, num=wanted, seed=request.seed)
    batches = draw_batches(
        lengths, request.batch_size, request.num_batches, seed=request.seed, max_length=request.max_length
    )
    steps: list[SimulatedStep] = []
    values: list[MarginalValue] = []
    interrupted: KeyboardInterrupt | None = None
    errors = Console(stderr=True)
    columns = (BarColumn(30), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    try:
        with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
            task = progress.add_task("", total=None)

            def seen(step: SimulatedStep, done: int, total: int) -> None:
                steps.append(step)
                progress.update(task, completed=done, total=total, description=f"{step.num_ranks} GPUs, {step.policy}")

            simulate(
                batches,
                num_gpus,
                cost_model,
                policies=policies,
                time_limit_s=request.time_limit_s,
                seed=request.seed,
                flexsp_cpu_s=request.flexsp_cpu_s,
                on_progress=seen,
            )
            for count in num_gpus if request.marginal else ():
                progress.update(task, description=f"one GPU or node more or less than {count}")
                values.append(_marginal_value(batches, count, cost_model, request))
    except KeyboardInterrupt as caught:
        interrupted = caught
    simulation = Simulation.of(steps)
    content = {
        "lengths": source,
        "cost_model": {"name": cost_model.name, "sha256": cost_model.sha256},
        "num_gpus": list(num_gpus),
        "policies": list(policies),
        **{key: getattr(request, key) for key in ("batch_size", "num_batches", "max_length", "time_limit_s", "seed")},
        "flexsp_cpu_s": request.flexsp_cpu_s,
        "complete": interrupted is None,
        **simulation.to_content(),
        "marginal_values": [dataclasses.asdict(value) for value in values],
    }
    if steps:
        _show(simulation, values, content, output=output, plot=plot, as_json=as_json)
    if interrupted is not None:
        raise interrupted


def summary_table(simulation: Simulation) -> Table:
    """One row for each number of GPUs and policy; of the static degrees the best one."""
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("GPUs", justify="right")
    table.add_column("policy")
    with_flexsp = any(item.policy == FLEXSP for item in simulation.summaries)
    ratios = ["/ raysp", *(["/ FlexSP"] if with_flexsp else [])]
    for heading in ("step s", *ratios, "tokens/s", "per GPU", "gap", "plan s"):
        table.add_column(heading, justify="right")
    previous = None
    for item in _shown(simulation):
        ratios = [_number(item.relative_to_adaptive), *([_number(item.relative_to_flexsp)] if with_flexsp else [])]
        rates = (
            [f"{item.tokens_per_s:,.0f}", f"{item.tokens_per_s_per_gpu:,.1f}"]
            if item.tokens_per_s is not None and item.tokens_per_s_per_gpu is not None
            else [f"{item.num_infeasible} of {item.num_batches} do not fit", "-"]
        )
        table.add_row(
            "" if item.num_ranks == previous else f"{item.num_ranks:,}",
            _title(item),
            _number(item.mean_step_time_s),
            *ratios,
            *rates,
            "-" if item.mean_gap is None else f"{item.mean_gap:.1%}",
            "-" if item.mean_solve_time_s is None else f"{item.mean_solve_time_s:.2f}",
        )
        previous = item.num_ranks
    return table


def plot_png(simulation: Simulation, *, title: str) -> bytes:
    """Throughput of each policy over the number of GPUs, and how much faster raysp is on each batch, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    rates, speedups = figure.subplots(1, 2)
    counts = list(dict.fromkeys(item.num_ranks for item in simulation.summaries))
    policies = [p for p in _ordered_policies(simulation) if any(s.policy == p for s in _shown(simulation))]
    for policy in policies:
        points = [(n, found) for n in counts if (found := simulation.summary(n, policy)) is not None]
        x = [counts.index(n) for n, found in points if found.tokens_per_s_per_gpu is not None]
        y = [found.tokens_per_s_per_gpu for _, found in points if found.tokens_per_s_per_gpu is not None]
        # Equal policies lie on each other; the smaller marker on the larger shows both.
        size = 11 - 2 * policies.index(policy) if len(policies) <= 4 else 6
        name = _NAMES.get(policy, policy)
        rates.plot(x, y, marker="o", markersize=size, label=name, color=_COLOURS.get(policy))
    rates.set_ylabel("tokens/s per GPU, predicted")
    rates.set_ylim(bottom=0)
    rates.legend()
    _plot_speedups(speedups, simulation, counts, [policy for policy in policies if policy != ADAPTIVE])
    for axes in (rates, speedups):
        axes.set_xticks(range(len(counts)), [str(n) for n in counts])
        axes.set_xlim(-0.6, len(counts) - 0.4)
        axes.set_xlabel("GPUs")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _plot_speedups(axes: Axes, simulation: Simulation, counts: Sequence[int], others: Sequence[str]) -> None:
    times = {
        (step.num_ranks, step.policy, step.batch): step.step_time_s
        for step in simulation.steps
        if step.step_time_s is not None
    }
    width = 0.7 / max(1, len(others))
    for place, policy in enumerate(others):
        ratios: list[list[float]] = []
        x: list[float] = []
        for index, num_ranks in enumerate(counts):
            found = simulation.summary(num_ranks, policy)
            name = f"{STATIC}:{found.degree}" if found is not None and found.degree is not None else policy
            ratios.append(
                [
                    time_s / times[num_ranks, ADAPTIVE, batch]
                    for (ranks, other, batch), time_s in times.items()
                    if (ranks, other) == (num_ranks, name) and (num_ranks, ADAPTIVE, batch) in times
                ]
            )
            x.append(index + (place - (len(others) - 1) / 2) * width)
        colour = _COLOURS.get(policy, "#cc6677")
        box = {"facecolor": colour, "alpha": 0.6}
        axes.boxplot(ratios, positions=x, widths=width * 0.85, patch_artist=True, boxprops=box, manage_ticks=False)
        axes.plot([], [], color=colour, linewidth=6, alpha=0.6, label=f"over {_NAMES.get(policy, policy)}")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_ylabel("speed-up of raysp, each batch")
    if others:
        axes.legend()


def _show(
    simulation: Simulation,
    values: Sequence[MarginalValue],
    content: dict[str, Any],
    *,
    output: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    title = f"{content['lengths']}, {content['cost_model']['name']}, {content['batch_size']} sequences a batch"
    if output is not None:
        write_file(output, json.dumps(content, indent=1, allow_nan=False) + "\n")
    if plot is not None:
        write_file(plot, plot_png(simulation, title=title))
    if as_json:
        print_json(content)
        return
    console = terminal()
    num_batches = len({step.batch for step in simulation.steps})
    stopped = "" if content["complete"] else "; stopped early"
    console.print(f"{title}, {num_batches} batches; predicted{stopped}", soft_wrap=True, markup=False)
    console.print(summary_table(simulation))
    for line in _reasons(simulation):
        console.print(line, soft_wrap=True, markup=False)
    for value in values:
        console.print(value.reason, soft_wrap=True, markup=False)
    for path in (output, plot):
        if path is not None:
            console.print(f"written to {path}", soft_wrap=True, markup=False)


def _shown(simulation: Simulation) -> list[PolicySummary]:
    """Leave out the single static degrees where the best one stands for them."""
    with_best = {item.num_ranks for item in simulation.summaries if item.policy == BEST_STATIC}
    shown: list[PolicySummary] = []
    for item in simulation.summaries:
        single = item.policy.startswith(f"{STATIC}:") and item.policy != f"{STATIC}:auto"
        if not (single and item.num_ranks in with_best):
            shown.append(item)
    return shown


def _ordered_policies(simulation: Simulation) -> list[str]:
    known = [BEST_STATIC, BATCH_ADAPTIVE, FLEXSP, ADAPTIVE]
    single = (item.policy for item in simulation.summaries if item.degree is None)
    others = [policy for policy in dict.fromkeys(single) if policy not in known]
    return [*others, *known]


def _title(item: PolicySummary) -> str:
    name = _NAMES.get(item.policy, item.policy)
    return name if item.degree is None else f"{name} ({item.degree})"


def _reasons(simulation: Simulation) -> list[str]:
    """Why batches do not fit: one reason for each number of GPUs where a shown policy cannot run a batch."""
    shown = {(item.num_ranks, item.policy) for item in _shown(simulation) if item.num_infeasible}
    told: dict[int, str] = {}
    for step in simulation.steps:
        if step.infeasible and (step.num_ranks, step.policy) in shown:
            # The last policy is usually the most general one: what it cannot run, none can.
            name = _NAMES.get(step.policy, step.policy)
            told[step.num_ranks] = f"{step.num_ranks} GPUs, batch {step.batch}, {name}: {step.infeasible}"
    return list(told.values())


def _policies(request: SimulateRequest) -> tuple[str, ...]:
    if request.policies is None:
        return (STATIC, BATCH_ADAPTIVE, *([FLEXSP] if request.flexsp_cpu_s > 0 else []), ADAPTIVE)
    check_policies(request.policies)
    if FLEXSP in request.policies and request.flexsp_cpu_s <= 0:
        raise InputError(
            "policy flexsp needs solver time; expected --flexsp-cpu-s SECONDS for each micro-batch, such as 10. Add it."
        )
    return request.policies


def _marginal_value(
    batches: Sequence[Sequence[int]], num_gpus: int, cost_model: CostModel, request: SimulateRequest
) -> MarginalValue:
    return marginal_value(
        batches,
        num_gpus,
        cost_model,
        gpus_per_node=cost_model.gpus_per_node or _DEFAULT_GPUS_PER_NODE,
        time_limit_s=request.time_limit_s,
        seed=request.seed,
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
