"""Ranks that measure things in turns: started by a benchmark, they meet, agree on when to stop, and report rows."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raysp.comm import Communicator

Row = dict[str, Any]
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Site:
    """Where one rank runs.

    Attributes:
        group: All ranks.
        device: This rank's.
    """

    group: Communicator
    device: torch.device


def reported(
    measure: Callable[[Site, Any, Any], list[Row]], task: Any, cases: tuple[Any, ...], *, device: str, degree: int,
    deadline_s: float,
) -> Iterator[list[Row]]:  # fmt: skip
    """Start ``degree`` ranks and yield what rank 0 finds in each case.

    Args:
        measure: Top-level function ``(site, task, case)``, called on every rank.
        task: Settings, pickled.
        cases: Problems, in order; none is begun after the deadline.
        device: ``cuda`` or ``cpu``.
        degree: Ranks.
        deadline_s: Unix time.

    Raises:
        SystemExit: A rank failed; what came before was yielded.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    reports = context.SimpleQueue()
    arguments = (measure, task, cases, device, degree, deadline_s, store.port, reports)
    ranks = [context.Process(target=_run_rank, args=(rank, *arguments)) for rank in range(degree)]
    for process in ranks:
        process.start()
    while True:
        while reports.empty() and all(process.is_alive() for process in ranks):
            time.sleep(0.1)
        report = None if reports.empty() else reports.get()
        if report is None:
            break
        yield report
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit("a rank failed; what was measured before is written")


def measured(runs: dict[str, Run], leaves: list[Tensor], site: Site, *, rounds: int) -> list[Row]:
    """Time forward and backward of all runs in turns, so that all see the same clocks.

    Returns:
        For each run ``name``, ``time_s`` (median, of the slowest rank), ``sent_bytes`` of the rank that sends most and, on
        CUDA, ``peak_bytes`` beyond what was there before.
    """
    rows = [_first_run(name, run, leaves, site) for name, run in runs.items()]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_largest([_timed_s(run, leaves, site)])[0])
    for row in rows:
        row["time_s"] = statistics.median(times[row["name"]])
    return rows


def _run_rank(
    rank: int, measure: Callable[[Site, Any, Any], list[Row]], task: Any, cases: tuple[Any, ...], device: str, degree: int,
    deadline_s: float, port: int, reports: Any,
) -> None:  # fmt: skip
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // degree))
    place = torch.device("cuda", rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=dist.TCPStore("127.0.0.1", port), rank=rank, world_size=degree, timeout=timedelta(minutes=5),
    )  # fmt: skip
    dist.all_reduce(torch.ones(1, device=place))
    assert dist.group.WORLD is not None
    site = Site(Communicator.wrap(dist.group.WORLD), place)
    for case in cases:
        if _largest([float(time.time() >= deadline_s)])[0] == 0:
            rows = measure(site, task, case)
            if rank == 0:
                reports.put(rows)
    if rank == 0:
        reports.put(None)
    dist.destroy_process_group()


def _both(run: Run, leaves: list[Tensor]) -> None:
    out = run()
    torch.autograd.grad(out, leaves, torch.ones_like(out))


def _first_run(name: str, run: Run, leaves: list[Tensor], site: Site) -> Row:
    """Bytes and memory, and a warm-up."""
    on_gpu = site.device.type == "cuda"
    site.group.counter.reset()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    _both(run, leaves)
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    sent_bytes, peak_bytes = _largest([site.group.counter.sent_bytes, peak])
    return {"name": name, "sent_bytes": int(sent_bytes), "peak_bytes": int(peak_bytes)}


def _timed_s(run: Run, leaves: list[Tensor], site: Site) -> float:
    _largest([0.0])
    if site.device.type == "cuda":
        torch.cuda.synchronize()
    start_s = time.perf_counter()
    _both(run, leaves)
    if site.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start_s


def _largest(values: list[float]) -> list[float]:
    """The largest of every rank's values, place by place; all ranks meet here."""
    largest = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    found: list[float] = largest.tolist()
    return found
