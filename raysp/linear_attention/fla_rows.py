"""Rows of a part as flash-linear-attention takes them, and what the parts of both rules are.

Symbols: t tokens of a part, n its pieces, H heads, K key size, V value size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

CHUNK = 64


@dataclass(frozen=True)
class FlaRows:
    """Consecutive pieces of one rank.

    Attributes:
        q: ``[t, H, K]``.
        k: ``[t, H, K]``.
        v: ``[t, H, V]``.
        log_decay: ``None``, ``[t, H]`` or ``[t, H, K]``, fp32.
        beta: ``[t, H]`` or ``None``.
        scale: Factor of the output.
        lengths: Tokens of each piece.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    scale: float
    lengths: tuple[int, ...]

    @property
    def decays_by_channel(self) -> bool:
        """Whether every row of the state has a decay of its own."""
        return self.log_decay is not None and self.log_decay.dim() == 3

    @cached_property
    def packing(self) -> dict[str, Any]:
        """fla's arguments that tell pieces apart; a single piece needs none."""
        if len(self.lengths) == 1:
            return {"cu_seqlens": None, "chunk_indices": None}
        from fla.ops.utils.index import prepare_chunk_indices

        stops = torch.tensor([0, *self.lengths]).cumsum(0)
        starts = stops.to(self.q.device)
        return {"cu_seqlens": starts, "chunk_indices": prepare_chunk_indices(starts, CHUNK, cu_seqlens_cpu=stops)}

    @cached_property
    def decay_sums(self) -> Tensor | None:
        """Sums of the log decays inside chunks, to base 2, ``[1, t, H]`` or ``[1, t, H, K]``."""
        if self.log_decay is None:
            return None
        from fla.ops.utils import chunk_local_cumsum
        from fla.ops.utils.constant import RCP_LN2

        sums: Tensor = chunk_local_cumsum(self.log_decay.unsqueeze(0), chunk_size=CHUNK, scale=RCP_LN2, **self.packing)
        return sums

    @property
    def gates(self) -> dict[str, Tensor | None]:
        """fla's two arguments for decays of heads and of channels."""
        by_channel = self.decays_by_channel
        return {"g": None if by_channel else self.decay_sums, "gk": self.decay_sums if by_channel else None}

    def decay_gradient(self, gradient: Tensor | None) -> Tensor | None:
        """Of the log decays from that of their sums."""
        if gradient is None:
            return None
        from fla.ops.utils import chunk_local_cumsum

        summed: Tensor = chunk_local_cumsum(gradient, chunk_size=CHUNK, reverse=True, **self.packing)
        return summed[0]


@dataclass(frozen=True)
class PartGradients:
    """Gradients of a part's rows ``[t, ...]`` and of its pieces' initial states ``[n, H, K, V]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    initial: Tensor


class FlaPart(Protocol):
    """One rule on consecutive pieces; the phases are those of ``LocalOperator``."""

    def outgoing(self, initial: Tensor | None, *, with_transition: bool) -> tuple[Tensor, Tensor | None]:
        """Of the only piece."""
        ...

    def output(self, initial: Tensor) -> tuple[Tensor, Tensor]:
        """``[t, H, V]`` and final states ``[n, H, K, V]``."""
        ...

    def incoming_gradient(self, dout: Tensor, dfinal: Tensor | None) -> Tensor:
        """Of the only piece."""
        ...

    def gradient_work_ahead(self, initial: Tensor, dout: Tensor) -> None:
        """What ``gradients`` will need of these arguments of it."""
        ...

    def gradients(self, initial: Tensor, dout: Tensor, dfinals: Tensor) -> PartGradients:
        """Of everything."""
        ...
