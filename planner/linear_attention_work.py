"""A call of linear attention over shards as values: sizes, documents, and how a contiguous cut spreads them over ranks.

Symbols: N degree, T tokens, H heads, K and V key and value head size, m ranks that share a document (its *chain*).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planner.attention_work import IntArray
from planner.errors import PlanError
from planner.strict_json import as_int

RULES = ("additive", "delta")
# Shape of the log decay: none, [H], [T, H], [T, H, K]. Only the last two travel with their tokens.
DECAYS = ("none", "constant", "head", "channel")


@dataclass(frozen=True, kw_only=True)
class LinearAttentionShape:
    """Sizes of one linear attention layer.

    Attributes:
        num_heads: H.
        key_size: K, size of a feature of queries and keys.
        value_size: V.
        rule: One of `RULES`.
        decay: One of `DECAYS`.
        element_bytes: Of q, k, v, the output and beta.
        decay_bytes: Of the log decay; `None`: as `element_bytes`.
        state_bytes_per_number: Of states and transitions, which are kept in the accumulation dtype.
    """

    num_heads: int
    key_size: int
    value_size: int
    rule: str = "additive"
    decay: str = "none"
    element_bytes: int = 2
    decay_bytes: int | None = None
    state_bytes_per_number: int = 4

    def __post_init__(self) -> None:
        for key in ("num_heads", "key_size", "value_size", "element_bytes", "state_bytes_per_number"):
            as_int(getattr(self, key), key, PlanError, minimum=1)
        if self.decay_bytes is not None:
            as_int(self.decay_bytes, "decay_bytes", PlanError, minimum=1)
        for key, known in (("rule", RULES), ("decay", DECAYS)):
            if getattr(self, key) not in known:
                raise PlanError(f"{key} is {getattr(self, key)!r}; expected one of {', '.join(known)}.")

    @property
    def state_bytes(self) -> int:
        """Of one document's state: ``H*K*V`` numbers."""
        return self.num_heads * self.key_size * self.value_size * self.state_bytes_per_number

    @property
    def transition_bytes(self) -> int:
        """Of what a rank does to a state that passes through it: ``H*K`` numbers, ``H*K*K`` under the delta rule."""
        row = self.key_size if self.rule == "delta" else 1
        return self.num_heads * self.key_size * row * self.state_bytes_per_number

    @property
    def key_bytes(self) -> int:
        """Of one token's keys or queries."""
        return self.num_heads * self.key_size * self.element_bytes

    @property
    def value_bytes(self) -> int:
        """Of one token's values or outputs."""
        return self.num_heads * self.value_size * self.element_bytes

    @property
    def decay_row_bytes(self) -> int:
        """Of one token's log decays, if they travel with it."""
        size = {"head": 1, "channel": self.key_size}.get(self.decay, 0)
        return self.num_heads * size * (self.decay_bytes or self.element_bytes)

    @property
    def beta_row_bytes(self) -> int:
        """Of one token's betas."""
        return self.num_heads * self.element_bytes if self.rule == "delta" else 0


@dataclass(frozen=True, kw_only=True)
class LinearAttentionWork:
    """One call of a group.

    Attributes:
        lengths: Tokens of the packed documents, in order.
        degree: N.
        shape: Of the layer.
    """

    lengths: tuple[int, ...]
    degree: int
    shape: LinearAttentionShape

    def __post_init__(self) -> None:
        as_int(self.degree, "degree", PlanError, minimum=1)
        if not self.lengths:
            raise PlanError("there are no documents; expected at least one length.")
        for length in self.lengths:
            as_int(length, "a length", PlanError, minimum=1)

    @cached_property
    def tokens_by_rank(self) -> IntArray:
        """``[N]``."""
        tokens: IntArray = np.diff(self._borders)
        return tokens

    @cached_property
    def chains(self) -> tuple[tuple[int, ...], ...]:
        """Ranks of each document that several ranks hold, in order; ranks without tokens are in none."""
        borders, found = self._borders, []
        for stop, length in zip(itertools.accumulate(self.lengths), self.lengths, strict=True):
            # The rank that holds a token is the first whose run ends after it.
            first, last = np.searchsorted(borders[1:], [stop - length, stop - 1], side="right").tolist()
            if last > first:
                found.append(tuple(r for r in range(first, last + 1) if self.tokens_by_rank[r]))
        return tuple(found)

    @cached_property
    def _borders(self) -> IntArray:
        """``[N + 1]``: rank r holds the tokens from ``floor(r*T/N)`` to ``floor((r+1)*T/N)``."""
        total = sum(self.lengths)
        return np.asarray([rank * total // self.degree for rank in range(self.degree + 1)], dtype=np.int64)


def even_work(tokens: int, degree: int, shape: LinearAttentionShape) -> LinearAttentionWork:
    """Return the work of one document."""
    return LinearAttentionWork(lengths=(tokens,), degree=degree, shape=shape)


def longest_chain(chains: Sequence[tuple[int, ...]]) -> int:
    """Return the ranks of the longest chain; 1 without chains."""
    return max((len(chain) for chain in chains), default=1)
