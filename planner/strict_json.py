"""Reading JSON without believing it: exact keys, exact types, finite numbers.

Every function raises the error class that the caller names, with the dotted key in the message. Canonical JSON (sorted
keys, no spaces, no NaN) is what plan ids and cost-model hashes are taken of.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from planner.errors import PlannerError

_LARGEST_INT = 2**63 - 1


def canonical_json(content: Mapping[str, Any]) -> str:
    """Return the one text that equal contents share: keys sorted, no spaces, floats as `repr`."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def canonical_sha256(content: Mapping[str, Any]) -> str:
    """Return the hexadecimal SHA-256 of `canonical_json`."""
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def parse_object(text: str, *, what: str, error: type[PlannerError]) -> dict[str, Any]:
    """Parse one JSON object; duplicate keys and the non-standard NaN and Infinity are refused."""

    def refuse_constant(name: str) -> float:
        raise error(f"{what} holds {name}, which is not a JSON number; write a finite number.")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            raise error(f"{what} has the key(s) {', '.join(twice)} more than once in one object; keep one of each.")
        return content

    try:
        content = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=unique)
    except json.JSONDecodeError as cause:
        raise error(f"{what} is not valid JSON ({cause}); expected one JSON object.") from cause
    except PlannerError:
        raise
    except ValueError as cause:
        # Python refuses to read integers of thousands of digits.
        raise error(f"{what} holds a number that cannot be read ({cause}); write a smaller one.") from cause
    except RecursionError as cause:
        raise error(f"{what} is nested too deeply; expected one flat JSON object.") from cause
    return as_object(content, what, error)


def check_keys(
    content: Mapping[str, Any],
    *,
    required: Iterable[str],
    optional: Iterable[str],
    what: str,
    error: type[PlannerError],
) -> None:
    """Refuse unknown and missing keys, naming them and the ones that are known."""
    required, known = set(required), set(required) | set(optional)
    unknown = sorted(set(content) - known)
    if unknown:
        raise error(f"{what} has unknown key(s) {', '.join(unknown)}; known keys are {', '.join(sorted(known))}.")
    missing = sorted(required - set(content))
    if missing:
        raise error(f"{what} lacks the key(s) {', '.join(missing)}; add them.")


def as_object(value: Any, key: str, error: type[PlannerError]) -> dict[str, Any]:
    """Return `value` if it is a JSON object."""
    if not isinstance(value, dict):
        raise error(f"{key} is {_shown(value)}; expected a JSON object.")
    return value


def as_list(value: Any, key: str, error: type[PlannerError]) -> list[Any]:
    """Return `value` if it is a JSON array."""
    if not isinstance(value, list):
        raise error(f"{key} is {_shown(value)}; expected a JSON array.")
    return value


def as_str(value: Any, key: str, error: type[PlannerError]) -> str:
    """Return `value` if it is a string that is not empty."""
    if not isinstance(value, str) or not value:
        raise error(f"{key} is {_shown(value)}; expected a non-empty string.")
    return value


def as_int(value: Any, key: str, error: type[PlannerError], *, minimum: int = 0) -> int:
    """Return `value` if it is an integer (not a boolean) of at least `minimum` that 64 bits hold."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise error(f"{key} is {_shown(value)}; expected an integer of at least {minimum}.")
    if value > _LARGEST_INT:
        raise error(f"{key} is above 2^63 - 1; expected an integer from {minimum} to that.")
    return value


def as_number(value: Any, key: str, error: type[PlannerError], *, positive: bool = False) -> float:
    """Return `value` as a float if it is a finite number, not negative (above zero with `positive`)."""
    wanted = "a finite number above 0" if positive else "a finite number of at least 0"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise error(f"{key} is {_shown(value)}; expected {wanted}.")
    try:
        number = float(value)
    except OverflowError as cause:
        raise error(f"{key} is too large for a float; expected {wanted}.") from cause
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise error(f"{key} is {number}; expected {wanted}.")
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
