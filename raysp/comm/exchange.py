"""Point-to-point exchange: everything one hop sends and receives, in one batch.

Between two ranks, messages match in the order in which they were posted, so both sides list their tensors in the
same order. Empty tensors are dropped on both sides: shapes follow from the layout, which every rank knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from raysp.comm.communicator import Communicator
from raysp.comm.errors import RankLostError, RankTimeoutError
from raysp.errors import first_line


@dataclass(frozen=True)
class Message:
    """One contiguous tensor for, or from, the rank ``peer`` (a group rank)."""

    tensor: Tensor
    peer: int


class PendingExchange:
    """An exchange under way. It keeps its tensors alive; do not touch them before ``wait``."""

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
            RankTimeoutError: A peer did not take part in time (gloo).
            RankLostError: The connection to a peer broke.
        """
        for work, peers in self._works:
            try:
                work.wait()
            except RuntimeError as error:
                raise _transport_error(error, peers, self._communicator.timeout_s) from error
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
    operations: list[dist.P2POp] = []
    peers: list[int] = []
    for messages, operation in ((sends, dist.isend), (recvs, dist.irecv)):
        for message in messages:
            if message.tensor.numel() == 0:
                continue
            global_peer = communicator.ranks[message.peer]
            operations.append(dist.P2POp(operation, message.tensor, global_peer, communicator.process_group))
            peers.append(global_peer)
            if operation is dist.isend:
                communicator.counter.count(message.tensor)
    if not operations:
        return PendingExchange((), (), communicator)
    try:
        works = dist.batch_isend_irecv(operations)
    except RuntimeError as error:
        raise _transport_error(error, tuple(dict.fromkeys(peers)), communicator.timeout_s) from error
    # NCCL returns one work for the whole batch, gloo one for each operation.
    one_each = len(works) == len(operations)
    everyone = tuple(dict.fromkeys(peers))
    owners = [(peer,) if one_each else everyone for peer in peers[: len(works)]]
    tensors = [message.tensor for message in (*sends, *recvs)]
    return PendingExchange(list(zip(works, owners, strict=True)), tensors, communicator)


def _transport_error(error: RuntimeError, peers: tuple[int, ...], timeout_s: float) -> RankTimeoutError | RankLostError:
    text = first_line(error)
    if "timed out" in text.lower() or "timeout" in text.lower():
        return RankTimeoutError(operation="exchange", missing_ranks=peers, timeout_s=timeout_s)
    return RankLostError(operation="exchange", lost_ranks=peers, reason=text)
