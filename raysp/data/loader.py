"""Deterministic global batches: a pure function of (seed, cursor), the same for any number of workers.

The order of a pass is a permutation of the sequence ids that depends on (seed, pass) alone. A batch takes the next
sequences of that order; where a pass ends, it goes on with the order of the next one, so every sequence appears
exactly once per pass. Only ids and lengths are handled here, never tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raysp.data.order import PASS_STREAM, shuffled_order
from raysp.errors import InputError

# A batch touches the end of one pass and the start of the next.
_CACHED_PASSES = 2


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where the next global batch starts.

    Attributes:
        pass_index: Passes over the data completed before it.
        position: Sequences of the current pass already used.
    """

    pass_index: int = 0
    position: int = 0

    def to_dict(self) -> dict[str, int]:
        """The cursor as plain numbers, for a checkpoint."""
        return {"pass_index": self.pass_index, "position": self.position}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Cursor:
        """Read what ``to_dict`` wrote.

        Raises:
            InputError: A key is missing or is not an integer of at least 0.
        """
        numbers = [values.get(key) for key in ("pass_index", "position")]
        if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
            raise InputError(
                f"data cursor {dict(values)!r} is not readable; expected pass_index and position, integers of at "
                "least 0. Resume from another checkpoint."
            )
        return cls(*numbers)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The sequences of one optimizer step.

    Attributes:
        sequence_ids: Ids into the dataset, in the order of the pass. An id repeats only where the batch is larger
            than a whole pass.
        lengths: Tokens of each of them.
        next_cursor: Where the following batch starts.
    """

    sequence_ids: tuple[int, ...]
    lengths: tuple[int, ...]
    next_cursor: Cursor

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole batch."""
        return sum(self.lengths)


class BatchLoader:
    """Cuts the shuffled passes over some sequences into global batches.

    Args:
        sequence_ids: The ids to draw from, for example the training part of ``TokenDataset.split``; distinct.
        sequence_lengths: Tokens of each of them, in the same order.
        seed: Chooses the orders, at least 0.
        tokens_per_step: Sequences are added until the next one would exceed this; at least one is taken.
        sequences_per_step: Takes exactly this many. Give exactly one of the two.

    Raises:
        InputError: No sequence is left, an id is repeated, a length is below 1, or not exactly one budget is given.
    """

    def __init__(
        self,
        sequence_ids: Sequence[int] | NDArray[np.integer],
        sequence_lengths: ArrayLike,
        *,
        seed: int,
        tokens_per_step: int | None = None,
        sequences_per_step: int | None = None,
    ) -> None:
        ids = np.asarray(sequence_ids, dtype=np.int64)
        lengths = np.asarray(sequence_lengths, dtype=np.int64)
        _check_sequences(ids, lengths)
        _check_budget(tokens_per_step, sequences_per_step)
        by_id = np.argsort(ids, kind="stable")
        self._ids = ids[by_id]
        self._lengths = lengths[by_id]
        self._seed = seed
        self._tokens_per_step = tokens_per_step
        self._sequences_per_step = sequences_per_step
        self._passes: OrderedDict[int, _Pass] = OrderedDict()

    @property
    def num_sequences(self) -> int:
        """Sequences of one pass."""
        return len(self._ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of one pass."""
        return int(self._lengths.sum())

    def batch_at(self, cursor: Cursor) -> GlobalBatch:
        """The global batch that starts at ``cursor``; calling it again gives the same one.

        Raises:
            InputError: The cursor lies behind the end of its pass (the data changed since it was saved).
        """
        if cursor.pass_index < 0 or not 0 <= cursor.position <= self.num_sequences:
            raise InputError(
                f"data cursor at sequence {cursor.position} of pass {cursor.pass_index}; a pass has "
                f"{self.num_sequences} sequences. The data changed since the cursor was saved: resume with the data "
                "of that run, or start with --resume none."
            )
        pass_index, position = cursor.pass_index, cursor.position
        chosen: list[NDArray[np.int64]] = []
        num_chosen = num_tokens = 0
        while True:
            if position == self.num_sequences:
                pass_index, position = pass_index + 1, 0
            current = self._pass(pass_index)
            count = self._count_that_fits(current, position, num_chosen=num_chosen, num_tokens=num_tokens)
            chosen.append(current.order[position : position + count])
            num_chosen += count
            num_tokens += current.tokens_between(position, position + count)
            position += count
            if position < self.num_sequences:
                break
        picks = np.concatenate(chosen)
        return GlobalBatch(
            sequence_ids=tuple(self._ids[picks].tolist()),
            lengths=tuple(self._lengths[picks].tolist()),
            next_cursor=Cursor(pass_index, position),
        )

    def _count_that_fits(self, current: _Pass, position: int, *, num_chosen: int, num_tokens: int) -> int:
        if self._sequences_per_step is not None:
            return min(self.num_sequences - position, self._sequences_per_step - num_chosen)
        room = (self._tokens_per_step or 0) - num_tokens
        stop = int(np.searchsorted(current.token_ends, current.token_ends[position] + room, side="right")) - 1
        return max(stop - position, 0 if num_chosen else 1)

    def _pass(self, pass_index: int) -> _Pass:
        found = self._passes.get(pass_index)
        if found is None:
            order = shuffled_order(self.num_sequences, stream=PASS_STREAM, seed=self._seed, index=pass_index)
            found = _Pass(order, np.concatenate(([0], np.cumsum(self._lengths[order]))))
            self._passes[pass_index] = found
            while len(self._passes) > _CACHED_PASSES:
                self._passes.popitem(last=False)
        return found


@dataclass(frozen=True, slots=True, eq=False)
class _Pass:
    order: NDArray[np.int64]
    # token_ends[i]: tokens of the first i sequences of the order; [num_sequences + 1]
    token_ends: NDArray[np.int64]

    def tokens_between(self, start: int, stop: int) -> int:
        return int(self.token_ends[stop] - self.token_ends[start])


def _check_sequences(ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
    if not len(ids):
        raise InputError(
            "no sequence to train on; expected at least 1. Prepare more documents or lower data.validation_fraction."
        )
    if len(lengths) != len(ids):
        raise InputError(f"{len(lengths)} lengths for {len(ids)} sequence ids; expected one per id. Pass both alike.")
    num_repeated = len(ids) - len(np.unique(ids))
    if num_repeated:
        raise InputError(f"{num_repeated} sequence ids are repeated; expected distinct ids. Give each once.")
    if lengths.min() < 1:
        raise InputError(
            f"sequence {int(ids[int(np.argmin(lengths))])} has 0 tokens; expected at least 1. Drop empty documents or "
            "set data.drop_empty = true."
        )


def _check_budget(tokens_per_step: int | None, sequences_per_step: int | None) -> None:
    if (tokens_per_step is None) == (sequences_per_step is None):
        raise InputError("give exactly one of data.tokens_per_step and data.sequences_per_step.")
    for name, value in (("tokens_per_step", tokens_per_step), ("sequences_per_step", sequences_per_step)):
        if value is not None and value < 1:
            raise InputError(f"data.{name} is {value}; expected at least 1. Raise it.")
