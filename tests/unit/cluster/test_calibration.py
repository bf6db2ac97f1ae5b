"""Which probes are measured: they tell apart what the fit has to tell apart. Pure; nothing is run."""

from __future__ import annotations

import numpy as np
import pytest

from planner import Sample, fit_cost_model
from raysp.cluster.calibration import Probe, plan_probes, recompute_probes


@pytest.mark.parametrize(("num_ranks", "longest", "max_tokens"), [(1, 64, 32), (2, 1024, 512), (8, 131072, 16384)])
def test_probes_stay_within_what_a_rank_holds(num_ranks: int, longest: int, max_tokens: int) -> None:
    probes = plan_probes(num_ranks=num_ranks, longest=longest, max_tokens_per_rank=max_tokens)
    assert len(probes) == len(set(probes))
    for probe in probes:
        assert max(probe.lengths) <= longest
        assert sum(probe.lengths) <= max_tokens * probe.degree * 1.01
    assert sum(probe.degree == 1 for probe in probes) <= 7


@pytest.mark.parametrize(("longest", "max_tokens"), [(1024, 512), (8192, 4096), (131072, 16384)])
def test_cost_of_a_sequence_as_such_is_found(longest: int, max_tokens: int) -> None:
    """A GPU group of many short documents was predicted 25 to 30 % too fast where this cost went into the tokens'."""
    per_sequence_s, per_token_s = 3e-4, 2e-6
    random = np.random.default_rng(0)
    samples = []
    for probe in plan_probes(num_ranks=1, longest=longest, max_tokens_per_rank=max_tokens):
        quadratic = sum(s * s for s in probe.lengths)
        time_s = 0.02 + 1e-10 * quadratic + per_token_s * sum(probe.lengths) + per_sequence_s * len(probe.lengths)
        samples.append(Sample(probe.lengths, probe.degree, time_s * (1 + 0.01 * random.standard_normal())))
    model = fit_cost_model(
        samples,
        name="test",
        num_ranks=1,
        model_state_bytes_total=0.0,
        memory_limit_bytes=1e9,
        bytes_per_token=1.0,
    ).cost_model
    assert model.per_sequence_s == pytest.approx(per_sequence_s, rel=0.1)
    many = [50] * 200
    expected_s = 0.02 + 1e-10 * 200 * 2500 + per_token_s * 10_000 + per_sequence_s * 200
    assert model.group_time_s(many, 1) == pytest.approx(expected_s, rel=0.05)


def test_recompute_policy_is_measured_on_the_two_smallest_degrees() -> None:
    probes = recompute_probes("full", degrees=[4, 1, 2], longest=1000, max_tokens_per_rank=300)
    assert probes == [
        Probe(1, (150,), "full"),
        Probe(1, (300,), "full"),
        Probe(2, (300,), "full"),
        Probe(2, (600,), "full"),
    ]
