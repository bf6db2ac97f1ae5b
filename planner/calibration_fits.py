"""The least-squares fits of calibration: local compute, communication of each method, memory, recompute policies.

Coefficients are at least zero and rows are weighted by 1/time, so that a short group counts as much as a long one.
`planner.calibration` checks the samples, puts the parts together and judges the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.errors import CalibrationError
from planner.method_cost import MethodCost, RecomputePolicy, Table, link_s, listed_s
from planner.nnls import nonnegative_least_squares
from planner.samples import Sample

FloatArray = npt.NDArray[np.float64]

# A further term has to lower the residual per degree of freedom by this share; noise alone lowers it by less.
_CLEARLY_LOWER = 0.1
# Residuals below this relative size are rounding: nothing is left to explain.
_ROUNDING = 1e-6


class LocalFit(NamedTuple):
    """Compute constants: see `planner.cost_model`."""

    a1_s_per_token2: float
    a2_s_per_token: float
    b1_s: float
    per_sequence_s: float
    half_length_tokens: float

    def compute_s(self, sample: Sample) -> float:
        """Quadratic and linear seconds of a sample, without what does not depend on its tokens."""
        half, degree = self.half_length_tokens, sample.degree
        quadratic = sum(s * s / degree + half * s for s in sample.lengths)
        return self.a1_s_per_token2 * quadratic + self.a2_s_per_token * sum(sample.lengths) / degree

    def other_s(self, sample: Sample) -> float:
        """Seconds of a sample for its sequences as such and for the micro-batch."""
        return self.per_sequence_s * len(sample.lengths) + self.b1_s


def fit_local(samples: Sequence[Sample], half_length_tokens: float, *, is_quadratic: bool = True) -> LocalFit:
    """Fit ``a1, a2, b1`` and, where it explains clearly more, `per_sequence_s` to groups of degree 1.

    `half_length_tokens` is not fitted: at degree 1 it is part of a2, and at the others it cannot be told from
    communication constants that grow with the degree. Without `is_quadratic` ``a1`` is 0: no layer has softmax.
    """
    rows = np.asarray(
        [
            [sum(s * s + half_length_tokens * s for s in x.lengths), sum(x.lengths), 1.0, len(x.lengths)]
            for x in samples
        ],
        dtype=np.float64,
    )
    rows /= np.asarray([x.time_s for x in samples])[:, None]
    if not is_quadratic:
        rows = rows[:, 1:]
    ones = np.ones(len(samples))
    simple = nonnegative_least_squares(rows[:, :-1], ones)
    *a1, a2, b1 = simple
    per_sequence_s = 0.0
    spare = len(samples) - rows.shape[1]
    scaled = rows / np.linalg.norm(rows, axis=0)
    if spare > 0 and np.linalg.matrix_rank(scaled, tol=1e-6) == rows.shape[1]:
        full = nonnegative_least_squares(rows, ones)
        before = float(np.linalg.norm(rows[:, :-1] @ simple - ones)) / (spare + 1) ** 0.5
        after = float(np.linalg.norm(rows @ full - ones)) / spare**0.5
        if before > _ROUNDING and after <= (1 - _CLEARLY_LOWER) * before:
            *a1, a2, b1, per_sequence_s = full
    return LocalFit(float(sum(a1)), float(a2), float(b1), float(per_sequence_s), half_length_tokens)


def fit_method(samples: Sequence[Sample], local: LocalFit, name: str) -> MethodCost:
    """Fit one constant per degree, inside a node and between nodes, and fixed seconds to groups of one method.

    A constant between nodes is raised to the one inside a node where noise put it below: no link between nodes is
    faster.
    """
    columns = sorted({(sample.spans_nodes, sample.degree) for sample in samples})
    rows = np.zeros((len(samples), len(columns) + 1))
    beyond = np.zeros(len(samples))
    for row, sample in enumerate(samples):
        column = columns.index((sample.spans_nodes, sample.degree))
        rows[row, column] = sum(sample.lengths) / sample.degree / sample.time_s
        rows[row, -1] = 1 / sample.time_s
        beyond[row] = (sample.time_s - local.compute_s(sample) - local.other_s(sample)) / sample.time_s
    solution = [float(value) for value in nonnegative_least_squares(rows, beyond)]
    fitted = list(zip(columns, solution[:-1], strict=True))
    inside = tuple((degree, seconds) for (spans, degree), seconds in fitted if not spans)
    between = tuple((degree, seconds) for (spans, degree), seconds in fitted if spans)
    return MethodCost(name=name, communication_s=inside, between_nodes_s=_raised(between, inside), fixed_s=solution[-1])


class StateExchange(NamedTuple):
    """Seconds per micro-batch that the states of linear layers take, by degree: see `planner.cost_constants`."""

    inside: Table = ()
    between: Table = ()

    def time_s(self, sample: Sample) -> float:
        """Seconds of a sample."""
        return link_s(self.inside, self.between, sample.degree, sample.spans_nodes, None)


def fit_exchanges(
    samples: Sequence[Sample], local: LocalFit, *, moves_rows: bool
) -> tuple[dict[str, MethodCost], StateExchange]:
    """Fit the methods and the state exchange of a model with linear layers to groups of degree above 1, all together.

    For each degree, inside a node and between nodes, a constant per token of each method, as in `fit_method`, and one per
    micro-batch, which all methods share: states are as large whatever the length. A sample of a degree should come with
    another of other tokens, or the two cannot be told apart.

    Args:
        samples: Of all methods.
        local: Compute constants.
        moves_rows: Whether anything moves in proportion to the tokens; if not, methods cost nothing.
    """
    names = sorted({sample.attention or "" for sample in samples})
    links = sorted({(sample.spans_nodes, sample.degree) for sample in samples})
    # Listed even where they cost nothing: tables say which degrees were measured.
    of_method = sorted({(sample.attention or "", sample.spans_nodes, sample.degree) for sample in samples})
    rows = np.zeros((len(samples), len(of_method) + len(links)))
    beyond = np.zeros(len(samples))
    for row, sample in enumerate(samples):
        link = (sample.spans_nodes, sample.degree)
        if moves_rows:
            column = of_method.index((sample.attention or "", *link))
            rows[row, column] = sum(sample.lengths) / sample.degree / sample.time_s
        rows[row, len(of_method) + links.index(link)] = 1 / sample.time_s
        beyond[row] = (sample.time_s - local.compute_s(sample) - local.other_s(sample)) / sample.time_s
    solution = [float(value) for value in nonnegative_least_squares(rows, beyond)]
    fitted = list(zip(of_method, solution, strict=False))
    methods = {}
    for name in names:
        inside = tuple((d, s) for (method, spans, d), s in fitted if method == name and not spans)
        between = tuple((d, s) for (method, spans, d), s in fitted if method == name and spans)
        methods[name] = MethodCost(name=name, communication_s=inside, between_nodes_s=_raised(between, inside))
    states = list(zip(links, solution[len(of_method) :], strict=True))
    inside = tuple((degree, seconds) for (spans, degree), seconds in states if not spans)
    between = tuple((degree, seconds) for (spans, degree), seconds in states if spans)
    return methods, StateExchange(inside, _raised(between, inside))


def fit_memory(samples: Sequence[Sample], known_bytes: float) -> tuple[float, float]:
    """Fit bytes per token and the bytes of every rank beyond `known_bytes`, so that no sample is underestimated."""
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


def fit_recompute(
    samples: Sequence[Sample],
    local: LocalFit,
    methods: Sequence[MethodCost],
    known_bytes: float,
    name: str,
    states: StateExchange,
) -> tuple[RecomputePolicy, float]:
    """Fit a recompute policy's factors and bytes per token to the samples that ran it.

    Args:
        samples: Those of the policy; `attention` names one of `methods` where the degree is above 1.
        local: Compute constants of the default policy.
        methods: Communication of the default policy.
        known_bytes: Bytes of every rank that no token is part of.
        name: The policy.
        states: State exchange of the default policy.

    Returns:
        The policy, and the bytes by which a rank holds more than it predicts, at most, over all samples.
    """
    by_name = {method.name: method for method in methods}
    rows = np.zeros((len(samples), 2))
    beyond = np.zeros(len(samples))
    for row, sample in enumerate(samples):
        rest_s = sample.time_s - local.other_s(sample)
        rows[row, 0] = local.compute_s(sample) / sample.time_s
        if sample.degree > 1:
            method = by_name[sample.attention or ""]
            constant_s = method.constant_s(sample.degree, sample.spans_nodes, None)
            rows[row, 1] = constant_s * sum(sample.lengths) / sample.degree / sample.time_s
            rest_s -= method.fixed_s + states.time_s(sample)
        beyond[row] = rest_s / sample.time_s
    compute, communication = (float(value) for value in nonnegative_least_squares(rows, beyond))
    if compute <= 0:
        raise CalibrationError(
            f"the samples with recompute {name!r} take no longer than their fixed parts; expected compute time. "
            "Measure longer sequences with it."
        )
    measured = [(sum(x.lengths) / x.degree, x.memory_bytes) for x in samples if x.memory_bytes is not None]
    if not measured:
        raise CalibrationError(f"no sample with recompute {name!r} carries memory_bytes; expected at least one.")
    shares = np.asarray([share for share, _ in measured])
    memory = np.asarray([bytes_ - known_bytes for _, bytes_ in measured])
    slope = max(0.0, float(shares @ memory / (shares @ shares)))
    policy = RecomputePolicy(
        name=name,
        bytes_per_token=slope,
        compute_factor=compute,
        communication_factor=communication if rows[:, 1].any() else 1.0,
    )
    return policy, max(0.0, float(np.max(memory - slope * shares)))


def _raised(between: Table, inside: Table) -> Table:
    if not between:
        return ()
    seconds = {degree: max(value, listed_s(inside, degree)) for degree, value in between}
    for degree, value in inside:
        # The one that stands for this degree where it is not listed.
        stand_in = min((listed for listed in seconds if listed >= degree), default=max(seconds))
        seconds[stand_in] = max(seconds[stand_in], value)
    return tuple(sorted(seconds.items()))
