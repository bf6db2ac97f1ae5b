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
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
# benchmarks/planner.py would hide the package of its name.
sys.path[:] = [str(_ROOT), *(e for e in sys.path if Path(e or ".").resolve() not in (_ROOT, _ROOT / "benchmarks"))]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.linear_attention_ring import RingLinearAttention  # noqa: E402
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

    device: str
    degree: int
    port: int
    families: tuple[str, ...]
    tokens: tuple[int, ...]
    num_heads: int
    key_size: int
    value_size: int
    dtype: str
    kernel: str
    rounds: int
    deadline_s: float


def main() -> None:
    """Measure, show, write."""
    arguments = _arguments()
    console = Console(width=max(110, Console().width))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    task = Task(
        device=arguments.device, degree=arguments.degree, port=store.port,
        families=tuple(arguments.families.split(",")), tokens=tuple(map(int, arguments.tokens.split(","))),
        num_heads=arguments.heads, key_size=arguments.key_size, value_size=arguments.value_size, dtype=arguments.dtype,
        kernel=arguments.kernel, rounds=arguments.rounds, deadline_s=time.time() + arguments.time_budget_s,
    )  # fmt: skip
    context = multiprocessing.get_context("spawn")
    reports: Any = context.SimpleQueue()
    ranks = [context.Process(target=_run_rank, args=(rank, task, reports)) for rank in range(task.degree)]
    for process in ranks:
        process.start()
    rows: list[dict[str, Any]] = []
    while (report := _next_report(reports, ranks)) is not None:
        rows += report
        _show(report, console)
    for process in ranks:
        process.join()
    _write(arguments, task, rows, console)
    if any(process.exitcode for process in ranks):
        raise SystemExit("a rank failed; what was measured before is written")


def _next_report(reports: Any, ranks: list[Any]) -> list[dict[str, Any]] | None:
    while reports.empty():
        if not all(process.is_alive() for process in ranks):
            return None
        time.sleep(0.1)
    report: list[dict[str, Any]] | None = reports.get()
    return report


def _run_rank(rank: int, task: Task, reports: Any) -> None:
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // task.degree))
    device = torch.device("cuda", rank) if task.device == "cuda" else torch.device("cpu")
    if task.device == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if task.device == "cuda" else "gloo",
        store=dist.TCPStore("127.0.0.1", task.port), rank=rank, world_size=task.degree, timeout=timedelta(minutes=5),
    )  # fmt: skip
    dist.all_reduce(torch.ones(1, device=device))
    group = Communicator.wrap(dist.group.WORLD)
    for family in task.families:
        for num_tokens in task.tokens:
            if _agreed(time.time() < task.deadline_s):
                measured = _measure_case(family, num_tokens, task, group, device)
                if rank == 0:
                    reports.put(measured)
    if rank == 0:
        reports.put(None)
    dist.destroy_process_group()


def _agreed(fine: bool) -> bool:
    votes = torch.tensor([int(fine)])
    dist.all_reduce(votes, dist.ReduceOp.MIN)
    return bool(votes.item())


def _measure_case(
    family: str, num_tokens: int, task: Task, group: Communicator, device: torch.device
) -> list[dict[str, Any]]:
    layout = SequenceLayout([num_tokens], task.degree, "contiguous")
    local = layout.local_tokens(group.group_rank)
    inputs = _inputs(family, local, task, device)
    rule = FAMILIES[family][0]
    share = SequenceLayout([local], 1, "contiguous")

    common = {**inputs, "rule": rule, "kernel": task.kernel}

    def sharded(method: str) -> Callable[[], Tensor]:
        return lambda: parallel_linear_attention(**common, layout=layout, group=group, method=method)[0]

    scale = task.key_size**-0.5
    make = resolve_kernel(task.kernel, device=device, dtype=inputs["q"].dtype, key_size=task.key_size)
    decay = inputs["log_decay"]
    decay_rows = decay.expand(local, -1) if decay is not None and decay.dim() == 1 else decay
    runs: dict[str, Callable[[], Tensor]] = {
        ALONE: lambda: parallel_linear_attention(**common, layout=share, group=None)[0],
        **{method: sharded(method) for method in METHODS if method != "ulysses" or task.num_heads % task.degree == 0},
        RING: lambda: RingLinearAttention.apply(
            inputs["q"], inputs["k"], inputs["v"], decay_rows, inputs["beta"], rule, scale, group, make
        ),
    }
    if device.type == "cuda" and rule == "delta" and find_spec("fla"):
        runs[FLA] = _fla_context_parallel(inputs, num_tokens, group)
    rows = [_row(name, run, inputs, group, device) for name, run in runs.items()]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(task.rounds):
        for name, run in runs.items():
            times[name].append(_slowest(_timed_s(run, inputs, device)))
    for row in rows:
        row |= {"family": family, "num_tokens": num_tokens, "time_s": statistics.median(times[row["name"]])}
        row["tokens_per_s"] = num_tokens / row["time_s"]
    alone_s = rows[0]["time_s"]
    for row in rows:
        row["share"] = alone_s / row["time_s"]
    return rows


def _fla_context_parallel(inputs: dict[str, Any], num_tokens: int, group: Communicator) -> Callable[[], Tensor]:
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


def _inputs(family: str, local: int, task: Task, device: torch.device) -> dict[str, Any]:
    """Random rows of one rank: unit keys and queries, decays and betas as trained layers have them."""
    generator = torch.Generator(device=device).manual_seed(torch.distributed.get_rank())
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


def _both(run: Callable[[], Tensor], inputs: dict[str, Any]) -> None:
    out = run()
    torch.autograd.grad(out, [tensor for tensor in inputs.values() if tensor is not None], torch.ones_like(out))


def _row(
    name: str, run: Callable[[], Tensor], inputs: dict[str, Any], group: Communicator, device: torch.device
) -> dict[str, Any]:
    """Bytes and memory of a first run, which also warms up."""
    group.counter.reset()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    _both(run, inputs)
    peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else 0
    sent = torch.tensor([group.counter.sent_bytes, peak])
    dist.all_reduce(sent, dist.ReduceOp.MAX)
    return {"name": name, "sent_bytes": int(sent[0]), "peak_bytes": int(sent[1])}


def _timed_s(run: Callable[[], Tensor], inputs: dict[str, Any], device: torch.device) -> float:
    dist.barrier() if device.type == "cpu" else dist.all_reduce(torch.ones(1, device=device))
    if device.type == "cuda":
        torch.cuda.synchronize()
    start_s = time.perf_counter()
    _both(run, inputs)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start_s


def _slowest(time_s: float) -> float:
    slowest = torch.tensor([time_s], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest.item())


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
    base = arguments.output / f"linear_attention_{arguments.name or task.device}"
    settings = {key: value for key, value in asdict(task).items() if key not in ("port", "deadline_s")}
    result = {
        "hardware": _hardware(task.device), "commit": arguments.commit or _commit(),
        "command": " ".join(["python", *sys.argv]), "torch": torch.__version__, **settings, "rows": rows,
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


def _hardware(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


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
    parser.add_argument("--kernel", choices=KERNELS, default="auto", help="of the local operator")
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
    arguments.degree = arguments.degree or (4 if tiny else torch.cuda.device_count())
    arguments.tokens = arguments.tokens or ("2048,8192" if tiny else "16384,65536,262144,524288,1048576")
    arguments.heads = arguments.heads or (4 if tiny else 16)
    arguments.key_size = arguments.key_size or (32 if tiny else 128)
    arguments.value_size = arguments.value_size or (32 if tiny else 128)
    arguments.dtype = arguments.dtype or ("fp32" if tiny else "bf16")
    return arguments


if __name__ == "__main__":
    main()
