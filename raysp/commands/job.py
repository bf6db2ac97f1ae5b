"""``raysp submit``, ``status``, ``logs``, ``stop``: training as a job on a running Ray cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from raysp.commands.output import terminal
from raysp.errors import RayspError

_DEFAULT_ADDRESS = "http://127.0.0.1:8265"


def submit(address: str, config_path: Path, overrides: Sequence[str], follow: bool) -> None:
    """Submit and, with ``follow``, show the job's output until it ends; a failed job is an error."""
    from raysp.cluster.jobs import submit_job

    job_id = submit_job(address, config_path, overrides)
    console = terminal()
    console.print(f"submitted {job_id}", highlight=False)
    if follow:
        _follow(address, job_id)
    else:
        for command in ("status", "logs", "stop"):
            console.print(f"  raysp {command} {job_id} --address {address}", highlight=False, soft_wrap=True)


def status(job_id: str, address: str | None) -> None:
    """Print PENDING, RUNNING, SUCCEEDED, STOPPED or FAILED."""
    from raysp.cluster.jobs import job_status

    terminal().print(job_status(_resolved(address), job_id).value, highlight=False)


def logs(job_id: str, address: str | None, follow: bool) -> None:
    """Print what the job printed; with ``follow`` until it ends."""
    if follow:
        _follow(_resolved(address), job_id)
        return
    from raysp.cluster.jobs import job_logs

    sys.stdout.write(job_logs(_resolved(address), job_id))


def stop(job_id: str, address: str | None) -> None:
    """Stop the job and print how it ended."""
    from raysp.cluster.jobs import stop_job

    terminal().print(stop_job(_resolved(address), job_id).value, highlight=False)


def _follow(address: str, job_id: str) -> None:
    from raysp.cluster.jobs import JobStatus, follow_job

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        ended = follow_job(address, job_id, write)
    except KeyboardInterrupt:
        Console(stderr=True).print(f"no longer following; {job_id} goes on. `raysp stop {job_id}` stops it.")
        return
    terminal().print(f"{job_id} {ended.value}", highlight=False)
    if ended == JobStatus.FAILED:
        raise RayspError(f"the job {job_id} failed; its output above says why.")


def _resolved(address: str | None) -> str:
    return address or os.environ.get("RAY_API_SERVER_ADDRESS") or _DEFAULT_ADDRESS
