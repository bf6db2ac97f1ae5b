"""One rank alone through the entry point: refusals, autocast, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_families import FAMILIES, draw_inputs

from raysp.attention import SequenceLayout
from raysp.errors import InputError
from raysp.linear_attention import parallel_linear_attention, short_convolution

LENGTHS = (3, 5)


def call(family: str = "gated_deltanet", **changed: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A small call with some arguments replaced."""
    arguments: dict[str, Any] = {
        **draw_inputs(family, LENGTHS, seed=0),
        "rule": FAMILIES[family].rule,
        "layout": SequenceLayout(LENGTHS, 1),
        "group": None,
    }
    return parallel_linear_attention(**{**arguments, **changed})


@pytest.mark.parametrize(
    ("family", "changed", "message"),
    [
        ("basic", {"rule": "adaptive"}, "rule 'adaptive' is unknown; expected one of additive, delta"),
        ("basic", {"rule": "delta"}, "rule 'delta' without beta; expected beta with rule 'delta'"),
        ("deltanet", {"rule": "additive"}, "rule 'additive' with beta; expected beta with rule 'delta' and none"),
        ("basic", {"method": "ring"}, "method 'ring' is unknown; expected one of lasp2"),
        ("basic", {"kernel": "cuda"}, "kernel 'cuda' is unknown; expected one of auto, torch, fla"),
        ("gla", {"causal": False}, "expected the additive rule without decay"),
        ("basic", {"v": torch.zeros(8, 3, 6).double()}, "expected q, k both"),
        ("basic", {"log_decay": torch.zeros(8).double()}, r"log_decay is \[8\]"),
        ("deltanet", {"beta": torch.zeros(8, 1).double()}, r"beta is \[8, 1\]"),
        ("basic", {"initial_state": torch.zeros(1, 2, 8, 6).double()}, "initial_state is"),
        ("basic", {"k": torch.zeros(8, 2, 8)}, "expected one floating-point dtype"),
        ("basic", {"initial_state": torch.zeros(2, 2, 8, 6, dtype=torch.int64)}, "expected a floating-point tensor"),
        ("basic", {"scale": torch.tensor(0.5)}, "scale is a tensor"),
        ("basic", {"group": 7}, "group is 7; expected a process group"),
        ("basic", {"layout": SequenceLayout((9,), 1)}, "expected 9 rows"),
        ("basic", {"layout": SequenceLayout(LENGTHS, 2)}, "group is None for a layout of degree 2"),
    ],
)
def test_unusable_arguments_are_refused(family: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(family, **changed)


def test_final_state_is_given_only_where_asked_for() -> None:
    assert call()[1] is None
    final = call(output_final_state=True)[1]
    assert final is not None
    assert final.shape == (2, 2, 8, 6)


def test_autocast_leaves_states_exact() -> None:
    plain, _ = call("kda", **{name: tensor.float() for name, tensor in draw_inputs("kda", LENGTHS, seed=0).items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = call("kda", **{name: tensor.float() for name, tensor in draw_inputs("kda", LENGTHS, seed=0).items()})
    assert torch.equal(plain, cast)


@pytest.mark.parametrize("family", ["retention", "gla", "kda"])
def test_gradcheck(family: str) -> None:
    inputs = draw_inputs(family, LENGTHS, seed=0, key_size=3, value_size=2)
    names = list(inputs)

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, final = call(family, **dict(zip(names, tensors, strict=True)), output_final_state=True)
        assert final is not None
        return out, final

    assert torch.autograd.gradcheck(run, [tensor.requires_grad_() for tensor in inputs.values()])


def test_convolution_refuses_a_weight_of_other_channels() -> None:
    with pytest.raises(InputError, match=r"expected x \[8, C\]"):
        short_convolution(torch.zeros(8, 3), torch.zeros(4, 2), layout=SequenceLayout(LENGTHS, 1), group=None)


def test_kernel_that_is_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'raysp\[fla\]'"):
        call(kernel="fla")


def test_convolution_refuses_other_dtypes_and_a_bias_of_other_channels() -> None:
    layout, x = SequenceLayout(LENGTHS, 1), torch.zeros(8, 3)
    for weight, bias, message in (
        (torch.zeros(3, 2).double(), None, "expected the same of both"),
        (torch.zeros(3, 0), None, "expected W of at least 1"),
        (torch.zeros(3, 2), torch.zeros(1), r"bias \[3\] or None"),
    ):
        with pytest.raises(InputError, match=message):
            short_convolution(x, weight, bias, layout=layout, group=None)


def test_results_may_be_changed_in_place() -> None:
    for family, causal in (("kda", True), ("basic", False)):
        inputs = {name: tensor.requires_grad_() for name, tensor in draw_inputs(family, LENGTHS, seed=0).items()}
        out, final = call(family, **inputs, causal=causal, output_final_state=True)
        assert final is not None
        (out.mul_(2).sum() + final.mul_(2).sum()).backward()
