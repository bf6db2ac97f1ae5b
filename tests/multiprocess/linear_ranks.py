"""What single ranks do in the linear attention tests: run a method on their rows and hand the results back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from linear_families import FAMILIES, draw_inputs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from planner import LinearAttentionShape
from raysp.attention import SequenceLayout, relayout
from raysp.comm import Communicators
from raysp.errors import InputError
from raysp.linear_attention import naive_linear_attention, parallel_linear_attention, short_convolution
from raysp.linear_attention.chooser import choose
from raysp.linear_attention.torch_operator import TorchOperator

WHOLE = ("initial_state", "final_state")


@dataclass(frozen=True)
class LinearCase:
    """One problem, equal on all ranks."""

    family: str
    lengths: tuple[int, ...]
    causal: bool = True
    dtype: torch.dtype = torch.float64


def make_inputs(case: LinearCase) -> dict[str, Tensor]:
    """Inputs of all tokens, and the gradients ``dout`` and ``dfinal``."""
    inputs = draw_inputs(case.family, case.lengths, seed=0, dtype=case.dtype)
    generator = torch.Generator().manual_seed(1)
    states = inputs["initial_state"].shape
    inputs["dout"] = torch.randn(inputs["v"].shape, generator=generator, dtype=torch.float64).to(case.dtype)
    inputs["dfinal"] = torch.randn(states, generator=generator, dtype=torch.float64)
    return inputs


def reference(case: LinearCase) -> dict[str, Tensor]:
    """Output, final state and gradients of the recurrence on one rank, by name."""
    inputs = make_inputs(case)
    dout, dfinal = inputs.pop("dout"), inputs.pop("dfinal")
    leaves = {name: tensor.double().requires_grad_() for name, tensor in inputs.items()}
    out, final = naive_linear_attention(
        **leaves, rule=FAMILIES[case.family].rule, lengths=case.lengths, causal=case.causal
    )
    gradients = torch.autograd.grad([out, final], list(leaves.values()), [dout.double(), dfinal])
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), "final_state": final.detach(), **named}


def run_method(
    comms: Communicators, case: LinearCase, degree: int, method: str, wrap: str = ""
) -> dict[str, Tensor] | None:
    """This rank's results by name; gradients of what every rank holds whole are this rank's parts.

    ``wrap``: ``checkpoint`` runs the call again in its backward, ``autocast`` under bf16 autocast.
    """
    if comms.global_rank >= degree:
        return None
    layout = SequenceLayout(case.lengths, degree, order="contiguous")
    tokens = layout.token_indices(comms.global_rank)
    inputs = make_inputs(case)
    dout, dfinal = inputs.pop("dout")[tokens], inputs.pop("dfinal")
    num_tokens = sum(case.lengths)
    leaves = {
        name: (tensor[tokens] if tensor.shape[0] == num_tokens and name not in WHOLE else tensor).requires_grad_()
        for name, tensor in inputs.items()
    }

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        out, final = parallel_linear_attention(
            **dict(zip(leaves, tensors, strict=True)),
            rule=FAMILIES[case.family].rule,
            layout=layout,
            group=comms.communicator(range(degree)),
            method=method,
            causal=case.causal,
            output_final_state=True,
        )
        assert final is not None
        return out, final

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=wrap == "autocast"):
        if wrap == "checkpoint":
            out, final = checkpoint(run, *leaves.values(), use_reentrant=False)
        else:
            out, final = run(*leaves.values())
    # The objective is the sum over ranks: each takes another share of the final state's.
    share = 2 * (comms.global_rank + 1) / (degree * (degree + 1))
    gradients = torch.autograd.grad([out, final], list(leaves.values()), [dout, (share * dfinal).to(final.dtype)])
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), "final_state": final.detach(), **named}


def run_convolution(
    comms: Communicators, lengths: tuple[int, ...], width: int, degree: int
) -> dict[str, Tensor] | None:
    """This rank's output and gradients of a short convolution."""
    if comms.global_rank >= degree:
        return None
    layout = SequenceLayout(lengths, degree, order="contiguous")
    tokens = layout.token_indices(comms.global_rank)
    x, weight, bias, dout = convolution_inputs(lengths, width)
    leaves = [x[tokens].requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    out = short_convolution(*leaves, layout=layout, group=comms.communicator(range(degree)))
    dx, dweight, dbias = torch.autograd.grad(out, leaves, dout[tokens])
    return {"out": out.detach(), "dx": dx, "dweight": dweight, "dbias": dbias}


def convolution_inputs(lengths: tuple[int, ...], width: int) -> tuple[Tensor, ...]:
    """x, weight, bias and the gradient of the output of all tokens."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(lengths), 3), (3, width), (3,), (sum(lengths), 3))
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)


def run_relayout(comms: Communicators, lengths: tuple[int, ...]) -> bool:
    """Whether rows reach the places of the other order, and their gradients the way back."""
    degree = comms.world_size
    orders = ("contiguous", "zigzag")
    source, target = (SequenceLayout(lengths, degree, order) for order in orders)
    here, there = source.token_indices(comms.global_rank), target.token_indices(comms.global_rank)
    x = here.double().unsqueeze(1).requires_grad_()
    y = torch.stack([here, -here], dim=1).double()
    moved, other = relayout(x, y, source=source, target=target, group=comms.communicator(range(degree)))
    moved.backward(2.0 * there.double().unsqueeze(1))
    arrived = torch.equal(moved[:, 0], there.double()) and torch.equal(other[:, 1], -there.double())
    return arrived and torch.equal(x.grad, 2.0 * x.detach())


def sent_bytes(comms: Communicators, case: LinearCase, degree: int, method: str) -> tuple[int, int] | None:
    """Bytes this rank sends forward, and backward."""
    if comms.global_rank >= degree:
        return None
    communicator = comms.communicator(range(degree))
    assert communicator is not None
    layout = SequenceLayout(case.lengths, degree, order="contiguous")
    tokens = layout.token_indices(comms.global_rank)
    inputs = make_inputs(case)
    rows = {
        name: tensor[tokens].requires_grad_() if tensor.shape[0] == sum(case.lengths) else tensor
        for name, tensor in inputs.items()
        if name in ("q", "k", "v", "log_decay", "beta")
    }
    communicator.counter.reset()
    out, _ = parallel_linear_attention(
        **rows, rule=FAMILIES[case.family].rule, layout=layout, group=communicator, method=method
    )
    forward = communicator.counter.sent_bytes
    out.sum().backward()
    return forward, communicator.counter.sent_bytes - forward


def automatic_choice(comms: Communicators, lengths: tuple[int, ...]) -> tuple[str, str] | None:
    """The method that ``auto`` takes for a layer on these documents, and its reason."""
    layout = SequenceLayout(lengths, comms.world_size, order="contiguous")
    group = comms.communicator(range(comms.world_size))
    assert group is not None
    shape = LinearAttentionShape(num_heads=4, key_size=16, value_size=16, rule="delta", decay="head")
    choice = choose(
        "auto", layout=layout, group=group, shape=shape, causal=True, make=TorchOperator, dtype=torch.float32,
        device=comms.device,
    )  # fmt: skip
    return None if choice.decision is None else (choice.method, choice.decision.reason)


def outputs_with_and_without_future(
    comms: Communicators, case: LinearCase, token: int, degree: int, method: str
) -> tuple[Tensor, Tensor]:
    """This rank's output before and after all inputs of ``token`` change."""
    layout = SequenceLayout(case.lengths, degree, order="contiguous")
    tokens = layout.token_indices(comms.global_rank)
    outputs = []
    for shift in (0.0, 1.0):
        inputs = make_inputs(case)
        rows = {name: inputs[name] for name in ("q", "k", "v", "log_decay", "beta") if name in inputs}
        for name, tensor in rows.items():
            tensor[token] += -shift if name == "log_decay" else shift
        out, _ = parallel_linear_attention(
            **{name: tensor[tokens] for name, tensor in rows.items()},
            rule=FAMILIES[case.family].rule,
            layout=layout,
            group=comms.communicator(range(degree)),
            method=method,
        )
        outputs.append(out)
    return outputs[0], outputs[1]


def error_of_second_derivative(comms: Communicators, case: LinearCase, causal: bool) -> str:
    """What autograd says where a gradient of a gradient is asked for, the first being one of ones."""
    layout = SequenceLayout(case.lengths, comms.world_size, order="contiguous")
    tokens = layout.token_indices(comms.global_rank)
    inputs = make_inputs(case)
    q, k, v = (inputs[name][tokens].requires_grad_() for name in "qkv")
    group = comms.communicator(range(comms.world_size))
    out, _ = parallel_linear_attention(q, k, v, layout=layout, group=group, method="lasp2", causal=causal)
    try:
        torch.autograd.grad(out.sum(), q, create_graph=True)
    except InputError as error:
        return str(error)
    return ""
