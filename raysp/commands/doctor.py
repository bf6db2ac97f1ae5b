"""``raysp doctor``: what of the software that raysp uses is here, and how to get what is not."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from raysp.commands.output import print_json, terminal
from raysp.errors import RayspError, first_line

_TRAIN = "pip install 'raysp[train]'"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for.

    Attributes:
        name: What.
        found: Its version or place; none where it is missing.
        required: Training cannot work without it.
        remedy: The command that brings it; empty where it is found.
    """

    name: str
    found: str | None
    required: bool
    remedy: str = ""


def doctor(*, as_json: bool) -> None:
    """Show every finding.

    Raises:
        RayspError: Something required is missing.
    """
    findings = find_all()
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        console = terminal()
        console.print(_table(findings))
        if any(finding.found is None for finding in findings):
            console.print("\nto get what is not here:")
        for finding in findings:
            if finding.found is None:
                # Not in the table, which would break the commands into lines.
                console.print(f"  {finding.name}: {finding.remedy}", soft_wrap=True, markup=False)
    missing = [finding.name for finding in findings if finding.required and finding.found is None]
    if missing:
        raise RayspError(
            f"required and missing: {', '.join(missing)}; expected all of them. Run the commands of `raysp doctor`."
        )


def find_all() -> list[Finding]:
    """Look for everything; imports torch where it is installed."""
    return [
        _python(),
        _package("numpy", required=True, remedy="pip install raysp"),
        *_solvers(),
        *_torch(),
        *(_package(name, required=True, remedy=_TRAIN) for name in ("ray", "transformers", "tokenizers")),
        *(_package(name, required=True, remedy=_TRAIN) for name in ("safetensors", "pyarrow")),
        _mlflow(),
        _package("matplotlib", required=False, remedy="pip install 'raysp[plot]'"),
        _package("flash-attn", required=False, remedy="pip install flash-attn --no-build-isolation"),
        _package("flash-attn-4", required=False, remedy="pip install --pre flash-attn-4"),
        _package("liger-kernel", required=False, remedy="pip install 'raysp[gpu]'"),
        _package("fla-core", required=False, remedy="pip install 'raysp[fla]'"),
        _ray_token(),
    ]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", f"{version} ({sys.executable})", True)


def _package(name: str, *, required: bool, remedy: str) -> Finding:
    version = _version(name)
    return Finding(name, version, required, "" if version else remedy)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _mlflow() -> Finding:
    # GPU machines may have mlflow-skinny with sqlalchemy instead of all of mlflow.
    for name in ("mlflow", "mlflow-skinny"):
        version = _version(name)
        if version:
            return Finding("mlflow", version if name == "mlflow" else f"{version} ({name})", False)
    return Finding("mlflow", None, False, _TRAIN)


def _solvers() -> list[Finding]:
    highs = _attempt(lambda: f"highspy {_version('highspy')}" if importlib.import_module("highspy") else None)
    cbc = _attempt(_cbc)
    return [
        # Either is enough; HiGHS comes with raysp.
        Finding("HiGHS (solver)", highs, cbc is None, "" if highs else "pip install highspy"),
        Finding("CBC (solver)", cbc, False, "" if cbc else "pip install 'pulp<4'"),
    ]


def _cbc() -> str | None:
    pulp = importlib.import_module("pulp")
    available = [name for name in pulp.listSolvers(onlyAvailable=True) if name in ("PULP_CBC_CMD", "COIN_CMD")]
    return f"pulp {_version('pulp')}" if available else None


def _torch() -> list[Finding]:
    remedy = "see https://pytorch.org/get-started/locally for the command of your CUDA version"
    if _version("torch") is None:
        return [Finding("torch", None, True, _TRAIN), *_no_gpu(remedy), Finding("aten (kernel)", None, True, _TRAIN)]
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken binary raises OSError, ImportError or RuntimeError
        reason = first_line(error)
        again = f"pip install --force-reinstall torch (its import fails: {reason})"
        return [Finding("torch", None, True, again), *_no_gpu(remedy), Finding("aten (kernel)", None, True, again)]
    found = [Finding("torch", torch.__version__, True)]
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        devices = f"{torch.cuda.device_count()} x {', '.join(sorted(names))}"
        found.append(Finding("CUDA", f"{torch.version.cuda}, {devices}", False))
        nccl = _attempt(lambda: ".".join(map(str, torch.cuda.nccl.version())))
        found.append(Finding("NCCL", nccl, True, "" if nccl else remedy))
    elif torch.version.cuda:
        found.append(Finding("CUDA", None, False, f"torch is built for CUDA {torch.version.cuda}; check nvidia-smi"))
        found.append(Finding("NCCL", "in torch", False))
    else:
        found += _no_gpu(remedy)
    device = "CUDA" if torch.cuda.is_available() else "CPU"
    return [*found, Finding("aten (kernel)", f"in torch, {device}", True)]


def _no_gpu(remedy: str) -> list[Finding]:
    return [Finding("CUDA", None, False, remedy), Finding("NCCL", None, False, remedy)]


def _ray_token() -> Finding:
    # The order in which Ray looks. The token itself is never shown.
    if os.environ.get("RAY_AUTH_TOKEN"):
        return Finding("Ray token", "in RAY_AUTH_TOKEN", False)
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if path.is_file():
        return Finding("Ray token", f"in {path}", False)
    return Finding("Ray token", None, False, "ray get-auth-token --generate")


def _attempt(look: Callable[[], str | None]) -> str | None:
    try:
        return look()
    except Exception:  # whatever a broken installation raises, it is not usable
        return None


def _table(findings: list[Finding]) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for heading in ("", "what", "found"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        sign = "[green]ok[/green]" if finding.found else "[red]missing[/red]" if finding.required else "-"
        found = finding.found or ("" if finding.required else "not here; optional")
        table.add_row(sign, finding.name, escape(found))
    return table
