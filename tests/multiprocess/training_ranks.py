"""What the ranks of the training tests run: real sessions on real text (the bytes of standard-library modules)."""

from __future__ import annotations

import ast
import dataclasses
import textwrap
from pathlib import Path

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from planner import CostModel
from raysp.comm import Communicators
from raysp.config import Config, parse_config
from raysp.errors import RayspError
from raysp.train.gradient_sync import gather_parameters, reduce_gradients
from raysp.train.model import read_model_config
from raysp.train.session import TrainSession
from raysp.train.work import GroupWork, StepResult, StepWork

# Modules of very different sizes, cut below: a long tail in miniature.
_MODULES = (ast, dataclasses, textwrap)
LENGTHS = (700, 3, 45, 1, 120, 64, 260, 17, 400, 33, 90, 2, 150, 28, 75)


@dataclasses.dataclass(frozen=True)
class ByteSequence:
    """Bytes of a source file as tokens."""

    input_ids: np.ndarray
    is_target: np.ndarray


class SourceCode:
    """Sequence i is a stretch of a standard-library module, ``LENGTHS[i]`` bytes long; sequence 4 has no target."""

    def sequence(self, sequence_id: int) -> ByteSequence:
        module = _MODULES[sequence_id % len(_MODULES)]
        text = Path(str(module.__file__)).read_bytes()
        start = 97 * sequence_id
        ids = np.frombuffer(text[start : start + LENGTHS[sequence_id]], dtype=np.uint8).astype(np.int64)
        is_target = np.arange(len(ids)) > 0
        return ByteSequence(ids, is_target & (sequence_id != 4))


def tiny_config(**changes: dict[str, object]) -> Config:
    """A Llama of two layers, trained on bytes."""
    raw: dict[str, dict[str, object]] = {
        "model": {
            "config": {
                "model_type": "llama",
                "vocab_size": 256,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 1024,
            }
        },
        "data": {"path": "unused", "sequences_per_step": len(LENGTHS)},
        "train": {"num_steps": 10, "learning_rate": 3e-3, "warmup_steps": 2, "loss_chunk_tokens": 64},
    }
    for section, values in changes.items():
        raw.setdefault(section, {}).update(values)
    return parse_config(raw, source="test")


def quadratic_cost_model(*, memory_limit_tokens: int = 1200, attention: str = "ring") -> CostModel:
    """Attention dominates and communication is cheap, so the long sequence gets a group of its own."""
    return CostModel(
        name="test",
        a1_s_per_token2=1e-6,
        a2_s_per_token=1e-5,
        b1_s=1e-3,
        communication_s=((2, 2e-5), (4, 4e-5)),
        bytes_per_token=1.0,
        model_state_bytes_total=0.0,
        memory_limit_bytes=float(memory_limit_tokens),
        attention=attention,
    )


def make_session(comms: Communicators, config: Config) -> TrainSession:
    """A built session on this rank."""
    session = TrainSession(
        config=config,
        model_config=read_model_config(config.model, vocab_size=256, max_length=max(LENGTHS)),
        comms=comms,
        source=SourceCode(),
        device=torch.device("cpu"),
    )
    session.initialize()
    return session


def gradients_and_losses(
    comms: Communicators, config: Config, works: list[list[StepWork]]
) -> tuple[dict[str, torch.Tensor], list[StepResult]]:
    """The gradients of the first step, then every step trained in turn. ``works[step][rank]``."""
    session = make_session(comms, config)
    gradients = session.gradients(works[0][comms.global_rank])
    return gradients, [session.run_step(work[comms.global_rank]) for work in works]


def losses_then_save(comms: Communicators, config: Config, works: list[list[StepWork]], folder: str) -> list[float]:
    """Train the given steps, validate, and save."""
    session = make_session(comms, config)
    losses = [session.run_step(work[comms.global_rank]).loss for work in works]
    session.evaluate(works[0][comms.global_rank])
    files = session.save(Path(folder))
    assert all((Path(folder) / name).is_file() for name in files)
    return losses


def losses_after_load(comms: Communicators, config: Config, works: list[list[StepWork]], folder: str) -> list[float]:
    """Load what was saved before ``works[0]`` and train on; the session starts from other weights."""
    other_seed = config.model_copy(update={"train": config.train.model_copy(update={"seed": 99})})
    session = make_session(comms, other_seed)
    session.load(Path(folder), step=works[0][0].step)
    return [session.run_step(work[comms.global_rank]).loss for work in works]


def steps_around_infinite_loss(comms: Communicators, config: Config, works: list[list[StepWork]]) -> list[StepResult]:
    """One step, one whose loss is made infinite on rank 1 by poisoning its embedding, one evaluation of the weights."""
    session = make_session(comms, config)
    first = session.run_step(works[0][comms.global_rank])
    before = session.evaluate(works[1][comms.global_rank])
    hook = None
    if comms.global_rank == 1:
        hook = session._model.model.model.norm.register_forward_hook(lambda module, args, out: out * float("nan"))
    poisoned = session.run_step(works[1][comms.global_rank])
    if hook is not None:
        hook.remove()
    assert session.evaluate(works[1][comms.global_rank]) == before
    return [first, poisoned]


def evaluate_plans(comms: Communicators, config: Config, works: list[list[StepWork]]) -> list[tuple[float, int]]:
    """Forward-only loss of the same batch under several plans."""
    session = make_session(comms, config)
    return [session.evaluate(work[comms.global_rank]) for work in works]


def evaluate_then_count_whole_parameters(
    comms: Communicators, config: Config, works: list[StepWork]
) -> tuple[tuple[float, int], int]:
    """Forward-only loss of one step's plan, and how many parameters it left whole: what is saved then must be shards."""
    session = make_session(comms, config)
    result = session.evaluate(works[comms.global_rank])
    return result, sum(not isinstance(parameter, DTensor) for parameter in session._model.parameters())


def activation_bytes_by_policy(comms: Communicators, config: Config, policies: tuple[str, ...]) -> list[int]:
    """What autograd keeps of the longest sequence under each recompute policy."""
    session = make_session(comms, config)
    return [
        session.activation_bytes(GroupWork((comms.global_rank,), "local", (0,), (LENGTHS[0],), policy))
        for policy in policies
    ]


def error_of_step(comms: Communicators, config: Config, works: list[StepWork]) -> str:
    """The message with which a step is refused."""
    session = make_session(comms, config)
    try:
        session.run_step(works[comms.global_rank])
    except RayspError as error:
        return str(error)
    return ""


def error_of_bypassed_layer(comms: Communicators, config: Config, works: list[StepWork]) -> str:
    """The message of a step whose last layer attends in its own way, which nothing showed when the model was built."""
    session = make_session(comms, config)
    attention = session._model.model.model.layers[-1].self_attn
    attention.forward = lambda hidden_states, **_: (hidden_states, None)
    try:
        session.run_step(works[comms.global_rank])
    except RayspError as error:
        return str(error)
    return ""


def whole_state_bytes(comms: Communicators, config: Config, works: list[StepWork]) -> tuple[int, int, int]:
    """Parameters of the model, and bytes of whole parameters and of whole gradients between micro-batches."""
    session = make_session(comms, config)
    model = session._model
    micro_batches = session._prepare(works[comms.global_rank])
    gather_parameters(model)
    for micro_batch in micro_batches:
        session._forward(micro_batch).backward()
    parameter_bytes = sum(p.numel() * p.itemsize for p in model.parameters())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    # FSDP keeps them here where the dtype of the reduction is not that of the parameters.
    gradients += [
        parameter.unsharded_accumulated_grad
        for module in model.modules()
        if isinstance(module, FSDPModule)
        for group in module._get_fsdp_state()._fsdp_param_groups
        for parameter in group.fsdp_params
        if parameter.unsharded_accumulated_grad is not None
    ]
    gradient_bytes = sum(gradient.numel() * gradient.itemsize for gradient in gradients)
    reduce_gradients(model, has_gradients=True)
    return session.size.num_parameters, parameter_bytes, gradient_bytes
