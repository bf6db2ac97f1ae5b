"""A process that plans: the handle that its owner holds, and what runs inside.

Not `multiprocessing.Process`: spawning would import the owner's `__main__` again, which scripts without a guard, Ray
workers and notebooks do not survive, and forking is unsafe once CUDA or Ray have started threads. The child is a fresh
interpreter that knows one socket. It is the leader of its own session, so that Ctrl-C in the terminal does not reach
it and so that a solver it started goes down with it; it ends itself as soon as its owner is gone.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import NoReturn

from planner.errors import PlannerError
from planner.plan import StepPlan
from planner.plan_cache import PlanRequest, plan_canonical
from planner.preset_library import list_presets, load_preset

_START = """
import sys
sys.path[:] = sys.argv[4:]
from planner.planner_process import serve
serve(*map(int, sys.argv[1:4]))
"""
_THREAD_COUNTS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)
_OWNER_CHECK_S = 1.0
_LOG_TAIL_BYTES = 2000
_WARM_UP_LIMIT_S = 0.1
_LONG_S = 1e9


@dataclass(frozen=True)
class Warm:
    """The child has loaded everything and made its first plan."""


@dataclass(frozen=True)
class Job:
    """Plan a request in canonical order."""

    job_id: int
    request: PlanRequest


@dataclass(frozen=True)
class Stop:
    """End the search of a job soon, with what it has."""

    job_id: int


@dataclass(frozen=True)
class Incumbent:
    """The best plan of a job so far."""

    job_id: int
    plan: StepPlan


@dataclass(frozen=True)
class Finished:
    """The plan of a job, or why there is none."""

    job_id: int
    plan: StepPlan | None
    error: Exception | None


Report = Warm | Incumbent | Finished


class PlannerProcess:
    """The owner's end of one planner process, which starts at once and plans one job after the other.

    Args:
        niceness: Added to the child's; above 0 it yields to other processes of this machine.
    """

    def __init__(self, *, niceness: int = 0) -> None:
        self.connection, child_end = Pipe()
        # Closed by `end`; what a crashing interpreter writes is found nowhere else.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        path = [os.path.abspath(entry) for entry in sys.path]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(child_end.fileno()), str(os.getpid()), str(niceness), *path],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env={**os.environ, **dict.fromkeys(_THREAD_COUNTS, "1")},
                pass_fds=(child_end.fileno(),),
                start_new_session=True,
            )
        except BaseException:
            self.connection.close()
            self._log.close()
            raise
        finally:
            child_end.close()

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def send(self, message: Job | Stop) -> None:
        """Give the child something to do; if it is gone, `receive` will tell."""
        try:
            self.connection.send(message)
        except OSError:
            return

    def receive(self) -> Report | None:
        """Return the next report, waiting for it; `None` when the child is gone."""
        try:
            report: Report = self.connection.recv()
        except (EOFError, OSError):
            return None
        return report

    def kill(self) -> None:
        """Kill the child and what it started, at once. To be followed by `end`."""
        # Nobody has waited for the child, so the id is still its own, also when it is dead.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> str:
        """Kill the child if it lives, wait for it, and say how it ended and what it wrote last. To be called once."""
        self.kill()
        code = self._process.wait()
        self.connection.close()
        with self._log as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
            tail = log.read().decode(errors="replace").strip()
        how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        return f"{how}; it wrote: {tail}" if tail else how


def serve(descriptor: int, owner_pid: int, niceness: int) -> None:
    """Plan what comes over the socket until its other end is closed. Runs in the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if niceness:
        os.nice(niceness)
    connection: Connection = Connection(descriptor)
    inbox = _Inbox(connection, owner_pid)
    threading.Thread(target=inbox.listen, name="planner-inbox", daemon=True).start()
    _warm_up()
    _send(connection, Warm())
    while True:
        _send(connection, _finished(inbox.jobs.get(), inbox, connection))


class _Inbox:
    """Reads messages while the main thread plans, and ends the process when the owner is gone."""

    def __init__(self, connection: Connection, owner_pid: int) -> None:
        self.jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._connection = connection
        self._owner_pid = owner_pid
        self._stopped_job: int | None = None

    def listen(self) -> None:
        """Read until the owner is gone."""
        try:
            while True:
                # Processes that the owner forked may keep the socket open beyond its death.
                while not self._connection.poll(_OWNER_CHECK_S):
                    if os.getppid() != self._owner_pid:
                        _end_with_group()
                self.take(self._connection.recv())
        except (EOFError, OSError):
            _end_with_group()

    def take(self, message: Job | Stop) -> None:
        """File a message."""
        if isinstance(message, Stop):
            self._stopped_job = message.job_id
        else:
            self.jobs.put(message)

    def clock_of(self, job_id: int) -> Callable[[], float]:
        """Monotonic seconds that are past every limit once the job is stopped."""
        return lambda: time.monotonic() + (_LONG_S if self._stopped_job == job_id else 0.0)


def _finished(job: Job, inbox: _Inbox, connection: Connection) -> Finished:
    def report(plan: StepPlan) -> None:
        _send(connection, Incumbent(job.job_id, plan))

    try:
        plan = plan_canonical(job.request, on_incumbent=report, clock=inbox.clock_of(job.job_id))
    except Exception as error:
        return Finished(job.job_id, None, _portable(error))
    return Finished(job.job_id, plan, None)


def _portable(error: Exception) -> Exception:
    """Return the error, or, where it does not survive pickling, what it says."""
    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            if not isinstance(error, PlannerError):
                error.add_note("in a planner process:\n" + "".join(traceback.format_exception(error)))
            return error
    except Exception as cause:
        error.add_note(f"(cannot be pickled: {cause})")
    return PlannerError("planning failed: " + "".join(traceback.format_exception(error)))


def _warm_up() -> None:
    """Make a plan that goes through the search, so that whatever it compiles or loads late is there."""
    model = load_preset(list_presets()[0])
    lengths = tuple(500 + 9701 * i % 31000 for i in range(80))
    plan_canonical(PlanRequest(lengths=lengths, num_ranks=64, cost_model=model, time_limit_s=_WARM_UP_LIMIT_S))


def _send(connection: Connection, report: Report) -> None:
    try:
        connection.send(report)
    except OSError:
        _end_with_group()


def _end_with_group() -> NoReturn:
    """End this process at once, and the solver it may be waiting for."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
