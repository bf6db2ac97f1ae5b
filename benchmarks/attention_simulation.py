"""Predicted times of parallel attention on 4 to 64 ranks of four topologies, by the planner's alpha-beta model.

Of each method the faster of the two ways that ``auto`` knows: as few kernel calls as can be, or more of them that hide more
communication.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from planner.attention_cost import ATTENTION_METHODS, MethodTime, method_times
from planner.attention_rates import HostRate, KernelRate
from planner.attention_topology import (
    Topology,
    full_mesh_topology,
    nodes_topology,
    physical_ring_topology,
    switch_topology,
)
from planner.attention_work import AttentionWork

# FlashAttention-4 on one H200, bf16, head size 128, causal, 16K tokens; memory at what a copy reaches. The host's times are
# those of its Python interface, of NCCL and of Triton on an H100's host.
H200 = KernelRate(
    forward_flops_per_s=694e12,
    backward_flops_per_s=645e12,
    launch_s=10e-6,
    copy_bytes_per_s=4.3e12,
    efficient_rows=128.0,
    host=HostRate(forward_call_s=0.35e-3, backward_call_s=0.6e-3, exchange_s=0.08e-3, row_operation_s=0.05e-3),
)
DEGREES = (4, 8, 16, 32, 64)
HEADS = ((32, 8), (32, 32), (64, 8))
TOKENS_PER_RANK = (8192, 32768)
HEAD_SIZE = 128
HARDWARE = "nothing: simulated with the rates of one H200 and links as measured on pairs"
_TUNINGS: tuple[dict[str, Any], ...] = ({}, {"hides_last_return": True, "head_groups": 4})
# Measured on an H200 pair: 250 GiB/s each way over NVLink, 35 us a message, 22 GiB/s through host memory.
_NVLINK_BYTES_PER_S, _PCIE_BYTES_PER_S, _LATENCY_S = 250 * 2**30, 22 * 2**30, 35e-6
# One 400 Gb/s network card for each rank.
_NIC_BYTES_PER_S, _NIC_LATENCY_S = 50e9, 40e-6

TOPOLOGIES: dict[str, Callable[[int], Topology]] = {
    "switch, NVLink": lambda n: switch_topology(n, bandwidth_bytes_per_s=_NVLINK_BYTES_PER_S, latency_s=_LATENCY_S),
    "full mesh, NVLink": lambda n: full_mesh_topology(
        n, bandwidth_bytes_per_s=_NVLINK_BYTES_PER_S, latency_s=_LATENCY_S
    ),
    "physical ring, PCIe": lambda n: physical_ring_topology(
        n, bandwidth_bytes_per_s=_PCIE_BYTES_PER_S, latency_s=_LATENCY_S
    ),
    "nodes of 8, 400 Gb/s": lambda n: nodes_topology(
        n, inside_bandwidth_bytes_per_s=_NVLINK_BYTES_PER_S, inside_latency_s=_LATENCY_S,
        nic_bandwidth_bytes_per_s=_NIC_BYTES_PER_S, nic_latency_s=_NIC_LATENCY_S,
    ),
}  # fmt: skip


def simulate(console: Console) -> list[dict[str, Any]]:
    """Predict every topology, degree and shape; show which method wins where.

    Returns:
        A row for each method of each case: seconds forward and in both directions, share of the ideal, exposed
        communication, bytes sent by each rank, and whether it is the fastest in both directions.
    """
    rows: list[dict[str, Any]] = []
    for name, build in TOPOLOGIES.items():
        table = Table(title=name, title_justify="left", box=None, padding=(0, 2), header_style="bold")
        for place, heading in enumerate(("heads", "tokens", "ranks", "fastest", "share", "the others, times slower")):
            table.add_column(heading, justify="left" if place in (0, 3, 5) else "right")
        for num_heads, num_key_heads in HEADS:
            for tokens in TOKENS_PER_RANK:
                for degree in DEGREES:
                    case = _case_rows(name, build(degree), num_heads, num_key_heads, tokens)
                    rows += case
                    table.add_row(f"{num_heads}/{num_key_heads}", f"{tokens // 1024}K", str(degree), *_summary(case))
        console.print(table)
    return rows


def _case_rows(name: str, topology: Topology, num_heads: int, num_key_heads: int, tokens: int) -> list[dict[str, Any]]:
    degree = topology.num_ranks
    work = AttentionWork(
        degree=degree, num_heads=num_heads, num_key_heads=num_key_heads, head_size=HEAD_SIZE, lengths=(tokens * degree,)
    )
    forward_s = work.forward_flops / H200.forward_flops_per_s / degree
    ideal_s = forward_s + work.backward_flops / H200.backward_flops_per_s / degree
    times = sorted(_fastest_ways(work, topology), key=lambda time: time.total_s)
    return [
        {
            "topology": name, "heads": f"{num_heads}/{num_key_heads}", "tokens_per_rank": tokens, "ranks": degree,
            "method": time.method, "forward_s": time.forward_s, "both_s": time.total_s,
            "forward_share": forward_s / time.forward_s, "both_share": ideal_s / time.total_s,
            "exposed_s": time.forward_exposed_s + time.backward_exposed_s,
            "sent_bytes_per_rank": (time.forward_bytes + time.backward_bytes) / degree,
            "fastest": time is times[0],
        }
        for time in times
    ]  # fmt: skip


def _fastest_ways(work: AttentionWork, topology: Topology) -> list[MethodTime]:
    by_tuning = [method_times(work, topology, H200, **tuning) for tuning in _TUNINGS]
    return [min(ways, key=lambda time: time.total_s) for ways in zip(*by_tuning, strict=True)]


def _summary(case: list[dict[str, Any]]) -> list[str]:
    best, *others = case
    slower = ", ".join(f"{row['method']} {row['both_s'] / best['both_s']:.2f}" for row in others)
    return [best["method"], f"{best['both_share']:.1%}", slower]


def simulation_markdown(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table for each topology: the share of the ideal of every method, and the fastest."""
    lines = [
        "Forward and backward of one causal document, bf16, head size 128. Share: kernels at full rate on equal parts, over",
        "the predicted time. Rates, links and the host's times: `benchmarks/attention_simulation.py`.",
    ]
    cases: dict[str, dict[tuple[Any, ...], dict[str, dict[str, Any]]]] = {}
    for row in rows:
        case = row["heads"], f"{row['tokens_per_rank'] // 1024}K", row["ranks"]
        cases.setdefault(row["topology"], {}).setdefault(case, {})[row["method"]] = row
    for topology, by_case in cases.items():
        lines += ["", f"## {topology}", "", _line(["heads", "tokens per rank", "ranks", *ATTENTION_METHODS, "fastest"])]
        lines.append(_line(["---"] * (len(ATTENTION_METHODS) + 4)))
        for case, methods in by_case.items():
            shares = [f"{methods[m]['both_share']:.1%}" if m in methods else "-" for m in ATTENTION_METHODS]
            fastest = next(method for method, row in methods.items() if row["fastest"])
            lines.append(_line([*map(str, case), *shares, fastest]))
    return lines


def plot_simulation(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Share of the ideal over the ranks: a row of panels for each topology, a column for heads and tokens."""
    from matplotlib.figure import Figure

    columns = list(dict.fromkeys((row["tokens_per_rank"], row["heads"]) for row in rows))
    figure = Figure(figsize=(2.7 * len(columns) + 1.8, 2.5 * len(TOPOLOGIES)), layout="constrained")
    panels = figure.subplots(len(TOPOLOGIES), len(columns), squeeze=False, sharex=True, sharey=True)
    handles: dict[str, Any] = {}
    for line, topology in enumerate(TOPOLOGIES):
        for column, (tokens, heads) in enumerate(columns):
            axes = panels[line][column]
            for method in ATTENTION_METHODS:
                points = [
                    (row["ranks"], row["both_share"])
                    for row in rows
                    if (row["topology"], row["tokens_per_rank"], row["heads"]) == (topology, tokens, heads)
                    and row["method"] == method
                ]
                if points:
                    handles[method] = axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3)[0]
                else:
                    axes.plot([], [])
            axes.set_xscale("log", base=2)
            axes.set_xticks(DEGREES, [str(degree) for degree in DEGREES], minor=False)
            axes.set_ylim(0, 1.05)
            axes.grid(alpha=0.3)
            axes.set_title(f"{topology}\n{heads}, {tokens // 1024}K", fontsize=8)
    figure.supxlabel("ranks", fontsize=10)
    figure.supylabel("share of ideal, forward and backward", fontsize=10)
    figure.suptitle("simulated", fontsize=11)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
