"""The pool of gloo ranks, shared by all tests of this folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Rank functions are pickled by module name; spawned ranks inherit this path.
sys.path.insert(0, str(Path(__file__).parent))

from gloo_pool import GlooPool


@pytest.fixture(scope="session")
def gloo_pool() -> Iterator[GlooPool]:
    """Four gloo ranks; see ``GlooPool.run``."""
    pool = GlooPool(size=4)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def wide_pool() -> Iterator[GlooPool]:
    """Eight ranks, for degrees above four."""
    pool = GlooPool(8)
    yield pool
    pool.stop()
