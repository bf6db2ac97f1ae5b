"""`raysp submit`, `status`, `logs`, `stop` against a running Ray cluster with token authentication."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from command_line import raysp

from raysp.train.checkpoint import checkpoints_in, read_state


@dataclass(frozen=True)
class Cluster:
    """A head node of its own, reachable with its token alone."""

    address: str
    env: dict[str, str]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    port, dashboard_port = _free_port(), _free_port()
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    log = tmp_path_factory.mktemp("ray") / "head.log"
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}",
        "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}",
        "--num-cpus=4", "--include-dashboard=true", "--disable-usage-stats",
    ]  # fmt: skip
    with log.open("w") as out:
        head = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **env}, start_new_session=True
        )
    try:
        deadline_s = time.monotonic() + 90
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", dashboard_port)) == 0:
                    break
            if head.poll() is not None or time.monotonic() > deadline_s:
                raise AssertionError(f"the cluster did not start:\n{log.read_text()}")
            time.sleep(0.2)
        yield Cluster(f"http://127.0.0.1:{dashboard_port}", env)
    finally:
        processes = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(20)
        except subprocess.TimeoutExpired:
            head.kill()
        for process in psutil.wait_procs(processes, timeout=10)[1]:
            process.kill()


def test_submit_follow_stop_and_resume(cluster: Cluster, write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = str(write_config(train__num_steps="400", cluster__cpus_per_worker="0.5"))
    submitted = raysp("submit", "--address", cluster.address, "--config", config, env=cluster.env)
    assert submitted.code == 0, submitted.err
    job = re.search(r"submitted (\S+)", submitted.out).group(1)
    deadline_s = time.monotonic() + 120
    while "step 3/400" not in (logs := raysp("logs", job, "--address", cluster.address, env=cluster.env)).out:
        assert time.monotonic() < deadline_s, logs.out
        time.sleep(1)
    status = raysp("status", job, "--address", cluster.address, env=cluster.env)
    assert status.out.strip() == "RUNNING"
    stopped = raysp("stop", job, "--address", cluster.address, env=cluster.env)
    assert stopped.out.strip() == "STOPPED", stopped.err
    done = read_state(checkpoints_in(tmp_path / "checkpoints")[-1]).step
    assert done >= 3

    resumed = raysp(
        "submit", "--address", cluster.address, "--config", config, "--set", f"train.num_steps={done + 2}", "--follow",
        env=cluster.env,
    )  # fmt: skip
    assert resumed.code == 0, resumed.out + resumed.err
    assert f"resuming after step {done}" in resumed.out
    assert f"step {done + 2}/{done + 2}" in resumed.out
    assert "SUCCEEDED" in resumed.out


def test_failed_job_is_followed_to_exit_code_1(cluster: Cluster, write_config: Callable[..., Path]) -> None:
    failed = raysp(
        "submit", "--address", cluster.address, "--config", str(write_config()), "--set", "data.path=/does/not/exist",
        "--follow", env=cluster.env,
    )  # fmt: skip
    assert failed.code == 1
    assert "/does/not/exist" in failed.out


def test_wrong_token_relative_path_and_unknown_job_are_refused(
    cluster: Cluster, write_config: Callable[..., Path]
) -> None:
    config = str(write_config())
    wrong = {**cluster.env, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    refused = raysp("submit", "--address", cluster.address, "--config", config, env=wrong)
    assert refused.code == 2
    assert "token" in refused.err
    relative = raysp(
        "submit", "--address", cluster.address, "--config", config, "--set", "checkpoint.dir=here", env=cluster.env
    )
    assert relative.code == 2
    assert "checkpoint.dir = 'here'" in relative.err
    unknown = raysp("status", "raysubmit_none", "--address", cluster.address, env=cluster.env)
    assert unknown.code == 2
    assert "there is no job 'raysubmit_none'" in unknown.err
