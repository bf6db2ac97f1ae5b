"""``raysp prepare``: tokenize documents, with a progress bar, and say what came out and what was left out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from raysp.commands.output import print_json, terminal
from raysp.data.prepare import PreparedDataset, PrepareProgress
from raysp.data.prepare import prepare as prepare_dataset


def prepare(source: Path, output: Path, *, as_json: bool, **options: Any) -> None:
    """Prepare and report; ``options`` are those of `raysp.data.prepare.prepare`."""
    errors = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[written]}"),
        TimeElapsedColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    )
    with bar:
        task = bar.add_task("reading", total=None, written="")

        def show(now: PrepareProgress) -> None:
            written = f"{now.num_documents:,} documents, {now.num_tokens:,} tokens" if now.num_documents else ""
            bar.update(
                task, description=now.stage, completed=now.done_bytes, total=now.total_bytes or 1, written=written
            )

        done = prepare_dataset(source, output, progress=show, **options)
    if as_json:
        print_json({**asdict(done), "path": str(done.path)})
        return
    for line in report_lines(done):
        terminal().print(line, soft_wrap=True, markup=False)


def report_lines(done: PreparedDataset) -> list[str]:
    """What is in the dataset, and what was left out with an example of each."""
    info, length = done.info, done.info["length"]
    lines = [f"{done.path} is already prepared from this input with these settings"] if done.already_prepared else []
    lines.append(
        f"{done.path}: {info['documents']:,} documents, {info['tokens']:,} tokens; length: min {length['min']:,}, "
        f"p50 {length['p50']:,}, p90 {length['p90']:,}, p99 {length['p99']:,}, max {length['max']:,}"
    )
    if info["vocab_size"] is not None:
        lines.append(f"tokenizer {done.path / info['tokenizer']}, vocabulary {info['vocab_size']:,}")
    wanted = info["settings"]["train_tokenizer"]
    if wanted and info["vocab_size"] < wanted:
        lines.append(f"the input has too little text for a vocabulary of {wanted:,}")
    for name, number in info["left_out"].items():
        if number:
            example = f", for example {done.examples[name]}" if name in done.examples else ""
            lines.append(f"left out: {number:,} {name.replace('_', ' ')}{example}")
    return lines
