"""Output folders that are complete or not there: written beside their place, renamed at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raysp.errors import InputError, RayspError


def check_replaceable(output: Path, *, marker: str, overwrite: bool) -> None:
    """Refuse to write where something else lies.

    Args:
        output: Folder to be written.
        marker: A file that only folders written by raysp have; without it nothing is ever replaced.
        overwrite: Whether the user asked to replace.

    Raises:
        InputError: The folder is not empty and may not be replaced.
    """
    if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir():
        raise InputError(f"{output} is not a folder; expected a new or empty one. Choose another --output.")
    if not (output / marker).is_file():
        raise InputError(
            f"{output} is not empty and has no {marker}, so raysp did not write it; expected a new or empty folder. "
            "Choose another --output."
        )
    if not overwrite:
        raise InputError(
            f"{output} already holds a dataset made from other input or settings; expected a new or empty folder. "
            "Choose another --output, or replace it with --overwrite."
        )


@contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """A new folder to write into, which becomes ``output`` when the block ends without an error.

    What is at ``output`` then is replaced; after an error it is as it was.

    Raises:
        RayspError: The folder cannot be written.
    """
    place = output.parent / f".{output.name}.partial-{os.getpid()}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        yield place
        _swap(place, output)
    except OSError as error:
        raise RayspError(
            f"cannot write {output}: {error.strerror or error}; expected a place with room that you may write to. "
            "Free some, or choose another --output."
        ) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _swap(place: Path, output: Path) -> None:
    if not output.exists():
        place.rename(output)
        return
    old = output.parent / f".{output.name}.replaced-{os.getpid()}"
    shutil.rmtree(old, ignore_errors=True)
    output.rename(old)
    try:
        place.rename(output)
    except OSError:
        old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)
