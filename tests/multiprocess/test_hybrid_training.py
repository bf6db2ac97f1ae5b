"""Models with linear attention, windows and experts train the same whatever the plan: losses and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import training_ranks as ranks
from gloo_pool import GlooPool

from raysp.train.work import GroupWork, StepWork

_NUM_RANKS = 4
_Groups = list[tuple[tuple[int, ...], tuple[int, ...], str]]

# (ranks, sequences, method) of every group, micro-batch by micro-batch. Sequence 3 has one token, so ranks are left without.
_ONE_RANK: list[_Groups] = [[((0,), (0, 2, 3, 4, 6, 9, 11), "local")]]
_STATIC_2: list[_Groups] = [[((0, 1), (0, 3), "ring"), ((2, 3), (2, 4, 6, 9, 11), "all_gather")]]
_STATIC_4: list[_Groups] = [
    [((0, 1, 2, 3), (2, 4, 0, 6), "ulysses")],
    [
        ((0, 1, 2, 3), (3,), "ring"),
    ],
    [((0, 1, 2, 3), (9, 11), "auto")],
]
_MIXED: list[_Groups] = [
    [((1, 2, 3), (0, 11, 9), "token_ring"), ((0,), (4,), "local")],
    [((0, 1), (6, 2, 3), "ulysses")],
]


def _works(micro_batches: list[_Groups], *, sync: str = "per-layer", step: int = 0) -> list[StepWork]:
    rows: list[list[GroupWork | None]] = [[] for _ in range(_NUM_RANKS)]
    for groups in micro_batches:
        for rank, row in enumerate(rows):
            mine = [group for group in groups if rank in group[0]]
            lengths = tuple(ranks.LENGTHS[i] for i in mine[0][1]) if mine else ()
            row.append(GroupWork(mine[0][0], mine[0][2], mine[0][1], lengths) if mine else None)
    return [StepWork(step=step, micro_batches=tuple(row), sync=sync) for row in rows]


def _config(name: str, *, linear_method: str = "auto", **train: object) -> Any:
    model = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        **_MODELS[name],
    }
    attention: dict[str, object] = {"linear_method": linear_method}
    return ranks.tiny_config(model={"config": model}, train={"dtype": "fp64", **train}, attention=attention)


_QWEN3_NEXT = {
    "model_type": "qwen3_next",
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_MODELS: dict[str, dict[str, Any]] = {
    "gla": {"model_type": "linear_llama", "linear_attention": "gla", "softmax_every": 2},
    "gated_deltanet": {"model_type": "linear_llama", "linear_attention": "gated_deltanet", "softmax_every": 2},
    "mamba2": {"model_type": "linear_llama", "linear_attention": "mamba2"},
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_next_dense_first": {**_QWEN3_NEXT, "mlp_only_layers": [0]},
    "mistral": {"model_type": "mistral", "sliding_window": 20},
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": 20,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None},
}
# transformers forms these norms in fp32, and the gradient of their weights is summed over rows there.
_FP32_NORMS = {"qwen3_next", "qwen3_next_dense_first", "gemma3"}
_SLOW = [pytest.mark.slow]


@pytest.mark.parametrize(
    "name",
    [
        "gla",
        "gated_deltanet",
        "qwen3_next",
        "mistral",
        pytest.param("mamba2", marks=_SLOW),
        pytest.param("qwen3_next_dense_first", marks=_SLOW),
        pytest.param("gemma3", marks=_SLOW),
        pytest.param("qwen3_moe", marks=_SLOW),
        pytest.param("mixtral", marks=_SLOW),
    ],
)
def test_losses_and_gradients_are_those_of_one_rank(gloo_pool: GlooPool, name: str) -> None:
    expected_gradients, expected_steps = gloo_pool.run(ranks.gradients_and_losses, _config(name), [_works(_ONE_RANK)])[
        0
    ]
    plans = {
        "static:2, heads of linear layers traded": (_works(_STATIC_2), {"linear_method": "ulysses"}),
        "static:4": (_works(_STATIC_4), {}),
        "mixed, recomputed": (_works(_MIXED), {"recompute": "full"}),
        "mixed, per-step": (_works(_MIXED, sync="per-step"), {"linear_method": "zeco"}),
    }
    for plan, (works, changes) in plans.items():
        gradients, steps = gloo_pool.run(ranks.gradients_and_losses, _config(name, **changes), [works])[0]
        assert steps[0].loss == pytest.approx(expected_steps[0].loss, rel=1e-9)
        for parameter, expected in expected_gradients.items():
            difference = torch.linalg.vector_norm(gradients[parameter] - expected)
            tolerance = 1e-5 if name in _FP32_NORMS and "norm" in parameter else 1e-9
            assert difference <= tolerance * torch.linalg.vector_norm(expected), (plan, parameter, difference)


@pytest.mark.parametrize(
    "name", ["qwen3_next", pytest.param("gated_deltanet", marks=_SLOW), pytest.param("mamba2", marks=_SLOW)]
)
def test_training_in_fp32_goes_on_from_a_checkpoint_under_another_plan(
    gloo_pool: GlooPool, name: str, tmp_path: Path
) -> None:
    config = _config(name, dtype="fp32")
    one = [_works(_ONE_RANK, step=step) for step in range(4)]
    mixed = [_works(_MIXED, step=step) for step in range(4)]
    expected = [step.loss for step in gloo_pool.run(ranks.gradients_and_losses, config, one)[0][1]]
    before = gloo_pool.run(ranks.losses_then_save, config, mixed[:2], str(tmp_path / "c"))[0]
    after = gloo_pool.run(ranks.losses_after_load, config, one[2:], str(tmp_path / "c"))[0]
    assert before + after == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0]


def test_validation_of_a_hybrid_is_the_same_under_every_plan(gloo_pool: GlooPool) -> None:
    works = [_works(plan) for plan in (_ONE_RANK, _STATIC_2, _STATIC_4, _MIXED)]
    results = gloo_pool.run(ranks.evaluate_plans, _config("gated_deltanet"), works)[0]
    assert [loss for loss, _ in results] == pytest.approx([results[0][0]] * len(works), rel=1e-12)


def test_layer_that_bypasses_raysp_ends_the_step_with_its_name(gloo_pool: GlooPool) -> None:
    messages = gloo_pool.run(ranks.error_of_bypassed_layer, _config("gla"), _works(_STATIC_2))
    for message in messages:
        assert message.startswith("layer 1 (")
        assert "mixed its tokens through raysp 0 times in a forward pass; expected once" in message
