"""The recurrence of linear attention, token by token: the truth that every chunked operator is tested against.

Symbols: T tokens of packed documents, H heads, K key size, V value size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raysp.linear_attention.checks import check_rule


def naive_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    rule: str = "additive",
    scale: float | None = None,
    lengths: Sequence[int],
    initial_state: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attend linearly to whole documents, in plain differentiable torch and in the dtype of the inputs.

    Args:
        q: ``[T, H, K]``, documents one after the other.
        k: ``[T, H, K]``.
        v: ``[T, H, V]``.
        log_decay: ``None``, ``[H]``, ``[T, H]`` or ``[T, H, K]``, at most 0; applied before the token's own update.
        beta: ``[T, H]``, the strength of the update; with the delta rule only.
        rule: ``additive`` adds ``k v^T`` to the state, ``delta`` replaces what the state answers to ``k``.
        scale: Factor of the output; ``K**-0.5`` by default.
        lengths: Tokens of every document; their sum is T.
        initial_state: ``[len(lengths), H, K, V]`` the state every document starts from; zero by default.
        causal: A token sees its document up to itself; otherwise all of it, which needs the additive rule and no decay.

    Returns:
        Outputs ``[T, H, V]`` and final states ``[len(lengths), H, K, V]``.

    Raises:
        InputError: An unknown rule, or an argument that the rule or ``causal`` does not allow.

    Source:
        Gated DeltaNet (arXiv:2412.06464), table 1; GLA (arXiv:2312.06635).
    """
    check_rule(rule, log_decay, beta, causal=causal)
    num_heads, key_size = q.shape[1:]
    scale = key_size**-0.5 if scale is None else scale
    if initial_state is None:
        initial_state = v.new_zeros(len(lengths), num_heads, key_size, v.shape[2])
    decay = None if log_decay is None else _row_decay(log_decay, len(q))
    outs, finals = [v[:0]], [initial_state[:0]]
    start = 0
    for state, length in zip(initial_state, lengths, strict=True):
        tokens = range(start, start + length)
        if not causal:
            rows = slice(start, start + length)
            state = state + torch.einsum("thk,thv->hkv", k[rows], v[rows])
        for t in tokens:
            if causal:
                if decay is not None:
                    state = decay[t] * state
                value = v[t]
                if beta is not None:
                    value = beta[t, :, None] * (value - _read(state, k[t]))
                state = state + k[t, :, :, None] * value[:, None, :]
            outs.append(scale * _read(state, q[t])[None])
        finals.append(state[None])
        start += length
    return torch.cat(outs), torch.cat(finals)


def _read(state: Tensor, query: Tensor) -> Tensor:
    """What the state ``[H, K, V]`` answers to ``[H, K]``: ``[H, V]``."""
    return (query[:, :, None] * state).sum(1)


def _row_decay(log_decay: Tensor, num_tokens: int) -> Tensor:
    """``[T, H, 1 or K, 1]`` factors of the rows of the state."""
    if log_decay.ndim == 1:
        log_decay = log_decay.expand(num_tokens, -1)
    if log_decay.ndim == 2:
        log_decay = log_decay[:, :, None]
    return log_decay.exp()[..., None]
