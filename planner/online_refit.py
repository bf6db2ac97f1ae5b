"""Following a cost model's drift while training runs: rescaling its time constants to measured group times.

Only scales are fitted, one for compute, one for the communication of each method and one for what does not depend on
tokens, so a few hundred groups of a running job suffice; fitting every constant is `planner.calibration`.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from planner.calibration import sample_kind
from planner.cost_model import CostModel
from planner.errors import CalibrationError
from planner.nnls import nonnegative_least_squares
from planner.samples import Sample, check_sample

FloatArray = npt.NDArray[np.float64]

_COMPUTE, _FIXED = "compute", "fixed"
_MAX_ROUNDS = 50
_CONVERGED = 1e-6
# Huber's constant: 95 % efficient under normal noise, and an outlier pulls no harder than this many deviations.
_HUBER = 1.345
_MAD_TO_DEVIATION = 1.4826
# Pull towards the common scale, so that columns that the samples cannot tell apart share what they explain.
_PULL = 1e-6
# As in calibration: fitting scales to noise alone lowers the error by less.
_CLEARLY_LOWER = 0.1
# Mean errors below this are rounding.
_ROUNDING = 1e-6


class _Observation(NamedTuple):
    """A sample and the parts of its time before overlap, in seconds; `quadratic_s` and `traffic_s` per sequence.

    `method` is the one whose constants count; empty at degree 1.
    """

    sample: Sample
    method: str
    overlap: float
    quadratic_s: FloatArray
    linear_s: float
    traffic_s: FloatArray
    fixed_s: float

    def columns(self, scales: Mapping[str, float]) -> dict[str, float]:
        """Seconds by what scales them; traffic that compute hides at `scales` is in none."""
        exposed = scales.get(self.method, 1.0) * self.traffic_s > scales[_COMPUTE] * self.overlap * self.quadratic_s
        hidden_s = self.overlap * float(self.quadratic_s[exposed].sum())
        columns = {_COMPUTE: float(self.quadratic_s.sum()) + self.linear_s - hidden_s, _FIXED: self.fixed_s}
        if exposed.any():
            columns[self.method] = float(self.traffic_s[exposed].sum())
        return columns

    def time_s(self, scales: Mapping[str, float]) -> float:
        """Predicted seconds at `scales`."""
        return sum(scales.get(name, 1.0) * seconds for name, seconds in self.columns(scales).items())


class OnlineRefit:
    """Compares measured groups with a cost model and rescales the model where they have drifted apart.

    Attributes:
        cost_model: The model that is compared; a refit replaces it.
        reason: What the last `refit` found, for people.
    """

    def __init__(
        self,
        cost_model: CostModel,
        *,
        window: int = 512,
        min_samples: int = 8,
        forgetting: float = 0.995,
        sync: str = "per-layer",
    ) -> None:
        """Start without samples.

        Args:
            cost_model: The model that plans.
            window: How many of the last samples count.
            min_samples: Fewer are never refitted to.
            forgetting: Weight of a sample relative to the next one, above 0 and at most 1.
            sync: How the measured steps ran; per-layer times hold the ZeRO traffic that compute does not hide.
        """
        if not 1 <= min_samples <= window:
            raise CalibrationError(
                f"min_samples is {min_samples} and window {window}; expected 1 <= min_samples <= window."
            )
        if not 0 < forgetting <= 1:
            raise CalibrationError(f"forgetting is {forgetting}; expected above 0 and at most 1.")
        self.cost_model = cost_model
        self.reason = "no refit was asked for"
        self._min_samples = min_samples
        self._forgetting = forgetting
        self._sync = sync
        self._observations: deque[_Observation] = deque(maxlen=window)
        self._errors: deque[float] = deque(maxlen=window)

    def observe(self, sample: Sample) -> None:
        """Add one measured group.

        Raises:
            CalibrationError: The sample is malformed.
            CostModelError: The cost model does not know its method or recompute policy.
        """
        check_sample(sample, "the sample")
        observation = _observed(sample, self.cost_model, self._sync)
        self._observations.append(observation)
        self._errors.append(_relative_error(observation, {_COMPUTE: 1.0}))

    @property
    def num_samples(self) -> int:
        """Samples in the window."""
        return len(self._observations)

    @property
    def drift(self) -> float:
        """Mean of predicted / measured - 1 over the window: below 0, groups take longer than predicted; 0 if empty."""
        return float(np.mean(self._errors)) if self._errors else 0.0

    def refit(self) -> CostModel | None:
        """Rescale the time constants to the window.

        Weighted non-negative least squares of relative errors, reweighted so that outliers count less (Huber).

        Returns:
            The rescaled model, of the same name, which is compared from now on; its metadata gains ``"refit"``.
            `None`, with `reason`, where the samples are too few or no rescaled model is clearly better.
        """
        observations = list(self._observations)
        if len(observations) < self._min_samples:
            self.reason = f"there are {len(observations)} samples; expected at least {self._min_samples}"
            return None
        recency = self._forgetting ** np.arange(len(observations) - 1, -1, -1, dtype=np.float64)
        scales = _fitted_scales(observations, recency)
        if scales[_COMPUTE] <= 0:
            self.reason = "the samples leave no time to compute; measure groups of more different lengths"
            return None
        before = _mean_error(observations, recency, {_COMPUTE: 1.0})
        after = _mean_error(observations, recency, scales)
        if before <= _ROUNDING or after > (1 - _CLEARLY_LOWER) * before:
            self.reason = f"rescaling misses the samples by {after:.1%}, the model as it is by {before:.1%}"
            return None
        record = {
            "num_samples": len(observations),
            "mean_relative_error": after,
            "from_sha256": self.cost_model.sha256,
        }
        model = _rescaled(self.cost_model, scales, record)
        self.reason = f"rescaling lowers the mean relative error from {before:.1%} to {after:.1%}"
        self.cost_model = model
        self._observations.clear()
        self._errors.clear()
        for observation in observations:
            self.observe(observation.sample)
        return model


def _observed(sample: Sample, model: CostModel, sync: str) -> _Observation:
    kind = sample_kind(sample, model.attention)
    # The exposed part is not linear in the scales, so traffic and quadratic compute are kept apart.
    traffic_s, overlap, method = np.zeros(len(sample.lengths)), 0.0, ""
    if kind.degree > 1:
        cost = model.method_cost(kind.attention)
        traffic_s, overlap = model.communication_times_s(sample.lengths, kind), cost.overlap
        method = kind.attention if kind.attention in model.attentions else model.attention
    quadratic_s = model.quadratic_times_s(sample.lengths, kind)
    parts = model.time_parts(sample.lengths, kind, sync)
    per_sequence_s = model.per_sequence_s * len(sample.lengths)
    return _Observation(
        sample, method, overlap, quadratic_s, parts.linear_s - per_sequence_s, traffic_s, parts.fixed_s + per_sequence_s
    )


def _fitted_scales(observations: Sequence[_Observation], recency: FloatArray) -> dict[str, float]:
    times = np.asarray([observation.sample.time_s for observation in observations])
    predicted = np.asarray([observation.time_s({_COMPUTE: 1.0}) for observation in observations])
    common = float(np.median(times / np.maximum(predicted, 1e-300)))
    scales = dict.fromkeys([_COMPUTE, _FIXED, *sorted({o.method for o in observations if o.method})], common)
    weights = recency
    for _ in range(_MAX_ROUNDS):
        columns = [observation.columns(scales) for observation in observations]
        # What compute hides in every sample keeps the common scale.
        names = [name for name in scales if any(column.get(name, 0.0) > 0 for column in columns)]
        rows = np.asarray([[column.get(name, 0.0) for name in names] for column in columns]) / times[:, None]
        pull = (_PULL * weights.sum()) ** 0.5 / common * np.eye(len(names))
        matrix = np.concatenate([rows * weights[:, None] ** 0.5, pull])
        target = np.concatenate([weights**0.5, pull.sum(axis=1) * common])
        solution = nonnegative_least_squares(matrix, target)
        previous, scales = scales, {**scales, **dict(zip(names, map(float, solution), strict=True))}
        if max(abs(scales[name] - previous[name]) for name in scales) <= _CONVERGED * common:
            break
        missed = np.abs(rows @ solution - 1)
        deviation = _MAD_TO_DEVIATION * float(np.median(missed))
        weights = recency * np.minimum(1.0, _HUBER * deviation / np.maximum(missed, 1e-12)) if deviation else recency
    return scales


def _rescaled(model: CostModel, scales: Mapping[str, float], record: dict[str, Any]) -> CostModel:
    compute, fixed = scales[_COMPUTE], scales.get(_FIXED, 1.0)

    def table(pairs: tuple[tuple[int, float], ...], scale: str) -> tuple[tuple[int, float], ...]:
        return tuple((degree, seconds * scales.get(scale, 1.0)) for degree, seconds in pairs)

    return dataclasses.replace(
        model,
        a1_s_per_token2=model.a1_s_per_token2 * compute,
        a2_s_per_token=model.a2_s_per_token * compute,
        b1_s=model.b1_s * fixed,
        b2_s=model.b2_s * fixed,
        communication_s=table(model.communication_s, model.attention),
        between_nodes_s=table(model.between_nodes_s, model.attention),
        method_fixed_s=model.method_fixed_s * fixed,
        methods=tuple(
            dataclasses.replace(
                method,
                communication_s=table(method.communication_s, method.name),
                between_nodes_s=table(method.between_nodes_s, method.name),
                fixed_s=method.fixed_s * fixed,
            )
            for method in model.methods
        ),
        per_sequence_s=model.per_sequence_s * fixed,
        state_exchange_s=model.state_exchange_s * fixed,
        state_exchange_by_degree_s=table(model.state_exchange_by_degree_s, _FIXED),
        state_exchange_between_nodes_s=table(model.state_exchange_between_nodes_s, _FIXED),
        zero_traffic_s=model.zero_traffic_s * fixed,
        metadata={**model.metadata, "refit": record},
    )


def _relative_error(observation: _Observation, scales: Mapping[str, float]) -> float:
    return observation.time_s(scales) / observation.sample.time_s - 1


def _mean_error(observations: Sequence[_Observation], recency: FloatArray, scales: Mapping[str, float]) -> float:
    errors = np.asarray([abs(_relative_error(observation, scales)) for observation in observations])
    return float(np.average(errors, weights=recency))
