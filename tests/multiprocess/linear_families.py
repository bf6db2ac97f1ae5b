"""The families of linear attention that tests cover, and random inputs for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

NUM_HEADS, KEY_SIZE, VALUE_SIZE = 2, 8, 6


@dataclass(frozen=True)
class Family:
    """One kind of linear attention.

    Attributes:
        rule: Of the update.
        decay: Dims of its log decay: ``""`` for none, ``"H"``, ``"TH"`` or ``"THK"``.
    """

    rule: str
    decay: str


FAMILIES = {
    "basic": Family("additive", ""),
    "retention": Family("additive", "H"),
    "mamba2": Family("additive", "TH"),
    "gla": Family("additive", "THK"),
    "deltanet": Family("delta", ""),
    "gated_deltanet": Family("delta", "TH"),
    "kda": Family("delta", "THK"),
}


def draw_inputs(
    family: str,
    lengths: Sequence[int],
    *,
    seed: int,
    dtype: torch.dtype = torch.float64,
    num_heads: int = NUM_HEADS,
    key_size: int = KEY_SIZE,
    value_size: int = VALUE_SIZE,
) -> dict[str, Tensor]:
    """Random tensor arguments of ``naive_linear_attention``, by name.

    Keys have norm 1, as the delta rule needs them. Decays ``[H]`` are RetNet's; others mild on most tokens, strong on some.

    Args:
        family: A key of ``FAMILIES``.
        lengths: Tokens of every document.
        seed: Of the random numbers.
        dtype: Of all rows; states are fp64 with fp64, else fp32.
        num_heads: H.
        key_size: K.
        value_size: V.
    """
    kind = FAMILIES[family]
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = sum(lengths), num_heads
    inputs = {"q": draw(*rows, key_size), "k": normalize(draw(*rows, key_size), dim=-1), "v": draw(*rows, value_size)}
    sizes = {"T": rows[0], "H": num_heads, "K": key_size}
    if kind.decay == "H":
        inputs["log_decay"] = torch.log1p(-(2.0 ** -torch.arange(5, 5 + num_heads, dtype=torch.float64)))
    elif kind.decay:
        inputs["log_decay"] = logsigmoid(3 * draw(*(sizes[dim] for dim in kind.decay)) + 3)
    if kind.rule == "delta":
        inputs["beta"] = torch.sigmoid(draw(*rows))
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    initial = draw(len(lengths), num_heads, key_size, value_size)
    inputs["initial_state"] = initial if dtype == torch.float64 else initial.float()
    return inputs
