"""Train the same steps under several planner policies in one run and compare time and loss.

    python benchmarks/end_to_end.py --config jobs/configs/demo.toml --policies adaptive,batch-adaptive,static:auto

Every policy starts from the same weights and sees the same batches, on the same machine, one after the other, with the
cost model measured once. Writes ``benchmarks/results/<name>.json`` and a plot beside it: losses and step times.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

# The planner's benchmark lies beside this file and would hide the package of its name.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [str(_HERE.parent), *(entry for entry in sys.path if Path(entry or ".").resolve() != _HERE)]

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.provenance import commit, hardware  # noqa: E402
from raysp.cluster.driver import train  # noqa: E402
from raysp.config import Config, load_config  # noqa: E402
from raysp.tracking.console import ConsoleReporter  # noqa: E402
from raysp.tracking.events import Event, StepFinished  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="jobs/configs/demo.toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--policies", default="adaptive,batch-adaptive,static:auto")
    parser.add_argument("--skip-steps", type=int, default=2, help="warm-up steps left out of the times")
    parser.add_argument("--loss-tolerance", type=float, default=1e-4, help="largest relative difference of losses")
    parser.add_argument("--name", default="end_to_end")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", default=None, help="where the checkout has no .git")
    arguments = parser.parse_args()
    console = Console(width=160)
    runs: dict[str, list[StepFinished]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for policy in arguments.policies.split(","):
            console.rule(policy)
            # One checkpoint folder for all: the cost model measured first is used by the others.
            overrides = [
                *arguments.set, f"planner.policy={policy}", f"checkpoint.dir={folder}", "checkpoint.resume=none",
                "checkpoint.every_steps=0", "compare.num_steps=0", "tracking.enabled=false",
            ]  # fmt: skip
            runs[policy] = _run(load_config(arguments.config, overrides), console)
    result = _summarize(runs, arguments.skip_steps)
    result |= {
        "hardware": hardware(),
        "commit": arguments.commit or commit("raysp", "planner", "benchmarks/*.py"),
        "command": " ".join(["python", *sys.argv]),
        "config": arguments.config,
        "torch": torch.__version__,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"{arguments.name}.json").write_text(json.dumps(result, indent=2) + "\n")
    _plot(runs, arguments.output / f"{arguments.name}.png")
    console.print(_table(result))
    worst = max(row["largest_loss_difference"] for row in result["policies"].values())
    console.print(f"largest relative difference of losses: {worst:.2e} (tolerance {arguments.loss_tolerance:g})")
    if not worst <= arguments.loss_tolerance:
        sys.exit("the losses of the policies differ by more than the tolerance")


def _run(config: Config, console: Console) -> list[StepFinished]:
    steps: list[StepFinished] = []
    reporter = ConsoleReporter(console, detail="table")

    def listen(event: Event) -> None:
        reporter.handle(event)
        if isinstance(event, StepFinished):
            steps.append(event)

    train(config, on_event=listen)
    return steps


def _summarize(runs: dict[str, list[StepFinished]], skip: int) -> dict[str, Any]:
    first_policy = next(iter(runs))
    reference = runs[first_policy]
    policies = {}
    for policy, steps in runs.items():
        timed = steps[skip:] or steps
        time_s, tokens = sum(step.step_time_s for step in timed), sum(step.num_tokens for step in timed)
        reference_s = sum(step.step_time_s for step in (reference[skip:] or reference))
        errors = [step.predicted_step_time_s / step.step_time_s - 1 for step in timed]
        policies[policy] = {
            "tokens_per_s": tokens / time_s,
            "time_s": time_s,
            "time_relative_to_first": time_s / reference_s,
            "mean_absolute_prediction_error": sum(map(abs, errors)) / len(errors),
            "mfu": _mean([step.mfu for step in timed if step.mfu is not None]),
            "peak_memory_bytes": max(step.peak_memory_bytes for step in steps),
            "largest_loss_difference": max(
                abs(a.loss - b.loss) / abs(b.loss) for a, b in zip(steps, reference, strict=True)
            ),
            "steps": [
                {
                    "loss": step.loss,
                    "tokens": step.num_tokens,
                    "sequences": step.num_sequences,
                    "step_time_s": step.step_time_s,
                    "predicted_step_time_s": step.predicted_step_time_s,
                    "plan_time_s": step.plan_time_s,
                    "groups": [[f"{s.degree}x{s.count} {s.attention}" for s in m.shapes] for m in step.micro_batches],
                }
                for step in steps
            ],
        }
    return {"reference_policy": first_policy, "skipped_steps": skip, "policies": policies}


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"{result['hardware']}; the same batches and weights", title_justify="left")
    for heading in ("policy", "tokens/s", "time s", "relative time", "prediction error", "mfu", "loss differs by"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for policy, row in result["policies"].items():
        table.add_row(
            policy,
            f"{row['tokens_per_s']:,.0f}",
            f"{row['time_s']:.1f}",
            f"{row['time_relative_to_first']:.3f}",
            f"{row['mean_absolute_prediction_error']:.1%}",
            f"{row['mfu']:.1%}" if row["mfu"] else "-",
            f"{row['largest_loss_difference']:.1e}",
        )
    return table


def _plot(runs: dict[str, list[StepFinished]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, times) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for policy, steps in runs.items():
        x = [step.step for step in steps]
        losses.plot(x, [step.loss for step in steps], marker=".", label=policy)
        line = times.plot(x, [step.step_time_s for step in steps], marker=".", label=f"{policy}, measured")
        times.plot(x, [s.predicted_step_time_s for s in steps], "--", color=line[0].get_color(), label="predicted")
    losses.set(xlabel="step", ylabel="loss", title="loss")
    times.set(xlabel="step", ylabel="seconds", title="step time", ylim=(0, None))
    losses.legend()
    times.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
