"""`raysp train` as a user runs it: a real local Ray, real workers, MLflow on SQLite, failures injected."""

from __future__ import annotations

import dataclasses
import re
import signal
from collections.abc import Callable
from pathlib import Path

import mlflow
import psutil
import pytest
from command_line import RunningTraining, raysp

from planner import CostModel, RecomputePolicy, StepPlan
from raysp.train.checkpoint import checkpoints_in, read_state

WriteConfig = Callable[..., Path]


def _losses(output: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+)/\d+ loss ([\d.]+)", output)}


def test_run_trains_validates_saves_tracks_compares_and_resumes(write_config: WriteConfig, tmp_path: Path) -> None:
    config = str(
        write_config(
            train__validate_every="2",
            train__num_steps="6",
            compare__num_steps="1",
            planner__cost_model='"auto"',
            planner__memory_limit_bytes="50e6",
        )
    )
    first = raysp("train", "--config", config, "--set", "train.num_steps=4", "--set", "compare.num_steps=0")
    assert first.code == 0, first.err
    assert set(_losses(first.out)) == {1, 2, 3, 4}
    assert "degree x count" in first.out
    assert re.search(r"links: [\d.]+ [GM]B/s between workers", first.out), first.out
    assert "validation after step 4" in first.out
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("test")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert {
        "loss", "tokens_per_s", "step_time_s", "predicted_step_time_s", "plan_time_s", "plan_gap", "num_ranks",
        "validation_loss", "link_bandwidth_inside_nodes_bytes_per_s",
    } <= set(run.data.metrics)  # fmt: skip
    assert run.data.params["cluster.num_workers"] == "2"
    artifacts = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"config.json", "plans", "cost_model.json", "links.json"} <= artifacts
    assert len(client.list_artifacts(run.info.run_id, "plans")) == 4

    second = raysp("train", "--config", config, "--set", "cluster.preflight=false")
    assert second.code == 0, second.err
    assert "links:" not in second.out
    assert set(_losses(second.out)) == {5, 6}
    assert "using the cost model measured before" in second.out
    assert "the same batches: adaptive against static:" in second.out
    [resumed] = client.search_runs([experiment.experiment_id])
    assert resumed.info.run_id == run.info.run_id
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4, 5, 6]

    other_model = raysp("train", "--config", config, "--set", "model.config.num_key_value_heads=4")
    assert other_model.code == 2
    assert "num_key_value_heads was 2 and is 4 now" in other_model.err

    third = raysp("train", "--config", config)
    assert third.code == 0, third.err
    assert "nothing to train: step 6 of 6 was already done" in third.out


def test_interrupted_and_resumed_run_has_the_losses_of_an_uninterrupted_one(
    write_config: WriteConfig, tmp_path: Path
) -> None:
    # The learning rate depends on num_steps, so both runs are planned for the same number.
    config = str(write_config(train__num_steps="8", checkpoint__every_steps="0", tracking__enabled="false"))
    interrupted = RunningTraining(tmp_path / "log", "--config", config)
    try:
        interrupted.wait_for("step 2/8")
        children = interrupted.descendants()
        interrupted.process.send_signal(signal.SIGINT)
        assert interrupted.wait() == 130
        _, alive = psutil.wait_procs(children, timeout=20)
        assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    finally:
        interrupted.close()
    assert "stopped by Ctrl-C after step" in interrupted.output
    [checkpoint] = checkpoints_in(tmp_path / "checkpoints")
    done = read_state(checkpoint).step
    assert 2 <= done < 8
    resumed = raysp("train", "--config", config, "--set", "cluster.num_workers=1")
    assert resumed.code == 0, resumed.err
    whole = raysp(
        "train", "--config", config, "--resume", "none", "--set", f"checkpoint.dir={tmp_path / 'other'}",
        "--set", "planner.policy=static:1",
    )  # fmt: skip
    assert whole.code == 0, whole.err
    expected = _losses(whole.out)
    together = {**_losses(interrupted.output), **_losses(resumed.out)}
    assert together == pytest.approx(expected, abs=1.5e-4)  # printed with four decimals


def test_killed_worker_ends_the_run_naming_rank_and_step(write_config: WriteConfig, tmp_path: Path) -> None:
    config = str(write_config(train__num_steps="500", tracking__enabled="false"))
    training = RunningTraining(tmp_path / "log", "--config", config)
    try:
        training.wait_for("step 3/500")
        # Ray titles an actor's process "ray::Worker", and while it runs a method "ray::Worker.run_step".
        titles = {process: (process.cmdline() or [""])[0] for process in training.descendants()}
        workers = [process for process, title in titles.items() if title.partition(".")[0] == "ray::Worker"]
        assert len(workers) == 2, titles
        workers[0].kill()
        assert training.wait() == 1
    finally:
        training.close()
    assert re.search(r"error: rank [01] died during step \d+", training.output), training.output
    assert checkpoints_in(tmp_path / "checkpoints")


def test_late_step_ends_the_run_naming_ranks_and_step(write_config: WriteConfig) -> None:
    config = str(write_config(cluster__step_timeout_s="0.001", tracking__enabled="false"))
    done = raysp("train", "--config", config)
    assert done.code == 1
    assert re.search(r"ranks? [01](, 1)? did not finish step 1 within 0 s", done.err), done.err


def test_loss_that_is_not_finite_stops_with_step_and_ranks_and_keeps_the_checkpoint(
    write_config: WriteConfig, tmp_path: Path
) -> None:
    config = str(
        write_config(
            train__learning_rate="1e30", train__num_steps="20", checkpoint__every_steps="1", tracking__enabled="false"
        )
    )
    done = raysp("train", "--config", config)
    assert done.code == 1
    match = re.search(r"step (\d+): the (loss|gradient norm) is (nan|inf)", done.err)
    assert match, done.err
    assert "ranks" in done.err
    newest = read_state(checkpoints_in(tmp_path / "checkpoints")[-1])
    assert newest.step == int(match.group(1)) - 1


def test_unreachable_tracking_server_is_one_warning_and_training_goes_on(write_config: WriteConfig) -> None:
    config = str(write_config(tracking__uri='"http://127.0.0.1:1"', train__num_steps="3"))
    done = raysp("train", "--config", config)
    assert done.code == 0, done.err
    assert set(_losses(done.out)) == {1, 2, 3}
    assert done.out.count("warning:") == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.num_workers=1000", "cluster.num_workers = 1000, but this machine has"),
        ("data.path=/does/not/exist", "/does/not/exist"),
        ("planner.cost_model=auto planner.memory_limit_bytes=1000", "per rank, the limit is 0 MiB"),
        ("checkpoint.resume=/does/not/exist", "is not a whole checkpoint"),
        ("checkpoint.dir=/dev/null/x", "cannot be written"),
        ("planner.policy=static:4", "needs groups of 4 workers"),
        ("planner.cost_model=nonsense", "is neither 'auto', a file, nor a preset"),
        ("cluster.address=127.0.0.1:1", "cannot reach the Ray cluster at '127.0.0.1:1'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(write_config: WriteConfig, override: str, message: str) -> None:
    overrides = [item for setting in override.split() for item in ("--set", setting)]
    done = raysp("train", "--config", str(write_config()), *overrides)
    assert done.code == 2, done.err
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_sequence_that_fits_no_group_is_refused_before_training(write_config: WriteConfig) -> None:
    done = raysp("train", "--config", str(write_config(planner__memory_limit_bytes="4e6")))
    assert done.code == 2
    assert re.search(r"the longest document \(row \d+ of .*\): sequence 0 has 10\d\d tokens and needs", done.err), (
        done.err
    )


def test_per_step_measures_trains_validates_refits_and_matches_per_layer(
    write_config: WriteConfig, tmp_path: Path
) -> None:
    settings = {
        "train__num_steps": "5",
        "train__validate_every": "5",
        "planner__memory_limit_bytes": "50e6",
        "data__tokens_per_step": "8192",
    }
    per_step = raysp(
        "train", "--config", str(write_config(**settings, planner__cost_model='"auto"', planner__sync='"per-step"')),
        "--set", "planner.recompute=per-group", "--set", "planner.refit=true", "--set", "compare.num_steps=1",
    )  # fmt: skip
    assert per_step.code == 0, per_step.err
    assert "the same batches: adaptive against static:" in per_step.out
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    [run] = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    assert 0 <= run.data.metrics["length_drift"] <= 1
    cost_model = CostModel.load(tmp_path / "checkpoints" / "cost_model.json")
    assert cost_model.unsharded_state_bytes == 8 * int(run.data.params["num_parameters"])
    assert [policy.name for policy in cost_model.recompute_policies] == ["full"]
    assert cost_model.recompute_policies[0].bytes_per_token < cost_model.bytes_per_token

    per_layer = raysp(
        "train", "--config", str(write_config(**settings)), "--resume", "none",
        "--set", f"checkpoint.dir={tmp_path / 'other'}",
    )  # fmt: skip
    assert per_layer.code == 0, per_layer.err
    assert _losses(per_step.out) == pytest.approx(_losses(per_layer.out), abs=1.5e-4)  # printed with four decimals
    validated = [re.findall(r"validation after step 5: loss ([\d.]+)", done.out) for done in (per_step, per_layer)]
    assert len(validated[0]) == 1
    assert float(validated[0][0]) == pytest.approx(float(validated[1][0]), abs=1.5e-4)


def test_cost_model_with_a_recompute_policy_that_cannot_run_is_refused(
    write_config: WriteConfig, tmp_path: Path
) -> None:
    config = str(write_config())
    path = tmp_path / "given_cost_model.json"
    policy = RecomputePolicy(name="selective", bytes_per_token=1.0)
    dataclasses.replace(CostModel.load(path), recompute_policies=(policy,)).save(path)
    done = raysp("train", "--config", config)
    assert done.code == 2
    assert "recompute policy 'selective'; expected 'none' or 'full'" in done.err


def test_refit_replaces_a_wrong_cost_model_for_later_plans_and_not_for_the_resumed_run(
    write_config: WriteConfig, tmp_path: Path
) -> None:
    config = str(
        write_config(
            train__num_steps="26",
            checkpoint__every_steps="0",
            planner__policy='"static:1"',
            planner__sync='"per-step"',
            planner__refit="true",
            planner__memory_limit_bytes="30e6",
        )
    )
    first = raysp("train", "--config", config, "--set", "train.num_steps=24")
    assert first.code == 0, first.err
    [(sha256, before, after)] = re.findall(
        r"cost model (\w+) from step \d+ on: rescaling lowers the mean relative error from ([\d.]+)% to ([\d.]+)%",
        first.out,
    )[:1]
    assert float(after) < float(before)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    [run] = client.search_runs([client.get_experiment_by_name("test").experiment_id])
    plans = tmp_path / "plans"
    plans.mkdir()
    client.download_artifacts(run.info.run_id, "plans", str(tmp_path))
    used = [StepPlan.load(path).cost_model.sha256 for path in sorted(plans.iterdir())]
    assert len(used) == 24
    assert used[-1] != used[0]
    assert sha256 in {used_sha[:12] for used_sha in used}
    assert run.data.metrics["cost_model_error"] < 1

    resumed = raysp("train", "--config", config)
    assert resumed.code == 0, resumed.err
    client.download_artifacts(run.info.run_id, "plans", str(tmp_path))
    assert StepPlan.load(plans / "step-00000025.json").cost_model.sha256 == used[0]
