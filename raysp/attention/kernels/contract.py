"""What every block kernel offers.

Symbols: Tq, Tk rows of one call; Hq, Hk query and key heads, Hq a multiple of Hk; D head size.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from raysp.attention.blocks import Segments
from raysp.attention.mask import SegmentMask


class Kernel(Protocol):
    """Attention of packed segments, forward with LSE and backward from a global LSE."""

    @property
    def name(self) -> str:
        """The name users choose it by."""
        ...

    def forward(
        self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, segments: Segments, *, mask: SegmentMask, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attend inside each segment.

        Args:
            q_THD: ``[Tq, Hq, D]``.
            k_THD: ``[Tk, Hk, D]``.
            v_THD: Like ``k_THD``.
            segments: Which rows of queries and keys belong together.
            mask: Which keys of its segment a query sees.
            scale: Factor of the scores.

        Returns:
            ``out [Tq, Hq, D]`` in the input dtype or a wider one, 0 for a row without keys, and ``lse [Hq, Tq]``, natural
            log, fp32 (fp64 for fp64 inputs), ``-inf`` for a row without keys. Both are new tensors.
        """
        ...

    def backward(
        self,
        dout_THD: Tensor,
        q_THD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
        out_THD: Tensor | None,
        lse_HT: Tensor,
        delta_HT: Tensor | None,
        segments: Segments,
        *,
        mask: SegmentMask,
        scale: float,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients that this block adds. Summed over all blocks of a row's keys they are exact.

        Args:
            dout_THD: ``[Tq, Hq, D]``, gradient of the final output.
            q_THD: ``[Tq, Hq, D]``.
            k_THD: ``[Tk, Hk, D]``.
            v_THD: Like ``k_THD``.
            out_THD: Final output ``[Tq, Hq, D]`` where it is at hand; ``None``: ``delta_HT`` stands for it.
            lse_HT: ``[Hq, Tq]``, over all keys of the row, not only this block's.
            delta_HT: ``[Hq, Tq]``, row sums of ``dout * out``; may be ``None`` where ``out_THD`` is given.
            segments: As in the forward.
            mask: As in the forward.
            scale: As in the forward.
            deterministic: Same bits on every run, if need be slower.

        Returns:
            ``dq [Tq, Hq, D]``, ``dk [Tk, Hk, D]``, ``dv [Tk, Hk, D]`` in the input or a wider dtype; new tensors.
        """
        ...
