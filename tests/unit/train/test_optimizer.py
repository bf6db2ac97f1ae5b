"""The learning rate is a pure function of the step."""

from __future__ import annotations

import pytest

from raysp.config import TrainConfig
from raysp.train.optimizer import learning_rate


def test_warm_up_is_linear_and_cosine_ends_at_the_floor() -> None:
    config = TrainConfig(num_steps=100, learning_rate=1.0, warmup_steps=10, min_learning_rate_ratio=0.1)
    assert learning_rate(0, config) == pytest.approx(0.1)
    assert learning_rate(9, config) == pytest.approx(1.0)
    assert learning_rate(55, config) == pytest.approx(0.55)
    assert learning_rate(100, config) == pytest.approx(0.1)
    assert learning_rate(10_000, config) == pytest.approx(0.1)
    rates = [learning_rate(step, config) for step in range(10, 100)]
    assert rates == sorted(rates, reverse=True)
