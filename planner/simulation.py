"""What-if: predicted throughput of policies over batches and cluster sizes, and what one more GPU or node is worth.

Every plan is judged again by `planner.validation` before it counts. Here are values and decisions; drawing tables and
plots is elsewhere. One GPU is one rank.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from planner.cost_model import CostModel
from planner.errors import InfeasibleError, LengthsError, PlanError
from planner.flexsp import flexsp_plan
from planner.length_distribution import split_lengths
from planner.plan import StepPlan
from planner.planning import plan_step
from planner.validation import validate_plan

ADAPTIVE = "adaptive"
BATCH_ADAPTIVE = "batch-adaptive"
FLEXSP = "flexsp"
# Stands for static:1, static:2, static:4 ... up to the number of ranks.
STATIC = "static"
POLICIES = (STATIC, BATCH_ADAPTIVE, FLEXSP, ADAPTIVE)
BEST_STATIC = "best static"


@dataclass(frozen=True)
class SimulatedStep:
    """One batch under one policy on one number of ranks. Times and rates are `None` where it cannot run.

    Attributes:
        batch: Place of the batch among those simulated.
        num_ranks: Ranks of the job.
        policy: As in `simulate`; ``"static"`` comes as ``"static:D"``.
        num_tokens: Tokens of the batch.
        step_time_s: Predicted.
        tokens_per_s: Of the whole job.
        tokens_per_s_per_gpu: The same by rank.
        lower_bound_s: No plan is faster: the best bound that any policy proved for this batch and number of ranks.
        gap: step / bound - 1.
        num_micro_batches: Of the plan.
        solve_time_s: How long planning took.
        infeasible: Why it cannot run; empty if it can.
    """

    batch: int
    num_ranks: int
    policy: str
    num_tokens: int
    step_time_s: float | None
    tokens_per_s: float | None
    tokens_per_s_per_gpu: float | None
    lower_bound_s: float | None
    gap: float | None
    num_micro_batches: int | None
    solve_time_s: float | None
    infeasible: str = ""


@dataclass(frozen=True)
class PolicySummary:
    """All batches under one policy on one number of ranks.

    Attributes:
        num_ranks: Ranks of the job.
        policy: As in `SimulatedStep`, or ``"best static"``: the static degree that can run the most batches, and of
            several the one with the least time.
        degree: Of ``"best static"``.
        num_batches: Batches simulated.
        num_infeasible: Batches that cannot run; the rates are `None` if there are any.
        mean_step_time_s: Arithmetic mean.
        tokens_per_s: All tokens by all step times.
        tokens_per_s_per_gpu: The same by rank.
        relative_to_adaptive: Geometric mean of step time / adaptive step time, over the batches that both can run.
        relative_to_flexsp: The same to FlexSP's formulation.
        mean_gap: Arithmetic mean over the batches that can run.
        mean_solve_time_s: Arithmetic mean over the batches that can run.
    """

    num_ranks: int
    policy: str
    degree: int | None
    num_batches: int
    num_infeasible: int
    mean_step_time_s: float | None
    tokens_per_s: float | None
    tokens_per_s_per_gpu: float | None
    relative_to_adaptive: float | None
    relative_to_flexsp: float | None
    mean_gap: float | None
    mean_solve_time_s: float | None


@dataclass(frozen=True)
class Simulation:
    """Steps in the order simulated, and their summaries by number of ranks and policy."""

    steps: tuple[SimulatedStep, ...]
    summaries: tuple[PolicySummary, ...]

    @classmethod
    def of(cls, steps: Iterable[SimulatedStep]) -> Simulation:
        """Summarise steps, of a simulation that was stopped too: a policy counts with the batches that it has."""
        shared = _with_best_bounds(list(steps))
        by_policy: dict[tuple[int, str], dict[int, SimulatedStep]] = {}
        for step in shared:
            by_policy.setdefault((step.num_ranks, step.policy), {})[step.batch] = step
        summaries: list[PolicySummary] = []
        for num_ranks in dict.fromkeys(step.num_ranks for step in shared):
            policies = {policy: rows for (ranks, policy), rows in by_policy.items() if ranks == num_ranks}
            best = _best_static(policies)
            if best is not None:
                summaries.append(_summary(num_ranks, BEST_STATIC, policies[best], policies, _degree(best)))
            summaries += [_summary(num_ranks, policy, rows, policies) for policy, rows in policies.items()]
        return cls(tuple(shared), tuple(summaries))

    def summary(self, num_ranks: int, policy: str) -> PolicySummary | None:
        """Return one summary, or `None` if that was not simulated."""
        found = (item for item in self.summaries if (item.num_ranks, item.policy) == (num_ranks, policy))
        return next(found, None)

    def to_content(self) -> dict[str, Any]:
        """Return the JSON content."""
        return {
            "steps": [dataclasses.asdict(step) for step in self.steps],
            "summaries": [dataclasses.asdict(item) for item in self.summaries],
        }


@dataclass(frozen=True)
class MarginalValue:
    """What more or fewer ranks do to the predicted throughput of a job.

    Attributes:
        num_ranks: Ranks now.
        gpus_per_node: Ranks of one node.
        tokens_per_s: Throughput now; 0 if the job does not fit.
        gained_per_added_gpu: Tokens/s that one more rank adds.
        gained_per_added_node: Tokens/s that one more node adds.
        lost_per_removed_gpu: Tokens/s that go with one rank; `None` if the job no longer fits.
        lost_per_removed_node: The same with one node.
        reason: For people, one line.
    """

    num_ranks: int
    gpus_per_node: int
    tokens_per_s: float
    gained_per_added_gpu: float
    gained_per_added_node: float
    lost_per_removed_gpu: float | None
    lost_per_removed_node: float | None
    reason: str


def draw_batches(
    lengths: Sequence[int], batch_size: int, num_batches: int, *, seed: int = 0, max_length: int | None = None
) -> list[tuple[int, ...]]:
    """Draw global batches from a corpus: consecutive runs of its documents in a shuffled order.

    Args:
        lengths: Tokens of every document.
        batch_size: Sequences of a batch.
        num_batches: Batches wanted. A corpus that is too small for them is passed over again, in another order.
        seed: Of the order.
        max_length: Longer documents are split, the pieces side by side; nothing is dropped. `None` splits nothing.

    Raises:
        LengthsError: No lengths, or a size, number or length below 1.
    """
    if len(lengths) == 0 or batch_size < 1 or num_batches < 1:
        raise LengthsError(
            f"cannot draw {num_batches} batches of {batch_size} from {len(lengths)} lengths; expected at least 1 each."
        )
    corpus, random = np.asarray(lengths, dtype=np.int64), np.random.default_rng(seed)
    drawn: list[int] = []
    while len(drawn) < batch_size * num_batches:
        documents = corpus[random.permutation(len(corpus))[: batch_size * num_batches - len(drawn)]]
        drawn += (documents if max_length is None else split_lengths(documents, max_length)).tolist()
    return [tuple(drawn[i * batch_size : (i + 1) * batch_size]) for i in range(num_batches)]


def simulate(
    batches: Sequence[Sequence[int]],
    num_ranks_list: Sequence[int],
    cost_model: CostModel,
    *,
    policies: Sequence[str] = (STATIC, BATCH_ADAPTIVE, ADAPTIVE),
    time_limit_s: float = 2.0,
    node_limit: int | None = None,
    seed: int = 0,
    flexsp_cpu_s: float = 10.0,
    on_progress: Callable[[SimulatedStep, int, int], None] | None = None,
) -> Simulation:
    """Plan every batch under every policy for every number of ranks.

    Args:
        batches: Lengths of each batch, in tokens.
        num_ranks_list: Numbers of ranks.
        cost_model: Predicts time and memory.
        policies: Policies of `planner.plan_step`, ``"static"`` (every power of two) and ``"flexsp"``.
        time_limit_s: Seconds of search of each adaptive plan.
        node_limit: As in `planner.plan_step`.
        seed: Of the searches.
        flexsp_cpu_s: CPU seconds for each micro-batch of ``"flexsp"``.
        on_progress: Called after each step with the step, how many are done and how many there are. What it has seen
            makes a `Simulation` too, if it raises.

    Raises:
        PlanError: No batches, an unknown policy, or a number of ranks below 1.
    """
    check_policies(policies)
    if not batches or not num_ranks_list or min(num_ranks_list) < 1:
        raise PlanError(
            f"{len(batches)} batches and numbers of ranks {list(num_ranks_list)}; expected at least one of both, "
            "of at least one rank. Change them."
        )
    tasks = [
        (num_ranks, index, policy)
        for num_ranks in dict.fromkeys(num_ranks_list)
        for index in range(len(batches))
        for policy in expanded_policies(policies, num_ranks, cost_model)
    ]
    steps: list[SimulatedStep] = []
    for num_ranks, index, policy in tasks:
        lengths = batches[index]

        def plan(lengths: Sequence[int] = lengths, num_ranks: int = num_ranks, policy: str = policy) -> StepPlan:
            if policy == FLEXSP:
                return flexsp_plan(lengths, num_ranks, cost_model, solver_cpu_s=flexsp_cpu_s, seed=seed)
            limits: dict[str, Any] = {"time_limit_s": time_limit_s, "node_limit": node_limit, "seed": seed}
            return plan_step(lengths, num_ranks, cost_model, policy=policy, **limits)

        steps.append(_simulated(plan, index, lengths, num_ranks, policy, cost_model))
        if on_progress is not None:
            on_progress(steps[-1], len(steps), len(tasks))
    return Simulation.of(steps)


def check_policies(policies: Sequence[str]) -> None:
    """Raise `PlanError` unless all are policies that `simulate` knows."""
    for policy in policies:
        kind, _, text = policy.partition(":")
        numbered = kind == STATIC and (text == "auto" or (text.isascii() and text.isdigit()))
        if policy not in POLICIES and not numbered:
            raise PlanError(
                f"policy is {policy!r}; expected {', '.join(POLICIES)}, static:auto or static:D such as static:4."
            )
    if not policies:
        raise PlanError(f"there are no policies; expected at least one of {', '.join(POLICIES)}.")


def expanded_policies(policies: Sequence[str], num_ranks: int, cost_model: CostModel) -> list[str]:
    """Return the policies with ``"static"`` replaced by one for each power of two that the ranks and heads allow."""
    powers = [1 << power for power in range(num_ranks.bit_length())]
    static = [f"{STATIC}:{degree}" for degree in powers if cost_model.allows_degree(degree)]
    expanded = itertools.chain.from_iterable(static if policy == STATIC else [policy] for policy in policies)
    return list(dict.fromkeys(expanded))


def marginal_value(
    batches: Sequence[Sequence[int]],
    num_ranks: int,
    cost_model: CostModel,
    *,
    gpus_per_node: int = 8,
    policy: str = ADAPTIVE,
    time_limit_s: float = 2.0,
    node_limit: int | None = None,
    seed: int = 0,
) -> MarginalValue:
    """Predict what one more or one less GPU or node does to the throughput of a job.

    A plan for fewer ranks also runs on more, the others idle, so throughput never falls with the number of ranks:
    where the search finds less on more ranks, what it found on fewer counts.

    Args:
        batches: Lengths of batches that stand for the job, in tokens.
        num_ranks: Ranks now.
        cost_model: Predicts time and memory.
        gpus_per_node: Ranks of one node.
        policy: Of `planner.plan_step`.
        time_limit_s: Seconds of search of each plan; there are five for each batch.
        node_limit: As in `planner.plan_step`: equal inputs then give equal values.
        seed: Of the searches.

    Raises:
        PlanError: No batches, an unknown policy, or a number below 1.
    """
    if gpus_per_node < 1:
        raise PlanError(f"gpus_per_node is {gpus_per_node}; expected at least 1.")
    around = (num_ranks - gpus_per_node, num_ranks - 1, num_ranks, num_ranks + 1, num_ranks + gpus_per_node)
    simulation = simulate(
        batches,
        [num_ranks, *sorted({ranks for ranks in around if ranks >= 1})],
        cost_model,
        policies=[policy],
        time_limit_s=time_limit_s,
        node_limit=node_limit,
        seed=seed,
    )
    rates: dict[int, float] = {}
    best = 0.0
    for ranks in sorted({item.num_ranks for item in simulation.summaries}):
        found = simulation.summary(ranks, policy)
        best = max(best, (found.tokens_per_s or 0.0) if found else 0.0)
        rates[ranks] = best
    now = rates[num_ranks]
    gpu, node = rates[num_ranks + 1] - now, rates[num_ranks + gpus_per_node] - now

    def lost(count: int) -> float | None:
        left = rates.get(num_ranks - count, 0.0)
        return now - left if left > 0 else None

    return MarginalValue(
        num_ranks,
        gpus_per_node,
        now,
        gpu,
        node,
        lost(1),
        lost(gpus_per_node),
        _marginal_reason(num_ranks, gpus_per_node, now, gpu, node, lost(1), lost(gpus_per_node)),
    )


def _marginal_reason(
    num_ranks: int, gpus_per_node: int, now: float, gpu: float, node: float, lost_gpu: float | None, lost: float | None
) -> str:
    if now == 0:
        what = f"then {node:,.0f} tokens/s" if node > 0 else "and neither does it on one node more"
        return f"the job does not fit on {num_ranks} GPUs; one node of {gpus_per_node} more: {what}"
    shown = ["it no longer fits" if loss is None else f"-{loss:,.0f} ({-loss / now:.1%})" for loss in (lost_gpu, lost)]
    return (
        f"{now:,.0f} tokens/s on {num_ranks} GPUs; one GPU more: +{gpu:,.0f} ({gpu / now:+.1%}), one node of "
        f"{gpus_per_node} more: +{node:,.0f} ({node / now:+.1%}); one GPU less: {shown[0]}, one node less: {shown[1]}"
    )


def _simulated(
    plan: Callable[[], StepPlan],
    batch: int,
    lengths: Sequence[int],
    num_ranks: int,
    policy: str,
    cost_model: CostModel,
) -> SimulatedStep:
    num_tokens = sum(lengths)
    try:
        made = plan()
    except (InfeasibleError, PlanError) as cause:
        nothing = (None, None, None, None, None, None, None)
        return SimulatedStep(batch, num_ranks, policy, num_tokens, *nothing, str(cause))
    faults = validate_plan(made, lengths, cost_model)
    if faults:
        raise PlanError(f"batch {batch}, {policy} on {num_ranks} ranks: the plan is not valid: {faults[0]}.")
    tokens_per_s = num_tokens / made.predicted_step_time_s
    return SimulatedStep(
        batch=batch,
        num_ranks=num_ranks,
        policy=policy,
        num_tokens=num_tokens,
        step_time_s=made.predicted_step_time_s,
        tokens_per_s=tokens_per_s,
        tokens_per_s_per_gpu=tokens_per_s / num_ranks,
        lower_bound_s=made.lower_bound_s,
        gap=made.gap,
        num_micro_batches=len(made.micro_batches),
        solve_time_s=made.solve_time_s,
    )


def _with_best_bounds(steps: list[SimulatedStep]) -> list[SimulatedStep]:
    bounds: dict[tuple[int, int], float] = {}
    for step in steps:
        key = (step.batch, step.num_ranks)
        bounds[key] = max(bounds.get(key, 0.0), step.lower_bound_s or 0.0)
    return [
        step
        if step.step_time_s is None
        else dataclasses.replace(
            step, lower_bound_s=bound_s, gap=step.step_time_s / bound_s - 1 if bound_s > 0 else 0.0
        )
        for step in steps
        for bound_s in [bounds[step.batch, step.num_ranks]]
    ]


def _best_static(policies: dict[str, dict[int, SimulatedStep]]) -> str | None:
    """Return the static policy that can run the most batches, and of several the one with the least time over them."""
    known = set().union(*policies.values())
    static = {policy: rows for policy, rows in policies.items() if _degree(policy) is not None}

    def rank(policy: str) -> tuple[int, float]:
        times = [step.step_time_s for step in static[policy].values() if step.step_time_s is not None]
        return len(known) - len(times), math.fsum(times)

    return min(static, key=rank) if static else None


def _summary(
    num_ranks: int,
    policy: str,
    rows: dict[int, SimulatedStep],
    policies: dict[str, dict[int, SimulatedStep]],
    degree: int | None = None,
) -> PolicySummary:
    times = [step.step_time_s for step in rows.values() if step.step_time_s is not None]
    gaps = [step.gap for step in rows.values() if step.gap is not None]
    solves = [step.solve_time_s for step in rows.values() if step.solve_time_s is not None]
    complete = len(times) == len(rows)
    tokens_per_s = sum(step.num_tokens for step in rows.values()) / math.fsum(times) if complete else None
    return PolicySummary(
        num_ranks=num_ranks,
        policy=policy,
        degree=degree,
        num_batches=len(rows),
        num_infeasible=len(rows) - len(times),
        mean_step_time_s=_mean(times) if complete else None,
        tokens_per_s=tokens_per_s,
        tokens_per_s_per_gpu=None if tokens_per_s is None else tokens_per_s / num_ranks,
        relative_to_adaptive=_relative(rows, policies.get(ADAPTIVE, {})),
        relative_to_flexsp=_relative(rows, policies.get(FLEXSP, {})),
        mean_gap=_mean(gaps),
        mean_solve_time_s=_mean(solves),
    )


def _relative(rows: dict[int, SimulatedStep], others: dict[int, SimulatedStep]) -> float | None:
    logs = [
        math.log(step.step_time_s / others[batch].step_time_s)  # type: ignore[operator]
        for batch, step in rows.items()
        if batch in others and step.step_time_s is not None and others[batch].step_time_s is not None
    ]
    return math.exp(math.fsum(logs) / len(logs)) if logs else None


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _degree(policy: str) -> int | None:
    kind, _, text = policy.partition(":")
    return int(text) if kind == STATIC and text.isdigit() else None
