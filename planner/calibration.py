"""Fitting a cost model to measured group times, with residuals, and refusing fits that explain too little.

First ``a1, a2, b1`` (and seconds per sequence, where they explain clearly more) from groups of degree 1; then, from what
the other groups take beyond that compute time, the communication constants of every method, one for every measured
degree inside a node and between nodes, and ``b2``; last the factors of recompute policies. Of models with linear layers
(`planner.linear_attention_layers`) also the seconds of their states, by degree. The least squares are in
`planner.calibration_fits`, samples and their files in `planner.samples`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from planner.calibration_fits import (
    LocalFit,
    StateExchange,
    fit_exchanges,
    fit_local,
    fit_memory,
    fit_method,
    fit_recompute,
)
from planner.cost_model import CostModel
from planner.errors import CalibrationError
from planner.group_kind import GroupKind
from planner.linear_attention_layers import LayerMix
from planner.method_cost import DEFAULT_RECOMPUTE, MethodCost
from planner.samples import Sample, check_sample

_MIN_LOCAL_SAMPLES = 3


@dataclass(frozen=True)
class SampleResidual:
    """A sample beside what the fitted model predicts for it; the error is predicted / measured - 1."""

    sample: Sample
    predicted_s: float
    relative_error: float


@dataclass(frozen=True)
class CalibrationFit:
    """A fitted cost model and how well it explains the samples.

    Attributes:
        cost_model: The model; its metadata holds the summary of the residuals.
        residuals: One for every sample, in their order.
        mean_relative_error: Mean of the absolute relative errors of time.
        max_relative_error: The largest of them.
        r2: Share of the variance of the times that is explained.
    """

    cost_model: CostModel
    residuals: tuple[SampleResidual, ...]
    mean_relative_error: float
    max_relative_error: float
    r2: float
    notes: tuple[str, ...] = field(default=())


def fit_cost_model(
    samples: Sequence[Sample],
    *,
    name: str,
    num_ranks: int,
    model_state_bytes_total: float,
    memory_limit_bytes: float,
    bytes_per_token: float | None = None,
    model_state_bytes_fixed: float = 0.0,
    fixed_step_s: float = 0.0,
    attention: str = "ulysses",
    num_heads: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    max_mean_relative_error: float = 0.25,
    num_kv_heads: int | None = None,
    gpus_per_node: int | None = None,
    unsharded_state_bytes: float | None = None,
    half_length_tokens: float = 0.0,
    layers: LayerMix | None = None,
) -> CalibrationFit:
    """Fit the constants of a `CostModel` to measured groups.

    Args:
        samples: At least 3 of degree 1 with the default recompute policy, with at least 2 different totals of tokens
            among them; of every further degree of a method at least 1; of every further recompute policy at least 1,
            with memory.
        name: Name of the model.
        num_ranks: Ranks of the job in which memory was measured (model states are sharded over them).
        model_state_bytes_total: Bytes of the sharded model states over all ranks.
        memory_limit_bytes: What one rank may use.
        bytes_per_token: Activation bytes of a token; `None`: fitted from the samples that carry `memory_bytes`, raising
            `model_state_bytes_fixed` until no sample is predicted below its measurement.
        model_state_bytes_fixed: Bytes of every rank that are known beforehand.
        fixed_step_s: Seconds of a step outside of micro-batches.
        attention: The primary method, which samples ran that name none.
        num_heads: Query heads, or `None`.
        metadata: Kept in the model beside the residuals.
        max_mean_relative_error: A fit worse than this is refused.
        num_kv_heads: Key/value heads, or `None`.
        gpus_per_node: Of the cluster that was measured, or `None`.
        unsharded_state_bytes: See `CostModel`; `None`: unknown.
        half_length_tokens: Known from the attention kernel alone; groups do not show it, see
            `planner.calibration_fits.fit_local`.
        layers: How many layers are linear attention; `None`: all are softmax attention. Without softmax layers a1 is 0
            and no attention method limits degrees; where state scans run, a degree's samples also give the seconds of
            its states, whatever the lengths.

    Returns:
        The model with its residuals.

    Raises:
        CalibrationError: Too few or malformed samples, no memory samples where they are needed, or a bad fit.
    """
    _check(samples, num_ranks)
    named = [dataclasses.replace(sample, attention=sample.attention or attention) for sample in samples]
    default = [sample for sample in named if sample.recompute == DEFAULT_RECOMPUTE]
    mix = LayerMix(num_softmax_layers=1) if layers is None else layers
    is_quadratic = mix.num_softmax_layers > 0
    alone = [sample for sample in default if sample.degree == 1]
    local = fit_local(alone, half_length_tokens if is_quadratic else 0.0, is_quadratic=is_quadratic)
    shared = [sample for sample in default if sample.degree > 1]
    methods, states = _fit_shared(shared, local, mix)
    fixed_bytes = model_state_bytes_fixed
    known_bytes = model_state_bytes_total / num_ranks
    if bytes_per_token is None:
        bytes_per_token, extra_bytes = fit_memory(default, known_bytes + fixed_bytes)
        fixed_bytes += extra_bytes
    policies = []
    for policy_name in sorted({sample.recompute for sample in named} - {DEFAULT_RECOMPUTE}):
        ran = [sample for sample in named if sample.recompute == policy_name]
        _check_methods_known(ran, methods, policy_name)
        policy, extra_bytes = fit_recompute(
            ran, local, list(methods.values()), known_bytes + fixed_bytes, policy_name, states
        )
        policies.append(policy)
        fixed_bytes += extra_bytes
    constants: dict[str, Any] = {
        "name": name,
        **local._asdict(),
        **_method_constants(methods, attention),
        "bytes_per_token": bytes_per_token,
        "model_state_bytes_total": model_state_bytes_total,
        "model_state_bytes_fixed": fixed_bytes,
        "memory_limit_bytes": memory_limit_bytes,
        "fixed_step_s": fixed_step_s,
        "attention": attention,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "gpus_per_node": gpus_per_node,
        "unsharded_state_bytes": unsharded_state_bytes,
        "recompute_policies": tuple(policies),
        **_layer_constants(mix, local, methods, states, attention),
    }
    residuals = _residuals(CostModel(**constants), samples)
    errors = np.asarray([abs(residual.relative_error) for residual in residuals])
    mean, worst, r2 = float(errors.mean()), float(errors.max()), _r2(residuals)
    if mean > max_mean_relative_error:
        bad = max(residuals, key=lambda residual: abs(residual.relative_error))
        raise CalibrationError(
            f"the fit misses the samples by {mean:.1%} on average, at worst by {worst:.1%} (degree "
            f"{bad.sample.degree}, {sum(bad.sample.lengths)} tokens, measured {bad.sample.time_s:.4g} s, predicted "
            f"{bad.predicted_s:.4g} s); "
            f"expected at most {max_mean_relative_error:.1%}. Measure again on an idle machine with more repeats."
        )
    summary = {
        "num_samples": len(samples),
        "mean_relative_error": mean,
        "max_relative_error": worst,
        "r2": r2,
    }
    told = {} if layers is None else {"layers": layers.to_content()}
    model = CostModel(**constants, metadata={**(metadata or {}), **told, "fit": summary})
    return CalibrationFit(model, residuals, mean, worst, r2, _notes(constants, shared, mix))


def _check(samples: Sequence[Sample], num_ranks: int) -> None:
    if num_ranks < 1:
        raise CalibrationError(f"num_ranks is {num_ranks}; expected at least 1.")
    for index, sample in enumerate(samples):
        check_sample(sample, f"sample {index}")
    local = [sample for sample in samples if sample.degree == 1 and sample.recompute == DEFAULT_RECOMPUTE]
    totals, num_local = {sum(sample.lengths) for sample in local}, len(local)
    if num_local < _MIN_LOCAL_SAMPLES or len(totals) < 2:
        raise CalibrationError(
            f"there are {num_local} samples of degree 1 with {len(totals)} different totals of tokens; expected at "
            f"least {_MIN_LOCAL_SAMPLES} samples and 2 totals. Measure more lengths at degree 1."
        )


def _check_methods_known(samples: Sequence[Sample], methods: Mapping[str, MethodCost], policy: str) -> None:
    for sample in samples:
        if sample.degree > 1 and sample.attention not in methods:
            raise CalibrationError(
                f"samples with recompute {policy!r} ran {sample.attention} at degree {sample.degree}, but none with the "
                f"default policy did; expected both. Measure {sample.attention} with the default policy too."
            )


def _fit_shared(
    samples: Sequence[Sample], local: LocalFit, layers: LayerMix
) -> tuple[dict[str, MethodCost], StateExchange]:
    if layers.exchanges_states:
        return fit_exchanges(samples, local, moves_rows=layers.exchanges_rows)
    names = sorted({sample.attention or "" for sample in samples})
    methods = {name: fit_method([x for x in samples if x.attention == name], local, name) for name in names}
    return methods, StateExchange()


def _layer_constants(
    layers: LayerMix, local: LocalFit, methods: Mapping[str, MethodCost], states: StateExchange, primary: str
) -> dict[str, Any]:
    """Return the constants that a model with linear layers changes: those of softmax layers, as if all layers were."""
    if not layers.num_linear_layers:
        return {}
    changed: dict[str, Any] = {
        "softmax_layer_share": layers.scaling_share,
        "state_exchange_by_degree_s": states.inside,
        "state_exchange_between_nodes_s": states.between,
    }
    if layers.num_softmax_layers == 0 and layers.exchanges_states:
        # No attention method runs, so no number of its heads limits a degree.
        changed |= {"num_heads": None, "num_kv_heads": None}
    if layers.scaling_share in (0.0, 1.0):
        return changed
    scaled = {name: _divided(method, layers.scaling_share) for name, method in methods.items()}
    return {
        **changed,
        **_method_constants(scaled, primary),
        "a1_s_per_token2": local.a1_s_per_token2 / layers.scaling_share,
    }


def _divided(method: MethodCost, share: float) -> MethodCost:
    inside, between = (
        tuple((degree, seconds / share) for degree, seconds in table)
        for table in (method.communication_s, method.between_nodes_s)
    )
    return dataclasses.replace(method, communication_s=inside, between_nodes_s=between)


def _method_constants(methods: Mapping[str, MethodCost], primary: str) -> dict[str, Any]:
    # What every method takes is the groups' own; a method has what it takes beyond.
    b2_s = min((method.fixed_s for method in methods.values()), default=0.0)
    beyond = {name: dataclasses.replace(method, fixed_s=method.fixed_s - b2_s) for name, method in methods.items()}
    first = beyond.pop(primary, MethodCost(name=primary))
    return {
        "b2_s": b2_s,
        "communication_s": first.communication_s,
        "between_nodes_s": first.between_nodes_s,
        "method_fixed_s": first.fixed_s,
        "methods": tuple(beyond.values()),
    }


def sample_kind(sample: Sample, attention: str) -> GroupKind:
    """Return the kind of group that was measured; `attention` is the method where the sample names none."""
    method = "local" if sample.degree == 1 else sample.attention or attention
    return GroupKind(sample.degree, method, sample.recompute, sample.spans_nodes and sample.degree > 1)


def _residuals(model: CostModel, samples: Sequence[Sample]) -> tuple[SampleResidual, ...]:
    predicted = [model.kind_time_s(sample.lengths, sample_kind(sample, model.attention)) for sample in samples]
    return tuple(
        SampleResidual(sample, time_s, time_s / sample.time_s - 1)
        for sample, time_s in zip(samples, predicted, strict=True)
    )


def _r2(residuals: Sequence[SampleResidual]) -> float:
    times = np.asarray([residual.sample.time_s for residual in residuals])
    missed = np.asarray([residual.predicted_s for residual in residuals]) - times
    spread = float(np.sum((times - times.mean()) ** 2))
    return 1 - float(np.sum(missed**2)) / spread if spread > 0 else 1.0


def _notes(constants: Mapping[str, Any], shared: Sequence[Sample], layers: LayerMix) -> tuple[str, ...]:
    notes = []
    if constants["a1_s_per_token2"] == 0 and layers.num_softmax_layers:
        notes.append("no quadratic part was found: measure longer sequences at degree 1")
    if not shared:
        notes.append("no sample has a degree above 1: communication counts as free")
    return tuple(notes)
