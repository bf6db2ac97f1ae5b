"""How fast a rank computes, and how fast one rank of a group sends: the measured numbers of `planner.attention_cost`.

A *network* says how long a set of messages that start together takes; `Link` is the simplest, a topology
(`planner.attention_topology`) the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from planner.attention_work import BACKWARD_FACTOR, FORWARD_FLOPS_PER_PAIR, FloatArray
from planner.errors import PlanError
from planner.strict_json import as_number


class Network(Protocol):
    """What carries the messages of a group."""

    def transfer_s(self, messages: FloatArray) -> float:
        """Return the seconds until the last of some messages that start together has arrived.

        Args:
            messages: ``[N, N]``, bytes from the rank of the row to the rank of the column.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Link:
    """The port of each rank inside one group, as a preflight measures it.

    Attributes:
        bandwidth_bytes_per_s: What one rank can send in one direction.
        latency_s: From the start of an exchange to its first byte.
        duplex: A rank receives at full bandwidth while it sends; otherwise both share it.
    """

    bandwidth_bytes_per_s: float
    latency_s: float
    duplex: bool = True

    def __post_init__(self) -> None:
        as_number(self.bandwidth_bytes_per_s, "bandwidth_bytes_per_s", PlanError, positive=True)
        as_number(self.latency_s, "latency_s", PlanError)

    def transfer_s(self, messages: FloatArray) -> float:
        """Return the seconds until the rank with the most bytes is done; 0 without messages."""
        sent, received = messages.sum(axis=1), messages.sum(axis=0)
        most = float((np.maximum(sent, received) if self.duplex else sent + received).max())
        return self.latency_s + most / self.bandwidth_bytes_per_s if most > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class HostRate:
    """Time that the host of one rank takes to issue work to its device; all 0 where the device is the host itself.

    Attributes:
        forward_call_s: A block kernel's forward.
        backward_call_s: Its backward.
        exchange_s: Posting what a rank sends and receives at once.
        row_operation_s: Any other kernel: a merge, a sum, a copy in another order.
    """

    forward_call_s: float = 0.0
    backward_call_s: float = 0.0
    exchange_s: float = 0.0
    row_operation_s: float = 0.0

    def __post_init__(self) -> None:
        for key in ("forward_call_s", "backward_call_s", "exchange_s", "row_operation_s"):
            as_number(getattr(self, key), key, PlanError)

    def call_s(self, *, backward: bool) -> float:
        """Return the seconds of issuing one kernel call."""
        return self.backward_call_s if backward else self.forward_call_s


@dataclass(frozen=True, kw_only=True)
class KernelRate:
    """How fast one rank runs block kernels and copies, and how fast its host issues them.

    A segment of q queries and k keys runs at ``rate * q/(q+n0) * k/(k+n0)``: as if every segment were padded by n0 rows
    on both sides.

    Attributes:
        forward_flops_per_s: On long segments.
        backward_flops_per_s: On long segments.
        launch_s: Fixed part of each kernel call on the device.
        copy_bytes_per_s: Memory traffic, bytes read and bytes written together.
        efficient_rows: n0, the rows at which a side of a segment reaches half its rate.
        host: Of the rank's host.
    """

    forward_flops_per_s: float
    backward_flops_per_s: float
    launch_s: float
    copy_bytes_per_s: float
    efficient_rows: float
    host: HostRate = HostRate()

    def __post_init__(self) -> None:
        for key in ("forward_flops_per_s", "backward_flops_per_s", "copy_bytes_per_s"):
            as_number(getattr(self, key), key, PlanError, positive=True)
        for key in ("launch_s", "efficient_rows"):
            as_number(getattr(self, key), key, PlanError)

    def pair_s(self, head_size: int, *, backward: bool) -> float:
        """Return the seconds of one pair of one head on long segments."""
        flops = FORWARD_FLOPS_PER_PAIR * head_size
        if backward:
            return BACKWARD_FACTOR * flops / self.backward_flops_per_s
        return flops / self.forward_flops_per_s

    def copy_s(self, num_bytes: FloatArray | float) -> FloatArray:
        """Return the seconds of reading and writing `num_bytes` in all."""
        seconds: FloatArray = np.asarray(num_bytes, dtype=np.float64) / self.copy_bytes_per_s
        return seconds
