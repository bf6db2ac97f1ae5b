"""``sync = "per-step"`` and recompute per group change when ranks meet and what they keep, never the training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import training_ranks as ranks
from gloo_pool import GlooPool

from planner import plan_step, validate_plan
from raysp.cluster.planning import assign_work
from raysp.data.loader import Cursor, GlobalBatch
from raysp.train.gradient_sync import unsharded_state_bytes
from raysp.train.work import GroupWork, StepWork

_Groups = list[tuple[tuple[int, ...], tuple[int, ...], str]]

# (ranks, sequences, recompute) of every group, micro-batch by micro-batch. Rank 0 is in no group of the second.
_OVERLAPPING: list[_Groups] = [
    [((0, 1), (0, 3), "default"), ((2,), (4, 5, 9), "full")],
    [((0,), (1, 2, 6), "none"), ((1, 2), (8,), "full")],
    [((0, 1, 2), (12, 7), "full")],
]
_UNEVEN: list[_Groups] = [
    [((1, 2), (0, 3), "default")],
    [((1,), (4, 5, 9, 1), "default"), ((2,), (2, 6), "default")],
    [((1,), (8,), "default")],
    [((2,), (12, 7), "default")],
]
_ALL = (0, 3, 4, 5, 9, 1, 2, 6, 8, 12, 7)


def _works(micro_batches: list[_Groups], *, sync: str, attention: str = "ring", step: int = 0) -> list[StepWork]:
    parts: list[list[GroupWork | None]] = [[], [], []]
    for groups in micro_batches:
        row: list[GroupWork | None] = [None, None, None]
        for group_ranks, sequences, recompute in groups:
            lengths = tuple(ranks.LENGTHS[i] for i in sequences)
            method = attention if len(group_ranks) > 1 else "local"
            for rank in group_ranks:
                row[rank] = GroupWork(group_ranks, method, sequences, lengths, recompute)
        for part, work in zip(parts, row, strict=True):
            part.append(work)
    return [StepWork(step=step, micro_batches=tuple(part), sync=sync) for part in parts]


def _config(**train: object) -> Any:
    return ranks.tiny_config(train={"dtype": "fp64", **train})


@pytest.fixture(scope="module")
def pool() -> Iterator[GlooPool]:
    pool = GlooPool(size=3)
    yield pool
    pool.stop()


@pytest.fixture(scope="module")
def reference(pool: GlooPool) -> Any:
    """Every sequence on rank 0, per-layer, nothing recomputed; three steps."""
    works = [_works([[((0,), _ALL, "none")]], sync="per-layer", step=step) for step in range(3)]
    return pool.run(ranks.gradients_and_losses, _config(), works, timeout_s=120)[0]


def _assert_same(results: list[Any], reference: Any) -> None:
    expected_gradients, expected_steps = reference
    for gradients, steps in results:
        for name, expected in expected_gradients.items():
            difference = torch.linalg.vector_norm(gradients[name] - expected) / torch.linalg.vector_norm(expected)
            assert difference < 1e-10, name
        assert [step.loss for step in steps] == pytest.approx([step.loss for step in expected_steps], rel=1e-10)
        assert [step.grad_norm for step in steps] == pytest.approx([s.grad_norm for s in expected_steps], rel=1e-9)
        assert [step.num_targets for step in steps] == [step.num_targets for step in expected_steps]
        assert all(step.updated for step in steps)


@pytest.mark.parametrize("attention", ["ring", "all_gather"])
@pytest.mark.parametrize("sync", ["per-layer", "per-step"])
def test_overlapping_groups_and_mixed_recompute_train_the_same(
    pool: GlooPool, reference: Any, sync: str, attention: str
) -> None:
    """Rank 1 is in {0,1}, then {1,2}, then {0,1,2}; a step that did not keep to that order would never end."""
    works = [_works(_OVERLAPPING, sync=sync, attention=attention, step=step) for step in range(3)]
    _assert_same(pool.run(ranks.gradients_and_losses, _config(), works, timeout_s=120), reference)


def test_rank_without_any_work_joins_the_reduction(pool: GlooPool, reference: Any) -> None:
    works = [_works(_UNEVEN, sync="per-step", step=step) for step in range(3)]
    results = pool.run(ranks.gradients_and_losses, _config(), works, timeout_s=120)
    _assert_same(results, reference)
    idle = results[0][1][0]
    assert max(idle.micro_batch_times_s) < 0.01


def test_steps_of_both_kinds_follow_each_other(pool: GlooPool, reference: Any) -> None:
    plans = [(_UNEVEN, "per-step"), (_OVERLAPPING, "per-layer"), (_OVERLAPPING, "per-step")]
    works = [_works(plan, sync=sync, step=step) for step, (plan, sync) in enumerate(plans)]
    _assert_same(pool.run(ranks.gradients_and_losses, _config(), works, timeout_s=120), reference)


def test_default_recompute_is_what_the_configuration_says(pool: GlooPool, reference: Any) -> None:
    for recompute, other in (("none", "full"), ("full", "none")):
        default, same, different = pool.run(
            ranks.activation_bytes_by_policy, _config(recompute=recompute), ("default", recompute, other)
        )[0]
        assert default == pytest.approx(same, rel=0.02)
        assert (different < 0.7 * same) == (other == "full")
    works = [_works(_UNEVEN, sync="per-step", step=step) for step in range(3)]
    _assert_same(pool.run(ranks.gradients_and_losses, _config(recompute="full"), works, timeout_s=120), reference)


def test_unknown_recompute_policy_and_sync_are_refused(pool: GlooPool) -> None:
    plan: list[_Groups] = [[((0, 1, 2), (0,), "selective")]]
    messages = pool.run(ranks.error_of_step, _config(), _works(plan, sync="per-step"))
    assert all("recompute 'selective'; expected 'default' or one of none, full" in message for message in messages)
    messages = pool.run(ranks.error_of_step, _config(), _works(_UNEVEN, sync="per-epoch"))
    assert all("sync is 'per-epoch'" in message for message in messages)


def test_bf16_gradients_of_both_syncs_agree_and_add_up_in_fp32(pool: GlooPool) -> None:
    """Under bf16 a rank without work sends bf16 zeros where the others send fp32 sums."""
    by_sync = [
        pool.run(
            ranks.gradients_and_losses,
            ranks.tiny_config(train={"dtype": "bf16"}),
            [_works(_UNEVEN, sync=sync)],
            timeout_s=120,
        )[0]
        for sync in ("per-layer", "per-step")
    ]
    (layered, layered_steps), (stepped, stepped_steps) = by_sync
    assert stepped_steps[0].loss == pytest.approx(layered_steps[0].loss, rel=1e-5)
    for name, gradient in layered.items():
        assert stepped[name].dtype == torch.float32
        assert torch.linalg.vector_norm(stepped[name] - gradient) <= 1e-5 * torch.linalg.vector_norm(gradient), name


@pytest.mark.parametrize("sync", ["per-layer", "per-step"])
def test_validation_has_the_same_loss_and_leaves_parameters_sharded(pool: GlooPool, sync: str) -> None:
    results = pool.run(
        ranks.evaluate_then_count_whole_parameters, _config(), _works(_OVERLAPPING, sync=sync), timeout_s=120
    )
    expected = pool.run(
        ranks.evaluate_then_count_whole_parameters,
        _config(),
        _works([[((0,), _ALL, "none")]], sync="per-layer"),
        timeout_s=120,
    )[0]
    for (loss, targets), whole in results:
        assert (loss, targets) == (pytest.approx(expected[0][0], rel=1e-10), expected[0][1])
        assert whole == 0


def test_loss_that_is_not_finite_updates_nothing_under_per_step(pool: GlooPool) -> None:
    works = [_works(_OVERLAPPING, sync="per-step", step=step) for step in range(2)]
    for rank, (first, poisoned) in enumerate(pool.run(ranks.steps_around_infinite_loss, _config(), works)):
        assert first.updated
        assert not poisoned.updated
        # Rank 1 alone makes the NaN, but its groups hand it on.
        assert poisoned.loss != poisoned.loss
        assert rank != 1 or not poisoned.local_loss_is_finite


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
def test_whole_parameters_and_gradients_take_the_bytes_that_the_planner_is_told(pool: GlooPool, dtype: str) -> None:
    works = _works([[((0, 1, 2), (0, 3), "none")], [((0, 1, 2), (8,), "none")]], sync="per-step")
    results = pool.run(ranks.whole_state_bytes, ranks.tiny_config(train={"dtype": dtype}), works)
    for num_parameters, parameter_bytes, gradient_bytes in results:
        assert parameter_bytes + gradient_bytes == unsharded_state_bytes(num_parameters, dtype)


def test_plans_of_the_planner_train_the_same(pool: GlooPool, reference: Any) -> None:
    lengths = [ranks.LENGTHS[i] for i in _ALL]
    model = dataclasses.replace(ranks.quadratic_cost_model(), unsharded_state_bytes=100.0)
    plan = plan_step(lengths, num_ranks=3, cost_model=model, sync="per-step", node_limit=50)
    assert plan.sync == "per-step"
    assert validate_plan(plan, lengths, model) == []
    assert any(len(micro_batch.groups) > 1 for micro_batch in plan.micro_batches)
    batch = GlobalBatch(_ALL, tuple(lengths), Cursor(0, 0))
    works = [assign_work(plan, batch, step=step, num_ranks=3) for step in range(3)]
    _assert_same(pool.run(ranks.gradients_and_losses, _config(), works, timeout_s=120), reference)
