"""``raysp plan`` and ``validate``: the planner on a file of lengths, without a GPU or a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rich.table import Table

from planner import (
    Cluster,
    CostModel,
    GroupPlan,
    StepPlan,
    load_preset,
    plan_step,
    read_lengths,
    validate_plan,
)
from planner.method_cost import DEFAULT_RECOMPUTE
from raysp.commands.output import print_json, terminal, write_file
from raysp.errors import InputError

_SHOWN_FAULTS = 5


@dataclass(frozen=True)
class PlanRequest:
    """The options of ``raysp plan``; see `planner.plan_step`. ``num_gpus`` none: by the cluster, or the cost model."""

    num_gpus: int | None
    policy: str
    sync: str
    degrees: str
    attention: str | None
    time_limit_s: float
    node_limit: int | None
    seed: int
    cluster_file: Path | None = None


def read_cost_model(preset: str | None, file: Path | None) -> CostModel:
    """The cost model of ``--preset`` or ``--cost-model``.

    Raises:
        InputError: Not exactly one is given.
        planner.CostModelError: There is none of that name, or the file is malformed.
    """
    if preset is not None and file is None:
        return load_preset(preset)
    if file is not None and preset is None:
        return CostModel.load(file)
    given = "neither" if preset is None else "both"
    raise InputError(f"{given} of --preset NAME and --cost-model FILE given; expected exactly one. Correct that.")


def plan(
    lengths_file: Path, cost_model: CostModel, request: PlanRequest, *, output: Path | None, as_json: bool
) -> None:
    """Plan one step, show it, and write it to ``output`` if given."""
    lengths = read_lengths(lengths_file)
    cluster = None if request.cluster_file is None else Cluster.load(request.cluster_file)
    num_gpus = request.num_gpus or (cluster.num_ranks if cluster is not None else measured_num_gpus(cost_model))
    made = plan_step(
        lengths,
        num_gpus,
        cost_model,
        policy=request.policy,
        sync=request.sync,
        degrees=request.degrees,
        time_limit_s=request.time_limit_s,
        node_limit=request.node_limit,
        seed=request.seed,
        attention=request.attention,
        cluster=cluster,
    )
    if output is not None:
        write_file(output, made.to_json())
    if as_json:
        print_json(made.to_content())
        return
    console = terminal()
    console.print(plan_table(made))
    console.print(_summary(made), soft_wrap=True)
    if made.reason:
        console.print(f"found by: {made.reason}", soft_wrap=True, markup=False)
    if output is not None:
        console.print(f"written to {output}", soft_wrap=True, markup=False)


def validate(plan_file: Path, lengths_file: Path, cost_model: CostModel) -> None:
    """Check a plan against its batch.

    Raises:
        InputError: It violates something; the first faults are named.
    """
    made, _ = read_valid(plan_file, lengths_file, cost_model)
    terminal().print(
        f"{plan_file} is valid: {made.num_sequences} sequences on {made.num_ranks} GPUs in "
        f"{len(made.micro_batches)} micro-batches, {made.outcome}",
        soft_wrap=True,
        markup=False,
    )


def plan_table(made: StepPlan) -> Table:
    """Per micro-batch its groups: degree x count, attention, sequences, tokens, predicted time of the slowest."""
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("micro-batch")
    for heading in ("groups (degree x count)", "attention", "sequences", "tokens", "predicted s"):
        table.add_column(heading, justify="left" if heading == "attention" else "right")
    for number, micro_batch in enumerate(made.micro_batches, start=1):
        ordered = sorted(micro_batch.groups, key=_shape, reverse=True)
        for row, ((degree, attention, recompute), alike) in enumerate(groupby(ordered, key=_shape)):
            groups = list(alike)
            table.add_row(
                str(number) if row == 0 else "",
                f"{degree} x {len(groups)}",
                attention if recompute == DEFAULT_RECOMPUTE else f"{attention}, recompute {recompute}",
                f"{sum(len(group.sequences) for group in groups):,}",
                f"{sum(group.num_tokens for group in groups):,}",
                f"{max(group.predicted_time_s for group in groups):.3f}",
            )
    return table


def _shape(group: GroupPlan) -> tuple[int, str, str]:
    return group.degree, group.attention, group.recompute


def _summary(made: StepPlan) -> str:
    proof = "proven optimal" if made.outcome == "optimal" else f"at most {made.gap:.1%} above the best plan"
    return (
        f"step {made.predicted_step_time_s:.3f} s predicted, lower bound {made.lower_bound_s:.3f} s ({proof}); "
        f"{made.num_sequences} sequences on {made.num_ranks} GPUs, planned in {made.solve_time_s:.2f} s"
    )


def measured_num_gpus(cost_model: CostModel) -> int:
    """The number of GPUs that a cost model was measured on: its largest degree."""
    if not cost_model.communication_s:
        raise InputError(
            f"cost model {cost_model.name} does not say how many GPUs it was measured on; expected --num-gpus. Add it."
        )
    return max(degree for degree, _ in cost_model.communication_s)


def read_valid(plan_file: Path, lengths_file: Path, cost_model: CostModel) -> tuple[StepPlan, Sequence[int]]:
    """Read a plan and its batch.

    Raises:
        InputError: The plan violates something; the first faults are named.
        planner.PlannerError: One of the files is malformed.
    """
    made = StepPlan.load(plan_file)
    lengths = read_lengths(lengths_file)
    faults = validate_plan(made, lengths, cost_model)
    if faults:
        more = f"; and {len(faults) - _SHOWN_FAULTS} more" if len(faults) > _SHOWN_FAULTS else ""
        raise InputError(
            f"{plan_file} is not valid for {lengths_file}: {'; '.join(faults[:_SHOWN_FAULTS])}{more}. "
            "Plan again with raysp plan."
        )
    return made, lengths
