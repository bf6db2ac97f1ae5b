"""The cost model: predicted time and memory of one sequence-parallel (SP) group, and its versioned JSON.

Symbols: ``s`` tokens of one sequence, ``d`` degree (ranks of the group), ``N`` ranks of the job, ``S`` tokens of the
group. Here is no search; fitting the constants from measurements is in `planner.calibration`.

    time(group)   = (1/d) * sum(a1*s^2 + a2*s) + b1 + communication[d] * S/d + (b2 if d > 1)
    memory(rank)  = S/d * bytes_per_token + model_state_bytes_total/N + model_state_bytes_fixed

Source: FlexSP (arXiv:2412.01523), section 4.1.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from planner.errors import CostModelError
from planner.strict_json import (
    as_int,
    as_number,
    as_object,
    as_str,
    canonical_sha256,
    check_keys,
    parse_object,
)

SCHEMA_VERSION = 1
# Counts up to here are exact in a float; no batch comes near.
NO_LIMIT_TOKENS = 2**50

_REQUIRED_NUMBERS = ("a1_s_per_token2", "a2_s_per_token", "b1_s", "bytes_per_token", "model_state_bytes_total")
_OPTIONAL_NUMBERS = ("b2_s", "model_state_bytes_fixed", "fixed_step_s")


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Constants that predict the time and memory of a group, for one GPU type, model and training recipe.

    Attributes:
        name: What was measured, for people and plan files.
        a1_s_per_token2: Quadratic compute (attention), seconds per token squared.
        a2_s_per_token: Linear compute, seconds per token.
        b1_s: Fixed seconds per micro-batch of a group.
        b2_s: Further fixed seconds per micro-batch of a group of degree above 1.
        communication_s: ``(degree, seconds per token/degree)`` pairs, degrees ascending and above 1. A degree that is
            not listed uses the next listed one; above the largest, the largest. Empty: communication costs nothing.
        bytes_per_token: Activation memory of one token on the rank that holds it.
        model_state_bytes_total: Parameters, gradients and optimizer state, sharded over all ranks (ZeRO-3).
        model_state_bytes_fixed: Memory of every rank that no sharding reduces.
        memory_limit_bytes: What one rank may use.
        fixed_step_s: Seconds per step outside of micro-batches (optimizer), part of every predicted step time.
        attention: Parallel attention method of groups of degree above 1.
        num_heads: Query heads; with ``attention="ulysses"`` degrees that do not divide them are ruled out. `None`:
            every degree is possible.
        metadata: JSON content for people: hardware, commit, source, residuals of the fit.
    """

    name: str
    a1_s_per_token2: float
    a2_s_per_token: float
    b1_s: float
    b2_s: float = 0.0
    communication_s: tuple[tuple[int, float], ...] = ()
    bytes_per_token: float
    model_state_bytes_total: float
    model_state_bytes_fixed: float = 0.0
    memory_limit_bytes: float
    fixed_step_s: float = 0.0
    attention: str = "ulysses"
    num_heads: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        as_str(self.name, "name", CostModelError)
        as_str(self.attention, "attention", CostModelError)
        for key in (*_REQUIRED_NUMBERS, *_OPTIONAL_NUMBERS):
            object.__setattr__(self, key, as_number(getattr(self, key), key, CostModelError))
        limit = as_number(self.memory_limit_bytes, "memory_limit_bytes", CostModelError, positive=True)
        object.__setattr__(self, "memory_limit_bytes", limit)
        if self.num_heads is not None:
            as_int(self.num_heads, "num_heads", CostModelError, minimum=1)
        pairs = tuple(
            (
                as_int(degree, "communication_s degree", CostModelError, minimum=2),
                as_number(seconds, f"communication_s[{degree}]", CostModelError),
            )
            for degree, seconds in self.communication_s
        )
        if any(left[0] >= right[0] for left, right in itertools.pairwise(pairs)):
            raise CostModelError(f"communication_s lists degrees {[d for d, _ in pairs]}; expected them ascending.")
        object.__setattr__(self, "communication_s", pairs)
        as_object(self.metadata, "metadata", CostModelError)
        try:
            canonical_sha256(self.metadata)
        except (TypeError, ValueError) as cause:
            raise CostModelError(
                f"metadata is not JSON content ({cause}); use strings, finite numbers, lists."
            ) from cause

    def communication_s_per_share(self, degree: int) -> float:
        """Return the seconds of communication per (token/degree) of a group of `degree`; 0 for degree 1."""
        _check_degree(degree)
        if degree == 1 or not self.communication_s:
            return 0.0
        index = bisect.bisect_left(self.communication_s, (degree, -1.0))
        return self.communication_s[min(index, len(self.communication_s) - 1)][1]

    def fixed_s(self, degree: int) -> float:
        """Return the seconds of a group of `degree` that do not depend on its sequences."""
        return self.b1_s + (self.b2_s if degree > 1 else 0.0)

    def group_time_s(self, lengths: Iterable[int], degree: int) -> float:
        """Predict the forward and backward time of one SP group.

        ``T = sum(a1*s^2 + a2*s)/d + b1 + communication[d]*sum(s)/d + (b2 if d > 1)``

        Args:
            lengths: Tokens of every sequence of the group.
            degree: Ranks of the group; at least 1.

        Returns:
            Predicted wall time in seconds.

        Raises:
            CostModelError: `degree` is below 1.

        Source:
            FlexSP (arXiv:2412.01523), section 4.1.
        """
        _check_degree(degree)
        num_tokens = squares = 0
        for length in lengths:
            num_tokens += length
            squares += length * length
        share = (
            self.a1_s_per_token2 * squares + (self.a2_s_per_token + self.communication_s_per_share(degree)) * num_tokens
        )
        return share / degree + self.fixed_s(degree)

    def group_memory_bytes(self, lengths: Iterable[int], degree: int, num_ranks: int) -> float:
        """Predict the peak memory of each rank of one SP group, unrounded.

        Args:
            lengths: Tokens of every sequence of the group.
            degree: Ranks of the group; at least 1.
            num_ranks: Ranks of the job, over which the model states are sharded.

        Returns:
            Bytes per rank.
        """
        return self._memory_bytes(sum(lengths), degree, num_ranks)

    def capacity_tokens(self, degree: int, num_ranks: int) -> float:
        """Return how many tokens a group of `degree` holds under the memory limit, unrounded; below 0 if none.

        Infinite where `bytes_per_token` is 0 and the model states fit.
        """
        _check_degree(degree)
        free_bytes = self.memory_limit_bytes - self._state_bytes(num_ranks)
        if self.bytes_per_token == 0:
            return math.inf if free_bytes >= 0 else -math.inf
        return degree * free_bytes / self.bytes_per_token

    def max_tokens(self, degree: int, num_ranks: int) -> int:
        """Return the largest whole number of tokens whose unrounded memory is within the limit; -1 if not even 0 is."""
        capacity = self.capacity_tokens(degree, num_ranks)
        if capacity < 0:
            return -1
        if capacity >= NO_LIMIT_TOKENS:
            return NO_LIMIT_TOKENS
        tokens = int(capacity)
        # The division may round across a whole number; the predicate on memory decides.
        while self._memory_bytes(tokens + 1, degree, num_ranks) <= self.memory_limit_bytes:
            tokens += 1
        while tokens >= 0 and self._memory_bytes(tokens, degree, num_ranks) > self.memory_limit_bytes:
            tokens -= 1
        return tokens

    def allows_degree(self, degree: int, *, attention: str | None = None) -> bool:
        """Say whether a group of `degree` can run the attention method: Ulysses needs heads that divide."""
        method = self.attention if attention is None else attention
        return method != "ulysses" or self.num_heads is None or self.num_heads % degree == 0

    def to_content(self) -> dict[str, Any]:
        """Return the JSON content, every key present."""
        content: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
        for item in dataclasses.fields(self):
            content[item.name] = getattr(self, item.name)
        content["communication_s"] = {str(degree): seconds for degree, seconds in self.communication_s}
        content["metadata"] = dict(self.metadata)
        return content

    def to_json(self) -> str:
        """Return indented JSON that `from_json` reads back to an equal model."""
        return json.dumps(self.to_content(), indent=2, allow_nan=False) + "\n"

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the canonical content; plans carry it."""
        return canonical_sha256(self.to_content())

    @classmethod
    def from_json(cls, text: str, *, what: str = "cost model") -> CostModel:
        """Read a cost model strictly.

        Raises:
            CostModelError: Unknown or missing key, wrong type, NaN or negative constant, other schema version.
        """
        content = parse_object(text, what=what, error=CostModelError)
        version = content.pop("schema_version", None)
        if version != SCHEMA_VERSION or isinstance(version, bool):
            raise CostModelError(f"{what} has schema_version {version!r}; this raysp reads version {SCHEMA_VERSION}.")
        required = ("name", *_REQUIRED_NUMBERS, "memory_limit_bytes", "communication_s")
        optional = (*_OPTIONAL_NUMBERS, "attention", "num_heads", "metadata")
        check_keys(content, required=required, optional=optional, what=what, error=CostModelError)
        table = as_object(content["communication_s"], "communication_s", CostModelError)
        for key in table:
            if not (key.isascii() and key.isdigit()):
                raise CostModelError(f'communication_s has the key {key!r}; expected a degree such as "4".')
        content["communication_s"] = tuple(sorted((int(key), seconds) for key, seconds in table.items()))
        return cls(**content)

    @classmethod
    def load(cls, path: str | Path) -> CostModel:
        """Read a cost model file; errors name the file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as cause:
            raise CostModelError(
                f"cannot read cost model {path}: {cause}. Give a file that `raysp calibrate` wrote."
            ) from cause
        return cls.from_json(text, what=f"cost model {path}")

    def save(self, path: str | Path) -> None:
        """Write `to_json` to `path`, whole or not at all."""
        target = Path(path)
        partial = target.with_name(f".{target.name}.partial")
        partial.write_text(self.to_json(), encoding="utf-8")
        partial.replace(target)

    def _state_bytes(self, num_ranks: int) -> float:
        if num_ranks < 1:
            raise CostModelError(f"num_ranks is {num_ranks}; expected at least 1.")
        return self.model_state_bytes_total / num_ranks + self.model_state_bytes_fixed

    def _memory_bytes(self, num_tokens: int, degree: int, num_ranks: int) -> float:
        _check_degree(degree)
        return num_tokens / degree * self.bytes_per_token + self._state_bytes(num_ranks)


def _check_degree(degree: int) -> None:
    if degree < 1:
        raise CostModelError(f"degree is {degree}; expected at least 1.")
