"""Planning a batch again as a plan was made, under changed conditions, and what the best of several plans takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from planner.cluster import Cluster
from planner.cost_model import CostModel
from planner.plan import LOCAL_ATTENTION, StepPlan
from planner.planning import plan_step
from planner.recosting import recosted_step_time_s


@dataclass(frozen=True)
class Replanning:
    """How to plan again; a plan does not say how it was asked for, so `like` reads that from its groups.

    Attributes:
        degrees: As in `planner.plan_step`, as the further ones.
        sync: As there.
        attention: As there.
        time_limit_s: Seconds of search of each plan.
        node_limit: In place of the time limit; the same plans on every machine.
    """

    degrees: str
    sync: str
    attention: str | None
    time_limit_s: float
    node_limit: int | None

    @classmethod
    def like(
        cls, plan: StepPlan, cost_model: CostModel, *, time_limit_s: float = 1.0, node_limit: int | None = None
    ) -> Replanning:
        """Return how to plan again with the degrees, the sync and the method of a plan."""
        groups = [group for micro_batch in plan.micro_batches for group in micro_batch.groups]
        powers_only = all(group.degree & (group.degree - 1) == 0 for group in groups)
        used = {group.attention for group in groups} - {LOCAL_ATTENTION}
        # With several measured methods one of them alone may have been the choice of the search.
        asked_for = len(used) == 1 and (len(cost_model.attentions) == 1 or not used <= set(cost_model.attentions))
        return cls(
            degrees="powers-of-two" if powers_only else "any",
            sync=plan.sync,
            attention=min(used) if asked_for else None,
            time_limit_s=time_limit_s,
            node_limit=node_limit,
        )

    def method(self, cost_model: CostModel) -> str:
        """Return the method of groups that have none yet."""
        return self.attention or cost_model.attention

    def having(self, *, degrees: str | None = None, sync: str | None = None) -> Replanning:
        """Return this with other degrees or another sync."""
        return replace(self, degrees=degrees or self.degrees, sync=sync or self.sync)

    def plan(
        self,
        lengths: Sequence[int],
        num_ranks: int,
        cost_model: CostModel,
        cluster: Cluster | None,
        *,
        policy: str = "adaptive",
    ) -> StepPlan:
        """Plan; see `planner.plan_step` for arguments and errors. `cluster` none: equal nodes as the model has them."""
        nodes: dict[str, Any] = {} if cluster is None else {"cluster": cluster}
        return plan_step(
            lengths,
            num_ranks,
            cost_model,
            policy=policy,
            sync=self.sync,
            degrees=self.degrees,
            attention=self.attention,
            time_limit_s=self.time_limit_s,
            node_limit=self.node_limit,
            **nodes,
        )


def best_step_time_s(
    plans: Iterable[StepPlan], lengths: Sequence[int], cost_model: CostModel, cluster: Cluster, sync: str
) -> float | None:
    """Return the least step time of plans costed again, in seconds; `None` where none of them fits the cluster."""
    times = (
        recosted_step_time_s(plan, lengths, cost_model, cluster, sync)
        for plan in plans
        if plan.num_ranks <= cluster.num_ranks
    )
    return min((time_s for time_s in times if time_s is not None), default=None)
