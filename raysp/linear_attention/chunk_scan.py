"""The scan over the chunks of pieces, ``S_n = M_n S_{n-1} + U_n``, and its transpose for gradients.

All pieces advance together; see ``chunks`` for the order of chunks. A transition M is ``[N, H, 1 or K]``, factors of the rows
of the state, or matrices ``[N, H, K, K]``.

Symbols: N chunks, P pieces, H heads, K key size, V value size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raysp.linear_attention.chunks import ChunkMap


def scan_states(transition: Tensor, update: Tensor, initial: Tensor, chunks: ChunkMap) -> tuple[Tensor, Tensor]:
    """Run states through all chunks.

    Args:
        transition: M of every chunk.
        update: ``[N, H, K, V]``, U of every chunk.
        initial: ``[P, H, K, V]``.
        chunks: Which chunk follows which.

    Returns:
        States before every chunk ``[N, H, K, V]`` and after every piece ``[P, H, K, V]``.
    """
    before = torch.empty_like(update)
    start = initial[chunks.piece_order].flatten(0, 1)
    end = torch.empty_like(start)
    transitions, updates, befores = (_by_step(x, chunks) for x in (transition, update, before))
    befores[0].copy_(start)
    for step, (factor, added, state) in enumerate(zip(transitions, updates, befores, strict=True)):
        going = befores[step + 1] if step + 1 < len(befores) else state[:0]
        size = len(going)
        if size:
            _advance(factor[:size], state[:size], added[:size], out=going)
        if size < len(state):
            _advance(factor[size:], state[size:], added[size:], out=end[size : len(state)])
    return before, _in_piece_order(end, initial, chunks)


def scan_gradients(transition: Tensor, update: Tensor, final: Tensor, chunks: ChunkMap) -> tuple[Tensor, Tensor]:
    """Run gradients of states back through all chunks.

    Args:
        transition: M of every chunk, as in the states' scan.
        update: ``[N, H, K, V]``, what the outputs of a chunk add to the gradient of the state before it.
        final: ``[P, H, K, V]``, gradients of the final states.
        chunks: Which chunk follows which.

    Returns:
        Gradients of the states after every chunk ``[N, H, K, V]`` and before every piece ``[P, H, K, V]``.
    """
    after = torch.empty_like(update)
    end = final[chunks.piece_order].flatten(0, 1)
    start = torch.empty_like(end)
    transposed = transition.mT if transition.ndim == 4 else transition
    transitions, updates, afters = (_by_step(x, chunks) for x in (transposed, update, after))
    size = 0
    for step in reversed(range(len(afters))):
        gradient = afters[step]
        gradient[size:] = end[size : len(gradient)]
        size = len(gradient)
        _advance(transitions[step], gradient, updates[step], out=afters[step - 1][:size] if step else start)
    return after, _in_piece_order(start, final, chunks)


def transition_product(transition: Tensor) -> Tensor:
    """The transition of consecutive chunks as one, ``M_N ... M_1``: ``[H, 1 or K]`` or ``[H, K, K]``."""
    if transition.ndim == 3:
        return transition.prod(0)
    while len(transition) > 1:
        paired = len(transition) // 2 * 2
        products = transition[1:paired:2] @ transition[0:paired:2]
        transition = torch.cat([products, transition[paired:]])
    return transition[0]


def _by_step(x: Tensor, chunks: ChunkMap) -> tuple[Tensor, ...]:
    """The chunks ``[N, H, K, ...]`` of every step, ``[pieces * H, K, ...]``; factors get a column for the values."""
    heads = x.shape[1]
    flat = x.flatten(0, 1)
    return (flat[..., None] if x.ndim == 3 else flat).split([size * heads for size in chunks.step_sizes])


def _advance(transition: Tensor, state: Tensor, update: Tensor, *, out: Tensor) -> None:
    """``M S + U`` of ``[pieces * H, K, V]``, in one kernel: long pieces take many steps."""
    if transition.shape[-1] == 1:
        torch.addcmul(update, transition, state, out=out)
    else:
        torch.baddbmm(update, transition, state, out=out)


def _in_piece_order(states: Tensor, like: Tensor, chunks: ChunkMap) -> Tensor:
    """``[pieces * H, K, V]`` of the pieces in the order of chunks to ``[P, H, K, V]`` in theirs."""
    ordered = torch.empty_like(like)
    ordered[chunks.piece_order] = states.view_as(like)
    return ordered
