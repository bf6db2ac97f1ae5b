"""Linear attention over shards: exact bytes of every method, times that follow the formulas, and the choice."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import (
    LINEAR_METHODS,
    LinearAttentionShape,
    LinearAttentionWork,
    Link,
    LocalPass,
    PlanError,
    choose_linear_method,
    linear_method_bytes,
    linear_method_times,
    nodes_topology,
)
from planner.linear_attention_cost import lasp2_s, ring_s, serial_scan_s, ulysses_s, zeco_s

LINK = Link(bandwidth_bytes_per_s=1e9, latency_s=1e-5)
FORWARD = LocalPass(whole_s=10e-3, summary_s=2e-3, intra_s=5e-3, transition_s=1e-3, combine_s=1e-4)
BACKWARD = LocalPass(whole_s=20e-3, summary_s=4e-3, intra_s=9e-3, combine_s=1e-4)


def shape(**changes: Any) -> LinearAttentionShape:
    return LinearAttentionShape(**{"num_heads": 8, "key_size": 16, "value_size": 32, **changes})


def one_document(degree: int, **changes: Any) -> LinearAttentionWork:
    return LinearAttentionWork(lengths=(1000 * degree,), degree=degree, shape=shape(**changes))


def owners(lengths: tuple[int, ...], degree: int) -> list[int]:
    """The rank of every token of the concatenation, by hand."""
    total = sum(lengths)
    return [
        next(r for r in range(degree) if r * total // degree <= t < (r + 1) * total // degree) for t in range(total)
    ]


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6).map(tuple),
    degree=st.integers(1, 9),
    rule=st.sampled_from(["additive", "delta"]),
    backward=st.booleans(),
)
def test_bytes_of_scans_are_states_and_transitions_of_documents_that_cross_borders(
    lengths: tuple[int, ...], degree: int, rule: str, backward: bool
) -> None:
    work = LinearAttentionWork(lengths=lengths, degree=degree, shape=shape(rule=rule))
    state = 8 * 16 * 32 * 4
    transition = 8 * 16 * (16 if rule == "delta" else 1) * 4
    rank_of, start = owners(lengths, degree), 0
    gathered = serial = 0
    chains = []
    for length in lengths:
        m = len(set(rank_of[start : start + length]))
        chains += [tuple(sorted(set(rank_of[start : start + length])))] if m > 1 else []
        start += length
        gathered += m * (m - 1) // 2 * state + (m - 1) * (m - 2) // 2 * transition
        serial += (m - 1) * state
    assert work.chains == tuple(chains)
    assert work.tokens_by_rank.tolist() == [rank_of.count(rank) for rank in range(degree)]
    assert linear_method_bytes(work, "lasp2", backward=backward) == gathered
    assert linear_method_bytes(work, "lasp1", backward=backward) == serial
    assert linear_method_bytes(work, "zeco", backward=backward) == serial


@pytest.mark.parametrize(
    ("changes", "input_bytes", "ring_forward", "ring_backward"),
    [
        # Of one token: q, k of 8*16, v of 8*32 numbers of 2 bytes; decay of 8 or 8*16 numbers of 4 bytes; 8 betas.
        ({}, 1024, 768, 768),
        ({"decay": "constant"}, 1024, 768, 768),
        ({"decay": "head", "decay_bytes": 4}, 1024 + 32, 768 + 32, 768 + 32),
        ({"decay": "channel"}, 1024 + 256, 768 + 256, 768 + 256),
        ({"decay": "channel", "rule": "delta"}, 1024 + 256 + 16, 768 + 256 + 16, 2 * 768 + 256 + 16),
    ],
)
def test_bytes_of_rows_by_gates(
    changes: dict[str, Any], input_bytes: int, ring_forward: int, ring_backward: int
) -> None:
    work = LinearAttentionWork(lengths=(33, 1, 68), degree=4, shape=shape(**changes))
    traded = 102 * 3 * (input_bytes + 512) // 4
    for backward in (False, True):
        assert linear_method_bytes(work, "ulysses", backward=backward) == traded
    assert linear_method_bytes(work, "ring", backward=False) == 3 * 102 * ring_forward
    assert linear_method_bytes(work, "ring", backward=True) == 3 * 102 * ring_backward


def test_only_rows_cost_bytes_in_proportion_to_the_length() -> None:
    short, long = (LinearAttentionWork(lengths=(n,), degree=8, shape=shape()) for n in (1000, 16000))
    for method in ("lasp2", "lasp1", "zeco"):
        assert linear_method_bytes(short, method, backward=False) == linear_method_bytes(long, method, backward=False)
    for method in ("ulysses", "ring"):
        assert 16 * linear_method_bytes(short, method, backward=False) == linear_method_bytes(
            long, method, backward=False
        )


def test_one_exchange_hides_behind_the_work_on_own_chunks() -> None:
    work = one_document(4)
    last_receives = 3 * work.shape.state_bytes + 2 * work.shape.transition_bytes
    exchange_s = 1e-5 + last_receives / 1e9
    assert exchange_s < FORWARD.intra_s
    assert lasp2_s(work, LINK, FORWARD, backward=False) == pytest.approx(10e-3 + 1e-3 + 2 * 1e-4)
    slow = Link(bandwidth_bytes_per_s=1e7, latency_s=1e-5)
    exchange_s = 1e-5 + last_receives / 1e7
    expected_s = 2e-3 + 1e-3 + exchange_s + 2 * 1e-4 + 3e-3
    assert lasp2_s(work, slow, FORWARD, backward=False) == pytest.approx(expected_s)
    # Two ranks have nobody inside the chain: no transition, nothing to combine.
    assert lasp2_s(one_document(2), LINK, FORWARD, backward=False) == pytest.approx(10e-3)


def test_serial_hops_add_up_along_the_chain() -> None:
    slow = Link(bandwidth_bytes_per_s=1e6, latency_s=1e-3)
    for degree, backward in itertools.product((2, 3, 8), (False, True)):
        work, local = one_document(degree), BACKWARD if backward else FORWARD
        hop_s = 1e-3 + work.shape.state_bytes / 1e6
        arrived_s = local.summary_s + (degree - 1) * hop_s + (degree - 2) * local.combine_s
        assert serial_scan_s(work, slow, local, backward=backward) == pytest.approx(arrived_s + local.rest_s)


def test_blocks_are_a_pipeline_of_m_minus_2_plus_b_steps_and_the_best_number_is_taken() -> None:
    link = Link(bandwidth_bytes_per_s=1e6, latency_s=1e-3)
    local = LocalPass(whole_s=0.0)
    work = one_document(8)
    for num_blocks in (1, 4, 32):
        step_s = 1e-3 + work.shape.state_bytes / num_blocks / 1e6
        made_s = serial_scan_s(work, link, local, backward=False, num_blocks=num_blocks)
        assert made_s == pytest.approx((8 - 2 + num_blocks) * step_s)
    best_s, num_blocks = zeco_s(work, link, local, backward=False)
    assert best_s == pytest.approx(
        min((6 + b) * (1e-3 + work.shape.state_bytes / b / 1e6) for b in (1, 2, 4, 8, 16, 32))
    )
    assert 1 < num_blocks <= 32
    # Two ranks have nothing to pipeline.
    assert zeco_s(one_document(2), link, local, backward=False)[1] == 1


def test_rows_of_heads_and_of_rings_take_their_exchanges() -> None:
    work = one_document(4)
    token_bytes = 1024 + 512
    expected_s = 10e-3 + 2 * 1e-5 + 1000 * token_bytes * 3 / 4 / 1e9
    assert ulysses_s(work, LINK, FORWARD, backward=False) == pytest.approx(expected_s)
    slow = Link(bandwidth_bytes_per_s=1e7, latency_s=1e-5)
    hop_s = 1e-5 + 1000 * 768 / 1e7
    assert ring_s(work, slow, FORWARD, backward=False) == pytest.approx(3 * hop_s + FORWARD.summary_s + 1e-4)
    assert ring_s(work, LINK, FORWARD, backward=False) == pytest.approx(10e-3 + 3 * (2e-3 + 1e-4))


@pytest.mark.parametrize("method", [*LINEAR_METHODS, "ring"])
def test_one_rank_takes_the_local_operator_alone(method: str) -> None:
    (time,) = linear_method_times(one_document(1), LINK, FORWARD, BACKWARD, [method])
    assert (time.forward_s, time.backward_s, time.forward_bytes) == (10e-3, 20e-3, 0)


def test_documents_that_cross_no_border_take_the_local_operator_alone() -> None:
    work = LinearAttentionWork(lengths=(100, 100), degree=2, shape=shape())
    decision = choose_linear_method(work, LINK, FORWARD, BACKWARD)
    assert (decision.method, decision.chosen.total_s) == ("lasp2", pytest.approx(30e-3))
    assert "no document crosses a border" in decision.reason


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 2000), min_size=1, max_size=5).map(tuple),
    degree=st.sampled_from([1, 2, 3, 4, 8]),
    bandwidth=st.floats(1e6, 1e12),
    latency=st.floats(0.0, 1e-2),
)
def test_no_method_is_faster_than_the_local_work_and_the_choice_is_the_fastest(
    lengths: tuple[int, ...], degree: int, bandwidth: float, latency: float
) -> None:
    work = LinearAttentionWork(lengths=lengths, degree=degree, shape=shape())
    decision = choose_linear_method(work, Link(bandwidth_bytes_per_s=bandwidth, latency_s=latency), FORWARD, BACKWARD)
    for time in decision.times:
        assert time.forward_s >= FORWARD.whole_s * (1 - 1e-12)
        assert time.backward_s >= BACKWARD.whole_s * (1 - 1e-12)
        assert decision.chosen.total_s <= time.total_s * (1 + 1e-9)


def test_two_ranks_tie_and_lasp2_runs() -> None:
    decision = choose_linear_method(one_document(2), LINK, FORWARD, BACKWARD, ("zeco", "lasp1", "lasp2"))
    assert decision.method == "lasp2"
    assert "takes as long" in decision.reason
    assert "<- chosen" in decision.explain()
    assert "\n" not in decision.reason


def test_short_documents_trade_heads_and_long_ones_states() -> None:
    """Rows of few tokens are less than states, rows of many more."""
    bare, big = LocalPass(whole_s=1e-4), shape(key_size=128, value_size=128)
    link = Link(bandwidth_bytes_per_s=1e8, latency_s=1e-6)
    few, many = (LinearAttentionWork(lengths=(n,), degree=8, shape=big) for n in (64, 65536))
    assert choose_linear_method(few, link, bare, bare).method == "ulysses"
    assert choose_linear_method(many, link, bare, bare).method != "ulysses"


def test_more_ranks_favour_one_exchange_over_serial_hops() -> None:
    local = LocalPass(whole_s=1e-3, summary_s=2e-4, intra_s=4e-4)
    gains = []
    for degree in (2, 4, 8, 16):
        topology = nodes_topology(
            degree,
            inside_bandwidth_bytes_per_s=2e11,
            inside_latency_s=1e-5,
            nic_bandwidth_bytes_per_s=2.5e10,
            nic_latency_s=4e-5,
            ranks_per_node=2,
        )
        work = one_document(degree, key_size=128, value_size=128)
        lasp2, lasp1 = linear_method_times(work, topology, local, local, ("lasp2", "lasp1"))
        gains.append(lasp1.total_s / lasp2.total_s)
    assert gains[0] == pytest.approx(1.0)
    assert gains == sorted(gains)
    assert gains[-1] > 1.1


def test_heads_that_do_not_divide_cost_ulysses_the_work_of_the_fullest_rank() -> None:
    even, uneven = (
        linear_method_times(one_document(degree), LINK, FORWARD, BACKWARD, ["ulysses"])[0] for degree in (4, 3)
    )
    assert even.forward_added_s == pytest.approx(even.forward_s - FORWARD.whole_s)
    # Of 8 heads one rank of three runs 3.
    assert uneven.forward_s > FORWARD.whole_s * 9 / 8
    with pytest.raises(PlanError, match="no method of linear attention is allowed"):
        choose_linear_method(one_document(3), LINK, FORWARD, BACKWARD, ())


def test_bad_arguments_name_what_was_expected() -> None:
    with pytest.raises(PlanError, match="'lasp3' is unknown; expected one of lasp2"):
        linear_method_times(one_document(2), LINK, FORWARD, BACKWARD, ["lasp3"])
    with pytest.raises(PlanError, match="rule is 'gated'"):
        shape(rule="gated")
    with pytest.raises(PlanError, match="more than whole_s"):
        dataclasses.replace(FORWARD, whole_s=1e-3)
    with pytest.raises(PlanError, match="no documents"):
        LinearAttentionWork(lengths=(), degree=2, shape=shape())
