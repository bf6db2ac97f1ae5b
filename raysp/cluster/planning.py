"""From a global batch to what every rank does: plans, computed ahead on the driver while the workers train."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from planner import CostModel, PlanRequest, PlanService, StepPlan, plan_request, validate_plan
from raysp.config import PlannerConfig
from raysp.data.loader import BatchLoader, Cursor, GlobalBatch
from raysp.errors import RayspError
from raysp.tracking.events import GroupShape
from raysp.train.work import GroupWork, StepWork


@dataclass(frozen=True)
class PlannedStep:
    """A step that is ready to run.

    Attributes:
        step: 0-based.
        batch: Its sequences.
        plan: In places of the batch.
        plan_time_s: How long planning took; 0 for a plan out of the cache.
        plan_wait_s: How long training waited for it.
        source: ``"planned"``, ``"cache"``, or ``"incumbent"`` where the deadline had passed.
    """

    step: int
    batch: GlobalBatch
    plan: StepPlan
    plan_time_s: float = 0.0
    plan_wait_s: float = 0.0
    source: str = "planned"


def plan_batch(
    lengths: tuple[int, ...], *, config: PlannerConfig, cost_model: CostModel, num_ranks: int, seed: int, policy: str
) -> StepPlan:
    """Plan one batch and check the plan with the independent validator.

    Raises:
        RayspError: The validator refuses the plan (a defect of the planner; running it could give a wrong answer).
    """
    request = _request(lengths, config, cost_model, num_ranks=num_ranks, seed=seed, policy=policy)
    return _checked(plan_request(request), request)


def _request(
    lengths: tuple[int, ...], config: PlannerConfig, cost_model: CostModel, *, num_ranks: int, seed: int, policy: str
) -> PlanRequest:
    return PlanRequest(
        lengths=lengths,
        num_ranks=num_ranks,
        cost_model=cost_model,
        policy=policy,
        sync=config.sync,
        degrees=config.degrees,
        time_limit_s=config.time_limit_s,
        node_limit=config.node_limit,
        seed=seed,
    )


def _checked(plan: StepPlan, request: PlanRequest) -> StepPlan:
    problems = validate_plan(plan, list(request.lengths), request.cost_model)
    if problems:
        raise RayspError(f"the planner made an invalid plan and nothing was run: {'; '.join(problems[:3])}")
    return plan


def assign_work(plan: StepPlan, batch: GlobalBatch, *, step: int, num_ranks: int) -> list[StepWork]:
    """Each rank's part of the plan, by rank. Plans name sequences by place in the batch, workers by dataset id."""
    parts: list[list[GroupWork | None]] = [[] for _ in range(num_ranks)]
    for micro_batch in plan.micro_batches:
        row: list[GroupWork | None] = [None] * num_ranks
        for group in micro_batch.groups:
            work = GroupWork(
                ranks=tuple(group.ranks),
                attention=group.attention,
                sequence_ids=tuple(batch.sequence_ids[index] for index in group.sequences),
                lengths=tuple(batch.lengths[index] for index in group.sequences),
                recompute=group.recompute,
            )
            for rank in group.ranks:
                row[rank] = work
        for rank, group_work in enumerate(row):
            parts[rank].append(group_work)
    return [StepWork(step=step, micro_batches=tuple(part), sync=plan.sync) for part in parts]


def group_shapes(plan: StepPlan) -> list[tuple[GroupShape, ...]]:
    """Per micro-batch its groups taken together by degree and method, largest degree first."""
    result = []
    for micro_batch in plan.micro_batches:
        by_kind: dict[tuple[int, str], list[int]] = {}
        for index, group in enumerate(micro_batch.groups):
            by_kind.setdefault((group.degree, group.attention), []).append(index)
        shapes = []
        for (degree, attention), indices in sorted(by_kind.items(), reverse=True):
            groups = [micro_batch.groups[index] for index in indices]
            shapes.append(
                GroupShape(
                    degree=degree,
                    count=len(groups),
                    attention=attention,
                    num_sequences=sum(len(group.sequences) for group in groups),
                    num_tokens=sum(group.num_tokens for group in groups),
                    predicted_time_s=max(group.predicted_time_s for group in groups),
                )
            )
        result.append(tuple(shapes))
    return result


def describe_groups(plan: StepPlan) -> str:
    """The groups of a plan on one line, e.g. ``2x1+1x2 | 4x1`` (degree x count, micro-batches apart by a bar)."""
    return " | ".join("+".join(f"{s.degree}x{s.count}" for s in shapes) for shapes in group_shapes(plan))


class PlanAhead:
    """Plans steps in background processes, at most ``planner.lookahead_steps`` ahead of the one in use.

    Iterating yields the steps from ``first_step`` to ``num_steps`` in order; an error in planning is raised by the step
    it belongs to. Every plan is checked with the independent validator, those out of the cache and those of a deadline
    (``planner.deadline_s``) too. Use as a context manager.
    """

    def __init__(
        self,
        loader: BatchLoader,
        *,
        config: PlannerConfig,
        cost_model: CostModel,
        num_ranks: int,
        seed: int,
        first_step: int,
        num_steps: int,
        cursor: Cursor,
    ) -> None:
        self._loader = loader
        self._config = config
        self._cost_model = cost_model
        self._num_ranks = num_ranks
        self._seed = seed
        self._next_step = first_step
        self._num_steps = num_steps
        self._cursor = cursor
        self._pending: deque[tuple[int, GlobalBatch, PlanRequest]] = deque()
        self._service = PlanService(
            num_processes=min(config.processes, config.lookahead_steps),
            max_ahead=config.lookahead_steps,
            deadline_s=config.deadline_s,
        )

    def __enter__(self) -> PlanAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._service.close()

    def use_cost_model(self, cost_model: CostModel) -> None:
        """Plan with ``cost_model`` what was not yet handed to the background; plans that were keep theirs."""
        self._cost_model = cost_model

    def __iter__(self) -> Iterator[PlannedStep]:
        self._fill()
        while self._pending:
            start_s = time.perf_counter()
            step, batch, request = self._pending.popleft()
            planned = self._service.result(step)
            self._fill()
            plan = _checked(planned.plan, request)
            yield PlannedStep(
                step=step,
                batch=batch,
                plan=plan,
                plan_time_s=planned.solve_time_s,
                plan_wait_s=time.perf_counter() - start_s,
                source=planned.source,
            )

    def _fill(self) -> None:
        while self._next_step < self._num_steps and self._service.can_submit:
            batch = self._loader.batch_at(self._cursor)
            request = _request(
                batch.lengths,
                self._config,
                self._cost_model,
                num_ranks=self._num_ranks,
                seed=self._seed,
                policy=self._config.policy,
            )
            self._service.submit(self._next_step, request)
            self._pending.append((self._next_step, batch, request))
            self._cursor = batch.next_cursor
            self._next_step += 1
