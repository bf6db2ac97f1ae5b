"""Orders of rows: contiguous for states, zigzag for causal softmax attention, and when both are had at once."""

from __future__ import annotations

import pytest

from raysp.train.hybrid_layout import decide_layout


def _decide(
    linear: int, softmax: int, method: str, degree: int, heads: tuple[int, int] = (8, 2)
) -> tuple[str, str, str]:
    decision = decide_layout(
        num_linear_layers=linear,
        num_softmax_layers=softmax,
        method=method,
        degree=degree,
        num_heads=heads[0],
        num_key_heads=heads[1],
    )
    assert decision.reason
    return decision.order, decision.attention_order, decision.method


@pytest.mark.parametrize("method", ["ring", "ulysses", "auto"])
def test_softmax_models_keep_zigzag_and_their_method(method: str) -> None:
    assert _decide(0, 4, method, 4) == ("zigzag", "zigzag", method)


def test_linear_models_are_contiguous() -> None:
    assert _decide(4, 0, "ring", 4)[:2] == ("contiguous", "contiguous")
    assert _decide(4, 4, "local", 1)[:2] == ("contiguous", "contiguous")


def test_ulysses_of_a_hybrid_moves_no_rows() -> None:
    assert _decide(3, 1, "ulysses", 4) == ("contiguous", "contiguous", "ulysses")


@pytest.mark.parametrize("method", ["ring", "bidirectional_ring", "token_ring", "all_gather", "ulysses_ring", "rsa"])
def test_other_methods_of_a_hybrid_run_in_zigzag(method: str) -> None:
    assert _decide(3, 1, method, 4) == ("contiguous", "zigzag", method)


def test_auto_of_a_hybrid_is_ulysses_where_heads_divide() -> None:
    assert _decide(3, 1, "auto", 2)[2] == "ulysses"
    assert _decide(3, 1, "auto", 4) == ("contiguous", "zigzag", "auto")
