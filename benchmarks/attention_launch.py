"""Starts the ranks of one link, collects their rows, and starts them again without what hung or broke them."""

from __future__ import annotations

import multiprocessing
import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch.distributed import TCPStore

from benchmarks.attention_cases import Case, Settings
from benchmarks.attention_rank import Task, run_rank
from benchmarks.attention_report import show_case
from benchmarks.attention_targets import judged

# Starts of the ranks that end without a new row before a link is given up.
_MAX_IDLE_ATTEMPTS = 3
# What a rank may take beyond its deadline to finish the measurement under way.
_GRACE_S = 20.0
_JOIN_S = 15.0


@dataclass
class LinkResult:
    """Rows of one link.

    Attributes:
        rows: In the order measured.
        speed: Bytes per second and latency of the link.
        num_cases: Cases that have rows.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    speed: dict[str, Any] = field(default_factory=dict)
    num_cases: int = 0


@dataclass
class _Attempt:
    """How one start of the ranks ended: ``None`` as the broken row where it was not one row's fault."""

    finished: bool = False
    case: str | None = None
    candidate: str | None = None
    error: str = ""


def measure_link(
    link: str, cases: Sequence[Case], settings: Settings, time_s: float, stall_s: float, console: Console
) -> LinkResult:
    """Measure all cases of a link, or as many as the time allows.

    Args:
        link: Name of the link.
        cases: In order of importance.
        settings: Options; their deadline is cut to ``time_s`` from now.
        time_s: Wall-clock time for this link.
        stall_s: Silence after which the ranks are ended and the row under way is given up.
        console: Where to show progress.
    """
    deadline_s = min(settings.deadline_s, time.time() + time_s)
    settings = Settings(**{**vars(settings), "deadline_s": deadline_s})
    # Nobody else's port: the parent holds the store on a free one of the loopback interface.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    result, banned, left = LinkResult(), set[tuple[str, str]](), list(cases)
    num_attempts = num_idle = 0
    with _progress(console) as progress:
        bar = progress.add_task(link, total=len(cases))
        while left and time.time() < deadline_s and num_idle < _MAX_IDLE_ATTEMPTS:
            before = len(left)
            tasks = [
                Task(rank, store.port, f"{link}{num_attempts}", link, tuple(left), frozenset(banned), settings)
                for rank in range(settings.degree)
            ]
            watch = _Watch(tasks, left, result, stall_s, progress, bar)
            attempt = watch.run()
            num_attempts += 1
            if attempt.finished:
                break
            num_idle = num_idle + 1 if len(left) == before and attempt.candidate is None else 0
            what = f"{attempt.case or link}: {attempt.candidate or 'the ranks'}: {attempt.error}"
            progress.console.print(what, style="red", markup=False, highlight=False)
            if attempt.case is not None and attempt.candidate is not None:
                banned |= {(case.name, attempt.candidate) for case in left}
    return result


class _Watch:
    """One start of the ranks, and the parent's side of it."""

    def __init__(
        self, tasks: Sequence[Task], left: list[Case], result: LinkResult, stall_s: float, progress: Progress, bar: Any
    ) -> None:
        self._left, self._result, self._stall_s = left, result, stall_s
        self._progress, self._bar = progress, bar
        self._deadline_s = tasks[0].settings.deadline_s
        context = multiprocessing.get_context("spawn")
        self._reports: Any = context.Queue()
        self._processes: list[BaseProcess] = [
            context.Process(target=run_rank, args=(task, self._reports), daemon=True) for task in tasks
        ]
        self._attempt = _Attempt()

    def run(self) -> _Attempt:
        """Follow the ranks to their end."""
        for process in self._processes:
            process.start()
        heard_s = time.time()
        try:
            while not self._attempt.finished and not self._attempt.error:
                try:
                    message = self._reports.get(timeout=0.5)
                except queue.Empty:
                    self._check(time.time() - heard_s)
                    continue
                heard_s = time.time()
                self._take(message)
        finally:
            self._end()
        return self._attempt

    def _take(self, message: dict[str, Any]) -> None:
        event = message["event"]
        if event == "link":
            self._result.speed = {key: message[key] for key in ("bytes_per_s", "latency_s")}
            speed = f"{message['bytes_per_s'] / 2**30:.1f} GiB/s each way, {message['latency_s'] * 1e6:.0f} us"
            self._progress.console.print(f"{message['link']}: {speed}")
        elif event == "case":
            self._attempt.case, self._attempt.candidate = message["case"], None
            self._progress.update(self._bar, description=message["case"])
        elif event == "candidate":
            self._attempt.candidate = message["candidate"]
            self._progress.update(self._bar, description=f"{message['case']}: {message['candidate']}")
        elif event == "rows":
            self._result.rows += message["rows"]
            self._result.num_cases += 1
            self._left[:] = [case for case in self._left if case.name != message["case"]]
            self._attempt.candidate = None
            self._progress.advance(self._bar)
            show_case(message["case"], judged(message["rows"], len(self._processes)), self._progress.console)
        elif event == "broken":
            self._attempt.error = f"rank {message['rank']}: {message['error'].strip().splitlines()[-1]}"
        elif event == "done":
            self._attempt.finished = True

    def _check(self, silent_s: float) -> None:
        if time.time() > self._deadline_s + _GRACE_S:
            # Out of time in mid-case: what is complete is kept.
            self._attempt.finished = True
        elif silent_s > self._stall_s:
            self._attempt.error = f"said nothing for {silent_s:.0f} s"
        elif any(process.exitcode not in (None, 0) for process in self._processes) and silent_s > 2.0:
            codes = [process.exitcode for process in self._processes]
            self._attempt.error = f"the ranks ended with {codes}"

    def _end(self) -> None:
        """Let ranks that are done leave, and end the others."""
        until_s = time.time() + (_JOIN_S if self._attempt.finished and time.time() < self._deadline_s else 1.0)
        for process in self._processes:
            process.join(max(0.0, until_s - time.time()))
        for process in self._processes:
            if process.is_alive():
                process.kill()
                process.join(_JOIN_S)


def _progress(console: Console) -> Progress:
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=Console(stderr=True, width=console.width))
