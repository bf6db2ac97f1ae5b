"""The plan of one training step as values, and its JSON (schema version 1).

`plan_id` is the SHA-256 of the canonical JSON without `plan_id` and `solve_time_s`, so two runs that decide the same
have the same id. Reading is strict. That a plan fits a batch and a cost model is checked by `planner.validation`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from planner.cluster import Cluster
from planner.errors import PlanError
from planner.method_cost import DEFAULT_RECOMPUTE
from planner.strict_json import (
    as_int,
    as_list,
    as_number,
    as_object,
    as_str,
    canonical_sha256,
    check_keys,
    parse_object,
)

SCHEMA_VERSION = 1
Outcome = Literal["optimal", "feasible"]
LOCAL_ATTENTION = "local"


@dataclass(frozen=True)
class GroupPlan:
    """One SP group of one micro-batch.

    Attributes:
        ranks: Global ranks, ascending.
        degree: Their number.
        attention: Parallel attention method; ``"local"`` at degree 1.
        sequences: Sequence ids (0-based places in the batch), ascending.
        num_tokens: Tokens of those sequences.
        predicted_time_s: Forward and backward time by the cost model.
        predicted_memory_bytes: Peak memory of each rank, rounded to whole bytes.
        recompute: Recompute policy; in the JSON only where it is not ``"default"``.
    """

    ranks: tuple[int, ...]
    degree: int
    attention: str
    sequences: tuple[int, ...]
    num_tokens: int
    predicted_time_s: float
    predicted_memory_bytes: int
    recompute: str = DEFAULT_RECOMPUTE


@dataclass(frozen=True)
class MicroBatchPlan:
    """Groups that run at the same time; `predicted_time_s` is that of the slowest."""

    predicted_time_s: float
    groups: tuple[GroupPlan, ...]


@dataclass(frozen=True)
class CostModelReference:
    """Which cost model predicted the numbers of a plan."""

    name: str
    sha256: str


@dataclass(frozen=True)
class StepPlan:
    """What every rank does in one training step.

    Attributes:
        plan_id: SHA-256 of the content; see `expected_plan_id`.
        num_ranks: Ranks of the job; those in no group of a micro-batch are idle in it.
        num_sequences: Sequences of the batch.
        sync: ``"per-layer"``: micro-batches run one after the other for all ranks; ``"per-step"``: a group starts when
            its own ranks are free, all ranks meet once per step.
        cost_model: The model that predicted the numbers.
        micro_batches: In the order in which they run.
        predicted_step_time_s: Sum over micro-batches (per-step: end of the last group) plus the fixed part of the step.
        lower_bound_s: No plan of this batch is predicted faster.
        outcome: ``"optimal"`` only where proven, else ``"feasible"``.
        solve_time_s: How long planning took.
        reason: Where the plan came from, for people; not part of the JSON or of equality.
        cluster: Nodes that the plan was made for; `None`, and then not in the JSON: those of the cost model.
    """

    plan_id: str
    num_ranks: int
    num_sequences: int
    sync: str
    cost_model: CostModelReference
    micro_batches: tuple[MicroBatchPlan, ...]
    predicted_step_time_s: float
    lower_bound_s: float
    outcome: Outcome
    solve_time_s: float
    reason: str = field(default="", compare=False)
    cluster: Cluster | None = None

    @property
    def gap(self) -> float:
        """How far the plan may be from the best one: plan / bound - 1."""
        return self.predicted_step_time_s / self.lower_bound_s - 1 if self.lower_bound_s > 0 else 0.0

    def to_content(self) -> dict[str, Any]:
        """Return the JSON content."""
        content = dataclasses.asdict(self)
        del content["reason"], content["cluster"]
        if self.cluster is not None:
            content["cluster"] = self.cluster.to_content()
        for micro_batch in content["micro_batches"]:
            for group in micro_batch["groups"]:
                if group["recompute"] == DEFAULT_RECOMPUTE:
                    del group["recompute"]
        # Tuples become the lists that JSON has, so that contents compare equal after a round trip.
        return {"schema_version": SCHEMA_VERSION, **cast("dict[str, Any]", _with_lists(content))}

    def to_json(self) -> str:
        """Return indented JSON that `from_json` reads back to an equal plan."""
        return json.dumps(self.to_content(), indent=1, allow_nan=False) + "\n"

    def expected_plan_id(self) -> str:
        """Return the id that the content calls for."""
        content = self.to_content()
        del content["plan_id"], content["solve_time_s"]
        return canonical_sha256(content)

    def with_plan_id(self) -> StepPlan:
        """Return this plan with the id of its content."""
        return dataclasses.replace(self, plan_id=self.expected_plan_id())

    @classmethod
    def from_json(cls, text: str, *, what: str = "plan") -> StepPlan:
        """Read a plan strictly.

        Raises:
            PlanError: Unknown or missing key, wrong type, other schema version, or a `plan_id` that is not that of the
                content.
        """
        content = parse_object(text, what=what, error=PlanError)
        version = content.pop("schema_version", None)
        if version != SCHEMA_VERSION or isinstance(version, bool):
            raise PlanError(f"{what} has schema_version {version!r}; this raysp reads version {SCHEMA_VERSION}.")
        _check_fields(content, cls, what)
        reference = as_object(content["cost_model"], "cost_model", PlanError)
        _check_fields(reference, CostModelReference, "cost_model")
        outcome = content["outcome"]
        if outcome not in ("optimal", "feasible"):
            raise PlanError(f"outcome is {outcome!r}; expected 'optimal' or 'feasible'.")
        micro_batches = as_list(content["micro_batches"], "micro_batches", PlanError)
        plan = cls(
            plan_id=as_str(content["plan_id"], "plan_id", PlanError),
            num_ranks=as_int(content["num_ranks"], "num_ranks", PlanError, minimum=1),
            num_sequences=as_int(content["num_sequences"], "num_sequences", PlanError, minimum=1),
            sync=as_str(content["sync"], "sync", PlanError),
            cost_model=CostModelReference(
                as_str(reference["name"], "cost_model.name", PlanError),
                as_str(reference["sha256"], "cost_model.sha256", PlanError),
            ),
            micro_batches=tuple(_read_micro_batch(m, f"micro_batches[{i}]") for i, m in enumerate(micro_batches)),
            predicted_step_time_s=as_number(content["predicted_step_time_s"], "predicted_step_time_s", PlanError),
            lower_bound_s=as_number(content["lower_bound_s"], "lower_bound_s", PlanError),
            outcome=cast("Outcome", outcome),
            solve_time_s=as_number(content["solve_time_s"], "solve_time_s", PlanError),
            cluster=Cluster.from_content(content["cluster"]) if "cluster" in content else None,
        )
        expected = plan.expected_plan_id()
        if plan.plan_id != expected:
            raise PlanError(
                f"{what} has plan_id {plan.plan_id}, but its content has {expected}: it was changed after planning. "
                "Plan again."
            )
        return plan

    @classmethod
    def load(cls, path: str | Path) -> StepPlan:
        """Read a plan file; errors name the file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as cause:
            raise PlanError(f"cannot read plan {path}: {cause}. Give a file that `raysp plan` wrote.") from cause
        return cls.from_json(text, what=f"plan {path}")

    def save(self, path: str | Path) -> None:
        """Write `to_json` to `path`."""
        Path(path).write_text(self.to_json(), encoding="utf-8")


def _read_micro_batch(value: Any, key: str) -> MicroBatchPlan:
    content = as_object(value, key, PlanError)
    _check_fields(content, MicroBatchPlan, key)
    groups = as_list(content["groups"], f"{key}.groups", PlanError)
    return MicroBatchPlan(
        predicted_time_s=as_number(content["predicted_time_s"], f"{key}.predicted_time_s", PlanError),
        groups=tuple(_read_group(group, f"{key}.groups[{i}]") for i, group in enumerate(groups)),
    )


def _read_group(value: Any, key: str) -> GroupPlan:
    content = as_object(value, key, PlanError)
    _check_fields(content, GroupPlan, key)

    def integers(name: str) -> tuple[int, ...]:
        items = as_list(content[name], f"{key}.{name}", PlanError)
        return tuple(as_int(item, f"{key}.{name}[{i}]", PlanError) for i, item in enumerate(items))

    return GroupPlan(
        ranks=integers("ranks"),
        degree=as_int(content["degree"], f"{key}.degree", PlanError, minimum=1),
        attention=as_str(content["attention"], f"{key}.attention", PlanError),
        sequences=integers("sequences"),
        num_tokens=as_int(content["num_tokens"], f"{key}.num_tokens", PlanError),
        predicted_time_s=as_number(content["predicted_time_s"], f"{key}.predicted_time_s", PlanError),
        predicted_memory_bytes=as_int(content["predicted_memory_bytes"], f"{key}.predicted_memory_bytes", PlanError),
        recompute=as_str(content.get("recompute", DEFAULT_RECOMPUTE), f"{key}.recompute", PlanError),
    )


def _check_fields(content: dict[str, Any], kind: type[Any], what: str) -> None:
    names = {item.name for item in dataclasses.fields(kind)} - {"reason"}
    optional = names & {"recompute", "cluster"}
    check_keys(content, required=names - optional, optional=optional, what=what, error=PlanError)


def _with_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_lists(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_with_lists(item) for item in value]
    return value
