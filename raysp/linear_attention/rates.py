"""How long the local operator's phases take on this device: measured once per kind of call, for the choice of a method."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from planner import LinearAttentionShape, LocalPass
from raysp.attention.merge import accumulation_dtype
from raysp.linear_attention.operator import LocalInputs, LocalOperator

# The phases are linear in the tokens but for a start that long calls do not feel.
_TOKENS = {"cuda": 8192, "cpu": 512}
_REPETITIONS = 3

MakeOperator = Callable[[LocalInputs], LocalOperator]


def measure_local_times(
    shape: LinearAttentionShape, make: MakeOperator, *, dtype: torch.dtype, device: torch.device
) -> tuple[list[float], list[float]]:
    """Seconds per token of the phases of a forward and of a backward pass: least of some runs.

    Args:
        shape: Of the layer.
        make: The operator.
        dtype: Of the rows.
        device: This rank's.

    Returns:
        For each pass the fields of a ``LocalPass`` in their order, per token.
    """
    num_tokens = _TOKENS.get(device.type, _TOKENS["cpu"])
    inputs = _random_inputs(shape, num_tokens, dtype, device)
    runs = [_phases(make, inputs, device) for _ in range(_REPETITIONS + 1)][1:]
    forward, backward = ([min(times) for times in zip(*passes, strict=True)] for passes in zip(*runs, strict=True))
    return [value / num_tokens for value in forward], [value / num_tokens for value in backward]


def local_pass(per_token_s: list[float], num_tokens: int) -> LocalPass:
    """The phases of a rank with ``num_tokens`` tokens."""
    whole_s, summary_s, intra_s, transition_s = (value * num_tokens for value in per_token_s)
    return LocalPass(whole_s=whole_s, summary_s=summary_s, intra_s=intra_s, transition_s=transition_s)


def _phases(make: MakeOperator, inputs: LocalInputs, device: torch.device) -> tuple[list[float], list[float]]:
    """Seconds of: the whole pass, the summary, the work ahead, and the transition beyond them; forward and backward."""
    dtype = accumulation_dtype(inputs.q.dtype)
    states = inputs.q.new_zeros(1, *inputs.q.shape[1:], inputs.v.shape[2], dtype=dtype)
    dout = torch.ones_like(inputs.v)
    operator, again, backward = make(inputs), make(inputs), make(inputs)
    summary_s = _timed_s(lambda: operator.outgoing(None, with_transition=False), device)
    intra_s = _timed_s(operator.work_ahead, device)
    rest_s = _timed_s(lambda: operator.output(states), device)
    both_s = _timed_s(lambda: again.outgoing(None, with_transition=True), device)
    forward = [summary_s + intra_s + rest_s, summary_s, intra_s, max(0.0, both_s - summary_s)]
    summary_s = _timed_s(lambda: backward.incoming_gradient(dout, None), device)
    intra_s = _timed_s(lambda: backward.gradient_work_ahead(states, dout), device)
    rest_s = _timed_s(lambda: backward.gradients(states, dout, states), device)
    return forward, [summary_s + intra_s + rest_s, summary_s, intra_s, 0.0]


def _timed_s(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start_s = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start_s


def _random_inputs(
    shape: LinearAttentionShape, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> LocalInputs:
    generator = torch.Generator().manual_seed(0)
    rows = (num_tokens, shape.num_heads)

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(device=device, dtype=dtype)

    decays = {"none": None, "constant": rows, "head": rows, "channel": (*rows, shape.key_size)}
    decay = decays[shape.decay]
    return LocalInputs(
        q=drawn(*rows, shape.key_size),
        k=normalize(drawn(*rows, shape.key_size), dim=-1),
        v=drawn(*rows, shape.value_size),
        log_decay=None if decay is None else logsigmoid(drawn(*decay) + 3),
        beta=torch.sigmoid(drawn(*rows)) if shape.rule == "delta" else None,
        rule=shape.rule,
        scale=1.0,
        piece_lengths=(num_tokens,),
    )
