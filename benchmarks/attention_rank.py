"""One rank of the attention benchmark: builds the candidates of a case, measures them in turns, reports rows.

All ranks run the same cases in the same order. Whether a candidate works and when to stop is agreed between them over
gloo, so that no rank waits alone in a collective. Rank 0 reports what was measured; the parent watches.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.queues import Queue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.attention_candidates import CUDNN, Candidate, NotRunError, Site, one_gpu, raysp_builders
from benchmarks.attention_cases import ERROR, MEMORY, ONE_GPU, RAYSP, Case, Settings
from benchmarks.attention_memory import peak_formula, steps_without_growth
from benchmarks.attention_peers import Peers, peer_builders
from benchmarks.attention_truth import errors_against_fp64
from raysp.comm import Communicator

_LINK_BYTES = 256 << 20
_COLLECTIVE_TIMEOUT_S = 300.0
# A row that has taken this long in its rounds is not measured again, after the fewest rounds.
_MAX_ROW_S, _FEWEST_ROUNDS = 2.0, 2


@dataclass(frozen=True)
class Task:
    """What a rank process gets: its place, the store, and the work.

    Attributes:
        rank: This process.
        port: Of the parent's store on the loopback interface.
        attempt: Prefix of the store's keys; each start of the ranks has its own.
        link: Name of the link that all cases are measured on.
        cases: The work.
        banned: Case and candidate names that broke an earlier attempt.
        settings: Options.
    """

    rank: int
    port: int
    attempt: str
    link: str
    cases: tuple[Case, ...]
    banned: frozenset[tuple[str, str]]
    settings: Settings


def link_environment(link: str, rank: int) -> dict[str, str]:
    """NCCL's variables that make one NVLink pair behave like a slower link; multicast is never used."""
    extra = {
        "nvlink": {},
        # Through host memory: about what PCIe or a 200 Gb/s network gives.
        "medium": {"NCCL_P2P_DISABLE": "1"},
        # Ranks that take each other for other hosts use sockets, as between nodes on plain Ethernet.
        "slow": {"NCCL_HOSTID": f"host{rank}"},
    }[link]
    return {"NCCL_NVLS_ENABLE": "0", **extra}


def run_rank(task: Task, reports: Queue[dict[str, Any]]) -> None:
    """Entry point of a rank process."""
    os.environ.update(link_environment(task.link, task.rank))
    # Peers call what newer versions of torch will rename.
    warnings.simplefilter("ignore", FutureWarning)
    try:
        _Rank(task, reports).run()
    except Exception:
        reports.put({"event": "broken", "rank": task.rank, "error": traceback.format_exc()})
        sys.exit(1)


class _Rank:
    def __init__(self, task: Task, reports: Queue[dict[str, Any]]) -> None:
        self._task, self._settings, self._reports = task, task.settings, reports
        if self._settings.device == "cuda":
            torch.cuda.set_device(task.rank)
        else:
            torch.set_num_threads(1)
        self._device = torch.device(self._settings.device, task.rank if self._settings.device == "cuda" else None)
        store = dist.TCPStore("127.0.0.1", task.port, is_master=False, timeout=timedelta(seconds=60))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self._device.type == "cuda" else "gloo",
            store=dist.PrefixStore(task.attempt, store),
            rank=task.rank,
            world_size=self._settings.degree,
            timeout=timedelta(seconds=_COLLECTIVE_TIMEOUT_S),
        )
        # A group that raysp did not make must have run one collective on NCCL.
        dist.all_reduce(torch.zeros(1, device=self._device))
        self._group = Communicator.wrap(dist.group.WORLD)
        self._peers = Peers.load(self._settings.peers, task.rank, self._settings.degree, self._device)

    def run(self) -> None:
        """Measure every case until none or no time is left."""
        self._report(event="link", link=self._task.link, **self._link_speed())
        for case in self._task.cases:
            if self._out_of_time():
                break
            self._report(event="case", case=case.name)
            rows = self._measure(case)
            self._report(event="rows", case=case.name, rows=rows)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        self._report(event="done")
        dist.destroy_process_group()

    # ---- candidates

    def _candidates(self, case: Case) -> tuple[list[Candidate], list[dict[str, Any]]]:
        """What runs, and rows for what does not."""
        site = Site(case, self._settings, self._task.rank, self._device, self._group, self._peers)
        made: list[Candidate] = []
        failed: list[dict[str, Any]] = []
        for name, kernel, build in [
            *_one_gpu_builders(site),
            *raysp_builders(self._settings.kernels),
            *peer_builders(site),
        ]:
            if not (self._settings.wants(name) if name.startswith(RAYSP) else self._is_compared(case, name)):
                continue
            try:
                if (case.name, f"{name}/{kernel}") in self._task.banned:
                    raise NotRunError("hung or ended the processes")
                made.append(build(site, kernel))
            except NotRunError as error:
                failed.append(self._failed_row(case, name, kernel, str(error)))
            # Foreign code, the same on all ranks: whatever goes wrong is the row's text.
            except Exception as error:
                failed.append(self._failed_row(case, name, kernel, f"{type(error).__name__}: {error}"))
        return made, failed

    def _is_compared(self, case: Case, name: str) -> bool:
        """Whether a row that is not raysp's is measured; the check of many steps is about raysp alone."""
        return case.kind != MEMORY and (name == ONE_GPU or self._settings.wants(name))

    # ---- measuring

    def _measure(self, case: Case) -> list[dict[str, Any]]:
        candidates, rows = self._candidates(case)
        ready: list[_Prepared] = []
        whole = _random_inputs(case, self._device, self._settings.seed)
        local: dict[bytes, tuple[Tensor, ...]] = {}
        for candidate in candidates:
            self._report(event="candidate", case=case.name, candidate=f"{candidate.name}/{candidate.kernel}")
            prepared, error = None, None
            if self._out_of_time():
                rows.append(self._failed_row(case, candidate.name, candidate.kernel, "out of time"))
                continue
            try:
                prepared = _Prepared(self, case, candidate, _local_inputs(candidate, whole, local))
            # Foreign code: whatever goes wrong is the row's text, unless it leaves the process or the group unusable.
            except Exception as caught:
                if "CUDA error" in str(caught) or isinstance(caught, dist.DistBackendError):
                    raise
                error = f"{type(caught).__name__}: {str(caught).strip().splitlines()[0] if str(caught) else ''}"
            reasons: list[str | None] = [None] * self._settings.degree
            dist.all_gather_object(reasons, error)
            reason = next((text for text in reasons if text is not None), None)
            if prepared is None or reason is not None:
                rows.append(self._failed_row(case, candidate.name, candidate.kernel, reason or "failed"))
                # Frames of the error keep its tensors.
                prepared = None
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            ready.append(prepared)
        if case.kind == ERROR:
            return rows + [self._row(p, **error) for p, error in errors_against_fp64(case, ready, whole)]
        if case.kind == MEMORY:
            return rows + [
                self._row(p, **steps_without_growth(p, self._settings.steps, self._device))
                for p in ready
                if p.candidate.name.startswith(RAYSP)
            ]
        self._time(ready)
        return rows + [self._row(p, **p.result()) for p in ready]

    def _time(self, ready: Sequence[_Prepared]) -> None:
        """Rounds of one measurement of each candidate, so that clocks and heat are shared alike."""
        for round_index in range(self._settings.rounds):
            for prepared in ready:
                # A first round is always whole; later ones only while there is time.
                if round_index and self._out_of_time():
                    return
                if round_index >= _FEWEST_ROUNDS and round_index * prepared.round_s > _MAX_ROW_S:
                    continue
                self._report(event="candidate", case=prepared.case.name, candidate=prepared.label)
                prepared.measure()

    def time_s(self, step: Callable[[], Any], iterations: int) -> float:
        """Seconds for one of some steps in a row, all ranks starting together; of this rank."""
        if self._device.type == "cpu":
            dist.barrier()
            started_s = time.perf_counter()
            for _ in range(iterations):
                step()
            return (time.perf_counter() - started_s) / iterations
        torch.cuda.synchronize()
        dist.all_reduce(torch.zeros(1, device=self._device))
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(iterations):
            step()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3 / iterations

    def peak_bytes(self, step: Callable[[], Any]) -> int:
        """Most memory that a step holds at once, beyond what was held before; 0 on CPU."""
        if self._device.type == "cpu":
            step()
            return 0
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held

    def agreed(self, values: Sequence[float], how: Any = dist.ReduceOp.MAX) -> list[float]:
        """Combine numbers of all ranks."""
        tensor = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(tensor, op=how)
        return [float(value) for value in tensor]

    @property
    def group(self) -> Communicator:
        """All ranks."""
        return self._group

    @property
    def settings(self) -> Settings:
        """Options."""
        return self._settings

    def _out_of_time(self) -> bool:
        return bool(self.agreed([float(time.time() > self._settings.deadline_s)])[0])

    def _link_speed(self) -> dict[str, Any]:
        """Exchange a large and a small message with the next and the previous rank, both ways at once."""
        degree, rank = self._settings.degree, self._task.rank
        found: dict[str, Any] = {}
        for what, size in (("large", _LINK_BYTES if self._device.type == "cuda" else 1 << 20), ("small", 1024)):
            sent, received = (torch.zeros(size, dtype=torch.uint8, device=self._device) for _ in range(2))

            def exchange(sent: Tensor = sent, received: Tensor = received) -> None:
                operations = [
                    dist.P2POp(dist.isend, sent, (rank + 1) % degree),
                    dist.P2POp(dist.irecv, received, (rank - 1) % degree),
                ]
                for work in dist.batch_isend_irecv(operations):
                    work.wait()

            for _ in range(3):
                exchange()
            time_s = self.agreed([self.time_s(exchange, 5)])[0]
            found |= {"bytes_per_s": size / time_s} if what == "large" else {"latency_s": time_s}
        return found

    def _failed_row(self, case: Case, name: str, kernel: str, reason: str) -> dict[str, Any]:
        return {**_labels(case, name, kernel), "failure": reason}

    def _row(self, prepared: _Prepared, **values: Any) -> dict[str, Any]:
        candidate = prepared.candidate
        return {**_labels(prepared.case, candidate.name, candidate.kernel), "peer": candidate.is_peer, **values}

    def _report(self, **message: Any) -> None:
        if self._task.rank == 0:
            self._reports.put(message)


class _Prepared:
    """A candidate that has run once, with its inputs; see `_Rank`."""

    def __init__(self, rank: _Rank, case: Case, candidate: Candidate, inputs: Sequence[Tensor]) -> None:
        self.case, self.candidate = case, candidate
        self._rank = rank
        *leaves, self._dout = inputs
        self._inputs = tuple(leaves)
        self._forward_times: list[float] = []
        self._both_times: list[float] = []
        with candidate.region():
            # Compiles kernels and builds index maps; the calls after it are those that count.
            self.both()
            self._count_bytes()
            self.forget_buffers()
            self._peak_bytes = rank.peak_bytes(self.both)
            self._both_bytes = self._count_bytes()
            forward_s = rank.time_s(self.forward, 1)
            self._forward_bytes = self._count_bytes()
            forward_s, both_s = rank.agreed([forward_s, rank.time_s(self.both, 1)])
        self._num_forward, self._num_both = (
            max(1, min(50, round(rank.settings.target_s / max(time_s, 1e-6)))) for time_s in (forward_s, both_s)
        )
        self.round_s = forward_s * self._num_forward + both_s * self._num_both

    @property
    def label(self) -> str:
        """Name and kernel."""
        return f"{self.candidate.name}/{self.candidate.kernel}"

    def forget_buffers(self) -> None:
        """Let go of what the last calls left, so that the next one's memory is counted whole."""
        self._rank.group.workspace.release()

    def forward(self) -> None:
        """The forward alone, as in inference."""
        with torch.no_grad():
            self.candidate.run(*self._inputs)

    def both(self) -> tuple[Tensor, ...]:
        """Forward and backward: out, dq, dk, dv."""
        out = self.candidate.run(*self._inputs)
        return out.detach(), *torch.autograd.grad(out, self._inputs, self._dout)

    def measure(self) -> None:
        """One measurement of each direction."""
        with self.candidate.region():
            self._forward_times.append(self._rank.time_s(self.forward, self._num_forward))
            self._both_times.append(self._rank.time_s(self.both, self._num_both))

    def result(self) -> dict[str, Any]:
        """Medians of the slowest rank (one GPU: the mean of the ranks, each of which ran it alone), bytes and memory."""
        rank, degree = self._rank, self._rank.settings.degree
        is_alone = self.candidate.name == ONE_GPU
        how = dist.ReduceOp.SUM if is_alone else dist.ReduceOp.MAX
        scale = 1 / degree if is_alone else 1.0
        forward, both = (
            [scale * time_s for time_s in rank.agreed(times, how)] for times in (self._forward_times, self._both_times)
        )
        values: dict[str, Any] = {
            "forward_s": _median(forward), "both_s": _median(both), "forward_rounds_s": forward, "both_rounds_s": both,
            "peak_bytes": int(rank.agreed([self._peak_bytes])[0]),
        }  # fmt: skip
        if self.candidate.sent_bytes is not None:
            sent = rank.agreed([self._forward_bytes, self._both_bytes], dist.ReduceOp.SUM)
            values["sent_forward_bytes"], values["sent_both_bytes"] = (total / degree for total in sent)
            values["formula_bytes"] = self.formula_bytes()
        return values

    def formula_bytes(self) -> int | None:
        """What the peak should be."""
        return peak_formula(self.case, self.candidate, self._rank.settings.degree, self._inputs[0].element_size())

    def agreed(self, values: Sequence[float]) -> list[float]:
        """The largest of all ranks."""
        return self._rank.agreed(values)

    def _count_bytes(self) -> int:
        return self.candidate.sent_bytes() if self.candidate.sent_bytes is not None else 0


def _one_gpu_builders(site: Site) -> list[tuple[str, str, Callable[[Site, str], Candidate]]]:
    kernels = [*site.settings.kernels, *([CUDNN] if site.device.type == "cuda" else [])]
    return [(ONE_GPU, kernel, one_gpu) for kernel in kernels]


def _random_inputs(case: Case, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    """q, k, v, dout of all tokens, the same on every rank."""
    generator = torch.Generator(device).manual_seed(seed)
    heads = (case.num_heads, case.num_key_heads, case.num_key_heads, case.num_heads)
    return tuple(
        torch.randn(case.num_tokens, count, case.head_size, generator=generator, device=device, dtype=torch.bfloat16)
        for count in heads
    )


def _local_inputs(
    candidate: Candidate, whole: Sequence[Tensor], made: dict[bytes, tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """q, k, v (leaves) and dout of the candidate's rows; candidates with the same rows share them."""
    key = candidate.tokens.numpy().tobytes()
    if key not in made:
        tokens = candidate.tokens.to(whole[0].device)
        q, k, v, dout = whole if len(tokens) == len(whole[0]) else (x[tokens] for x in whole)
        made[key] = *(x.detach().requires_grad_() for x in (q, k, v)), dout
    return made[key]


def _labels(case: Case, name: str, kernel: str) -> dict[str, Any]:
    return {
        "kind": case.kind, "link": case.link, "heads": case.heads, "head_size": case.head_size, "mix": case.mix,
        "tokens_per_rank": case.tokens_per_rank, "num_documents": len(case.lengths), "name": name, "kernel": kernel,
    }  # fmt: skip


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if len(values) % 2 else sum(sorted(values)[len(values) // 2 - 1 :][:2]) / 2
