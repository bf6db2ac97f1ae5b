"""What the attention benchmark measures, as plain values: shapes, links and options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from planner import load_distribution

LINKS = ("nvlink", "medium", "slow")
DENSE = "dense"
RAYSP, ONE_GPU = "raysp", "one GPU"
SPEED, ERROR, MEMORY = "speed", "error", "memory"
HEADS = ((32, 8), (32, 32), (64, 8))
# Tokens of a rank in the comparison with fp64, which holds all scores of a head.
ERROR_TOKENS = 512
SMALLEST_MIX_TOKENS = 8192


@dataclass(frozen=True)
class Case:
    """One shape on one link; all candidates that can run it are measured side by side.

    Attributes:
        kind: ``speed``, ``error`` (against fp64) or ``memory`` (many steps).
        link: How the ranks are connected.
        num_heads: Query heads.
        num_key_heads: Key heads.
        head_size: D.
        tokens_per_rank: Of all documents together, on each rank.
        mix: ``dense``, or the distribution that the packed lengths were drawn from.
        lengths: Tokens of every document.
    """

    kind: str
    link: str
    num_heads: int
    num_key_heads: int
    head_size: int
    tokens_per_rank: int
    mix: str
    lengths: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Of all ranks."""
        return sum(self.lengths)

    @property
    def heads(self) -> str:
        """Query and key heads, such as ``32/8``."""
        return f"{self.num_heads}/{self.num_key_heads}"

    @property
    def name(self) -> str:
        """For people."""
        kind = "" if self.kind == SPEED else f" {self.kind}"
        return f"{self.link} {self.heads} {self.mix} {tokens_text(self.tokens_per_rank)}{kind}"


@dataclass(frozen=True)
class Settings:
    """Options that all ranks share.

    Attributes:
        device: ``cuda`` or ``cpu``.
        degree: Ranks.
        kernels: Kernels of the raysp rows and of the peers.
        only: Patterns of candidate names; empty means all.
        peers: Folder with the peers' packages, or None.
        rounds: Measurements of each candidate, interleaved.
        target_s: Length of one measurement; calls are repeated until it is reached.
        steps: Of the memory check.
        deadline_s: Wall-clock time (of ``time.time``) after which no new measurement starts.
        seed: Of inputs and length mixes.
    """

    device: str
    degree: int
    kernels: tuple[str, ...]
    only: tuple[str, ...]
    peers: Path | None
    rounds: int
    target_s: float
    steps: int
    deadline_s: float
    seed: int

    def wants(self, name: str) -> bool:
        """Whether a candidate was asked for: its name matches a pattern, or contains it."""
        return not self.only or any(pattern in name or fnmatch(name, pattern) for pattern in self.only)


def tokens_text(num_tokens: int) -> str:
    """Write 8192 as 8K."""
    return f"{num_tokens // 1024}K" if num_tokens % 1024 == 0 else str(num_tokens)


def mix_lengths(mix: str, num_tokens: int, *, degree: int, seed: int) -> tuple[int, ...]:
    """Return document lengths with the given sum: one document, or draws from a shipped distribution.

    Packed lengths are rounded up to multiples of twice the degree and the last one is cut: ring-flash-attn's zigzag needs
    that, raysp does not, and all rows do the same work. Fewer than 8K tokens would hold one document or two, so lengths
    shrink with them.

    Raises:
        ValueError: The sum is not such a multiple.
    """
    multiple = 2 * degree
    if num_tokens % multiple:
        raise ValueError(f"{num_tokens} tokens; expected a multiple of {multiple} for {degree} ranks.")
    if mix == DENSE:
        return (num_tokens,)
    lengths: list[int] = []
    left = num_tokens
    scale = min(1.0, num_tokens / SMALLEST_MIX_TOKENS)
    for drawn in load_distribution(mix).sample(num_tokens // multiple, seed=seed, max_length=round(num_tokens / scale)):
        length = min(left, math.ceil(int(drawn) * scale / multiple) * multiple)
        lengths.append(length)
        left -= length
        if not left:
            break
    return tuple(lengths)


def speed_cases(
    link: str,
    heads: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    mixes: Sequence[str],
    *,
    head_size: int,
    degree: int,
    seed: int,
) -> list[Case]:
    """Shapes of one link in the order given: heads, then tokens, then mixes."""
    return [
        Case(
            SPEED, link, num_heads, num_key_heads, head_size, num_tokens, mix,
            mix_lengths(mix, num_tokens * degree, degree=degree, seed=seed),
        )
        for num_heads, num_key_heads in heads
        for num_tokens in tokens
        for mix in mixes
    ]  # fmt: skip


def error_cases(
    link: str, heads: Sequence[tuple[int, int]], mixes: Sequence[str], *, head_size: int, degree: int, seed: int,
    num_tokens: int = ERROR_TOKENS,
) -> list[Case]:  # fmt: skip
    """Small shapes for the comparison with fp64: one dense, and one packed if any packed mix was asked for."""
    chosen = [DENSE, *[mix for mix in mixes if mix != DENSE][:1]]
    num_heads, num_key_heads = heads[0]
    return [
        Case(ERROR, link, num_heads, num_key_heads, head_size, num_tokens, mix,
             mix_lengths(mix, num_tokens * degree, degree=degree, seed=seed))
        for mix in chosen
        if mix in mixes
    ]  # fmt: skip
