"""One SP group as the attention methods see it: ranks, this rank's place, and what it has sent."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor


@dataclass
class ByteCounter:
    """Payload bytes and messages this rank has sent over one group; what it keeps for itself is not counted."""

    sent_bytes: int = 0
    num_messages: int = 0

    def count(self, tensor: Tensor) -> None:
        """Add one message that carries ``tensor``."""
        self.sent_bytes += tensor.numel() * tensor.element_size()
        self.num_messages += 1

    def reset(self) -> None:
        """Start again from zero."""
        self.sent_bytes = 0
        self.num_messages = 0


@dataclass(frozen=True)
class Communicator:
    """A process group together with the places of its ranks and a byte counter.

    Attributes:
        process_group: The torch group; its ranks are ``ranks`` in this order. ``None`` where a rank is alone.
        ranks: Global ranks; the index is the group rank.
        group_rank: This process's index in ``ranks``.
        timeout_s: Stated in time-out errors; the group's own time-out decides.
        counter: What this rank has sent.
    """

    process_group: dist.ProcessGroup | None
    ranks: tuple[int, ...]
    group_rank: int
    timeout_s: float = float("nan")
    counter: ByteCounter = field(default_factory=ByteCounter, compare=False)

    @property
    def degree(self) -> int:
        """Number of ranks in the group."""
        return len(self.ranks)

    @classmethod
    def alone(cls) -> Communicator:
        """A group of one, which never communicates."""
        return cls(None, (0,), 0)

    @classmethod
    def wrap(cls, process_group: dist.ProcessGroup) -> Communicator:
        """View a group that was made elsewhere. On NCCL its communicator must already have run one collective."""
        ranks = tuple(dist.get_process_group_ranks(process_group))
        return cls(process_group, ranks, dist.get_rank(process_group))
