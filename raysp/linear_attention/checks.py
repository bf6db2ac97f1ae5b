"""Arguments that linear attention over shards cannot use, each refused with what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from planner.linear_attention_work import RULES
from raysp.attention import SequenceLayout
from raysp.errors import InputError
from raysp.linear_attention.chains import local_pieces

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, rule: str, *,
    layout: SequenceLayout, group_rank: int, causal: bool, initial_state: Tensor | None,
) -> None:  # fmt: skip
    """Check what ``parallel_linear_attention`` got on one rank.

    Raises:
        InputError: Names the argument, what it is and what was expected.
    """
    local_pieces(layout, group_rank)  # refuses a layout whose rows are not in order
    _check_rows(q, k, v, layout.local_tokens(group_rank), group_rank)
    num_tokens, num_heads, key_size = q.shape
    _check_gate("log_decay", log_decay, q, ([num_heads], [num_tokens, num_heads], [num_tokens, num_heads, key_size]))
    _check_gate("beta", beta, q, ([num_tokens, num_heads],))
    check_rule(rule, log_decay, beta, causal=causal)
    if initial_state is not None:
        expected = [len(layout.lengths), num_heads, key_size, v.shape[2]]
        if list(initial_state.shape) != expected:
            raise InputError(
                f"initial_state is {list(initial_state.shape)}; expected {expected}: documents, heads, key and value size, "
                "whole on every rank."
            )
        if not initial_state.dtype.is_floating_point or initial_state.device != q.device:
            raise InputError(
                f"initial_state is {initial_state.dtype} on {initial_state.device}; expected a floating-point tensor on "
                f"{q.device}, where q is."
            )


def check_rule(rule: str, log_decay: Tensor | None, beta: Tensor | None, *, causal: bool) -> None:
    """Check that rule, gates and direction go together.

    Raises:
        InputError: Names what does not.
    """
    if rule not in RULES:
        raise InputError(f"rule {rule!r} is unknown; expected one of {', '.join(RULES)}.")
    if (beta is None) != (rule == "additive"):
        raise InputError(
            f"rule {rule!r} with{'out' if beta is None else ''} beta; expected beta with rule 'delta' and none with "
            "'additive'."
        )
    if not causal and (rule != "additive" or log_decay is not None):
        raise InputError(
            f"causal = False with rule {rule!r} and {'no' if log_decay is None else 'a'} decay; expected the additive rule "
            "without decay, as what is not causal has no order. Run them once along and once against the tokens."
        )


def _check_rows(q: Tensor, k: Tensor, v: Tensor, num_rows: int, group_rank: int) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.dim() != 3 or q.shape != k.shape or v.dim() != 3 or v.shape[:2] != q.shape[:2]:
        raise InputError(f"shapes {shapes}; expected q, k both [tokens, H, K] and v [tokens, H, V].")
    if q.shape[0] != num_rows:
        raise InputError(
            f"shapes {shapes} on group rank {group_rank}; expected {num_rows} rows, the layout's local_tokens. Select rows "
            "with layout.token_indices(group_rank)."
        )
    if 0 in (*q.shape[1:], v.shape[2]):
        raise InputError(f"shapes {shapes}; expected at least one head and sizes of at least 1.")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _DTYPES:
        raise InputError(
            f"dtypes q {q.dtype}, k {k.dtype}, v {v.dtype}; expected one floating-point dtype: fp64, fp32, bf16 or fp16."
        )
    if not q.device == k.device == v.device:
        raise InputError(f"devices q {q.device}, k {k.device}, v {v.device}; expected one device.")


def _check_gate(name: str, gate: Tensor | None, q: Tensor, shapes: tuple[list[int], ...]) -> None:
    if gate is None:
        return
    if list(gate.shape) not in shapes:
        raise InputError(
            f"{name} is {list(gate.shape)} with q {list(q.shape)}; expected {' or '.join(str(shape) for shape in shapes)}."
        )
    if not gate.dtype.is_floating_point or gate.device != q.device:
        raise InputError(
            f"{name} is {gate.dtype} on {gate.device}; expected a floating-point tensor on {q.device}, where q is."
        )
