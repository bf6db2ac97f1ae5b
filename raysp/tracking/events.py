"""What happened in a run, as values; the console and MLflow are told the same events."""

from __future__ import annotations

from dataclasses import dataclass


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
    | StepFinished
    | LengthsDrifted
    | CostModelRefitted
    | ValidationFinished
    | CheckpointSaved
    | BatchCompared
)
