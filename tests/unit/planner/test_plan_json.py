"""Plan JSON and the validator: round trip, strict reading, corrupted plans."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import CostModel, GroupPlan, PlanError, StepPlan, plan_step, validate_plan
from planner.strict_json import canonical_sha256

from .planner_cases import cost_models, long_tail, make_model

LENGTHS = [*long_tail(30, seed=6, cap=8000), 9500, 9400, 20000]
MODEL = make_model()


@pytest.fixture(scope="module")
def plan() -> StepPlan:
    """A plan of several micro-batches, with groups of degree 1 and above."""
    found = plan_step(LENGTHS, 4, MODEL, node_limit=10)
    assert len(found.micro_batches) > 1
    assert {group.degree for m in found.micro_batches for group in m.groups} >= {1, 2}
    return found


def test_json_has_exactly_the_keys_of_the_schema(plan: StepPlan) -> None:
    content = json.loads(plan.to_json())
    assert set(content) == {
        "schema_version",
        "plan_id",
        "num_ranks",
        "num_sequences",
        "sync",
        "cost_model",
        "micro_batches",
        "predicted_step_time_s",
        "lower_bound_s",
        "outcome",
        "solve_time_s",
    }
    assert content["schema_version"] == 1
    assert set(content["cost_model"]) == {"name", "sha256"}
    assert set(content["micro_batches"][0]) == {"predicted_time_s", "groups"}
    assert set(content["micro_batches"][0]["groups"][0]) == {
        "ranks",
        "degree",
        "attention",
        "sequences",
        "num_tokens",
        "predicted_time_s",
        "predicted_memory_bytes",
    }
    covered = {key: value for key, value in content.items() if key not in ("plan_id", "solve_time_s")}
    assert content["plan_id"] == canonical_sha256(covered)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 9000), min_size=1, max_size=6), model=cost_models())
def test_round_trip_gives_an_equal_plan(lengths: list[int], model: CostModel) -> None:
    found = plan_step(lengths, 4, model, node_limit=5)
    again = StepPlan.from_json(found.to_json())
    assert again == found
    assert again.to_json() == found.to_json()
    assert pickle.loads(pickle.dumps(found)) == found


def test_file_round_trip_and_solve_time_outside_of_the_id(plan: StepPlan, tmp_path: Path) -> None:
    slower = dataclasses.replace(plan, solve_time_s=99.0)
    assert slower.expected_plan_id() == plan.plan_id
    slower.save(tmp_path / "plan.json")
    assert StepPlan.load(tmp_path / "plan.json") == slower
    with pytest.raises(PlanError, match=r"missing\.json"):
        StepPlan.load(tmp_path / "missing.json")


def edited(plan: StepPlan, edit: Callable[[dict[str, Any]], object]) -> str:
    content = copy.deepcopy(json.loads(plan.to_json()))
    edit(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(extra=1), r"unknown key\(s\) extra"),
        (lambda c: c.pop("sync"), r"lacks the key\(s\) sync"),
        (lambda c: c.update(schema_version=2), "schema_version 2"),
        (lambda c: c.update(num_ranks="4"), "num_ranks is '4'"),
        (lambda c: c.update(num_ranks=True), "num_ranks is True"),
        (lambda c: c.update(lower_bound_s=None), "lower_bound_s is None"),
        (lambda c: c.update(outcome="perfect"), "outcome is 'perfect'"),
        (lambda c: c["cost_model"].pop("name"), r"cost_model lacks the key\(s\) name"),
        (lambda c: c["micro_batches"][0].update(time=1), r"micro_batches\[0\] has unknown key\(s\) time"),
        (lambda c: c["micro_batches"][0]["groups"][0].update(ranks=[0.5]), r"groups\[0\]\.ranks\[0\] is 0\.5"),
        (lambda c: c["micro_batches"][0]["groups"][0].update(sequences=[-1]), r"groups\[0\]\.sequences\[0\] is -1"),
        (lambda c: c["micro_batches"][0].update(groups={}), r"micro_batches\[0\]\.groups is"),
        (lambda c: c.update(predicted_step_time_s=1.0), "has plan_id .* but its content has"),
        (lambda c: c.update(plan_id="0" * 64), "has plan_id 0000"),
    ],
)
def test_malformed_plan_is_refused_with_the_key(
    plan: StepPlan, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        StepPlan.from_json(edited(plan, edit))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema_version": NaN}'])
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError):
        StepPlan.from_json(text)


def with_group(plan: StepPlan, **changes: Any) -> StepPlan:
    """Return the plan with its first group of degree above 1 changed, and a plan id that fits."""
    for m, micro_batch in enumerate(plan.micro_batches):
        for g, group in enumerate(micro_batch.groups):
            if group.degree > 1:
                groups = (*micro_batch.groups[:g], dataclasses.replace(group, **changes), *micro_batch.groups[g + 1 :])
                replaced = dataclasses.replace(micro_batch, groups=groups)
                micro_batches = (*plan.micro_batches[:m], replaced, *plan.micro_batches[m + 1 :])
                return dataclasses.replace(plan, micro_batches=micro_batches).with_plan_id()
    raise AssertionError("no group of degree above 1")


def first_shared(plan: StepPlan) -> GroupPlan:
    return next(group for m in plan.micro_batches for group in m.groups if group.degree > 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: {"sequences": g.sequences[1:]}, "in no group"),
        (lambda g: {"sequences": (*g.sequences, g.sequences[0])}, "more than once"),
        (lambda g: {"sequences": (*g.sequences, 500)}, "sequence 500 is not in the batch of 33"),
        (lambda g: {"sequences": ()}, "has no sequences"),
        (lambda g: {"ranks": (*g.ranks[1:], 77)}, "uses rank 77, but the plan has 4 ranks"),
        (lambda g: {"ranks": (g.ranks[1],) * g.degree}, "uses rank 1 4 times"),
        (lambda g: {"ranks": g.ranks[1:]}, "has degree 4, but 3 ranks"),
        (lambda g: {"degree": g.degree * 2}, "has degree 8, but 4 ranks"),
        (lambda g: {"num_tokens": g.num_tokens + 1}, "has num_tokens"),
        (lambda g: {"attention": "local"}, "has attention 'local'"),
        (lambda g: {"predicted_time_s": g.predicted_time_s * 1.001}, "has predicted_time_s"),
        (lambda g: {"predicted_memory_bytes": g.predicted_memory_bytes + 2}, "has predicted_memory_bytes"),
    ],
)
def test_corrupted_group_is_named(plan: StepPlan, change: Callable[[GroupPlan], dict[str, Any]], message: str) -> None:
    corrupted = with_group(plan, **change(first_shared(plan)))
    faults = validate_plan(corrupted, LENGTHS, MODEL)
    assert any(message in fault for fault in faults), faults


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_sequences": 5}, "num_sequences is 5, but the batch has 33"),
        ({"predicted_step_time_s": 0.5}, "predicted_step_time_s is 0.5"),
        ({"lower_bound_s": 1e9}, "lower_bound_s 1000000000.0 is above the step time"),
        ({"lower_bound_s": 0.01, "outcome": "optimal"}, "outcome is 'optimal', but"),
        ({"sync": "per-step"}, "sync is 'per-step', but the cost model"),
        ({"micro_batches": ()}, "in no group"),
    ],
)
def test_corrupted_step_is_named(plan: StepPlan, changes: dict[str, Any], message: str) -> None:
    corrupted = dataclasses.replace(plan, **changes).with_plan_id()
    faults = validate_plan(corrupted, LENGTHS, MODEL)
    assert any(message in fault for fault in faults), faults


def test_validator_names_wrong_plan_id_cost_model_memory_and_micro_batch_time(plan: StepPlan) -> None:
    assert validate_plan(plan, LENGTHS, MODEL) == []
    unhashed = dataclasses.replace(plan, plan_id="abc")
    assert any("plan_id is abc" in fault for fault in validate_plan(unhashed, LENGTHS, MODEL))
    tighter = dataclasses.replace(MODEL, memory_limit_bytes=1e7)
    faults = validate_plan(plan, LENGTHS, tighter)
    assert any("was made with cost model 'test'" in fault for fault in faults)
    assert any("above the limit of 10000000" in fault for fault in faults)
    slow = dataclasses.replace(plan.micro_batches[0], predicted_time_s=7.0)
    wrong = dataclasses.replace(plan, micro_batches=(slow, *plan.micro_batches[1:])).with_plan_id()
    assert any("micro-batch 0 has predicted_time_s 7.0" in fault for fault in validate_plan(wrong, LENGTHS, MODEL))
    empty = dataclasses.replace(plan.micro_batches[0], groups=())
    hollow = dataclasses.replace(plan, micro_batches=(*plan.micro_batches, empty)).with_plan_id()
    assert any("has no groups" in fault for fault in validate_plan(hollow, LENGTHS, MODEL))
