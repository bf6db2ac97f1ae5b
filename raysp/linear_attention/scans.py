"""State scans: each rank learns the state its first token starts from, or, backward, the gradient of what it handed on.

Along a chain of ranks the states obey ``S_{r+1} = M_r S_r + U_r``, their gradients ``D_{r-1} = M_r^T D_r + P_r``: the same
recurrence against the tokens, with transposed transitions. ``Links`` says who is before and behind in either direction.

``GatherScan`` is LASP-2: everybody sends (U, M) to all that need it at once, each rank chains what it got.
``SerialScan`` is LASP-1: a rank waits for the state before it, applies (M, U) and sends the result on; with several
blocks of the state's columns, which do not depend on each other, it is ZeCO's pipeline.

Sources: LASP-2 (arXiv:2502.07563), LASP (arXiv:2404.02882), ZeCO (arXiv:2507.01004).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from raysp.comm import Communicator, Message, PendingExchange, exchange
from raysp.linear_attention.chains import Links


@dataclass(frozen=True)
class Given:
    """What this rank contributes.

    Attributes:
        state: ``[H, K, V]``, used where the links have targets.
        transition: ``[H, K]`` or ``[H, K, K]`` where states pass through, else ``None``.
    """

    state: Tensor
    transition: Tensor | None


class PendingScan(Protocol):
    """A scan under way."""

    def wait(self) -> Tensor:
        """The state that reaches this rank, ``[H, K, V]``; zero where it has no sources."""
        ...

    def finish(self) -> None:
        """Return when what this rank sent is no longer needed."""
        ...


class StateScan(Protocol):
    """One way to run the recurrence over the ranks."""

    def start(
        self, given: Given, links: Links, group: Communicator, *, transition_size: int, transposed: bool
    ) -> PendingScan:
        """Begin.

        Args:
            given: This rank's part.
            links: Its sources and targets.
            group: The ranks.
            transition_size: Numbers of a transition: H*K or H*K*K.
            transposed: Apply transitions transposed: the backward direction.
        """
        ...


def applied(transition: Tensor, state: Tensor, *, transposed: bool) -> Tensor:
    """Transition times state: ``[H, K]`` scales the rows of ``[H, K, V]``, ``[H, K, K]`` multiplies it."""
    if transition.dim() == state.dim() - 1:
        return transition.unsqueeze(-1) * state
    return (transition.mT if transposed else transition) @ state


@dataclass(frozen=True)
class GatherScan:
    """LASP-2: one exchange, then every rank chains for itself; see ``StateScan``."""

    def start(
        self, given: Given, links: Links, group: Communicator, *, transition_size: int, transposed: bool
    ) -> PendingScan:
        """Send state and transition to all targets, post receives from all sources."""
        state = given.state
        parcels = [
            state.new_empty(state.numel() + (transition_size if place else 0)) for place in range(len(links.sources))
        ]
        sends: list[Message] = []
        if links.targets:
            parts = [state.flatten()] + ([given.transition.flatten()] if given.transition is not None else [])
            parcel = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
            sends = [Message(parcel, peer) for peer in links.targets]
        recvs = [Message(parcel, peer) for parcel, peer in zip(parcels, links.sources, strict=True)]
        return _Gathering(exchange(sends, recvs, group), parcels, state, transition_size, transposed)


@dataclass(frozen=True)
class _Gathering:
    pending: PendingExchange
    parcels: list[Tensor]
    like: Tensor
    transition_size: int
    transposed: bool

    def wait(self) -> Tensor:
        self.pending.wait()
        heads, rows, _ = self.like.shape
        shape = (heads, rows) if self.transition_size == heads * rows else (heads, rows, rows)
        reached = torch.zeros_like(self.like)
        for place, parcel in enumerate(self.parcels):
            state = parcel[: self.like.numel()].view_as(self.like)
            if place == 0:
                reached = state
            else:
                transition = parcel[self.like.numel() :].view(shape)
                reached = applied(transition, reached, transposed=self.transposed) + state
        return reached

    def finish(self) -> None:
        self.pending.wait()


@dataclass(frozen=True)
class SerialScan:
    """LASP-1, or ZeCO with several blocks; see ``StateScan``.

    Attributes:
        num_blocks: Parts that the columns of the state are cut into; each is sent on as soon as it is known.
    """

    num_blocks: int = 1

    def start(
        self, given: Given, links: Links, group: Communicator, *, transition_size: int, transposed: bool
    ) -> PendingScan:
        """Let go what depends on nobody, and post the first receive."""
        own = _columns(given.state, self.num_blocks)
        arriving = [torch.empty_like(block) for block in own] if links.sources else []
        # A state that depends on nobody leaves first: NCCL runs the operations of a group in the order they were posted.
        leaving = [
            exchange([Message(block, links.targets[0])], [], group)
            for block in (own if links.targets and not links.passes_through else [])
        ]
        relay = _Relaying(given, links, group, transposed, own, arriving, leaving)
        if arriving:
            relay.receive(0)
        return relay


class _Relaying:
    """A rank's part in a serial scan: block by block take, apply, and in one exchange pass on and take the next."""

    def __init__(
        self,
        given: Given,
        links: Links,
        group: Communicator,
        transposed: bool,
        own: list[Tensor],
        arriving: list[Tensor],
        leaving: list[PendingExchange],
    ) -> None:
        self._given = given
        self._links = links
        self._group = group
        self._transposed = transposed
        self._own = own
        self._arriving = arriving
        self._leaving = leaving
        self._under_way: PendingExchange

    def receive(self, block: int, passed_on: Tensor | None = None) -> None:
        """Send what the block before became, if anything, and take ``block``, if there is one."""
        sends = [] if passed_on is None else [Message(passed_on, self._links.targets[0])]
        recvs = [Message(part, self._links.sources[-1]) for part in self._arriving[block : block + 1]]
        self._under_way = exchange(sends, recvs, self._group)

    def wait(self) -> Tensor:
        if not self._arriving:
            return torch.zeros_like(self._given.state)
        for block, (own, arrived) in enumerate(zip(self._own, self._arriving, strict=True)):
            self._under_way.wait()
            onward = None
            if self._links.passes_through and self._given.transition is not None:
                onward = applied(self._given.transition, arrived, transposed=self._transposed) + own
            self.receive(block + 1, onward)
        self._leaving.append(self._under_way)
        return torch.cat(self._arriving, dim=-1)

    def finish(self) -> None:
        for pending in self._leaving:
            pending.wait()


def _columns(state: Tensor, num_blocks: int) -> list[Tensor]:
    """The state's columns in at most ``num_blocks`` contiguous parts."""
    return [block.contiguous() for block in state.chunk(num_blocks, dim=-1)]
