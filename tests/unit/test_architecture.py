"""The rooms keep to themselves: import arrows, and where torch.distributed, ray and mlflow may be touched."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


def _imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_import_arrows_point_one_way() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "rooms"),
    [
        ("torch.distributed", ("raysp/comm", "raysp/train")),
        ("ray", ("raysp/cluster",)),
        ("mlflow", ("raysp/tracking",)),
    ],
)
def test_only_its_room_imports(module: str, rooms: tuple[str, ...]) -> None:
    offenders = [
        str(file.relative_to(_ROOT))
        for folder in ("raysp", "planner", "jobs")
        for file in (_ROOT / folder).rglob("*.py")
        if any(name == module or name.startswith(f"{module}.") for name in _imports(file))
        and not str(file.relative_to(_ROOT)).startswith(rooms)
    ]
    assert offenders == []
