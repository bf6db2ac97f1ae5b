"""The recurrence against closed forms that need no state."""

from __future__ import annotations

import pytest
import torch
from linear_families import FAMILIES, draw_inputs
from torch import Tensor

from raysp.errors import InputError
from raysp.linear_attention import naive_linear_attention

LENGTHS = (5, 1, 9)


def documents(lengths: tuple[int, ...]) -> list[slice]:
    stops = [sum(lengths[: place + 1]) for place in range(len(lengths))]
    return [slice(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]


def decays(log_decay: Tensor | None, shape: torch.Size) -> Tensor:
    """``[T, H, K]`` log decays of one document."""
    if log_decay is None:
        return torch.zeros(shape, dtype=torch.float64)
    return log_decay.reshape(*log_decay.shape, *[1] * (3 - log_decay.ndim)).expand(shape)


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.rule == "additive"])
def test_additive_rule_is_decayed_attention_without_softmax(family: str) -> None:
    inputs = draw_inputs(family, LENGTHS, seed=0)
    out, final = naive_linear_attention(**inputs, scale=0.3, lengths=LENGTHS)
    for place, rows in enumerate(documents(LENGTHS)):
        q, k, v, initial = inputs["q"][rows], inputs["k"][rows], inputs["v"][rows], inputs["initial_state"][place]
        log_decay = inputs.get("log_decay")
        if log_decay is not None and log_decay.ndim == 1:
            log_decay = log_decay.expand(len(inputs["q"]), -1)
        c = decays(None if log_decay is None else log_decay[rows], q.shape).cumsum(0)
        mask = torch.ones(len(q), len(q), dtype=torch.float64).tril()
        scores = torch.einsum("ihk,jhk,ijhk->hij", q, k, (c[:, None] - c[None]).exp()) * mask
        expected = torch.einsum("hij,jhv->ihv", scores, v) + torch.einsum("ihk,hkv->ihv", q * c.exp(), initial)
        torch.testing.assert_close(out[rows], 0.3 * expected)
        update = torch.einsum("jhk,jhv->hkv", k * (c[-1] - c).exp(), v)
        torch.testing.assert_close(final[place], c[-1].exp()[..., None] * initial + update)


def test_delta_rule_replaces_what_the_state_answers() -> None:
    v = torch.randn(4, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    k = torch.eye(2, dtype=torch.float64)[[0, 1, 0, 1]][:, None]
    beta = torch.tensor([1.0, 1.0, 1.0, 0.25], dtype=torch.float64)[:, None]
    out, final = naive_linear_attention(k, k, v, beta=beta, rule="delta", scale=1.0, lengths=[4])
    replaced = torch.stack([v[2, 0], 0.75 * v[1, 0] + 0.25 * v[3, 0]])
    torch.testing.assert_close(final[0, 0], replaced)
    torch.testing.assert_close(out[:, 0], torch.stack([v[0, 0], v[1, 0], v[2, 0], replaced[1]]))


def test_delta_rule_decays_the_state_before_it_reads_it() -> None:
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    log_decay = torch.full((1, 1), 0.5, dtype=torch.float64).log()
    beta = torch.full((1, 1), 0.1, dtype=torch.float64)
    _, final = naive_linear_attention(
        one, one, one, log_decay=log_decay, beta=beta, rule="delta", lengths=[1], initial_state=4 * one[None]
    )
    assert final.item() == pytest.approx(0.5 * 4 + 0.1 * (1 - 0.5 * 4))


def test_without_order_every_token_reads_its_whole_document() -> None:
    inputs = draw_inputs("basic", LENGTHS, seed=0)
    out, final = naive_linear_attention(**inputs, lengths=LENGTHS, causal=False)
    for place, rows in enumerate(documents(LENGTHS)):
        state = inputs["initial_state"][place] + torch.einsum("thk,thv->hkv", inputs["k"][rows], inputs["v"][rows])
        torch.testing.assert_close(final[place], state)
        torch.testing.assert_close(
            out[rows], inputs["q"].shape[2] ** -0.5 * torch.einsum("thk,hkv->thv", inputs["q"][rows], state)
        )


@pytest.mark.parametrize("causal", [True, False])
def test_no_documents_give_empty_results(causal: bool) -> None:
    inputs = draw_inputs("basic", (), seed=0)
    out, final = naive_linear_attention(**inputs, lengths=(), causal=causal)
    assert out.shape == inputs["v"].shape
    assert final.shape == inputs["initial_state"].shape


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("basic", {"rule": "softmax"}, "expected one of additive, delta"),
        ("deltanet", {"rule": "additive"}, "with beta"),
        ("basic", {"rule": "delta"}, "without beta"),
        ("gla", {"causal": False}, "no order"),
        ("deltanet", {"rule": "delta", "causal": False}, "no order"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(family: str, changes: dict[str, object], message: str) -> None:
    inputs = draw_inputs(family, LENGTHS, seed=0)
    with pytest.raises(InputError, match=message):
        naive_linear_attention(**inputs, lengths=LENGTHS, **changes)
