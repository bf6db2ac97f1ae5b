"""What the cut of packed documents asks of each rank: segments, bytes, and how level ranks are. Pure, no GPU.

    python benchmarks/attention_layout.py

Compares `planner.attention_cut.zigzag_cut`, which cuts as few documents as possible, with equal chunks of every document, on
the packed mixes of `benchmarks/attention.py`. Writes ``benchmarks/results/attention_layout.{json,md}``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
# benchmarks/planner.py would hide the package of its name.
sys.path[:] = [str(_ROOT), *(e for e in sys.path if Path(e or ".").resolve() not in (_ROOT, _ROOT / "benchmarks"))]

import numpy as np  # noqa: E402

from benchmarks.attention_cases import mix_lengths  # noqa: E402
from planner import AttentionWork  # noqa: E402
from planner.attention_cut import ZigzagCut, even_cut, zigzag_cut  # noqa: E402
from planner.attention_shards import Shards  # noqa: E402

_KEY_BYTES = 2 * 8 * 128 * 2
_CUTS: dict[str, Callable[[Sequence[int], int], ZigzagCut]] = {"equal chunks": even_cut, "few cut": zigzag_cut}
_HEADINGS = (
    "mix", "ranks", "tokens per rank", "documents", "cut by", "of them cut", "segments per rank", "keys sent per rank, MB",
    "tokens, most less least", "causal work over mean", "full work over mean",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    rows = [
        _row(mix, degree, tokens, name, arguments.seeds)
        for mix in ("wlbllm-128k", "prolong")
        for degree in (2, 4, 8)
        for tokens in (8192, 16384, 32768)
        for name in _CUTS
    ]
    lines = [
        f"`python benchmarks/attention_layout.py --seeds {arguments.seeds}`, pure arithmetic. Means over the draws; of",
        "unevenness the largest. Segments are pieces of documents on a rank. Sent: keys and values of 8 heads, D 128, bf16,",
        "in a forward.",
        "",
        *(f"| {' | '.join(map(str, cells))} |" for cells in (_HEADINGS, ["---"] * len(_HEADINGS))),
        *(f"| {' | '.join(str(row[heading]) for heading in _HEADINGS)} |" for row in rows),
    ]
    print("\n".join(lines))
    base = arguments.output / "attention_layout"
    base.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    base.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _row(mix: str, degree: int, tokens: int, name: str, num_seeds: int) -> dict[str, Any]:
    drawn = [mix_lengths(mix, tokens * degree, degree=degree, seed=seed) for seed in range(num_seeds)]
    measured = np.array([_measures(lengths, degree, _CUTS[name]) for lengths in drawn])
    num_cut, segments, sent_bytes = measured[:, :3].mean(axis=0)
    uneven_rows, causal, full = measured[:, 3:].max(axis=0)
    values = (
        mix, degree, f"{tokens // 1024}K", round(np.mean([len(lengths) for lengths in drawn]), 1), name, round(num_cut, 1),
        round(segments, 1), round(sent_bytes / 1e6, 1), int(uneven_rows), f"{causal:.4f}", f"{full:.3f}",
    )  # fmt: skip
    return dict(zip(_HEADINGS, values, strict=True))


def _measures(
    lengths: Sequence[int], degree: int, cut_by: Callable[[Sequence[int], int], ZigzagCut]
) -> tuple[float, ...]:
    work = AttentionWork(degree=degree, num_heads=1, num_key_heads=1, head_size=1, lengths=tuple(lengths))
    cut = work.__dict__["cut"] = cut_by(lengths, degree)
    shards = Shards(work, 0.0)
    rows, causal, full = cut.rows.sum(axis=1), shards.gathered().padded_pairs, (cut.rows * cut.lengths).sum(axis=1)
    num_pieces = (2 * degree * cut.is_cut.sum() + (~cut.is_cut).sum()) / degree
    return (
        float(cut.is_cut.sum()), float(num_pieces), float(shards.keys.needed.sum()) * _KEY_BYTES / degree,
        float(np.ptp(rows)), float(causal.max() / causal.mean()), float(full.max() / full.mean()),
    )  # fmt: skip


if __name__ == "__main__":
    main()
