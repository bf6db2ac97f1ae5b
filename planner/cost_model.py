"""The cost model: predicted time and memory of one sequence-parallel (SP) group, additive per sequence.

Symbols: ``s`` tokens of one sequence, ``d`` degree (ranks of the group), ``N`` ranks of the job, ``S`` tokens of the
group, ``v`` speed of its slowest GPU, ``r`` factors of its recompute policy, ``c`` communication constant of its method,
``h`` half_length_tokens, ``e`` state_exchange_by_degree_s, ``A1 = a1 * causal_factor * softmax_layer_share``.

    quadratic(s) = r_compute * A1 * (s^2/d + h*s) / v
    linear(s)    = r_compute * a2 * s/d / v + per_sequence_s
    comm(s)      = r_communication * softmax_layer_share * c(d) * s/d                        (0 at d = 1)
    exposed(s)   = max(0, comm(s) - overlap * quadratic(s))
    fixed        = b1 + (b2 + method_fixed_s + state_exchange_s + e(d) if d > 1) + (exposed ZeRO traffic if sync per-layer)
    time(group)  = sum over its sequences of (quadratic + linear + exposed) + fixed
    memory(rank) = S/d * r_bytes_per_token + model_state_bytes_total/N + model_state_bytes_fixed
                   + (unsharded_state_bytes if sync per-step)

Here is no search; the constants themselves are in `planner.cost_constants`, fitting them to measurements is in
`planner.calibration`.

Source: FlexSP (arXiv:2412.01523), section 4.1, for a1, a2, b1, b2, communication and memory.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from planner.cost_constants import CostConstants
from planner.errors import CostModelError
from planner.group_kind import GroupKind
from planner.method_cost import link_s

# Counts up to here are exact in a float; no batch comes near.
NO_LIMIT_TOKENS = 2**50
SYNCS = ("per-layer", "per-step")

FloatArray = npt.NDArray[np.float64]
Lengths = Iterable[int] | npt.NDArray[Any]


class GroupTimeParts(NamedTuple):
    """Where the time of a group goes, in seconds; `communication_s` is what compute does not hide."""

    quadratic_s: float
    linear_s: float
    communication_s: float
    fixed_s: float

    @property
    def total_s(self) -> float:
        """The group's predicted time."""
        return math.fsum(self)


@dataclass(frozen=True, kw_only=True)
class CostModel(CostConstants):
    """Predicts the time and memory of a group from its constants; the fields are those of `CostConstants`.

    A method that takes a `GroupKind` is general; one that takes a degree is about `primary_kind` under per-layer.
    """

    def primary_kind(self, degree: int) -> GroupKind:
        """Return the kind of a group of `degree` that runs the primary method inside a node."""
        return GroupKind(degree, "local" if degree == 1 else self.attention)

    def sequence_times_s(self, lengths: Lengths, kind: GroupKind) -> FloatArray:
        """Predict what each sequence adds to the time of a group.

        ``quadratic(s) + linear(s) + exposed(s)``, see the module's docstring.

        Args:
            lengths: Tokens of the sequences.
            kind: The kind of the group.

        Returns:
            Seconds, shape [sequences].

        Raises:
            CostModelError: The kind is malformed, or its method or recompute policy does not exist.
        """
        quadratic_s, linear_s, exposed_s = self._sequence_parts(lengths, kind)
        return quadratic_s + linear_s + exposed_s

    def quadratic_times_s(self, lengths: Lengths, kind: GroupKind) -> FloatArray:
        """Return the quadratic compute seconds of each sequence, shape [sequences]."""
        tokens = _as_array(lengths)
        compute = self.recompute_policy(kind.recompute).compute_factor / kind.speed
        a1 = compute * self.a1_s_per_token2 * self.causal_factor * self.softmax_layer_share
        return a1 * tokens * (tokens / kind.degree + self.half_length_tokens)

    def communication_times_s(self, lengths: Lengths, kind: GroupKind) -> FloatArray:
        """Return the communication seconds of each sequence before compute hides any, shape [sequences]."""
        tokens = _as_array(lengths)
        if kind.degree == 1:
            return np.zeros_like(tokens)
        return self._communication_s_per_share(kind) * tokens / kind.degree

    def kind_fixed_s(self, kind: GroupKind, sync: str = "per-layer") -> float:
        """Return the seconds of a group that do not depend on its sequences."""
        _check_kind(kind)
        fixed_s = self.b1_s
        if kind.degree > 1:
            fixed_s += self.b2_s + self.method_cost(kind.attention).fixed_s + self.kind_state_exchange_s(kind)
        return fixed_s if _is_per_step(sync) else fixed_s + self._exposed_zero_s

    def kind_state_exchange_s(self, kind: GroupKind) -> float:
        """Return the seconds per micro-batch that the states of linear layers travel; 0 at degree 1.

        Their size does not depend on the tokens, so that neither a longer nor a shorter sequence changes this.
        """
        if kind.degree == 1:
            return 0.0
        inside, between = self.state_exchange_by_degree_s, self.state_exchange_between_nodes_s
        return self.state_exchange_s + link_s(inside, between, kind.degree, kind.spans_nodes, self.gpus_per_node)

    def kind_time_s(self, lengths: Lengths, kind: GroupKind, sync: str = "per-layer") -> float:
        """Predict the forward and backward seconds of one group; the order of `lengths` does not matter."""
        return math.fsum(self.sequence_times_s(lengths, kind)) + self.kind_fixed_s(kind, sync)

    def time_parts(self, lengths: Lengths, kind: GroupKind, sync: str = "per-layer") -> GroupTimeParts:
        """Return where the seconds of `kind_time_s` go."""
        quadratic_s, linear_s, exposed_s = map(math.fsum, self._sequence_parts(lengths, kind))
        return GroupTimeParts(quadratic_s, linear_s, exposed_s, self.kind_fixed_s(kind, sync))

    def step_fixed_s(self, sync: str = "per-layer") -> float:
        """Return the seconds of a step outside of its micro-batches."""
        return self.fixed_step_s + (self._exposed_zero_s if _is_per_step(sync) else 0.0)

    def state_bytes(self, num_ranks: int, sync: str = "per-layer") -> float:
        """Return the bytes of each rank that do not depend on its sequences.

        Raises:
            CostModelError: `num_ranks` is below 1, or the sync is per-step and `unsharded_state_bytes` is unknown.
        """
        if num_ranks < 1:
            raise CostModelError(f"num_ranks is {num_ranks}; expected at least 1.")
        sharded = self.model_state_bytes_total / num_ranks + self.model_state_bytes_fixed
        if not _is_per_step(sync):
            return sharded
        if self.unsharded_state_bytes is None:
            raise CostModelError(
                f"cost model {self.name!r} does not say how many bytes a rank holds with sync 'per-step'; expected "
                "unsharded_state_bytes. Add it, or use sync 'per-layer'."
            )
        return sharded + self.unsharded_state_bytes

    def kind_memory_bytes(self, num_tokens: int, kind: GroupKind, num_ranks: int, sync: str = "per-layer") -> float:
        """Predict the peak memory of each rank of a group that holds `num_tokens`, unrounded."""
        _check_kind(kind)
        bytes_per_token = self.recompute_policy(kind.recompute).bytes_per_token
        return num_tokens / kind.degree * bytes_per_token + self.state_bytes(num_ranks, sync)

    def kind_max_tokens(self, kind: GroupKind, num_ranks: int, sync: str = "per-layer") -> int:
        """Return the largest whole number of tokens whose unrounded memory is within the limit.

        Returns:
            -1 if not even 0 tokens fit, at most `NO_LIMIT_TOKENS`.
        """
        limit = self.kind_limit_bytes(kind)
        # Dividing the free bytes may round across a whole number; the predicate on memory decides.
        counts = range(NO_LIMIT_TOKENS + 1)
        return bisect.bisect_right(counts, limit, key=lambda n: self.kind_memory_bytes(n, kind, num_ranks, sync)) - 1

    def kind_limit_bytes(self, kind: GroupKind) -> float:
        """Return what each rank of a group may use."""
        return self.memory_limit_bytes if kind.memory_limit_bytes is None else kind.memory_limit_bytes

    def communication_s_per_share(self, degree: int) -> float:
        """Return the primary method's seconds of communication per (token/degree), before overlap; 0 for degree 1."""
        kind = self.primary_kind(degree)
        _check_kind(kind)
        return 0.0 if degree == 1 else self._communication_s_per_share(kind)

    def fixed_s(self, degree: int) -> float:
        """Return the seconds of a group of `degree` that do not depend on its sequences."""
        return self.kind_fixed_s(self.primary_kind(degree))

    def group_time_s(self, lengths: Lengths, degree: int) -> float:
        """Predict the forward and backward seconds of one group of the primary kind; see `kind_time_s`.

        Raises:
            CostModelError: `degree` is below 1.
        """
        return self.kind_time_s(lengths, self.primary_kind(degree))

    def group_memory_bytes(self, lengths: Iterable[int], degree: int, num_ranks: int) -> float:
        """Predict the peak memory of each rank of one group of the primary kind, unrounded.

        Args:
            lengths: Tokens of every sequence of the group.
            degree: Ranks of the group; at least 1.
            num_ranks: Ranks of the job, over which the model states are sharded.

        Returns:
            Bytes per rank.
        """
        return self.kind_memory_bytes(sum(lengths), self.primary_kind(degree), num_ranks)

    def capacity_tokens(self, degree: int, num_ranks: int) -> float:
        """Return how many tokens a group of `degree` holds under the memory limit, unrounded; below 0 if none.

        Infinite where `bytes_per_token` is 0 and the model states fit.
        """
        _check_kind(self.primary_kind(degree))
        free_bytes = self.memory_limit_bytes - self.state_bytes(num_ranks)
        if self.bytes_per_token == 0:
            return math.inf if free_bytes >= 0 else -math.inf
        return degree * free_bytes / self.bytes_per_token

    def max_tokens(self, degree: int, num_ranks: int) -> int:
        """Return `kind_max_tokens` of the primary kind."""
        return self.kind_max_tokens(self.primary_kind(degree), num_ranks)

    def allows_degree(self, degree: int, *, attention: str | None = None) -> bool:
        """Say whether a group of `degree` can run the attention method: Ulysses needs heads that divide."""
        method = self.attention if attention is None else attention
        if method != "ulysses":
            return True
        kv_heads = self.num_kv_heads
        shares_kv = kv_heads is None or kv_heads % degree == 0 or degree % kv_heads == 0
        return shares_kv and (self.num_heads is None or self.num_heads % degree == 0)

    def _sequence_parts(self, lengths: Lengths, kind: GroupKind) -> tuple[FloatArray, FloatArray, FloatArray]:
        _check_kind(kind)
        tokens = _as_array(lengths)
        quadratic_s = self.quadratic_times_s(tokens, kind)
        compute = self.recompute_policy(kind.recompute).compute_factor / kind.speed
        linear_s = compute * self.a2_s_per_token * tokens / kind.degree + self.per_sequence_s
        if kind.degree == 1:
            return quadratic_s, linear_s, np.zeros_like(tokens)
        overlap = self.method_cost(kind.attention).overlap
        exposed_s = np.maximum(self.communication_times_s(tokens, kind) - overlap * quadratic_s, 0.0)
        return quadratic_s, linear_s, exposed_s

    def _communication_s_per_share(self, kind: GroupKind) -> float:
        constant_s = self.method_cost(kind.attention).constant_s(kind.degree, kind.spans_nodes, self.gpus_per_node)
        return constant_s * self.recompute_policy(kind.recompute).communication_factor * self.softmax_layer_share

    @property
    def _exposed_zero_s(self) -> float:
        return self.zero_traffic_s * (1 - self.zero_overlap)


def _as_array(lengths: Lengths) -> FloatArray:
    values = lengths if isinstance(lengths, (np.ndarray, list, tuple)) else list(lengths)
    return np.asarray(values, dtype=np.float64)


def _check_kind(kind: GroupKind) -> None:
    if kind.degree < 1:
        raise CostModelError(f"degree is {kind.degree}; expected at least 1.")
    if not 0 < kind.speed < math.inf:
        raise CostModelError(f"speed is {kind.speed}; expected a finite number above 0.")


def _is_per_step(sync: str) -> bool:
    if sync not in SYNCS:
        raise CostModelError(f"sync is {sync!r}; expected one of {', '.join(SYNCS)}.")
    return sync == "per-step"
