"""Which synchronisation wins on a batch, and why: meeting in every micro-batch (per-layer) or once a step (per-step)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.cost_model import CostModel
from planner.group_kind import GroupKind
from planner.plan import LOCAL_ATTENTION
from planner.recosting import PER_LAYER, PER_STEP, Grouping, fits, schedule

# Predictions that are closer than this share are called equal.
_EQUAL = 1e-3
_GB = 1e9


@dataclass(frozen=True)
class SyncComparison:
    """Both kinds of synchronisation on the same batch.

    Attributes:
        per_layer_s: Predicted step of the best plan known under it; `None`: it cannot run.
        per_step_s: The same.
        winner: The faster one, or ``"equal"``.
        reason: For people, one line.
        waiting_saved_s: What the plan's groups save under per-step because no group waits for the slowest of its
            micro-batch.
        traffic_saved_s: What they save because parameters and gradients travel once a step.
        extra_bytes: What every rank holds besides under per-step.
        grouping_fits_per_step: Whether the plan's groups are within their memory under per-step.
    """

    per_layer_s: float | None
    per_step_s: float | None
    winner: str
    reason: str
    waiting_saved_s: float
    traffic_saved_s: float
    extra_bytes: float
    grouping_fits_per_step: bool


def other_sync(sync: str) -> str:
    """Return the synchronisation that `sync` is not."""
    return PER_LAYER if sync == PER_STEP else PER_STEP


def compare_syncs(
    grouping: Grouping,
    lengths: Sequence[int],
    cost_model: CostModel,
    num_ranks: int,
    *,
    per_layer_s: float | None,
    per_step_s: float | None,
) -> SyncComparison:
    """Say which synchronisation wins and why.

    Args:
        grouping: Of the plan that is explained; what each saves is measured on it.
        lengths: Tokens of every sequence.
        cost_model: Knows `unsharded_state_bytes`.
        num_ranks: Ranks of the job.
        per_layer_s: Predicted step of the best plan known; `None`: it cannot run.
        per_step_s: The same.
    """
    gang = schedule(grouping, lengths, cost_model, num_ranks, PER_STEP)
    barriers = schedule(grouping, lengths, cost_model, num_ranks, PER_STEP, gang=False)
    layered = schedule(grouping, lengths, cost_model, num_ranks, PER_LAYER)
    waiting_s = barriers.end_s - gang.end_s
    traffic_s = layered.step_time_s - barriers.step_time_s
    extra_bytes = cost_model.unsharded_state_bytes or 0.0
    fitting = fits(grouping, lengths, cost_model, num_ranks, PER_STEP)
    winner = _winner(per_layer_s, per_step_s)
    gains = _gains(waiting_s, traffic_s, len(grouping))
    loss = _loss(cost_model, num_ranks, extra_bytes, fitting)
    if per_step_s is None or per_layer_s is None:
        reason = f"{winner} is the only one with a plan: {loss}"
    elif winner == "equal":
        reason = f"both take {per_layer_s:.4g} s: {gains}; {loss}"
    else:
        share = abs(per_layer_s - per_step_s) / max(per_layer_s, per_step_s)
        why = f"{gains}; {loss}" if winner == PER_STEP else f"{loss}; {gains}"
        reason = f"{winner} is {share:.1%} faster: {why}"
    return SyncComparison(per_layer_s, per_step_s, winner, reason, waiting_s, traffic_s, extra_bytes, fitting)


def _winner(per_layer_s: float | None, per_step_s: float | None) -> str:
    if per_layer_s is None or per_step_s is None:
        return PER_LAYER if per_step_s is None else PER_STEP
    if abs(per_layer_s - per_step_s) <= _EQUAL * max(per_layer_s, per_step_s):
        return "equal"
    return PER_LAYER if per_layer_s < per_step_s else PER_STEP


def _gains(waiting_s: float, traffic_s: float, num_micro_batches: int) -> str:
    if num_micro_batches == 1:
        return "with one micro-batch per-step has nothing to save"
    return (
        f"per-step saves these groups {waiting_s:.4g} s of waiting for the slowest of each micro-batch and "
        f"{traffic_s:.4g} s of parameter and gradient traffic, once rather than {num_micro_batches} times"
    )


def _loss(cost_model: CostModel, num_ranks: int, extra_bytes: float, fitting: bool) -> str:
    # A rank holds as many tokens at every degree; the default recompute policy stands for all.
    rank = GroupKind(1, LOCAL_ATTENTION)
    before, after = (max(0, cost_model.kind_max_tokens(rank, num_ranks, sync)) for sync in (PER_LAYER, PER_STEP))
    text = f"per-step holds {extra_bytes / _GB:.3g} GB more on every rank ({after:,} rather than {before:,} tokens)"
    return f"{text}, and these groups fit" if fitting else f"{text}, too much for these groups"
