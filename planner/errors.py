"""Errors of the planner: one class per reaction that a caller may have.

All of them are `PlannerError`, take one finished message and pickle as ordinary exceptions do, so that Ray can ship
them between processes.
"""

from __future__ import annotations


class PlannerError(ValueError):
    """Anything the planner refuses; the message says what, what was expected and what to do."""


class PlanError(PlannerError):
    """A plan, or a request for one, is malformed: wrong policy, wrong JSON, wrong plan id."""


class InfeasibleError(PlannerError):
    """A sequence (or the model states alone) fits no group that the cluster can form."""


class CostModelError(PlannerError):
    """A cost model file or constant is malformed."""


class CalibrationError(PlannerError):
    """Measured samples are unusable, or no cost model explains them well enough."""


class LengthsError(PlannerError):
    """A list or file of sequence lengths is malformed."""
