"""Ray jobs: send a configuration to a running cluster, follow it, stop it."""

from __future__ import annotations

import asyncio
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from planner import list_presets
from raysp.config import Config, load_config
from raysp.errors import InputError, RayspError, first_line

_POLL_S = 1.0
# Ray kills a job three seconds after asking it to stop; a step has to end and a checkpoint to be written first.
_JOB_ENVIRONMENT = {"RAY_JOB_STOP_WAIT_TIME_S": "1800"}


def connect(address: str) -> JobSubmissionClient:
    """Reach the job server of a cluster.

    Raises:
        InputError: Nothing answers there, or it refuses the token.
    """
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, AuthenticationError) as error:
        raise InputError(
            f"cannot reach a Ray job server at {address!r}: {first_line(error)} Expected the dashboard's address, e.g. "
            "http://127.0.0.1:8265, and the cluster's token (RAY_AUTH_TOKEN or ~/.ray/auth_token)."
        ) from error


def submit_job(address: str, config_path: Path, overrides: Sequence[str]) -> str:
    """Check a configuration and submit it as a job.

    Returns:
        The job id.

    Raises:
        InputError: The configuration is not valid, names a relative path, or the cluster cannot be reached.
    """
    config = load_config(config_path, overrides)
    check_paths(config)
    client = connect(address)
    # On this machine the job runs in this very environment; elsewhere in the one of the cluster.
    python = sys.executable if urlparse(address).hostname in ("127.0.0.1", "localhost", "::1") else "python"
    arguments = [item for override in overrides for item in ("--set", override)]
    entrypoint = shlex.join([python, "-m", "jobs.train", "--config", "config.toml", *arguments])
    with tempfile.TemporaryDirectory(prefix="raysp-job-") as folder:
        (Path(folder) / "config.toml").write_bytes(Path(config_path).read_bytes())
        try:
            return str(
                client.submit_job(
                    entrypoint=entrypoint, runtime_env={"working_dir": folder, "env_vars": _JOB_ENVIRONMENT}
                )
            )
        except RuntimeError as error:
            raise RayspError(
                f"the cluster at {address} refused the job: {str(error).strip().splitlines()[-1]}"
            ) from error


def check_paths(config: Config) -> None:
    """Refuse relative paths: a job's working directory is temporary, what it writes there is lost.

    Raises:
        InputError: Names every such key.
    """
    named: dict[str, str | None] = {
        "data.path": config.data.path,
        "checkpoint.dir": config.checkpoint.dir,
        "model.path": config.model.path,
        "model.config": config.model.config if isinstance(config.model.config, str) else None,
        "planner.cost_model": None
        if config.planner.cost_model in ("auto", *list_presets())
        else config.planner.cost_model,
        "checkpoint.resume": None if config.checkpoint.resume in ("auto", "none") else config.checkpoint.resume,
    }
    relative = [
        f"{key} = {value!r}" for key, value in named.items() if value and not PurePosixPath(value).is_absolute()
    ]
    uri = config.tracking.uri
    if config.tracking.enabled and not _is_absolute_uri(uri):
        relative.append(f"tracking.uri = {uri!r}")
    if relative:
        raise InputError(
            f"a job needs absolute paths and URIs, because its working directory is temporary, but {'; '.join(relative)}. "
            "Give absolute ones, e.g. --set checkpoint.dir=/shared/run --set tracking.uri=sqlite:////shared/mlflow.db."
        )


def _is_absolute_uri(uri: str | None) -> bool:
    if uri is None:
        return False
    scheme, separator, rest = uri.partition(":")
    if not separator:
        return PurePosixPath(uri).is_absolute()
    if scheme in ("sqlite", "file"):
        return PurePosixPath(rest.removeprefix("///" if scheme == "sqlite" else "//")).is_absolute()
    return True


def job_status(address: str, job_id: str) -> JobStatus:
    """The state of a job.

    Raises:
        InputError: There is no such job.
    """
    client = connect(address)
    return _status(client, job_id)


def job_logs(address: str, job_id: str) -> str:
    """What the job has printed so far."""
    client = connect(address)
    _status(client, job_id)
    return str(client.get_job_logs(job_id))


def follow_job(address: str, job_id: str, write: Callable[[str], None]) -> JobStatus:
    """Pass on what a job prints until it ends; returns how it ended."""
    client = connect(address)
    _status(client, job_id)

    async def tail() -> None:
        async for text in client.tail_job_logs(job_id):
            write(text)

    asyncio.run(tail())
    return _await_end(client, job_id)


def stop_job(address: str, job_id: str) -> JobStatus:
    """Ask a job to stop (it checkpoints first) and wait for its end."""
    client = connect(address)
    if not _status(client, job_id).is_terminal():
        client.stop_job(job_id)
    return _await_end(client, job_id)


def _await_end(client: JobSubmissionClient, job_id: str) -> JobStatus:
    while not (status := _status(client, job_id)).is_terminal():
        time.sleep(_POLL_S)
    return status


def _status(client: JobSubmissionClient, job_id: str) -> JobStatus:
    try:
        return client.get_job_status(job_id)
    except RuntimeError as error:
        raise InputError(
            f"there is no job {job_id!r} on this cluster; expected an id that `raysp submit` printed. "
            "Check the id and --address."
        ) from error
