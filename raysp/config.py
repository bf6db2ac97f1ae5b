"""Configuration: TOML -> validated, frozen pydantic models. Unknown keys are errors.

``load_config`` reads a file and applies ``--set a.b=value`` overrides. Nothing here imports torch or ray.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from raysp.errors import InputError

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]

_DTYPE_ALIASES = {"float32": "fp32", "bfloat16": "bf16", "float64": "fp64"}
_POLICY_PATTERN = r"^(adaptive|batch-adaptive|static:(auto|[1-9][0-9]*))$"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class ClusterConfig(_Section):
    """Where the workers run. One worker per GPU; on CPU, several may share a core."""

    num_workers: PositiveInt = 1
    address: str | None = Field(
        None, description="Address of a running Ray cluster; none starts a local one for this run."
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpus_per_worker: PositiveFloat | None = Field(
        None, description="CPUs reserved in Ray per worker; default: a share of the local machine, 1 on a cluster."
    )
    threads_per_worker: PositiveInt | None = Field(None, description="torch threads per worker on CPU.")
    start_timeout_s: PositiveFloat = 300.0
    preflight: bool = Field(
        True, description="Measure the links between workers before training and warn about slow ones."
    )
    step_timeout_s: PositiveFloat | None = Field(
        None, description="Longest a step may take; default: scaled from the predicted time, with an allowance."
    )


class ModelConfig(_Section):
    """A transformers model: ``path`` (folder with weights) or ``config`` (table, or a JSON file; random weights)."""

    path: str | None = None
    config: dict[str, Any] | str | None = None

    @model_validator(mode="after")
    def _one_of(self) -> ModelConfig:
        if (self.path is None) == (self.config is None):
            raise ValueError("give exactly one of model.path and model.config")
        return self


class TrainConfig(_Section):
    """The optimization."""

    num_steps: PositiveInt = 100
    dtype: Literal["fp32", "bf16", "fp64"] = "fp32"
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    learning_rate: PositiveFloat = 3e-4
    min_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="Cosine decay ends at this share of the peak."
    )
    warmup_steps: NonNegativeInt = 0
    weight_decay: NonNegativeFloat = 0.1
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat = 1.0
    recompute: Literal["none", "full"] = "none"
    loss_chunk_tokens: PositiveInt = Field(2048, description="Rows whose logits exist at the same time.")
    loss_kernel: Literal["auto", "liger", "chunked"] = "auto"
    validate_every: NonNegativeInt = Field(0, description="Steps between validations; 0 turns them off.")
    validation_sequences: PositiveInt = 16

    @field_validator("dtype", mode="before")
    @classmethod
    def _dtype_alias(cls, value: Any) -> Any:
        return _DTYPE_ALIASES.get(value, value) if isinstance(value, str) else value

    @field_validator("betas", mode="before")
    @classmethod
    def _betas_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class DataConfig(_Section):
    """The corpus: Parquet written by ``raysp prepare`` and how it becomes global batches."""

    path: str
    tokens_per_step: PositiveInt | None = None
    sequences_per_step: PositiveInt | None = None
    max_length: PositiveInt | None = Field(None, description="Longer documents are split, never dropped.")
    drop_empty: bool = False
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _one_budget(self) -> DataConfig:
        if (self.tokens_per_step is None) == (self.sequences_per_step is None):
            raise ValueError("give exactly one of data.tokens_per_step and data.sequences_per_step")
        return self


class PlannerConfig(_Section):
    """How GPUs form SP groups in every step."""

    policy: Annotated[str, Field(pattern=_POLICY_PATTERN)] = "adaptive"
    sync: Literal["per-layer", "per-step"] = "per-layer"
    degrees: Literal["powers-of-two", "any"] = "powers-of-two"
    cost_model: str = Field("auto", description="'auto' (measured at the start), a preset's name, or a JSON file.")
    memory_limit_bytes: PositiveFloat | None = Field(None, description="Per rank; default: the device's.")
    time_limit_s: PositiveFloat = 2.0
    node_limit: PositiveInt | None = None
    lookahead_steps: PositiveInt = Field(2, description="Plans computed ahead while the workers train.")
    processes: PositiveInt = Field(1, description="Background processes that plan, one core each.")
    deadline_s: PositiveFloat | None = Field(
        None, description="Seconds that a step waits for its plan before the best plan so far is used; default: none."
    )
    recompute: Literal["fixed", "per-group"] = Field(
        "fixed",
        description="'per-group': calibration measures both settings of train.recompute, and plans choose for each group.",
    )
    refit: bool = Field(
        False, description="Rescale the cost model to the measured times of the run's own groups while it trains."
    )

    @field_validator("memory_limit_bytes", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


class AttentionConfig(_Section):
    """Parallel attention inside a group of degree > 1, and its kernel."""

    method: Literal[
        "auto", "ring", "bidirectional_ring", "token_ring", "all_gather", "ulysses", "ulysses_ring", "rsa"
    ] = "auto"
    kernel: Literal["auto", "fa4", "fa2", "aten", "eager"] = "auto"
    linear_method: Literal["auto", "lasp2", "lasp1", "zeco", "ulysses"] = Field(
        "auto", description="Of linear attention layers: how their states travel in the group."
    )


class CheckpointConfig(_Section):
    """Where and how often the state is saved. Without a folder nothing is saved."""

    dir: str | None = None
    every_steps: NonNegativeInt = Field(0, description="0: at the end and at an interruption only.")
    keep: PositiveInt = 2
    resume: str = Field("auto", description="'auto' (newest in dir, if any), 'none', or the path of a checkpoint.")


class TrackingConfig(_Section):
    """MLflow."""

    enabled: bool = True
    uri: str | None = Field(None, description="Default: sqlite:///<working directory>/mlflow.db.")
    experiment: str = "raysp"
    run_name: str | None = None


class CompareConfig(_Section):
    """After training, time the same batches under another policy (no parameter update)."""

    policy: Annotated[str, Field(pattern=_POLICY_PATTERN)] = "static:auto"
    num_steps: NonNegativeInt = 0


class Config(_Section):
    """The whole configuration of a run."""

    model: ModelConfig
    data: DataConfig
    cluster: ClusterConfig = ClusterConfig()
    train: TrainConfig = TrainConfig()
    planner: PlannerConfig = PlannerConfig()
    attention: AttentionConfig = AttentionConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    compare: CompareConfig = CompareConfig()

    def to_json(self) -> str:
        """The resolved configuration, every default written out."""
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and apply ``key.path=value`` overrides.

    Args:
        path: The TOML file.
        overrides: Each ``a.b=value``; the value is read as TOML, and as plain text where that fails.

    Raises:
        InputError: The file is missing or not TOML, a key is unknown, or a value does not fit.
    """
    file = Path(path)
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the configuration {file}: {error}. Give an existing TOML file.") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{file} is not valid TOML: {error}. Correct that line.") from error
    for override in overrides:
        _apply_override(raw, override)
    return parse_config(raw, source=str(file))


def parse_config(raw: Mapping[str, Any], *, source: str) -> Config:
    """Validate a configuration table; ``source`` names it in errors."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{source}: {'; '.join(_describe(e) for e in error.errors())}") from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise InputError(f"--set {override!r} is not understood; expected key.path=value, e.g. train.num_steps=20.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table = raw
    for part in parts[:-1]:
        child = table.setdefault(part, {})
        if not isinstance(child, dict):
            raise InputError(f"--set {override!r}: {part} is a value, not a section; expected section.key=value.")
        table = child
    table[parts[-1]] = value


def _describe(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "configuration"
    kind = error["type"]
    if kind == "extra_forbidden":
        known = _known_keys(error["loc"])
        return f"unknown key {where!r}; expected one of {', '.join(known)}. Remove or correct it."
    if kind == "missing":
        return f"{where!r} is missing; expected a value. Add it."
    if kind == "value_error":
        return str(error["ctx"]["error"])
    return f"{where!r} is {error['input']!r}; {error['msg'][0].lower()}{error['msg'][1:]}."


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    section: type[BaseModel] = Config
    for part in location[:-1]:
        annotation = section.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        section = annotation
    return list(section.model_fields)
