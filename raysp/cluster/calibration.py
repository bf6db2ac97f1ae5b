"""Measuring the cost model on the very workers that will train.

Every group of a probe gets the same lengths, so all ranks are as busy as in a real micro-batch; the sequences are
pieces of the corpus. Times are of one forward and backward pass, sharded layers included.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from planner import CalibrationFit, Sample, fit_cost_model
from raysp.cluster.run_inputs import attention_method, ulysses_heads
from raysp.cluster.worker_group import WorkerGroup
from raysp.config import Config
from raysp.data.dataset import TokenDataset
from raysp.errors import InputError
from raysp.train.session import ModelSize
from raysp.train.work import GroupWork, StepResult, StepWork

# Measurements longer than this are not repeated: their noise is small beside them.
_LONG_RUN_S = 1.0
_TIMEOUT_S = 900.0
# parameters + gradients + two AdamW moments, in fp32 or fp64
_STATE_COPIES = 4


@dataclass(frozen=True)
class Probe:
    """The lengths that every group of ``degree`` gets in one measurement."""

    degree: int
    lengths: tuple[int, ...]


def plan_probes(*, num_ranks: int, longest: int, max_tokens_per_rank: float) -> list[Probe]:
    """Choose what to measure: per degree one long, one middling, and many short sequences. Pure.

    Args:
        num_ranks: Workers; degrees are the powers of two up to it.
        longest: Longest sequence of the corpus, tokens.
        max_tokens_per_rank: No rank is given more.
    """
    probes = []
    degree = 1
    while degree <= num_ranks:
        capacity = int(max(degree, min(longest, max_tokens_per_rank * degree)))
        middle, short = max(degree, capacity // 4), max(1, min(256, capacity // 8))
        probes += [
            Probe(degree, (max(1, capacity // 32),)),
            Probe(degree, (short,) * max(1, middle // short)),
            Probe(degree, (middle,)),
            Probe(degree, (max(1, capacity // 2), max(1, capacity // 8))),
            Probe(degree, (capacity,)),
        ]
        degree *= 2
    return list(dict.fromkeys(probes))


def calibrate(
    workers: WorkerGroup,
    *,
    config: Config,
    dataset: TokenDataset,
    name: str,
    max_mean_relative_error: float,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> CalibrationFit:
    """Measure and fit a cost model. The workers' models are changed by it: initialize or load them afterwards.

    Args:
        workers: Started workers.
        config: The resolved configuration.
        dataset: Source of the probes' tokens.
        name: Of the cost model.
        max_mean_relative_error: A fit that misses the measurements by more is refused.
        on_progress: Called with measurements done and planned.

    Raises:
        planner.CalibrationError: The measurements do not fit the model.
        InputError: Not even one token fits the memory limit.
    """
    size = workers.infos[0].model_size
    limit_bytes = memory_limit_bytes(config, workers)
    longest_id = int(np.argmax(dataset.sequence_lengths))
    longest = int(dataset.sequence_lengths[longest_id])
    bytes_per_token = _bytes_per_token(workers, longest_id, longest)
    state_bytes = float(size.num_parameters * _STATE_COPIES * (8 if config.train.dtype == "fp64" else 4))
    # Unsharded while in use: the embedding, the head and two layers (the next is fetched while one computes), as
    # parameters and as gradients.
    fixed_bytes = float(2 * (size.num_embedding_parameters * 2 + size.largest_layer_parameters * 2) * 4)
    free_bytes = limit_bytes - state_bytes / workers.size - fixed_bytes
    if free_bytes < bytes_per_token:
        raise InputError(
            f"the model states need {(state_bytes / workers.size + fixed_bytes) / 2**20:.0f} MiB per rank, the limit is "
            f"{limit_bytes / 2**20:.0f} MiB; expected room for tokens. Raise planner.memory_limit_bytes or add workers."
        )
    probes = plan_probes(
        num_ranks=workers.size, longest=longest, max_tokens_per_rank=min(free_bytes / bytes_per_token, longest / 2)
    )
    degrees = [degree for degree in dict.fromkeys(probe.degree for probe in probes) if degree > 1]
    method = attention_method(config, num_heads=size.num_heads, num_kv_heads=size.num_kv_heads, degrees=degrees)
    if method == "ulysses":
        heads = ulysses_heads(size.num_heads, size.num_kv_heads)
        probes = [probe for probe in probes if heads % probe.degree == 0]
    samples = []
    fixed_step_s = []
    warmed_up: set[int] = set()
    for index, probe in enumerate(probes):
        on_progress(index, len(probes))
        work = _probe_work(probe, workers.size, method, dataset, longest_id)
        if probe.degree not in warmed_up:  # the first pass makes communicators and loads kernels
            _run(workers, work, update=True)
            warmed_up.add(probe.degree)
        runs = [_run(workers, work, update=True)]
        if _slowest_s(runs[0]) < _LONG_RUN_S:
            runs.append(_run(workers, work, update=True))
        peak_bytes = max(result.peak_memory_bytes for run in runs for result in run)
        samples.append(
            Sample(
                lengths=probe.lengths,
                degree=probe.degree,
                time_s=min(_slowest_s(run) for run in runs),
                memory_bytes=peak_bytes or None,
            )
        )
        fixed_step_s.append(max(result.step_time_s - result.micro_batch_times_s[0] for result in runs[-1]))
    on_progress(len(probes), len(probes))
    return fit_cost_model(
        samples,
        name=name,
        num_ranks=workers.size,
        model_state_bytes_total=state_bytes,
        model_state_bytes_fixed=fixed_bytes,
        memory_limit_bytes=limit_bytes,
        # Where the device records its peak, that is fitted; elsewhere what autograd keeps has to do.
        bytes_per_token=None if samples[0].memory_bytes else bytes_per_token,
        max_mean_relative_error=max_mean_relative_error,
        fixed_step_s=statistics.median(fixed_step_s),
        attention=method,
        num_heads=ulysses_heads(size.num_heads, size.num_kv_heads),
        metadata={"measured_for": cost_model_key(config, workers)},
    )


def cost_model_key(config: Config, workers: WorkerGroup) -> dict[str, Any]:
    """What a measured cost model depends on; one measured under another key must not be reused."""
    info = workers.infos[0]
    return {
        "device": info.device_name,
        "num_ranks": workers.size,
        "num_parameters": info.model_size.num_parameters,
        "num_layers": info.model_size.num_layers,
        "num_heads": info.model_size.num_heads,
        "num_kv_heads": info.model_size.num_kv_heads,
        "threads_per_worker": config.cluster.threads_per_worker,
        "cpus_per_worker": config.cluster.cpus_per_worker,
        "dtype": config.train.dtype,
        "recompute": config.train.recompute,
        "attention_method": config.attention.method,
        "attention_kernel": config.attention.kernel,
        "memory_limit_bytes": memory_limit_bytes(config, workers),
    }


def memory_limit_bytes(config: Config, workers: WorkerGroup) -> float:
    """Memory of one rank that a plan may use: as configured, else 85 % of the GPU, or a share of the host's RAM."""
    if config.planner.memory_limit_bytes is not None:
        return config.planner.memory_limit_bytes
    smallest = min(info.device_memory_bytes for info in workers.infos)
    if smallest:
        return 0.85 * smallest
    return 0.6 * psutil.virtual_memory().total / workers.size


def model_flops(size: ModelSize, lengths: tuple[int, ...]) -> float:
    """Useful floating-point operations of one forward and backward pass, causal attention, no recompute.

    ``6 * (parameters without the input embedding) * tokens + 6 * layers * heads * head_dim * sum(s^2)``
    """
    matrix_parameters = size.num_parameters - size.num_embedding_parameters
    squares = sum(length * length for length in lengths)
    return 6.0 * matrix_parameters * sum(lengths) + 6.0 * size.num_layers * size.num_heads * size.head_dim * squares


def _probe_work(probe: Probe, num_ranks: int, method: str, dataset: TokenDataset, longest_id: int) -> list[StepWork]:
    """The probe's work by rank; every sequence is a beginning of the longest one, so its tokens are real."""
    parts = []
    groups = num_ranks // probe.degree
    for rank in range(num_ranks):
        group = rank // probe.degree
        work = GroupWork(
            ranks=tuple(range(group * probe.degree, (group + 1) * probe.degree)),
            attention=method if probe.degree > 1 else "local",
            sequence_ids=(longest_id,) * len(probe.lengths),
            lengths=probe.lengths,
        )
        parts.append(StepWork(step=0, micro_batches=(work if group < groups else None,)))
    return parts


def _slowest_s(results: list[StepResult]) -> float:
    return max(result.micro_batch_times_s[0] for result in results)


def _run(workers: WorkerGroup, work: list[StepWork], *, update: bool) -> list[StepResult]:
    return workers.call("run_step", [(part, update) for part in work], timeout_s=_TIMEOUT_S, what="the calibration")


def _bytes_per_token(workers: WorkerGroup, longest_id: int, longest: int) -> float:
    """Slope of what autograd keeps between two lengths; the intercept is not the tokens' doing."""
    lengths = sorted({max(1, min(longest, 1024) // 2), min(longest, 1024)})
    measured = []
    for length in lengths:
        work = [
            GroupWork(ranks=(rank,), attention="local", sequence_ids=(longest_id,), lengths=(length,))
            for rank in range(workers.size)
        ]
        measured.append(
            max(
                workers.call(
                    "activation_bytes",
                    [(w,) for w in work],
                    timeout_s=_TIMEOUT_S,
                    what="the measurement of activations",
                )
            )
        )
    if len(lengths) == 1:
        return max(1.0, measured[0] / lengths[0])
    return max(1.0, (measured[1] - measured[0]) / (lengths[1] - lengths[0]))
