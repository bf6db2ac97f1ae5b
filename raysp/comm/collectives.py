"""Collectives over rows whose counts differ by rank.

``row_counts[r]`` is what group rank ``r`` contributes; every rank knows all of them from the layout.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from raysp.comm.communicator import Communicator
from raysp.comm.exchange import Message, PendingExchange, exchange
from raysp.comm.workspace import Lease


def start_all_gather_rows(
    rows: Tensor, row_counts: Sequence[int], communicator: Communicator
) -> tuple[Tensor, PendingExchange]:
    """Start gathering every rank's rows.

    Args:
        rows: ``[row_counts[group_rank], ...]``, this rank's contribution.
        row_counts: Rows of every rank.
        communicator: The group.

    Returns:
        ``[sum(row_counts), ...]`` in rank order, valid after the handle's ``wait()``, and the handle.
    """
    gathered = rows.new_empty((sum(row_counts), *rows.shape[1:]))
    parts = gathered.split(list(row_counts))
    me = communicator.group_rank
    parts[me].copy_(rows)
    others = other_ranks(communicator)
    sends = [Message(parts[me], peer) for peer in others]
    recvs = [Message(parts[peer], peer) for peer in others]
    return gathered, exchange(sends, recvs, communicator)


def all_to_all_rows(
    tensors: Sequence[Tensor],
    send_counts: Sequence[Sequence[int]],
    recv_counts: Sequence[Sequence[int]],
    communicator: Communicator,
    lease: Lease | None = None,
) -> list[Tensor]:
    """Send slice ``i`` of each tensor's rows to rank ``i`` and join what the ranks sent, in rank order; in one exchange.

    Args:
        tensors: Each ``[sum of its send_counts, ...]``.
        send_counts: For each tensor the rows for each rank.
        recv_counts: For each tensor the rows from each rank.
        communicator: The group.
        lease: Where the results come from, which are then gone with it; new memory by default.

    Returns:
        For each tensor ``[sum of its recv_counts, ...]``.
    """
    me, others = communicator.group_rank, other_ranks(communicator)
    sends: list[Message] = []
    recvs: list[Message] = []
    received: list[Tensor] = []
    for index, (rows, leaving_counts, coming_counts) in enumerate(zip(tensors, send_counts, recv_counts, strict=True)):
        rows, shape = rows.contiguous(), (sum(coming_counts), *rows.shape[1:])
        received.append(rows.new_empty(shape) if lease is None else lease.empty(("coming", index), shape, rows.dtype))
        leaving, coming = rows.split(list(leaving_counts)), received[-1].split(list(coming_counts))
        coming[me].copy_(leaving[me])
        sends += [Message(leaving[peer], peer) for peer in others]
        recvs += [Message(coming[peer], peer) for peer in others]
    # Both backends build their all-to-all from such messages; an exchange can say which peer failed.
    exchange(sends, recvs, communicator).wait()
    return received


def other_ranks(communicator: Communicator) -> list[int]:
    """Peers in an order that spreads the load: the next rank first, all ranks starting at a different one."""
    return [(communicator.group_rank + step) % communicator.degree for step in range(1, communicator.degree)]
