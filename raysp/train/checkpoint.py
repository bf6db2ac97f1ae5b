"""Checkpoints: sharded safetensors by torch.distributed.checkpoint, plus one JSON file that makes them valid.

A checkpoint is a folder ``step-00000010``: shards of parameters and AdamW moments (no pickle anywhere), ``rng/`` with
each rank's random state, and ``trainer.json``. It is written under another name and renamed when it is whole, so a crash
while saving leaves the previous one as the newest. Tensors are saved whole-shaped, so any number of ranks can load.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
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
    """

    step: int
    cursor: dict[str, int]
    data_fingerprint: str
    num_ranks: int
    run_id: str | None
    config: dict[str, Any]
    schema_version: int = SCHEMA_VERSION


def save_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, global_rank: int) -> None:
    """Write this rank's part of the tensors; collective over all ranks.

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
        save_file(rng, folder / "rng" / f"rank-{global_rank:05d}.safetensors")
    except (OSError, RuntimeError, dcp.CheckpointException) as error:
        raise CheckpointError(f"rank {global_rank} cannot write the checkpoint {folder}: {error}") from error


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
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError, dcp.CheckpointException) as error:
        raise CheckpointError(
            f"cannot load the checkpoint {folder}: {str(error).strip() or type(error).__name__}. "
            "Resume from another one (--resume PATH) or start afresh (--resume none)."
        ) from error
    for state in optimizer.state.values():
        state["step"] = torch.tensor(float(step))
    if "cpu" in rng:
        torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])


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
    attempt = 1 + len({path.name.split("-")[1] for path in directory.glob("superseded-*")}) if newer else 0
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
        return TrainerState(**table)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} is not a whole checkpoint ({error}); expected a folder step-NNNNNNNN with {_STATE_FILE}. "
            "Give such a folder, or --resume none."
        ) from error
