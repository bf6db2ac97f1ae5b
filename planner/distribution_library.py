"""Length distributions that ship with the package: `planner/distributions/NAME.json`, each with its source."""

from __future__ import annotations

from importlib import resources

from planner.errors import LengthsError
from planner.length_distribution import LengthDistribution

_SUFFIX = ".json"


def list_distributions() -> list[str]:
    """Return the names that `load_distribution` takes, sorted."""
    folder = resources.files("planner") / "distributions"
    return sorted(item.name.removesuffix(_SUFFIX) for item in folder.iterdir() if item.name.endswith(_SUFFIX))


def load_distribution(name: str) -> LengthDistribution:
    """Load a length distribution that ships with the package.

    Args:
        name: One of `list_distributions`, such as ``"wikipedia"``.

    Raises:
        LengthsError: No such distribution; the message lists those that exist.
    """
    known = list_distributions()
    if name not in known:
        raise LengthsError(f"unknown distribution {name!r}; expected one of {', '.join(known)}, or give a file.")
    text = (resources.files("planner") / "distributions" / f"{name}{_SUFFIX}").read_text(encoding="utf-8")
    return LengthDistribution.from_json(text, what=f"distribution {name}")
