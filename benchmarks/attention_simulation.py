"""Predicted times of parallel attention on 4 to 64 ranks of four topologies, by the planner's alpha-beta model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from planner.attention_rates import KernelRate
from planner.attention_topology import (
    Topology,
    full_mesh_topology,
    nodes_topology,
    physical_ring_topology,
    simulate_attention,
    switch_topology,
)
from planner.attention_work import AttentionWork

# FlashAttention-4 on one H200, bf16, head size 128, causal, 16K tokens; memory at what a copy reaches.
H200 = KernelRate(
    forward_flops_per_s=694e12,
    backward_flops_per_s=645e12,
    launch_s=10e-6,
    copy_bytes_per_s=4.3e12,
    efficient_rows=128.0,
)
DEGREES = (4, 8, 16, 32, 64)
HEADS = ((32, 8), (32, 32), (64, 8))
TOKENS_PER_RANK = (8192, 32768)
HEAD_SIZE = 128
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
    times = sorted(simulate_attention(work, topology, H200), key=lambda time: time.total_s)
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


def _summary(case: list[dict[str, Any]]) -> list[str]:
    best, *others = case
    slower = ", ".join(f"{row['method']} {row['both_s'] / best['both_s']:.2f}" for row in others)
    return [best["method"], f"{best['both_share']:.1%}", slower]
