"""A small real corpus and a runner of the command line; every test here starts a real Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

_MODEL = """
[model.config]
model_type = "llama"
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
"""


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str


def raysp(*arguments: str, timeout_s: float = 300.0, env: dict[str, str] | None = None) -> Finished:
    """Run ``python -m raysp``."""
    done = subprocess.run(
        [sys.executable, "-m", "raysp", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "COLUMNS": "160", **(env or {})},
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


class RunningTraining:
    """``raysp train`` in the background, its output read as it comes."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self._log = log
        self._file = log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "raysp", "train", *arguments],
            stdout=self._file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "COLUMNS": "160"},
            start_new_session=True,
        )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait_for(self, text: str, timeout_s: float = 120.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while text not in self.output:
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise AssertionError(f"{text!r} did not appear; the output is:\n{self.output}")
            time.sleep(0.1)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait(self, timeout_s: float = 120.0) -> int:
        return self.process.wait(timeout_s)

    def close(self) -> None:
        if self.process.poll() is None:
            for child in self.descendants():
                child.kill()
            self.process.send_signal(signal.SIGKILL)
        self._file.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The json and email packages of the standard library, prepared by the command users run."""
    root = tmp_path_factory.mktemp("corpus")
    source = root / "source"
    source.mkdir()
    stdlib = Path(sysconfig.get_path("stdlib"))
    for package in ("json", "email", "logging"):
        (source / package).symlink_to(stdlib / package)
    done = raysp("prepare", str(source), "--include", "*.py", "--train-tokenizer", "512", "--output", str(root / "data"))
    assert done.code == 0, done.err
    return root / "data"


@pytest.fixture
def write_config(corpus: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a configuration whose outputs all lie in the test's folder."""

    def write(**values: str) -> Path:
        sections: dict[str, list[str]] = {
            "cluster": ["num_workers = 2"],
            "data": [
                f'path = "{corpus}"',
                "max_length = 1024",
                "tokens_per_step = 4096",
                "validation_fraction = 0.1",
            ],
            "train": ["num_steps = 4", "learning_rate = 1e-3"],
            "planner": ['policy = "adaptive"', "time_limit_s = 0.3", "memory_limit_bytes = 50e6"],
            "checkpoint": [f'dir = "{tmp_path / "checkpoints"}"', "every_steps = 2"],
            "tracking": [f'uri = "sqlite:///{tmp_path / "mlflow.db"}"', 'experiment = "test"'],
        }
        for key, value in values.items():
            section, _, name = key.partition("__")
            lines = sections.setdefault(section, [])
            lines[:] = [line for line in lines if not line.startswith(f"{name} =")]
            lines.append(f"{name} = {value}")
        text = _MODEL + "".join(f"\n[{name}]\n" + "\n".join(lines) + "\n" for name, lines in sections.items())
        path = tmp_path / "config.toml"
        path.write_text(text)
        return path

    return write
