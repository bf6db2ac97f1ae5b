"""Errors that users see, one class per reaction a caller may have.

Every error is picklable, because Ray ships them from workers to the driver.
"""

from __future__ import annotations


def first_line(error: BaseException | None) -> str:
    """The first line of an error's message, or the name of its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip()


class RayspError(Exception):
    """Work that failed. The command line prints its one line and exits with 1."""

    exit_code = 1


class InputError(RayspError):
    """Input that cannot be used: a file, a configuration value, an argument. Exit code 2."""

    exit_code = 2


class MissingExtraError(InputError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class WorkerFailedError(RayspError):
    """A worker died, raised, or did not answer in time; the message names the rank and the step."""


class NonFiniteLossError(RayspError):
    """The loss or the gradient became NaN or infinite; parameters were not updated by that step."""


class CheckpointError(RayspError):
    """A checkpoint could not be written or read."""


class Interrupted(RayspError):  # noqa: N818 - an outcome that a caller asked for, not a failure
    """The user asked to stop (Ctrl-C, SIGTERM); the state was checkpointed where that was possible."""

    exit_code = 130
