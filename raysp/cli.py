"""The ``raysp`` command: options, and how errors end. What commands do is in ``raysp.commands``, imported when used.

An error is one line on standard error; exit code 2 for bad input, 1 for failed work, 130 after Ctrl-C. ``--debug``
(anywhere) or ``RAYSP_DEBUG=1`` shows the traceback as well.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from raysp.errors import MissingExtraError, RayspError

app = typer.Typer(
    name="raysp",
    help="Elastic long-context training on Ray with heterogeneous sequence-parallel groups.",
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_EXTRAS = {
    **dict.fromkeys(
        ("torch", "ray", "mlflow", "pyarrow", "transformers", "tokenizers", "safetensors", "tenacity", "psutil"),
        "train",
    ),
    "matplotlib": "plot",
    "liger_kernel": "gpu",
}
_JOB = "Training"
_DATA = "Data"
_PLAN = "Planning"

LengthsFile = Annotated[Path, typer.Option("--lengths", help="One integer (tokens) per line.", metavar="FILE")]
Preset = Annotated[str | None, typer.Option(help="Cost model that ships with raysp.", metavar="NAME")]
CostModelFile = Annotated[
    Path | None, typer.Option("--cost-model", help="Cost model that raysp calibrate wrote.", metavar="FILE")
]
ConfigFile = Annotated[Path, typer.Option("--config", help="TOML configuration.", metavar="FILE")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override one value; may be repeated.", metavar="KEY=VALUE")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Address = Annotated[str | None, typer.Option(help="Ray dashboard; default RAY_API_SERVER_ADDRESS, or this machine.")]


@app.callback()
def _global_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Elastic long-context training on Ray with heterogeneous sequence-parallel groups."""


@app.command(rich_help_panel=_PLAN)
def plan(
    lengths: LengthsFile,
    preset: Preset = None,
    cost_model: CostModelFile = None,
    num_gpus: Annotated[int | None, typer.Option(min=1, help="Default: those the cost model was measured on.")] = None,
    policy: Annotated[str, typer.Option(help="adaptive, batch-adaptive, static:auto or static:D.")] = "adaptive",
    sync: Annotated[str, typer.Option(help="per-layer or per-step.")] = "per-layer",
    degrees: Annotated[str, typer.Option(help="powers-of-two or any.")] = "powers-of-two",
    attention: Annotated[str | None, typer.Option(help="Method of groups; default: the cost model's.")] = None,
    time_limit_s: Annotated[float, typer.Option(min=0.0, help="Seconds of search.")] = 2.0,
    node_limit: Annotated[
        int | None, typer.Option(min=1, help="Search nodes in place of the time limit; the same plan everywhere.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    cluster: Annotated[
        Path | None, typer.Option(help="JSON of unequal or missing GPUs, node by node.", metavar="FILE")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write.", metavar="FILE")] = None,
    as_json: Json = False,
) -> None:
    """Plan one training step: which GPUs form which groups, and which group gets which sequences."""
    from raysp.commands import plan as command

    request = command.PlanRequest(num_gpus, policy, sync, degrees, attention, time_limit_s, node_limit, seed, cluster)
    command.plan(lengths, command.read_cost_model(preset, cost_model), request, output=output, as_json=as_json)


@app.command(rich_help_panel=_PLAN)
def validate(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="What raysp plan wrote.")],
    lengths: LengthsFile,
    preset: Preset = None,
    cost_model: CostModelFile = None,
) -> None:
    """Check a plan: every sequence once, ranks disjoint, memory, predicted times."""
    from raysp.commands import plan as command

    command.validate(plan_file, lengths, command.read_cost_model(preset, cost_model))


@app.command(rich_help_panel=_PLAN)
def explain(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="What raysp plan wrote.")],
    lengths: LengthsFile,
    preset: Preset = None,
    cost_model: CostModelFile = None,
    what_if: Annotated[
        bool, typer.Option("--what-if/--no-what-if", help="Plan again with more memory, faster links, other nodes ...")
    ] = True,
    what_if_time_limit_s: Annotated[
        float, typer.Option(min=0.0, help="Seconds of search of each of about a dozen plans.")
    ] = 1.0,
    node_limit: Annotated[
        int | None, typer.Option(min=1, help="Search nodes in place of the time limit; the same rows everywhere.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what bounds a plan, what long sequences cost, and what more memory, links or nodes would change."""
    from raysp.commands import explain as command
    from raysp.commands.plan import read_cost_model

    command.explain(
        plan_file,
        lengths,
        read_cost_model(preset, cost_model),
        what_if_time_limit_s=what_if_time_limit_s if what_if else None,
        node_limit=node_limit,
        as_json=as_json,
    )


@app.command(rich_help_panel=_PLAN)
def simulate(
    lengths: Annotated[
        str,
        typer.Option(
            metavar="FILE|NAME", help="Lengths file, Parquet file, dataset, or distribution that ships with raysp."
        ),
    ],
    preset: Preset = None,
    cost_model: CostModelFile = None,
    num_gpus: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N[,N...]",
            help="May be repeated. Default: those the cost model was measured on.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of a batch.")] = 512,
    num_batches: Annotated[int, typer.Option(min=1)] = 10,
    policies: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME...]",
            help="static (every power of two), static:auto, static:D, batch-adaptive, flexsp, adaptive. "
            "Default: static,batch-adaptive,adaptive, and flexsp where --flexsp-cpu-s is given.",
        ),
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Split longer documents first.")] = None,
    flexsp_cpu_s: Annotated[
        float,
        typer.Option(
            min=0.0, help="CPU seconds of each micro-batch in FlexSP's formulation; it is slow, so 0 leaves it out."
        ),
    ] = 0.0,
    time_limit_s: Annotated[float, typer.Option(min=0.0, help="Seconds of search of each adaptive plan.")] = 2.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    marginal: Annotated[
        bool, typer.Option("--marginal", help="Also say what one GPU or node more or less is worth.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="PNG to write.", metavar="FILE")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write.", metavar="FILE")] = None,
    as_json: Json = False,
) -> None:
    """Compare policies and cluster sizes on batches of a corpus, by predicted times."""
    from raysp.commands import simulate as command
    from raysp.commands.plan import read_cost_model

    request = command.SimulateRequest(
        num_gpus=command.read_num_gpus(num_gpus or ()),
        batch_size=batch_size,
        num_batches=num_batches,
        policies=None if policies is None else tuple(name.strip() for name in policies.split(",")),
        max_length=max_length,
        flexsp_cpu_s=flexsp_cpu_s,
        time_limit_s=time_limit_s,
        seed=seed,
        marginal=marginal,
    )
    model = read_cost_model(preset, cost_model)
    command.run(lengths, model, request, output=output, plot=plot, as_json=as_json)


@app.command(rich_help_panel=_DATA)
def lengths(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FILE|DATASET|NAME",
            help="Lengths file, Parquet file, dataset, or distribution that ships with raysp.",
        ),
    ],
    against: Annotated[
        Path | None, typer.Option(help="Say whether this source's lengths differ.", metavar="FILE|DATASET|NAME")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG to write.", metavar="FILE")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Split longer documents first.")] = None,
    drop_empty: Annotated[bool, typer.Option("--drop-empty", help="Leave out documents without tokens.")] = False,
    as_json: Json = False,
) -> None:
    """Show how long the sequences are."""
    from raysp.commands import lengths as command

    command.lengths(source, against=against, plot=plot, as_json=as_json, max_length=max_length, drop_empty=drop_empty)


@app.command(rich_help_panel=_DATA)
def prepare(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="Folder or file of text, JSON lines or Parquet.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", metavar="DIR")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json, or a folder with it; nothing is downloaded.", metavar="PATH")
    ] = None,
    train_tokenizer: Annotated[
        int | None, typer.Option(help="Train a byte-level BPE on the input.", metavar="VOCAB_SIZE")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Only files that match; may be repeated.", metavar="PATTERN")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Not these files or folders; may be repeated.", metavar="PATTERN")
    ] = None,
    input_format: Annotated[str, typer.Option("--format", help="auto, text, jsonl or parquet.")] = "auto",
    text_column: Annotated[str, typer.Option(help="Column of the text.")] = "text",
    end_token: Annotated[str | None, typer.Option(help="Ends a document; default <|endoftext|>.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a dataset that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Tokenize documents into Parquet that raysp train reads."""
    if input_format not in ("auto", "text", "jsonl", "parquet"):
        raise typer.BadParameter(f"{input_format!r}; expected auto, text, jsonl or parquet.", param_hint="--format")
    from raysp.commands import prepare as command

    command.prepare(
        source,
        output,
        as_json=as_json,
        tokenizer=tokenizer,
        train_tokenizer=train_tokenizer,
        include=include or (),
        exclude=exclude or (),
        input_format=input_format,
        text_column=text_column,
        end_token=end_token,
        overwrite=overwrite,
    )


@app.command(rich_help_panel=_JOB)
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option(help="auto (the newest checkpoint), none, or a checkpoint; default: the config's.")
    ] = None,
) -> None:
    """Train as the configuration says."""
    from raysp.commands import train as command

    command.run(config, overrides or [], resume)


@app.command(rich_help_panel=_JOB)
def calibrate(
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write.", metavar="FILE")],
    config: Annotated[
        Path | None, typer.Option(help="TOML configuration, measured on its workers.", metavar="FILE")
    ] = None,
    overrides: Overrides = None,
    samples: Annotated[
        Path | None,
        typer.Option(help="CSV or JSON of measured groups: lengths, degree, time_s ...", metavar="FILE"),
    ] = None,
    num_gpus: Annotated[int | None, typer.Option(min=1, help="With --samples: GPUs of the job measured.")] = None,
    memory_limit_bytes: Annotated[float | None, typer.Option(help="With --samples: what one GPU may use.")] = None,
    model_state_bytes: Annotated[
        float | None, typer.Option(help="With --samples: model states, summed over the GPUs.")
    ] = None,
    bytes_per_token: Annotated[
        float | None, typer.Option(help="With --samples that have no memory_bytes: activations.")
    ] = None,
    unsharded_state_bytes: Annotated[
        float | None, typer.Option(help="With --samples: what --sync per-step holds besides on every GPU.")
    ] = None,
    attention: Annotated[str | None, typer.Option(help="With --samples that name no method; default: ulysses.")] = None,
    num_heads: Annotated[int | None, typer.Option(min=1, help="With --samples: query heads.")] = None,
    num_kv_heads: Annotated[int | None, typer.Option(min=1, help="With --samples: key/value heads.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="With --samples.")] = None,
) -> None:
    """Make a cost model: measured on the workers of a configuration, or fitted to samples in a file."""
    from raysp.commands import calibrate as command

    request = command.SamplesRequest(
        num_gpus,
        memory_limit_bytes,
        model_state_bytes,
        bytes_per_token,
        unsharded_state_bytes,
        attention,
        num_heads,
        num_kv_heads,
        gpus_per_node,
    )
    command.run(config, overrides or [], samples, request, output)


@app.command(rich_help_panel=_JOB)
def submit(
    address: Annotated[str, typer.Option(help="Ray dashboard, for example http://head:8265.", metavar="URL")],
    config: ConfigFile,
    overrides: Overrides = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show the output until the job ends.")] = False,
) -> None:
    """Send a training run to a Ray cluster as a job."""
    from raysp.commands import job as command

    command.submit(address, config, overrides or [], follow)


@app.command(rich_help_panel=_JOB)
def status(job_id: str, address: Address = None) -> None:
    """Say how a job is doing."""
    from raysp.commands import job as command

    command.status(job_id, address)


@app.command(rich_help_panel=_JOB)
def logs(
    job_id: str,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Until the job ends.")] = False,
) -> None:
    """Print the output of a job."""
    from raysp.commands import job as command

    command.logs(job_id, address, follow)


@app.command(rich_help_panel=_JOB)
def stop(job_id: str, address: Address = None) -> None:
    """Stop a job."""
    from raysp.commands import job as command

    command.stop(job_id, address)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed, and how to get what is not."""
    from raysp.commands import doctor as command

    command.doctor(as_json=as_json)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        args: Arguments after the program's name; none takes those of the process.
    """
    given = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in given or os.environ.get("RAYSP_DEBUG", "") not in ("", "0")
    rest = [arg for arg in given if arg != "--debug"]
    try:
        # Not standalone: typer returns the code of its own exits and raises everything else.
        code = app(args=rest or ["--help"], prog_name="raysp", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who read our output has enough; the flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        line, code = describe_error(error)
        print(f"raysp: error: {line}", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def describe_error(error: Exception) -> tuple[str, int]:
    """The one line and the exit code of an error."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in _EXTRAS:
        error = _missing_extra(error.name or "")
    if isinstance(error, RayspError):
        return _one_line(str(error)), error.exit_code
    if _is_usage_error(error):
        return _one_line(error.format_message()), int(error.exit_code)  # type: ignore[attr-defined]
    if type(error).__module__.partition(".")[0] == "planner" and isinstance(error, ValueError):
        return _one_line(str(error)), 2
    text = _one_line(str(error))
    return f"{type(error).__name__}{': ' + text if text else ''} (add --debug to see where)", 1


def _missing_extra(module: str) -> MissingExtraError:
    package = module.split(".")[0]
    extra = _EXTRAS[package]
    return MissingExtraError(
        f"this needs {package}, which is not installed; expected the extra {extra!r}. Run pip install 'raysp[{extra}]'."
    )


def _is_usage_error(error: Exception) -> bool:
    # typer carries its own click in some versions, so the class to catch differs.
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    main()
