"""Where a result comes from: the hardware and the commit that are written beside every figure."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path


def hardware(device: str = "cuda") -> str:
    """The GPUs, or the CPU cores where there are none or ``device`` is ``cpu``; imports torch."""
    import torch

    if device == "cuda" and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def commit(*paths: str) -> str:
    """Of this checkout, and whether what lies under ``paths`` has changes that it does not hold; "unknown" without git."""
    if shutil.which("git") is None:
        return "unknown"

    def git(*args: str) -> str:
        folder = Path(__file__).parent.parent
        return subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", *paths)
    return f"{git('rev-parse', '--short', 'HEAD') or 'unknown'}{' with changes' if changed else ''}"
