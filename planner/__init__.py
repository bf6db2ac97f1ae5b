"""Planning of heterogeneous sequence-parallel groups; see `planner.planning.plan_step`.

Pure decisions on plain values: numpy and pulp, never torch, Ray or raysp.
"""

from planner.attention_choice import MethodDecision, choose_methods
from planner.attention_cost import ATTENTION_METHODS, MethodTime, method_times
from planner.attention_rates import KernelRate, Link, Network
from planner.attention_topology import (
    Topology,
    full_mesh_topology,
    nodes_topology,
    physical_ring_topology,
    simulate_attention,
    switch_topology,
)
from planner.attention_work import AttentionWork
from planner.buckets import Bucket, Bucketing, bucket_lengths
from planner.calibration import CalibrationFit, SampleResidual, fit_cost_model
from planner.cluster import Cluster, Node
from planner.cost_model import CostModel
from planner.distribution_library import list_distributions, load_distribution
from planner.errors import (
    CalibrationError,
    CostModelError,
    InfeasibleError,
    LengthsError,
    PlanError,
    PlannerError,
)
from planner.explanation import PlanExplanation, explain_plan
from planner.flexsp import flexsp_plan
from planner.group_kind import GroupKind
from planner.length_distribution import LengthDistribution, split_lengths
from planner.length_drift import DriftDetector, LengthDrift, compare_lengths
from planner.length_profile import LengthBucket, LengthProfile, TailShare, read_lengths
from planner.length_sketch import LengthSketch
from planner.linear_attention_bytes import LINEAR_METHODS, linear_method_bytes
from planner.linear_attention_choice import LinearMethodDecision, choose_linear_method
from planner.linear_attention_cost import LinearMethodTime, LocalPass, linear_method_times
from planner.linear_attention_layers import LayerMix, state_exchange_table, with_linear_layers
from planner.linear_attention_work import LinearAttentionShape, LinearAttentionWork
from planner.long_sequences import LongSequence
from planner.lookahead import Planned, PlanService, PlanServiceError
from planner.method_cost import MethodCost, RecomputePolicy
from planner.online_refit import OnlineRefit
from planner.plan import CostModelReference, GroupPlan, MicroBatchPlan, StepPlan
from planner.plan_cache import PlanCache, PlanRequest, plan_request
from planner.planning import plan_step
from planner.preset_library import list_presets, load_preset
from planner.samples import Sample, read_samples, write_samples
from planner.simulation import (
    MarginalValue,
    PolicySummary,
    SimulatedStep,
    Simulation,
    draw_batches,
    marginal_value,
    simulate,
)
from planner.sync_comparison import SyncComparison
from planner.validation import validate_plan
from planner.what_if import WhatIf

__all__ = [
    "ATTENTION_METHODS",
    "LINEAR_METHODS",
    "AttentionWork",
    "Bucket",
    "Bucketing",
    "CalibrationError",
    "CalibrationFit",
    "Cluster",
    "CostModel",
    "CostModelError",
    "CostModelReference",
    "DriftDetector",
    "GroupKind",
    "GroupPlan",
    "InfeasibleError",
    "KernelRate",
    "LayerMix",
    "LengthBucket",
    "LengthDistribution",
    "LengthDrift",
    "LengthProfile",
    "LengthSketch",
    "LengthsError",
    "LinearAttentionShape",
    "LinearAttentionWork",
    "LinearMethodDecision",
    "LinearMethodTime",
    "Link",
    "LocalPass",
    "LongSequence",
    "MarginalValue",
    "MethodCost",
    "MethodDecision",
    "MethodTime",
    "MicroBatchPlan",
    "Network",
    "Node",
    "OnlineRefit",
    "PlanCache",
    "PlanError",
    "PlanExplanation",
    "PlanRequest",
    "PlanService",
    "PlanServiceError",
    "Planned",
    "PlannerError",
    "PolicySummary",
    "RecomputePolicy",
    "Sample",
    "SampleResidual",
    "SimulatedStep",
    "Simulation",
    "StepPlan",
    "SyncComparison",
    "TailShare",
    "Topology",
    "WhatIf",
    "bucket_lengths",
    "choose_linear_method",
    "choose_methods",
    "compare_lengths",
    "draw_batches",
    "explain_plan",
    "fit_cost_model",
    "flexsp_plan",
    "full_mesh_topology",
    "linear_method_bytes",
    "linear_method_times",
    "list_distributions",
    "list_presets",
    "load_distribution",
    "load_preset",
    "marginal_value",
    "method_times",
    "nodes_topology",
    "physical_ring_topology",
    "plan_request",
    "plan_step",
    "read_lengths",
    "read_samples",
    "simulate",
    "simulate_attention",
    "split_lengths",
    "state_exchange_table",
    "switch_topology",
    "validate_plan",
    "with_linear_layers",
    "write_samples",
]
