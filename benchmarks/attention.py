"""Parallel attention against its peers on one machine's GPUs: time, bytes, error and memory, on three kinds of link.

    python benchmarks/attention.py --peers DIR                          # the whole matrix over NVLink
    python benchmarks/attention.py --peers DIR --links nvlink,medium,slow --heads 32/8,32/32 --time-budget-s 540
    python benchmarks/attention.py --peers DIR --quick                  # minutes: 8K and 16K tokens per rank, 32/8 heads
    python benchmarks/attention.py --memory                             # 200 steps of every method: growth and peak
    python benchmarks/attention.py --device cpu --quick                 # gloo, tiny shapes: does everything run?
    python benchmarks/attention.py --simulate                           # no GPU: 4 to 64 ranks on four topologies

Each case (heads, tokens per rank, one document or a packed mix) measures all candidates in turns, so that all see the same
clocks. ``share`` is the time of one GPU for the whole problem, on the same kernel by its best call (dense for one document,
packed otherwise), divided by the ranks and by the candidate's time; ``above ideal`` is what the candidate takes longer than
that: exposed communication and whatever the split costs the kernel. Peers run on raysp's kernels through an adapter; see
`benchmarks.attention_peers` for where their packages come from. A candidate that hangs or breaks the processes becomes a
row that says so, and the rest goes on.

Writes ``benchmarks/results/attention_<name>.{json,md,png}``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
# benchmarks/planner.py would hide the package of its name.
sys.path[:] = [str(_ROOT), *(e for e in sys.path if Path(e or ".").resolve() not in (_ROOT, _ROOT / "benchmarks"))]

import torch  # noqa: E402
from rich.console import Console  # noqa: E402

from benchmarks.attention_cases import (  # noqa: E402
    DENSE,
    HEADS,
    LINKS,
    MEMORY,
    Case,
    Settings,
    error_cases,
    speed_cases,
)
from benchmarks.attention_launch import measure_link  # noqa: E402
from benchmarks.attention_report import markdown, plot, show_targets  # noqa: E402
from benchmarks.attention_simulation import HARDWARE, plot_simulation, simulate  # noqa: E402
from benchmarks.attention_targets import judged, targets  # noqa: E402
from benchmarks.provenance import commit, hardware  # noqa: E402


def main() -> None:
    arguments = _arguments()
    console = Console(width=max(150, Console().width))
    arguments.output.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "hardware": HARDWARE if arguments.simulate else hardware(arguments.device),
        "commit": arguments.commit or commit("raysp", "benchmarks/*.py"),
        "command": " ".join(["python", *sys.argv]),
        "torch": torch.__version__,
    }
    if arguments.simulate:
        result["simulation"] = simulate(console)
    else:
        result |= _measured(arguments, console)
    base = arguments.output / f"attention_{arguments.name}"
    base.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    base.with_suffix(".md").write_text(markdown(result))
    written = ".json, .md"
    if any("both_s" in row for row in result.get("rows", ())):
        plot(result, base.with_suffix(".png"))
        written += ", .png"
    if arguments.simulate:
        plot_simulation(result["simulation"], base.with_suffix(".png"))
        written += ", .png"
    console.print(f"written to {base}{written}")


def _measured(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    started_s = time.time()
    settings = Settings(
        device=arguments.device,
        degree=arguments.degree,
        kernels=tuple(arguments.kernels.split(",")),
        only=tuple(arguments.only.split(",")) if arguments.only else (),
        peers=arguments.peers.resolve() if arguments.peers else None,
        rounds=arguments.rounds,
        target_s=arguments.target_s,
        steps=arguments.steps,
        deadline_s=started_s + arguments.time_budget_s,
        seed=arguments.seed,
    )
    rows: list[dict[str, Any]] = []
    links: dict[str, Any] = {}
    by_link = {link: _cases(arguments, link, is_first=not index) for index, link in enumerate(arguments.links)}
    num_left = sum(map(len, by_link.values()))
    for index, (link, cases) in enumerate(by_link.items()):
        # Links share the time that is left, so that a full matrix does not end after the first.
        left_s = settings.deadline_s - time.time()
        share_s = left_s / (len(by_link) - index)
        measured = measure_link(link, cases, settings, share_s, arguments.stall_s, console)
        rows += measured.rows
        links[link] = measured.speed
        num_left -= measured.num_cases
    rows = judged(rows, settings.degree)
    lines = targets(rows)
    show_targets(lines, console)
    if num_left:
        console.print(f"[yellow]out of time or interrupted: {num_left} cases were not measured")
    return {
        "degree": settings.degree, "device": settings.device, "links": links, "seed": settings.seed,
        "rounds": settings.rounds, "time_s": time.time() - started_s, "num_cases_not_measured": num_left,
        "targets": [str(line) for line in lines], "rows": rows,
    }  # fmt: skip


def _cases(arguments: argparse.Namespace, link: str, *, is_first: bool) -> list[Case]:
    shape = {"head_size": arguments.head_size, "degree": arguments.degree, "seed": arguments.seed}
    if arguments.memory:
        tokens = arguments.tokens[:1]
        cases = speed_cases(link, arguments.heads[:1], tokens, arguments.mixes, **shape)
        return [Case(**{**vars(case), "kind": MEMORY}) for case in cases]
    cases = speed_cases(link, arguments.heads, arguments.tokens, arguments.mixes, **shape)
    # Errors do not depend on the link.
    errors = is_first and not arguments.no_error
    small = {"num_tokens": min(arguments.error_tokens, *arguments.tokens)}
    return [*(error_cases(link, arguments.heads, arguments.mixes, **shape, **small) if errors else []), *cases]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Defaults of shapes depend on --device and --quick."
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--degree", type=int, default=None, help="ranks; all GPUs by default, 2 on CPU")
    parser.add_argument("--links", default=None, help=f"of {','.join(LINKS)}; default nvlink")
    parser.add_argument("--heads", default=None, help=f"default {','.join(f'{q}/{k}' for q, k in HEADS)}")
    parser.add_argument("--head-size", type=int, default=None, help="default 128")
    parser.add_argument("--tokens", default=None, help="tokens per rank; default 8192,16384,4096,32768")
    parser.add_argument("--mixes", default=None, help="dense or distributions; default dense,wlbllm-128k,prolong")
    parser.add_argument("--kernels", default=None, help="of fa4,fa2,aten,eager; default fa4,aten")
    parser.add_argument(
        "--only", default=None, help="names or patterns of rows, such as 'raysp*,ring-flash-attn zigzag'"
    )
    parser.add_argument("--peers", type=Path, default=None, help="folder with the peers' unpacked packages")
    parser.add_argument("--quick", action="store_true", help="few small shapes, fewer rounds")
    parser.add_argument("--rounds", type=int, default=None, help="interleaved measurements of each row; default 5")
    parser.add_argument("--target-s", type=float, default=0.03, help="seconds of one measurement")
    parser.add_argument("--error-tokens", type=int, default=512, help="tokens per rank in the comparison with fp64")
    parser.add_argument("--no-error", action="store_true", help="leave the comparison with fp64 out")
    parser.add_argument("--memory", action="store_true", help="many steps on the first shape: growth and peak memory")
    parser.add_argument("--steps", type=int, default=200, help="of --memory")
    parser.add_argument("--simulate", action="store_true", help="predicted times for 4 to 64 ranks, no GPU needed")
    parser.add_argument("--time-budget-s", type=float, default=3600.0, help="stop in time and write what is there")
    parser.add_argument("--stall-s", type=float, default=150.0, help="give up a row that says nothing for so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default=None, help="of the results")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", default=None, help="where the checkout has no .git")
    arguments = parser.parse_args()
    if not (arguments.simulate or arguments.device == "cpu" or torch.cuda.is_available()):
        parser.error("no CUDA device; expected at least 2 GPUs. Use --device cpu for a dry run.")
    tiny = arguments.device == "cpu"
    if arguments.degree is None:
        arguments.degree = 2 if tiny or arguments.simulate else torch.cuda.device_count()
    arguments.links = _known(parser, arguments.links or LINKS[0], LINKS)
    heads = arguments.heads or ("4/2" if tiny else "32/8" if arguments.quick else "32/8,32/32,64/8")
    arguments.heads = [tuple(map(int, pair.split("/"))) for pair in heads.split(",")]
    arguments.head_size = arguments.head_size or (32 if tiny else 128)
    tokens = arguments.tokens or ("128" if tiny else "8192,16384" if arguments.quick else "8192,16384,4096,32768")
    arguments.tokens = [int(text) for text in tokens.split(",")]
    mixes = f"{DENSE},wlbllm-128k" if arguments.quick else f"{DENSE},wlbllm-128k,prolong"
    arguments.mixes = (arguments.mixes or mixes).split(",")
    arguments.kernels = arguments.kernels or ("aten" if tiny else "fa4,aten")
    arguments.rounds = arguments.rounds or (3 if arguments.quick or tiny else 5)
    kind = (
        "simulation" if arguments.simulate else "memory" if arguments.memory else "quick" if arguments.quick else "full"
    )
    arguments.name = arguments.name or (f"{kind}_cpu" if tiny else kind)
    return arguments


def _known(parser: argparse.ArgumentParser, text: str, known: tuple[str, ...]) -> list[str]:
    chosen = text.split(",")
    for name in chosen:
        if name not in known:
            parser.error(f"{name!r} is unknown; expected {', '.join(known)}.")
    return chosen


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main()
