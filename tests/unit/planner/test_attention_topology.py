"""Topologies: messages load the links of their route, and methods rank as their links make them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import (
    AttentionWork,
    KernelRate,
    Link,
    MethodTime,
    PlanError,
    Topology,
    full_mesh_topology,
    method_times,
    nodes_topology,
    physical_ring_topology,
    simulate_attention,
    switch_topology,
)

from .attention_cases import RATE, make_work, works

Builder = Callable[..., Topology]
BUILDERS = (switch_topology, full_mesh_topology, physical_ring_topology)
# Four A10 on PCIe as in the TokenRing paper: about 14 GB/s each way between neighbours, bf16 at 70 TFLOP/s.
PCIE = 14e9
A10 = KernelRate(
    forward_flops_per_s=7e13, backward_flops_per_s=5.5e13, launch_s=2e-5, copy_bytes_per_s=5e11, efficient_rows=128
)


def message(num_ranks: int, source: int, target: int, num_bytes: float = 1000.0) -> np.ndarray:
    messages = np.zeros((num_ranks, num_ranks))
    messages[source, target] = num_bytes
    return messages


def nodes_of_2(num_ranks: int, nics_per_node: int | None = None) -> Topology:
    return nodes_topology(
        num_ranks,
        inside_bandwidth_bytes_per_s=1000.0,
        inside_latency_s=0.25,
        nic_bandwidth_bytes_per_s=100.0,
        nic_latency_s=0.5,
        ranks_per_node=2,
        nics_per_node=nics_per_node,
    )


def simulated(work: AttentionWork, topology: Topology, rate: KernelRate = RATE) -> dict[str, MethodTime]:
    return {time.method: time for time in simulate_attention(work, topology, rate)}


def test_a_switch_carries_one_port_at_a_time_each_way() -> None:
    switch = switch_topology(4, bandwidth_bytes_per_s=1000.0, latency_s=0.5)
    to_one = message(4, 0, 1) + message(4, 2, 1)
    both_ways = message(4, 0, 1) + message(4, 1, 0)
    assert switch.transfer_s(np.zeros((4, 4))) == 0.0
    assert switch.transfer_s(message(4, 0, 1)) == 1.5
    assert switch.transfer_s(to_one) == 2.5
    assert switch.transfer_s(both_ways) == 1.5
    half = switch_topology(4, bandwidth_bytes_per_s=1000.0, latency_s=0.5, duplex=False)
    assert half.transfer_s(both_ways) == 2.5


def test_a_mesh_has_a_thin_link_for_each_pair() -> None:
    mesh = full_mesh_topology(5, bandwidth_bytes_per_s=4000.0, latency_s=0.5)
    assert mesh.transfer_s(message(5, 0, 1)) == 1.5
    assert mesh.transfer_s(sum(message(5, 0, target) for target in range(1, 5))) == 1.5
    half = full_mesh_topology(5, bandwidth_bytes_per_s=4000.0, latency_s=0.5, duplex=False)
    assert half.transfer_s(message(5, 0, 1) + message(5, 1, 0)) == 2.5


def test_a_message_on_a_physical_ring_loads_every_link_of_the_shorter_way() -> None:
    ring = physical_ring_topology(6, bandwidth_bytes_per_s=1000.0, latency_s=0.5)
    assert ring.transfer_s(message(6, 0, 2)) == 2 * 0.5 + 1
    assert ring.transfer_s(message(6, 0, 5)) == 0.5 + 1
    assert ring.transfer_s(message(6, 0, 2) + message(6, 1, 2)) == 2 * 0.5 + 2
    # Opposite directions do not meet, and half of the ring is as far both ways.
    assert ring.transfer_s(message(6, 0, 1) + message(6, 1, 0)) == 1.5
    assert ring.transfer_s(message(6, 0, 3)) == 3 * 0.5 + 0.5
    half = physical_ring_topology(6, bandwidth_bytes_per_s=1000.0, latency_s=0.5, duplex=False)
    assert half.transfer_s(message(6, 0, 1) + message(6, 1, 0)) == 2.5


def test_between_nodes_messages_share_the_cards() -> None:
    inside, between = message(4, 0, 1), message(4, 0, 2) + message(4, 1, 3)
    assert nodes_of_2(4).transfer_s(inside) == 0.25 + 1
    assert nodes_of_2(4).transfer_s(between) == 0.5 + 10
    assert nodes_of_2(4, nics_per_node=1).transfer_s(between) == 0.5 + 20


@settings(max_examples=40, deadline=None)
@given(work=works())
def test_a_switch_is_a_link(work: AttentionWork) -> None:
    switch = switch_topology(work.degree, bandwidth_bytes_per_s=1e9, latency_s=1e-5)
    link = Link(bandwidth_bytes_per_s=1e9, latency_s=1e-5)
    for on_switch, on_link in zip(simulate_attention(work, switch, RATE), method_times(work, link, RATE), strict=True):
        assert on_switch.forward_s == pytest.approx(on_link.forward_s)
        assert on_switch.backward_s == pytest.approx(on_link.backward_s)
        assert on_switch.forward_bytes == on_link.forward_bytes


@settings(max_examples=30, deadline=None)
@given(work=works(), build=st.sampled_from(BUILDERS), factor=st.floats(1.0, 1000.0))
def test_faster_links_never_take_longer(work: AttentionWork, build: Builder, factor: float) -> None:
    slow, fast = (build(work.degree, bandwidth_bytes_per_s=1e9 * by, latency_s=1e-5) for by in (1.0, factor))
    slow_s, fast_s = simulated(work, slow), simulated(work, fast)
    for method, time in slow_s.items():
        assert fast_s[method].forward_s <= time.forward_s
        assert fast_s[method].backward_s <= time.backward_s


def test_a_topology_of_other_ranks_is_refused() -> None:
    with pytest.raises(PlanError, match="8 ranks, the group 4"):
        simulate_attention(make_work(4), switch_topology(8, bandwidth_bytes_per_s=1e9, latency_s=0.0), RATE)
    with pytest.raises(PlanError, match="bandwidth_bytes_per_s"):
        switch_topology(4, bandwidth_bytes_per_s=0.0, latency_s=0.0)


@pytest.mark.parametrize("causal", [True, False])
def test_token_ring_uses_both_directions_of_a_ring_where_the_plain_ring_uses_one(causal: bool) -> None:
    """The TokenRing paper's shape, on links so slow that nothing is hidden: 2 hops of q against 2 of k and v."""
    work = AttentionWork(degree=4, num_heads=32, num_key_heads=32, head_size=128, lengths=(24000,), causal=causal)
    slow = {
        build: simulated(work, build(4, bandwidth_bytes_per_s=PCIE / 10, latency_s=1e-5), A10) for build in BUILDERS
    }
    for build in (full_mesh_topology, physical_ring_topology):
        assert slow[build]["token_ring"].forward_s < slow[build]["ring"].forward_s
        assert slow[build]["token_ring"].backward_s < 0.8 * slow[build]["ring"].backward_s
    # One port in and one out: q, out and k, v are as many bytes, whatever their way.
    on_switch = slow[switch_topology]
    assert on_switch["token_ring"].forward_s > 0.9 * on_switch["ring"].forward_s
    # Half of k and v each way is less than all of q one way and the result up to half a ring back.
    on_ring = slow[physical_ring_topology]
    assert on_ring["bidirectional_ring"].forward_s < on_ring["token_ring"].forward_s


def test_few_key_heads_take_token_rings_advantage() -> None:
    work = AttentionWork(degree=4, num_heads=32, num_key_heads=8, head_size=128, lengths=(24000,))
    times = simulated(work, physical_ring_topology(4, bandwidth_bytes_per_s=PCIE / 10, latency_s=1e-5), A10)
    assert times["ring"].forward_s < times["token_ring"].forward_s


def test_the_bidirectional_ring_halves_the_load_only_where_links_are_point_to_point() -> None:
    work = make_work(8, rows=4096, causal=False)
    ratios = []
    for build in BUILDERS:
        times = simulated(work, build(8, bandwidth_bytes_per_s=1e9, latency_s=0.0))
        ratios.append(times["bidirectional_ring"].forward_communication_s / times["ring"].forward_communication_s)
    assert ratios == pytest.approx([1.0, 0.5, 0.5])


def test_direct_returns_pay_for_every_link_of_a_ring() -> None:
    """Per rank the bytes grow like N; on a ring the returns of N ranks over up to N/2 links grow like N squared."""

    def moved_s(degree: int, method: str) -> float:
        topology = physical_ring_topology(degree, bandwidth_bytes_per_s=1e9, latency_s=0.0)
        return simulated(make_work(degree, causal=False), topology)[method].forward_communication_s

    growth = {method: moved_s(32, method) / moved_s(8, method) for method in ("ring", "token_ring")}
    assert growth["ring"] == pytest.approx(31 / 7)
    assert growth["token_ring"] > 10


def test_neighbours_of_one_node_trade_before_they_cross_it() -> None:
    work = make_work(16, rows=8192, num_heads=16, num_key_heads=16)
    times = simulated(
        work,
        nodes_topology(
            16,
            inside_bandwidth_bytes_per_s=3e11,
            inside_latency_s=1e-5,
            nic_bandwidth_bytes_per_s=1e10,
            nic_latency_s=2e-5,
        ),
    )
    assert times["ulysses_ring"].forward_s < min(times[method].forward_s for method in ("ring", "all_gather"))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 64])
def test_every_pair_has_a_way(num_ranks: int) -> None:
    for build in (*BUILDERS, lambda n, **_: nodes_of_2(n)):
        topology = build(num_ranks, bandwidth_bytes_per_s=1e9, latency_s=1e-5)
        pairs = {source * num_ranks + target for source, target in itertools.permutations(range(num_ranks), 2)}
        assert set(topology.pairs.tolist()) == pairs
