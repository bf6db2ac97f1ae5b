"""What one call of parallel attention has to do, in pure numbers: pairs and FLOPs.

Nothing here knows a method or a link; see `planner.attention_steps` for what each method moves.

Symbols: N degree, L tokens of a document, W window; a *pair* is one query and one key that it sees, of one head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from planner.attention_cut import ZigzagCut, zigzag_cut
from planner.errors import PlanError
from planner.strict_json import as_int

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# Two products of `head_size` multiply-adds each for a pair: scores, and weights times values.
FORWARD_FLOPS_PER_PAIR = 4
# Five products instead of two: the scores again, and the gradients of weights, values, queries and keys.
BACKWARD_FACTOR = 2.5


def visible_pairs(num_tokens: FloatArray, window: int | None) -> FloatArray:
    """Count the pairs of a causal document.

    Args:
        num_tokens: Tokens of the documents; need not be whole, so that equal chunks can be counted.
        window: Keys that a query sees, itself included; `None`: all before it.
    """
    seen = num_tokens if window is None else np.minimum(num_tokens, window)
    return seen * (seen + 1) / 2 + (num_tokens - seen) * seen


@dataclass(frozen=True, kw_only=True)
class AttentionWork:
    """One call of attention over the ranks of a group.

    Attributes:
        degree: N, ranks of the group.
        num_heads: Query heads.
        num_key_heads: Key heads; a divisor of `num_heads`.
        head_size: Of queries, keys and values.
        lengths: Tokens of every document of the group, each at least 1.
        causal: A query sees its document up to itself; otherwise all of it.
        window: Of those the last W, itself included; needs `causal`. `None`: all.
        element_bytes: Bytes of one number of q, k, v and out.
        key_lengths: Key tokens of every document where they differ (cross attention, not causal). `None`: `lengths`.

    Raises:
        PlanError: A value is out of range or does not go with another one.
    """

    degree: int
    num_heads: int
    num_key_heads: int
    head_size: int
    lengths: tuple[int, ...]
    causal: bool = True
    window: int | None = None
    element_bytes: int = 2
    key_lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for key in ("degree", "num_heads", "num_key_heads", "head_size", "element_bytes"):
            as_int(getattr(self, key), key, PlanError, minimum=1)
        if self.num_heads % self.num_key_heads:
            raise PlanError(
                f"num_heads is {self.num_heads}, num_key_heads {self.num_key_heads}; expected a multiple of it, because "
                "equally many query heads read each key head."
            )
        object.__setattr__(self, "lengths", _checked_lengths(self.lengths, "lengths"))
        if self.window is not None:
            as_int(self.window, "window", PlanError, minimum=1)
            if not self.causal:
                raise PlanError(f"window is {self.window} without causal; expected causal=True, or no window.")
        if self.key_lengths is not None:
            object.__setattr__(self, "key_lengths", _checked_lengths(self.key_lengths, "key_lengths"))
            self._check_key_lengths()

    @property
    def lengths_of_keys(self) -> tuple[int, ...]:
        """Key tokens of every document."""
        return self.lengths if self.key_lengths is None else self.key_lengths

    @property
    def num_tokens(self) -> int:
        """Query tokens of all documents."""
        return sum(self.lengths)

    @cached_property
    def cut(self) -> ZigzagCut:
        """Where the queries are."""
        return zigzag_cut(self.lengths, self.degree)

    @cached_property
    def key_cut(self) -> ZigzagCut:
        """Where the keys are."""
        return self.cut if self.key_lengths is None else zigzag_cut(self.key_lengths, self.degree)

    @property
    def tokens_per_rank(self) -> tuple[int, ...]:
        """Query rows that each rank holds."""
        return tuple(int(rows) for rows in self.cut.rows.sum(axis=1))

    @property
    def key_tokens_per_rank(self) -> tuple[int, ...]:
        """Key rows that each rank holds."""
        return tuple(int(rows) for rows in self.key_cut.rows.sum(axis=1))

    def document_pairs(self, document: int) -> int:
        """Count the pairs of one document, of one head."""
        length = self.lengths[document]
        if not self.causal:
            return length * self.lengths_of_keys[document]
        seen = length if self.window is None else min(length, self.window)
        return seen * (seen + 1) // 2 + (length - seen) * seen

    @cached_property
    def num_pairs(self) -> int:
        """Pairs of all documents, of one head."""
        return sum(self.document_pairs(document) for document in range(len(self.lengths)))

    @property
    def forward_flops(self) -> float:
        """FLOPs of the forward on all ranks together."""
        return float(FORWARD_FLOPS_PER_PAIR * self.head_size * self.num_heads * self.num_pairs)

    @property
    def backward_flops(self) -> float:
        """FLOPs of the backward on all ranks together."""
        return BACKWARD_FACTOR * self.forward_flops

    def _check_key_lengths(self) -> None:
        if self.causal:
            raise PlanError("key_lengths is given with causal=True; expected causal=False for cross attention.")
        if len(self.lengths_of_keys) != len(self.lengths):
            raise PlanError(
                f"key_lengths has {len(self.lengths_of_keys)} documents, lengths {len(self.lengths)}; expected as many. "
                "Give the key tokens of every document."
            )


def _checked_lengths(lengths: Iterable[int], key: str) -> tuple[int, ...]:
    checked = tuple(
        as_int(length, f"{key}[{document}]", PlanError, minimum=1) for document, length in enumerate(lengths)
    )
    if not checked:
        raise PlanError(f"{key} is empty; expected at least one document.")
    return checked
