"""One SP group as the attention methods see it: ranks, this rank's place, and what it has sent."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from raysp.comm.workspace import Workspace
from raysp.errors import InputError

# Of groups made elsewhere, which are wrapped anew at every call; forgotten with the group.
_MEASUREMENTS: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[Any, Any]] = weakref.WeakKeyDictionary()
_WORKSPACES: weakref.WeakKeyDictionary[dist.ProcessGroup, Workspace] = weakref.WeakKeyDictionary()


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
        store: Store of the epoch, where ranks whose exchange fails leave notes, so that all name the same rank. ``None``
            for groups from elsewhere; their errors name the direct peer.
        measurements: What was measured of this group, under keys that begin with its ranks; shared with subsets.
        workspace: Where calls over this group find buffers that the last call left; shared with subsets.
    """

    process_group: dist.ProcessGroup | None
    ranks: tuple[int, ...]
    group_rank: int
    timeout_s: float = float("nan")
    counter: ByteCounter = field(default_factory=ByteCounter, compare=False)
    store: dist.Store | None = field(default=None, compare=False, repr=False)
    measurements: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    workspace: Workspace = field(default_factory=Workspace, compare=False, repr=False)

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
        """View a group that was made elsewhere; all views of it share measurements and buffers.

        On NCCL the group must already have run one collective.
        """
        ranks = tuple(dist.get_process_group_ranks(process_group))
        measurements = _MEASUREMENTS.setdefault(process_group, {})
        workspace = _WORKSPACES.setdefault(process_group, Workspace())
        return cls(process_group, ranks, dist.get_rank(process_group), measurements=measurements, workspace=workspace)

    @classmethod
    def of(cls, group: dist.ProcessGroup | Communicator | None, degree: int) -> Communicator:
        """View what a caller passed as the group of a layout of ``degree``.

        Args:
            group: A process group, a communicator, or ``None`` for a rank alone.
            degree: Ranks the layout was built for.

        Raises:
            InputError: The group has another number of ranks.
        """
        if group is None:
            if degree == 1:
                return cls.alone()
            raise InputError(f"group is None for a layout of degree {degree}; expected the process group of its ranks.")
        if not isinstance(group, Communicator | dist.ProcessGroup):
            raise InputError(f"group is {group!r}; expected a process group that this rank is in, or None at degree 1.")
        communicator = group if isinstance(group, Communicator) else cls.wrap(group)
        if communicator.degree != degree:
            raise InputError(
                f"the group has {communicator.degree} ranks and the layout degree {degree}; expected the same. "
                "Build the layout with the degree of the group that runs it."
            )
        return cls.alone() if degree == 1 else communicator

    def subset(self, group_ranks: Sequence[int]) -> Communicator:
        """View some ranks of this group as a group of their own, for point-to-point exchanges.

        No process group is made, so this costs nothing; it counts its bytes with this one.

        Args:
            group_ranks: Group ranks of this group in the order of the new one, this process among them.

        Raises:
            InputError: The ranks are not of this group, named twice, or this process is none of them.
        """
        chosen = tuple(int(rank) for rank in group_ranks)
        if len(set(chosen)) != len(chosen) or not all(0 <= rank < self.degree for rank in chosen):
            raise InputError(
                f"ranks {list(chosen)} are no part of a group of degree {self.degree}; expected group ranks from 0 to "
                f"{self.degree - 1}, each at most once."
            )
        if self.group_rank not in chosen:
            raise InputError(
                f"group rank {self.group_rank} asked for the ranks {list(chosen)}; expected a part that contains it."
            )
        ranks = tuple(self.ranks[rank] for rank in chosen)
        return replace(self, ranks=ranks, group_rank=chosen.index(self.group_rank))
