"""The driver of a run: inputs, workers, cost model, the loop over steps, checkpoints, the comparison, the end."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import planner
from planner import CostModel
from raysp.cluster.calibration import calibrate, cost_model_key, model_flops
from raysp.cluster.planning import (
    PlanAhead,
    PlannedStep,
    assign_work,
    describe_groups,
    group_shapes,
    plan_batch,
)
from raysp.cluster.preflight import preflight
from raysp.cluster.ray_session import ray_session
from raysp.cluster.run_inputs import (
    RunInputs,
    check_longest_sequence,
    for_model,
    read_inputs,
    smallest_static_policy,
)
from raysp.cluster.run_watch import RunWatch, group_samples, measured_group_times_s
from raysp.cluster.stop_signal import StopSignal
from raysp.cluster.worker_group import WorkerGroup
from raysp.config import Config
from raysp.data.loader import Cursor, GlobalBatch
from raysp.errors import Interrupted, NonFiniteLossError
from raysp.tracking.events import (
    BatchCompared,
    CheckpointSaved,
    CostModelRefitted,
    Event,
    LengthsDrifted,
    MicroBatchFinished,
    PhaseProgressed,
    PhaseStarted,
    PolicyMeasured,
    StepFinished,
    ValidationFinished,
    WarningRaised,
)
from raysp.tracking.recorder import RunRecorder
from raysp.train.checkpoint import TrainerState, begin_checkpoint, commit_checkpoint, set_aside_newer
from raysp.train.model import model_identity
from raysp.train.work import StepResult

_CHECKPOINT_TIMEOUT_S = 1800.0
_FIRST_STEP_ALLOWANCE_S = 600.0
_SHORT_STEP_S = 2.0
# Mean relative error above which a measured cost model deserves distrust.
_MAX_FIT_ERROR = 0.25
# Dense bf16 peak of one GPU, from NVIDIA's data sheets; the MFU is reported for these alone.
_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


@dataclass(frozen=True)
class RunSummary:
    """How a run ended.

    Attributes:
        first_step: Optimizer steps that were already done when it began.
        last_step: Optimizer steps done now.
        last_loss: Of the last step this run did; ``None`` when it did none.
        num_tokens: Trained on by this run.
        train_time_s: Sum of its steps' times.
        checkpoint: The newest, if any was saved.
        run_id: MLflow run, if there is one.
        tracking_uri: Where that run is.
        comparisons: The batches timed under both policies.
    """

    first_step: int
    last_step: int
    last_loss: float | None
    num_tokens: int
    train_time_s: float
    checkpoint: str | None
    run_id: str | None
    tracking_uri: str | None
    comparisons: tuple[BatchCompared, ...]


def train(config: Config, *, on_event: Callable[[Event], None]) -> RunSummary:
    """Run training to ``train.num_steps``, or until the first Ctrl-C or SIGTERM.

    Args:
        config: The resolved configuration.
        on_event: Told what happens, in order, from this thread.

    Raises:
        InputError: Something given cannot be used; nothing was trained.
        NonFiniteLossError: The loss or gradient was not finite; earlier checkpoints are intact.
        WorkerFailedError: A worker died or was late.
        Interrupted: Asked to stop; the state was checkpointed if ``checkpoint.dir`` is set.
    """
    inputs = read_inputs(config)
    recorder = RunRecorder(config, run_id=inputs.state.run_id if inputs.state else None, on_event=on_event)
    status = "FAILED"
    try:
        with StopSignal() as stop:
            recorder.handle(PhaseStarted(_connecting_text(config)))
            with ray_session(config.cluster) as resources:
                recorder.handle(PhaseStarted(f"starting {config.cluster.num_workers} workers on {resources.device}"))
                with WorkerGroup(config, inputs.model_config, resources) as workers:
                    summary = _Run(inputs, workers, recorder, stop).run()
        status = "FINISHED"
        return summary
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        recorder.finish(status)


def measure_cost_model(config: Config, *, on_event: Callable[[Event], None]) -> planner.CalibrationFit:
    """Start the workers of ``config`` and measure its cost model; see :mod:`raysp.cluster.calibration`."""
    inputs = read_inputs(config)
    on_event(PhaseStarted(_connecting_text(config)))
    with ray_session(config.cluster) as resources:
        on_event(PhaseStarted(f"starting {config.cluster.num_workers} workers on {resources.device}"))
        with WorkerGroup(config, inputs.model_config, resources) as workers:
            return _measure(inputs, workers, on_event, max_mean_relative_error=_MAX_FIT_ERROR)


class _Run:
    """One run on started workers."""

    def __init__(self, inputs: RunInputs, workers: WorkerGroup, recorder: RunRecorder, stop: StopSignal) -> None:
        self._inputs = inputs
        self._config = inputs.config
        self._workers = workers
        self._recorder = recorder
        self._stop = stop
        self._cost_model: CostModel
        self._done_steps = inputs.first_step
        self._cursor = inputs.first_cursor
        self._saved_step: int | None = inputs.first_step if inputs.resume_from else None
        self._checkpoint = str(inputs.resume_from) if inputs.resume_from else None
        self._last_loss: float | None = None
        self._num_tokens = 0
        self._train_time_s = 0.0
        self._is_first_call = True

    def run(self) -> RunSummary:
        config = self._config
        self._preflight()
        self._cost_model = self._resolve_cost_model()
        check_longest_sequence(self._inputs, self._cost_model)
        self._recorder.start(facts=self._facts(), documents={"cost_model.json": self._cost_model.to_json()})
        self._begin()
        self._train()
        comparisons: list[BatchCompared] = []
        if self._stop.requested is None:
            if config.checkpoint.dir and self._saved_step != self._done_steps:
                self._save()
            comparisons = self._compare()
        else:
            self._interrupt()
        return RunSummary(
            first_step=self._inputs.first_step,
            last_step=self._done_steps,
            last_loss=self._last_loss,
            num_tokens=self._num_tokens,
            train_time_s=self._train_time_s,
            checkpoint=self._checkpoint,
            run_id=self._recorder.run_id,
            tracking_uri=self._recorder.uri,
            comparisons=tuple(comparisons),
        )

    def _preflight(self) -> None:
        """Measure the links between the workers; name those that are slow."""
        if not self._config.cluster.preflight or self._workers.size < 2:
            return
        event, warnings = preflight(self._workers, step=self._done_steps)
        self._recorder.handle(event)
        for text in warnings:
            self._recorder.handle(WarningRaised(text))

    def _resolve_cost_model(self) -> CostModel:
        size = self._workers.infos[0].model_size
        if self._inputs.cost_model is not None:
            return for_model(self._inputs.cost_model, self._config, size)
        cached = Path(self._config.checkpoint.dir) / "cost_model.json" if self._config.checkpoint.dir else None
        if cached is not None and cached.is_file():
            try:
                model = CostModel.load(cached)
            except planner.CostModelError as error:
                self._recorder.handle(WarningRaised(f"measuring anew, because {error}"))
            else:
                if dict(model.metadata).get("measured_for") == cost_model_key(self._config, self._workers):
                    self._recorder.handle(PhaseStarted(f"using the cost model measured before, {cached}"))
                    return model
        # A poor fit costs speed, never correctness; it is reported, and no reason to refuse a run.
        fit = _measure(self._inputs, self._workers, self._handle_or_stop, max_mean_relative_error=math.inf)
        if fit.mean_relative_error > _MAX_FIT_ERROR:
            self._recorder.handle(
                WarningRaised(
                    f"the cost model misses its own measurements by {fit.mean_relative_error:.0%} on average; plans are "
                    "valid but may be slow. Calibrate on an idle machine (`raysp calibrate`)."
                )
            )
        if cached is not None:
            cached.parent.mkdir(parents=True, exist_ok=True)
            fit.cost_model.save(cached)
        self._workers.call_same("initialize", timeout_s=_FIRST_STEP_ALLOWANCE_S, what="building the model")
        return fit.cost_model

    def _handle_or_stop(self, event: Event) -> None:
        self._recorder.handle(event)
        if self._stop.requested:
            raise Interrupted(f"stopped by {self._stop.requested} before the first step; nothing was trained.")

    def _facts(self) -> dict[str, str | int]:
        info = self._workers.infos[0]
        return {
            "device_name": info.device_name,
            "num_nodes": len({worker.node_id for worker in self._workers.infos}),
            "num_parameters": info.model_size.num_parameters,
            "cost_model_sha256": self._cost_model.sha256,
            "data_fingerprint": self._inputs.dataset.fingerprint,
        }

    def _begin(self) -> None:
        """Load the checkpoint to resume from; put those of an abandoned future out of the way."""
        if self._inputs.resume_from is not None:
            self._recorder.handle(PhaseStarted(f"resuming after step {self._done_steps} from {self._checkpoint}"))
            self._workers.call_same(
                "load",
                self._inputs.resume_from.resolve(),
                self._done_steps,
                self._inputs.state.files if self._inputs.state else {},
                timeout_s=_CHECKPOINT_TIMEOUT_S,
                what="loading the checkpoint",
            )
        if self._config.checkpoint.dir:
            moved = set_aside_newer(Path(self._config.checkpoint.dir), self._done_steps if self._checkpoint else -1)
            if moved:
                self._recorder.handle(
                    WarningRaised(
                        f"checkpoints of an earlier run were renamed: {', '.join(path.name for path in moved)}"
                    )
                )

    def _train(self) -> None:
        config = self._config
        with (
            PlanAhead(
                self._inputs.loader,
                config=config.planner,
                cost_model=self._cost_model,
                num_ranks=self._workers.size,
                seed=config.train.seed,
                first_step=self._done_steps,
                num_steps=config.train.num_steps,
                cursor=self._cursor,
            ) as steps,
            RunWatch(self._cost_model, sync=config.planner.sync, refit=config.planner.refit) as watch,
        ):
            for planned in steps:
                if self._stop.requested:
                    return
                self._step(planned, watch)
                self._use_refit(watch, steps)
                if self._stop.requested:
                    return
                done, train_config = self._done_steps, config.train
                every = train_config.validate_every
                if every and (done % every == 0 or done == train_config.num_steps):
                    self._validate()
                if (
                    config.checkpoint.dir
                    and config.checkpoint.every_steps
                    and done % config.checkpoint.every_steps == 0
                ):
                    self._save()

    def _step(self, planned: PlannedStep, watch: RunWatch) -> None:
        is_first_call = self._is_first_call
        start_s = time.perf_counter()
        watch.begin_batch(planned.batch.lengths)
        results = self._run_plan(planned, update=True)
        wall_s = time.perf_counter() - start_s
        if not all(result.updated for result in results):
            raise _not_finite(planned, results)
        self._done_steps = planned.step + 1
        self._cursor = planned.batch.next_cursor
        self._last_loss = results[0].loss
        self._num_tokens += planned.batch.num_tokens
        self._train_time_s += wall_s
        length_drift, drift_text = watch.drift()
        self._recorder.handle(replace(self._step_event(planned, results, wall_s), length_drift=length_drift))
        if drift_text is not None:
            self._recorder.handle(LengthsDrifted(step=planned.step + 1, text=drift_text))
        self._recorder.log_plan(planned.step + 1, planned.plan.to_json())
        if not is_first_call:  # which makes communicators and loads kernels
            watch.observe_groups(group_samples(planned.plan, planned.batch.lengths, results))

    def _use_refit(self, watch: RunWatch, steps: PlanAhead) -> None:
        """Plan with a rescaled cost model from here on; the file that a resumed run reads stays as measured."""
        refitted = watch.take_refit()
        if refitted is None:
            return
        self._cost_model = refitted.cost_model
        steps.use_cost_model(refitted.cost_model)
        self._recorder.handle(
            CostModelRefitted(
                step=self._done_steps,
                sha256=refitted.cost_model.sha256,
                mean_relative_error=refitted.mean_relative_error,
                text=refitted.text,
            )
        )
        self._recorder.log_cost_model(self._done_steps, refitted.cost_model.to_json())

    def _run_plan(self, planned: PlannedStep, *, update: bool) -> list[StepResult]:
        work = assign_work(planned.plan, planned.batch, step=planned.step, num_ranks=self._workers.size)
        return self._workers.call(
            "run_step",
            [(part, update) for part in work],
            timeout_s=self._step_timeout_s(planned.plan.predicted_step_time_s),
            what=f"step {planned.step + 1}",
        )

    def _step_timeout_s(self, predicted_s: float) -> float:
        allowance = _FIRST_STEP_ALLOWANCE_S if self._is_first_call else 0.0
        self._is_first_call = False
        if self._config.cluster.step_timeout_s is not None:
            return self._config.cluster.step_timeout_s
        return 120.0 + 30.0 * predicted_s + allowance

    def _step_event(self, planned: PlannedStep, results: list[StepResult], wall_s: float) -> StepFinished:
        plan, batch = planned.plan, planned.batch
        group_times_s = measured_group_times_s(plan, results)
        micro_batches = tuple(
            MicroBatchFinished(
                shapes=shapes,
                predicted_time_s=plan.micro_batches[index].predicted_time_s,
                measured_time_s=max(group_times_s[index]),
            )
            for index, shapes in enumerate(group_shapes(plan))
        )
        info = self._workers.infos[0]
        peak = next((value for key, value in _PEAK_FLOPS.items() if key in info.device_name), None)
        mfu = None
        if peak is not None and self._config.train.dtype == "bf16":
            mfu = model_flops(info.model_size, batch.lengths) / (wall_s * peak * self._workers.size)
        return StepFinished(
            step=planned.step + 1,
            num_steps=self._config.train.num_steps,
            loss=results[0].loss,
            grad_norm=results[0].grad_norm,
            learning_rate=results[0].learning_rate,
            num_sequences=len(batch.lengths),
            num_tokens=batch.num_tokens,
            num_ranks=self._workers.size,
            step_time_s=wall_s,
            predicted_step_time_s=plan.predicted_step_time_s,
            plan_time_s=planned.plan_time_s,
            plan_wait_s=planned.plan_wait_s,
            plan_gap=plan.predicted_step_time_s / plan.lower_bound_s - 1 if plan.lower_bound_s > 0 else math.inf,
            outcome=plan.outcome,
            peak_memory_bytes=max(result.peak_memory_bytes for result in results),
            mfu=mfu,
            micro_batches=micro_batches,
        )

    def _validate(self) -> None:
        ids = self._inputs.validation_ids
        lengths = tuple(int(self._inputs.dataset.sequence_lengths[i]) for i in ids)
        batch = GlobalBatch(sequence_ids=ids, lengths=lengths, next_cursor=self._cursor)
        plan = self._plan(batch, self._config.planner.policy)
        work = assign_work(plan, batch, step=self._done_steps - 1, num_ranks=self._workers.size)
        loss_sum, num_targets = self._workers.call(
            "evaluate",
            [(part,) for part in work],
            timeout_s=self._step_timeout_s(plan.predicted_step_time_s),
            what=f"the validation after step {self._done_steps}",
        )[0]
        self._recorder.handle(
            ValidationFinished(step=self._done_steps, loss=loss_sum / max(1, num_targets), num_targets=num_targets)
        )

    def _plan(self, batch: GlobalBatch, policy: str) -> planner.StepPlan:
        return plan_batch(
            batch.lengths,
            config=self._config.planner,
            cost_model=self._cost_model,
            num_ranks=self._workers.size,
            seed=self._config.train.seed,
            policy=policy,
        )

    def _save(self) -> None:
        directory = Path(str(self._config.checkpoint.dir)).resolve()
        folder = begin_checkpoint(directory, self._done_steps)
        written = self._workers.call_same("save", folder, timeout_s=_CHECKPOINT_TIMEOUT_S, what="saving the checkpoint")
        state = TrainerState(
            step=self._done_steps,
            cursor=self._cursor.to_dict(),
            data_fingerprint=self._inputs.dataset.fingerprint,
            num_ranks=self._workers.size,
            run_id=self._recorder.run_id,
            config=self._config.model_dump(mode="json"),
            model=model_identity(self._inputs.model_config),
            files={name: digest for files in written for name, digest in files.items()},
        )
        final = commit_checkpoint(folder, state, keep=self._config.checkpoint.keep)
        self._saved_step, self._checkpoint = self._done_steps, str(final)
        self._recorder.handle(CheckpointSaved(step=self._done_steps, path=str(final)))

    def _interrupt(self) -> None:
        if self._config.checkpoint.dir and self._done_steps and self._saved_step != self._done_steps:
            self._save()
        where = f"saved in {self._checkpoint}; the same command resumes" if self._checkpoint else "nothing was saved"
        raise Interrupted(f"stopped by {self._stop.requested} after step {self._done_steps}; {where}.")

    def _warm_up(self, batch: GlobalBatch, policies: list[str]) -> None:
        """Run short plans once untimed, so that new groups and kernels are not part of the comparison; for long ones
        that share is small and the time is the user's."""
        for policy in policies:
            plan = self._plan(batch, policy)
            if plan.predicted_step_time_s < _SHORT_STEP_S:
                self._run_plan(PlannedStep(step=0, batch=batch, plan=plan), update=False)

    def _compare(self) -> list[BatchCompared]:
        """Time the first batches of the data again under both policies in turn, without updating anything."""
        config, rows = self._config.compare, []
        if not config.num_steps:
            return []
        cursor = Cursor(0, 0)
        other_policy = smallest_static_policy(self._inputs, self._cost_model, config.policy)
        self._recorder.handle(
            PhaseStarted(
                f"comparing on the same batches: {self._config.planner.policy} against {other_policy} "
                "(forward and backward, no update)"
            )
        )
        for index in range(config.num_steps):
            batch = self._inputs.loader.batch_at(cursor)
            cursor = batch.next_cursor
            measured = {}
            policies = [self._config.planner.policy, other_policy]
            if index == 0:
                self._warm_up(batch, policies)
            # Alternate which goes first, so that neither always profits from what the other warmed up.
            for policy in policies if index % 2 == 0 else policies[::-1]:
                plan = self._plan(batch, policy)
                planned = PlannedStep(step=index, batch=batch, plan=plan)
                results = self._run_plan(planned, update=False)
                measured[policy] = PolicyMeasured(
                    policy=policy,
                    groups=describe_groups(plan),
                    predicted_time_s=plan.predicted_step_time_s - self._cost_model.step_fixed_s(plan.sync),
                    measured_time_s=max(sum(result.micro_batch_times_s) for result in results),
                    loss=results[0].loss,
                )
                if self._stop.requested:
                    self._interrupt()
            row = BatchCompared(
                batch=index + 1,
                num_tokens=batch.num_tokens,
                longest=max(batch.lengths),
                run=measured[policies[0]],
                other=measured[policies[1]],
            )
            rows.append(row)
            self._recorder.handle(row)
        return rows


def _measure(
    inputs: RunInputs, workers: WorkerGroup, on_event: Callable[[Event], None], *, max_mean_relative_error: float
) -> planner.CalibrationFit:
    on_event(PhaseStarted("measuring the cost model on these workers"))
    start_s = time.perf_counter()
    fit = calibrate(
        workers,
        config=inputs.config,
        dataset=inputs.dataset,
        name=f"{inputs.model_config.model_type}-{workers.infos[0].device_name.lower().replace(' ', '-')}",
        max_mean_relative_error=max_mean_relative_error,
        on_progress=lambda done, total: on_event(PhaseProgressed(done, total)),
    )
    on_event(
        PhaseStarted(
            f"cost model from {len(fit.residuals)} measurements in {time.perf_counter() - start_s:.0f} s: mean error "
            f"{fit.mean_relative_error:.1%}, largest {fit.max_relative_error:.1%}"
        )
    )
    return fit


def _not_finite(planned: PlannedStep, results: list[StepResult]) -> NonFiniteLossError:
    ranks = [result.global_rank for result in results if not result.local_loss_is_finite]
    what = f"the loss is {results[0].loss}" if ranks else f"the gradient norm is {results[0].grad_norm}"
    where = f"first on ranks {ranks}" if ranks else "on all ranks"
    return NonFiniteLossError(
        f"step {planned.step + 1}: {what} ({where}; {len(planned.batch.lengths)} sequences, longest "
        f"{max(planned.batch.lengths)} tokens). The parameters were not updated and earlier checkpoints are intact. "
        "Lower train.learning_rate or look at those sequences."
    )


def _connecting_text(config: Config) -> str:
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    return f"connecting to the Ray cluster at {address}" if address else "starting Ray on this machine"
