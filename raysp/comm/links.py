"""How fast the links of a group are: a few exchanges that all its ranks time together.

Every number is the slowest rank's, agreed on around the ring, so that what is decided from it is the same on all ranks.
Nothing of this is counted as sent.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raysp.comm.communicator import ByteCounter, Communicator
from raysp.comm.exchange import Message, exchange
from raysp.errors import InputError

_MIB = 1024**2
_SMALL_BYTES = 8
_SMALL_REPEATS = 10
_SMALL_BUDGET_S = 0.03
# A size whose time says how much of the budget a larger one would take.
_PROBE_BYTES = 64 * 1024
_LARGE_BYTES = {"cuda": 16 * _MIB, "cpu": 2 * _MIB}
_LARGE_BUDGET_S = 0.1
_MAX_ROUNDS = 5


@dataclass(frozen=True)
class LinkMeasurement:
    """What an exchange costs in which every rank sends to one peer and receives from one at once.

    Attributes:
        bandwidth_bytes_per_s: Per rank and direction.
        latency_s: Of a message of a few bytes.
        host_s: What it takes to post an exchange to a device and order a stream after it; 0 where the host itself waits.
    """

    bandwidth_bytes_per_s: float
    latency_s: float
    host_s: float = 0.0

    def exchange_time_s(self, num_bytes: float) -> float:
        """Predict the time of an exchange that carries ``num_bytes`` each way."""
        return self.latency_s + num_bytes / self.bandwidth_bytes_per_s


@dataclass(frozen=True)
class PairMeasurement:
    """The link between two ranks (global ranks)."""

    ranks: tuple[int, int]
    link: LinkMeasurement


def measure_link(
    communicator: Communicator,
    *,
    device: torch.device | str,
    num_bytes: int | None = None,
    budget_s: float = _LARGE_BUDGET_S,
) -> LinkMeasurement:
    """Time ring exchanges in which every rank sends to the next and receives from the previous at once.

    All ranks of the group call this together; later calls return the first one's result.

    Args:
        communicator: The group, at least two ranks.
        device: Where the tensors lie: ``cuda`` measures NCCL, ``cpu`` gloo.
        num_bytes: Size of the large messages; by default 16 MiB on CUDA and 2 MiB on CPU. A slow link gets smaller ones.
        budget_s: About what the large messages may take.

    Returns:
        The same numbers, bit for bit, on every rank of the group.

    Raises:
        InputError: The group has one rank.
        RankTimeoutError: A rank did not take part in time.
        RankLostError: The connection to a rank broke.
    """
    key = (communicator.ranks, "link", torch.device(device).type)
    if key not in communicator.measurements:
        communicator.measurements[key] = _Ring(communicator, device).measure(num_bytes, budget_s)
    found: LinkMeasurement = communicator.measurements[key]
    return found


def agree_on_slowest(
    values: Sequence[float], communicator: Communicator, *, device: torch.device | str
) -> tuple[float, ...]:
    """The largest of every rank's values, place by place: the same on all ranks, which call this together.

    Args:
        values: As many on every rank; such as times.
        communicator: The group, at least two ranks.
        device: As in ``measure_link``.
    """
    return tuple(_Ring(communicator, device).largest(values))


def measure_pairs(
    communicator: Communicator,
    *,
    device: torch.device | str,
    pairs: Sequence[tuple[int, int]] | None = None,
    nodes: Sequence[str] | None = None,
    num_bytes: int | None = None,
    budget_s: float = _LARGE_BUDGET_S,
) -> tuple[PairMeasurement, ...]:
    """Time the links of single pairs of ranks, several at a time where they do not share anything.

    All ranks of the group call this together with the same arguments.

    Args:
        communicator: The group, at least two ranks.
        device: As in ``measure_link``.
        pairs: Group ranks; by default every rank and the next one.
        nodes: Node of each group rank. Of the pairs measured at a time, a node's network then carries one.
        num_bytes: As in ``measure_link``.
        budget_s: For each round of pairs.

    Returns:
        One measurement per pair, the same on every rank.

    Raises:
        InputError: The group has one rank.
        RankTimeoutError: A rank did not take part in time.
        RankLostError: The connection to a rank broke.
    """
    ring = _Ring(communicator, device)
    chosen = ring_pairs(communicator.degree) if pairs is None else tuple(pairs)
    values = [0.0] * (3 * len(chosen))
    for indices in rounds_of_pairs(chosen, nodes):
        for index in indices:
            if communicator.group_rank in chosen[index]:
                link = _Ring(communicator.subset(chosen[index]), device).measure(num_bytes, budget_s)
                values[3 * index : 3 * index + 3] = link.bandwidth_bytes_per_s, link.latency_s, link.host_s
        # Nobody begins the next round while this one goes on.
        ring.largest([0.0])
    agreed = ring.largest(values)
    return tuple(
        PairMeasurement(
            (communicator.ranks[first], communicator.ranks[second]),
            LinkMeasurement(*agreed[3 * index : 3 * index + 3]),
        )
        for index, (first, second) in enumerate(chosen)
    )


def ring_pairs(degree: int) -> tuple[tuple[int, int], ...]:
    """Every rank and the next one around the ring, each pair once."""
    pairs = [(min(rank, (rank + 1) % degree), max(rank, (rank + 1) % degree)) for rank in range(degree)]
    return tuple(dict.fromkeys(pair for pair in pairs if pair[0] != pair[1]))


def rounds_of_pairs(pairs: Sequence[tuple[int, int]], nodes: Sequence[str] | None = None) -> list[list[int]]:
    """Spread pairs over rounds so that those of one round share no rank, and no node's network.

    Args:
        pairs: Group ranks.
        nodes: Node of each group rank; by default all share one.

    Returns:
        Per round, the indices of its pairs.
    """
    rounds: list[list[int]] = []
    busy: list[set[int | str]] = []
    for index, (first, second) in enumerate(pairs):
        needed: set[int | str] = {first, second}
        if nodes is not None and nodes[first] != nodes[second]:
            needed |= {nodes[first], nodes[second]}
        place = next((number for number, used in enumerate(busy) if not used & needed), len(rounds))
        if place == len(rounds):
            rounds.append([])
            busy.append(set())
        rounds[place].append(index)
        busy[place] |= needed
    return rounds


class _Ring:
    """Timed exchanges around the ranks of a group."""

    def __init__(self, communicator: Communicator, device: torch.device | str) -> None:
        if communicator.degree < 2:
            raise InputError(
                "a group of one rank has no link to measure; expected at least two ranks. Do not measure it."
            )
        # A counter of its own: what is measured here is no payload of the group.
        self._group = replace(communicator, counter=ByteCounter())
        self._device = torch.device(device)
        self._next = (communicator.group_rank + 1) % communicator.degree
        self._previous = (communicator.group_rank - 1) % communicator.degree

    def measure(self, num_bytes: int | None, budget_s: float) -> LinkMeasurement:
        """See ``measure_link``; without its memory."""
        # The first exchange makes connections.
        self._slowest_s(_SMALL_BYTES, repeats=2)
        latency_s = self._least_s(_SMALL_BYTES, _SMALL_BUDGET_S, repeats=_SMALL_REPEATS)
        self._slowest_s(_PROBE_BYTES, repeats=1)
        s_per_byte = self._slowest_s(_PROBE_BYTES, repeats=1) / _PROBE_BYTES
        wanted = _LARGE_BYTES.get(self._device.type, _LARGE_BYTES["cpu"]) if num_bytes is None else num_bytes
        # Half of the budget for one round leaves the other for what warms up.
        size = max(_PROBE_BYTES, min(wanted, int(budget_s / 2 / s_per_byte)))
        large_s = self._least_s(size, budget_s, repeats=1)
        # On a noisy machine a small message may take longer than it ought to.
        return LinkMeasurement(size / max(large_s - latency_s, large_s / 2), latency_s, self._host_s())

    def _host_s(self) -> float:
        """Of several exchanges with one message each way, the least time until the host goes on; the slowest rank's."""
        if self._device.type != "cuda":
            return 0.0
        sent = torch.zeros(_SMALL_BYTES, dtype=torch.uint8, device=self._device)
        received = torch.zeros_like(sent)
        times_s = []
        for _ in range(_SMALL_REPEATS):
            self._synchronize()
            start_s = time.perf_counter()
            self._hop(sent, received)
            times_s.append(time.perf_counter() - start_s)
        self._synchronize()
        return self.largest([min(times_s)])[0]

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest of every rank's values, place by place; the same on all ranks, once all have come."""
        carried = torch.tensor(values, dtype=torch.float64, device=self._device)
        largest = carried
        for _ in range(self._group.degree - 1):
            received = torch.empty_like(carried)
            self._hop(carried, received)
            largest = torch.maximum(largest, received)
            carried = received
        found: list[float] = largest.tolist()
        return found

    def _least_s(self, num_bytes: int, budget_s: float, *, repeats: int) -> float:
        """Of several rounds, the least time of the slowest rank: other work on the machine only adds time."""
        least_s = self._slowest_s(num_bytes, repeats=repeats)
        # Agreed on, as least_s is.
        num_more = min(_MAX_ROUNDS - 1, int(budget_s / (repeats * least_s)) - 1)
        for _ in range(num_more):
            least_s = min(least_s, self._slowest_s(num_bytes, repeats=repeats))
        return least_s

    def _slowest_s(self, num_bytes: int, *, repeats: int) -> float:
        """Mean time of one ring exchange on the rank where it was longest.

        The agreement at its end lets all ranks begin what comes next together.
        """
        sent = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
        received = torch.zeros_like(sent)
        self._synchronize()
        start_s = time.perf_counter()
        for _ in range(repeats):
            self._hop(sent, received)
        self._synchronize()
        return self.largest([(time.perf_counter() - start_s) / repeats])[0]

    def _hop(self, sent: Tensor, received: Tensor) -> None:
        exchange([Message(sent, self._next)], [Message(received, self._previous)], self._group).wait()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
