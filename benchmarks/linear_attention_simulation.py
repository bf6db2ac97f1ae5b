"""Predicted tokens per second of a linear model on 64 GPUs under each method of linear attention, beside LASP-2's figures.

    python benchmarks/linear_attention_simulation.py                               # local times from FLOPs on A100
    python benchmarks/linear_attention_simulation.py --kernel-times times.json     # local times as measured

No GPU: one document of 16K to 2048K tokens over all ranks, nodes of 8 with NVSwitch inside and one 200 Gb/s card for each
GPU between, by the planner's alpha-beta model (`planner.linear_attention_cost`). Time is of training: forward and backward of
all layers, the rest of each layer included. Beside raysp's five methods stand two as the papers run them:

- ``lasp2, all-gather``: a collective takes every state to a node once, over all its cards; raysp's ``lasp2`` sends each to
  every later rank.
- ``lasp1, published``: a rank makes its state after the one before has come, in LASP's order; raysp's ``lasp1`` has it
  ready.

``--kernel-times`` is JSON: ``{"hardware": "...", "passes": [{"tokens": 32768, "forward": {"whole_s": ...}, "backward":
{...}}]}``, with the fields of `planner.linear_attention_cost.LocalPass`, ``tokens`` those of one rank. Between measured
tokens times are interpolated, beyond them they are in proportion.

Writes ``linear_attention_simulation.{json,md,png}`` under ``--output``.

Source of what is compared: LASP-2 (arXiv:2502.07563): 64 A100, 1B parameters, 2048K tokens, +15.2 % tokens/s over LASP-1
and +36.6 % over Ring Attention. Its absolute tokens/s are not part of this comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
# benchmarks/planner.py would hide the package of its name.
sys.path[:] = [str(_ROOT), *(e for e in sys.path if Path(e or ".").resolve() not in (_ROOT, _ROOT / "benchmarks"))]

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.attention_cases import tokens_text  # noqa: E402
from benchmarks.provenance import commit  # noqa: E402
from planner import (  # noqa: E402
    LinearAttentionShape,
    LinearAttentionWork,
    LocalPass,
    Topology,
    linear_method_times,
    nodes_topology,
)
from planner.linear_attention_cost import lasp2_s, serial_scan_s  # noqa: E402

METHODS = ("lasp2", "lasp1", "zeco", "ulysses", "ring")
PUBLISHED_LASP1 = "lasp1, published"
ALL_GATHER = "lasp2, all-gather"
PUBLISHED_GAINS = {"lasp1": 0.152, "ring": 0.366}
PUBLISHED_TOKENS = 2048 * 1024
TOKENS = tuple(1024 * size for size in (16, 32, 64, 128, 256, 512, 1024, 2048))
_CHUNK_TOKENS = 64
# Llama-3.2-1B has 32 query and 8 key heads.
_QUERIES_PER_KEY = 4
_COLOURS = {
    ALL_GATHER: "#44aa99", "lasp2": "#117733", "lasp1": "#332288", PUBLISHED_LASP1: "#88ccee", "zeco": "#ddaa33",
    "ulysses": "#cc6677", "ring": "#999999",
}  # fmt: skip

Passes = tuple[LocalPass, LocalPass]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a GPU and its links reach; the defaults are stated for A100 (312 TFLOP/s bf16, 2 TB/s), not measured.

    Attributes:
        name: Of the GPU.
        layer_flops_per_s: Matrix products of everything but the linear attention operator.
        operator_flops_per_s: Linear attention kernels.
        memory_bytes_per_s: What they read and write.
        launch_s: Fixed part of the operator's passes.
        inside_bytes_per_s: NVSwitch, one GPU in one direction.
        inside_latency_s: Of a message there.
        card_bytes_per_s: 200 Gb/s, one for each GPU.
        card_latency_s: Of a message between nodes.
        ranks_per_node: GPUs of a node.
    """

    name: str = "A100"
    layer_flops_per_s: float = 125e12
    operator_flops_per_s: float = 60e12
    memory_bytes_per_s: float = 1.5e12
    launch_s: float = 50e-6
    inside_bytes_per_s: float = 240e9
    inside_latency_s: float = 15e-6
    card_bytes_per_s: float = 25e9
    card_latency_s: float = 40e-6
    ranks_per_node: int = 8

    def topology(self, num_ranks: int) -> Topology:
        """Links of a group over all nodes."""
        return nodes_topology(
            num_ranks,
            inside_bandwidth_bytes_per_s=self.inside_bytes_per_s,
            inside_latency_s=self.inside_latency_s,
            nic_bandwidth_bytes_per_s=self.card_bytes_per_s,
            nic_latency_s=self.card_latency_s,
            ranks_per_node=self.ranks_per_node,
        )

    def all_gather_s(self, num_bytes: int, num_ranks: int) -> float:
        """Every rank's bytes to all ranks: once to each node over all its cards, then on inside, neighbour by neighbour."""
        num_nodes = -(-num_ranks // self.ranks_per_node)
        steps_s = (num_nodes - 1) * self.card_latency_s + (
            min(num_ranks, self.ranks_per_node) - 1
        ) * self.inside_latency_s
        slowest = self.inside_bytes_per_s
        if num_nodes > 1:
            slowest = min(slowest, self.ranks_per_node * self.card_bytes_per_s)
        return steps_s + (num_ranks - 1) * num_bytes / slowest


@dataclass(frozen=True, kw_only=True)
class Model:
    """A linear model; by default Llama-3.2-1B's sizes with all 16 layers linear, 16 heads of 128.

    Attributes:
        num_layers: All linear.
        num_parameters: That a token meets, the output head included.
        shape: Of linear attention; basic, without decay.
    """

    num_layers: int = 16
    num_parameters: float = 1.24e9
    shape: LinearAttentionShape = field(
        default_factory=lambda: LinearAttentionShape(num_heads=16, key_size=128, value_size=128)
    )

    def other_s(self, tokens_per_rank: float, machine: Machine) -> float:
        """Forward and backward of everything but linear attention: ``6 * parameters * tokens`` operations."""
        return 6 * self.num_parameters * tokens_per_rank / machine.layer_flops_per_s


def derived_passes(tokens: float, shape: LinearAttentionShape, machine: Machine) -> Passes:
    """Local times of a rank's tokens from operations and traffic, whichever takes longer, shared out by operations.

    A token and head takes 2KV operations for the state, 2KV for what it reads of it, and C(K+V) inside a chunk of C; the
    backward twice as many, and half as much again to make scores anew.
    """
    state = 2.0 * shape.key_size * shape.value_size
    intra = float(_CHUNK_TOKENS * (shape.key_size + shape.value_size))
    flops = tokens * shape.num_heads * (2 * state + intra)
    moved_bytes = tokens * 2 * (shape.key_bytes + shape.value_bytes)
    # One state read, a parcel read, one written.
    combine_s = 3 * shape.state_bytes / machine.memory_bytes_per_s

    def of(factor: float) -> LocalPass:
        whole_s = factor * max(flops / machine.operator_flops_per_s, moved_bytes / machine.memory_bytes_per_s)
        share = whole_s / (2 * state + intra)
        return LocalPass(
            whole_s=whole_s + machine.launch_s, summary_s=state * share, intra_s=intra * share, combine_s=combine_s
        )

    return of(1.0), of(2.5)


def measured_passes(content: dict[str, Any]) -> Callable[[float], Passes]:
    """Local times by tokens of a rank from the content of ``--kernel-times``."""
    names = [field.name for field in fields(LocalPass)]
    rows = sorted(content["passes"], key=lambda row: row["tokens"])

    def of(tokens: float, direction: str) -> LocalPass:
        return LocalPass(**{name: _interpolated(tokens, rows, direction, name) for name in names})

    return lambda tokens: (of(tokens, "forward"), of(tokens, "backward"))


def _interpolated(tokens: float, rows: Sequence[dict[str, Any]], direction: str, name: str) -> float:
    points = [(float(row["tokens"]), float(row[direction].get(name, 0.0))) for row in rows]
    # What one state costs does not depend on tokens.
    least, most = points[0], points[-1]
    if tokens <= least[0] or tokens >= most[0]:
        at, seconds = least if tokens <= least[0] else most
        return seconds if name == "combine_s" else seconds * tokens / at
    above = next(place for place, (at, _) in enumerate(points) if at >= tokens)
    (low, low_s), (high, high_s) = points[above - 1], points[above]
    return low_s + (high_s - low_s) * (tokens - low) / (high - low)


def simulate(
    tokens: Sequence[int], num_ranks: int, model: Model, machine: Machine, passes: Callable[[float], Passes]
) -> list[dict[str, Any]]:
    """A row for each number of tokens and method: seconds of a step, tokens/s, by how much `ALL_GATHER` is faster."""
    rows: list[dict[str, Any]] = []
    topology = machine.topology(num_ranks)
    for count in tokens:
        work = LinearAttentionWork(lengths=(count,), degree=num_ranks, shape=model.shape)
        forward, backward = passes(count / num_ranks)
        other_s = model.other_s(count / num_ranks, machine)
        times = linear_method_times(work, topology, forward, backward, METHODS)
        layer_s = {time.method: (time.total_s, time.forward_bytes + time.backward_bytes) for time in times}
        both = ((forward, False), (backward, True))
        published_s = sum(
            serial_scan_s(work, topology, state_in_hop(local), backward=is_backward) for local, is_backward in both
        )
        layer_s[PUBLISHED_LASP1] = (published_s, layer_s["lasp1"][1])
        parcel_bytes = model.shape.state_bytes + model.shape.transition_bytes
        exchange_s = machine.all_gather_s(parcel_bytes, num_ranks)
        gathered_s = sum(
            lasp2_s(work, topology, local, backward=is_backward, exchange_s=exchange_s) for local, is_backward in both
        )
        layer_s[ALL_GATHER] = (gathered_s, 2 * num_ranks * (num_ranks - 1) * parcel_bytes)
        fastest_s = model.num_layers * gathered_s + other_s
        for method, (seconds, num_bytes) in layer_s.items():
            step_s = model.num_layers * seconds + other_s
            rows.append(
                {
                    "tokens": count, "method": method, "layer_s": seconds, "other_layers_s": other_s, "step_s": step_s,
                    "tokens_per_s": count / step_s, "all_gather_faster_by": step_s / fastest_s - 1,
                    "layer_bytes": num_bytes, "added_s": seconds - forward.whole_s - backward.whole_s,
                }
            )  # fmt: skip
    return rows


def state_in_hop(local: LocalPass) -> LocalPass:
    """The same work in LASP's order: a rank makes its state after the one before has arrived, then sends."""
    return replace(
        local, summary_s=0.0, intra_s=local.whole_s - local.summary_s, combine_s=local.combine_s + local.summary_s,
        whole_s=local.whole_s,
    )  # fmt: skip


def compared(
    rows: Sequence[dict[str, Any]],
    num_ranks: int,
    model: Model,
    machine: Machine,
    passes: Callable[[float], Passes],
) -> list[str]:
    """How far the prediction is from the published gains at 2048K tokens, and what would have to hold for them."""
    at = {row["method"]: row for row in rows if row["tokens"] == PUBLISHED_TOKENS}
    if not at:
        return [f"{tokens_text(PUBLISHED_TOKENS)} tokens were not simulated: nothing to compare."]
    lines = []
    for method, published, shown in (
        ("lasp1", PUBLISHED_GAINS["lasp1"], "lasp1"),
        (PUBLISHED_LASP1, PUBLISHED_GAINS["lasp1"], PUBLISHED_LASP1),
        ("ring", PUBLISHED_GAINS["ring"], "ring"),
    ):
        gain = at[method]["all_gather_faster_by"]
        lines.append(
            f"{ALL_GATHER} over {shown}: {gain:+.1%} predicted, {published:+.1%} published, {gain - published:+.1%} apart. "
            + _needed_rest(at[ALL_GATHER], at[method], published, num_ranks, model, machine)
        )
    lines.append(_needed_link(num_ranks, model, machine, passes))
    return lines


def _needed_rest(
    lasp2: dict[str, Any], other: dict[str, Any], published: float, num_ranks: int, model: Model, machine: Machine
) -> str:
    """The time of all other layers at which the gain would be the published one: (t + x) / (t2 + x) = 1 + g."""
    linear_s = [model.num_layers * row["layer_s"] for row in (other, lasp2)]
    rest_s = (linear_s[0] - (1 + published) * linear_s[1]) / published
    if rest_s <= 0:
        return "Even without any other layers the gain would be smaller."
    rate = 6 * model.num_parameters * lasp2["tokens"] / num_ranks / rest_s
    return (
        f"The published gain needs other layers of {rest_s:.3g} s a step ({rate / 1e12:.3g} TFLOP/s), not "
        f"{lasp2['other_layers_s']:.3g} s ({machine.layer_flops_per_s / 1e12:.3g} TFLOP/s)."
    )


def _needed_link(num_ranks: int, model: Model, machine: Machine, passes: Callable[[float], Passes]) -> str:
    """The links at which the ring would be as much slower as published."""

    def gain(card_bytes_per_s: float) -> float:
        faster = replace(machine, card_bytes_per_s=card_bytes_per_s)
        rows = simulate((PUBLISHED_TOKENS,), num_ranks, model, faster, passes)
        return float(next(row for row in rows if row["method"] == "ring")["all_gather_faster_by"])

    fewer = replace(
        machine,
        card_bytes_per_s=machine.card_bytes_per_s * _QUERIES_PER_KEY,
        inside_bytes_per_s=machine.inside_bytes_per_s * _QUERIES_PER_KEY,
    )
    rows = simulate((PUBLISHED_TOKENS,), num_ranks, model, fewer, passes)
    quarter = float(next(row for row in rows if row["method"] == "ring")["all_gather_faster_by"])
    shared = f" With {_QUERIES_PER_KEY} heads to a key, a ring of a {_QUERIES_PER_KEY}th of the bytes: {quarter:+.1%}."
    low, high, wanted = machine.card_bytes_per_s, machine.inside_bytes_per_s, PUBLISHED_GAINS["ring"]
    if not gain(high) <= wanted <= gain(low):
        return (
            f"Over the ring, links between nodes as fast as inside ({high / 1e9:.0f} GB/s for each GPU) would give "
            f"{gain(high):+.1%}.{shared}"
        )
    for _ in range(20):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if gain(middle) > wanted else (low, middle)
    return f"Over the ring, {wanted:+.1%} would come out with {high / 1e9:.0f} GB/s between nodes for each GPU.{shared}"


def why(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the difference comes from, in sentences."""
    at = {row["method"]: row for row in rows if row["tokens"] == PUBLISHED_TOKENS}
    if not at:
        return []
    lasp2, gathered, ring = at["lasp2"], at[ALL_GATHER], at["ring"]
    return [
        f"The ring moves {ring['layer_bytes'] / 1e9:,.0f} GB a layer and step, lasp2 {lasp2['layer_bytes'] / 1e9:.2f} GB. "
        "Each hop of the ring waits for the card between two nodes, which its few operations a row cannot hide.",
        f"Linear attention takes {1 - gathered['other_layers_s'] / gathered['step_s']:.0%} of the step of {ALL_GATHER}. A "
        "hop of lasp1 is latency and one state; whether its state is made before or within the hop decides most of its gap.",
        f"raysp's lasp2 is {1 - lasp2['tokens_per_s'] / gathered['tokens_per_s']:.1%} behind an all-gather: the first rank "
        "sends its state to every rank of the other nodes over its own card, where a collective crosses to each node once.",
        "The published steps also hold what is left out here: parameter and gradient traffic, the optimizer, host time. At "
        "what share of the peak their other layers ran, and how their ring overlaps, is not known here.",
    ]


def main() -> None:
    """Simulate, show, write."""
    arguments = _arguments()
    console = Console(width=max(140, Console().width))
    model = Model(
        num_layers=arguments.layers,
        num_parameters=arguments.parameters,
        shape=LinearAttentionShape(
            num_heads=arguments.heads, key_size=arguments.head_size, value_size=arguments.head_size
        ),
    )
    machine = Machine()
    if arguments.kernel_times is None:
        source = f"derived from FLOPs at {machine.operator_flops_per_s / 1e12:g} TFLOP/s, stated for {machine.name}"

        def passes(tokens: float) -> Passes:
            return derived_passes(tokens, model.shape, machine)
    else:
        content = json.loads(arguments.kernel_times.read_text(encoding="utf-8"))
        source = f"measured on {content.get('hardware', 'unknown hardware')} ({arguments.kernel_times.name})"
        passes = measured_passes(content)
    rows = simulate(arguments.tokens, arguments.ranks, model, machine, passes)
    result = {
        "hardware": f"simulated {arguments.ranks} x {machine.name}, on {os.cpu_count()} CPU cores ({platform.machine()})",
        "commit": arguments.commit or commit("planner", "benchmarks/*.py"),
        "command": " ".join(["python", *sys.argv]), "local_times": source,
        "machine": vars(machine), "model": {**vars(model), "shape": vars(model.shape)},
        "comparison": compared(rows, arguments.ranks, model, machine, passes), "why": why(rows), "rows": rows,
    }  # fmt: skip
    _show(rows, console)
    for line in (f"local times: {source}", *result["comparison"], *result["why"]):
        console.print(line, highlight=False, markup=False)
    arguments.output.mkdir(parents=True, exist_ok=True)
    base = arguments.output / f"linear_attention_{arguments.name}"
    base.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    base.with_suffix(".md").write_text(markdown(result))
    plot(result, base.with_suffix(".png"))
    console.print(f"written to {base}.json, .md, .png")


def markdown(result: dict[str, Any]) -> str:
    """The whole result as a document."""
    machine, model = result["machine"], result["model"]
    headings = ["tokens", *_methods(result["rows"])]
    lines = [
        f"`{result['command']}` at {result['commit']}: {result['hardware']}. Predicted, not measured.",
        "",
        f"{model['num_layers']} linear layers of {model['shape']['num_heads']} heads of {model['shape']['key_size']} x "
        f"{model['shape']['value_size']}, {model['num_parameters'] / 1e9:.2f}B parameters; one document over all ranks, "
        f"forward and backward. Local times of linear attention: {result['local_times']}. Other layers at "
        f"{machine['layer_flops_per_s'] / 1e12:g} TFLOP/s. Nodes of {machine['ranks_per_node']}: "
        f"{machine['inside_bytes_per_s'] / 1e9:g} GB/s and {machine['inside_latency_s'] * 1e6:g} us inside, "
        f"{machine['card_bytes_per_s'] / 1e9:g} GB/s for each GPU and {machine['card_latency_s'] * 1e6:g} us between.",
        "",
        *(f"- {line}" for line in (*result["comparison"], *result["why"])),
        "",
        f"Tokens per second of all ranks, and by how much {ALL_GATHER} is faster:",
        "",
    ]
    lines += [f"| {' | '.join(headings)} |", "|---|" + "---:|" * (len(headings) - 1)]
    lines += [f"| {' | '.join(cells)} |" for cells in _table(result["rows"])]
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Tokens per second over tokens, and lasp2's gain over tokens."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    speed, gain = figure.subplots(1, 2)
    for method in _methods(rows):
        points = [row for row in rows if row["method"] == method]
        tokens = [row["tokens"] for row in points]
        style = {"color": _COLOURS[method], "marker": "o", "markersize": 4}
        speed.plot(tokens, [row["tokens_per_s"] for row in points], label=method, **style)
        gain.plot(tokens, [100 * row["all_gather_faster_by"] for row in points], **style)
    for method, published in PUBLISHED_GAINS.items():
        gain.plot(PUBLISHED_TOKENS, 100 * published, "*", color=_COLOURS[method], markersize=12)
        gain.annotate(
            f"published, {method}", (PUBLISHED_TOKENS, 100 * published), xytext=(-8, 4), textcoords="offset points",
            fontsize=8, ha="right",
        )  # fmt: skip
    ticks = sorted({row["tokens"] for row in rows})
    for axes in (speed, gain):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [tokens_text(tick) for tick in ticks], minor=False)
        axes.set_xlabel("tokens of the document")
        axes.grid(alpha=0.3)
    speed.set_yscale("log")
    speed.set_ylabel("tokens/s")
    gain.set_yscale("symlog", linthresh=10)
    gain.set_ylim(bottom=-2)
    gain.set_ylabel(f"{ALL_GATHER} faster by, %")
    figure.suptitle(result["hardware"].split(",")[0] + ", a 1B linear model, training", fontsize=11)
    figure.legend(*speed.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=120)


def _methods(rows: Sequence[dict[str, Any]]) -> list[str]:
    made = {row["method"] for row in rows}
    return [method for method in (ALL_GATHER, *METHODS[:2], PUBLISHED_LASP1, *METHODS[2:]) if method in made]


def _table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    by_case = {(row["tokens"], row["method"]): row for row in rows}
    return [
        [
            tokens_text(count),
            *(
                f"{row['tokens_per_s']:,.0f} ({row['all_gather_faster_by']:+.1%})" if row is not None else "-"
                for row in (by_case.get((count, method)) for method in _methods(rows))
            ),
        ]
        for count in dict.fromkeys(row["tokens"] for row in rows)
    ]


def _show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table(
        title=f"tokens/s (by how much {ALL_GATHER} is faster)", title_justify="left", box=None, padding=(0, 2)
    )
    for heading in ("tokens", *_methods(rows)):
        table.add_column(heading, justify="right")
    for cells in _table(rows):
        table.add_row(*cells)
    console.print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="of the document, over all ranks")
    parser.add_argument("--kernel-times", type=Path, default=None, help="JSON of measured local times, see above")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--parameters", type=float, default=1.24e9)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--name", default="simulation")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", default=None, help="where the checkout has no .git")
    arguments = parser.parse_args()
    arguments.tokens = tuple(int(text) for text in arguments.tokens.split(","))
    return arguments


if __name__ == "__main__":
    main()
