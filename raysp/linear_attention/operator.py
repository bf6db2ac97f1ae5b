"""What the scans ask of the work that one rank does on its own tokens.

A rank of a contiguous layout holds *pieces* of documents, in order: the first may continue a document from the rank before,
the last may go on on the next one. Every operator is a recurrence over a state ``S [H, K, V]`` that is affine in the
state it starts from:

    additive:  S_t = exp(g_t) * S_{t-1} + k_t v_t^T
    delta:     S'  = exp(g_t) * S_{t-1};  S_t = S' + beta_t k_t (v_t - S'^T k_t)^T
    output:    o_t = scale * S_t^T q_t

with ``g_t`` a number per head or one per head and row of the state. So a whole piece maps S to ``M S + U``: the transition M
is diagonal for the additive rule and a K x K matrix for the delta rule.

Symbols: T local tokens, H heads, K key size, V value size, P pieces.

Source: LASP-2 (arXiv:2502.07563), Gated DeltaNet (arXiv:2412.06464).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class LocalInputs:
    """One rank's rows.

    Attributes:
        q: ``[T, H, K]``.
        k: ``[T, H, K]``.
        v: ``[T, H, V]``.
        log_decay: ``None``, ``[T, H]`` or ``[T, H, K]``, at most 0; applied before the token's own update.
        beta: ``[T, H]`` with the delta rule, else ``None``.
        rule: ``additive`` or ``delta``.
        scale: Factor of the output.
        piece_lengths: Tokens of each piece, in order; their sum is T, none is 0. Empty on a rank without tokens.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    rule: str
    scale: float
    piece_lengths: Sequence[int]


@dataclass(frozen=True)
class LocalGradients:
    """Gradients with the shapes and dtypes of the inputs, and of the pieces' initial states ``[P, H, K, V]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    initial_states: Tensor


class LocalOperator(Protocol):
    """The phases of one rank's work in one forward or backward pass, made anew for each with its ``LocalInputs``.

    States and transitions have the accumulation dtype: fp64 for fp64 inputs, else fp32. Nothing here is recorded by
    autograd. Phases of a pass share what they computed.
    """

    def outgoing(self, initial: Tensor | None, *, with_transition: bool) -> tuple[Tensor, Tensor | None]:
        """What the last piece hands on: its final state from ``initial``, and its transition.

        Args:
            initial: ``[H, K, V]`` the state that the last piece will start from in ``output`` too; ``None`` where another
                rank will tell: then what zero becomes is asked for.
            with_transition: Whether the transition is asked for.

        Returns:
            State ``[H, K, V]`` and transition ``[H, K]`` (additive: factors of the rows of the state) or ``[H, K, K]``
            (delta), ``None`` where it was not asked for.
        """
        ...

    def work_ahead(self) -> None:
        """Do what ``output`` needs of no other rank, while states travel."""
        ...

    def output(self, initial_states: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and final states.

        Args:
            initial_states: ``[P, H, K, V]`` the state every piece starts from.

        Returns:
            ``[T, H, V]`` in the dtype of ``v`` and final states ``[P, H, K, V]``.
        """
        ...

    def incoming_gradient(self, dout: Tensor, dfinal: Tensor | None) -> Tensor:
        """Gradient of the first piece's initial state, as far as this rank's own results depend on it.

        Args:
            dout: ``[T, H, V]`` gradient of the output.
            dfinal: ``[H, K, V]`` gradient of the first piece's final state, as ``gradients`` will get it too; ``None`` where
                later ranks will tell: then as if it were zero.

        Returns:
            ``[H, K, V]``.
        """
        ...

    def gradient_work_ahead(self, initial_states: Tensor, dout: Tensor) -> None:
        """Do what ``gradients`` needs of no other rank, while gradients of states travel; its first two arguments."""
        ...

    def gradients(self, initial_states: Tensor, dout: Tensor, dfinals: Tensor) -> LocalGradients:
        """Gradients of all inputs.

        Args:
            initial_states: ``[P, H, K, V]``, those of the forward pass.
            dout: ``[T, H, V]``.
            dfinals: ``[P, H, K, V]`` gradients of the final states, with what later ranks add.
        """
        ...
