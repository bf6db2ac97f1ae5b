"""Labels are shifted per document before sharding; every target is on exactly one rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from raysp.attention import SequenceLayout
from raysp.errors import RayspError
from raysp.train.batch import build_local_batch, next_token_labels
from raysp.train.loss import IGNORED_LABEL
from raysp.train.work import GroupWork


@dataclass(frozen=True)
class _Sequence:
    input_ids: np.ndarray
    is_target: np.ndarray


class _Source:
    def __init__(self, lengths: list[int], masked: set[int] = frozenset()) -> None:
        self._sequences = []
        for index, length in enumerate(lengths):
            is_target = np.arange(length) > 0
            if index in masked:
                is_target[:] = False
            self._sequences.append(_Sequence(np.arange(length, dtype=np.int64) + 1000 * index, is_target))

    def sequence(self, sequence_id: int) -> _Sequence:
        return self._sequences[sequence_id]


def test_last_token_of_a_document_and_masked_tokens_have_no_label() -> None:
    sequence = _Sequence(np.array([5, 6, 7, 8]), np.array([False, True, False, True]))
    assert next_token_labels(sequence).tolist() == [6, IGNORED_LABEL, 8, IGNORED_LABEL]
    assert next_token_labels(_Sequence(np.array([5]), np.array([False]))).tolist() == [IGNORED_LABEL]


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_every_token_and_target_lies_on_exactly_one_rank(degree: int) -> None:
    lengths = [1, 63, 5, 127, 2]
    source = _Source(lengths, masked={3})
    work = GroupWork(tuple(range(degree)), "ring", tuple(range(len(lengths))), tuple(lengths))
    layout = SequenceLayout(lengths=lengths, degree=degree)
    pairs, num_targets = [], 0
    for rank in range(degree):
        batch = build_local_batch(source, work, layout, rank, torch.device("cpu"))
        num_targets += batch.num_targets
        for token, position, label in zip(batch.input_ids, batch.position_ids, batch.labels, strict=True):
            assert token % 1000 == position
            assert label in (IGNORED_LABEL, token + 1)
            pairs.append((int(token), int(label)))
    assert sorted(token for token, _ in pairs) == sorted(
        1000 * index + offset for index, length in enumerate(lengths) for offset in range(length)
    )
    assert num_targets == sum(label != IGNORED_LABEL for _, label in pairs) == 62 + 4 + 1


def test_rank_without_tokens_gets_one_dummy_row_of_weight_zero() -> None:
    layout = SequenceLayout(lengths=[1], degree=4)
    work = GroupWork((0, 1, 2, 3), "ring", (0,), (1,))
    batches = [build_local_batch(_Source([1]), work, layout, rank, torch.device("cpu")) for rank in range(4)]
    assert [len(batch.input_ids) for batch in batches] == [1, 1, 1, 1]
    assert sum(batch.num_targets for batch in batches) == 0


def test_dataset_shorter_than_the_plan_is_refused() -> None:
    work = GroupWork((0,), "local", (0,), (9,))
    with pytest.raises(RayspError, match="sequence 0 has 5 tokens; the plan expected 9"):
        build_local_batch(_Source([5]), work, SequenceLayout(lengths=[9], degree=1), 0, torch.device("cpu"))
