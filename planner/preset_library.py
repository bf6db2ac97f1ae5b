"""Cost models that ship with the package: `planner/presets/NAME.json`, each with its source in `metadata`."""

from __future__ import annotations

from importlib import resources

from planner.cost_model import CostModel
from planner.errors import CostModelError

_SUFFIX = ".json"


def list_presets() -> list[str]:
    """Return the names that `load_preset` takes, sorted."""
    folder = resources.files("planner") / "presets"
    return sorted(item.name.removesuffix(_SUFFIX) for item in folder.iterdir() if item.name.endswith(_SUFFIX))


def load_preset(name: str) -> CostModel:
    """Load a cost model that ships with the package.

    Args:
        name: One of `list_presets`, such as ``"flexsp-gpt7b-64xa100-40g"``.

    Raises:
        CostModelError: No such preset; the message lists those that exist.
    """
    known = list_presets()
    if name not in known:
        raise CostModelError(f"unknown preset {name!r}; expected one of {', '.join(known)}, or give a cost model file.")
    text = (resources.files("planner") / "presets" / f"{name}{_SUFFIX}").read_text(encoding="utf-8")
    return CostModel.from_json(text, what=f"preset {name}")
