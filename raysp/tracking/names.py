"""Names and addresses as MLflow wants them; pure."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

_MAX_NAME_CHARS = 250
_NOT_ALLOWED = re.compile(r"[^\w./ :-]")
_SQLITE_PREFIX = "sqlite:///"


def valid_name(name: str) -> str:
    """A metric, parameter or tag name that MLflow accepts: other characters become ``_``.

    MLflow takes letters, digits and ``_ - . : / space``, up to 250 of them, and refuses names that are no plain
    relative path (``/a``, ``a//b``, ``../a``).
    """
    cleaned = _NOT_ALLOWED.sub("_", name)
    path = posixpath.normpath(cleaned).lstrip("/")
    parts = ["_" if part in ("", ".", "..") else part for part in path.split("/")]
    return "/".join(parts)[:_MAX_NAME_CHARS].rstrip("/")


def resolve_uri(uri: str | None, *, folder: Path) -> str:
    """The tracking URI with an absolute SQLite path.

    Args:
        uri: As configured; none is ``mlflow.db`` in ``folder``.
        folder: What a relative path starts from, absolute.
    """
    if uri is None:
        return f"{_SQLITE_PREFIX}{folder / 'mlflow.db'}"
    database = sqlite_path(uri)
    if database is None or database.is_absolute():
        return uri
    _, _, query = uri.partition("?")
    return f"{_SQLITE_PREFIX}{folder / database}" + (f"?{query}" if query else "")


def sqlite_path(uri: str) -> Path | None:
    """The database file of a ``sqlite:///`` URI; none for every other URI."""
    if not uri.startswith(_SQLITE_PREFIX):
        return None
    text = uri.removeprefix(_SQLITE_PREFIX).partition("?")[0]
    return Path(text) if text and text != ":memory:" else None
