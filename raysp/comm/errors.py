"""Errors of the transport: a rank that did not arrive, a rank that went away.

Both cross process borders (Ray ships them), so each defines ``__reduce__``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from raysp.errors import RayspError


class RankTimeoutError(RayspError):
    """Some ranks did not take part in an operation in time; ``missing_ranks`` names them (global ranks)."""

    def __init__(self, *, operation: str, missing_ranks: Iterable[int], timeout_s: float) -> None:
        self.operation = operation
        self.missing_ranks = tuple(missing_ranks)
        self.timeout_s = timeout_s
        names = ", ".join(str(rank) for rank in self.missing_ranks)
        super().__init__(
            f"{operation}: rank(s) {names} did not arrive within {timeout_s:g} s; expected every rank of the group. "
            "Look at the log of those ranks, or raise the time-out if their step is legitimately longer."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_timeout, (self.operation, self.missing_ranks, self.timeout_s)


class RankLostError(RayspError):
    """The connection to a rank broke in mid-operation; ``lost_ranks`` names it (global ranks)."""

    def __init__(self, *, operation: str, lost_ranks: Iterable[int], reason: str) -> None:
        self.operation = operation
        self.lost_ranks = tuple(lost_ranks)
        self.reason = reason
        names = ", ".join(str(rank) for rank in self.lost_ranks)
        super().__init__(
            f"{operation}: the connection to rank(s) {names} failed ({reason}); expected a living peer. "
            "Form the communicators of a new epoch without it."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_lost, (self.operation, self.lost_ranks, self.reason)


def _rebuild_timeout(operation: str, missing_ranks: tuple[int, ...], timeout_s: float) -> RankTimeoutError:
    return RankTimeoutError(operation=operation, missing_ranks=missing_ranks, timeout_s=timeout_s)


def _rebuild_lost(operation: str, lost_ranks: tuple[int, ...], reason: str) -> RankLostError:
    return RankLostError(operation=operation, lost_ranks=lost_ranks, reason=reason)
