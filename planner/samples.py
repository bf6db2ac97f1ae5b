"""Calibration samples: measured groups, read and written as JSON or CSV, strictly.

JSON: a list of objects ``{"lengths": [1024, 512], "degree": 2, "time_s": 0.31, "memory_bytes": 1200000000}``; optional
are ``memory_bytes``, ``attention``, ``spans_nodes`` and ``recompute``. CSV: the same names in the first line; lengths
separated by spaces or semicolons within their cell, ``spans_nodes`` true or false, an empty cell for the default.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.errors import CalibrationError
from planner.length_profile import LENGTH_LIMIT
from planner.method_cost import DEFAULT_RECOMPUTE, METHOD_NAMES
from planner.strict_json import as_int, as_list, as_number, as_object, as_str, check_keys, parse_object

_REQUIRED = ("lengths", "degree", "time_s")
_KIND = {"attention": None, "spans_nodes": False, "recompute": DEFAULT_RECOMPUTE}
_OPTIONAL = ("memory_bytes", *_KIND)


@dataclass(frozen=True)
class Sample:
    """One measured group.

    Attributes:
        lengths: Tokens of every sequence of the group.
        degree: Ranks of the group.
        time_s: Measured forward and backward time.
        memory_bytes: Measured peak memory of a rank, or `None`.
        attention: Parallel attention method that ran; `None`: the cost model's primary one. Of no meaning at degree 1.
        spans_nodes: Ranks of the group were on different nodes.
        recompute: Recompute policy that ran.
    """

    lengths: tuple[int, ...]
    degree: int
    time_s: float
    memory_bytes: float | None = None
    attention: str | None = None
    spans_nodes: bool = False
    recompute: str = DEFAULT_RECOMPUTE


def read_samples(path: str | Path) -> list[Sample]:
    """Read samples from a ``.json`` or ``.csv`` file.

    Raises:
        CalibrationError: Unreadable file, unknown or missing key, or a value of the wrong kind, with its place.
    """
    path = Path(path)
    try:
        # Spreadsheets put a byte order mark first.
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as cause:
        raise CalibrationError(f"cannot read samples {path}: {cause}. Expected a .json or .csv file.") from cause
    if path.suffix == ".json":
        # Wrapped, so that the one strict reader of objects does for a list too.
        wrapped = parse_object(f'{{"samples": {text}\n}}', what=f"samples {path}", error=CalibrationError)
        check_keys(wrapped, required=("samples",), optional=(), what=f"samples {path}", error=CalibrationError)
        items = as_list(wrapped["samples"], f"samples {path}", CalibrationError)
        return [
            _sample(as_object(item, f"{path}[{i}]", CalibrationError), f"{path}[{i}]") for i, item in enumerate(items)
        ]
    if path.suffix == ".csv":
        rows = csv.DictReader(text.splitlines(), restkey="more cells than columns")
        names = rows.fieldnames or ()
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise CalibrationError(f"samples {path} have the column(s) {', '.join(twice)} twice; keep one of each.")
        return [_sample(_from_cells(row, f"{path} row {i}"), f"{path} row {i}") for i, row in enumerate(rows, start=2)]
    raise CalibrationError(f"samples {path} end in {path.suffix!r}; expected .json or .csv.")


def write_samples(samples: Sequence[Sample], path: str | Path) -> None:
    """Write samples as JSON that `read_samples` reads back; kinds that are the default are left out."""
    content = [
        {key: value for key, value in dataclasses.asdict(sample).items() if key not in _KIND or value != _KIND[key]}
        for sample in samples
    ]
    Path(path).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def check_sample(sample: Sample, what: str) -> None:
    """Raise `CalibrationError` if a sample cannot have been measured.

    Args:
        sample: The sample.
        what: Its name in the message.
    """
    if not sample.lengths or min(sample.lengths) < 1:
        raise CalibrationError(f"{what} has lengths {list(sample.lengths)[:5]}; expected one or more, from 1 on.")
    if max(sample.lengths) >= LENGTH_LIMIT:
        raise CalibrationError(f"{what} has a length of 16 digits or more; expected fewer.")
    if sample.degree < 1:
        raise CalibrationError(f"{what} has degree {sample.degree}; expected at least 1.")
    if not math.isfinite(sample.time_s) or sample.time_s <= 0:
        raise CalibrationError(f"{what} has time_s {sample.time_s}; expected a finite number above 0.")
    memory = sample.memory_bytes
    if memory is not None and not (math.isfinite(memory) and memory >= 0):
        raise CalibrationError(f"{what} has memory_bytes {memory}; expected a finite number of at least 0.")
    if sample.attention not in (None, "local", *METHOD_NAMES):
        raise CalibrationError(f"{what} has attention {sample.attention!r}; expected one of {', '.join(METHOD_NAMES)}.")
    if sample.attention == "local" and sample.degree > 1:
        raise CalibrationError(f"{what} of degree {sample.degree} has attention 'local'; name its method.")


def _sample(content: Mapping[str, Any], where: str) -> Sample:
    check_keys(content, required=_REQUIRED, optional=_OPTIONAL, what=where, error=CalibrationError)
    lengths = as_list(content["lengths"], f"{where}.lengths", CalibrationError)
    memory, attention, spans = content.get("memory_bytes"), content.get("attention"), content.get("spans_nodes", False)
    if not isinstance(spans, bool):
        raise CalibrationError(f"{where}.spans_nodes is {spans!r}; expected true or false.")
    return Sample(
        lengths=tuple(as_int(s, f"{where}.lengths", CalibrationError, minimum=1) for s in lengths),
        degree=as_int(content["degree"], f"{where}.degree", CalibrationError, minimum=1),
        time_s=as_number(content["time_s"], f"{where}.time_s", CalibrationError, positive=True),
        memory_bytes=None if memory is None else as_number(memory, f"{where}.memory_bytes", CalibrationError),
        attention=None if attention is None else as_str(attention, f"{where}.attention", CalibrationError),
        spans_nodes=spans,
        recompute=as_str(content.get("recompute", DEFAULT_RECOMPUTE), f"{where}.recompute", CalibrationError),
    )


def _from_cells(row: Mapping[str | Any, Any], where: str) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, cell in row.items():
        if key not in (*_REQUIRED, *_OPTIONAL):
            content[str(key)] = cell
            continue
        try:
            content[key] = _value(key, cell or "")
        except ValueError as cause:
            shown = repr(cell if cell is None or len(cell) <= 60 else cell[:57] + "...")
            raise CalibrationError(f"{where} has {key} {shown}; expected {_WANTED[key]}.") from cause
    return content


_WANTED = {
    "lengths": "integers separated by spaces or semicolons",
    "degree": "an integer",
    "time_s": "seconds",
    "memory_bytes": "bytes, or nothing",
    "spans_nodes": "true, false, or nothing",
}


def _value(key: str, cell: str) -> Any:
    if key == "lengths":
        return [int(part) for part in cell.replace(";", " ").split()]
    if key == "degree":
        return int(cell)
    if key == "memory_bytes" and not cell.strip():
        return None
    if key == "attention":
        return cell.strip() or None
    if key == "recompute":
        return cell.strip() or DEFAULT_RECOMPUTE
    if key == "spans_nodes":
        return _boolean(cell)
    return float(cell)


def _boolean(cell: str) -> bool:
    known = {"": False, "false": False, "0": False, "true": True, "1": True}
    if cell.strip().lower() not in known:
        raise ValueError(cell)
    return known[cell.strip().lower()]
