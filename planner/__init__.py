"""Planning of heterogeneous sequence-parallel groups; see `planner.planning.plan_step`.

Pure decisions on plain values: numpy and pulp, never torch, Ray or raysp.
"""

from planner.buckets import Bucket, Bucketing, bucket_lengths
from planner.calibration import CalibrationFit, Sample, SampleResidual, fit_cost_model
from planner.cost_model import CostModel
from planner.errors import (
    CalibrationError,
    CostModelError,
    InfeasibleError,
    LengthsError,
    PlanError,
    PlannerError,
)
from planner.explanation import PlanExplanation, explain_plan
from planner.length_profile import LengthBucket, LengthProfile, TailShare, read_lengths
from planner.plan import CostModelReference, GroupPlan, MicroBatchPlan, StepPlan
from planner.planning import plan_step
from planner.preset_library import list_presets, load_preset
from planner.samples import read_samples, write_samples
from planner.validation import validate_plan

__all__ = [
    "Bucket",
    "Bucketing",
    "CalibrationError",
    "CalibrationFit",
    "CostModel",
    "CostModelError",
    "CostModelReference",
    "GroupPlan",
    "InfeasibleError",
    "LengthBucket",
    "LengthProfile",
    "LengthsError",
    "MicroBatchPlan",
    "PlanError",
    "PlanExplanation",
    "PlannerError",
    "Sample",
    "SampleResidual",
    "StepPlan",
    "TailShare",
    "bucket_lengths",
    "explain_plan",
    "fit_cost_model",
    "list_presets",
    "load_preset",
    "plan_step",
    "read_lengths",
    "read_samples",
    "validate_plan",
    "write_samples",
]
