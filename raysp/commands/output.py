"""How commands write: tables to the terminal, JSON to standard output, files whole or not at all."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from raysp.errors import RayspError

_LOG_WIDTH = 110


def terminal() -> Console:
    """Standard output; colours and width as the terminal has them, and in a log file room for the tables."""
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = max(console.width, _LOG_WIDTH)
    return console


def print_json(content: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file so that readers see the old content or all of the new one. Missing folders are made.

    Raises:
        RayspError: The place cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise RayspError(
            f"cannot write {path}: {error.strerror or error}; expected a file that can be created. "
            "Choose another place, or free some room."
        ) from error
