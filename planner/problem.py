"""One planning problem as a value: the batch, the ranks, the degrees that are allowed, and their costs as tables.

A draft is a plan before placement: micro-batches of groups of sequence ids, without ranks or predicted numbers. Every
search of this package takes a `Problem` and returns drafts; `Problem.step_time_s` is the one judge between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.cost_model import CostModel
from planner.errors import InfeasibleError, PlanError

DEGREE_RULES = ("powers-of-two", "any")

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


class DraftGroup(NamedTuple):
    """A group without ranks: its degree and the ids of its sequences."""

    degree: int
    sequences: tuple[int, ...]


DraftMicroBatch = tuple[DraftGroup, ...]
Draft = tuple[DraftMicroBatch, ...]


@dataclass(frozen=True)
class Problem:
    """A batch to plan.

    Attributes:
        lengths: Tokens of every sequence; the index is the sequence id.
        num_ranks: Ranks of the job.
        cost_model: Predicts time and memory.
        attention: Parallel attention method of degrees above 1.
        degrees: Allowed degrees, ascending, starting with 1.
    """

    lengths: tuple[int, ...]
    num_ranks: int
    cost_model: CostModel
    attention: str
    degrees: tuple[int, ...]

    @cached_property
    def max_tokens(self) -> dict[int, int]:
        """Tokens that a group of each degree holds."""
        return {degree: self.cost_model.max_tokens(degree, self.num_ranks) for degree in self.degrees}

    @cached_property
    def fixed_s(self) -> dict[int, float]:
        """Seconds of a group of each degree before its first sequence."""
        return {degree: self.cost_model.fixed_s(degree) for degree in self.degrees}

    @cached_property
    def share_s(self) -> dict[int, FloatArray]:
        """Seconds that each sequence adds to a group of each degree, indexed by sequence id."""
        tokens = np.asarray(self.lengths, dtype=np.float64)
        model = self.cost_model
        return {
            degree: (
                model.a1_s_per_token2 * tokens * tokens
                + (model.a2_s_per_token + model.communication_s_per_share(degree)) * tokens
            )
            / degree
            for degree in self.degrees
        }

    @cached_property
    def descending(self) -> tuple[int, ...]:
        """Sequence ids, longest first; equal lengths in the order of their ids."""
        return tuple(sorted(range(len(self.lengths)), key=lambda i: (-self.lengths[i], i)))

    @cached_property
    def capacity(self) -> int:
        """Tokens that one micro-batch can hold at most, over every shape of groups."""
        # Whole tokens per group make capacity not quite proportional to degree, hence the best per-rank value.
        per_rank = max(tokens / degree for degree, tokens in self.max_tokens.items())
        return max(1, math.floor(per_rank * self.num_ranks * (1 + 1e-12)))

    @property
    def min_micro_batches(self) -> int:
        """Micro-batches that memory forces."""
        return max(1, -(-sum(self.lengths) // self.capacity))

    def group_time_s(self, group: DraftGroup) -> float:
        """Predicted seconds of one group."""
        return self.cost_model.group_time_s((self.lengths[i] for i in group.sequences), group.degree)

    def makespan_s(self, micro_batch: DraftMicroBatch) -> float:
        """Predicted seconds of one micro-batch: its slowest group."""
        return max(self.group_time_s(group) for group in micro_batch)

    def step_time_s(self, draft: Draft) -> float:
        """Predicted seconds of the whole step, the fixed part included."""
        return math.fsum([self.makespan_s(micro_batch) for micro_batch in draft]) + self.cost_model.fixed_step_s


def make_problem(
    lengths: Sequence[int], num_ranks: int, cost_model: CostModel, attention: str | None, degrees: str
) -> Problem:
    """Check the inputs of a plan and build the `Problem`.

    Raises:
        PlanError: No sequences, a length or a count that is not a positive integer, an unknown degree rule.
        InfeasibleError: The model states alone exceed the memory limit.
    """
    if isinstance(num_ranks, bool) or not isinstance(num_ranks, (int, np.integer)) or num_ranks < 1:
        raise PlanError(f"num_ranks is {num_ranks!r}; expected an integer of at least 1.")
    if degrees not in DEGREE_RULES:
        raise PlanError(f"degrees is {degrees!r}; expected one of {', '.join(DEGREE_RULES)}.")
    tokens = checked_lengths(lengths)
    method = cost_model.attention if attention is None else attention
    if not isinstance(method, str) or not method or method == "local":
        raise PlanError(f"attention is {attention!r}; expected a parallel attention method, such as 'ring'.")
    num_ranks = int(num_ranks)
    free_bytes = cost_model.memory_limit_bytes - cost_model.group_memory_bytes((), 1, num_ranks)
    if free_bytes < 0:
        raise InfeasibleError(
            f"the model states need {cost_model.group_memory_bytes((), 1, num_ranks):.0f} bytes on each of {num_ranks} "
            f"ranks; the memory limit is {cost_model.memory_limit_bytes:.0f} bytes. Use more ranks or raise the limit."
        )
    allowed = allowed_degrees(num_ranks, cost_model, method, degrees)
    return Problem(tokens, num_ranks, cost_model, method, allowed)


def allowed_degrees(num_ranks: int, cost_model: CostModel, attention: str, rule: str) -> tuple[int, ...]:
    """Return the degrees that groups may have, ascending; with Ulysses those that divide the heads."""
    powers_of_two = [1 << power for power in range(num_ranks.bit_length())]
    candidates = list(range(1, num_ranks + 1)) if rule == "any" else powers_of_two
    return tuple(d for d in candidates if cost_model.allows_degree(d, attention=attention))


def checked_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """Return the lengths as plain integers, or raise `PlanError` naming the sequence."""
    if len(lengths) == 0:
        raise PlanError("the batch has no sequences; expected at least one length.")
    checked = []
    for index, length in enumerate(lengths):
        if isinstance(length, bool) or not isinstance(length, (int, np.integer)) or length < 1:
            raise PlanError(
                f"sequence {index} has length {length!r}; expected an integer of at least 1. Drop empty documents."
            )
        checked.append(int(length))
    return tuple(checked)


def check_longest_fits(problem: Problem) -> None:
    """Raise `InfeasibleError` if the longest sequence fits no allowed group."""
    longest = problem.descending[0]
    degree = max(problem.degrees, key=lambda d: problem.max_tokens[d])
    holds = problem.max_tokens[degree]
    length = problem.lengths[longest]
    if length <= holds:
        return
    needed = problem.cost_model.group_memory_bytes((length,), degree, problem.num_ranks)
    raise InfeasibleError(
        f"sequence {longest} has {length} tokens and needs {needed:.0f} bytes on each rank of a group of degree "
        f"{degree}, the largest that {problem.num_ranks} ranks allow here; the memory limit is "
        f"{problem.cost_model.memory_limit_bytes:.0f} bytes, which holds {holds} tokens. Use more ranks, allow larger "
        f"degrees, raise the memory limit, or split documents at {holds} tokens (data.max_length)."
    )
