"""What the driver learns from each step while training goes on: whether lengths drift, whether the cost model still fits.

Both run on one thread of their own, while the driver waits for its workers; they change no gradient and no order of data.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from planner import CostModel, DriftDetector, LengthDrift, OnlineRefit, Sample, StepPlan
from raysp.train.work import StepResult

# New samples between two attempts; one costs up to a second of a core with a full window.
_SAMPLES_BETWEEN_REFITS = 32


@dataclass(frozen=True)
class Refitted:
    """A rescaled cost model, its mean relative error, and the old and the new error for people."""

    cost_model: CostModel
    mean_relative_error: float
    text: str


class RunWatch:
    """Follows the lengths of batches and, if asked to, the times of groups. Use as a context manager.

    Args:
        cost_model: The model that plans.
        sync: ``planner.sync``.
        refit: Whether to rescale the model.
        samples_between_refits: Measured groups between two attempts.
    """

    def __init__(
        self, cost_model: CostModel, *, sync: str, refit: bool, samples_between_refits: int = _SAMPLES_BETWEEN_REFITS
    ) -> None:
        self._detector = DriftDetector()
        self._refit = OnlineRefit(cost_model, sync=sync) if refit else None
        self._samples_between_refits = samples_between_refits
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="run-watch")
        self._drift: Future[LengthDrift] | None = None
        self._has_drifted = False
        self._num_new_samples = 0
        self._attempt: Future[Refitted | None] | None = None

    def __enter__(self) -> RunWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def begin_batch(self, lengths: tuple[int, ...]) -> None:
        """Start comparing a batch's lengths with those before; returns at once."""
        self._drift = self._thread.submit(self._detector.observe, lengths)

    def drift(self) -> tuple[float | None, str | None]:
        """What came out for the batch that was begun last.

        Returns:
            The Kolmogorov-Smirnov distance (0 to 1) to the batches before; what changed, the first time that a batch
            has drifted after one that had not. ``None`` where there is nothing, or not yet.
        """
        if self._drift is None or not self._drift.done():
            return None, None
        found = self._drift.result()
        is_change = found.drifted and not self._has_drifted
        self._has_drifted = found.drifted
        return found.statistic, found.reason if is_change else None

    def observe_groups(self, samples: list[Sample]) -> None:
        """Take in the measured groups of a step; returns at once."""
        if self._refit is None:
            return
        for sample in samples:
            self._thread.submit(self._refit.observe, sample)
        self._num_new_samples += len(samples)
        if self._num_new_samples >= self._samples_between_refits and self._attempt is None:
            self._num_new_samples = 0
            self._attempt = self._thread.submit(_refitted, self._refit)

    def take_refit(self, *, wait: bool = False) -> Refitted | None:
        """The model of the last attempt, once; ``None`` where there is none, or not yet.

        Args:
            wait: Wait for an attempt that is under way.
        """
        if self._attempt is None or not (wait or self._attempt.done()):
            return None
        attempt, self._attempt = self._attempt, None
        return attempt.result()


def measured_group_times_s(plan: StepPlan, results: list[StepResult]) -> list[list[float]]:
    """Forward and backward time of each group of each micro-batch, in seconds.

    Under per-layer all ranks meet in every layer, so a group that was done earlier does not show it. Under per-step the
    first ranks of a group to be free wait for the last one, and that is not the group's doing: the least of its ranks'
    times is taken.
    """
    pick = min if plan.sync == "per-step" else max
    return [
        [pick(results[rank].micro_batch_times_s[index] for rank in group.ranks) for group in micro_batch.groups]
        for index, micro_batch in enumerate(plan.micro_batches)
    ]


def group_samples(plan: StepPlan, lengths: tuple[int, ...], results: list[StepResult]) -> list[Sample]:
    """The measured groups of a step whose times are their own.

    Under per-layer that is, of every micro-batch, the group that was predicted to be the slowest: the others' times are
    those of the slowest.

    Args:
        plan: What ran.
        lengths: Tokens of each sequence of the batch.
        results: By rank.
    """
    samples = []
    for micro_batch, times_s in zip(plan.micro_batches, measured_group_times_s(plan, results), strict=True):
        measured = list(zip(micro_batch.groups, times_s, strict=True))
        if plan.sync != "per-step":
            slowest, _ = max(measured, key=lambda pair: pair[0].predicted_time_s)
            measured = [(slowest, max(times_s))]
        samples += [
            Sample(
                lengths=tuple(lengths[index] for index in group.sequences),
                degree=group.degree,
                time_s=time_s,
                attention=group.attention if group.degree > 1 else None,
                recompute=group.recompute,
            )
            for group, time_s in measured
            if time_s > 0
        ]
    return samples


def _refitted(refit: OnlineRefit) -> Refitted | None:
    model = refit.refit()
    if model is None:
        return None
    return Refitted(model, float(model.metadata["refit"]["mean_relative_error"]), refit.reason)
