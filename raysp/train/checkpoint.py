"""Checkpoints: sharded safetensors by torch.distributed.checkpoint, plus one JSON file that makes them valid.

A checkpoint is a folder ``step-00000010``: shards of parameters and AdamW moments (no pickle anywhere), ``rng/`` with
each rank's random state, and ``trainer.json``. It is written under another name and renamed when it is whole, so a crash
while saving leaves the previous one as the newest. Tensors are saved whole-shaped, so any number of ranks can load.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from raysp.errors import CheckpointError

SCHEMA_VERSION = 1
_NAME = re.compile(r"step-(\d{8})")
_STATE_FILE = "trainer.json"


@dataclass(frozen=True)
class TrainerState:
    """What a resumed run needs besides tensors.

    Attributes:
        step: Optimizer steps done; also the next 0-based step.
        cursor: Position in the data, as the loader writes it.
        data_fingerprint: Of the dataset; a resumed run on other data is refused.
        num_ranks: Workers that saved it.
        run_id: MLflow run to continue.
        config: The resolved configuration.
        model: The transformers configuration; another model is refused.
        files: Every file of the checkpoint, relative, with its SHA-256; one that is missing or differs is refused.
    """

    step: int
    cursor: dict[str, int]
    data_fingerprint: str
    num_ranks: int
    run_id: str | None
    config: dict[str, Any]
    model: dict[str, Any]
    files: dict[str, str]
    schema_version: int = SCHEMA_VERSION


def save_shards(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, global_rank: int
) -> dict[str, str]:
    """Write this rank's part of the tensors; collective over all ranks.

    Returns:
        The files this rank wrote, relative to ``folder``, with their SHA-256.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    try:
        dcp.save(
            _tensors(model, optimizer), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True)
        )
        (folder / "rng").mkdir(exist_ok=True)
        rng = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            rng["cuda"] = torch.cuda.get_rng_state()
        random_state = folder / "rng" / f"rank-{global_rank:05d}.safetensors"
        save_file(rng, random_state)
        # The storage writer numbers shards from 1 by rank.
        written = [*folder.glob(f"shard-{global_rank + 1:05d}-*"), random_state]
        return {str(file.relative_to(folder)): _sha256(file) for file in written}
    except (OSError, RuntimeError, dcp.CheckpointException) as error:
        raise CheckpointError(
            f"rank {global_rank} cannot write the checkpoint {folder}: {_last_line(error)}. Make room, or correct "
            "checkpoint.dir."
        ) from error


def verify_files(folder: Path, files: Mapping[str, str], *, part: int, num_parts: int) -> None:
    """Check every ``num_parts``-th file, from number ``part`` on, so that the ranks share the reading.

    Raises:
        CheckpointError: A file is missing or not what was written.
    """
    for name in sorted(files)[part::num_parts]:
        file = folder / name
        if not file.is_file() or _sha256(file) != files[name]:
            what = "differs from what was saved" if file.is_file() else "is missing"
            raise CheckpointError(
                f"the checkpoint {folder} is damaged: {name} {what}. Resume from another one (--resume PATH) or start "
                "afresh (--resume none)."
            )


def load_shards(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, step: int, global_rank: int
) -> None:
    """Load tensors saved by any number of ranks, in place; collective over all ranks.

    Raises:
        CheckpointError: A file is missing or corrupt, or the model has other parameters.
    """
    optimizer.zero_grad(set_to_none=True)
    try:
        dcp.load(_tensors(model, optimizer), storage_reader=HuggingFaceStorageReader(str(folder)))
        random_state = folder / "rng" / f"rank-{global_rank:05d}.safetensors"
        rng = load_file(random_state) if random_state.exists() else {}
        if "cpu" in rng:
            torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and torch.cuda.is_available():
            torch.cuda.set_rng_state(rng["cuda"])
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError, dcp.CheckpointException) as error:
        raise CheckpointError(
            f"cannot load the checkpoint {folder}: {_last_line(error)}. "
            "Resume from another one (--resume PATH) or start afresh (--resume none)."
        ) from error
    for state in optimizer.state.values():
        state["step"] = torch.tensor(float(step))


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Parameters and AdamW moments by name; moments that do not exist yet are made, as zeros."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        tensors[f"model.{name}"] = parameter.detach()
        tensors[f"exp_avg.{name}"] = state["exp_avg"]
        tensors[f"exp_avg_sq.{name}"] = state["exp_avg_sq"]
    return tensors


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _last_line(error: BaseException) -> str:
    """The reason at the end of a message that may be a whole traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^~")]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")


def begin_checkpoint(directory: Path, step: int) -> Path:
    """Make the temporary folder into which all ranks write; remains of crashed attempts are removed."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob("partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        folder = directory / f"partial-{step:08d}-{uuid.uuid4().hex[:8]}"
        folder.mkdir()
    except OSError as error:
        raise CheckpointError(f"cannot write checkpoints in {directory}: {error}. Correct checkpoint.dir.") from error
    return folder


def commit_checkpoint(folder: Path, state: TrainerState, *, keep: int) -> Path:
    """Make a fully written checkpoint the newest, atomically, and delete those beyond ``keep``."""
    lost = sorted(name for name in state.files if not (folder / name).is_file())
    if lost:
        raise CheckpointError(
            f"the checkpoint {folder} lacks {', '.join(lost[:3])}, which another node wrote; expected checkpoint.dir to be "
            "one folder that all nodes share. Earlier checkpoints are untouched."
        )
    directory = folder.parent
    final = directory / f"step-{state.step:08d}"
    try:
        (folder / _STATE_FILE).write_text(json.dumps(asdict(state), indent=2, sort_keys=True), encoding="utf-8")
        for file in folder.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if final.exists():
            final.rename(directory / f"partial-replaced-{uuid.uuid4().hex[:8]}")
        folder.rename(final)
        for old in checkpoints_in(directory)[:-keep]:
            shutil.rmtree(old)
    except OSError as error:
        raise CheckpointError(f"cannot finish the checkpoint {final}: {error}") from error
    return final


def set_aside_newer(directory: Path, step: int) -> list[Path]:
    """Rename checkpoints of later steps than ``step``, so that the newest one is of the run that begins there.

    Nothing is deleted: ``step-00000010`` becomes ``superseded-<n>-step-00000010``.

    Returns:
        The new paths.
    """
    newer = [path for path in checkpoints_in(directory) if int(path.name.removeprefix("step-")) > step]
    numbers = [int(path.name.split("-")[1]) for path in directory.glob("superseded-*-step-*")]
    attempt = 1 + max(numbers, default=0)
    return [path.rename(directory / f"superseded-{attempt}-{path.name}") for path in newer]


def checkpoints_in(directory: Path) -> list[Path]:
    """Whole checkpoints of a folder, oldest first."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name) and (path / _STATE_FILE).is_file()]
    return sorted(found, key=lambda path: path.name)


def read_state(folder: Path) -> TrainerState:
    """Read ``trainer.json`` of a checkpoint.

    Raises:
        CheckpointError: The folder is not a whole checkpoint, or one of another schema.
    """
    file = folder / _STATE_FILE
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        if table.get("schema_version") != SCHEMA_VERSION:
            raise CheckpointError(
                f"{file} has schema_version {table.get('schema_version')!r}; expected {SCHEMA_VERSION}."
            )
        state = TypeAdapter(TrainerState).validate_json(json.dumps(table), strict=True, extra="forbid")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = (
            f"{error.errors()[0]['loc']}: {error.errors()[0]['msg']}" if isinstance(error, ValidationError) else error
        )
        raise CheckpointError(
            f"{folder} is not a whole checkpoint ({reason}); expected a folder step-NNNNNNNN with {_STATE_FILE}. "
            "Give such a folder, or --resume none."
        ) from error
    if state.step < 0:
        raise CheckpointError(f"{file} says step {state.step}; expected at least 0. Give another checkpoint.")
    return state
