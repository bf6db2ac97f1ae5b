"""Connecting to Ray, and what a run may ask of the cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ray
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError

from raysp.config import ClusterConfig
from raysp.errors import InputError, RayspError, first_line

# Below this share, CPU workers spend their time waiting for each other's turn on a core.
_SMALLEST_CPU_SHARE = 0.25
_KNOCK_TIMEOUT_S = 10.0
_TOKEN_FILE = Path("~/.ray/auth_token")


@dataclass(frozen=True)
class WorkerResources:
    """What Ray reserves for one worker.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        num_cpus: CPUs, possibly a fraction.
        num_gpus: 1 on CUDA, else 0.
        is_local: Whether the cluster was started for this run on this machine.
    """

    device: str
    num_cpus: float
    num_gpus: int
    is_local: bool

    def bundle(self) -> dict[str, float]:
        """The placement-group bundle of one worker."""
        bundle = {"CPU": self.num_cpus}
        if self.num_gpus:
            bundle["GPU"] = float(self.num_gpus)
        return bundle


@contextlib.contextmanager
def ray_session(config: ClusterConfig) -> Iterator[WorkerResources]:
    """Connect to ``cluster.address``, or start a local one that asks for a token, and leave it at the end.

    Raises:
        InputError: The address does not answer, or the cluster is smaller than ``cluster.num_workers``.
    """
    address = config.address or os.environ.get("RAY_ADDRESS")
    is_local = not address
    try:
        if is_local:
            _require_token()
            # "local": without it Ray would first look for a cluster that `ray start` left a note of, dead or alive.
            ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        else:
            _knock(str(address))
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, AuthenticationError) as error:
        where = f"the Ray cluster at {address!r}" if address else "a local Ray cluster"
        if is_local:
            raise RayspError(f"cannot start {where}: {first_line(error)}") from error
        raise InputError(
            f"cannot reach {where}: {first_line(error)} Start it (`ray start --head`), check its token, or unset "
            "cluster.address to use this machine."
        ) from error
    try:
        yield worker_resources(config, ray.cluster_resources(), is_local=is_local)
    finally:
        ray.shutdown()


def _require_token() -> None:
    """Give a local cluster a token of its own where the user has none: its ports are open to the network.

    It stays for the lifetime of the process, because Ray reads the token once.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token" and not any(
        (os.environ.get("RAY_AUTH_TOKEN"), os.environ.get("RAY_AUTH_TOKEN_PATH"), _TOKEN_FILE.expanduser().is_file())
    ):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Ray has read its settings when it was imported; it is told to read them again.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _knock(address: str) -> None:
    """Fail at once where nothing listens; Ray itself tries for minutes and writes its attempts to the terminal.

    Raises:
        OSError: Nothing answers at ``host:port``.
    """
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_TIMEOUT_S).close()


def worker_resources(config: ClusterConfig, totals: dict[str, float], *, is_local: bool) -> WorkerResources:
    """Decide what each worker reserves. Pure.

    Args:
        config: The ``cluster`` section.
        totals: Resources of the whole cluster, as Ray names them.
        is_local: A local cluster shares its cores among the workers by default; another gives one CPU each.

    Raises:
        InputError: The cluster has fewer GPUs or CPUs than the workers need.
    """
    gpus, cpus = totals.get("GPU", 0.0), totals.get("CPU", 0.0)
    device = config.device if config.device != "auto" else ("cuda" if gpus >= 1 else "cpu")
    workers = config.num_workers
    if device == "cuda" and gpus < workers:
        raise InputError(
            f"cluster.num_workers = {workers}, but the cluster has {gpus:g} GPUs; expected one GPU per worker. "
            f"Set cluster.num_workers to at most {gpus:g}, add nodes, or set cluster.device = 'cpu'."
        )
    share = config.cpus_per_worker
    if share is None:
        share = min(1.0, cpus / workers) if is_local else 1.0
        if is_local and share < _SMALLEST_CPU_SHARE and device == "cpu":
            raise InputError(
                f"cluster.num_workers = {workers}, but this machine has {cpus:g} CPUs; expected at most "
                f"{cpus / _SMALLEST_CPU_SHARE:g} workers. Lower cluster.num_workers or set cluster.cpus_per_worker."
            )
    share = int(share * 1e4) / 1e4  # Ray's resolution
    if share * workers > cpus + 1e-6:
        raise InputError(
            f"cluster.num_workers = {workers} with {share:g} CPUs each, but the cluster has {cpus:g} CPUs. "
            "Lower cluster.num_workers or cluster.cpus_per_worker, or add nodes."
        )
    return WorkerResources(device=device, num_cpus=share, num_gpus=1 if device == "cuda" else 0, is_local=is_local)
