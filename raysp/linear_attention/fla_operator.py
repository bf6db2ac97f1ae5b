"""One rank's work with the Triton kernels of flash-linear-attention (``fla-core``): CUDA; bf16, fp16 or fp32.

The first piece, the last and those between run apart, because only the first takes a state and only the last gives one.
Kernels are called below fla's autograd functions, so that a state pass which already began from the true state is not run
again. Imported lazily: ``fla`` needs Triton.

Symbols: see ``operator``.
Source: flash-linear-attention (https://github.com/fla-org/flash-linear-attention), version 0.6.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from raysp.linear_attention.fla_additive import AdditivePart
from raysp.linear_attention.fla_delta import DeltaPart
from raysp.linear_attention.fla_rows import FlaPart, FlaRows, PartGradients
from raysp.linear_attention.operator import LocalGradients, LocalInputs

_FIELDS = ("q", "k", "v", "log_decay", "beta")


@dataclass(frozen=True)
class _Place:
    """Which pieces, and which rows, a part holds."""

    pieces: slice
    rows: slice


class FlaOperator:
    """See ``LocalOperator``."""

    def __init__(self, inputs: LocalInputs) -> None:
        self._inputs = inputs
        self._as_channels = inputs.log_decay is not None and inputs.log_decay.dim() == 2 and needs_channels()
        last = len(inputs.piece_lengths)
        cuts = sorted({0, min(1, last), max(0, last - 1), last})
        bounds = [0, *itertools.accumulate(inputs.piece_lengths)]
        self._places = [
            _Place(slice(first, stop), slice(bounds[first], bounds[stop])) for first, stop in itertools.pairwise(cuts)
        ]
        self._made: dict[int, FlaPart] = {}

    def outgoing(self, initial: Tensor | None, *, with_transition: bool) -> tuple[Tensor, Tensor | None]:
        """See ``LocalOperator``."""
        return self._part(len(self._places) - 1).outgoing(initial, with_transition=with_transition)

    def work_ahead(self) -> None:
        """See ``LocalOperator``: cumulated decays, and the delta rule's systems inside chunks."""
        for index in range(len(self._places)):
            self._part(index)

    def output(self, initial_states: Tensor) -> tuple[Tensor, Tensor]:
        """See ``LocalOperator``."""
        if len(self._places) == 1:
            return self._part(0).output(initial_states)
        out, finals = torch.empty_like(self._inputs.v), torch.empty_like(initial_states)
        for index, place in enumerate(self._places):
            out[place.rows], finals[place.pieces] = self._part(index).output(initial_states[place.pieces])
        return out, finals

    def incoming_gradient(self, dout: Tensor, dfinal: Tensor | None) -> Tensor:
        """See ``LocalOperator``."""
        return self._part(0).incoming_gradient(dout[self._places[0].rows], dfinal)

    def gradient_work_ahead(self, initial_states: Tensor, dout: Tensor) -> None:
        """See ``LocalOperator``: the states before every chunk, and gradients inside chunks."""
        for index, place in enumerate(self._places):
            self._part(index).gradient_work_ahead(initial_states[place.pieces], dout[place.rows])

    def gradients(self, initial_states: Tensor, dout: Tensor, dfinals: Tensor) -> LocalGradients:
        """See ``LocalOperator``."""
        parts = [
            self._part(index).gradients(initial_states[place.pieces], dout[place.rows], dfinals[place.pieces])
            for index, place in enumerate(self._places)
        ]
        rows = {name: self._joined(name, parts) for name in _FIELDS}
        initials = _concatenated([part.initial for part in parts]) if parts else torch.empty_like(initial_states)
        return LocalGradients(**rows, initial_states=initials)  # type: ignore[arg-type]

    def _joined(self, name: str, parts: list[PartGradients]) -> Tensor | None:
        like: Tensor | None = getattr(self._inputs, name)
        if like is None:
            return None
        if not parts:
            return torch.empty_like(like)
        joined = _concatenated([getattr(part, name) for part in parts])
        if name == "log_decay" and self._as_channels:
            joined = joined.sum(-1)
        return joined.to(like.dtype)

    def _part(self, index: int) -> FlaPart:
        if index not in self._made:
            place, inputs = self._places[index], self._inputs
            q, k, v = (x[place.rows].contiguous() for x in (inputs.q, inputs.k, inputs.v))
            decay = None if inputs.log_decay is None else inputs.log_decay[place.rows].float()
            if decay is not None and self._as_channels:
                decay = decay.unsqueeze(-1).expand_as(k)
            part = FlaRows(
                q, k, v,
                log_decay=None if decay is None else decay.contiguous(),
                beta=None if inputs.beta is None else inputs.beta[place.rows].contiguous(),
                scale=inputs.scale,
                lengths=tuple(inputs.piece_lengths[place.pieces]),
            )  # fmt: skip
            self._made[index] = (DeltaPart if inputs.rule == "delta" else AdditivePart)(part)
        return self._made[index]


def _concatenated(tensors: list[Tensor]) -> Tensor:
    """The only one as it is: most ranks of a long document have one part, and its rows need not be copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def needs_channels() -> bool:
    """Whether fla refuses its backward kernel for decays of heads: on Hopper under Triton 3.4 to 3.7.0 it is wrong there."""
    from fla.utils import IS_NVIDIA_HOPPER, TRITON_ABOVE_3_4_0
    from fla.utils import TRITON_ABOVE_3_7_1 as IS_MENDED

    return bool(IS_NVIDIA_HOPPER and TRITON_ABOVE_3_4_0 and not IS_MENDED)
