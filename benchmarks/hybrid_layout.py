"""What it costs a softmax layer that a model's rows lie in contiguous runs, as its linear layers need them.

    python benchmarks/hybrid_layout.py                          # all GPUs
    python benchmarks/hybrid_layout.py --device cpu --degree 2  # gloo

``zigzag`` is the layer alone, in the order that levels causal work. A hybrid's rows lie in contiguous runs: then the layer
runs ``moved``, its rows brought to zigzag order and back, ``contiguous``, unevenly on the runs as they are, or by a method
that gives every rank all tokens of some heads (``ulysses``), which does not care. Rows are measured in turns, forward and
backward; ``of zigzag`` is the time over that of the same method in zigzag order.

Writes ``benchmarks/results/hybrid_layout_<name>.{json,md}``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
# benchmarks/planner.py would hide the package of its name.
sys.path[:] = [str(_ROOT), *(e for e in sys.path if Path(e or ".").resolve() not in (_ROOT, _ROOT / "benchmarks"))]

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.provenance import commit, hardware  # noqa: E402
from benchmarks.rank_timing import Row, Run, Site, measured, reported  # noqa: E402
from raysp.attention import SequenceLayout, parallel_attention, relayout  # noqa: E402

_HEADINGS = ("method", "rows lie", "ms", "of zigzag", "sent MB")


@dataclass(frozen=True)
class Task:
    """What every rank is told."""

    num_heads: int
    num_key_heads: int
    head_size: int
    dtype: str
    kernel: str
    methods: tuple[str, ...]
    rounds: int


def main() -> None:
    """Measure, show, write."""
    arguments = _arguments()
    console = Console(width=max(110, Console().width))
    heads, key_heads = map(int, arguments.heads.split("/"))
    task = Task(
        num_heads=heads, num_key_heads=key_heads, head_size=arguments.head_size, dtype=arguments.dtype,
        kernel=arguments.kernel, methods=tuple(arguments.methods.split(",")), rounds=arguments.rounds,
    )  # fmt: skip
    cases = tuple(int(text) for text in arguments.tokens.split(","))
    rows: list[Row] = []
    try:
        for found in reported(
            measure_case, task, cases, device=arguments.device, degree=arguments.degree,
            deadline_s=time.time() + arguments.time_budget_s,
        ):  # fmt: skip
            rows += found
            _show(found, console)
    finally:
        _write(arguments, task, rows, console)


def measure_case(site: Site, task: Task, tokens_per_rank: int) -> list[Row]:
    """All methods and orders on one document."""
    degree, me = site.group.degree, site.group.group_rank
    zigzag, runs_of_tokens = (
        SequenceLayout([tokens_per_rank * degree], degree, order) for order in ("zigzag", "contiguous")
    )
    generator = torch.Generator().manual_seed(me)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[task.dtype]
    q, k, v = (
        torch.randn(tokens_per_rank, heads, task.head_size, generator=generator).to(site.device, dtype).requires_grad_()
        for heads in (task.num_heads, task.num_key_heads, task.num_key_heads)
    )

    def attend(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, method: str) -> Tensor:
        return parallel_attention(q, k, v, layout=layout, group=site.group, method=method, kernel=task.kernel)

    def moved(method: str) -> Tensor:
        there = relayout(q, k, v, source=runs_of_tokens, target=zigzag, group=site.group)
        out = attend(*there, zigzag, method)
        return relayout(out, source=zigzag, target=runs_of_tokens, group=site.group)[0]

    runs: dict[tuple[str, str], Run] = {}
    for method in task.methods:
        runs[method, "zigzag"] = lambda method=method: attend(q, k, v, zigzag, method)  # type: ignore[misc]
        runs[method, "contiguous"] = lambda method=method: attend(q, k, v, runs_of_tokens, method)  # type: ignore[misc]
        if method != "ulysses":
            runs[method, "moved"] = lambda method=method: moved(method)  # type: ignore[misc]
    named: dict[str, Run] = {" ".join(key): run for key, run in runs.items()}
    rows = measured(named, [q, k, v], site, rounds=task.rounds)
    level = {row["name"].split()[0]: row["time_s"] for row in rows if row["name"].endswith("zigzag")}
    for row in rows:
        method, order = row["name"].split()
        row |= {"tokens_per_rank": tokens_per_rank, "method": method, "order": order}
        row["of_zigzag"] = row["time_s"] / level[method]
    return rows


def _cells(row: Row) -> list[str]:
    return [
        row["method"], row["order"], f"{row['time_s'] * 1e3:.2f}", f"{row['of_zigzag']:.3f}",
        f"{row['sent_bytes'] / 1e6:.2f}",
    ]  # fmt: skip


def _show(rows: list[Row], console: Console) -> None:
    table = Table(title=f"{rows[0]['tokens_per_rank']} tokens per rank", title_justify="left", box=None, padding=(0, 2))
    for place, heading in enumerate(_HEADINGS):
        table.add_column(heading, justify="right" if place > 1 else "left")
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)


def _write(arguments: argparse.Namespace, task: Task, rows: list[Row], console: Console) -> None:
    arguments.output.mkdir(parents=True, exist_ok=True)
    base = arguments.output / f"hybrid_layout_{arguments.name or arguments.device}"
    result: dict[str, Any] = {
        "hardware": hardware(arguments.device), "commit": arguments.commit or commit("raysp", "benchmarks/*.py"),
        "command": " ".join(["python", *sys.argv]), "torch": torch.__version__, "degree": arguments.degree,
        **asdict(task), "rows": rows,
    }  # fmt: skip
    lines = [
        f"`{result['command']}` at {result['commit']} on {result['hardware']}; torch {result['torch']}.",
        "",
        f"One document over {result['degree']} ranks, {task.num_heads}/{task.num_key_heads} heads of {task.head_size}, "
        f"{task.dtype}, forward and backward; medians of {task.rounds} interleaved measurements, of the slowest rank.",
        "",
        f"| tokens per rank | {' | '.join(_HEADINGS)} |",
        "|---:|---|---|---:|---:|---:|",
        *(f"| {row['tokens_per_rank']} | {' | '.join(_cells(row))} |" for row in rows),
    ]
    base.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    base.with_suffix(".md").write_text("\n".join(lines) + "\n")
    console.print(f"written to {base}.json, .md")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--degree", type=int, default=None, help="ranks; all GPUs by default, 2 on CPU")
    parser.add_argument("--tokens", default=None, help="per rank; default 8192,32768, on CPU 512,2048")
    parser.add_argument("--heads", default=None, help="default 32/8, on CPU 8/2")
    parser.add_argument("--head-size", type=int, default=None, help="default 128, on CPU 32")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default=None, help="default bf16, on CPU fp32")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--methods", default="ulysses,ring,all_gather")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--time-budget-s", type=float, default=600.0, help="begin no case after it")
    parser.add_argument("--name", default=None)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", default=None, help="where the checkout has no .git")
    arguments = parser.parse_args()
    tiny = arguments.device == "cpu"
    if not tiny and not torch.cuda.is_available():
        parser.error("no CUDA device; expected at least 2 GPUs. Use --device cpu for gloo.")
    arguments.degree = arguments.degree or (2 if tiny else torch.cuda.device_count())
    arguments.tokens = arguments.tokens or ("512,2048" if tiny else "8192,32768")
    arguments.heads = arguments.heads or ("8/2" if tiny else "32/8")
    arguments.head_size = arguments.head_size or (32 if tiny else 128)
    arguments.dtype = arguments.dtype or ("fp32" if tiny else "bf16")
    return arguments


if __name__ == "__main__":
    main()
