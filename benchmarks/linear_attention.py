"""Linear attention over shards: state scans against each other, a ring of rows, and one rank alone with its share.

    python benchmarks/linear_attention.py                               # all GPUs, 16K to 1M tokens
    python benchmarks/linear_attention.py --device cpu --degree 8       # gloo: bytes and the trend over degrees
    python benchmarks/linear_attention.py --families gated_deltanet,kda --tokens 524288

One document over all ranks. Each case measures its rows in turns, forward and backward, so that all see the same clocks.
``share`` is the time that the local operator alone takes for one rank's share of the tokens, divided by the row's time: the
work is linear in the tokens, so this is the part of the unsharded operator's tokens per second and rank that is left.

``fla cp`` is flash-linear-attention's own context parallelism (delta family, CUDA, where fla-core is installed); where its
kernels for decays of heads are refused, as on Hopper under older Triton, it gets the same decays by channel.

Writes ``benchmarks/results/linear_attention_<name>.{json,md,png}``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
# benchmarks/planner.py would hide the package of its name.
sys.path[:] = [str(_ROOT), *(e for e in sys.path if Path(e or ".").resolve() not in (_ROOT, _ROOT / "benchmarks"))]

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.linear_attention_ring import RingLinearAttention  # noqa: E402
from benchmarks.provenance import commit, hardware  # noqa: E402
from benchmarks.rank_timing import Row, Run, Site, measured, reported  # noqa: E402
from raysp.attention import SequenceLayout  # noqa: E402
from raysp.comm import Communicator  # noqa: E402
from raysp.linear_attention import KERNELS, parallel_linear_attention  # noqa: E402
from raysp.linear_attention.kernels import resolve_kernel  # noqa: E402

# Name -> (rule, decay: per head constant, per token, per token and key).
FAMILIES = {
    "basic": ("additive", None),
    "retention": ("additive", "head"),
    "mamba2": ("additive", "token"),
    "gla": ("additive", "key"),
    "deltanet": ("delta", None),
    "gated_deltanet": ("delta", "token"),
    "kda": ("delta", "key"),
}
METHODS = ("lasp2", "lasp1", "zeco", "ulysses")
ALONE, RING, FLA = "one rank's share", "ring of rows", "fla cp"
_HEADINGS = ("row", "ms", "share", "tokens/s", "sent MB", "peak MB")


@dataclass(frozen=True)
class Task:
    """What every rank is told."""

    num_heads: int
    key_size: int
    value_size: int
    dtype: str
    kernel: str
    rounds: int
    rows: tuple[str, ...]


def main() -> None:
    """Measure, show, write."""
    arguments = _arguments()
    console = Console(width=max(110, Console().width))
    task = Task(
        num_heads=arguments.heads, key_size=arguments.key_size, value_size=arguments.value_size, dtype=arguments.dtype,
        kernel=arguments.kernel, rounds=arguments.rounds, rows=arguments.rows,
    )  # fmt: skip
    tokens = [int(text) for text in arguments.tokens.split(",")]
    cases = tuple((family, count) for family in arguments.families.split(",") for count in tokens)
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


def measure_case(site: Site, task: Task, case: tuple[str, int]) -> list[Row]:
    """All rows of one family and number of tokens, on one rank."""
    family, num_tokens = case
    group, device = site.group, site.device
    layout = SequenceLayout([num_tokens], group.degree, "contiguous")
    local = layout.local_tokens(group.group_rank)
    inputs = _inputs(family, local, task, site)
    rule = FAMILIES[family][0]
    share = SequenceLayout([local], 1, "contiguous")
    common = {**inputs, "rule": rule, "kernel": task.kernel}

    def sharded(method: str) -> Run:
        return lambda: parallel_linear_attention(**common, layout=layout, group=group, method=method)[0]

    scale = task.key_size**-0.5
    make = resolve_kernel(task.kernel, device=device, dtype=inputs["q"].dtype, key_size=task.key_size)
    decay = inputs["log_decay"]
    decay_rows = decay.expand(local, -1) if decay is not None and decay.dim() == 1 else decay
    runs: dict[str, Run] = {
        ALONE: lambda: parallel_linear_attention(**common, layout=share, group=None)[0],
        **{method: sharded(method) for method in METHODS if method != "ulysses" or task.num_heads % group.degree == 0},
        RING: lambda: RingLinearAttention.apply(
            inputs["q"], inputs["k"], inputs["v"], decay_rows, inputs["beta"], rule, scale, group, make
        ),
    }
    if device.type == "cuda" and rule == "delta" and find_spec("fla"):
        runs[FLA] = _fla_context_parallel(inputs, num_tokens, group)
    if task.rows:
        runs = {name: run for name, run in runs.items() if name in (ALONE, *task.rows)}
    leaves = [tensor for tensor in inputs.values() if tensor is not None]
    rows = measured(runs, leaves, site, rounds=task.rounds)
    alone_s = rows[0]["time_s"]
    for row in rows:
        row |= {"family": family, "num_tokens": num_tokens, "share": alone_s / row["time_s"]}
        row["tokens_per_s"] = num_tokens / row["time_s"]
    return rows


def _fla_context_parallel(inputs: dict[str, Any], num_tokens: int, group: Communicator) -> Run:
    from fla.ops.cp import build_cp_context
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.kda import chunk_kda

    from raysp.linear_attention.fla_operator import needs_channels

    starts = torch.tensor([0, num_tokens])
    context = build_cp_context(starts.to(inputs["q"].device), group.process_group, cu_seqlens_cpu=starts)

    def run() -> Tensor:
        q, k, v, beta = (inputs[name].unsqueeze(0) for name in ("q", "k", "v", "beta"))
        decay = inputs["log_decay"]
        decay = torch.zeros(q.shape[1:3], device=q.device) if decay is None else decay
        if decay.dim() == 2 and needs_channels():
            decay = decay.unsqueeze(-1).expand(-1, -1, q.shape[3])
        op = chunk_gated_delta_rule if decay.dim() == 2 else chunk_kda
        out, _ = op(q, k, v, decay.unsqueeze(0).contiguous(), beta, cu_seqlens=context.cu_seqlens, cp_context=context)
        return out[0]

    return run


def _inputs(family: str, local: int, task: Task, site: Site) -> dict[str, Any]:
    """Random rows of one rank: unit keys and queries, decays and betas as trained layers have them."""
    device = site.device
    generator = torch.Generator(device=device).manual_seed(site.group.group_rank)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[task.dtype]

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    heads, keys = task.num_heads, task.key_size
    shapes = {"head": (heads,), "token": (local, heads), "key": (local, heads, keys)}
    rule, decay = FAMILIES[family]
    made: dict[str, Tensor | None] = {
        "q": torch.nn.functional.normalize(drawn(local, heads, keys), dim=-1).to(dtype),
        "k": torch.nn.functional.normalize(drawn(local, heads, keys), dim=-1).to(dtype),
        "v": drawn(local, heads, task.value_size).to(dtype),
        "log_decay": None if decay is None else torch.nn.functional.logsigmoid(drawn(*shapes[decay]) + 4),
        "beta": torch.sigmoid(drawn(local, heads)).to(dtype) if rule == "delta" else None,
    }
    return {name: None if tensor is None else tensor.requires_grad_() for name, tensor in made.items()}


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["name"], f"{row['time_s'] * 1e3:.2f}", f"{row['share']:.1%}", f"{row['tokens_per_s']:,.0f}",
        f"{row['sent_bytes'] / 1e6:.3f}", f"{row['peak_bytes'] / 1e6:.1f}" if row["peak_bytes"] else "-",
    ]  # fmt: skip


def _show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title=_title(rows[0]), title_justify="left", box=None, padding=(0, 2))
    for place, heading in enumerate(_HEADINGS):
        table.add_column(heading, justify="right" if place else "left")
    for row in sorted(rows, key=lambda row: float(row["time_s"])):
        table.add_row(*_cells(row))
    console.print(table)


def _title(row: dict[str, Any]) -> str:
    return f"{row['family']}, {row['num_tokens']} tokens"


def _write(arguments: argparse.Namespace, task: Task, rows: list[dict[str, Any]], console: Console) -> None:
    arguments.output.mkdir(parents=True, exist_ok=True)
    base = arguments.output / f"linear_attention_{arguments.name or arguments.device}"
    result = {
        "hardware": hardware(arguments.device), "commit": arguments.commit or commit("raysp", "benchmarks/*.py"),
        "command": " ".join(["python", *sys.argv]), "torch": torch.__version__, "device": arguments.device,
        "degree": arguments.degree, **asdict(task), "rows": rows,
    }  # fmt: skip
    base.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    base.with_suffix(".md").write_text(_markdown(result))
    if rows:
        _plot(result, base.with_suffix(".png"))
    console.print(f"written to {base}.json, .md, .png")


def _markdown(result: dict[str, Any]) -> str:
    lines = [
        f"`{result['command']}` at {result['commit']} on {result['hardware']}; torch {result['torch']}.",
        "",
        f"One document over {result['degree']} ranks, forward and backward, {result['num_heads']} heads of "
        f"{result['key_size']} x {result['value_size']}, {result['dtype']}, kernel {result['kernel']}; medians of "
        f"{result['rounds']} interleaved measurements, of the slowest rank. `share`: the local operator's time for one "
        "rank's tokens / time. `sent`: by the rank that sends most.",
    ]
    cases = dict.fromkeys((row["family"], row["num_tokens"]) for row in result["rows"])
    for case in cases:
        rows = [row for row in result["rows"] if (row["family"], row["num_tokens"]) == case]
        lines += ["", f"## {_title(rows[0])}", "", f"| {' | '.join(_HEADINGS)} |", "|---|" + "---:|" * 5]
        lines += [f"| {' | '.join(_cells(row))} |" for row in sorted(rows, key=lambda row: float(row["time_s"]))]
    return "\n".join(lines) + "\n"


def _plot(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    families = list(dict.fromkeys(row["family"] for row in result["rows"]))
    figure = Figure(figsize=(4.0 * len(families) + 1.5, 3.6), layout="constrained")
    panels = figure.subplots(1, len(families), squeeze=False, sharey=True)[0]
    for axes, family in zip(panels, families, strict=True):
        rows = [row for row in result["rows"] if row["family"] == family and row["name"] != ALONE]
        for name in dict.fromkeys(row["name"] for row in rows):
            points = [(row["num_tokens"], row["share"]) for row in rows if row["name"] == name]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_title(family, fontsize=10)
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("share of the unsharded operator")
    panels[0].set_ylim(0, 1.1)
    figure.suptitle(f"{result['hardware']}, {result['degree']} ranks, forward and backward", fontsize=11)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=120)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--degree", type=int, default=None, help="ranks; all GPUs by default, 4 on CPU")
    parser.add_argument("--families", default="mamba2,gla,gated_deltanet,kda", help=f"of {','.join(FAMILIES)}")
    parser.add_argument("--tokens", default=None, help="of the document; default 16384 to 1048576, on CPU 2048 to 8192")
    parser.add_argument("--heads", type=int, default=None, help="default 16, on CPU 4")
    parser.add_argument("--key-size", type=int, default=None, help="default 128, on CPU 32")
    parser.add_argument("--value-size", type=int, default=None, help="default 128, on CPU 32")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default=None, help="default bf16, on CPU fp32")
    parser.add_argument(
        "--kernel", choices=KERNELS, default=None, help="of the local operator; fla on GPUs that have it"
    )
    parser.add_argument("--rows", default="", help=f"of {','.join((*METHODS, RING, FLA))}; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--time-budget-s", type=float, default=3600.0, help="begin no case after it")
    parser.add_argument("--name", default=None)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", default=None, help="where the checkout has no .git")
    arguments = parser.parse_args()
    tiny = arguments.device == "cpu"
    if not tiny and not torch.cuda.is_available():
        parser.error("no CUDA device; expected at least 2 GPUs. Use --device cpu for gloo.")
    unknown = set(arguments.families.split(",")) - set(FAMILIES)
    if unknown:
        parser.error(f"family {min(unknown)!r} is unknown; expected {', '.join(FAMILIES)}.")
    arguments.rows = tuple(name for name in arguments.rows.split(",") if name)
    unknown = set(arguments.rows) - {*METHODS, RING, FLA}
    if unknown:
        parser.error(f"row {min(unknown)!r} is unknown; expected {', '.join((*METHODS, RING, FLA))}.")
    arguments.degree = arguments.degree or (4 if tiny else torch.cuda.device_count())
    arguments.tokens = arguments.tokens or ("2048,8192" if tiny else "16384,65536,262144,524288,1048576")
    arguments.kernel = arguments.kernel or ("fla" if not tiny and find_spec("fla") else "torch")
    arguments.heads = arguments.heads or (4 if tiny else 16)
    arguments.key_size = arguments.key_size or (32 if tiny else 128)
    arguments.value_size = arguments.value_size or (32 if tiny else 128)
    arguments.dtype = arguments.dtype or ("fp32" if tiny else "bf16")
    return arguments


if __name__ == "__main__":
    main()
