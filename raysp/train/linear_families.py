"""What tells the families of linear attention apart, as values; :mod:`raysp.train.linear_layer` runs any of them.

All are one recurrence, ``S_t = decay * S_{t-1} + update``, read by the query.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LinearFamily:
    """Settings of a family.

    Attributes:
        source: The paper.
        rule: ``additive`` or ``delta`` (which replaces what the state answers to the key).
        decay: ``none``; constants per head (``retention``, ``alibi``); of the token, per head (``step``) or per head and
            row of the state (``sigmoid``, ``step_rows``, ``forget``).
        feature: What is done to queries and keys: ``none``, ``elu`` (plus one, positive), ``silu``, ``unit`` (silu,
            then length 1) or ``gated`` (silu queries; keys are one minus the forget gate).
        rotary: Whether queries and keys are rotated by their positions.
        convolution: Whether queries, keys and values pass a short convolution first.
        value_silu: Whether values pass a silu.
        shared_keys: Whether all heads share one query and one key.
        scaled: Whether outputs are scaled by ``key_size**-0.5``.
        gate: Of the output: ``none``, ``silu``, ``sigmoid``, or ``first`` (silu, before the norm instead of after).
        low_rank_gate: Whether the output gate's projection is of low rank.
        skip: Whether values are added to the output, each head with a weight.
    """

    source: str
    rule: str = "additive"
    decay: str = "none"
    feature: str = "none"
    rotary: bool = False
    convolution: bool = False
    value_silu: bool = False
    shared_keys: bool = False
    scaled: bool = True
    gate: str = "none"
    low_rank_gate: bool = False
    skip: bool = False

    @property
    def half_keys(self) -> bool:
        """Whether keys have half the size of values unless the configuration says otherwise."""
        return self.decay == "sigmoid"


FAMILIES = {
    "basic": LinearFamily("Linear attention (arXiv:2006.16236), as in LASP-2: without a normalizer", feature="elu"),
    "retention": LinearFamily("RetNet (arXiv:2307.08621)", decay="retention", rotary=True, gate="silu"),
    "lightning": LinearFamily(
        "Lightning Attention-2 (arXiv:2401.04658)",
        decay="alibi", feature="silu", rotary=True, value_silu=True, scaled=False, gate="sigmoid",
    ),
    "mamba2": LinearFamily(
        "Mamba-2 (arXiv:2405.21060)",
        decay="step", feature="silu", convolution=True, value_silu=True, shared_keys=True, scaled=False, gate="first",
        skip=True,
    ),
    "gla": LinearFamily("Gated linear attention (arXiv:2312.06635)", decay="sigmoid", gate="silu"),
    "hgrn2": LinearFamily("HGRN-2 (arXiv:2404.07904)", decay="forget", feature="gated", scaled=False),
    "deltanet": LinearFamily(
        "DeltaNet (arXiv:2406.06484)", rule="delta", feature="unit", convolution=True, value_silu=True
    ),
    "gated_deltanet": LinearFamily(
        "Gated DeltaNet (arXiv:2412.06464)",
        rule="delta", decay="step", feature="unit", convolution=True, value_silu=True, gate="silu",
    ),
    "kda": LinearFamily(
        "Kimi Delta Attention (arXiv:2510.26692)",
        rule="delta", decay="step_rows", feature="unit", convolution=True, value_silu=True, gate="sigmoid",
        low_rank_gate=True,
    ),
}  # fmt: skip


def head_slopes(decay: str, *, num_heads: int, layer: int, num_layers: int) -> list[float]:
    """Log decay of each head for the families whose decay is constant.

    Args:
        decay: ``retention``: ``log(1 - 2**(-5 - head))``. ``alibi``: ``-2**(-8 (head + 1) / heads)``, weaker in deeper
            layers.
        num_heads: Heads.
        layer: Index of the layer.
        num_layers: Layers of the model.
    """
    if decay == "retention":
        return [math.log1p(-(2.0 ** (-5 - head))) for head in range(num_heads)]
    depth = 1 - layer / max(1, num_layers - 1) + 1e-5
    return [-depth * 2.0 ** (-8 * (head + 1) / num_heads) for head in range(num_heads)]


def forget_floor(*, layer: int, num_layers: int) -> float:
    """The least that HGRN-2's forget gate keeps: zero in the first layer, rising with depth."""
    return layer / num_layers
