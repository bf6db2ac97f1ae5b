"""Fitting a cost model to measured group times, with residuals, and refusing fits that explain too little.

Two fits, both with coefficients of at least zero and rows weighted by 1/time, so that a short group counts as much as a
long one: ``a1, a2, b1`` from groups of degree 1; then, from what the other groups take beyond that compute time, one
communication constant for every measured degree and a common ``b2``. Reading sample files is in `planner.samples`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from planner.cost_model import CostModel
from planner.errors import CalibrationError
from planner.nnls import nonnegative_least_squares

_MIN_LOCAL_SAMPLES = 3


@dataclass(frozen=True)
class Sample:
    """One measured group.

    Attributes:
        lengths: Tokens of every sequence of the group.
        degree: Ranks of the group.
        time_s: Measured forward and backward time.
        memory_bytes: Measured peak memory of a rank, or `None`.
    """

    lengths: tuple[int, ...]
    degree: int
    time_s: float
    memory_bytes: float | None = None


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
) -> CalibrationFit:
    """Fit the constants of a `CostModel` to measured groups.

    Args:
        samples: At least 3 of degree 1, with at least 2 different totals of tokens among them; of every further
            degree at least 1.
        name: Name of the model.
        num_ranks: Ranks of the job in which memory was measured (model states are sharded over them).
        model_state_bytes_total: Bytes of the sharded model states over all ranks.
        memory_limit_bytes: What one rank may use.
        bytes_per_token: Activation bytes of a token; `None`: fitted from the samples that carry `memory_bytes`, raising
            `model_state_bytes_fixed` until no sample is predicted below its measurement.
        model_state_bytes_fixed: Bytes of every rank that are known beforehand.
        fixed_step_s: Seconds of a step outside of micro-batches.
        attention: Parallel attention method that the samples ran.
        num_heads: Query heads, or `None`.
        metadata: Kept in the model beside the residuals.
        max_mean_relative_error: A fit worse than this is refused.

    Returns:
        The model with its residuals.

    Raises:
        CalibrationError: Too few or malformed samples, no memory samples where they are needed, or a bad fit.
    """
    _check(samples, num_ranks)
    a1, a2, b1 = _fit_local([sample for sample in samples if sample.degree == 1])
    shared = [sample for sample in samples if sample.degree > 1]
    communication, b2 = _fit_shared(shared, a1, a2, b1)
    fixed_bytes = model_state_bytes_fixed
    if bytes_per_token is None:
        known_bytes = model_state_bytes_total / num_ranks + model_state_bytes_fixed
        bytes_per_token, extra_bytes = _fit_memory(samples, known_bytes)
        fixed_bytes += extra_bytes
    constants: dict[str, Any] = {
        "name": name,
        "a1_s_per_token2": a1,
        "a2_s_per_token": a2,
        "b1_s": b1,
        "b2_s": b2,
        "communication_s": communication,
        "bytes_per_token": bytes_per_token,
        "model_state_bytes_total": model_state_bytes_total,
        "model_state_bytes_fixed": fixed_bytes,
        "memory_limit_bytes": memory_limit_bytes,
        "fixed_step_s": fixed_step_s,
        "attention": attention,
        "num_heads": num_heads,
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
    model = CostModel(**constants, metadata={**(metadata or {}), "fit": summary})
    return CalibrationFit(model, residuals, mean, worst, r2, _notes(constants, shared))


def _check(samples: Sequence[Sample], num_ranks: int) -> None:
    if num_ranks < 1:
        raise CalibrationError(f"num_ranks is {num_ranks}; expected at least 1.")
    for index, sample in enumerate(samples):
        if not sample.lengths or min(sample.lengths) < 1:
            raise CalibrationError(
                f"sample {index} has lengths {list(sample.lengths)[:5]}; expected one or more, from 1 on."
            )
        if sample.degree < 1:
            raise CalibrationError(f"sample {index} has degree {sample.degree}; expected at least 1.")
        if not math.isfinite(sample.time_s) or sample.time_s <= 0:
            raise CalibrationError(f"sample {index} has time_s {sample.time_s}; expected a finite number above 0.")
        memory = sample.memory_bytes
        if memory is not None and not (math.isfinite(memory) and memory >= 0):
            raise CalibrationError(f"sample {index} has memory_bytes {memory}; expected a finite number of at least 0.")
    totals = {sum(sample.lengths) for sample in samples if sample.degree == 1}
    num_local = sum(sample.degree == 1 for sample in samples)
    if num_local < _MIN_LOCAL_SAMPLES or len(totals) < 2:
        raise CalibrationError(
            f"there are {num_local} samples of degree 1 with {len(totals)} different totals of tokens; expected at "
            f"least {_MIN_LOCAL_SAMPLES} samples and 2 totals. Measure more lengths at degree 1."
        )


def _fit_local(samples: Sequence[Sample]) -> tuple[float, float, float]:
    rows = np.asarray([[sum(s * s for s in x.lengths), sum(x.lengths), 1.0] for x in samples], dtype=np.float64)
    times = np.asarray([x.time_s for x in samples])
    a1, a2, b1 = nonnegative_least_squares(rows / times[:, None], np.ones(len(samples)))
    return float(a1), float(a2), float(b1)


def _fit_shared(
    samples: Sequence[Sample], a1: float, a2: float, b1: float
) -> tuple[tuple[tuple[int, float], ...], float]:
    degrees = sorted({sample.degree for sample in samples})
    if not degrees:
        return (), 0.0
    rows = np.zeros((len(samples), len(degrees) + 1))
    beyond = np.zeros(len(samples))
    for row, sample in enumerate(samples):
        compute_s = sum(a1 * s * s + a2 * s for s in sample.lengths) / sample.degree + b1
        rows[row, degrees.index(sample.degree)] = sum(sample.lengths) / sample.degree / sample.time_s
        rows[row, -1] = 1 / sample.time_s
        beyond[row] = (sample.time_s - compute_s) / sample.time_s
    solution = nonnegative_least_squares(rows, beyond)
    return tuple((degree, float(c)) for degree, c in zip(degrees, solution[:-1], strict=True)), float(solution[-1])


def _fit_memory(samples: Sequence[Sample], known_bytes: float) -> tuple[float, float]:
    measured = [(sum(x.lengths) / x.degree, x.memory_bytes) for x in samples if x.memory_bytes is not None]
    if len({share for share, _ in measured}) < 2:
        raise CalibrationError(
            f"{len(measured)} samples carry memory_bytes, with too few different tokens per rank; expected at least 2, "
            "or give bytes_per_token."
        )
    shares = np.asarray([share for share, _ in measured])
    memory = np.asarray([bytes_ - known_bytes for _, bytes_ in measured])
    slope, fixed = nonnegative_least_squares(np.stack([shares, np.ones(len(shares))], axis=1), memory)
    if slope <= 0:
        raise CalibrationError(
            f"measured memory does not grow with tokens beyond the {known_bytes:.0f} bytes of model states per rank; "
            "check model_state_bytes_total and num_ranks, or give bytes_per_token."
        )
    # A prediction below a measurement means out of memory later: the upper envelope is the safe one.
    return float(slope), float(max(fixed, np.max(memory - slope * shares), 0.0))


def _residuals(model: CostModel, samples: Sequence[Sample]) -> tuple[SampleResidual, ...]:
    predicted = [model.group_time_s(sample.lengths, sample.degree) for sample in samples]
    return tuple(
        SampleResidual(sample, time_s, time_s / sample.time_s - 1)
        for sample, time_s in zip(samples, predicted, strict=True)
    )


def _r2(residuals: Sequence[SampleResidual]) -> float:
    times = np.asarray([residual.sample.time_s for residual in residuals])
    missed = np.asarray([residual.predicted_s for residual in residuals]) - times
    spread = float(np.sum((times - times.mean()) ** 2))
    return 1 - float(np.sum(missed**2)) / spread if spread > 0 else 1.0


def _notes(constants: Mapping[str, Any], shared: Sequence[Sample]) -> tuple[str, ...]:
    notes = []
    if constants["a1_s_per_token2"] == 0:
        notes.append("no quadratic part was found: measure longer sequences at degree 1")
    if not shared:
        notes.append("no sample has a degree above 1: communication counts as free")
    return tuple(notes)
