"""Which optional packages are there, by what pip recorded of them: nothing is imported.

Files do not tell: flash-attn 2.8 ships a folder ``flash_attn/cute`` that is an older FlashAttention-4, without what it needs.
"""

from __future__ import annotations

import functools
from importlib import metadata


@functools.cache
def is_installed(distribution: str) -> bool:
    """Whether a package is installed, such as ``flash-attn``."""
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
