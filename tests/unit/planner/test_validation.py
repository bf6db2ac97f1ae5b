"""The validator beside the cost model: methods, recompute, nodes and sync, on plans that are built by hand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import (
    Cluster,
    CostModel,
    CostModelReference,
    GroupKind,
    GroupPlan,
    MethodCost,
    MicroBatchPlan,
    Node,
    PlanError,
    RecomputePolicy,
    StepPlan,
    load_preset,
    validate_plan,
)

from .planner_cases import make_model

Group = tuple[tuple[int, ...], str, str, tuple[int, ...]]

CLUSTER = Cluster((Node(4), Node(3, 0.5, 1.5e7), Node(5, 2.0)))
RICH: dict[str, Any] = {
    "methods": (
        MethodCost(
            name="ring", communication_s=((2, 1e-4),), between_nodes_s=((2, 2e-4), (4, 9e-4)), overlap=0.3, fixed_s=0.01
        ),
    ),
    "recompute_policies": (
        RecomputePolicy(name="full", bytes_per_token=500.0, compute_factor=1.3, communication_factor=1.4),
    ),
    "overlap": 0.6,
    "method_fixed_s": 0.002,
    "half_length_tokens": 70.0,
    "per_sequence_s": 1e-3,
    "causal_factor": 0.5,
    "softmax_layer_share": 0.75,
    "state_exchange_s": 0.003,
    "state_exchange_by_degree_s": ((2, 0.001), (4, 0.004), (8, 0.01)),
    "state_exchange_between_nodes_s": ((2, 0.002), (4, 0.02), (8, 0.03)),
    "zero_traffic_s": 0.2,
    "zero_overlap": 0.25,
    "unsharded_state_bytes": 1e5,
}


def built(
    model: CostModel,
    lengths: Sequence[int],
    micro_batches: Sequence[Sequence[Group]],
    cluster: Cluster,
    *,
    step_s: float,
    sync: str = "per-layer",
    named: bool = True,
) -> StepPlan:
    """A plan whose groups are predicted by the cost model's general functions."""
    plans = []
    for micro_batch in micro_batches:
        groups = []
        for ranks, attention, recompute, sequences in micro_batch:
            kind = cluster.kind_at(GroupKind(len(ranks), attention, recompute), ranks)
            tokens = [lengths[i] for i in sequences]
            groups.append(
                GroupPlan(
                    ranks=ranks,
                    degree=len(ranks),
                    attention=attention,
                    sequences=sequences,
                    num_tokens=sum(tokens),
                    predicted_time_s=model.kind_time_s(tokens, kind, sync),
                    predicted_memory_bytes=round(model.kind_memory_bytes(sum(tokens), kind, cluster.num_ranks, sync)),
                    recompute=recompute,
                )
            )
        plans.append(MicroBatchPlan(max(group.predicted_time_s for group in groups), tuple(groups)))
    return StepPlan(
        plan_id="",
        num_ranks=cluster.num_ranks,
        num_sequences=len(lengths),
        sync=sync,
        cost_model=CostModelReference(model.name, model.sha256),
        micro_batches=tuple(plans),
        predicted_step_time_s=step_s,
        lower_bound_s=0.0,
        outcome="feasible",
        solve_time_s=0.0,
        cluster=cluster if named else None,
    ).with_plan_id()


def timed(plan: StepPlan, model: CostModel) -> StepPlan:
    """The plan with its true step time: rank by rank under per-step."""
    if plan.sync == "per-layer":
        step_s = sum(micro_batch.predicted_time_s for micro_batch in plan.micro_batches)
    else:
        free = [0.0] * plan.num_ranks
        for micro_batch in plan.micro_batches:
            for group in micro_batch.groups:
                end = max(free[rank] for rank in group.ranks) + group.predicted_time_s
                for rank in group.ranks:
                    free[rank] = end
        step_s = max(free)
    return dataclasses.replace(plan, predicted_step_time_s=step_s + model.step_fixed_s(plan.sync)).with_plan_id()


@settings(max_examples=150, deadline=None)
@given(data=st.data(), sync=st.sampled_from(["per-layer", "per-step"]), gpus_per_node=st.sampled_from([None, 2, 4]))
def test_cost_model_and_validator_agree(data: st.DataObject, sync: str, gpus_per_node: int | None) -> None:
    model = make_model(**RICH, gpus_per_node=gpus_per_node, memory_limit_bytes=1e10)
    cluster = Cluster((Node(4), Node(3, 0.5, 1e10), Node(5, 2.0)))
    lengths: list[int] = []
    micro_batches: list[list[Group]] = []
    for _ in range(data.draw(st.integers(1, 3))):
        ranks = data.draw(st.permutations(range(12)))
        groups: list[Group] = []
        while ranks and (not groups or data.draw(st.booleans())):
            degree = data.draw(st.integers(1, len(ranks)))
            new = data.draw(st.lists(st.integers(1, 20000), min_size=1, max_size=3))
            attention = "local" if degree == 1 else data.draw(st.sampled_from(["ulysses", "ring", "all_gather"]))
            recompute = data.draw(st.sampled_from(["default", "full"]))
            sequences = tuple(range(len(lengths), len(lengths) + len(new)))
            groups.append((tuple(sorted(ranks[:degree])), attention, recompute, sequences))
            lengths += new
            ranks = ranks[degree:]
        micro_batches.append(groups)
    plan = timed(built(model, lengths, micro_batches, cluster, step_s=0.0, sync=sync), model)
    assert validate_plan(plan, lengths, model) == []
    assert StepPlan.from_json(plan.to_json()) == plan


LINEAR = make_model(
    a1_s_per_token2=0.0,
    a2_s_per_token=1.0,
    b1_s=0.0,
    b2_s=0.0,
    communication_s=(),
    fixed_step_s=0.0,
    unsharded_state_bytes=0.0,
)


@pytest.mark.parametrize(
    ("micro_batches", "gang_s", "layer_s"),
    [
        ([[((0,), 10), ((1,), 1)], [((0,), 1), ((1,), 10)]], 11, 20),
        ([[((0,), 10), ((1,), 1)], [((0, 1), 10)], [((0,), 1), ((1,), 10)]], 25, 25),
        ([[((0,), 4), ((1,), 1)], [((1,), 2)], [((0, 1), 2)]], 5, 7),
    ],
)
def test_per_step_is_a_gang_schedule(micro_batches: list[Any], gang_s: float, layer_s: float) -> None:
    lengths = [length for micro_batch in micro_batches for _, length in micro_batch]
    ids = iter(range(len(lengths)))
    drafts: list[list[Group]] = [
        [(ranks, "ring" if len(ranks) > 1 else "local", "default", (next(ids),)) for ranks, _ in micro_batch]
        for micro_batch in micro_batches
    ]
    for sync, step_s, other_s in (("per-step", gang_s, gang_s - 1), ("per-layer", layer_s, layer_s + 1)):
        assert (
            validate_plan(built(LINEAR, lengths, drafts, Cluster.uniform(2), step_s=step_s, sync=sync), lengths, LINEAR)
            == []
        )
        wrong = built(LINEAR, lengths, drafts, Cluster.uniform(2), step_s=other_s, sync=sync)
        assert any("predicted_step_time_s is" in fault for fault in validate_plan(wrong, lengths, LINEAR))


def one_group(
    model: CostModel, cluster: Cluster, ranks: tuple[int, ...], attention: str, /, **changes: Any
) -> StepPlan:
    plan = timed(built(model, [3000], [[(ranks, attention, "default", (0,))]], cluster, step_s=0.0), model)
    group = dataclasses.replace(plan.micro_batches[0].groups[0], **changes)
    micro_batch = dataclasses.replace(plan.micro_batches[0], groups=(group,))
    return dataclasses.replace(plan, micro_batches=(micro_batch,)).with_plan_id()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "bogus"}, "group 0 has attention 'bogus', which is no method of the cost model"),
        ({"recompute": "some"}, "group 0 has recompute 'some', which the cost model does not know"),
        ({"recompute": "full"}, "has predicted_time_s"),
        ({"ranks": (0, 4)}, "has predicted_time_s"),
        ({"ranks": (4, 5)}, "has predicted_time_s"),
    ],
)
def test_group_that_runs_otherwise_than_predicted_is_named(changes: dict[str, Any], message: str) -> None:
    model = make_model(**RICH)
    faults = validate_plan(one_group(model, CLUSTER, (0, 1), "ring", **changes), [3000], model)
    assert any(message in fault for fault in faults), faults


def test_memory_limit_is_that_of_the_smallest_gpu() -> None:
    model = make_model(**RICH, bytes_per_token=5500.0)
    assert validate_plan(one_group(model, CLUSTER, (0,), "local"), [3000], model) == []
    faults = validate_plan(one_group(model, CLUSTER, (4,), "local"), [3000], model)
    assert any("above the limit of 15000000" in fault for fault in faults), faults


def test_cluster_comes_from_the_argument_the_plan_or_the_cost_model() -> None:
    preset = load_preset("flexsp-gpt7b-64xa100-40g")
    straddling = one_group(preset, Cluster.uniform(16, 8), (7, 8), "ulysses")
    unnamed = dataclasses.replace(straddling, cluster=None).with_plan_id()
    assert validate_plan(straddling, [3000], preset) == []
    assert validate_plan(unnamed, [3000], preset) == []
    assert validate_plan(straddling, [3000], preset, Cluster.uniform(16)) != []
    faults = validate_plan(straddling, [3000], preset, Cluster.uniform(8, 8))
    assert "the plan has 16 ranks, but the cluster has 8" in faults


def test_ulysses_with_key_value_heads_that_cannot_be_shared_is_named() -> None:
    model = make_model(num_heads=12, num_kv_heads=4)
    faults = validate_plan(one_group(model, Cluster.uniform(3), (0, 1, 2), "ulysses"), [3000], model)
    assert faults == ["micro-batch 0 group 0 of degree 3 runs ulysses, which cannot share 4 key/value heads"]


def test_unknown_sync_and_unknown_bytes_of_per_step_are_named() -> None:
    model = make_model()
    plan = one_group(model, Cluster.uniform(1), (0,), "local")
    never = dataclasses.replace(plan, sync="never").with_plan_id()
    assert "sync is 'never'; expected 'per-layer' or 'per-step'" in validate_plan(never, [3000], model)
    unsharded = dataclasses.replace(plan, sync="per-step").with_plan_id()
    faults = validate_plan(unsharded, [3000], model)
    assert faults == ["sync is 'per-step', but the cost model does not know unsharded_state_bytes"]


def test_json_names_recompute_and_cluster_only_where_they_are_not_the_default() -> None:
    model = make_model(**RICH)
    plan = one_group(model, CLUSTER, (0, 1), "ring", recompute="full")
    content = json.loads(plan.to_json())
    assert content["cluster"] == CLUSTER.to_content()
    assert content["micro_batches"][0]["groups"][0]["recompute"] == "full"
    assert StepPlan.from_json(plan.to_json()) == plan
    plain = json.loads(one_group(model, CLUSTER, (0, 1), "ring").to_json())
    assert "recompute" not in plain["micro_batches"][0]["groups"][0]
    for key, value, message in (
        ("cluster", {"nodes": []}, r"cluster lacks the key\(s\) schema_version"),
        ("cluster", None, "cluster is None"),
    ):
        with pytest.raises(PlanError, match=message):
            StepPlan.from_json(json.dumps({**content, key: value}))
    content["micro_batches"][0]["groups"][0]["recompute"] = 3
    with pytest.raises(PlanError, match=r"groups\[0\]\.recompute is 3"):
        StepPlan.from_json(json.dumps(content))
