"""The constants of a cost model: fields, their checks, methods and recompute policies by name, and versioned JSON.

What they predict is in `planner.cost_model`, which also has the formulas.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from planner.cost_model_json import (
    OPTIONAL_NUMBERS,
    OPTIONAL_NUMBERS_2,
    REQUIRED_NUMBERS,
    SHARES,
    TABLES,
    cost_model_content,
    parse_cost_model,
)
from planner.errors import CostModelError
from planner.method_cost import (
    DEFAULT_RECOMPUTE,
    METHOD_NAMES,
    MethodCost,
    RecomputePolicy,
    as_share,
    check_links,
    check_method_name,
    checked_table,
)
from planner.strict_json import as_int, as_number, as_object, as_str, canonical_sha256


@dataclass(frozen=True, kw_only=True)
class CostConstants:
    """Measured constants of one GPU type, model and training recipe.

    Attributes:
        name: What was measured, for people and plan files.
        a1_s_per_token2: Quadratic compute (attention), seconds per token squared.
        a2_s_per_token: Linear compute, seconds per token.
        b1_s: Fixed seconds per micro-batch of a group.
        b2_s: Further fixed seconds per micro-batch of a group of degree above 1.
        communication_s: Table of the primary method, see `planner.method_cost`.
        bytes_per_token: Activation memory of one token on the rank that holds it.
        model_state_bytes_total: Parameters, gradients and optimizer state, sharded over all ranks (ZeRO-3).
        model_state_bytes_fixed: Memory of every rank that no sharding reduces.
        memory_limit_bytes: What one rank may use.
        fixed_step_s: Seconds per step outside of micro-batches (optimizer), part of every predicted step time.
        attention: The primary method: parallel attention of groups of degree above 1.
        num_heads: Query heads; with Ulysses degrees that do not divide them are ruled out. `None`: every degree is
            possible.
        metadata: JSON content for people: hardware, commit, source, residuals of the fit.
        between_nodes_s: The primary method's table for groups whose ranks are on different nodes.
        overlap: Share (0 to 1) of a sequence's quadratic compute that hides the primary method's communication.
        method_fixed_s: Further seconds of the primary method per micro-batch of a group of degree above 1.
        methods: Further methods.
        recompute_policies: Recompute policies beside the primary constants, which are ``"default"``.
        half_length_tokens: A chunk of c tokens runs at the share c/(c + half_length_tokens) of full kernel efficiency.
        per_sequence_s: Seconds that every sequence costs, however short.
        causal_factor: Multiplies `a1_s_per_token2`; 1.0: that was measured as it is run.
        softmax_layer_share: Share (0 to 1) of the layers with quadratic attention; the others are linear attention,
            without quadratic time and K/V communication. 0: no layer runs an attention method; groups carry the name
            of the primary one all the same.
        state_exchange_s: Seconds per micro-batch of a group of degree above 1 for the states of linear layers.
        zero_traffic_s: Seconds of ZeRO parameter and gradient traffic: per micro-batch under per-layer, once per step
            under per-step.
        zero_overlap: Share (0 to 1) of that traffic that compute hides.
        unsharded_state_bytes: Bytes that every rank holds besides where parameters and gradients stay unsharded for a
            whole step (per-step). `None`: unknown.
        gpus_per_node: Of the cluster that was measured. `None`: unknown, one node counts.
        num_kv_heads: Key/value heads; Ulysses needs them to divide the degree or to be divided by it. `None`: unknown.
        state_exchange_by_degree_s: Further seconds per micro-batch for the states of linear layers, by degree: latency
            and bytes of states that do not depend on tokens. Table as in `planner.method_cost`, but of seconds.
        state_exchange_between_nodes_s: The same for groups whose ranks are on different nodes.
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
    between_nodes_s: tuple[tuple[int, float], ...] = ()
    overlap: float = 0.0
    method_fixed_s: float = 0.0
    methods: tuple[MethodCost, ...] = ()
    recompute_policies: tuple[RecomputePolicy, ...] = ()
    half_length_tokens: float = 0.0
    per_sequence_s: float = 0.0
    causal_factor: float = 1.0
    softmax_layer_share: float = 1.0
    state_exchange_s: float = 0.0
    zero_traffic_s: float = 0.0
    zero_overlap: float = 0.0
    unsharded_state_bytes: float | None = None
    gpus_per_node: int | None = None
    num_kv_heads: int | None = None
    state_exchange_by_degree_s: tuple[tuple[int, float], ...] = ()
    state_exchange_between_nodes_s: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        as_str(self.name, "name", CostModelError)
        check_method_name(self.attention, "attention")
        for key in (*REQUIRED_NUMBERS, *OPTIONAL_NUMBERS, *OPTIONAL_NUMBERS_2):
            object.__setattr__(self, key, as_number(getattr(self, key), key, CostModelError))
        for key in SHARES:
            object.__setattr__(self, key, as_share(getattr(self, key), key))
        for key in ("memory_limit_bytes", "causal_factor"):
            object.__setattr__(self, key, as_number(getattr(self, key), key, CostModelError, positive=True))
        if self.unsharded_state_bytes is not None:
            unsharded = as_number(self.unsharded_state_bytes, "unsharded_state_bytes", CostModelError)
            object.__setattr__(self, "unsharded_state_bytes", unsharded)
        for key in ("num_heads", "num_kv_heads", "gpus_per_node"):
            if getattr(self, key) is not None:
                as_int(getattr(self, key), key, CostModelError, minimum=1)
        for key in TABLES:
            object.__setattr__(self, key, checked_table(getattr(self, key), key))
        check_links(self.communication_s, self.between_nodes_s, "")
        check_links(self.state_exchange_by_degree_s, self.state_exchange_between_nodes_s, "state_exchange_")
        object.__setattr__(self, "methods", tuple(self.methods))
        object.__setattr__(self, "recompute_policies", tuple(self.recompute_policies))
        _check_unique("methods", [self.attention, *(method.name for method in self.methods)])
        _check_unique("recompute_policies", [DEFAULT_RECOMPUTE, *(policy.name for policy in self.recompute_policies)])
        as_object(self.metadata, "metadata", CostModelError)
        try:
            canonical_sha256(self.metadata)
        except (TypeError, ValueError) as cause:
            raise CostModelError(
                f"metadata is not JSON content ({cause}); use strings, finite numbers, lists."
            ) from cause

    @property
    def attentions(self) -> tuple[str, ...]:
        """Names of the methods that have constants of their own, the primary one first."""
        return (self.attention, *(method.name for method in self.methods))

    def knows_method(self, name: str) -> bool:
        """Say whether `method_cost` takes `name`."""
        return name in METHOD_NAMES

    def method_cost(self, name: str) -> MethodCost:
        """Return the costs of a method; one without constants of its own gets the primary one's under its name.

        Raises:
            CostModelError: There is no such method.
        """
        cost = self._method_costs.get(name)
        if cost is None:
            raise CostModelError(
                f"there is no attention method {name!r} for groups of degree above 1; expected one of "
                f"{', '.join(METHOD_NAMES)} (measured here: {', '.join(self.attentions)})."
            )
        return cost

    def recompute_policy(self, name: str) -> RecomputePolicy:
        """Return a recompute policy; ``"default"`` has the primary constants.

        Raises:
            CostModelError: The model has no such policy.
        """
        policy = self._recompute_policies.get(name)
        if policy is None:
            raise CostModelError(
                f"cost model {self.name!r} has no recompute policy {name!r}; expected one of "
                f"{', '.join(self._recompute_policies)}."
            )
        return policy

    def to_content(self) -> dict[str, Any]:
        """Return the JSON content of version 2; tables of state exchanges only where there are any."""
        return cost_model_content({item.name: getattr(self, item.name) for item in dataclasses.fields(self)})

    def to_json(self) -> str:
        """Return indented JSON that `from_json` reads back to an equal model."""
        return json.dumps(self.to_content(), indent=2, allow_nan=False) + "\n"

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the canonical content; plans carry it."""
        return canonical_sha256(self.to_content())

    @classmethod
    def from_json(cls, text: str, *, what: str = "cost model") -> Self:
        """Read a cost model of version 1 or 2 strictly.

        Raises:
            CostModelError: Unknown or missing key, wrong type, NaN or negative constant, other schema version.
        """
        return cls(**parse_cost_model(text, what))

    @classmethod
    def load(cls, path: str | Path) -> Self:
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

    @cached_property
    def _method_costs(self) -> dict[str, MethodCost]:
        tables: dict[str, Any] = {"communication_s": self.communication_s, "between_nodes_s": self.between_nodes_s}
        primary = {
            name: MethodCost(name=name, **tables, overlap=self.overlap, fixed_s=self.method_fixed_s)
            for name in METHOD_NAMES
        }
        return {**primary, **{method.name: method for method in self.methods}}

    @cached_property
    def _recompute_policies(self) -> dict[str, RecomputePolicy]:
        default = RecomputePolicy(name=DEFAULT_RECOMPUTE, bytes_per_token=self.bytes_per_token)
        return {policy.name: policy for policy in (default, *self.recompute_policies)}


def _check_unique(key: str, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CostModelError(f"{key} lists {', '.join(twice)} besides the primary one or twice; keep one of each.")
