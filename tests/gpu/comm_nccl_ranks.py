"""What single ranks do in the NCCL transport tests; apart from them, so that spawned ranks can import it by name."""

from __future__ import annotations

import contextlib
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from rank_pair import NUM_RANKS

from raysp.comm import (
    Communicator,
    Communicators,
    LinkMeasurement,
    Message,
    PairMeasurement,
    exchange,
    measure_link,
    measure_pairs,
)


@dataclass(frozen=True)
class Answer:
    """What one rank found.

    Attributes:
        one_way: What arrived where only rank 0 had something to send.
        in_order: Whether every exchange on a busy side stream carried what was computed just before it, and its
            results were there for what came after its wait.
        link: The measured link.
        first_s: Time of that measurement, connections included.
        again_s: Time of a second one.
        pairs: The measured pairs.
        counted_bytes: What the measurements counted as sent.
    """

    one_way: list[float]
    in_order: bool
    link: LinkMeasurement
    first_s: float
    again_s: float
    pairs: tuple[PairMeasurement, ...]
    counted_bytes: int


def one_way(communicator: Communicator, device: torch.device) -> list[float]:
    """Exchanges in which one rank, or none, has something to carry; what this rank received."""
    me, received = communicator.group_rank, torch.zeros(2, device=device)
    empty = torch.empty(0, device=device)
    exchange([Message(empty, 1 - me)], [Message(empty, 1 - me)], communicator).wait()
    for _ in range(3):
        if me == 0:
            exchange([Message(torch.full((2,), 5.0, device=device), 1)], [Message(empty, 1)], communicator).wait()
        else:
            exchange([Message(empty, 0)], [Message(received, 0)], communicator).wait()
    return received.tolist()


def in_order(communicator: Communicator, device: torch.device) -> bool:
    """Whether exchanges follow the stream that posts them and precede what the waiting one queues afterwards."""
    me, size = communicator.group_rank, 2048
    on_stream: AbstractContextManager[object] = (
        torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else contextlib.nullcontext()
    )
    with on_stream:
        work = torch.eye(size, device=device)
        found = []
        for round_ in range(20 if device.type == "cuda" else 2):
            # Long enough that an exchange that did not wait for it would carry the zeros.
            sent = torch.zeros(size, size, device=device)
            slow = work
            for _ in range(20 if device.type == "cuda" else 1):
                slow = slow @ work
            sent.add_(slow, alpha=float(round_ + me + 1))
            received = torch.full_like(sent, float("nan"))
            exchange([Message(sent, 1 - me)], [Message(received, 1 - me)], communicator).wait()
            # After the wait the sent tensor may be overwritten, and the received one read, without the host waiting.
            sent.fill_(-1.0)
            found.append((received.diagonal() == float(round_ + 2 - me)).all())
        return all(bool(each) for each in found)


def run_all(comms: Communicators) -> Answer:
    """Everything, once."""
    device = comms.device
    communicator = comms.communicator(range(NUM_RANKS))
    assert communicator is not None
    comms.barrier()
    start_s = time.monotonic()
    link = measure_link(communicator, device=device)
    first_s = time.monotonic() - start_s
    communicator.measurements.clear()
    comms.barrier()
    start_s = time.monotonic()
    measure_link(communicator, device=device)
    again_s = time.monotonic() - start_s
    pairs = measure_pairs(communicator, device=device)
    counted_bytes = communicator.counter.sent_bytes
    arrived = one_way(communicator, device)
    ordered = in_order(communicator, device)
    return Answer(arrived, ordered, link, first_s, again_s, pairs, counted_bytes)
