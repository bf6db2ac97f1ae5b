"""Everything a run needs that can be read and checked before a worker starts."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from planner import CostModel, InfeasibleError, list_presets, load_preset
from raysp.cluster.planning import plan_batch
from raysp.config import Config
from raysp.data.dataset import TokenDataset
from raysp.data.loader import BatchLoader, Cursor
from raysp.errors import CheckpointError, InputError
from raysp.train.checkpoint import TrainerState, checkpoints_in, read_state
from raysp.train.gradient_sync import unsharded_state_bytes
from raysp.train.model import model_identity, read_model_config
from raysp.train.model_size import ModelSize
from raysp.train.work import RECOMPUTE_POLICIES


@dataclass(frozen=True)
class RunInputs:
    """The checked inputs of a run.

    Attributes:
        config: The resolved configuration.
        dataset: The corpus.
        loader: Global batches of the training sequences.
        validation_ids: Held-out sequences, at most ``train.validation_sequences``.
        model_config: The transformers configuration.
        cost_model: Read from a preset or a file; ``None`` when it is to be measured.
        resume_from: Checkpoint folder to load.
        state: Of that checkpoint.
    """

    config: Config
    dataset: TokenDataset
    loader: BatchLoader
    validation_ids: tuple[int, ...]
    model_config: Any
    cost_model: CostModel | None
    resume_from: Path | None
    state: TrainerState | None

    @property
    def first_step(self) -> int:
        """0-based step at which this run begins."""
        return self.state.step if self.state else 0

    @property
    def first_cursor(self) -> Cursor:
        """Data position at which this run begins."""
        return Cursor.from_dict(self.state.cursor) if self.state else Cursor(0, 0)


def read_inputs(config: Config) -> RunInputs:
    """Open the dataset, resolve the model, the cost model and the checkpoint to resume from.

    Raises:
        InputError: Any of them is missing, corrupt or does not fit the others.
    """
    _check_policies(config)
    _check_writable(config.checkpoint.dir)
    data = config.data
    dataset = TokenDataset.open(data.path, max_length=data.max_length, drop_empty=data.drop_empty)
    train_ids, validation_ids = dataset.split(data.validation_fraction, config.train.seed)
    loader = BatchLoader(
        train_ids,
        dataset.sequence_lengths[train_ids],
        seed=config.train.seed,
        tokens_per_step=data.tokens_per_step,
        sequences_per_step=data.sequences_per_step,
    )
    if config.train.validate_every and not len(validation_ids):
        raise InputError(
            "train.validate_every is set, but no sequence is held out; expected data.validation_fraction > 0. Set it, "
            "or train.validate_every = 0."
        )
    longest = int(dataset.sequence_lengths.max())
    model_config = read_model_config(config.model, vocab_size=dataset.vocab_size, max_length=longest)
    dataset.check_vocab_size(model_config.vocab_size)
    resume_from, state = _find_checkpoint(config)
    if state is not None:
        _check_resumable(state, config, dataset, model_config)
    return RunInputs(
        config=config,
        dataset=dataset,
        loader=loader,
        validation_ids=tuple(int(i) for i in validation_ids[: config.train.validation_sequences]),
        model_config=model_config,
        cost_model=read_cost_model(config),
        resume_from=resume_from,
        state=state,
    )


def read_cost_model(config: Config) -> CostModel | None:
    """The cost model of ``planner.cost_model``: a file, a preset, or ``None`` for ``"auto"``."""
    name = config.planner.cost_model
    if name == "auto":
        return None
    if name in list_presets():
        model = load_preset(name)
    elif Path(name).is_file():
        model = CostModel.load(name)
    else:
        raise InputError(
            f"planner.cost_model = {name!r} is neither 'auto', a file, nor a preset; the presets are "
            f"{', '.join(list_presets())}. `raysp calibrate` writes such a file."
        )
    _check_runnable(model, config)
    if config.planner.memory_limit_bytes is not None:
        model = replace(model, memory_limit_bytes=config.planner.memory_limit_bytes)
    return model


def _check_runnable(model: CostModel, config: Config) -> None:
    """Refuse policies that the workers cannot run; a plan may choose any that its cost model lists."""
    name = config.planner.cost_model
    for policy in model.recompute_policies:
        if policy.name not in RECOMPUTE_POLICIES:
            raise InputError(
                f"planner.cost_model = {name!r} has the recompute policy {policy.name!r}; expected "
                f"{' or '.join(map(repr, RECOMPUTE_POLICIES))}, which training can run. Remove it from "
                "recompute_policies."
            )


def attention_method(config: Config, *, num_heads: int, num_kv_heads: int, degrees: list[int]) -> str:
    """The method groups of degree > 1 use: ``attention.method``, or for ``"auto"`` Ulysses where the heads divide by
    every degree and a ring elsewhere."""
    if config.attention.method != "auto":
        return config.attention.method
    divides = all(num_heads % d == 0 and (num_kv_heads % d == 0 or d % num_kv_heads == 0) for d in degrees)
    return "ulysses" if divides else "ring"


def for_model(cost_model: CostModel, config: Config, size: ModelSize) -> CostModel:
    """A given cost model with the methods that this run's configuration and model's heads allow.

    ``attention.method = "auto"`` keeps the methods of the cost model; any other leaves that one. Under ``per-step``, the
    bytes that stay unsharded are those of this run's model where the cost model does not say.
    """
    if config.attention.method != "auto":
        cost = cost_model.method_cost(config.attention.method)
        cost_model = replace(
            cost_model,
            attention=cost.name,
            communication_s=cost.communication_s,
            between_nodes_s=cost.between_nodes_s,
            overlap=cost.overlap,
            method_fixed_s=cost.fixed_s,
            methods=(),
        )
    unsharded_bytes = cost_model.unsharded_state_bytes
    if unsharded_bytes is None and config.planner.sync == "per-step":
        unsharded_bytes = unsharded_state_bytes(size.num_parameters, config.train.dtype)
    has_heads = size.num_softmax_layers > 0
    return replace(
        cost_model,
        num_heads=ulysses_heads(size.num_heads, size.num_kv_heads) if has_heads else None,
        num_kv_heads=size.num_kv_heads if has_heads else None,
        unsharded_state_bytes=unsharded_bytes,
    )


def ulysses_heads(num_heads: int, num_kv_heads: int) -> int:
    """The number whose divisors are the Ulysses degrees to plan with: both kinds of heads divide by them, or, where key
    heads are a power of two, are repeated."""
    repeats = num_kv_heads & (num_kv_heads - 1) == 0
    return num_heads if repeats else math.gcd(num_heads, num_kv_heads)


def smallest_static_policy(inputs: RunInputs, cost_model: CostModel, policy: str) -> str:
    """``static:auto`` by the degree that holds the corpus' longest sequence; other policies as they are."""
    if policy != "static:auto":
        return policy
    longest = int(inputs.dataset.sequence_lengths.max())
    plan = plan_batch(
        (longest,),
        config=inputs.config.planner,
        cost_model=cost_model,
        num_ranks=inputs.config.cluster.num_workers,
        seed=inputs.config.train.seed,
        policy=policy,
    )
    return f"static:{plan.micro_batches[0].groups[0].degree}"


def _check_policies(config: Config) -> None:
    for key, policy in (("planner.policy", config.planner.policy), ("compare.policy", config.compare.policy)):
        degree = policy.removeprefix("static:")
        if degree.isdigit() and int(degree) > config.cluster.num_workers:
            raise InputError(
                f"{key} = {policy!r} needs groups of {degree} workers, but cluster.num_workers = "
                f"{config.cluster.num_workers}; expected a degree up to that. Lower it or add workers."
            )


def _check_writable(directory: str | None) -> None:
    """Find out before training whether checkpoints can be written; the folder stays."""
    if directory is None:
        return
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise InputError(
            f"checkpoint.dir = {directory!r} cannot be written: {error.strerror or error}; expected a folder. Choose another."
        ) from error


def _find_checkpoint(config: Config) -> tuple[Path | None, TrainerState | None]:
    resume = config.checkpoint.resume
    if resume == "none":
        return None, None
    if resume == "auto":
        found = checkpoints_in(Path(config.checkpoint.dir)) if config.checkpoint.dir else []
        if not found:
            return None, None
        folder = found[-1]
    else:
        folder = Path(resume)
    try:
        return folder, read_state(folder)
    except CheckpointError as error:
        raise InputError(str(error)) from error


def _check_resumable(state: TrainerState, config: Config, dataset: TokenDataset, model_config: Any) -> None:
    if state.data_fingerprint != dataset.fingerprint:
        raise InputError(
            f"the checkpoint of step {state.step} was trained on other data than {config.data.path} holds now; expected "
            "the same dataset and data.max_length. Restore them, or start afresh with --resume none."
        )
    identity = model_identity(model_config)
    changed = sorted(key for key in {*identity, *state.model} if identity.get(key) != state.model.get(key))
    if changed:
        key = changed[0]
        raise InputError(
            f"the checkpoint of step {state.step} holds another model: {key} was {state.model.get(key)!r} and is "
            f"{identity.get(key)!r} now. Restore it, or start afresh with --resume none."
        )
    saved = state.config
    for section, keys in (
        ("train", ("seed",)),
        ("data", ("tokens_per_step", "sequences_per_step", "validation_fraction")),
    ):
        for key in keys:
            now, then = getattr(getattr(config, section), key), saved.get(section, {}).get(key)
            if now != then:
                raise InputError(
                    f"{section}.{key} = {now!r}, but the checkpoint of step {state.step} was made with {then!r}; the "
                    "order of the data would change. Restore it, or start afresh with --resume none."
                )


def check_longest_sequence(inputs: RunInputs, cost_model: CostModel) -> None:
    """Refuse a run whose longest sequence fits no group, before anything is trained.

    Raises:
        InputError: Names the document, what it needs and what the largest group offers.
        planner.PlanError: A static degree exceeds the number of workers.
    """
    lengths = inputs.dataset.sequence_lengths
    longest = int(np.argmax(lengths))
    try:
        plan_batch(
            (int(lengths[longest]),),
            config=inputs.config.planner,
            cost_model=cost_model,
            num_ranks=inputs.config.cluster.num_workers,
            seed=inputs.config.train.seed,
            policy=inputs.config.planner.policy,
        )
    except InfeasibleError as error:
        # Alone in its batch the sequence is number 0; here its document is what the user can look up.
        document = inputs.dataset.document_of(longest)
        raise InputError(f"the longest document (row {document} of {inputs.config.data.path}): {error}") from error
