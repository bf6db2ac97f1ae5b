"""What one rank is asked to do in one step: values only, small enough to send with every step.

The driver derives them from a plan; sequences travel as ids, never as tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

DEFAULT_RECOMPUTE = "default"
RECOMPUTE_POLICIES = ("none", "full")
"""What a group may be asked to do besides ``"default"``, which stands for ``train.recompute``."""


@dataclass(frozen=True)
class GroupWork:
    """The sequences of one SP group in one micro-batch, as every rank of the group receives it.

    Attributes:
        ranks: Global ranks of the group, in group order.
        attention: Method for degree > 1; ``"local"`` for degree 1.
        sequence_ids: Dataset ids.
        lengths: Tokens of each sequence; a calibration may ask for fewer than the dataset holds.
        recompute: ``"default"`` (as ``train.recompute`` says), ``"none"``, or ``"full"``: decoder layers run again in
            the backward pass.
    """

    ranks: tuple[int, ...]
    attention: str
    sequence_ids: tuple[int, ...]
    lengths: tuple[int, ...]
    recompute: str = DEFAULT_RECOMPUTE

    @property
    def num_tokens(self) -> int:
        """Tokens of the group over all its ranks."""
        return sum(self.lengths)


@dataclass(frozen=True)
class StepWork:
    """One rank's part of a plan.

    Attributes:
        step: 0-based.
        micro_batches: Its group in every micro-batch, or ``None`` where it has none.
        sync: ``"per-layer"``: all ranks meet in every layer of every micro-batch. ``"per-step"``: a rank meets its
            groups alone, and all ranks at the begin and the end of the step. Equal on all ranks.
    """

    step: int
    micro_batches: tuple[GroupWork | None, ...]
    sync: str = "per-layer"


@dataclass(frozen=True)
class StepResult:
    """What one rank measured. Loss, targets and gradient norm are global, hence equal on all ranks.

    Attributes:
        loss: Mean over the step's target tokens; NaN where a rank's loss was not finite.
        local_loss_is_finite: Whether this rank's own share was finite, to name the culprit.
        grad_norm: Before clipping; 0 when no update was asked for.
        updated: Whether the optimizer stepped; never with a loss or gradient that is not finite.
        micro_batch_times_s: Forward and backward time of each micro-batch on this rank, waiting for others included; next
            to nothing where it had no group under ``per-step``.
        peak_memory_bytes: Device peak of the step; 0 on CPU, where torch does not record it.
    """

    step: int
    global_rank: int
    loss: float
    num_targets: int
    local_loss_is_finite: bool
    grad_norm: float
    updated: bool
    learning_rate: float
    step_time_s: float
    micro_batch_times_s: tuple[float, ...]
    peak_memory_bytes: int


class TokenSequence(Protocol):
    """One training example: token ids and which of them are to be predicted."""

    @property
    def input_ids(self) -> npt.NDArray[np.int64]: ...

    @property
    def is_target(self) -> npt.NDArray[np.bool_]: ...


class SequenceSource(Protocol):
    """Random access to training examples by id."""

    def sequence(self, sequence_id: int, /) -> TokenSequence: ...
