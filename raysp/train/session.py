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

from raysp.attention import SequenceLayout
from raysp.comm import Communicators, all_reduce_sum, world_mesh
from raysp.config import Config
from raysp.errors import RayspError
from raysp.train import checkpoint
from raysp.train.batch import LocalBatch, build_local_batch, dummy_batch
from raysp.train.gradient_sync import gather_parameters, reduce_gradients, shard_parameters, share_per_layer
from raysp.train.hybrid_layout import LayoutDecision, decide_layout
from raysp.train.loss import resolve_loss_kernel
from raysp.train.memory import saved_activation_bytes
from raysp.train.model import TORCH_DTYPES, LanguageModelLoss, build_model
from raysp.train.model_size import ModelSize, size_of
from raysp.train.optimizer import build_optimizer, learning_rate
from raysp.train.sequence_mixing import AttentionContext
from raysp.train.sharding import shard_model
from raysp.train.work import (
    DEFAULT_RECOMPUTE,
    RECOMPUTE_POLICIES,
    GroupWork,
    SequenceSource,
    StepResult,
    StepWork,
)


@dataclass(frozen=True)
class _MicroBatch:
    """What one forward pass needs."""

    batch: LocalBatch
    context: AttentionContext
    recompute: bool


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
        )
        self.size = size_of(inner)
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
        local_loss, num_targets, marks = self._backward(work)
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
        self._share_parameters(work.sync)
        self._model.eval()
        try:
            with torch.no_grad():
                for micro_batch in prepared:
                    if micro_batch is not None:
                        total += self._forward(micro_batch).double()
        finally:
            self._model.train()
        shard_parameters(self._model)
        return self._world_sum(total.item()), self._num_targets(prepared)

    def activation_bytes(self, work: GroupWork) -> int:
        """Bytes that autograd keeps for one micro-batch on this rank, measured by running its forward pass."""
        micro_batch = self._prepare_group(work)
        share_per_layer(self._model)
        return saved_activation_bytes(lambda: self._forward(micro_batch), self._model)

    def gradients(self, work: StepWork) -> dict[str, torch.Tensor]:
        """The whole gradient of the step's loss by parameter name, on CPU; nothing is updated. For verification."""
        self._backward(work)
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

    def _backward(self, work: StepWork) -> tuple[torch.Tensor, int, list[Any]]:
        """Leave the step's summed gradient in the parameters.

        Returns:
            This rank's share of the loss (fp64 scalar), target tokens of all ranks, and marks of time: one before the
            first micro-batch and one after each.
        """
        prepared = self._prepare(work)
        num_targets = self._num_targets(prepared)
        self._optimizer.zero_grad(set_to_none=True)
        self._share_parameters(work.sync)
        local_loss = torch.zeros((), dtype=torch.float64, device=self._device)
        marks = [self._mark()]
        for micro_batch in prepared:
            if micro_batch is not None:
                loss = self._forward(micro_batch) / max(1, num_targets)
                loss.backward()
                local_loss += loss.detach().double()
            marks.append(self._mark())
        if work.sync == "per-step":
            reduce_gradients(self._model, has_gradients=any(micro_batch is not None for micro_batch in prepared))
        return local_loss, num_targets, marks

    def _share_parameters(self, sync: str) -> None:
        if sync == "per-step":
            gather_parameters(self._model)
        elif sync == "per-layer":
            share_per_layer(self._model)
        else:
            raise RayspError(f"sync is {sync!r}; expected 'per-layer' or 'per-step'.")

    def _prepare(self, work: StepWork) -> list[_MicroBatch | None]:
        """Rows and communicators of every micro-batch; ``None`` where this rank has no group and need not take part."""
        return [
            None if group_work is None and work.sync == "per-step" else self._prepare_group(group_work)
            for group_work in work.micro_batches
        ]

    def _prepare_group(self, work: GroupWork | None) -> _MicroBatch:
        group, group_rank, method, recompute = None, 0, "auto", False
        if work is None:
            layout = attention_layout = SequenceLayout([1], degree=1, order=self._layout("auto", 1).order)
            batch = dummy_batch(self._device)
        else:
            if self._comms.global_rank not in work.ranks:
                raise RayspError(
                    f"rank {self._comms.global_rank} was given the work of ranks {work.ranks}; expected its own."
                )
            degree = len(work.ranks)
            decision = self._layout(work.attention, degree)
            layout = attention_layout = SequenceLayout(work.lengths, degree, decision.order)
            if decision.attention_order != decision.order:
                attention_layout = SequenceLayout(work.lengths, degree, decision.attention_order)
            group_rank = work.ranks.index(self._comms.global_rank)
            batch = build_local_batch(self._source, work, layout, group_rank, self._device)
            recompute = self._recomputes(work)
            if degree > 1:
                group = self._comms.group(work.ranks)
                method = decision.method
        context = AttentionContext(
            layout=layout,
            group=group,
            group_rank=group_rank,
            method=method,
            kernel=self._config.attention.kernel,
            attention_layout=attention_layout,
            linear_method=self._config.attention.linear_method,
        )
        return _MicroBatch(batch, context, recompute)

    def _layout(self, method: str, degree: int) -> LayoutDecision:
        size = self.size
        return decide_layout(
            num_linear_layers=size.num_linear_layers,
            num_softmax_layers=size.num_softmax_layers,
            method=method,
            degree=degree,
            num_heads=size.num_heads,
            num_key_heads=size.num_kv_heads,
        )

    def _recomputes(self, work: GroupWork) -> bool:
        policy = self._config.train.recompute if work.recompute == DEFAULT_RECOMPUTE else work.recompute
        if policy not in RECOMPUTE_POLICIES:
            raise RayspError(
                f"the group of ranks {work.ranks} has recompute {policy!r}; expected {DEFAULT_RECOMPUTE!r} or one of "
                f"{', '.join(RECOMPUTE_POLICIES)}. Plan with a cost model that has these."
            )
        return policy == "full"

    def _forward(self, micro_batch: _MicroBatch) -> torch.Tensor:
        batch = micro_batch.batch
        loss: torch.Tensor = self._model(
            batch.input_ids,
            batch.position_ids,
            batch.labels,
            micro_batch.context,
            recompute=micro_batch.recompute,
        )
        return loss

    def _num_targets(self, prepared: list[_MicroBatch | None]) -> int:
        return int(self._world_sum(sum(item.batch.num_targets for item in prepared if item is not None)))

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
