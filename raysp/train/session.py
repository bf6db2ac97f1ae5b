"""One rank's training state and what it can be asked to do: step, evaluate, save, load.

The session knows nothing of Ray; a worker actor, or a test's process, drives it. Every method that communicates must
be called on all ranks of the epoch with matching arguments.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raysp.comm import Communicators, all_reduce_sum, world_mesh
from raysp.config import Config
from raysp.errors import RayspError
from raysp.train import checkpoint
from raysp.train.batch import LocalBatch, build_local_batch, dummy_batch, layouts_of
from raysp.train.loss import resolve_loss_kernel
from raysp.train.memory import saved_activation_bytes
from raysp.train.model import TORCH_DTYPES, AttentionContext, LanguageModelLoss, build_model
from raysp.train.optimizer import build_optimizer, learning_rate
from raysp.train.sharding import shard_model
from raysp.train.work import GroupWork, SequenceSource, StepResult, StepWork


@dataclass(frozen=True)
class ModelSize:
    """What the cost model and the MFU need to know of a model."""

    num_parameters: int
    num_embedding_parameters: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    largest_layer_parameters: int


class TrainSession:
    """Model, optimizer and communicators of one rank.

    Args:
        config: The resolved configuration.
        model_config: The transformers configuration (see :func:`raysp.train.model.read_model_config`).
        comms: This rank's communicators.
        source: The training examples.
        device: Where the model lives.
    """

    def __init__(
        self, *, config: Config, model_config: Any, comms: Communicators, source: SequenceSource, device: torch.device
    ) -> None:
        self._config = config
        self._model_config = model_config
        self._comms = comms
        self._source = source
        self._device = device
        self._model: LanguageModelLoss
        self._optimizer: torch.optim.AdamW
        self.size: ModelSize

    def initialize(self) -> ModelSize:
        """Build the model and the optimizer anew from the seed (or ``model.path``); replaces what was there."""
        train = self._config.train
        dtype = TORCH_DTYPES[train.dtype]
        # Master weights stay in fp32 under bf16: FSDP casts them for compute.
        storage_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
        inner = build_model(
            self._config.model,
            self._model_config,
            dtype=storage_dtype,
            device=self._device,
            seed=train.seed,
            recompute=train.recompute,
        )
        self.size = _size_of(inner, self._model_config)
        self._model = LanguageModelLoss(
            inner,
            loss_chunk_tokens=train.loss_chunk_tokens,
            loss_kernel=resolve_loss_kernel(train.loss_kernel, device=self._device, dtype=dtype),
        )
        shard_model(
            self._model,
            mesh=world_mesh(self._device, self._comms.world_size),
            compute_dtype=torch.bfloat16 if dtype == torch.bfloat16 else None,
        )
        self._optimizer = build_optimizer(self._model, train)
        # From here on every rank draws its own numbers; the weights above were equal on all.
        torch.manual_seed(train.seed + 1 + self._comms.global_rank)
        return self.size

    def run_step(self, work: StepWork, *, update: bool = True) -> StepResult:
        """Forward and backward of every micro-batch, then one optimizer step.

        The loss is the sum over all ranks and micro-batches divided by the step's target tokens, so the plan does not
        change it. With a loss or gradient that is not finite nothing is updated, on any rank.

        Args:
            work: This rank's part of the plan.
            update: ``False`` measures only: gradients are dropped, parameters stay.
        """
        start_s = time.perf_counter()
        self._reset_peak_memory()
        prepared = self._prepare(work)
        num_targets = int(self._world_sum(sum(batch.num_targets for batch, _ in prepared)))
        self._optimizer.zero_grad(set_to_none=True)
        local_loss = torch.zeros((), dtype=torch.float64, device=self._device)
        marks = [self._mark()]
        for batch, context in prepared:
            loss = self._forward(batch, context) / max(1, num_targets)
            loss.backward()
            local_loss += loss.detach().double()
            marks.append(self._mark())
        local_value = local_loss.item()
        loss_value = self._world_sum(local_value)
        grad_norm = self._clip_gradients() if update else 0.0
        updated = update and math.isfinite(loss_value) and math.isfinite(grad_norm)
        rate = learning_rate(work.step, self._config.train)
        if updated:
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        times_s = self._durations_s(marks)
        return StepResult(
            step=work.step,
            global_rank=self._comms.global_rank,
            loss=loss_value,
            num_targets=num_targets,
            local_loss_is_finite=math.isfinite(local_value),
            grad_norm=grad_norm,
            updated=updated,
            learning_rate=rate,
            step_time_s=time.perf_counter() - start_s,
            micro_batch_times_s=times_s,
            peak_memory_bytes=torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0,
        )

    def evaluate(self, work: StepWork) -> tuple[float, int]:
        """Summed loss and number of target tokens over all ranks, forward only; equal on all ranks."""
        prepared = self._prepare(work)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        self._model.eval()
        try:
            with torch.no_grad():
                for batch, context in prepared:
                    total += self._forward(batch, context).double()
        finally:
            self._model.train()
        targets = self._world_sum(sum(batch.num_targets for batch, _ in prepared))
        return self._world_sum(total.item()), int(targets)

    def activation_bytes(self, work: GroupWork) -> int:
        """Bytes that autograd keeps for one micro-batch on this rank, measured by running its forward pass."""
        [(batch, context)] = self._prepare(StepWork(step=0, micro_batches=(work,)))
        return saved_activation_bytes(lambda: self._forward(batch, context), self._model)

    def gradients(self, work: StepWork) -> dict[str, torch.Tensor]:
        """The whole gradient of the step's loss by parameter name, on CPU; nothing is updated. For verification."""
        prepared = self._prepare(work)
        num_targets = int(self._world_sum(sum(batch.num_targets for batch, _ in prepared)))
        self._optimizer.zero_grad(set_to_none=True)
        for batch, context in prepared:
            (self._forward(batch, context) / max(1, num_targets)).backward()
        whole = {
            name: parameter.grad.full_tensor().cpu()  # type: ignore[union-attr]
            for name, parameter in self._model.named_parameters()
        }
        self._optimizer.zero_grad(set_to_none=True)
        return whole

    def save(self, folder: Path) -> dict[str, str]:
        """Write this rank's shards of model, optimizer and random state under ``folder`` (shared by all ranks).

        Returns:
            The files written, with their SHA-256.
        """
        return checkpoint.save_shards(folder, self._model, self._optimizer, global_rank=self._comms.global_rank)

    def load(self, folder: Path, *, step: int) -> None:
        """Load what any number of ranks saved after ``step`` optimizer steps."""
        checkpoint.load_shards(folder, self._model, self._optimizer, step=step, global_rank=self._comms.global_rank)

    def _prepare(self, work: StepWork) -> list[tuple[LocalBatch, AttentionContext]]:
        prepared = []
        for group_work, layout in zip(work.micro_batches, layouts_of(work.micro_batches), strict=True):
            group, group_rank, method = None, 0, "auto"
            if group_work is None:
                batch = dummy_batch(self._device)
            else:
                if self._comms.global_rank not in group_work.ranks:
                    raise RayspError(
                        f"rank {self._comms.global_rank} was given the work of ranks {group_work.ranks}; expected its own."
                    )
                group_rank = group_work.ranks.index(self._comms.global_rank)
                batch = build_local_batch(self._source, group_work, layout, group_rank, self._device)
                if len(group_work.ranks) > 1:
                    group = self._comms.group(group_work.ranks)
                    method = group_work.attention
            context = AttentionContext(
                layout=layout,
                group=group,
                group_rank=group_rank,
                method=method,
                kernel=self._config.attention.kernel,
            )
            prepared.append((batch, context))
        return prepared

    def _forward(self, batch: LocalBatch, context: AttentionContext) -> torch.Tensor:
        loss: torch.Tensor = self._model(batch.input_ids, batch.position_ids, batch.labels, context)
        return loss

    def _clip_gradients(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._config.train.max_grad_norm)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _world_sum(self, value: float) -> float:
        total = torch.tensor([value], dtype=torch.float64, device=self._device)
        all_reduce_sum(total, self._comms.world)
        return float(total.item())

    def _reset_peak_memory(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def _mark(self) -> Any:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter()

    def _durations_s(self, marks: list[Any]) -> tuple[float, ...]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return tuple(a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks))
        return tuple(b - a for a, b in itertools.pairwise(marks))


def _size_of(model: torch.nn.Module, model_config: Any) -> ModelSize:
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    heads = model_config.num_attention_heads
    layers = list(model.model.layers)  # type: ignore[union-attr,arg-type]
    return ModelSize(
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_embedding_parameters=embedding.numel(),
        num_layers=len(layers),
        num_heads=heads,
        num_kv_heads=getattr(model_config, "num_key_value_heads", None) or heads,
        head_dim=getattr(model_config, "head_dim", None) or model_config.hidden_size // heads,
        hidden_size=model_config.hidden_size,
        largest_layer_parameters=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
    )
