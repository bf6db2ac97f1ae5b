"""From the sequences of a group to the rows that one rank feeds its model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from raysp.attention import SequenceLayout
from raysp.errors import RayspError
from raysp.train.loss import IGNORED_LABEL
from raysp.train.work import GroupWork, SequenceSource, TokenSequence


@dataclass(frozen=True)
class LocalBatch:
    """One rank's rows of one micro-batch.

    Attributes:
        input_ids: ``[T]`` int64; a single dummy row where the rank has no token.
        position_ids: ``[T]`` int64, position inside the document.
        labels: ``[T]`` int64, ``-100`` where there is nothing to predict.
        num_targets: Rows with a label.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    num_targets: int


def next_token_labels(sequence: TokenSequence) -> np.ndarray:
    """Labels of one document, shifted before sharding: row i predicts token i + 1 where that token is a target.

    Returns:
        ``[length]`` int64; the last row, and rows before tokens that are no targets, hold ``-100``.
    """
    labels = np.full(len(sequence.input_ids), IGNORED_LABEL, dtype=np.int64)
    labels[:-1] = np.where(sequence.is_target[1:], sequence.input_ids[1:], IGNORED_LABEL)
    return labels


def build_local_batch(
    source: SequenceSource, work: GroupWork, layout: SequenceLayout, group_rank: int, device: torch.device
) -> LocalBatch:
    """Read the group's sequences and keep the rows that ``layout`` gives to ``group_rank``.

    Raises:
        RayspError: The dataset's sequence is shorter than the plan says: data and plan do not belong together.
    """
    ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for sequence_id, length in zip(work.sequence_ids, work.lengths, strict=True):
        sequence = source.sequence(sequence_id)
        if len(sequence.input_ids) < length:
            raise RayspError(
                f"sequence {sequence_id} has {len(sequence.input_ids)} tokens; the plan expected {length}. "
                "Every node must read the same dataset."
            )
        labels.append(next_token_labels(sequence)[:length])
        ids.append(sequence.input_ids[:length])
    rows = layout.token_indices(group_rank)
    if rows.numel() == 0:
        return dummy_batch(device)
    local_labels = torch.from_numpy(np.concatenate(labels))[rows]
    return LocalBatch(
        input_ids=torch.from_numpy(np.concatenate(ids))[rows].to(device),
        position_ids=layout.positions(group_rank).to(device),
        labels=local_labels.to(device),
        num_targets=int((local_labels != IGNORED_LABEL).sum()),
    )


def dummy_batch(device: torch.device) -> LocalBatch:
    """One row of weight zero, for a rank that has no tokens but must take part in the sharded layers."""
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    return LocalBatch(input_ids=zero, position_ids=zero, labels=torch.full_like(zero, IGNORED_LABEL), num_targets=0)
