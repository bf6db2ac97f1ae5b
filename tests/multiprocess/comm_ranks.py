"""What single ranks do in the transport tests."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from raysp.comm import (
    Communicator,
    Communicators,
    LinkMeasurement,
    Message,
    PairMeasurement,
    RankLostError,
    RankTimeoutError,
    all_to_all_rows,
    exchange,
    init_process,
    measure_link,
    measure_pairs,
    start_all_gather_rows,
)
from raysp.errors import RayspError


def short_lived(comms: Communicators, name: str, timeout_s: float, max_groups: int = 128) -> Communicators:
    """Communicators of the same world with another time-out, on keys of their own."""
    store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())
    return Communicators(
        epoch=0,
        global_rank=comms.global_rank,
        world_size=comms.world_size,
        device=torch.device("cpu"),
        timeout_s=timeout_s,
        max_groups=max_groups,
        store=store,
    )


def groups_in_uneven_orders(comms: Communicators) -> float:
    """Ranks 0 and 1 make more groups than 2 and 3 before all meet in one; return a sum over the last."""
    rank = comms.global_rank
    if rank < 3:
        comms.group((0, 1, 2))
    if rank < 2:
        comms.group((0, 1))
    if rank in (1, 3):
        comms.group((1, 3))
    if rank > 0:
        comms.group((1, 2, 3))
    if rank in (0, 3):
        comms.group((0, 3))
    total = torch.tensor([float(rank)])
    if rank in (0, 3):
        dist.all_reduce(total, group=comms.group((0, 3)))
    return float(total)


def group_identity(comms: Communicators) -> tuple[bool, bool, bool]:
    """Whether a group is kept, a group of one is none, and the full group is the world."""
    everyone = tuple(range(comms.world_size))
    return (
        comms.group(everyone) is comms.group(everyone),
        comms.group((comms.global_rank,)) is None,
        comms.group(everyone) is comms.world,
    )


def errors_of_bad_groups(comms: Communicators) -> list[str]:
    """Messages for groups that cannot be."""
    other = (comms.global_rank + 1) % comms.world_size
    limited = short_lived(comms, "limited", 5.0, max_groups=0)
    messages = []
    for source, group in ((comms, (1, 0)), (comms, (0, 9)), (comms, (other,)), (limited, range(comms.world_size))):
        try:
            source.communicator(group)
        except RayspError as error:
            messages.append(str(error))
    return messages


def exchanged(comms: Communicators, dtype: torch.dtype) -> tuple[list[float], int]:
    """Two messages to the next rank, an empty one between them, and one back; what arrived and the bytes sent."""
    communicator = comms.communicator(range(comms.world_size))
    communicator.counter.reset()
    rank, degree = communicator.group_rank, communicator.degree
    following, previous = (rank + 1) % degree, (rank - 1) % degree
    sends = [
        Message(torch.full((3,), float(rank), dtype=dtype), following),
        Message(torch.empty(0, dtype=dtype), following),
        Message(torch.full((2,), rank + 10.0, dtype=dtype), following),
        Message(torch.full((1,), rank + 20.0, dtype=dtype), previous),
    ]
    buffers = [torch.full((size,), float("nan"), dtype=dtype) for size in (3, 0, 2, 1)]
    recvs = [Message(buffer, peer) for buffer, peer in zip(buffers, (previous,) * 3 + (following,), strict=True)]
    exchange(sends, recvs, communicator).wait()
    return torch.cat(buffers).tolist(), communicator.counter.sent_bytes


def uneven_collectives(comms: Communicators) -> tuple[list[float], list[float]]:
    """Gather and trade rows whose counts are 0, 1, 2, ..."""
    communicator = comms.communicator(range(comms.world_size))
    rank, degree = communicator.group_rank, communicator.degree
    counts = list(range(degree))
    gathered, pending = start_all_gather_rows(torch.full((rank, 2), float(rank)), counts, communicator)
    pending.wait()
    traded = all_to_all_rows([torch.full((sum(counts),), float(rank))], [counts], [[rank] * degree], communicator)[0]
    return gathered[:, 0].tolist(), traded.tolist()


def barrier_without_rank_2(comms: Communicators) -> tuple[int, ...]:
    """The ranks that a barrier misses."""
    if comms.global_rank == 2:
        return ()
    try:
        short_lived(comms, "barrier", 1.0).barrier()
    except RankTimeoutError as error:
        return error.missing_ranks
    return ()


def exchange_without_peer(comms: Communicators) -> tuple[int, ...]:
    """Rank 0 waits for a message that rank 1 never sends; the ranks that its error names."""
    if comms.global_rank > 1:
        return ()
    mine = short_lived(comms, "silent", 1.5)
    communicator = mine.communicator((0, 1))
    if communicator.group_rank == 1:
        mine.barrier((0, 1), timeout_s=20.0)
        return ()
    try:
        exchange([], [Message(torch.empty(4), 1)], communicator).wait()
    except (RankTimeoutError, RankLostError) as error:
        return error.missing_ranks if isinstance(error, RankTimeoutError) else error.lost_ranks
    finally:
        mine.barrier((0, 1), timeout_s=20.0)
    return ()


def exchange_with_dying_peer(comms: Communicators) -> tuple[int, ...]:
    """Rank 1 ends while rank 0 waits for its message; the ranks that the error names."""
    communicator = comms.communicator((0, 1))
    if communicator.group_rank == 1:
        os._exit(1)
    try:
        exchange([], [Message(torch.empty(4), 1)], communicator).wait()
    except RankLostError as error:
        return error.lost_ranks
    return ()


def exchanged_within_halves(comms: Communicators) -> tuple[list[float], list[float], int]:
    """Ranks (0, 2) and (3, 1) trade rows and messages at once; what arrived, and the bytes that the whole group counts."""
    communicator = comms.communicator(range(comms.world_size))
    communicator.counter.reset()
    rank = communicator.group_rank
    half = communicator.subset((0, 2) if rank in (0, 2) else (3, 1))
    other = 1 - half.group_rank
    traded = all_to_all_rows([torch.full((2,), float(rank))], [[1, 1]], [[1, 1]], half)[0]
    received = torch.empty(2)
    exchange([Message(torch.full((2,), rank + 10.0), other)], [Message(received, other)], half).wait()
    return traded.tolist(), received.tolist(), communicator.counter.sent_bytes


def errors_of_bad_subsets(comms: Communicators) -> list[str]:
    """Messages for subsets that cannot be."""
    communicator = comms.communicator(range(comms.world_size))
    rank, messages = communicator.group_rank, []
    for subset in ((rank, rank), (rank, 9), ((rank + 1) % 4,)):
        try:
            communicator.subset(subset)
        except RayspError as error:
            messages.append(str(error))
    return messages


def ring_whose_rank_dies(comms: Communicators, dying_rank: int, with_store: bool) -> tuple[tuple[int, ...], str, float]:
    """Every rank passes messages to the next until one of them dies in mid-exchange.

    Returns:
        The ranks that the error names, its text, and the time from the death.
    """
    communicator = comms.communicator(range(comms.world_size))
    rank = communicator.group_rank
    if not with_store:
        communicator = replace(communicator, store=None)
    start_s = time.monotonic()
    for hop in range(100):
        if hop == 3 and rank == dying_rank:
            os._exit(1)
        try:
            pass_on(communicator)
        except RankLostError as error:
            return error.lost_ranks, str(error), time.monotonic() - start_s
    raise AssertionError("no hop failed")


def pass_on(communicator: Communicator) -> None:
    """Send a little to the next rank and receive it from the previous one."""
    rank, degree = communicator.group_rank, communicator.degree
    sends = [Message(torch.ones(4), (rank + 1) % degree)]
    exchange(sends, [Message(torch.empty(4), (rank - 1) % degree)], communicator).wait()


def chain_whose_rank_is_silent(comms: Communicators) -> tuple[int, ...]:
    """Rank 3 waits for 2, which waits for 1, which does nothing; the ranks that the error names."""
    if comms.global_rank == 0:
        return ()
    mine = short_lived(comms, "chain", 1.5)
    communicator = mine.communicator((1, 2, 3))
    try:
        if communicator.group_rank > 0:
            exchange([], [Message(torch.empty(4), communicator.group_rank - 1)], communicator).wait()
    except (RankTimeoutError, RankLostError) as error:
        return error.missing_ranks if isinstance(error, RankTimeoutError) else error.lost_ranks
    finally:
        mine.barrier((1, 2, 3), timeout_s=20.0)
    return ()


def measured_link(comms: Communicators) -> tuple[LinkMeasurement, bool, int, float]:
    """The link of all ranks, whether a second call repeats it, the bytes counted, and the time taken."""
    communicator = comms.communicator(range(comms.world_size))
    communicator.counter.reset()
    comms.barrier()
    start_s = time.monotonic()
    link = measure_link(communicator, device="cpu")
    took_s = time.monotonic() - start_s
    return link, measure_link(communicator, device="cpu") is link, communicator.counter.sent_bytes, took_s


def measured_halves(comms: Communicators) -> LinkMeasurement:
    """The link of ranks (0, 1) or (2, 3), both measured at once, through views of the same group."""
    communicator = comms.communicator(range(comms.world_size))
    return measure_link(communicator.subset((0, 1) if communicator.group_rank < 2 else (2, 3)), device="cpu")


def measured_pairs(comms: Communicators, nodes: tuple[str, ...] | None) -> tuple[PairMeasurement, ...]:
    """The links of neighbours."""
    return measure_pairs(comms.communicator(range(comms.world_size)), device="cpu", nodes=nodes)


def next_epoch(comms: Communicators, port: int, ending: str) -> tuple[float, float]:
    """Leave the epoch (twice, which is harmless) and form the next on the same store; sums over it and a group."""
    rank, size = comms.global_rank, comms.world_size
    for _ in range(2):
        getattr(comms, ending)()
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))
    again = init_process(store, global_rank=rank, world_size=size, timeout_s=20.0, epoch=1)
    sums = []
    for group in (again.world, again.group(range(size))):
        total = torch.tensor([float(rank + 1)])
        dist.all_reduce(total, group=group)
        sums.append(float(total))
    return sums[0], sums[1]
