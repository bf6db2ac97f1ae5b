"""One pass of parallel attention and the load that its kernels and copies are: `AttentionPass`, and what a `Step` is.

A *load* is an array ``[2, ...]`` of seconds: of the device, and of the host that issues its work.

Symbols: N degree, Hq, Hk heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.attention_rates import KernelRate
from planner.attention_shards import KernelWork, Shards
from planner.attention_work import FloatArray

HEAD_GROUPS = 1
# Sums over ranks, the log-sum-exp and delta are fp32, or as wide as the inputs where those are wider.
SUM_BYTES = 4
# Read the sum, read the new part, write the sum.
MERGE_PASSES = 3
# Read the one, write the other.
PERMUTE_PASSES = 2


@dataclass(frozen=True)
class Step:
    """What happens at the same time.

    Attributes:
        load: ``[2, N]``, kernels and copies of each rank; the host's time for messages is not in it.
        messages: ``[N, N]``, bytes from the rank of the row to the rank of the column.
    """

    load: FloatArray
    messages: FloatArray


@dataclass(frozen=True)
class AttentionPass:
    """The forward or the backward of one call on shards.

    Attributes:
        shards: Who holds what.
        num_heads: Hq.
        num_key_heads: Hk.
        head_size: D.
        element_bytes: Of one number of q, k, v.
        rate: Of every rank.
        backward: Which of the two.
        hides_last_return: Half of the work on own rows is kept for the last exchange of a ring, which hides it.
        head_groups: Groups of key heads that an all-gather moves one after the other.
        whole_apart: An all-gather computes whole documents in a call of their own, where that hides much.
    """

    shards: Shards
    num_heads: int
    num_key_heads: int
    head_size: int
    element_bytes: int
    rate: KernelRate
    backward: bool
    hides_last_return: bool
    head_groups: int = HEAD_GROUPS
    whole_apart: bool = True

    @property
    def degree(self) -> int:
        """Ranks, each with a shard."""
        return self.shards.degree

    @property
    def wide_bytes(self) -> int:
        """Bytes of one number of a sum."""
        return max(SUM_BYTES, self.element_bytes)

    def idle(self) -> FloatArray:
        """No load, for each rank."""
        return np.zeros((2, self.degree))

    def silence(self) -> FloatArray:
        """No messages."""
        return np.zeros((self.degree, self.degree))

    def kernel_load(self, work: KernelWork, num_heads: int, *, num_picks: int | None = None) -> FloatArray:
        """Return the load of kernel calls on `num_heads` query heads, of picking their keys and adding up what they give.

        Args:
            work: The calls.
            num_heads: Query heads.
            num_picks: Operations that a call's picking takes, if not one for each tensor.
        """
        pair_s = self.rate.pair_s(self.head_size, backward=self.backward)
        key_bytes = 2 * self.row_bytes(num_heads * self.num_key_heads // self.num_heads)
        # In the backward the gradients of picked keys are put back.
        picked_bytes = PERMUTE_PASSES * work.picked_rows * key_bytes * (2 if self.backward else 1)
        device_s = work.num_calls * self.rate.launch_s + work.padded_pairs * (num_heads * pair_s)
        if num_picks is None:
            num_picks = 3 if self.backward else 2
        # A result is merged; of gradients there are three.
        operations = (work.picked_rows > 0) * num_picks + (3 if self.backward else 1)
        call_s = self.rate.host.call_s(backward=self.backward) + operations * self.rate.host.row_operation_s
        return np.stack([device_s + self.rate.copy_s(picked_bytes), work.num_calls * call_s])

    def merge_load(self, rows: FloatArray, num_heads: int, *, num_operations: int = 0) -> FloatArray:
        """Return the load of adding rows of `num_heads` heads to a sum, in operations not counted with a kernel call."""
        # With two ranks a row is merged once, and kept in the element type.
        number_bytes = self.element_bytes if self.degree == 2 else self.wide_bytes
        num_bytes = MERGE_PASSES * rows * (num_heads * self.head_size * number_bytes)
        return self.copy_load(num_bytes, num_operations=num_operations)

    def copy_load(self, num_bytes: FloatArray, *, num_operations: int) -> FloatArray:
        """Return the load of reading and writing `num_bytes` in all."""
        host_s = np.where(num_bytes > 0, num_operations * self.rate.host.row_operation_s, 0.0)
        return np.stack([self.rate.copy_s(num_bytes), host_s])

    def row_bytes(self, num_heads: int) -> int:
        """Bytes of a row of one tensor of `num_heads` heads."""
        return num_heads * self.head_size * self.element_bytes
