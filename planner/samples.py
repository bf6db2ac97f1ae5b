"""Reading and writing calibration samples: JSON or CSV, strictly.

JSON: a list of objects ``{"lengths": [1024, 512], "degree": 2, "time_s": 0.31, "memory_bytes": 1200000000}``, the last
key optional. CSV: the same names in the first line; lengths separated by spaces or semicolons within their cell.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from planner.calibration import Sample
from planner.errors import CalibrationError
from planner.strict_json import as_int, as_list, as_number, as_object, check_keys, parse_object

_REQUIRED = ("lengths", "degree", "time_s")
_OPTIONAL = ("memory_bytes",)


def read_samples(path: str | Path) -> list[Sample]:
    """Read samples from a ``.json`` or ``.csv`` file.

    Raises:
        CalibrationError: Unreadable file, unknown or missing key, or a value of the wrong kind, with its place.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
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
        return [_sample(_from_cells(row, f"{path} row {i}"), f"{path} row {i}") for i, row in enumerate(rows, start=2)]
    raise CalibrationError(f"samples {path} end in {path.suffix!r}; expected .json or .csv.")


def write_samples(samples: Sequence[Sample], path: str | Path) -> None:
    """Write samples as JSON that `read_samples` reads back."""
    content = [dataclasses.asdict(sample) for sample in samples]
    Path(path).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _sample(content: Mapping[str, Any], where: str) -> Sample:
    check_keys(content, required=_REQUIRED, optional=_OPTIONAL, what=where, error=CalibrationError)
    lengths = as_list(content["lengths"], f"{where}.lengths", CalibrationError)
    memory = content.get("memory_bytes")
    return Sample(
        lengths=tuple(as_int(s, f"{where}.lengths", CalibrationError, minimum=1) for s in lengths),
        degree=as_int(content["degree"], f"{where}.degree", CalibrationError, minimum=1),
        time_s=as_number(content["time_s"], f"{where}.time_s", CalibrationError, positive=True),
        memory_bytes=None if memory is None else as_number(memory, f"{where}.memory_bytes", CalibrationError),
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
            raise CalibrationError(f"{where} has {key} {cell!r}; expected {_WANTED[key]}.") from cause
    return content


_WANTED = {
    "lengths": "integers separated by spaces or semicolons",
    "degree": "an integer",
    "time_s": "seconds",
    "memory_bytes": "bytes, or nothing",
}


def _value(key: str, cell: str) -> Any:
    if key == "lengths":
        return [int(part) for part in cell.replace(";", " ").split()]
    if key == "degree":
        return int(cell)
    if key == "memory_bytes" and not cell.strip():
        return None
    return float(cell)
