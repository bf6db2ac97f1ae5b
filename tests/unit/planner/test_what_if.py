"""What-ifs: changes that can only help never make a step slower, and each kind of change touches what it says."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from planner import Cluster, CostModel, GroupKind, MethodCost, Node, RecomputePolicy, StepPlan, load_preset, plan_step
from planner.changed_models import neighbouring_clusters, with_faster_links, with_memory, with_node_memory
from planner.recosting import fits, grouping_of, plan_cluster, recosted_step_time_s, schedule, without
from planner.replanning import Replanning
from planner.sync_comparison import compare_syncs
from planner.what_if import WhatIf, what_ifs
from planner.wider_group import widened_step

from .planner_cases import long_tail, make_model

HELPING = (
    "replanned",
    "any-degree",
    "memory-x1.25",
    "memory-x2",
    "links-inside-x2",
    "links-between-x2",
    "one-node-more",
    "fixed-cost-x0.5",
    "zero-traffic-hidden",
)
RICH: dict[str, Any] = {
    "gpus_per_node": 2,
    "between_nodes_s": ((2, 2e-5), (4, 4e-5)),
    "zero_traffic_s": 0.05,
    "zero_overlap": 0.5,
    "unsharded_state_bytes": 1e6,
}


def rows_of(plan: StepPlan, lengths: list[int], model: CostModel) -> dict[str, WhatIf]:
    return {row.name: row for row in what_ifs(plan, lengths, model, time_limit_s=0.02).rows}


@pytest.mark.parametrize("policy", ["adaptive", "static:4"])
def test_changes_that_can_only_help_never_make_the_step_slower(policy: str) -> None:
    lengths, model = [*long_tail(20, seed=4, cap=8000), 20000], make_model(**RICH)
    plan = plan_step(lengths, 4, model, policy=policy, time_limit_s=0.05)
    found = what_ifs(plan, lengths, model, time_limit_s=0.02)
    rows = {row.name: row for row in found.rows}
    assert set(rows) == {*HELPING, "wider-bottleneck", "one-node-fewer", "sync-per-step"}
    replanned_s = found.replanned_step_time_s
    assert replanned_s is not None
    assert replanned_s <= plan.predicted_step_time_s
    for name in HELPING:
        step_time_s = rows[name].step_time_s
        assert step_time_s is not None
        assert step_time_s <= replanned_s
        assert rows[name].change == pytest.approx(step_time_s / plan.predicted_step_time_s - 1)
    fixed_s = rows["fixed-cost-x0.5"].step_time_s
    assert fixed_s is not None
    assert fixed_s <= replanned_s - model.b1_s / 2
    assert rows["one-node-fewer"].step_time_s is None
    assert "20000" in rows["one-node-fewer"].note.replace(",", "")
    assert found.sync is not None
    assert found.sync.reason in rows["sync-per-step"].note


def test_recosted_plan_takes_what_it_was_predicted() -> None:
    lengths, model = long_tail(20, seed=5, cap=8000), make_model(**RICH)
    for cluster in (None, Cluster((Node(2), Node(2, 0.5)))):
        for sync in ("per-layer", "per-step"):
            plan = plan_step(lengths, 4, model, sync=sync, time_limit_s=0.05, cluster=cluster)
            recosted_s = recosted_step_time_s(plan, lengths, model, plan_cluster(plan, model), sync)
            assert recosted_s == pytest.approx(plan.predicted_step_time_s)


def test_recompute_policy_of_a_group_is_kept() -> None:
    policy = RecomputePolicy(name="full", bytes_per_token=500.0, compute_factor=1.3)
    lengths, model = [8000], make_model(recompute_policies=(policy,))
    plan = plan_step(lengths, 1, model, policy="static:1")
    (micro_batch,) = plan.micro_batches
    full = dataclasses.replace(micro_batch, groups=(dataclasses.replace(micro_batch.groups[0], recompute="full"),))
    changed = dataclasses.replace(plan, micro_batches=(full,))
    recosted_s = recosted_step_time_s(changed, lengths, model, Cluster.uniform(1), "per-layer")
    expected_s = model.kind_time_s(lengths, GroupKind(1, recompute="full")) + model.fixed_step_s
    assert recosted_s == pytest.approx(expected_s)
    # Only with its policy do the activations fit.
    tight = with_memory(model, 0.5)
    assert recosted_step_time_s(changed, lengths, tight, Cluster.uniform(1), "per-layer") == pytest.approx(expected_s)


def test_groups_that_no_longer_fit_are_not_costed() -> None:
    lengths, model = [8000, 7000], make_model()
    plan = plan_step(lengths, 2, model, time_limit_s=0.05)
    cluster = plan_cluster(plan, model)
    assert recosted_step_time_s(plan, lengths, with_memory(model, 0.3), cluster, "per-layer") is None
    assert not fits(grouping_of(plan, cluster), lengths, with_memory(model, 0.3), 2, "per-layer")


def test_groups_left_empty_go() -> None:
    lengths, model = [20000, 300], make_model()
    plan = plan_step(lengths, 4, model, time_limit_s=0.05)
    grouping = grouping_of(plan, plan_cluster(plan, model))
    assert without(grouping, {0, 1}) == ()
    assert schedule((), lengths, model, 4, "per-layer").step_time_s == model.fixed_step_s
    assert [g.sequences for m in without(grouping, {0}) for g in m] == [(1,)]


@pytest.mark.parametrize("between", [{}, {"between_nodes_s": ((2, 2e-4), (16, 4e-4))}])
@pytest.mark.parametrize("gpus_per_node", [None, 4, 8])
def test_each_kind_of_link_changes_alone(between: dict[str, Any], gpus_per_node: int | None) -> None:
    ring = MethodCost(name="ring", communication_s=((2, 3e-6), (16, 5e-5)))
    tables = {"communication_s": ((2, 1e-6), (4, 2e-6), (16, 1e-4)), **between}
    model = make_model(**tables, gpus_per_node=gpus_per_node, methods=(ring,))
    same, inside, links = (with_faster_links(model, inside=i, between=b) for i, b in ((1, 1), (2, 1), (1, 2)))
    for degree in (2, 3, 4, 8, 12, 16, 32):
        for attention in ("ulysses", "ring"):
            for spans in (False, True):
                if gpus_per_node is not None and degree > gpus_per_node and not spans:
                    continue
                kind = GroupKind(degree, attention, spans_nodes=spans)
                before, unchanged, near, far = (
                    float(m.communication_times_s([4096], kind)[0]) for m in (model, same, inside, links)
                )
                assert unchanged == pytest.approx(before)
                assert near == pytest.approx(before if spans else before / 2)
                # No link between nodes is faster than the one inside, so it may gain less than all.
                assert far == pytest.approx(before) if not spans else before / 2 - 1e-15 <= far <= before


def test_preset_with_one_table_halves_what_crosses_nodes() -> None:
    model = load_preset("flexsp-gpt7b-64xa100-40g")
    kind = GroupKind(32, "ulysses", spans_nodes=True)
    faster = with_faster_links(model, between=2.0)
    assert faster.communication_times_s([9000], kind) == pytest.approx(model.communication_times_s([9000], kind) / 2)


def test_neighbouring_clusters() -> None:
    assert neighbouring_clusters(None, 16, 8) == (Cluster.uniform(24, 8), Cluster.uniform(8, 8))
    assert neighbouring_clusters(None, 8, 8) == (Cluster.uniform(16, 8), None)
    assert neighbouring_clusters(None, 4, None) == (Cluster.uniform(8), None)
    assert neighbouring_clusters(None, 64, None) == (Cluster.uniform(72), Cluster.uniform(56))
    mixed = Cluster((Node(4), Node(2, 0.5, 1e7)))
    more, fewer = neighbouring_clusters(mixed, 6, 8)
    assert (more.num_ranks, more.nodes[-1], fewer) == (8, mixed.nodes[-1], Cluster((Node(4),)))
    assert [node.memory_limit_bytes for node in with_node_memory(mixed, 2).nodes] == [None, 2e7]


def test_heads_that_limit_the_degree_are_a_row() -> None:
    lengths, model = [12000, 500], make_model(num_heads=2, memory_limit_bytes=1e9)
    plan = plan_step(lengths, 4, model, time_limit_s=0.05)
    row = rows_of(plan, lengths, model)["double-degree"]
    assert row.what == "groups up to degree 4, not 2"
    assert row.change is not None
    assert row.change < 0


def test_slowest_group_gets_twice_its_degree_from_the_others() -> None:
    lengths, model = [8000, 300, 200], make_model(memory_limit_bytes=1e9, communication_s=())
    plan = plan_step(lengths, 2, model, policy="static:1", time_limit_s=0.05)
    cluster = plan_cluster(plan, model)
    grouping = grouping_of(plan, cluster)
    timed = schedule(grouping, lengths, model, 2, "per-layer")
    wider = widened_step(grouping, timed, lengths, model, cluster, "per-layer", "ulysses")
    assert wider is not None
    assert (wider.micro_batch, wider.degree, wider.num_displaced) == (0, 2, 1)
    expected_s = model.kind_time_s(lengths, GroupKind(2, "ulysses"))
    assert wider.wider_time_s == pytest.approx(expected_s)
    assert wider.step_time_s == pytest.approx(expected_s + model.fixed_step_s)
    tight = dataclasses.replace(model, memory_limit_bytes=model.state_bytes(2) + 2000 * 4050.0)
    assert widened_step(grouping, timed, lengths, tight, cluster, "per-layer", "ulysses") is None
    assert widened_step(grouping, timed, lengths, make_model(num_heads=1), cluster, "per-layer", "ulysses") is None


def test_settings_of_a_plan_are_read_from_its_groups() -> None:
    lengths, model = [20000, 900], make_model()
    plan = plan_step(lengths, 4, model, attention="ring", time_limit_s=0.05)
    assert Replanning.like(plan, model).attention == "ring"
    assert Replanning.like(plan, model).degrees == "powers-of-two"
    several = make_model(methods=(MethodCost(name="ring", communication_s=((2, 1e-7),)),))
    assert Replanning.like(plan, several).attention is None
    odd = plan_step(lengths, 3, model, policy="static:3", attention="ring", time_limit_s=0.05)
    assert Replanning.like(odd, model).degrees == "any"
    assert "any-degree" not in rows_of(odd, lengths, model)


def test_sync_comparison_says_which_wins_and_why() -> None:
    lengths = [*long_tail(20, seed=4, cap=8000), 20000]
    model = make_model(**RICH)
    plan = plan_step(lengths, 4, model, time_limit_s=0.05)
    grouping = grouping_of(plan, plan_cluster(plan, model))
    assert len(grouping) > 1
    wins = compare_syncs(grouping, lengths, model, 4, per_layer_s=2.0, per_step_s=1.5)
    assert (wins.winner, wins.traffic_saved_s) == ("per-step", pytest.approx((len(grouping) - 1) * 0.025))
    assert wins.reason.startswith("per-step is 25.0% faster: per-step saves these groups")
    assert wins.waiting_saved_s >= 0
    loses = compare_syncs(grouping, lengths, model, 4, per_layer_s=1.0, per_step_s=1.1)
    assert loses.winner == "per-layer"
    assert "GB more on every rank" in loses.reason
    alone = compare_syncs(grouping, lengths, model, 4, per_layer_s=1.0, per_step_s=None)
    assert alone.reason.startswith("per-layer is the only one with a plan")
    assert compare_syncs(grouping, lengths, model, 4, per_layer_s=1.0, per_step_s=1.0).winner == "equal"


def test_per_step_that_needs_too_much_memory_loses() -> None:
    lengths = [9000, 9000, 300, 200]
    model = make_model(**{**RICH, "unsharded_state_bytes": 1.9e7})
    plan = plan_step(lengths, 4, model, time_limit_s=0.05)
    found = what_ifs(plan, lengths, model, time_limit_s=0.02)
    assert found.sync is not None
    assert (found.sync.winner, found.sync.per_step_s, found.sync.grouping_fits_per_step) == ("per-layer", None, False)
    assert "too much for these groups" in found.sync.reason
    unknown = make_model(**{**RICH, "unsharded_state_bytes": None})
    plan = plan_step(lengths, 4, unknown, time_limit_s=0.05)
    assert what_ifs(plan, lengths, unknown, time_limit_s=0.05).sync is None
