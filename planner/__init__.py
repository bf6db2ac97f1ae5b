"""Planning of heterogeneous sequence-parallel groups; see `planner.planning.plan_step`.

Pure decisions on plain values: numpy and pulp, never torch, Ray or raysp.
"""

from planner.cost_model import CostModel
from planner.errors import (
    CalibrationError,
    CostModelError,
    InfeasibleError,
    LengthsError,
    PlanError,
    PlannerError,
)
from planner.plan import CostModelReference, GroupPlan, MicroBatchPlan, StepPlan
from planner.planning import plan_step
from planner.preset_library import list_presets, load_preset

__all__ = [
    "CalibrationError",
    "CostModel",
    "CostModelError",
    "CostModelReference",
    "GroupPlan",
    "InfeasibleError",
    "LengthsError",
    "MicroBatchPlan",
    "PlanError",
    "PlannerError",
    "StepPlan",
    "list_presets",
    "load_preset",
    "plan_step",
]
