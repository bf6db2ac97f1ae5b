"""One rank's work in plain torch, chunk by chunk: every family, any dtype, any device.

The piece whose state or gradient other ranks wait for is worked on first, apart from the others. Every chunk is brought to
maps of the state before it (``additive``, ``delta``), and a scan (``chunk_scan``) finds those states. Nothing but the inputs
needs to be kept between a forward and a backward pass.

Symbols: see ``operator``; N chunks, C tokens of a chunk.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cached_property
from operator import itemgetter

import torch
from torch import Tensor

from raysp.attention.merge import accumulation_dtype
from raysp.linear_attention.additive import AdditiveChunks, ChunkRule, StateGradients
from raysp.linear_attention.chunk_scan import scan_gradients, scan_states, transition_product
from raysp.linear_attention.chunks import ChunkMap, Rows, chunk_map, concatenated
from raysp.linear_attention.delta import DeltaChunks
from raysp.linear_attention.operator import LocalGradients, LocalInputs

_CHUNK_SIZE = 64
# Numbers of q in the chunks that are worked on at once; bounds the memory of what is only needed inside a chunk.
_BLOCK_NUMEL = 2**22


class TorchOperator:
    """See ``LocalOperator``."""

    def __init__(self, inputs: LocalInputs) -> None:
        self._inputs = inputs
        self._dtype = accumulation_dtype(inputs.q.dtype)
        self._cuts = {0}
        self._parts: list[_Part] = []
        self._cut(len(inputs.piece_lengths))
        self._last_scan: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def outgoing(self, initial: Tensor | None, *, with_transition: bool) -> tuple[Tensor, Tensor | None]:
        """See ``LocalOperator``; without tokens a state passes unchanged."""
        self._cut(max(0, len(self._inputs.piece_lengths) - 1))
        state, transition = self._state_or_zero(initial), self._identity()
        for part in self._parts[-1:]:
            scan = part.states(state[None])
            state = scan[1][0]
            if initial is not None:
                self._last_scan = scan
            if with_transition:
                transition = transition_product(part.transition).expand_as(transition)
        return state, transition if with_transition else None

    @torch.no_grad()
    def work_ahead(self) -> None:
        """See ``LocalOperator``."""
        for part in self._parts:
            _ = part.output_map

    @torch.no_grad()
    def output(self, initial_states: Tensor) -> tuple[Tensor, Tensor]:
        """See ``LocalOperator``."""
        out = torch.empty_like(self._inputs.v, memory_format=torch.contiguous_format)
        finals = torch.empty_like(initial_states)
        for part in self._parts:
            scan = self._last_scan if part is self._parts[-1] else None
            states, finals[part.pieces] = scan or part.states(initial_states[part.pieces])
            readout, local = part.output_map
            out[part.tokens] = part.chunks.join(local + readout @ states)
        return out, finals

    @torch.no_grad()
    def incoming_gradient(self, dout: Tensor, dfinal: Tensor | None) -> Tensor:
        """See ``LocalOperator``; without tokens a gradient passes unchanged."""
        self._cut(min(1, len(self._inputs.piece_lengths)))
        gradient = self._state_or_zero(dfinal)
        for part in self._parts[:1]:
            gradient = part.state_gradients(dout, gradient[None])[1][0]
        return gradient

    @torch.no_grad()
    def gradient_work_ahead(self, initial_states: Tensor, dout: Tensor) -> None:
        """See ``LocalOperator``."""
        for part in self._parts:
            part.reads(dout)
            part.remember_states(initial_states[part.pieces])

    @torch.no_grad()
    def gradients(self, initial_states: Tensor, dout: Tensor, dfinals: Tensor) -> LocalGradients:
        """See ``LocalOperator``."""
        rows = _rows(self._inputs)
        found, dinitials = [], [initial_states[:0]]
        for part in self._parts:
            chunks, dinitial = part.gradients(initial_states[part.pieces], dout, dfinals[part.pieces])
            found.append(chunks.map(part.chunks.join))
            dinitials.append(dinitial)
        if found:
            rows = found[0].map(concatenated, *found[1:]).map(lambda gradient, x: gradient.to(x.dtype), rows)
        return LocalGradients(**vars(rows), initial_states=torch.cat(dinitials))

    def _cut(self, piece: int) -> None:
        """Begin a part with ``piece``; parts start anew then, so this comes before their work."""
        if piece not in self._cuts:
            self._cuts.add(piece)
            bounds = itertools.pairwise(sorted(self._cuts))
            self._parts = [_Part(self._inputs, slice(*bound), self._dtype) for bound in bounds]

    def _state_or_zero(self, state: Tensor | None) -> Tensor:
        """``[H, K, V]``."""
        q, v = self._inputs.q, self._inputs.v
        return q.new_zeros(*q.shape[1:], v.shape[2], dtype=self._dtype) if state is None else state

    def _identity(self) -> Tensor:
        """The transition of no tokens."""
        ones = self._inputs.q.new_ones(self._inputs.q.shape[1:], dtype=self._dtype)
        return ones.diag_embed() if self._inputs.rule == "delta" else ones


class _Part:
    """Consecutive pieces in all phases of a pass; what several phases need is computed by the first.

    Attributes:
        pieces: Which ones.
        tokens: Their tokens.
    """

    def __init__(self, inputs: LocalInputs, pieces: slice, dtype: torch.dtype) -> None:
        self._inputs = inputs
        self._dtype = dtype
        self.pieces = pieces
        start = sum(inputs.piece_lengths[: pieces.start])
        self.tokens = slice(start, start + sum(inputs.piece_lengths[pieces]))
        self._reads: tuple[Tensor, Tensor] | None = None
        self._remembered: Tensor | None = None

    @cached_property
    def chunks(self) -> ChunkMap:
        """Where their tokens lie in chunks."""
        lengths = tuple(self._inputs.piece_lengths[self.pieces])
        return chunk_map(lengths, chunk_size=_CHUNK_SIZE, device=self._inputs.q.device)

    @cached_property
    def transition(self) -> Tensor:
        """Of every chunk; see ``ChunkRule``."""
        return concatenated(*(rule.transition for _, rule in self._blocks))

    @cached_property
    def output_map(self) -> tuple[Tensor, Tensor]:
        """Of every chunk; see ``ChunkRule``."""
        maps = [rule.output_map() for _, rule in self._blocks]
        return concatenated(*(readout for readout, _ in maps)), concatenated(*(local for _, local in maps))

    def states(self, initial: Tensor) -> tuple[Tensor, Tensor]:
        """States before every chunk ``[N, H, K, V]`` and after every piece."""
        return scan_states(self.transition, self._update, initial, self.chunks)

    def reads(self, dout: Tensor) -> tuple[Tensor, Tensor]:
        """``dout`` in chunks ``[N, H, C, V]`` and what it adds to the gradients of the states before them."""
        if self._reads is None:
            chunks = self.chunks.split(dout[self.tokens], self._dtype)
            self._reads = chunks, concatenated(*(rule.readout().mT @ chunks[block] for block, rule in self._blocks))
        return self._reads

    def state_gradients(self, dout: Tensor, dfinal: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the states after every chunk ``[N, H, K, V]`` and before every piece."""
        return scan_gradients(self.transition, self.reads(dout)[1], dfinal, self.chunks)

    def remember_states(self, initial: Tensor) -> Tensor:
        """States before every chunk, for ``gradients``."""
        if self._remembered is None:
            self._remembered, _ = self.states(initial)
        return self._remembered

    def gradients(self, initial: Tensor, dout: Tensor, dfinal: Tensor) -> tuple[Rows, Tensor]:
        """Gradients of the inputs, in chunks, and of the states before every piece."""
        states = self.remember_states(initial)
        dstates, dinitial = self.state_gradients(dout, dfinal)
        douts, _ = self.reads(dout)
        found = [
            rule.gradients(StateGradients(states[block], dstates[block], douts[block])) for block, rule in self._blocks
        ]
        rows = found[0].map(concatenated, *found[1:])
        return replace(rows, q=rows.q * self._inputs.scale), dinitial

    @cached_property
    def _update(self) -> Tensor:
        return concatenated(*(rule.update for _, rule in self._blocks))

    @cached_property
    def _blocks(self) -> list[tuple[slice, ChunkRule]]:
        """The rule of some consecutive chunks each."""
        rows = _rows(self._inputs).map(lambda part: self.chunks.split(part[self.tokens], self._dtype))
        rows = replace(rows, q=rows.q * self._inputs.scale)
        make = DeltaChunks if self._inputs.rule == "delta" else AdditiveChunks
        size = max(1, _BLOCK_NUMEL // rows.q[0].numel())
        blocks = [slice(start, start + size) for start in range(0, self.chunks.num_chunks, size)]
        return [(block, make(rows.map(itemgetter(block)))) for block in blocks]


def _rows(inputs: LocalInputs) -> Rows:
    return Rows(inputs.q, inputs.k, inputs.v, inputs.log_decay, inputs.beta)
