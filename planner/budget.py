"""How long planning may take: by the clock, or by a node limit that makes the result reproducible."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from planner.errors import PlanError


@dataclass(frozen=True)
class Budget:
    """Limits of one planning run.

    With a `node_limit` the clock is never asked: the same inputs and seed give the same plan on any machine, however
    long it takes.

    Attributes:
        deadline_s: Reading of `clock` at which searching stops; infinite with a node limit.
        node_limit: Branch-and-bound nodes of each integer program, or `None`.
        seed: Seed of the solver.
        clock: Monotonic seconds.
        cancelled: Set where nobody waits for the answer any more; every thread of the search then ends.
    """

    deadline_s: float
    node_limit: int | None
    seed: int
    clock: Callable[[], float] = time.monotonic
    cancelled: threading.Event = field(default_factory=threading.Event, compare=False)

    @classmethod
    def start(
        cls, time_limit_s: float, node_limit: int | None, seed: int, clock: Callable[[], float] = time.monotonic
    ) -> Budget:
        """Check the limits and start the clock.

        Raises:
            PlanError: A limit or the seed is not a number of the right kind.
        """
        if (
            isinstance(time_limit_s, bool)
            or not isinstance(time_limit_s, (int, float))
            or not 0 <= time_limit_s < math.inf
        ):
            raise PlanError(f"time_limit_s is {time_limit_s!r}; expected a number of seconds of at least 0.")
        if node_limit is not None and (
            isinstance(node_limit, bool) or not isinstance(node_limit, int) or node_limit < 1
        ):
            raise PlanError(f"node_limit is {node_limit!r}; expected an integer of at least 1, or None.")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise PlanError(f"seed is {seed!r}; expected an integer from 0 to 2^31 - 1.")
        deadline_s = math.inf if node_limit is not None else clock() + time_limit_s
        return cls(deadline_s, node_limit, seed, clock)

    def expired(self) -> bool:
        """Say whether searching must stop."""
        return self.cancelled.is_set() or (self.node_limit is None and self.clock() >= self.deadline_s)

    def left_s(self) -> float | None:
        """Return the seconds left, or `None` where no clock counts."""
        return None if self.node_limit is not None else max(0.0, self.deadline_s - self.clock())
