"""Make the length distributions that ship with the planner from the published lengths.

    python benchmarks/build_distributions.py FOLDER [--output planner/distributions]

FOLDER holds ``wikipedia.txt``, ``wlbllm_128k.txt`` and ``prolong.txt`` (one length in tokens per line) and
``pretrain_histogram.csv`` (documents per length bin). The same files give the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from pathlib import Path

# A file in this folder is called as the package that is needed; the folder must not come first.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from planner import LengthDistribution, read_lengths  # noqa: E402

LONG_TOKENS = 16384
WIKIPEDIA = "FlexSP release (PKU-DAIR/Hetu-Galvatron, branch flexsp, galvatron/datasets/wikipedia.txt)"
WLBLLM = "DistCA release (hao-ai-lab/DistCA, dist_wlbllm.json) after WLB-LLM (arXiv:2503.17924)"
PROLONG = "DistCA release (hao-ai-lab/DistCA, dist_prolong.json)"
MAGI = "MagiAttention release (SandAI-org/MagiAttention, doc_length_distribution.csv)"
EXACT = "order statistics (inverted CDF) of the published lengths of {}; denser in the tail; log-uniform between"


def main() -> None:
    """Write one JSON file for each distribution."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "planner" / "distributions")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for distribution in build(arguments.folder):
        path = arguments.output / f"{distribution.name}.json"
        path.write_text(distribution.to_json(), encoding="utf-8")
        print(
            f"{path}: {len(distribution.lengths)} quantiles, mean {distribution.mean_tokens:,.1f}, "
            f"of the table {distribution.table_mean_tokens / distribution.mean_tokens - 1:+.2%}"
        )


def build(folder: Path) -> list[LengthDistribution]:
    """Make every distribution from the files in `folder`."""
    wikipedia, wlbllm, prolong = (
        np.sort(read_lengths(folder / f"{name}.txt")) for name in ("wikipedia", "wlbllm_128k", "prolong")
    )
    pooled = np.sort(np.concatenate([prolong, wlbllm]))
    long = pooled[pooled >= LONG_TOKENS]
    return [
        of_lengths("wikipedia", wikipedia, WIKIPEDIA, "200,000 of the million Wikipedia documents, GPT tokenizer"),
        of_lengths("wlbllm-128k", wlbllm, WLBLLM, "documents that reconstruct a production pre-training mix of 128K"),
        of_lengths("prolong", prolong, PROLONG, "documents of the ProLong mix"),
        of_lengths(
            "long-documents", long, f"{PROLONG}; {WLBLLM}",
            f"documents of at least {LONG_TOKENS} tokens of prolong and wlbllm-128k together",
        ),
        of_histogram("pretrain-mix", folder / "pretrain_histogram.csv"),
    ]  # fmt: skip


def of_lengths(name: str, ordered: NDArray[np.int64], source: str, what: str) -> LengthDistribution:
    """Make the quantile table of lengths that are sorted."""
    # Beyond 1 - 1/n every quantile is the longest: a table that went on would draw it too often.
    shares = [share for share in _schedule() if share <= 1 - 1 / len(ordered)]
    quantiles = np.quantile(ordered, shares, method="inverted_cdf")
    return LengthDistribution(
        name=name,
        num_sequences=len(ordered),
        mean_tokens=round(float(ordered.mean()), 6),
        source=source,
        licence="Apache-2.0",
        derivation=EXACT.format(what),
        probabilities=(*shares, 1.0),
        lengths=(*(int(length) for length in quantiles), int(ordered[-1])),
    )


def of_histogram(name: str, path: Path) -> LengthDistribution:
    """Make the quantile table of documents per length bin, log-uniform in a bin; the bins' edges are in the table."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = [(*map(int, re.findall(r"\d+", row["range"])), int(row["number"])) for row in csv.DictReader(file)]
    total = sum(count for *_, count in rows)
    ends = np.array([1, *(high for _, high, _ in rows)], dtype=np.float64)
    masses = np.cumsum([0, *(count for *_, count in rows)]) / total
    edges = [round(float(share), 9) for share in masses]
    shares = sorted({*_schedule(), *edges, 1.0})
    quantiles = np.rint(np.exp(np.interp(shares, edges, np.log(ends))))
    # Mean of log-uniform lengths in each bin; the published file has none.
    mean = float((np.diff(masses) * np.diff(ends) / np.diff(np.log(ends))).sum())
    return LengthDistribution(
        name=name,
        num_sequences=total,
        mean_tokens=round(mean, 6),
        source=MAGI,
        licence="Apache-2.0",
        derivation=f"documents of a pre-training mix, published as counts in {len(rows)} length bins, taken as "
        "log-uniform in each bin; the mean is that of this reading, and lengths within a bin are not data",
        probabilities=tuple(shares),
        lengths=tuple(int(length) for length in quantiles),
    )


def _schedule() -> list[float]:
    """Probabilities of the table: 0 to 0.99 by 0.005, then 40 a decade up to 1 - 1e-5."""
    body = [round(index * 0.005, 3) for index in range(199)]
    return body + [round(1 - 10 ** (-2 - index / 40), 9) for index in range(1, 121)]


if __name__ == "__main__":
    main()
