"""Measuring the cost model on the very workers that will train.

Every group of a probe gets the same lengths, so all ranks are as busy as in a real micro-batch; the sequences are
pieces of the corpus. Times are of one forward and backward pass under ``planner.sync``: with ``per-layer`` they hold the
traffic of sharded parameters that compute does not hide, with ``per-step`` that traffic is in ``fixed_step_s``. So
``zero_traffic_s`` stays 0, and a cost model measured under one sync is not used for the other.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from planner import CalibrationFit, LayerMix, Sample, fit_cost_model
from raysp.cluster.run_inputs import attention_method, ulysses_heads
from raysp.cluster.worker_group import WorkerGroup
from raysp.config import Config
from raysp.data.dataset import TokenDataset
from raysp.errors import InputError
from raysp.train.gradient_sync import unsharded_state_bytes
from raysp.train.model_size import ModelSize
from raysp.train.work import DEFAULT_RECOMPUTE, RECOMPUTE_POLICIES, GroupWork, StepResult, StepWork

# Measurements longer than this are not repeated: their noise is small beside them.
_LONG_RUN_S = 1.0
_TIMEOUT_S = 900.0
# Short enough that what a sequence costs as such shows beside its tokens.
_SHORTEST_TOKENS = 32
_MAX_SEQUENCES = 512
# parameters + gradients + two AdamW moments, in fp32 or fp64
_STATE_COPIES = 4


@dataclass(frozen=True)
class Probe:
    """The lengths that every group of ``degree`` gets in one measurement, and the recompute policy that it runs."""

    degree: int
    lengths: tuple[int, ...]
    recompute: str = DEFAULT_RECOMPUTE


def plan_probes(*, num_ranks: int, longest: int, max_tokens_per_rank: float) -> list[Probe]:
    """Choose what to measure: per degree one long, one middling, and many short sequences. Pure.

    At degree 1 the same tokens also come in very many very short sequences: without that, what a sequence costs however
    short it is (``per_sequence_s``) would be taken for a cost of its tokens.

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
        if degree == 1:
            shortest = max(1, min(_SHORTEST_TOKENS, capacity // 64))
            count = max(1, min(_MAX_SEQUENCES, capacity // 2 // shortest))
            probes += [Probe(1, (shortest,) * count), Probe(1, (2 * shortest,) * max(1, count // 4))]
        degree *= 2
    return list(dict.fromkeys(probes))


def recompute_probes(
    policy: str, *, degrees: list[int], longest: int, max_tokens_per_rank: float, num_measured: int = 2
) -> list[Probe]:
    """Choose what to measure of a further recompute policy, whose factors are all that is unknown. Pure.

    Args:
        policy: Its name.
        degrees: Those that were measured with the default policy.
        longest: Longest sequence of the corpus, tokens.
        max_tokens_per_rank: No rank is given more.
        num_measured: Degrees to measure, from the smallest on.
    """
    probes = []
    for degree in sorted(degrees)[:num_measured]:
        capacity = int(max(degree, min(longest, max_tokens_per_rank * degree)))
        probes += [Probe(degree, (max(degree, capacity // 2),), policy), Probe(degree, (capacity,), policy)]
    return list(dict.fromkeys(probes))


@dataclass(frozen=True)
class _Memory:
    """What a rank holds, in bytes.

    Attributes:
        limit: What it may use.
        states_total: Parameters, gradients and optimizer state over all ranks.
        fixed: Of every rank, beyond its share of the states.
        unsharded: Of every rank under per-step, beyond these.
        per_token: By recompute policy, activations of a token on the rank that holds it.
    """

    limit: float
    states_total: float
    fixed: float
    unsharded: float
    per_token: dict[str, float]

    def known(self, num_ranks: int, sync: str) -> float:
        """Bytes of a rank before any token."""
        return self.states_total / num_ranks + self.fixed + (self.unsharded if sync == "per-step" else 0.0)


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
    size, sync = workers.infos[0].model_size, config.planner.sync
    longest_id = int(np.argmax(dataset.sequence_lengths))
    longest = int(dataset.sequence_lengths[longest_id])
    memory = _memory(workers, config, longest_id, longest)
    known_bytes = memory.known(workers.size, sync)
    tokens_per_rank = {
        policy: min((memory.limit - known_bytes) / bytes_per_token, longest / 2)
        for policy, bytes_per_token in memory.per_token.items()
    }
    probes = plan_probes(
        num_ranks=workers.size, longest=longest, max_tokens_per_rank=tokens_per_rank[DEFAULT_RECOMPUTE]
    )
    degrees = list(dict.fromkeys(probe.degree for probe in probes))
    method = attention_method(
        config, num_heads=size.num_heads, num_kv_heads=size.num_kv_heads, degrees=[d for d in degrees if d > 1]
    )
    if method == "ulysses" and size.num_softmax_layers:
        heads = ulysses_heads(size.num_heads, size.num_kv_heads)
        degrees = [degree for degree in degrees if heads % degree == 0]
    probes = [probe for probe in probes if probe.degree in degrees]
    for policy in sorted(set(memory.per_token) - {DEFAULT_RECOMPUTE}):
        probes += recompute_probes(
            policy, degrees=degrees, longest=longest, max_tokens_per_rank=tokens_per_rank[policy]
        )
    samples = []
    fixed_step_s = []
    warmed_up: set[tuple[int, str]] = set()
    for index, probe in enumerate(probes):
        on_progress(index, len(probes))
        work = _probe_work(probe, workers.size, method, longest_id, sync)
        if (probe.degree, probe.recompute) not in warmed_up:  # the first makes communicators and loads kernels
            _run(workers, work, update=True)
            warmed_up.add((probe.degree, probe.recompute))
        runs = [_run(workers, work, update=True)]
        if _slowest_s(runs[0]) < _LONG_RUN_S:
            runs.append(_run(workers, work, update=True))
        samples.append(
            Sample(
                lengths=probe.lengths,
                degree=probe.degree,
                time_s=min(_slowest_s(run) for run in runs),
                memory_bytes=_sample_bytes(probe, runs, memory, workers.size, sync),
                attention=method if probe.degree > 1 else None,
                recompute=probe.recompute,
            )
        )
        # The slowest rank's: under per-step the others wait for it outside of their micro-batches.
        fixed_step_s.append(max(result.step_time_s for result in runs[-1]) - _slowest_s(runs[-1]))
    on_progress(len(probes), len(probes))
    has_peaks = any(sample.memory_bytes for sample in samples if sample.recompute == DEFAULT_RECOMPUTE)
    return fit_cost_model(
        samples,
        name=name,
        num_ranks=workers.size,
        model_state_bytes_total=memory.states_total,
        model_state_bytes_fixed=memory.fixed,
        memory_limit_bytes=memory.limit,
        # Where the device records its peak, that is fitted; elsewhere what autograd keeps has to do.
        bytes_per_token=None if has_peaks else memory.per_token[DEFAULT_RECOMPUTE],
        max_mean_relative_error=max_mean_relative_error,
        fixed_step_s=max(0.0, statistics.median(fixed_step_s)),
        attention=method,
        num_heads=ulysses_heads(size.num_heads, size.num_kv_heads),
        num_kv_heads=size.num_kv_heads,
        unsharded_state_bytes=memory.unsharded,
        layers=_layer_mix(size, config),
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
        "num_linear_layers": info.model_size.num_linear_layers,
        "num_sliding_layers": info.model_size.num_sliding_layers,
        "sliding_window": info.model_size.sliding_window,
        "threads_per_worker": config.cluster.threads_per_worker,
        "cpus_per_worker": config.cluster.cpus_per_worker,
        "dtype": config.train.dtype,
        "recompute": config.train.recompute,
        "sync": config.planner.sync,
        "recompute_choice": config.planner.recompute,
        "attention_method": config.attention.method,
        "attention_kernel": config.attention.kernel,
        "linear_method": config.attention.linear_method,
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

    ``6 * (parameters that a token meets, without the input embedding) * tokens``, for every layer with full attention
    ``6 * heads * head_dim * sum(s^2)``, with a window w the same of ``2*w*s - w^2`` where s is larger than w, and with linear
    attention ``12 * heads * key_size * value_size * tokens``: an outer product and a product with the state.
    """
    matrix_parameters = size.num_parameters - size.num_embedding_parameters - size.num_idle_expert_parameters
    window = size.sliding_window
    squares = sum(length**2 for length in lengths)
    banded = sum(min(length, window) * (2 * length - min(length, window)) for length in lengths)
    pairs = size.num_full_layers * squares + size.num_sliding_layers * banded
    states = size.num_linear_layers * size.linear_num_heads * size.linear_key_size * size.linear_value_size
    return (6.0 * matrix_parameters + 12.0 * states) * sum(lengths) + 6.0 * size.num_heads * size.head_dim * pairs


def _layer_mix(size: ModelSize, config: Config) -> LayerMix | None:
    """Which layers have no quadratic time; ``None`` where all have."""
    if not size.num_linear_layers:
        return None
    return LayerMix(
        num_softmax_layers=size.num_softmax_layers,
        num_linear_layers=size.num_linear_layers,
        method=config.attention.linear_method,
    )


def _memory(workers: WorkerGroup, config: Config, longest_id: int, longest: int) -> _Memory:
    """Sizes of the model's states by counting, those of activations by measuring.

    Raises:
        InputError: Not even one token fits the limit.
    """
    size, sync = workers.infos[0].model_size, config.planner.sync
    policies = [DEFAULT_RECOMPUTE]
    if config.planner.recompute == "per-group":
        policies += [policy for policy in RECOMPUTE_POLICIES if policy != config.train.recompute]
    memory = _Memory(
        limit=memory_limit_bytes(config, workers),
        states_total=float(size.num_parameters * _STATE_COPIES * (8 if config.train.dtype == "fp64" else 4)),
        # Unsharded while in use: the embedding, the head and two layers (the next is fetched while one computes), as
        # parameters and as gradients; under per-step, the buffers in which as much is gathered and reduced.
        fixed=float(2 * (size.num_embedding_parameters * 2 + size.largest_layer_parameters * 2) * 4),
        unsharded=unsharded_state_bytes(size.num_parameters, config.train.dtype),
        per_token={policy: _bytes_per_token(workers, longest_id, longest, policy) for policy in policies},
    )
    known_bytes = memory.known(workers.size, sync)
    if memory.limit - known_bytes < max(memory.per_token.values()):
        hint = ", use planner.sync = 'per-layer'" if sync == "per-step" else ""
        raise InputError(
            f"the model states need {known_bytes / 2**20:.0f} MiB per rank, the limit is "
            f"{memory.limit / 2**20:.0f} MiB; expected room for tokens. Raise planner.memory_limit_bytes{hint} or add "
            "workers."
        )
    return memory


def _sample_bytes(
    probe: Probe, runs: list[list[StepResult]], memory: _Memory, num_ranks: int, sync: str
) -> float | None:
    """Peak of a rank as the cost model's per-layer formula has it; counted for further policies where none is recorded."""
    peak_bytes = max(result.peak_memory_bytes for run in runs for result in run)
    if peak_bytes:
        return max(0.0, peak_bytes - (memory.unsharded if sync == "per-step" else 0.0))
    if probe.recompute == DEFAULT_RECOMPUTE:
        return None
    num_tokens = sum(probe.lengths) / probe.degree
    return memory.known(num_ranks, "per-layer") + memory.per_token[probe.recompute] * num_tokens


def _probe_work(probe: Probe, num_ranks: int, method: str, longest_id: int, sync: str) -> list[StepWork]:
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
            recompute=probe.recompute,
        )
        parts.append(StepWork(step=0, micro_batches=(work if group < groups else None,), sync=sync))
    return parts


def _slowest_s(results: list[StepResult]) -> float:
    return max(result.micro_batch_times_s[0] for result in results)


def _run(workers: WorkerGroup, work: list[StepWork], *, update: bool) -> list[StepResult]:
    return workers.call("run_step", [(part, update) for part in work], timeout_s=_TIMEOUT_S, what="the calibration")


def _bytes_per_token(workers: WorkerGroup, longest_id: int, longest: int, recompute: str) -> float:
    """Slope of what autograd keeps between two lengths; the intercept is not the tokens' doing."""
    lengths = sorted({max(1, min(longest, 1024) // 2), min(longest, 1024)})
    measured = []
    for length in lengths:
        work = [
            GroupWork((rank,), "local", sequence_ids=(longest_id,), lengths=(length,), recompute=recompute)
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
