"""Ctrl-C and SIGTERM ask a run to stop after the current step; a second Ctrl-C ends it at once."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any


class StopSignal:
    """Context manager that turns the first SIGINT or SIGTERM into ``requested``. Signals stay as they were elsewhere
    than in the main thread."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.stderr.write("\nstopping after the work in progress; Ctrl-C again ends at once\n")
        self.requested = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
