"""Requests for plans as values, and a cache of plans: batches with the same lengths in any order share one plan.

A plan depends on the multiset of lengths only: requests are planned in canonical order (longest first) and the plan is
renumbered to the batch's own sequence ids afterwards. Nothing here keeps time or starts processes.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from planner.cluster import Cluster
from planner.cost_model import CostModel
from planner.errors import PlanError, PlannerError
from planner.plan import GroupPlan, StepPlan
from planner.planning import plan_step
from planner.problem import checked_lengths


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """Everything that `plan_step` needs for one batch; hashable, and small to send to another process.

    Attributes:
        lengths: Tokens of every sequence of the global batch; the index is the sequence id.
        num_ranks: Ranks of the job.
        cost_model: Predicts time and memory.
        policy: See `plan_step`.
        sync: See `plan_step`.
        degrees: See `plan_step`.
        time_limit_s: Seconds after which searching stops.
        node_limit: When given, equal requests give equal plans on every machine and no clock counts.
        seed: Seed of the solver.
        attention: Parallel attention method in place of the cost model's.
        cluster: The nodes of the ranks; `None`: all alike, and the cost model says all.

    Raises:
        PlanError: There are no lengths, or one is not a positive integer.
    """

    lengths: tuple[int, ...]
    num_ranks: int
    cost_model: CostModel
    policy: str = "adaptive"
    sync: str = "per-layer"
    degrees: str = "powers-of-two"
    time_limit_s: float = 2.0
    node_limit: int | None = None
    seed: int = 0
    attention: str | None = None
    cluster: Cluster | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", checked_lengths(self.lengths))

    @cached_property
    def canonical_ids(self) -> tuple[int, ...]:
        """Sequence ids, longest first; equal lengths in the order of their ids."""
        return tuple(sorted(range(len(self.lengths)), key=lambda i: (-self.lengths[i], i)))

    @cached_property
    def key(self) -> Hashable:
        """What determines the plan up to the numbering of the sequences."""
        return (
            tuple(self.lengths[i] for i in self.canonical_ids),
            self.num_ranks,
            self.cost_model.sha256,
            self.policy,
            self.sync,
            self.degrees,
            self.time_limit_s if self.node_limit is None else None,
            self.node_limit,
            self.seed,
            self.cost_model.attention if self.attention is None else self.attention,
            self.cluster,
        )

    def canonical(self) -> PlanRequest:
        """Return this request with the longest sequence first."""
        return dataclasses.replace(self, lengths=tuple(self.lengths[i] for i in self.canonical_ids))


class PlanCache:
    """The plans that were used last, by what determines them.

    Args:
        max_plans: Plans kept; the one not used for longest goes first. 0 keeps none.
    """

    def __init__(self, max_plans: int = 256) -> None:
        if max_plans < 0:
            raise PlanError(f"max_plans is {max_plans}; expected at least 0.")
        self._max_plans = max_plans
        self._plans: OrderedDict[Hashable, StepPlan] = OrderedDict()

    def __len__(self) -> int:
        return len(self._plans)

    def get(self, request: PlanRequest) -> StepPlan | None:
        """Return the plan of an equal request, or of one with the same lengths in another order, in this one's ids."""
        plan = self._plans.get(request.key)
        if plan is None:
            return None
        self._plans.move_to_end(request.key)
        return renumbered(plan, request.canonical_ids)

    def put(self, request: PlanRequest, plan: StepPlan) -> None:
        """Keep the plan of a request, numbered as the request's lengths are."""
        ids = request.canonical_ids
        places = sorted(range(len(ids)), key=ids.__getitem__)
        self._plans[request.key] = renumbered(plan, places)
        self._plans.move_to_end(request.key)
        while len(self._plans) > self._max_plans:
            self._plans.popitem(last=False)


def renumbered(plan: StepPlan, ids: Sequence[int]) -> StepPlan:
    """Return the plan with sequence `i` called `ids[i]`, and the plan id that goes with it."""
    if all(i == new for i, new in enumerate(ids)):
        return plan

    def renumbered_group(group: GroupPlan) -> GroupPlan:
        return dataclasses.replace(group, sequences=tuple(sorted(ids[i] for i in group.sequences)))

    micro_batches = tuple(
        dataclasses.replace(micro_batch, groups=tuple(renumbered_group(group) for group in micro_batch.groups))
        for micro_batch in plan.micro_batches
    )
    return dataclasses.replace(plan, micro_batches=micro_batches).with_plan_id()


def plan_request(request: PlanRequest) -> StepPlan:
    """Plan in this process, such that the same lengths in another order give the same plan.

    Raises:
        PlannerError: As `plan_step`; sequences are named by the ids of the request.
    """
    try:
        plan = plan_canonical(request.canonical())
    except PlannerError as error:
        raise own_error(request, error) from None
    return renumbered(plan, request.canonical_ids)


def plan_canonical(
    request: PlanRequest,
    *,
    on_incumbent: Callable[[StepPlan], None] | None = None,
    clock: Callable[[], float] | None = None,
) -> StepPlan:
    """Plan the lengths in the order in which they are; see `plan_step`."""
    options: dict[str, Any] = {} if request.cluster is None else {"cluster": request.cluster}
    known = inspect.signature(plan_step).parameters
    for name, value in (("on_incumbent", on_incumbent), ("clock", clock)):
        if value is not None and name in known:
            options[name] = value
    return plan_step(
        request.lengths,
        num_ranks=request.num_ranks,
        cost_model=request.cost_model,
        policy=request.policy,
        sync=request.sync,
        degrees=request.degrees,
        time_limit_s=request.time_limit_s,
        node_limit=request.node_limit,
        seed=request.seed,
        attention=request.attention,
        **options,
    )


def own_error(request: PlanRequest, error: Exception) -> Exception:
    """Return the error of planning a request in canonical order with the sequence ids of the request in its message.

    Planning refuses before it searches, so asking again costs next to nothing.
    """
    if not isinstance(error, PlannerError):
        return error
    try:
        plan_canonical(dataclasses.replace(request, time_limit_s=0.0, node_limit=None))
    except type(error) as own:
        return own
    return error
