"""Inputs and a brute force shared by the planner's tests."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from planner import CostModel
from planner.budget import Budget


def make_model(**changes: Any) -> CostModel:
    """A model in which degrees matter: quadratic compute, dearer communication across more ranks, tight memory."""
    constants: dict[str, Any] = {
        "name": "test",
        "a1_s_per_token2": 2e-9,
        "a2_s_per_token": 4e-6,
        "b1_s": 0.02,
        "b2_s": 0.004,
        "communication_s": ((2, 1e-6), (4, 2e-6), (8, 8e-6)),
        "bytes_per_token": 2000.0,
        "model_state_bytes_total": 1e6,
        "memory_limit_bytes": 2e7,
        "fixed_step_s": 0.01,
    }
    return CostModel(**{**constants, **changes})


def long_tail(num: int, seed: int, *, median: float = 800, sigma: float = 1.4, cap: int = 30000) -> list[int]:
    """Lognormal lengths, capped."""
    draws = np.random.default_rng(seed).lognormal(math.log(median), sigma, num)
    return [int(s) for s in np.clip(draws, 1, cap)]


@st.composite
def cost_models(draw: st.DrawFn) -> CostModel:
    """Models with and without quadratic, communication and fixed parts."""
    unit = st.floats(0.0, 1.0)
    return make_model(
        a1_s_per_token2=1e-8 * draw(unit),
        a2_s_per_token=1e-5 * draw(unit),
        b1_s=0.05 * draw(unit),
        b2_s=0.02 * draw(unit),
        communication_s=((2, 1e-5 * draw(unit)), (4, 1e-5 * draw(unit))),
        fixed_step_s=0.01 * draw(unit),
        memory_limit_bytes=draw(st.sampled_from([8e6, 2e7, 1e9])),
    )


def brute_force_makespan(lengths: Sequence[int], num_ranks: int, model: CostModel, degrees: Sequence[int]) -> float:
    """Least makespan of one micro-batch over all partitions into groups and all degrees; infinite if none fits."""
    best = math.inf
    for blocks in set_partitions(list(lengths)):
        for chosen in itertools.product(degrees, repeat=len(blocks)):
            if sum(chosen) > num_ranks:
                continue
            pairs = list(zip(blocks, chosen, strict=True))
            if any(model.group_memory_bytes(b, d, num_ranks) > model.memory_limit_bytes for b, d in pairs):
                continue
            best = min(best, max(model.group_time_s(b, d) for b, d in pairs))
    return best


def brute_force_step(lengths: Sequence[int], num_ranks: int, model: CostModel, degrees: Sequence[int]) -> float:
    """Least step time over all micro-batch splits as well."""
    known: dict[tuple[int, ...], float] = {}

    def makespan(block: list[int]) -> float:
        key = tuple(sorted(block))
        if key not in known:
            known[key] = brute_force_makespan(key, num_ranks, model, degrees)
        return known[key]

    return model.fixed_step_s + min(sum(makespan(b) for b in blocks) for blocks in set_partitions(list(lengths)))


def set_partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """Yield every way to cut `items` into blocks that are not empty."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for blocks in set_partitions(rest):
        yield [[first], *blocks]
        for index, block in enumerate(blocks):
            yield [*blocks[:index], [first, *block], *blocks[index + 1 :]]


def unhurried() -> Budget:
    """A budget that no clock ends."""
    return Budget.start(0.0, node_limit=20, seed=0)
