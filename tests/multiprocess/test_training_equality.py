"""Every plan gives the same training: losses and gradients do not depend on groups, methods or number of workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import training_ranks as ranks
from gloo_pool import GlooPool

from planner import StepPlan, plan_step
from raysp.cluster.planning import assign_work
from raysp.data.loader import Cursor, GlobalBatch
from raysp.train.work import StepWork

_STEPS = 10
_REFERENCE = ("static:1", 4, "ring")


def _plan(policy: str, num_ranks: int, attention: str, step: int) -> tuple[StepPlan, GlobalBatch]:
    """Batches of changing composition, so that plans differ from step to step."""
    ids = tuple((step + i) % len(ranks.LENGTHS) for i in range(11))
    batch = GlobalBatch(ids, tuple(ranks.LENGTHS[i] for i in ids), Cursor(0, 0))
    plan = plan_step(
        list(batch.lengths),
        num_ranks=num_ranks,
        cost_model=ranks.quadratic_cost_model(attention=attention),
        policy=policy,
        node_limit=50,
    )
    return plan, batch


def _works(policy: str, num_ranks: int, attention: str, steps: range = range(_STEPS)) -> list[list[StepWork]]:
    return [assign_work(*_plan(policy, num_ranks, attention, step), step=step, num_ranks=num_ranks) for step in steps]


class _Pools:
    """A world of each size that is asked for; sharding spans all ranks of a world."""

    def __init__(self) -> None:
        self._pools: dict[int, GlooPool] = {}

    def run(self, fn: Any, *args: Any, world: int) -> list[Any]:
        if world not in self._pools:
            self._pools[world] = GlooPool(size=world)
        return self._pools[world].run(fn, *args, timeout_s=180)

    def stop(self) -> None:
        for pool in self._pools.values():
            pool.stop()


@pytest.fixture(scope="module")
def worlds() -> Iterator[_Pools]:
    pools = _Pools()
    yield pools
    pools.stop()


@pytest.fixture(scope="module")
def reference(worlds: _Pools) -> Any:
    policy, world, attention = _REFERENCE
    results = worlds.run(ranks.gradients_and_losses, ranks.tiny_config(), _works(policy, world, attention), world=world)
    return results[0]


def test_adaptive_plans_of_this_test_are_heterogeneous() -> None:
    shapes = {
        tuple(sorted(group.degree for group in micro_batch.groups))
        for step in range(_STEPS)
        for micro_batch in _plan("adaptive", 4, "ring", step)[0].micro_batches
    }
    assert any(len(set(shape)) > 1 for shape in shapes)


@pytest.mark.parametrize(
    ("policy", "num_ranks", "attention"),
    [
        ("static:2", 4, "ring"),
        ("static:4", 4, "ulysses"),
        pytest.param("static:4", 4, "token_ring", marks=pytest.mark.slow),
        ("adaptive", 4, "ring"),
        pytest.param("adaptive", 4, "all_gather", marks=pytest.mark.slow),
        pytest.param("adaptive", 4, "bidirectional_ring", marks=pytest.mark.slow),
        pytest.param("adaptive", 3, "ring", marks=pytest.mark.slow),
        ("static:1", 2, "ring"),
        ("static:2", 2, "ulysses"),
        ("adaptive", 2, "ring"),
        pytest.param("adaptive", 1, "ring", marks=pytest.mark.slow),
    ],
)
def test_losses_and_gradients_equal_static_1(
    worlds: _Pools, reference: Any, policy: str, num_ranks: int, attention: str
) -> None:
    results = worlds.run(
        ranks.gradients_and_losses,
        ranks.tiny_config(),
        _works(policy, num_ranks, attention),
        world=num_ranks,
    )
    gradients, steps = results[0]
    reference_gradients, reference_steps = reference
    for name, expected in reference_gradients.items():
        difference = torch.linalg.vector_norm(gradients[name] - expected) / torch.linalg.vector_norm(expected)
        assert difference < 1e-5, name
    losses, expected_losses = [s.loss for s in steps], [s.loss for s in reference_steps]
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert expected_losses[-1] < expected_losses[0]
    assert [s.num_targets for s in steps] == [s.num_targets for s in reference_steps]


@pytest.mark.parametrize("changes", [{"recompute": "full"}, {"dtype": "fp64"}])
def test_recompute_and_fp64_give_the_same_losses(worlds: _Pools, reference: Any, changes: dict[str, str]) -> None:
    results = worlds.run(
        ranks.gradients_and_losses,
        ranks.tiny_config(train=dict(changes)),
        _works("adaptive", 4, "ring")[:3],
        world=4,
    )
    tolerance = 1e-5 if "recompute" in changes else 1e-4
    losses = [step.loss for step in results[0][1]]
    assert losses == pytest.approx([step.loss for step in reference[1]][:3], rel=tolerance)


@pytest.mark.parametrize("num_ranks_after", [4, 2])
def test_resumed_run_repeats_the_uninterrupted_one(
    worlds: _Pools, reference: Any, tmp_path: Path, num_ranks_after: int
) -> None:
    config = ranks.tiny_config()
    works = _works("adaptive", 4, "ring", range(5))
    worlds.run(ranks.losses_then_save, config, works, str(tmp_path / "c"), world=4)
    after = _works("adaptive", num_ranks_after, "ring", range(5, _STEPS))
    results = worlds.run(ranks.losses_after_load, config, after, str(tmp_path / "c"), world=num_ranks_after)
    assert results[0] == pytest.approx([step.loss for step in reference[1]][5:], rel=1e-5)


def test_checkpoint_holds_no_pickle(worlds: _Pools, tmp_path: Path) -> None:
    works = _works("static:1", 2, "ring", range(1))
    worlds.run(ranks.losses_then_save, ranks.tiny_config(), works, str(tmp_path), world=2)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors"}


def test_loss_that_is_not_finite_updates_nothing_and_names_the_rank(worlds: _Pools) -> None:
    works = _works("static:1", 2, "ring", range(2))
    results = worlds.run(ranks.steps_around_infinite_loss, ranks.tiny_config(), works, world=2)
    for rank, (first, poisoned) in enumerate(results):
        assert first.updated
        assert not poisoned.updated
        assert poisoned.loss != poisoned.loss
        assert poisoned.local_loss_is_finite == (rank == 0)


def test_validation_loss_is_the_same_under_every_plan(worlds: _Pools) -> None:
    works = [_works(policy, 4, "ring", range(1))[0] for policy in ("static:1", "static:2", "static:4", "adaptive")]
    results = worlds.run(ranks.evaluate_plans, ranks.tiny_config(), works, world=4)
    sums = [loss for loss, _ in results[0]]
    assert sums == pytest.approx([sums[0]] * len(sums), rel=1e-5)
    assert len({targets for _, targets in results[0]}) == 1
