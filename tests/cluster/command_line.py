"""Running the command line as a user does, to the end or in the background."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil


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
