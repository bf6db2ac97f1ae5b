"""Which checkpoint counts: only whole ones, the newest of this run, and nothing is thrown away by a rewind."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from raysp.errors import CheckpointError
from raysp.train.checkpoint import (
    TrainerState,
    begin_checkpoint,
    checkpoints_in,
    commit_checkpoint,
    read_state,
    set_aside_newer,
    verify_files,
)


def _save(directory: Path, step: int, keep: int = 10) -> Path:
    folder = begin_checkpoint(directory, step)
    (folder / "shard.safetensors").write_bytes(b"x")
    state = TrainerState(
        step=step,
        cursor={"pass_index": 0, "position": step},
        data_fingerprint="f",
        num_ranks=2,
        run_id=None,
        config={},
        model={},
        files={"shard.safetensors": hashlib.sha256(b"x").hexdigest()},
    )
    return commit_checkpoint(folder, state, keep=keep)


def test_crash_while_saving_leaves_the_previous_checkpoint_the_newest(tmp_path: Path) -> None:
    _save(tmp_path, 5)
    unfinished = begin_checkpoint(tmp_path, 10)
    (unfinished / "shard.safetensors").write_bytes(b"half")
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000005"]
    assert read_state(checkpoints_in(tmp_path)[-1]).step == 5
    _save(tmp_path, 15)
    assert not unfinished.exists()


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        _save(tmp_path, step, keep=2)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000010", "step-00000015"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    first = _save(tmp_path, 5)
    (first / "old").touch()
    second = _save(tmp_path, 5)
    assert first == second
    assert not (second / "old").exists()


def test_rewinding_sets_later_checkpoints_aside_and_deletes_none(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        _save(tmp_path, step)
    moved = set_aside_newer(tmp_path, 5)
    assert [path.name for path in moved] == ["superseded-1-step-00000010", "superseded-1-step-00000015"]
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000005"]
    _save(tmp_path, 10)
    assert [path.name for path in set_aside_newer(tmp_path, 5)] == ["superseded-2-step-00000010"]
    assert set_aside_newer(tmp_path, 5) == []


def test_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
        read_state(tmp_path)
    final = _save(tmp_path, 5)
    (final / "trainer.json").write_text('{"schema_version": 99}')
    with pytest.raises(CheckpointError, match="schema_version 99; expected 1"):
        read_state(final)
    (final / "trainer.json").write_text("not json")
    with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
        read_state(final)


@pytest.mark.parametrize("damage", ["removed", "changed"])
def test_missing_or_changed_file_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    final = _save(tmp_path, 5)
    files = read_state(final).files
    verify_files(final, files, part=0, num_parts=1)
    if damage == "removed":
        (final / "shard.safetensors").unlink()
    else:
        (final / "shard.safetensors").write_bytes(b"y")
    with pytest.raises(CheckpointError, match=r"is damaged: shard\.safetensors"):
        verify_files(final, files, part=0, num_parts=1)


def test_files_that_another_node_kept_to_itself_are_noticed_before_the_checkpoint_counts(tmp_path: Path) -> None:
    _save(tmp_path, 5)
    folder = begin_checkpoint(tmp_path, 10)
    state = TrainerState(10, {"pass_index": 0, "position": 0}, "f", 2, None, {}, {}, {"shard-of-node-2": "0"})
    with pytest.raises(CheckpointError, match="one folder that all nodes share"):
        commit_checkpoint(folder, state, keep=1)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000005"]


@pytest.mark.parametrize(("key", "value"), [("config", 5), ("cursor", 5), ("step", "x"), ("step", -5), ("new", 1)])
def test_state_of_wrong_types_is_refused(tmp_path: Path, key: str, value: object) -> None:
    final = _save(tmp_path, 5)
    file = final / "trainer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(CheckpointError):
        read_state(final)
