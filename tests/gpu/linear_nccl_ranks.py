"""What single ranks do in the NCCL linear attention tests; apart from them, so that spawned ranks can import it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from rank_pair import NUM_RANKS
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from raysp.attention import SequenceLayout
from raysp.comm import Communicators
from raysp.linear_attention import naive_linear_attention, parallel_linear_attention

METHODS = ("lasp2", "lasp1", "zeco", "ulysses", "auto")
LENGTHS = (1, 63, 127, 300)
# Rule, and dims of the log decay.
FAMILIES = {
    "basic": ("additive", ""),
    "mamba2": ("additive", "TH"),
    "gla": ("additive", "THK"),
    "deltanet": ("delta", ""),
    "gated_deltanet": ("delta", "TH"),
    "kda": ("delta", "THK"),
}
_HEADS, _KEYS, _VALUES = 4, 64, 64


@dataclass(frozen=True)
class LinearCase:
    """One problem."""

    family: str
    method: str
    dtype: str
    lengths: tuple[int, ...] = LENGTHS
    kernel: str = "torch"


def all_cases() -> list[LinearCase]:
    """Every family with every method, packed and as one document, in fp32; lasp2 in bf16, on every kernel, as well."""
    cases = [LinearCase(family, method, "float32") for family in FAMILIES for method in METHODS]
    for kernel in ("torch", *(["fla"] if importlib.util.find_spec("fla") else [])):
        for family in FAMILIES:
            cases += [LinearCase(family, "lasp2", "bfloat16", lengths, kernel) for lengths in (LENGTHS, (500,))]
    return cases


def relative_errors(comms: Communicators, case: LinearCase) -> dict[str, float]:
    """Largest difference to the recurrence in fp64 on this rank's rows, over the largest value, by name."""
    rule, _ = FAMILIES[case.family]
    inputs, dout = _inputs(case, comms.device)
    exact = {name: tensor.double().requires_grad_() for name, tensor in inputs.items()}
    truth, _ = naive_linear_attention(**exact, rule=rule, lengths=case.lengths)
    expected = (truth, *torch.autograd.grad(truth, list(exact.values()), dout.double()))
    layout = SequenceLayout(case.lengths, NUM_RANKS, order="contiguous")
    rows = layout.token_indices(comms.global_rank).to(comms.device)
    leaves = {name: tensor[rows].requires_grad_() for name, tensor in inputs.items()}
    group = comms.communicator(range(NUM_RANKS))
    out, _ = parallel_linear_attention(
        **leaves, rule=rule, layout=layout, group=group, method=case.method, kernel=case.kernel
    )
    found = (out, *torch.autograd.grad(out, list(leaves.values()), dout[rows]))
    return {
        name: float((a.detach().double() - b.detach()[rows]).abs().max() / b.detach().abs().max())
        for name, a, b in zip(("out", *inputs), found, expected, strict=True)
    }


def _inputs(case: LinearCase, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)
    rows = (sum(case.lengths), _HEADS)
    rule, decay = FAMILIES[case.family]

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    inputs = {"q": drawn(*rows, _KEYS), "k": normalize(drawn(*rows, _KEYS), dim=-1), "v": drawn(*rows, _VALUES)}
    if rule == "delta":
        inputs["beta"] = torch.sigmoid(drawn(*rows))
    inputs = {name: tensor.to(device=device, dtype=dtype) for name, tensor in inputs.items()}
    if decay:
        shape = rows if decay == "TH" else (*rows, _KEYS)
        inputs["log_decay"] = logsigmoid(drawn(*shape) + 3).to(device)
    return inputs, drawn(*rows, _VALUES).to(device=device, dtype=dtype)


def _tune_little() -> None:
    """Let fla's kernels choose among two configurations each; compiling all of them takes many minutes."""
    import triton.runtime.autotuner as autotuner

    def few(self: Any, arguments: dict[str, Any]) -> list[Any]:
        plain = sorted(all_configs(self, arguments), key=lambda config: (abs(config.num_warps - 4), config.num_stages))
        return plain[:2]

    all_configs = autotuner.Autotuner.prune_configs
    autotuner.Autotuner.prune_configs = few


def run_cases(comms: Communicators) -> dict[LinearCase, dict[str, float]]:
    """Errors of every case on this rank."""
    if comms.device.type == "cuda":
        _tune_little()
    return {case: relative_errors(comms, case) for case in all_cases()}
