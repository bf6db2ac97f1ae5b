"""Point-to-point exchange: everything one hop sends and receives, in one batch.

Between two ranks, messages match in the order in which they were posted, so both sides list their tensors in the
same order. Empty tensors are dropped on both sides: shapes follow from the layout, which every rank knows. A rank that
is left with nothing posts nothing, and nobody waits for it.

On NCCL an exchange runs on a stream of its own: after what the current stream had queued when it was posted, and before
what the stream that calls ``wait`` queues afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from raysp.comm.communicator import Communicator
from raysp.comm.errors import RankLostError, RankTimeoutError
from raysp.comm.failure_notes import FailureNote, RootCause, find_root_cause, post_note
from raysp.comm.posting import post_batch
from raysp.errors import first_line

# gloo matches messages by tag; no exchange sends with this one.
_NEVER_SENT_TAG = 0x7A5B


@dataclass(frozen=True)
class Message:
    """One contiguous tensor for, or from, the rank ``peer`` (a group rank)."""

    tensor: Tensor
    peer: int


class PendingExchange:
    """An exchange under way. It keeps its tensors alive; do not touch them before ``wait``.

    On NCCL, wait on the stream that the tensors were allocated on, or keep them until that stream has waited for the
    one that did: their memory is given out again in the order of that stream.
    """

    def __init__(
        self,
        works: Sequence[tuple[dist.Work, tuple[int, ...]]],
        tensors: Sequence[Tensor],
        communicator: Communicator,
    ) -> None:
        self._works = works
        self._tensors = tensors
        self._communicator = communicator

    def wait(self) -> None:
        """Make the results usable: on gloo block until they arrived, on NCCL order the current stream after them.

        Raises:
            RankTimeoutError: A rank did not take part in time (gloo).
            RankLostError: The connection to a rank broke. With a store, both name the rank that failed first, also
                where it is not a peer of this exchange.
        """
        for work, peers in self._works:
            try:
                work.wait()
            except RuntimeError as error:
                raise _transport_error(error, peers, self._communicator, self._tensors[0].device) from error
        self._works = ()
        self._tensors = ()


def exchange(sends: Sequence[Message], recvs: Sequence[Message], communicator: Communicator) -> PendingExchange:
    """Start all ``sends`` and ``recvs`` of one hop as one batch.

    Args:
        sends: Contiguous tensors and the group ranks they go to.
        recvs: Contiguous buffers, overwritten by what the group ranks send.
        communicator: The group.

    Returns:
        A handle; results are valid after its ``wait()``.
    """
    posted = [
        [(message.tensor, communicator.ranks[message.peer]) for message in messages if message.tensor.numel()]
        for messages in (sends, recvs)
    ]
    peers = [peer for operations in posted for _, peer in operations]
    if not peers or communicator.process_group is None:
        return PendingExchange((), (), communicator)
    for tensor, _ in posted[0]:
        communicator.counter.count(tensor)
    try:
        works = post_batch(posted[0], posted[1], communicator.process_group)
    except RuntimeError as error:
        device = (posted[0] or posted[1])[0][0].device
        raise _transport_error(error, tuple(dict.fromkeys(peers)), communicator, device) from error
    # NCCL returns one work for the whole batch, gloo one for each operation.
    one_each = len(works) == len(peers)
    everyone = tuple(dict.fromkeys(peers))
    owners = [(peer,) if one_each else everyone for peer in peers[: len(works)]]
    tensors = [message.tensor for message in (*sends, *recvs)]
    return PendingExchange(list(zip(works, owners, strict=True)), tensors, communicator)


def _transport_error(
    error: RuntimeError, peers: tuple[int, ...], communicator: Communicator, device: torch.device
) -> RankTimeoutError | RankLostError:
    text = first_line(error)
    note = FailureNote(peers, "timed out" in text.lower() or "timeout" in text.lower(), text)
    me = communicator.ranks[communicator.group_rank]
    cause = RootCause(peers, me, note)
    if communicator.store is not None:
        # A store that is gone as well cannot tell more than this rank has seen.
        with contextlib.suppress(RuntimeError):
            post_note(communicator.store, me, note)
            if device.type == "cpu":
                _close_connections(communicator.process_group)
            cause = find_root_cause(communicator.store, me, note)
    operation = "exchange" if cause.reporter == me else f"exchange of rank {cause.reporter}"
    if cause.note.timed_out:
        return RankTimeoutError(operation=operation, missing_ranks=cause.ranks, timeout_s=communicator.timeout_s)
    return RankLostError(operation=operation, lost_ranks=cause.ranks, reason=cause.note.reason)


def _close_connections(process_group: dist.ProcessGroup | None) -> None:
    """Let the exchanges of the other ranks fail too; they might wait for this rank until their time-out.

    gloo closes all connections of a group in which a receive times out, and offers no other way to do so.
    """
    if process_group is None:
        return
    for peer in range(process_group.size()):
        if peer != process_group.rank():
            # Connections that are closed already raise at once.
            with contextlib.suppress(RuntimeError):
                work = dist.irecv(torch.empty(1), group=process_group, group_src=peer, tag=_NEVER_SENT_TAG)
                if work is not None:
                    work.wait(timedelta(milliseconds=1))
