"""Compiling the inner loops with numba: cached on disk, without the interpreter lock, deterministic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Return `function` compiled at its first call; the machine code is kept beside the source or in the user's cache."""
    try:
        return cast("Function", numba.njit(cache=True, nogil=True, error_model="numpy")(function))
    except RuntimeError:
        # No folder can be written: compile anew in every process.
        return cast("Function", numba.njit(nogil=True, error_model="numpy")(function))
