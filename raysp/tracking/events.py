"""What happened in a run, as values; the console and MLflow are told the same events."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class PhaseStarted:
    """A part of the run that takes noticeable time began."""

    text: str


@dataclass(frozen=True)
class PhaseProgressed:
    """So much of the phase that started last is done."""

    done: int
    total: int


@dataclass(frozen=True)
class WarningRaised:
    """Something the user should know that does not stop the run."""

    text: str


@dataclass(frozen=True)
class MeasuredLink:
    """The link between two ranks, both sending at once.

    Attributes:
        ranks: Global ranks.
        addresses: Network address of each rank's node.
        crosses_nodes: Whether the ranks are on different nodes.
        bandwidth_bytes_per_s: Per direction.
        latency_s: Of a message of a few bytes.
    """

    ranks: tuple[int, int]
    addresses: tuple[str, str]
    crosses_nodes: bool
    bandwidth_bytes_per_s: float
    latency_s: float

    def ends_text(self) -> str:
        """Both ranks and their nodes, for people."""
        first, second = (
            f"rank {rank} (node {address})" for rank, address in zip(self.ranks, self.addresses, strict=True)
        )
        return f"{first} and {second}"


@dataclass(frozen=True)
class LinksMeasured:
    """The links between workers were measured, after ``step`` steps."""

    step: int
    links: tuple[MeasuredLink, ...]

    @property
    def slowest(self) -> MeasuredLink:
        """The link with the least bandwidth."""
        return min(self.links, key=lambda link: link.bandwidth_bytes_per_s)

    def of_kind(self, crosses_nodes: bool) -> list[MeasuredLink]:
        """The links between nodes, or those inside of one."""
        return [link for link in self.links if link.crosses_nodes == crosses_nodes]

    def median_bandwidth_bytes_per_s(self, crosses_nodes: bool) -> float:
        """Over the links of one kind, of which there is at least one."""
        return statistics.median(link.bandwidth_bytes_per_s for link in self.of_kind(crosses_nodes))

    def metrics(self) -> dict[str, float]:
        """Median and least bandwidth, and median latency, of each kind that there is."""
        values: dict[str, float] = {}
        for crosses_nodes, kind in ((False, "inside_nodes"), (True, "between_nodes")):
            links = self.of_kind(crosses_nodes)
            if links:
                values[f"link_bandwidth_{kind}_bytes_per_s"] = self.median_bandwidth_bytes_per_s(crosses_nodes)
                values[f"link_slowest_{kind}_bytes_per_s"] = min(link.bandwidth_bytes_per_s for link in links)
                values[f"link_latency_{kind}_s"] = statistics.median(link.latency_s for link in links)
        return values

    def to_json(self) -> str:
        """Every link."""
        return json.dumps([asdict(link) for link in self.links], indent=2)


def rate_text(bytes_per_s: float) -> str:
    """A bandwidth for people."""
    return f"{bytes_per_s / 1e9:.1f} GB/s" if bytes_per_s >= 1e8 else f"{bytes_per_s / 1e6:.1f} MB/s"


@dataclass(frozen=True)
class GroupShape:
    """The groups of one degree and method in one micro-batch, taken together.

    Attributes:
        degree: GPUs of each group.
        count: Groups.
        attention: Method.
        num_sequences: Over all of them.
        num_tokens: Over all of them.
        predicted_time_s: Of the slowest of them.
    """

    degree: int
    count: int
    attention: str
    num_sequences: int
    num_tokens: int
    predicted_time_s: float


@dataclass(frozen=True)
class MicroBatchFinished:
    """One micro-batch: its groups, and its predicted beside its measured time."""

    shapes: tuple[GroupShape, ...]
    predicted_time_s: float
    measured_time_s: float


@dataclass(frozen=True)
class StepFinished:
    """One optimizer step. ``step`` counts from 1; times are wall-clock of the slowest rank.

    ``length_drift`` is the Kolmogorov-Smirnov distance (0 to 1) of the batch's lengths to those before.
    """

    step: int
    num_steps: int
    loss: float
    grad_norm: float
    learning_rate: float
    num_sequences: int
    num_tokens: int
    num_ranks: int
    step_time_s: float
    predicted_step_time_s: float
    plan_time_s: float
    plan_wait_s: float
    plan_gap: float
    outcome: str
    peak_memory_bytes: int
    mfu: float | None
    micro_batches: tuple[MicroBatchFinished, ...]
    length_drift: float | None = None

    @property
    def tokens_per_s(self) -> float:
        """Tokens of the step over all ranks, per second."""
        return self.num_tokens / self.step_time_s

    def metrics(self) -> dict[str, float]:
        """The metrics of the public interface."""
        values = {
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "num_tokens": float(self.num_tokens),
            "num_sequences": float(self.num_sequences),
            "num_micro_batches": float(len(self.micro_batches)),
            "tokens_per_s": self.tokens_per_s,
            "step_time_s": self.step_time_s,
            "predicted_step_time_s": self.predicted_step_time_s,
            "plan_time_s": self.plan_time_s,
            "plan_wait_s": self.plan_wait_s,
            "plan_gap": self.plan_gap,
            "num_ranks": float(self.num_ranks),
        }
        if self.mfu is not None:
            values["mfu"] = self.mfu
        if self.peak_memory_bytes:
            values["peak_memory_bytes"] = float(self.peak_memory_bytes)
        if self.length_drift is not None:
            values["length_drift"] = self.length_drift
        return values


@dataclass(frozen=True)
class LengthsDrifted:
    """The lengths of a batch no longer come from where those before came from; told once until they agree again."""

    step: int
    text: str


@dataclass(frozen=True)
class CostModelRefitted:
    """The cost model was rescaled to measured groups; plans made from here on use it.

    Attributes:
        step: Steps done.
        sha256: Of the new model.
        mean_relative_error: Of the new model's times, over the groups it was rescaled to.
        text: The old and the new error, for people.
    """

    step: int
    sha256: str
    mean_relative_error: float
    text: str


@dataclass(frozen=True)
class ValidationFinished:
    """Mean loss over the target tokens of the validation sequences."""

    step: int
    loss: float
    num_targets: int


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint became the newest."""

    step: int
    path: str


@dataclass(frozen=True)
class PolicyMeasured:
    """One batch under one policy, forward and backward without an update."""

    policy: str
    groups: str
    predicted_time_s: float
    measured_time_s: float
    loss: float


@dataclass(frozen=True)
class BatchCompared:
    """The same batch under the run's policy and under the one it is compared with."""

    batch: int
    num_tokens: int
    longest: int
    run: PolicyMeasured
    other: PolicyMeasured


Event = (
    PhaseStarted
    | PhaseProgressed
    | WarningRaised
    | LinksMeasured
    | StepFinished
    | LengthsDrifted
    | CostModelRefitted
    | ValidationFinished
    | CheckpointSaved
    | BatchCompared
)
