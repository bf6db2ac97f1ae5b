"""What would change a step: the batch planned again with more memory, faster links, other nodes, another sync.

Each question is planned under a small time limit, so a row is an upper bound: a longer search may find less time.
Where a change can only help, plans of the present conditions, costed again, count too. Constants that a change would
move in practice (clocks, latency, contention) stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from planner.changed_models import (
    neighbouring_clusters,
    with_faster_links,
    with_memory,
    with_more_heads,
    with_node_memory,
)
from planner.cluster import Cluster
from planner.cost_model import CostModel
from planner.errors import InfeasibleError
from planner.plan import StepPlan
from planner.recosting import PER_LAYER, PER_STEP, grouping_of, plan_cluster, schedule
from planner.replanning import Replanning, best_step_time_s
from planner.sync_comparison import SyncComparison, compare_syncs, other_sync
from planner.wider_group import widened_step

REPLANNED = "replanned"
_NOTHING_MORE = 1e-6


@dataclass(frozen=True)
class WhatIf:
    """One changed condition.

    Attributes:
        name: For programs.
        what: For people.
        step_time_s: Predicted step; `None` where no plan was found.
        change: That by the step of the plan, minus 1; below 0 is faster.
        note: How to read it, or why there is no plan.
    """

    name: str
    what: str
    step_time_s: float | None
    change: float | None
    note: str = ""

    def line(self) -> str:
        """Return the row as a line of text."""
        note = f" ({self.note})" if self.note else ""
        if self.step_time_s is None:
            return f"{self.what}: no plan{note}"
        change = f", {self.change_text()}" if self.change is not None else ""
        return f"{self.what}: {self.step_time_s:.4g} s{change}{note}"

    def change_text(self) -> str:
        """Return the change in per cent, ``"-"`` where there is none to tell."""
        # Adding 0.0 turns -0.0 into 0.0, so that rounding does not look like a gain.
        return "-" if self.change is None else f"{round(self.change, 3) + 0.0:+.1%}"


@dataclass(frozen=True)
class WhatIfs:
    """All rows, and which synchronisation wins; `sync` is `None` where the cost model cannot tell."""

    rows: tuple[WhatIf, ...]
    sync: SyncComparison | None

    @property
    def replanned_step_time_s(self) -> float | None:
        """Step of the batch planned again with nothing changed, in seconds."""
        return next((row.step_time_s for row in self.rows if row.name == REPLANNED), None)


@dataclass(frozen=True)
class _Question:
    """Changed conditions; `nodes` is what `plan_step` gets, `cluster` what plans are costed on."""

    name: str
    what: str
    model: CostModel
    cluster: Cluster
    nodes: Cluster | None
    replanning: Replanning
    only_helps: bool = True
    note: str = ""


def what_ifs(
    plan: StepPlan,
    lengths: Sequence[int],
    cost_model: CostModel,
    *,
    time_limit_s: float = 1.0,
    node_limit: int | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> WhatIfs:
    """Plan a batch again under changed conditions, one at a time.

    Args:
        plan: A valid plan of the batch.
        lengths: Tokens of every sequence.
        cost_model: The model it was made with.
        time_limit_s: Seconds of search of each of about a dozen plans.
        node_limit: In place of the time limit: equal inputs then give equal rows.
        on_progress: Called with each question before it is planned.

    Returns:
        Rows in a fixed order, the batch planned again with nothing changed first; those that make no sense for the
        plan, such as links between nodes where there is one node, are left out.
    """
    asker = _Asker(plan, lengths, on_progress or (lambda what: None))
    cluster = plan_cluster(plan, cost_model)
    replanning = Replanning.like(plan, cost_model, time_limit_s=time_limit_s, node_limit=node_limit)
    present = _Question(REPLANNED, "nothing, planned again", cost_model, cluster, plan.cluster, replanning)
    rows = [asker.answer(present)]
    rows += [asker.answer(question) for question in _degree_questions(present)]
    rows += _wider_row(plan, lengths, cost_model, cluster, replanning)
    rows += [asker.answer(question) for question in (*_hardware_questions(present), *_fixed_cost_questions(present))]
    if cost_model.unsharded_state_bytes is None:
        return WhatIfs(tuple(rows), None)
    other = other_sync(plan.sync)
    question = replace(
        present, name=f"sync-{other}", what=f"sync {other}", replanning=replanning.having(sync=other), only_helps=False
    )
    row = asker.answer(question)
    times = {plan.sync: rows[0].step_time_s, other: row.step_time_s}
    sync = compare_syncs(
        grouping_of(plan, cluster),
        lengths,
        cost_model,
        plan.num_ranks,
        per_layer_s=times[PER_LAYER],
        per_step_s=times[PER_STEP],
    )
    rows.append(replace(row, note=_joined(row.note, sync.reason)))
    return WhatIfs(tuple(rows), sync)


class _Asker:
    """Answers questions, and keeps the plans that hold under present conditions: they may be the best for others too."""

    def __init__(self, plan: StepPlan, lengths: Sequence[int], on_progress: Callable[[str], None]) -> None:
        self._present_s = plan.predicted_step_time_s
        self._lengths = lengths
        self._known = [plan]
        self._replanned_s = plan.predicted_step_time_s
        self._on_progress = on_progress

    def answer(self, question: _Question) -> WhatIf:
        self._on_progress(question.what)
        plans, refusal = list(self._known), ""
        try:
            found = question.replanning.plan(self._lengths, question.cluster.num_ranks, question.model, question.nodes)
        except InfeasibleError as error:
            refusal = str(error)
        else:
            plans.append(found)
            if question.name == REPLANNED:
                self._known.append(found)
        sync = question.replanning.sync
        best_s = best_step_time_s(plans, self._lengths, question.model, question.cluster, sync)
        if question.only_helps:
            best_s = self._replanned_s if best_s is None else min(best_s, self._replanned_s)
        if best_s is None:
            return WhatIf(question.name, question.what, None, None, refusal)
        note = _joined("not planned, only groups that are known" if refusal else "", question.note)
        if question.name == REPLANNED:
            self._replanned_s = best_s
        elif question.only_helps and best_s >= self._replanned_s * (1 - _NOTHING_MORE):
            note = _joined("nothing beyond planning again", note)
        return WhatIf(question.name, question.what, best_s, self._change(best_s), note)

    def _change(self, step_time_s: float) -> float | None:
        return step_time_s / self._present_s - 1 if self._present_s > 0 else None


def _degree_questions(present: _Question) -> list[_Question]:
    questions = []
    if present.replanning.degrees != "any" and present.cluster.num_ranks > 2:
        replanning = present.replanning.having(degrees="any")
        questions.append(replace(present, name="any-degree", what="degrees of any number", replanning=replanning))
    asked = present.replanning.attention
    methods = present.model.attentions if asked is None else (asked,)
    powers = [1 << power for power in range(present.cluster.num_ranks.bit_length())]
    largest = max(d for d in powers if any(present.model.allows_degree(d, attention=name) for name in methods))
    if 2 * largest <= present.cluster.num_ranks:
        questions.append(
            replace(
                present,
                name="double-degree",
                what=f"groups up to degree {2 * largest}, not {largest}",
                model=with_more_heads(present.model, 2),
                note="as if the model had twice the heads; a ring method is not limited by them",
            )
        )
    return questions


def _hardware_questions(present: _Question) -> list[_Question]:
    questions = []
    for factor, text in ((1.25, "25% more memory"), (2.0, "twice the memory")):
        questions.append(
            replace(
                present,
                name=f"memory-x{factor:g}",
                what=text,
                model=with_memory(present.model, factor),
                cluster=with_node_memory(present.cluster, factor),
                nodes=None if present.nodes is None else with_node_memory(present.nodes, factor),
            )
        )
    inside = with_faster_links(present.model, inside=2.0)
    questions.append(replace(present, name="links-inside-x2", what="links inside nodes twice as fast", model=inside))
    if len(present.cluster.nodes) > 1:
        between = with_faster_links(present.model, between=2.0)
        what = "links between nodes twice as fast"
        questions.append(replace(present, name="links-between-x2", what=what, model=between))
    now = present.cluster.num_ranks
    more, fewer = neighbouring_clusters(present.nodes, now, present.model.gpus_per_node)
    for name, other in (("more", more), ("fewer", fewer)):
        if other is not None:
            questions.append(
                replace(
                    present,
                    name=f"one-node-{name}",
                    what=f"one node {name}: {other.num_ranks} GPUs, not {now}",
                    cluster=other,
                    nodes=None if present.nodes is None else other,
                    only_helps=name == "more",
                )
            )
    return questions


def _fixed_cost_questions(present: _Question) -> list[_Question]:
    questions = []
    if present.model.b1_s > 0:
        questions.append(
            replace(
                present,
                name="fixed-cost-x0.5",
                what="half the fixed cost per micro-batch",
                model=replace(present.model, b1_s=present.model.b1_s / 2),
                note="what gathering parameters while computing may give",
            )
        )
    if present.model.zero_traffic_s * (1 - present.model.zero_overlap) > 0:
        model = replace(present.model, zero_overlap=1.0)
        what = "parameter and gradient traffic hidden"
        questions.append(replace(present, name="zero-traffic-hidden", what=what, model=model))
    return questions


def _wider_row(
    plan: StepPlan, lengths: Sequence[int], cost_model: CostModel, cluster: Cluster, replanning: Replanning
) -> list[WhatIf]:
    grouping = grouping_of(plan, cluster)
    present = schedule(grouping, lengths, cost_model, plan.num_ranks, plan.sync)
    method = replanning.method(cost_model)
    wider = widened_step(grouping, present, lengths, cost_model, cluster, plan.sync, method)
    name, what = "wider-bottleneck", "the slowest group at twice its degree"
    if wider is None:
        return [WhatIf(name, what, None, None, "its method, the ranks or the memory of the others do not allow it")]
    note = (
        f"micro-batch {wider.micro_batch}: its group at degree {wider.degree} takes {wider.wider_time_s:.4g} s rather "
        f"than {wider.time_s:.4g} s; {wider.num_displaced} other groups hand over ranks and sequences; not planned again"
    )
    change = wider.step_time_s / plan.predicted_step_time_s - 1 if plan.predicted_step_time_s > 0 else None
    return [WhatIf(name, what, wider.step_time_s, change, note)]


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)
