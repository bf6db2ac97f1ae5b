"""Communicators of one epoch: the world, and one group per tuple of ranks, made once and kept.

An epoch is the lifetime of one membership. When it changes, ``close`` (or ``abort`` where peers are gone) and call
``init_process`` again with the next epoch number: the store's keys are prefixed by it, so epochs never mix.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from raysp.comm.communicator import Communicator
from raysp.comm.rendezvous import await_ranks
from raysp.comm.workspace import Workspace
from raysp.errors import InputError, RayspError


class Communicators:
    """The process groups of this process in one epoch.

    Groups are made by their members alone (``use_local_synchronization``), so ranks outside a group need not take
    part; all members must ask for the groups they share in the same order, which a plan guarantees. A group stays
    until the epoch ends: NCCL holds buffers for each, hence the bound.

    Args:
        epoch: Number of the membership.
        global_rank: This process.
        world_size: Processes of the epoch.
        device: Where the tensors live that travel; ``cuda`` means NCCL.
        timeout_s: Longest wait in one operation.
        max_groups: Bound of the cache.
        store: Store of this epoch; the one that the process group was initialised with by default.

    Attributes:
        workspace: Buffers of calls over any of the groups.
    """

    def __init__(
        self,
        *,
        epoch: int,
        global_rank: int,
        world_size: int,
        device: torch.device,
        timeout_s: float,
        max_groups: int = 128,
        store: Store | None = None,
    ) -> None:
        self.epoch = epoch
        self.global_rank = global_rank
        self.world_size = world_size
        self.device = device
        self.timeout_s = timeout_s
        self.max_groups = max_groups
        # One for all groups: they run in turns, and each of them alone would keep as much.
        self.workspace = Workspace()
        self._given_store = store
        self._communicators: dict[tuple[int, ...], Communicator] = {}
        self._meetings: dict[tuple[int, ...], int] = {}

    @property
    def world(self) -> dist.ProcessGroup:
        """The group of all ranks."""
        if dist.group.WORLD is None:
            raise RayspError(
                f"epoch {self.epoch}: the process group is closed; expected an open one. Call init_process first."
            )
        return dist.group.WORLD

    def group(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """The process group of these ranks; ``None`` for a single rank, which needs none. See ``communicator``."""
        communicator = self.communicator(ranks)
        return None if communicator is None else communicator.process_group

    def communicator(self, ranks: Sequence[int]) -> Communicator | None:
        """Find or make the group of these ranks.

        Args:
            ranks: Global ranks in ascending order, this process among them.

        Returns:
            The group with its byte counter; ``None`` for a single rank.

        Raises:
            InputError: The ranks are not ascending, not in the world, or this process is none of them.
            RankTimeoutError: A member did not ask for the group in time; the error names it.
            RayspError: ``max_groups`` groups exist already.
        """
        key = tuple(int(rank) for rank in ranks)
        if key in self._communicators:
            return self._communicators[key]
        self._check_ranks(key)
        if len(key) == 1:
            return None
        if len(self._communicators) >= self.max_groups:
            raise RayspError(
                f"group {list(key)} would be number {len(self._communicators) + 1} of epoch {self.epoch}; expected at "
                f"most {self.max_groups} groups. Let the planner use aligned power-of-two groups, or raise max_groups."
            )
        communicator = Communicator(
            self._make_group(key),
            key,
            key.index(self.global_rank),
            self.timeout_s,
            store=self._store,
            workspace=self.workspace,
        )
        self._communicators[key] = communicator
        return communicator

    def barrier(self, ranks: Sequence[int] | None = None, *, timeout_s: float | None = None) -> None:
        """Wait for the ranks (all by default) over the store.

        Raises:
            RankTimeoutError: Names the ranks that did not arrive.
        """
        key = tuple(range(self.world_size)) if ranks is None else tuple(ranks)
        meeting = self._meetings.get(key, 0)
        self._meetings[key] = meeting + 1
        name = f"barrier {meeting} of ranks {list(key)}"
        wait_s = self.timeout_s if timeout_s is None else timeout_s
        await_ranks(self._store, name, global_rank=self.global_rank, ranks=key, timeout_s=wait_s)

    def close(self) -> None:
        """End the epoch: destroy every group. Safe to call twice."""
        self._communicators.clear()
        self.workspace.release()
        if dist.is_initialized():
            dist.destroy_process_group()

    def abort(self) -> None:
        """End the epoch although peers are gone; callable from another thread.

        NCCL calls that are blocked raise at once. gloo offers nothing like it: a blocked call raises when its peer's
        process ends, or after the time-out. Either way the next epoch can be formed.
        """
        self._communicators.clear()
        self.workspace.release()
        if dist.is_initialized():
            dist.distributed_c10d._abort_process_group()

    @property
    def _store(self) -> Store:
        return self._given_store or dist.distributed_c10d._get_default_store()

    def _make_group(self, key: tuple[int, ...]) -> dist.ProcessGroup:
        if len(key) == self.world_size:
            process_group = self.world
        else:
            self._even_out_group_counts(key)
            # device_id together with use_local_synchronization would hang (ECOSYSTEM.md).
            process_group = self._new_group(key)
        if self.device.type == "cuda":
            # NCCL forms its communicator at the first operation, where all ranks must take part; a first exchange in
            # which some rank has nothing to carry would hang.
            dist.all_reduce(torch.zeros(1, device=self.device), group=process_group)
        return process_group

    def _even_out_group_counts(self, key: tuple[int, ...]) -> None:
        """Give all members the same number of groups, by groups of one.

        torch names a locally synchronised group after its ranks and the number of groups that the process has, so
        members that were in different numbers of groups before would wait for each other under different names.
        """
        name = f"creation of group {list(key)}"
        num_groups = len(dist.distributed_c10d._world.pg_names)
        counts = await_ranks(
            self._store, name, global_rank=self.global_rank, ranks=key, timeout_s=self.timeout_s, note=num_groups
        )
        for _ in range(max(counts.values()) - num_groups):
            self._new_group((self.global_rank,), backend="gloo")

    def _new_group(self, ranks: tuple[int, ...], backend: str | None = None) -> dist.ProcessGroup:
        timeout = timedelta(seconds=self.timeout_s)
        return dist.new_group(list(ranks), timeout=timeout, backend=backend, use_local_synchronization=True)

    def _check_ranks(self, key: tuple[int, ...]) -> None:
        if list(key) != sorted(set(key)) or not key or key[0] < 0 or key[-1] >= self.world_size:
            raise InputError(
                f"group {list(key)} is not a set of ranks of this world; expected ascending global ranks below "
                f"{self.world_size}, each once. Sort the ranks of the plan's group."
            )
        if self.global_rank not in key:
            raise InputError(
                f"rank {self.global_rank} asked for group {list(key)}; expected a group that contains it. "
                "Only members make a group."
            )


def init_process(
    store: Store,
    *,
    global_rank: int,
    world_size: int,
    device: torch.device | str = "cpu",
    timeout_s: float = 600.0,
    epoch: int = 0,
    max_groups: int = 128,
) -> Communicators:
    """Join the membership ``epoch`` and return its communicators.

    Args:
        store: A store that all ranks reach, usually the rendezvous' TCPStore; not yet prefixed.
        global_rank: This process.
        world_size: Processes of the membership.
        device: ``cpu`` means gloo; ``cuda`` means NCCL for device tensors and gloo for host tensors.
        timeout_s: Longest wait in one operation.
        epoch: Number of the membership; each value is used once per store.
        max_groups: Bound of the cache of groups.

    Raises:
        RankTimeoutError: Names the ranks that did not join in time.
    """
    device = torch.device(device)
    prefixed = PrefixStore(f"epoch{epoch}", store)
    await_ranks(
        prefixed, f"start of epoch {epoch}", global_rank=global_rank, ranks=range(world_size), timeout_s=timeout_s
    )
    if device.type == "cuda":
        # A kernel that fills the GPU would hold back an exchange that was posted before it. torch has an option for this
        # per group, which it does not take for a world of two backends.
        os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=prefixed,
        rank=global_rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    return Communicators(
        epoch=epoch,
        global_rank=global_rank,
        world_size=world_size,
        device=device,
        timeout_s=timeout_s,
        max_groups=max_groups,
        store=prefixed,
    )
