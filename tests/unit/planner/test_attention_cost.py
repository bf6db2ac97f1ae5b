"""Cost of parallel attention: bytes are the table's, times follow the link, and decisions name their reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import ATTENTION_METHODS, AttentionWork, KernelRate, Link, MethodTime, PlanError
from planner import choose_methods as choose
from planner import method_times as times_of
from planner.attention_cost import why_not
from planner.attention_rates import HostRate
from planner.attention_shards import Shards

from .attention_cases import FAST, RATE, SLOW, make_work, works

# As measured with FlashAttention-4 and NCCL on an H100.
HOST = HostRate(forward_call_s=3.5e-4, backward_call_s=6e-4, exchange_s=8e-5, row_operation_s=5e-5)
RINGS = ("ring", "bidirectional_ring", "token_ring", "all_gather")


def by_method(work: AttentionWork, link: Link = FAST, **arguments: Any) -> dict[str, MethodTime]:
    return {time.method: time for time in times_of(work, link, RATE, **arguments)}


def visible(work: AttentionWork, document: int) -> int:
    """Pairs of a document, by forming its mask."""
    queries, keys = work.lengths[document], work.lengths_of_keys[document]
    behind = np.arange(queries)[:, None] - np.arange(keys)
    seen = np.ones((queries, keys), dtype=bool)
    if work.causal:
        seen &= behind >= 0
    if work.window is not None:
        seen &= behind < work.window
    return int(seen.sum())


@pytest.mark.parametrize(
    "changes",
    [
        {"degree": 0},
        {"num_heads": 6},
        {"head_size": 0},
        {"lengths": ()},
        {"lengths": (4, 0)},
        {"window": 0},
        {"window": 4, "causal": False},
        {"key_lengths": (4096,)},
        {"key_lengths": (4096, 1), "causal": False},
        {"element_bytes": 0},
    ],
)
def test_work_that_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        make_work(**changes)


def test_links_and_rates_out_of_range_are_refused() -> None:
    with pytest.raises(PlanError, match="bandwidth_bytes_per_s"):
        Link(bandwidth_bytes_per_s=0.0, latency_s=0.0)
    with pytest.raises(PlanError, match="efficient_rows"):
        dataclasses.replace(RATE, efficient_rows=-1.0)


@pytest.mark.parametrize("key_lengths", [None, (7, 40, 1)])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 5), (True, 64), (False, None)])
def test_pairs_and_flops_are_those_of_the_mask(
    causal: bool, window: int | None, key_lengths: tuple[int, ...] | None
) -> None:
    keys = None if causal else key_lengths
    work = make_work(2, lengths=(63, 1, 127), causal=causal, window=window, key_lengths=keys)
    assert work.num_pairs == sum(visible(work, document) for document in range(3))
    assert work.forward_flops == 4 * work.head_size * work.num_heads * work.num_pairs
    assert work.backward_flops == 2.5 * work.forward_flops


@settings(max_examples=100, deadline=None)
@given(work=works())
def test_ranks_hold_all_tokens_and_are_level(work: AttentionWork) -> None:
    tokens = work.tokens_per_rank
    assert sum(tokens) == work.num_tokens
    assert sum(work.key_tokens_per_rank) == sum(work.lengths_of_keys)
    assert max(tokens) - min(tokens) < 2 * work.degree


@settings(max_examples=100, deadline=None)
@given(work=works(), merged=st.sampled_from([1, 2, 3]))
def test_every_pair_is_the_work_of_one_pair_of_ranks(work: AttentionWork, merged: int) -> None:
    shards = Shards(work, 0.0, merged if work.degree % merged == 0 else 1)
    parts = sum(shards.pairs(part).padded_pairs.sum() for part in (0, 1))
    # Equal chunks that are no whole number of tokens put the end of a window a fraction of a row off.
    rounding = 0.0 if work.window is None else work.degree * len(work.lengths)
    gathered = (shards.gathered().padded_pairs + shards.apart().padded_pairs).sum()
    for pairs in (shards.pairs().padded_pairs.sum(), gathered, parts):
        assert pairs == pytest.approx(work.num_pairs, rel=1e-9, abs=rounding)


@settings(max_examples=100, deadline=None)
@given(work=works(), factor=st.floats(1.0, 10.0))
def test_padding_adds_at_most_that_of_short_segments(work: AttentionWork, factor: float) -> None:
    """A segment of one row is padded most, by (1 + n0) on each side."""
    rows = factor * 50.0
    for exact, padded in (
        (Shards(work, 0.0).pairs().padded_pairs, Shards(work, rows).pairs().padded_pairs),
        (Shards(work, 0.0).gathered().padded_pairs, Shards(work, rows).gathered().padded_pairs),
    ):
        assert np.all(exact <= padded)
        assert np.all(padded <= exact * (1 + rows) ** 2 * (1 + 1e-9))


@pytest.mark.parametrize("degree", [3, 4, 8])
@pytest.mark.parametrize(("num_heads", "num_key_heads"), [(24, 24), (24, 6), (24, 3)])
def test_bytes_of_a_dense_document_are_those_of_the_table(degree: int, num_heads: int, num_key_heads: int) -> None:
    """ALGORITHMS.md section 2; the sums of the ring take one hop less, because a rank's own never leave it."""
    work = make_work(degree, num_heads=num_heads, num_key_heads=num_key_heads, causal=False)
    times = by_method(work)
    q = 1024 * num_heads * 64 * 2
    unit, g, d = degree * (degree - 1) * q, num_heads / num_key_heads, 64
    expected = {
        "ring": (2 * unit / g, 2 * 3 * unit / g),
        "bidirectional_ring": (2 * unit / g, 2 * 3 * unit / g),
        "token_ring": ((2 + 2 / d) * unit, (3 + 4 / d) * unit),
        # The gradients go home in fp32.
        "all_gather": (2 * unit / g, 6 * unit / g),
    }
    if why_not("ulysses", work) is None:
        k = max(num_key_heads, degree) / num_heads
        expected["ulysses"] = ((2 + 2 * k) * unit / degree,) * 2
    for method, (forward, backward) in expected.items():
        assert times[method].forward_bytes == pytest.approx(forward, abs=1), method
        assert times[method].backward_bytes == pytest.approx(backward, abs=1), method


def test_two_ranks_return_sums_in_the_inputs_own_type() -> None:
    work = make_work(2, num_heads=4, causal=False)
    assert by_method(work)["ring"].backward_bytes == 2 * 4 * 1024 * 4 * 64 * 2


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_causality_trims_a_quarter_of_what_moves(degree: int) -> None:
    causal, full = (by_method(make_work(degree, causal=causal)) for causal in (True, False))
    for method in ("ring", "token_ring", "all_gather"):
        assert causal[method].forward_bytes == 0.75 * full[method].forward_bytes, method
    assert causal["token_ring"].backward_bytes == 0.75 * full["token_ring"].backward_bytes
    # Of keys that go forwards only the document's last chunk is trimmed, of the sums that follow a quarter.
    keys, sums = 1 - 1 / (2 * degree), 0.75 * (1 if degree == 2 else 2)
    share = (keys + sums) / (1 + sums / 0.75)
    assert causal["ring"].backward_bytes == pytest.approx(share * full["ring"].backward_bytes, abs=1)
    for method in ATTENTION_METHODS:
        if method in causal:
            assert causal[method].forward_s < full[method].forward_s


@pytest.mark.parametrize("method", RINGS)
def test_documents_that_stay_whole_move_nothing(method: str) -> None:
    for causal in (True, False):
        time = by_method(make_work(lengths=(5, 3, 7, 6), causal=causal))[method]
        assert (time.forward_bytes, time.backward_bytes) == (0, 0)
        assert time.forward_exposed_s == 0.0


def test_packed_documents_move_what_each_would_alone() -> None:
    lengths = (800, 1600, 5)
    packed = by_method(make_work(lengths=lengths))
    alone = [by_method(make_work(lengths=(length,))) for length in lengths]
    for method in RINGS:
        assert packed[method].forward_bytes == sum(times[method].forward_bytes for times in alone)


@pytest.mark.parametrize("method", RINGS)
def test_only_rows_inside_the_window_move(method: str) -> None:
    windows = (1, 100, 512, 1500, None)
    moved = [by_method(make_work(window=window))[method].forward_bytes for window in windows]
    assert moved[0] == 0
    assert moved == sorted(moved)
    assert moved[1] < moved[-1]


def test_a_window_inside_a_chunk_is_gathered_from_the_chunk_before() -> None:
    """99 rows of each of the 7 chunks that have one after them on another rank; chunks 3 and 4 are both rank 3's."""
    work = make_work(window=100)
    assert by_method(work)["all_gather"].forward_bytes == 6 * 99 * 2 * work.num_key_heads * 64 * 2


def test_cross_attention_moves_keys_to_the_rank_that_asks() -> None:
    # The one query document is whole on rank 0, which has a quarter of the keys.
    work = make_work(lengths=(5,), key_lengths=(4096,), causal=False)
    times = by_method(work)
    assert times["all_gather"].forward_bytes == 3 * 1024 * 2 * work.num_key_heads * 64 * 2
    assert times["token_ring"].forward_bytes < times["all_gather"].forward_bytes


@pytest.mark.parametrize("backward", [False, True])
def test_a_group_of_one_takes_the_time_of_its_kernel(backward: bool) -> None:
    work = make_work(1, causal=False)
    (time,) = times_of(work, FAST, RATE)
    assert time.method == "local"
    assert time.forward_bytes == time.backward_bytes == 0
    flops = work.backward_flops if backward else work.forward_flops
    rate = RATE.backward_flops_per_s if backward else RATE.forward_flops_per_s
    saturation = (1024 / (1024 + RATE.efficient_rows)) ** 2
    assert (time.backward_s if backward else time.forward_s) == pytest.approx(
        RATE.launch_s + flops / (rate * saturation)
    )


@settings(max_examples=60, deadline=None)
@given(work=works(), factor=st.floats(1.0, 1e6))
def test_a_faster_link_never_takes_longer(work: AttentionWork, factor: float) -> None:
    faster = dataclasses.replace(SLOW, bandwidth_bytes_per_s=SLOW.bandwidth_bytes_per_s * factor)
    half_duplex = dataclasses.replace(SLOW, duplex=False)
    slow, fast, half = (by_method(work, link) for link in (SLOW, faster, half_duplex))
    for method, time in slow.items():
        assert fast[method].forward_s <= time.forward_s <= half[method].forward_s
        assert fast[method].backward_s <= time.backward_s <= half[method].backward_s
        assert fast[method].forward_bytes == time.forward_bytes


@settings(max_examples=60, deadline=None)
@given(work=works())
def test_times_hold_together(work: AttentionWork) -> None:
    for time in times_of(work, SLOW, RATE):
        for total_s, exposed_s, communication_s in (
            (time.forward_s, time.forward_exposed_s, time.forward_communication_s),
            (time.backward_s, time.backward_exposed_s, time.backward_communication_s),
        ):
            assert 0 <= exposed_s <= communication_s + 1e-12
            assert exposed_s < total_s
        kernels_s = work.forward_flops / work.degree / RATE.forward_flops_per_s
        assert time.forward_s > 0.9 * kernels_s


@settings(max_examples=60, deadline=None)
@given(work=works())
def test_no_other_choice_is_predicted_faster(work: AttentionWork) -> None:
    decision = choose(work, SLOW, RATE)
    chosen_s = decision.forward_s + decision.backward_s
    for time in decision.times:
        assert chosen_s <= time.total_s
    if decision.forward != decision.backward:
        assert {decision.forward, decision.backward} <= set(RINGS)
    again = choose(work, SLOW, RATE)
    assert (again.forward, again.backward) == (decision.forward, decision.backward)


def test_explanation_names_the_winner_and_what_was_left_out() -> None:
    decision = choose(make_work(6), SLOW, RATE, (*ATTENTION_METHODS, "rsa"))
    text = decision.explain()
    chosen = [line for line in text.splitlines() if line.endswith("<- chosen")]
    assert [line.split()[:2] for line in chosen] == [[decision.forward, "forward"], [decision.backward, "backward"]]
    assert text.splitlines()[-1].startswith(decision.forward)
    assert "ulysses: left out, 6 ranks cannot share 8 query and 4 key heads equally" in text
    assert "rsa: left out, a baseline" in text
    assert dict(decision.left_out).keys() == {"ulysses", "rsa"}
    for column in ("compute", "communication", "exposed", "host", "total"):
        assert column in text.splitlines()[0]
    assert "host" not in decision.reason


def test_the_host_issues_every_kernel_exchange_and_row_operation() -> None:
    degree = 4
    (ring,) = times_of(make_work(degree), FAST, dataclasses.replace(RATE, host=HOST), ("ring",))
    per_call_s = HOST.forward_call_s + HOST.row_operation_s
    assert ring.forward_host_s == pytest.approx(degree * per_call_s + (degree - 1) * HOST.exchange_s)
    # Three gradients of each call; keys travel in the first exchanges, sums in the last, and are added at each arrival.
    per_call_s = HOST.backward_call_s + 3 * HOST.row_operation_s
    arrivals_s = 2 * (degree - 1) * HOST.row_operation_s
    assert ring.backward_host_s == pytest.approx(degree * per_call_s + (degree + 1) * HOST.exchange_s + arrivals_s)


@settings(max_examples=60, deadline=None)
@given(work=works(), slowness=st.floats(0.0, 100.0))
def test_a_pass_takes_as_long_as_the_slower_of_device_and_host(work: AttentionWork, slowness: float) -> None:
    host = HostRate(**{key: slowness * value for key, value in dataclasses.asdict(HOST).items()})
    without = by_method(work)
    for time in times_of(work, FAST, dataclasses.replace(RATE, host=host)):
        assert time.forward_s == max(without[time.method].forward_s, time.forward_host_s)
        assert time.backward_s == max(without[time.method].backward_s, time.backward_host_s)
        assert time.forward_host_s >= host.forward_call_s
        assert time.backward_host_s >= host.backward_call_s


def test_a_host_factor_makes_the_host_slower_and_nothing_else() -> None:
    work, slow_host = make_work(4, rows=1024), dataclasses.replace(RATE, host=HOST)
    plain = {time.method: time for time in times_of(work, FAST, slow_host)}
    slower = {time.method: time for time in times_of(work, FAST, slow_host, host_factors={"ring": (2.0, 3.0)})}
    assert slower["ring"].forward_host_s == pytest.approx(2 * plain["ring"].forward_host_s)
    assert slower["ring"].backward_host_s == pytest.approx(3 * plain["ring"].backward_host_s)
    assert slower["ring"].forward_compute_s == plain["ring"].forward_compute_s
    assert {name: slower[name] for name in slower if name != "ring"} == {
        name: plain[name] for name in plain if name != "ring"
    }


def test_whole_documents_hide_the_gather() -> None:
    work = make_work(
        2, num_heads=32, num_key_heads=8, head_size=128, lengths=(4100, 1740, 5240, 5872, 3904, 4704, 3504, 3332)
    )
    apart, joined = (
        {time.method: time for time in times_of(work, FAST, RATE, whole_apart=whole_apart)}["all_gather"]
        for whole_apart in (True, False)
    )
    assert apart.forward_exposed_s < joined.forward_exposed_s
    assert apart.backward_exposed_s < joined.backward_exposed_s
    assert (apart.forward_bytes, apart.backward_bytes) == (joined.forward_bytes, joined.backward_bytes)


def test_where_the_host_decides_fewer_calls_win() -> None:
    """Packed, 8K tokens on each of two ranks: measured there, a ring's forward took 1.57 times as long as all-gather."""
    work = make_work(
        2, num_heads=32, num_key_heads=8, head_size=128, lengths=(5000, 2400, 4000, 1600, 800, 1200, 900, 484)
    )
    slow_host = dataclasses.replace(RATE, host=HOST)
    by_host = {time.method: time for time in times_of(work, FAST, slow_host, whole_apart=False)}
    decision = choose(work, FAST, slow_host, whole_apart=False)
    assert decision.forward == "all_gather"
    assert 1.3 < by_host["ring"].forward_s / by_host["all_gather"].forward_s < 2.1
    assert "waiting for the host" in decision.explain()
    # Long documents hide the host.
    assert choose(make_work(2, rows=65536), FAST, slow_host).times == tuple(
        dataclasses.replace(time, forward_host_s=host.forward_host_s, backward_host_s=host.backward_host_s)
        for time, host in zip(
            times_of(make_work(2, rows=65536), FAST, RATE),
            times_of(make_work(2, rows=65536), FAST, slow_host),
            strict=True,
        )
    )


def test_methods_that_cannot_run_say_why() -> None:
    assert why_not("ulysses", make_work(8)) is None
    assert why_not("ulysses", make_work(16)) is not None
    assert why_not("ulysses_ring", make_work(16)) is None
    assert why_not("ulysses_ring", make_work(2)) is not None
    assert why_not("ulysses_ring", make_work(7)) is not None
    with pytest.raises(PlanError, match="'spiral' is unknown"):
        times_of(make_work(), FAST, RATE, ("spiral",))
    with pytest.raises(PlanError, match="no method can run"):
        choose(make_work(7), FAST, RATE, ("ulysses",))


def test_hiding_the_last_return_only_helps_where_the_link_is_slow() -> None:
    for method in ("ring", "bidirectional_ring", "token_ring"):
        shown, hidden = (
            by_method(make_work(rows=8192), Link(bandwidth_bytes_per_s=1e11, latency_s=1e-5), hides_last_return=hides)[
                method
            ]
            for hides in (False, True)
        )
        assert hidden.backward_s < shown.backward_s
        assert hidden.backward_bytes == shown.backward_bytes


def test_short_documents_run_below_the_rate() -> None:
    long, short = (make_work(1, lengths=lengths) for lengths in ((4096,), (64,) * 4096))

    def efficiency(work: AttentionWork) -> float:
        (time,) = times_of(work, FAST, RATE)
        return work.forward_flops / RATE.forward_flops_per_s / time.forward_s

    assert efficiency(short) < 0.2 < 0.6 < efficiency(long)
    exact = KernelRate(
        forward_flops_per_s=1e12, backward_flops_per_s=1e12, launch_s=0.0, copy_bytes_per_s=1e12, efficient_rows=0.0
    )
    (time,) = times_of(short, FAST, exact)
    assert time.forward_s == pytest.approx(short.forward_flops / 1e12)
