"""Compare planners by predicted step time: static degrees, the best degree per batch, FlexSP's formulation, raysp.

    python benchmarks/planner.py                        # every shipped distribution, 2 seeds, 3 caps
    python benchmarks/planner.py --quick --no-flexsp    # minutes
    python benchmarks/planner.py --files DIR            # DIR/wikipedia.txt, ... instead of the shipped tables
    python benchmarks/planner.py --large                # 4096 sequences on 1024 GPUs: 20 s against 300 s
    python benchmarks/planner.py --lookahead            # one core: does planning keep up with 1 s steps?

All rows are predictions of one cost model; every plan is judged again by `planner.validate_plan`. Each raysp plan is
made in a fresh process after one small warm-up plan, which gives its wall time, CPU time and peak memory. FlexSP takes
about ``--flexsp-cpu-s`` seconds of CPU for each micro-batch and count, so its plans are kept in
``planner_flexsp_cache.json`` beside the results, by batch and parameters; a run that was stopped goes on from there.
Its planning time is CPU time of all its programs.
Gaps are to the best certified bound of the batch that any row proved.

Writes ``benchmarks/results/planner_<name>.{json,md,png}``.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# This file is called as the package that it measures; its folder must not come first.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [str(_HERE.parent), *(entry for entry in sys.path if Path(entry or ".").resolve() != _HERE)]

from rich.console import Console  # noqa: E402
from rich.progress import (  # noqa: E402
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table  # noqa: E402

from benchmarks.provenance import commit  # noqa: E402
from planner import (  # noqa: E402
    CostModel,
    StepPlan,
    draw_batches,
    flexsp_plan,
    load_distribution,
    load_preset,
    plan_step,
    read_lengths,
    validate_plan,
)
from planner.flexsp import FilledGroup, assembled_plan  # noqa: E402

DISTRIBUTIONS = ("wikipedia", "wlbllm-128k", "prolong", "pretrain-mix", "long-documents")
CAPS = (131072, 262144, 393216)
FLEXSP = "FlexSP"
BATCH_ADAPTIVE = "batch-adaptive"
BEST_STATIC = "best static"
RAYSP = "raysp {:g} s"


@dataclasses.dataclass(frozen=True)
class Case:
    """One batch; caps that give the same batch share it, so that no batch counts twice in a mean."""

    distribution: str
    seed: int
    caps: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.distribution} seed {self.seed} cap {'/'.join(f'{cap // 1024}K' for cap in self.caps)}"


def main() -> None:
    arguments = _arguments()
    if arguments.child:
        _child()
        return
    console = Console(width=max(150, Console().width))
    arguments.output.mkdir(parents=True, exist_ok=True)
    model = load_preset(arguments.preset)
    if arguments.large:
        name, result = "large", _large(arguments, model, console)
    elif arguments.lookahead:
        name, result = "lookahead", _lookahead(arguments, model, console)
    else:
        name, result = "quick" if arguments.quick else "comparison", _comparison(arguments, model, console)
    if arguments.fill_cache:
        return
    if arguments.files:
        name += "_files"
    result = {
        "hardware": _hardware(),
        "commit": commit("planner"),
        "command": " ".join(["python", *sys.argv]),
        "preset": arguments.preset,
        "num_gpus": arguments.num_gpus,
        "source": "lengths files" if arguments.files else "shipped distributions",
        **result,
    }
    base = arguments.output / f"planner_{name}"
    base.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    base.with_suffix(".md").write_text(_markdown(result))
    if "summary" in result:
        _plot(result, base.with_suffix(".png"))
    console.print(f"written to {base}.json, .md" + (", .png" if "summary" in result else ""))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="flexsp-gpt7b-64xa100-40g")
    parser.add_argument("--num-gpus", type=int, default=None, help="default 64; 1024 with --large")
    parser.add_argument("--distributions", default=None, help=f"comma-separated; default {','.join(DISTRIBUTIONS)}")
    parser.add_argument("--files", type=Path, default=None, help="folder of NAME.txt to use instead of the tables")
    parser.add_argument("--seeds", type=int, default=2, help="seeds 0 .. SEEDS-1")
    parser.add_argument("--caps", default=",".join(map(str, CAPS)), help="longest sequence in tokens; longer are split")
    parser.add_argument("--limits-s", default="1,5", help="seconds of search of the raysp rows")
    parser.add_argument("--quick", action="store_true", help="one seed, one cap")
    parser.add_argument("--no-flexsp", action="store_true")
    parser.add_argument("--flexsp-cached", action="store_true", help="FlexSP only where the cache has it")
    parser.add_argument("--flexsp-cpu-s", type=float, default=10.0, help="CPU seconds for each micro-batch")
    parser.add_argument("--flexsp-processes", type=int, default=1)
    parser.add_argument("--fill-cache", action="store_true", help="only solve what the FlexSP cache lacks")
    parser.add_argument("--large", action="store_true", help="4096 sequences on 1024 GPUs")
    parser.add_argument("--large-limits-s", default="20,300")
    parser.add_argument("--lookahead", action="store_true", help="planning throughput on one core")
    parser.add_argument("--lookahead-limit-s", type=float, default=0.9, help="search; the rest of the second is slack")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.num_gpus is None:
        arguments.num_gpus = 1024 if arguments.large else 64
    if arguments.distributions is None and arguments.large:
        arguments.distributions = "wikipedia,wlbllm-128k"
    arguments.distributions = (arguments.distributions or ",".join(DISTRIBUTIONS)).split(",")
    arguments.caps = [int(cap) for cap in arguments.caps.split(",")]
    if arguments.quick:
        arguments.seeds, arguments.caps = 1, arguments.caps[-1:]
    return arguments


# ---- batches


def _cases(arguments: argparse.Namespace, batch_size: int | None = None) -> list[Case]:
    cases: list[Case] = []
    for seed in range(arguments.seeds):
        for distribution in arguments.distributions:
            size = batch_size or (64 if distribution == "long-documents" else 512)
            caps_of: dict[tuple[int, ...], list[int]] = {}
            for cap in arguments.caps:
                caps_of.setdefault(_batch(arguments, distribution, size, seed, cap), []).append(cap)
            cases += [Case(distribution, seed, tuple(caps), lengths) for lengths, caps in caps_of.items()]
    return cases


def _batch(arguments: argparse.Namespace, distribution: str, size: int, seed: int, cap: int) -> tuple[int, ...]:
    if arguments.files is not None:
        names = (f"{distribution}.txt", f"{distribution.replace('-', '_')}.txt")
        found = [arguments.files / name for name in names if (arguments.files / name).exists()]
        if found:
            return draw_batches(read_lengths(found[0]), size, 1, seed=seed, max_length=cap)[0]
    return tuple(int(s) for s in load_distribution(distribution).sample(size, seed=seed, max_length=cap))


# ---- the comparison


def _comparison(arguments: argparse.Namespace, model: CostModel, console: Console) -> dict[str, Any]:
    cases = _cases(arguments)
    limits = [float(text) for text in arguments.limits_s.split(",")]
    cache = FlexSPCache(arguments.output / "planner_flexsp_cache.json", arguments, model)
    solved: list[dict[str, Any]] = []
    try:
        with _progress(console) as progress:
            task = progress.add_task("", total=len(cases))
            for case in cases:
                progress.update(task, description=case.name)
                flexsp = None if arguments.no_flexsp else cache.row(case, solve=not arguments.flexsp_cached)
                rows = {} if flexsp is None else {FLEXSP: flexsp}
                if not arguments.fill_cache:
                    rows |= _baseline_rows(case, arguments, model)
                    for limit in limits:
                        policy = {"policy": "adaptive", "time_limit_s": limit}
                        rows[RAYSP.format(limit)] = _in_child(case, [policy], arguments, model)[0]
                    solved.append(_judged(case, rows))
                    _show_case(progress.console, solved[-1])
                progress.advance(task)
    except KeyboardInterrupt:
        console.print(f"stopped; {len(solved)} of {len(cases)} batches are done")
    if not solved:
        return {}
    summary = _summary(solved)
    console.print(_summary_table(summary))
    targets = _targets(summary["all"])
    for line in targets:
        console.print(line)
    return {
        "seeds": arguments.seeds, "caps": arguments.caps, "targets": targets, "summary": summary, "cases": solved,
    }  # fmt: skip


def _baseline_rows(case: Case, arguments: argparse.Namespace, model: CostModel) -> dict[str, dict[str, Any]]:
    longest = max(case.lengths)
    degrees = [1 << power for power in range(arguments.num_gpus.bit_length())]
    fitting = [d for d in degrees if model.max_tokens(d, arguments.num_gpus) >= longest and model.allows_degree(d)]
    policies = [BATCH_ADAPTIVE, *(f"static:{degree}" for degree in fitting)]
    rows = _in_child(case, [{"policy": policy} for policy in policies], arguments, model)
    return dict(zip(policies, rows, strict=True))


def _judged(case: Case, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    bound_s = max(row["lower_bound_s"] for row in rows.values())
    for row in rows.values():
        row["gap"] = row["step_time_s"] / bound_s - 1
        row["relative_to_batch_adaptive"] = row["step_time_s"] / rows[BATCH_ADAPTIVE]["step_time_s"]
        if FLEXSP in rows:
            row["relative_to_flexsp"] = row["step_time_s"] / rows[FLEXSP]["step_time_s"]
    return {
        "distribution": case.distribution,
        "seed": case.seed,
        "caps": list(case.caps),
        "num_sequences": len(case.lengths),
        "num_tokens": sum(case.lengths),
        "longest_tokens": max(case.lengths),
        "lower_bound_s": bound_s,
        "rows": rows,
    }


def _summary(solved: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Per distribution and over all: each row's means; the best static degree is the best over all its batches."""
    by_distribution: dict[str, list[dict[str, dict[str, Any]]]] = {}
    for item in solved:
        by_distribution.setdefault(item["distribution"], []).append(dict(item["rows"]))
    for batches in by_distribution.values():
        everywhere = set.intersection(*(set(rows) for rows in batches))
        totals = {
            name: sum(rows[name]["step_time_s"] for rows in batches)
            for name in everywhere
            if name.startswith("static:")
        }
        if totals:
            best = min(totals, key=lambda name: totals[name])
            for rows in batches:
                rows[BEST_STATIC] = {**rows[best], "degree": int(best.removeprefix("static:"))}
    groups = {"all": [rows for batches in by_distribution.values() for rows in batches], **by_distribution}
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for group, batches in groups.items():
        names = dict.fromkeys(name for rows in batches for name in rows if not name.startswith("static:"))
        summary[group] = {name: _means([rows[name] for rows in batches if name in rows]) for name in names}
    return summary


def _targets(rows: dict[str, dict[str, float]]) -> list[str]:
    """Say for every target of the project whether these batches reach it."""
    checks: list[tuple[str, float | None, float]] = []
    for name, means in rows.items():
        if name == RAYSP.format(1):
            checks.append((f"{name}: mean / FlexSP", means.get("relative_to_flexsp"), 0.98))
        if name == RAYSP.format(5):
            checks += [
                (f"{name}: largest / FlexSP", means.get("largest_relative_to_flexsp"), 1.0),
                (f"{name}: mean / FlexSP", means.get("relative_to_flexsp"), 0.94),
                (f"{name}: mean / batch-adaptive", means.get("relative_to_batch_adaptive"), 0.735),
                (f"{name}: mean gap", means["mean_gap"], 0.05),
                (f"{name}: longest planning, seconds", means["largest_plan_time_s"], 5.0),
                (f"{name}: peak memory, MB", means["largest_peak_memory_bytes"] / 1e6, 500.0),
            ]
    return [
        f"{what}: {measured:.3f}, target <= {wanted:g}: {'met' if measured <= wanted else 'MISSED'}"
        for what, measured, wanted in checks
        if measured is not None
    ]


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    means: dict[str, float] = {"num_batches": len(rows)}
    for key in ("relative_to_flexsp", "relative_to_batch_adaptive"):
        ratios = [row[key] for row in rows if key in row]
        if ratios:
            means[key] = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
            means[f"largest_{key}"] = max(ratios)
    means["mean_gap"] = math.fsum(row["gap"] for row in rows) / len(rows)
    means["largest_gap"] = max(row["gap"] for row in rows)
    means["mean_plan_time_s"] = math.fsum(row["plan_time_s"] for row in rows) / len(rows)
    means["largest_plan_time_s"] = max(row["plan_time_s"] for row in rows)
    means["largest_peak_memory_bytes"] = max(row.get("peak_memory_bytes", 0) for row in rows)
    return means


# ---- plans in fresh processes


def _in_child(
    case: Case,
    requests: list[dict[str, Any]],
    arguments: argparse.Namespace,
    model: CostModel,
    *,
    one_core: bool = False,
) -> list[dict[str, Any]]:
    content = {
        "lengths": case.lengths,
        "num_gpus": arguments.num_gpus,
        "model": model.to_json(),
        "requests": requests,
        "one_core": one_core,
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--child"]
    done = subprocess.run(command, input=json.dumps(content), stdout=subprocess.PIPE, text=True, check=True)
    return list(json.loads(done.stdout))


def _child() -> None:
    """Plan what standard input asks for, and write one row for each request."""
    content = json.load(sys.stdin)
    model = CostModel.from_json(content["model"])
    lengths, num_gpus = tuple(content["lengths"]), content["num_gpus"]
    if content["one_core"]:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    # Imports and compiled code are loaded once in a job's life, not once a plan.
    plan_step(lengths[:16], num_gpus, model, time_limit_s=0.2)
    rows = []
    for request in content["requests"]:
        started_s, cpu_s = time.perf_counter(), _cpu_s()
        plan = plan_step(lengths, num_gpus, model, **request)
        wall_s = time.perf_counter() - started_s
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rows.append(_row(plan, lengths, model, wall_s, _cpu_s() - cpu_s, peak_bytes))
    json.dump(rows, sys.stdout)


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(item.ru_utime + item.ru_stime for item in used)


def _row(
    plan: StepPlan, lengths: Sequence[int], model: CostModel, wall_s: float, cpu_s: float, peak_bytes: int = 0
) -> dict[str, Any]:
    faults = validate_plan(plan, lengths, model)
    if faults:
        raise RuntimeError(f"a plan is not valid: {faults[0]} ({len(faults)} faults)")
    row: dict[str, Any] = {
        "step_time_s": plan.predicted_step_time_s,
        "lower_bound_s": plan.lower_bound_s,
        "num_micro_batches": len(plan.micro_batches),
        "plan_time_s": wall_s,
        "plan_cpu_s": cpu_s,
        "reason": plan.reason,
    }
    return {**row, "peak_memory_bytes": peak_bytes} if peak_bytes else row


class FlexSPCache:
    """FlexSP's groups by batch, predicted costs and parameters, in a JSON file that every new plan is added to.

    Ranks and predicted numbers are made anew when a batch is read, so that a new format of plans loses nothing.
    """

    def __init__(self, path: Path, arguments: argparse.Namespace, model: CostModel) -> None:
        self._path, self._arguments, self._model = path, arguments, model

    def row(self, case: Case, *, solve: bool = True) -> dict[str, Any] | None:
        """Return the row of a batch; one that is not in the file is solved now, or `None` without `solve`."""
        num_gpus, cpu_limit_s = self._arguments.num_gpus, self._arguments.flexsp_cpu_s
        content = [case.lengths, num_gpus, cpu_limit_s, _fingerprint(self._model, num_gpus)]
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        entry = self._read().get(key)
        if entry is None:
            if not solve:
                return None
            entry = self._solve(case)
            # Read again: another run may have added to the file meanwhile.
            partial = self._path.with_suffix(f".partial-{os.getpid()}")
            lines = (f"{json.dumps(k)}: {json.dumps(v)}" for k, v in {**self._read(), key: entry}.items())
            partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
            partial.replace(self._path)
        micro_batches = [[FilledGroup(d, tuple(ids)) for d, ids in groups] for groups in entry["micro_batches"]]
        plan = assembled_plan(case.lengths, micro_batches, num_gpus, self._model, reason=entry["reason"])
        # Wall time on a shared machine says nothing about a solver whose limit is CPU time.
        return _row(plan, case.lengths, self._model, entry["cpu_s"], entry["cpu_s"])

    def _read(self) -> dict[str, Any]:
        return dict(json.loads(self._path.read_text())) if self._path.exists() else {}

    def _solve(self, case: Case) -> dict[str, Any]:
        cpu_s = _cpu_s()
        plan = flexsp_plan(
            case.lengths,
            self._arguments.num_gpus,
            self._model,
            solver_cpu_s=self._arguments.flexsp_cpu_s,
            num_processes=self._arguments.flexsp_processes,
        )
        micro_batches = [[(group.degree, group.sequences) for group in m.groups] for m in plan.micro_batches]
        return {
            "batch": f"{case.distribution}, seed {case.seed}, {len(case.lengths)} sequences",
            "reason": plan.reason,
            "solve_time_s": plan.solve_time_s,
            "cpu_s": _cpu_s() - cpu_s,
            "micro_batches": micro_batches,
        }


def _fingerprint(model: CostModel, num_gpus: int) -> list[list[str]]:
    """Return what a cost model predicts; unlike its hash it is the same for another version of the file's format."""
    degrees = [1 << power for power in range(num_gpus.bit_length())]
    times = [[model.group_time_s(lengths, d) for lengths in ((), (1000,), (30000,))] for d in degrees]
    return [
        [f"{value:.9g}" for value in (*row, model.max_tokens(d, num_gpus))]
        for d, row in zip(degrees, times, strict=True)
    ]


# ---- 1024 GPUs, and look-ahead


def _large(arguments: argparse.Namespace, model: CostModel, console: Console) -> dict[str, Any]:
    limits = [float(text) for text in arguments.large_limits_s.split(",")]
    arguments.seeds, arguments.caps = 1, arguments.caps[-1:]
    table = _table(
        "4096 sequences", ["batch", "search s", "predicted s", "above the longest search", "gap", "plan s", "MB"]
    )
    rows = []
    with _progress(console) as progress:
        cases = _cases(arguments, 4096)
        task = progress.add_task("", total=len(cases) * len(limits))
        for case in cases:
            made = {}
            for limit in limits:
                progress.update(task, description=f"{case.name}, {limit:g} s")
                request = {"policy": "adaptive", "time_limit_s": limit}
                made[limit] = _in_child(case, [request], arguments, model)[0]
                progress.advance(task)
            bound_s = max(row["lower_bound_s"] for row in made.values())
            for limit, row in made.items():
                row["gap"] = row["step_time_s"] / bound_s - 1
                row["above_longest_search"] = row["step_time_s"] / made[limits[-1]]["step_time_s"] - 1
                rows.append({"distribution": case.distribution, "seed": case.seed, "time_limit_s": limit, **row})
                table.add_row(
                    case.name, f"{limit:g}", f"{row['step_time_s']:.3f}", f"{row['above_longest_search']:+.2%}",
                    f"{row['gap']:.1%}", f"{row['plan_time_s']:.1f}", f"{row['peak_memory_bytes'] / 1e6:.0f}",
                )  # fmt: skip
    console.print(table)
    return {"large": rows}


def _lookahead(arguments: argparse.Namespace, model: CostModel, console: Console) -> dict[str, Any]:
    limit, num_plans = arguments.lookahead_limit_s, 10
    table = _table("one core", ["batch", "search s", "mean s a plan", "longest s", "keeps up with 1 s steps"])
    rows = []
    with _progress(console) as progress:
        arguments.caps = arguments.caps[-1:]
        cases = _cases(arguments)
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=case.name)
            requests = [{"time_limit_s": limit, "seed": seed} for seed in range(num_plans)]
            times = [row["plan_time_s"] for row in _in_child(case, requests, arguments, model, one_core=True)]
            mean_s = sum(times) / len(times)
            rows.append({
                "distribution": case.distribution, "seed": case.seed, "time_limit_s": limit, "num_plans": num_plans,
                "mean_plan_time_s": mean_s, "largest_plan_time_s": max(times), "keeps_up": mean_s <= 1.0,
            })  # fmt: skip
            table.add_row(
                case.name, f"{limit:g}", f"{mean_s:.2f}", f"{max(times):.2f}", "yes" if mean_s <= 1.0 else "no"
            )
            progress.advance(task)
    console.print(table)
    return {"lookahead": rows}


# ---- showing


def _show_case(console: Console, item: dict[str, Any]) -> None:
    title = (
        f"{item['distribution']} seed {item['seed']}, {item['num_tokens']:,} tokens, longest {item['longest_tokens']:,}"
    )
    table = _table(title, _HEADINGS)
    for name, row in sorted(item["rows"].items(), key=lambda pair: -pair[1]["step_time_s"]):
        table.add_row(*_cells(name, row))
    console.print(table)


_HEADINGS = ["row", "predicted s", "/ FlexSP", "/ batch-adaptive", "gap", "plan s", "CPU s", "micro-batches", "MB"]


def _cells(name: str, row: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{row['step_time_s']:.3f}",
        f"{row['relative_to_flexsp']:.3f}" if "relative_to_flexsp" in row else "-",
        f"{row['relative_to_batch_adaptive']:.3f}",
        f"{row['gap']:.1%}",
        f"{row['plan_time_s']:.2f}",
        f"{row['plan_cpu_s']:.2f}",
        str(row["num_micro_batches"]),
        f"{row['peak_memory_bytes'] / 1e6:.0f}" if "peak_memory_bytes" in row else "-",
    ]


_SUMMARY_HEADINGS = [
    "distribution", "row", "batches", "/ FlexSP", "largest", "/ batch-adaptive", "largest", "mean gap", "plan s", "longest",
    "MB",
]  # fmt: skip


def _summary_cells(summary: dict[str, dict[str, dict[str, float]]]) -> Iterable[list[str]]:
    for group, rows in summary.items():
        for name, means in rows.items():
            ratios = [
                f"{means[key]:.3f}" if key in means else "-"
                for ratio in ("relative_to_flexsp", "relative_to_batch_adaptive")
                for key in (ratio, f"largest_{ratio}")
            ]
            memory = means["largest_peak_memory_bytes"]
            yield [
                group, name, f"{means['num_batches']:.0f}", *ratios, f"{means['mean_gap']:.1%}",
                f"{means['mean_plan_time_s']:.2f}", f"{means['largest_plan_time_s']:.2f}",
                f"{memory / 1e6:.0f}" if memory else "-",
            ]  # fmt: skip


def _summary_table(summary: dict[str, dict[str, dict[str, float]]]) -> Table:
    table = _table("geometric means of predicted step times", _SUMMARY_HEADINGS)
    for cells in _summary_cells(summary):
        table.add_row(*cells)
    return table


def _markdown(result: dict[str, Any]) -> str:
    lines = [
        f"`{result['command']}` at {result['commit']} on {result['hardware']}; cost model {result['preset']}, "
        f"{result['num_gpus']} GPUs, {result['source']}. Predicted step times.",
        "",
    ]
    if "summary" in result:
        lines += [*(f"- {line}" for line in result["targets"]), ""]
        lines += _markdown_rows(_SUMMARY_HEADINGS, _summary_cells(result["summary"]))
        for item in result["cases"]:
            caps = "/".join(f"{cap // 1024}K" for cap in item["caps"])
            lines += ["", f"{item['distribution']}, seed {item['seed']}, cap {caps}: {item['num_tokens']:,} tokens", ""]
            lines += _markdown_rows(_HEADINGS, (_cells(name, row) for name, row in item["rows"].items()))
    for key in ("large", "lookahead"):
        if key in result:
            headings = [name for name in result[key][0] if name != "reason"]
            cells = [[_number(row[name]) for name in headings] for row in result[key]]
            lines += _markdown_rows(headings, cells)
    return "\n".join(lines) + "\n"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _markdown_rows(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)]


def _plot(result: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    summary = result["summary"]
    with_flexsp = any(FLEXSP in rows for rows in summary.values())
    key = "relative_to_flexsp" if with_flexsp else "relative_to_batch_adaptive"
    names = [name for name in summary["all"] if key in summary["all"][name]]
    order = [name for name in (BEST_STATIC, BATCH_ADAPTIVE, FLEXSP) if name in names]
    order += [name for name in names if name not in order]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.85 / len(order)
    colours = ["#bbbbbb", "#88ccee", "#ddaa33", "#44aa99", "#117733", "#332288"]
    for place, name in enumerate(order):
        x = [group + (place - (len(order) - 1) / 2) * width for group in range(len(summary))]
        heights = [rows[name][key] if name in rows and key in rows[name] else math.nan for rows in summary.values()]
        bars = axes.bar(x, heights, width=width * 0.95, label=name, color=colours[place % len(colours)])
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(summary)), list(summary))
    axes.set_ylabel(f"predicted step time / {FLEXSP if with_flexsp else BATCH_ADAPTIVE}")
    axes.set_title(f"{result['preset']}, {result['num_gpus']} GPUs: geometric means over batches, lower is better")
    axes.legend(ncols=len(order), fontsize=8, loc="lower center", bbox_to_anchor=(0.5, -0.22))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.savefig(path, dpi=120)


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2), header_style="bold")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place == 0 else "right")
    return table


def _progress(console: Console) -> Progress:
    columns = (
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=Console(stderr=True, width=console.width))


def _hardware() -> str:
    names = (
        [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        if Path("/proc/cpuinfo").exists()
        else []
    )
    name = names[0].partition(":")[2].strip() if names else platform.processor()
    return f"{os.cpu_count()} CPU cores ({name or platform.machine()})"


if __name__ == "__main__":
    main()
