"""The chunked operator against the recurrence: outputs, states, gradients, pieces that continue each other."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from linear_families import FAMILIES, draw_inputs
from torch import Tensor
from torch.autograd import gradcheck

from raysp.linear_attention import naive_linear_attention, torch_operator
from raysp.linear_attention.chunks import chunk_map
from raysp.linear_attention.operator import LocalInputs
from raysp.linear_attention.torch_operator import TorchOperator

LENGTHS = [(1,), (63,), (127,), (1000,), (1, 63, 127), (3, 200, 2, 64, 128, 65)]
PACKED = (5, 130, 70)
DECAYING = [name for name, family in FAMILIES.items() if family.decay in ("TH", "THK")]


def make_operator(family: str, inputs: dict[str, Tensor], lengths: tuple[int, ...]) -> TorchOperator:
    log_decay = inputs.get("log_decay")
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = log_decay.expand(len(inputs["q"]), -1)
    rule, scale = FAMILIES[family].rule, inputs["q"].shape[2] ** -0.5
    rows = (inputs["q"], inputs["k"], inputs["v"], log_decay, inputs.get("beta"))
    return TorchOperator(LocalInputs(*rows, rule=rule, scale=scale, piece_lengths=lengths))


def outer_gradients(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients of outputs and final states."""
    generator = torch.Generator().manual_seed(7)
    v, states = inputs["v"], inputs["initial_state"]
    dout = torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v.dtype)
    return dout, torch.randn(states.shape, generator=generator, dtype=torch.float64).to(states.dtype)


def chunked(family: str, inputs: dict[str, Tensor], lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """Output, final state and gradients by name."""
    dout, dfinal = outer_gradients(inputs)
    out, final = make_operator(family, inputs, lengths).output(inputs["initial_state"])
    found = make_operator(family, inputs, lengths).gradients(inputs["initial_state"], dout, dfinal)
    gradients = {"q": found.q, "k": found.k, "v": found.v, "initial_state": found.initial_states}
    if found.log_decay is not None:
        whole = inputs["log_decay"].ndim == 1
        gradients["log_decay"] = found.log_decay.sum(0) if whole else found.log_decay
    if found.beta is not None:
        gradients["beta"] = found.beta
    return {"out": out, "final_state": final, **{f"d{name}": gradient for name, gradient in gradients.items()}}


def recurrent(family: str, inputs: dict[str, Tensor], lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """The same from the recurrence, in fp64."""
    dout, dfinal = outer_gradients(inputs)
    leaves = {name: tensor.double().requires_grad_() for name, tensor in inputs.items()}
    out, final = naive_linear_attention(**leaves, rule=FAMILIES[family].rule, lengths=lengths)
    gradients = torch.autograd.grad([out, final], list(leaves.values()), [dout.double(), dfinal.double()])
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), "final_state": final.detach(), **named}


def check(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    """Compare, relative to the largest number of each."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.isfinite(tensor).all(), name
        size = max(1.0, float(expected[name].abs().max()))
        error = float((tensor.double() - expected[name]).abs().max()) / size
        assert error < limit, (name, error)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_results_and_gradients_equal_the_recurrence(family: str, lengths: tuple[int, ...]) -> None:
    inputs = draw_inputs(family, lengths, seed=0)
    check(chunked(family, inputs, lengths), recurrent(family, inputs, lengths), 1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_finite_differences(family: str) -> None:
    lengths = (3, 4, 2)
    inputs = draw_inputs(family, lengths, seed=0, num_heads=1, key_size=2, value_size=3)
    names = list(inputs)

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            ctx.save_for_backward(*tensors)
            given = dict(zip(names, tensors, strict=True))
            return make_operator(family, given, lengths).output(given["initial_state"])

        @staticmethod
        def backward(ctx: Any, dout: Tensor, dfinal: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(names, ctx.saved_tensors, strict=True))
            found = vars(make_operator(family, given, lengths).gradients(given["initial_state"], dout, dfinal))
            found["initial_state"] = found["initial_states"]
            if given.get("log_decay", dout).ndim == 1:
                found["log_decay"] = found["log_decay"].sum(0)
            return tuple(found[name] for name in names)

    assert gradcheck(Operator.apply, tuple(tensor.requires_grad_() for tensor in inputs.values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_of_a_document_chain_to_the_whole(family: str) -> None:
    length, cuts = 200, (0, 1, 64, 129, 200)
    inputs = draw_inputs(family, (length,), seed=0)
    whole, final = make_operator(family, inputs, (length,)).output(inputs["initial_state"])
    state = inputs["initial_state"][0]
    for start, stop in itertools.pairwise(cuts):
        rows = {name: tensor[start:stop] if tensor.shape[0] == length else tensor for name, tensor in inputs.items()}
        operator = make_operator(family, rows, (stop - start,))
        update, transition = operator.outgoing(None, with_transition=True)
        operator.work_ahead()
        out, finals = operator.output(state[None])
        torch.testing.assert_close(out, whole[start:stop], rtol=0, atol=1e-10)
        moved = transition[..., None] * state if transition.ndim == 2 else transition @ state
        state = moved + update
        torch.testing.assert_close(finals[0], state, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, final[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("lengths", [(70,), PACKED], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_outgoing_state_is_the_final_state_of_the_last_piece(family: str, lengths: tuple[int, ...]) -> None:
    inputs = draw_inputs(family, lengths, seed=0)
    expected = recurrent(family, inputs, lengths)
    operator = make_operator(family, inputs, lengths)
    state, transition = operator.outgoing(inputs["initial_state"][-1], with_transition=False)
    assert transition is None
    torch.testing.assert_close(state, expected["final_state"][-1], rtol=0, atol=1e-10)
    out, final = operator.output(inputs["initial_state"])
    check({"out": out, "final_state": final}, {name: expected[name] for name in ("out", "final_state")}, 1e-10)


@pytest.mark.parametrize("lengths", [(70,), PACKED], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_incoming_gradient_is_that_of_the_first_initial_state(family: str, lengths: tuple[int, ...]) -> None:
    inputs = draw_inputs(family, lengths, seed=0)
    dout, dfinal = outer_gradients(inputs)
    expected = recurrent(family, inputs, lengths)
    operator = make_operator(family, inputs, lengths)
    gradient = operator.incoming_gradient(dout, dfinal[0])
    torch.testing.assert_close(gradient, expected["dinitial_state"][0], rtol=0, atol=1e-10)
    operator.gradient_work_ahead(inputs["initial_state"], dout)
    found = operator.gradients(inputs["initial_state"], dout, dfinal)
    torch.testing.assert_close(found.q, expected["dq"], rtol=0, atol=1e-10)
    without = make_operator(family, inputs, lengths).incoming_gradient(dout, None)
    through_final = make_operator(family, inputs, lengths).incoming_gradient(torch.zeros_like(dout), dfinal[0])
    torch.testing.assert_close(without + through_final, gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_token_changes_no_row_before_it_and_no_other_document(family: str) -> None:
    inputs = draw_inputs(family, PACKED, seed=0)
    before, _ = make_operator(family, inputs, PACKED).output(inputs["initial_state"])
    changed = 5 + 40
    for name in ("q", "k", "v", "log_decay", "beta"):
        if name not in inputs or inputs[name].ndim == 1:
            continue
        other = {**inputs, name: inputs[name].clone()}
        other[name][changed] *= 0.5
        after, _ = make_operator(family, other, PACKED).output(inputs["initial_state"])
        same = (before == after).all(-1).all(-1)
        assert same[:changed].all(), name
        assert not same[changed], name
        assert same[5 + 130 :].all(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", DECAYING)
def test_strong_decays_are_exact(family: str, dtype: torch.dtype) -> None:
    inputs = draw_inputs(family, PACKED, seed=0, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    strengths = torch.tensor([-1e-3, -1e-2, -1.0, -50.0, -1e4, -float("inf")], dtype=dtype)
    odds = torch.tensor([8.0, 8.0, 4.0, 1.0, 1.0, 1.0])
    picks = torch.multinomial(odds, inputs["log_decay"].numel(), replacement=True, generator=generator)
    inputs["log_decay"] = strengths[picks].view_as(inputs["log_decay"])
    check(chunked(family, inputs, PACKED), recurrent(family, inputs, PACKED), 1e-10 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 5e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision_loses_no_more_than_rounding_the_results(family: str, dtype: torch.dtype, limit: float) -> None:
    inputs = draw_inputs(family, PACKED, seed=0, dtype=dtype)
    found = chunked(family, inputs, PACKED)
    assert found["out"].dtype == found["dq"].dtype == dtype
    assert found["final_state"].dtype == found["dinitial_state"].dtype == torch.float32
    check(found, recurrent(family, inputs, PACKED), limit)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_without_tokens_passes_states_on(family: str) -> None:
    inputs = draw_inputs(family, (), seed=0)
    state = draw_inputs(family, (1,), seed=0)["initial_state"][0]
    operator = make_operator(family, inputs, ())
    handed_on, transition = operator.outgoing(state, with_transition=True)
    operator.work_ahead()
    assert torch.equal(handed_on, state)
    assert torch.equal(transition[..., None] * state if transition.ndim == 2 else transition @ state, state)
    assert torch.equal(operator.incoming_gradient(inputs["v"], state), state)
    for name, tensor in chunked(family, inputs, ()).items():
        assert tensor.numel() == 0 or name == "dlog_decay", name


def test_blocks_of_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in FAMILIES:
        inputs = draw_inputs(family, PACKED, seed=0)
        expected = chunked(family, inputs, PACKED)
        with monkeypatch.context() as patch:
            patch.setattr(torch_operator, "_BLOCK_NUMEL", 2 * 64 * 2 * 8)
            check(chunked(family, inputs, PACKED), expected, 1e-14)


def test_rows_that_are_not_contiguous_are_read_right() -> None:
    inputs = draw_inputs("kda", PACKED, seed=0)
    fused = torch.cat([inputs["q"], inputs["k"], inputs["v"]], dim=-1)
    views = dict(zip("qkv", fused.split([8, 8, 6], dim=-1), strict=True))
    check(chunked("kda", {**inputs, **views}, PACKED), chunked("kda", inputs, PACKED), 1e-14)


def test_nothing_is_recorded_by_autograd() -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in draw_inputs("kda", PACKED, seed=0).items()}
    assert not any(tensor.requires_grad for tensor in chunked("kda", inputs, PACKED).values())
    operator = make_operator("kda", inputs, PACKED)
    assert not any(tensor.requires_grad for tensor in operator.outgoing(None, with_transition=True))
    assert not operator.incoming_gradient(*(tensor[:205] for tensor in outer_gradients(inputs)[:1]), None).requires_grad


def test_chunks_hold_every_token_once_and_zeros_elsewhere() -> None:
    lengths = (1, 9, 4, 8, 5)
    chunks = chunk_map(lengths, chunk_size=4, device=torch.device("cpu"))
    rows = torch.arange(1.0, 28.0)[:, None, None].expand(27, 2, 3)
    split = chunks.split(rows, torch.float64)
    assert split.shape == (chunks.num_chunks, 2, 4, 3) == (9, 2, 4, 3)
    assert torch.equal(chunks.join(split), rows.double())
    assert split.sum() == rows.sum()
    assert chunks.step_sizes == (5, 3, 1)
    # Pieces with most chunks come first in every step.
    assert split[:5, 0, 0, 0].tolist() == [2, 15, 23, 1, 11]
    assert split[5:8, 0, 0, 0].tolist() == [6, 19, 27]
