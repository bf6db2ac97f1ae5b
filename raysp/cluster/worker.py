"""The actor of one rank: a thin shell around :class:`raysp.train.session.TrainSession`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from raysp.comm import PairMeasurement, connect_store, init_process, measure_pairs
from raysp.config import Config
from raysp.data.dataset import TokenDataset
from raysp.errors import InputError, WorkerFailedError
from raysp.train.checkpoint import verify_files
from raysp.train.session import ModelSize, TrainSession
from raysp.train.work import GroupWork, StepResult, StepWork


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker needs to join an epoch.

    Attributes:
        config: The resolved configuration.
        model_config: The transformers configuration.
        global_rank: Its rank.
        world_size: Workers of the epoch.
        store_host: Of the rendezvous store.
        store_port: Of the rendezvous store.
        device: ``"cuda"`` or ``"cpu"``.
        num_threads: torch threads on CPU.
        loopback: Whether all workers share one machine; sockets then stay on its loopback interface.
        comm_timeout_s: Longest a collective may wait.
        epoch: Number of the membership.
    """

    config: Config
    model_config: Any
    global_rank: int
    world_size: int
    store_host: str
    store_port: int
    device: str
    num_threads: int
    loopback: bool
    comm_timeout_s: float
    epoch: int = 0


@dataclass(frozen=True)
class WorkerInfo:
    """Where a worker runs and what it runs on."""

    global_rank: int
    node_id: str
    node_address: str
    pid: int
    device_name: str
    device_memory_bytes: int
    model_size: ModelSize


class Worker:
    """One rank. Methods of the ``control`` concurrency group answer while a step runs."""

    def __init__(self) -> None:
        self._activity = "starting"

    def setup(self, spec: WorkerSpec) -> WorkerInfo:
        """Join the epoch, open the dataset and build the model."""
        self._activity = "joining the communicators"
        if spec.loopback:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        if spec.device == "cuda":
            device = torch.device("cuda", 0)  # Ray shows each actor its own GPU alone
            torch.cuda.set_device(device)
        else:
            device = torch.device("cpu")
            torch.set_num_threads(spec.num_threads)
        store = connect_store(spec.store_host, spec.store_port)
        self._comms = init_process(
            store,
            global_rank=spec.global_rank,
            world_size=spec.world_size,
            device=device,
            timeout_s=spec.comm_timeout_s,
            epoch=spec.epoch,
        )
        self._activity = "opening the dataset"
        data = spec.config.data
        source = TokenDataset.open(data.path, max_length=data.max_length, drop_empty=data.drop_empty)
        self._session = TrainSession(
            config=spec.config, model_config=spec.model_config, comms=self._comms, source=source, device=device
        )
        self._activity = "building the model"
        size = self._session.initialize()
        self._activity = "idle"
        properties = torch.cuda.get_device_properties(device) if spec.device == "cuda" else None
        return WorkerInfo(
            global_rank=spec.global_rank,
            node_id=ray.get_runtime_context().get_node_id(),
            node_address=ray.util.get_node_ip_address(),
            pid=os.getpid(),
            device_name=properties.name if properties else "cpu",
            device_memory_bytes=properties.total_memory if properties else 0,
            model_size=size,
        )

    def measure_links(self, pairs: tuple[tuple[int, int], ...], nodes: tuple[str, ...]) -> tuple[PairMeasurement, ...]:
        """See :func:`raysp.comm.measure_pairs`; all workers together, at least two."""
        activity, self._activity = self._activity, "measuring the links between workers"
        everyone = self._comms.communicator(range(self._comms.world_size))
        if everyone is None:
            raise InputError("one worker has no links; expected at least two. Do not measure them.")
        measured = measure_pairs(everyone, device=self._comms.device, pairs=pairs, nodes=nodes)
        self._activity = activity
        return measured

    def initialize(self) -> None:
        """Model and optimizer anew from the seed."""
        self._session.initialize()

    def run_step(self, work: StepWork, update: bool) -> StepResult:
        """See :meth:`TrainSession.run_step`."""
        self._activity = f"step {work.step}"
        try:
            result = self._session.run_step(work, update=update)
        except torch.OutOfMemoryError as error:
            raise WorkerFailedError(_out_of_memory(work, error)) from None
        self._activity = f"idle after step {work.step}"
        return result

    def evaluate(self, work: StepWork) -> tuple[float, int]:
        """See :meth:`TrainSession.evaluate`."""
        self._activity = f"validation after step {work.step}"
        return self._session.evaluate(work)

    def activation_bytes(self, work: GroupWork) -> int:
        """See :meth:`TrainSession.activation_bytes`."""
        self._activity = "measuring activations"
        return self._session.activation_bytes(work)

    def save(self, folder: Path) -> dict[str, str]:
        """See :meth:`TrainSession.save`."""
        self._activity = f"saving {folder}"
        return self._session.save(folder)

    def load(self, folder: Path, step: int, files: dict[str, str]) -> None:
        """Check this rank's share of the files, then see :meth:`TrainSession.load`."""
        self._activity = f"loading {folder}"
        verify_files(folder, files, part=self._comms.global_rank, num_parts=self._comms.world_size)
        self._comms.barrier()
        self._session.load(folder, step=step)

    def close(self) -> None:
        """Leave the communicators."""
        self._comms.close()

    @ray.method(concurrency_group="control")
    def activity(self) -> str:
        """What this rank does right now."""
        return self._activity


def _out_of_memory(work: StepWork, error: BaseException) -> str:
    rank = ray.get_runtime_context().get_actor_name() or f"pid {os.getpid()}"
    loads = [
        f"{len(g.lengths)} sequences, {g.num_tokens} tokens on {len(g.ranks)} ranks" for g in work.micro_batches if g
    ]
    return (
        f"{rank} ran out of device memory in step {work.step + 1} with micro-batches of {'; '.join(loads) or 'nothing'}: "
        f"{str(error).splitlines()[0]} Lower planner.memory_limit_bytes, set train.recompute = 'full', or calibrate anew."
    )
