import math
import os
import subprocess
import sys
import time

import pytest
from mlflow.tracking import MlflowClient

from raysp.tracking.mlflow_tracker import MlflowTracker
from raysp.tracking.names import sqlite_path
from raysp.tracking.null_tracker import NullTracker


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    # A new SQLite database takes seconds, so the tests share one and make their own experiments.
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/deep/er/mlflow.db"


def open_tracker(uri, warnings, **options):
    return MlflowTracker(uri=uri, experiment=options.pop("experiment", "test"), on_warning=warnings.append, **options)


def history(uri, run_id, name):
    return {metric.step: metric.value for metric in MlflowClient(uri).get_metric_history(run_id, name)}


def test_a_run_is_logged_whole(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "note.txt").write_text("a file")
    warnings = []
    tracker = open_tracker(uri, warnings, run_name="first", tags={"kind": "demo"}, params={"seed": 7})
    tracker.log_params({"model.layers[0]": "x", "none": None})
    for step in range(1, 30):
        tracker.log_metrics(step, {"loss": 1 / step, "recall@5": step})
    tracker.log_metrics(30, {"loss": math.nan})
    tracker.log_text("{}", "plans/step-1.json")
    tracker.log_artifact("note.txt", "notes")
    tracker.finish("FINISHED", timeout_s=120)
    run = MlflowClient(uri).get_run(tracker.run_id)
    assert warnings == []
    assert (run.info.status, run.info.run_name, run.data.tags["kind"]) == ("FINISHED", "first", "demo")
    assert run.data.params == {"seed": "7", "model.layers_0_": "x", "none": "None"}
    losses = history(uri, tracker.run_id, "loss")
    assert losses.pop(30) != losses.get(30)
    assert losses == {step: 1 / step for step in range(1, 30)}
    assert history(uri, tracker.run_id, "recall_5")[29] == 29
    folder = sqlite_path(uri).parent / "mlartifacts" / tracker.run_id / "artifacts"
    assert (folder / "plans" / "step-1.json").read_text() == "{}"
    assert (folder / "notes" / "note.txt").read_text() == "a file"
    assert os.listdir(tmp_path) == ["note.txt"]


def test_a_run_is_continued(uri):
    warnings = []
    first = open_tracker(uri, warnings, params={"seed": 7, "steps": 10})
    first.log_metrics(1, {"loss": 3.0})
    first.finish("FAILED", timeout_s=120)
    assert MlflowClient(uri).get_run(first.run_id).info.status == "FAILED"
    second = open_tracker(uri, warnings, run_id=first.run_id, params={"seed": 7, "steps": 20, "new": 1})
    assert second.run_id == first.run_id
    assert MlflowClient(uri).get_run(first.run_id).info.status == "RUNNING"
    second.log_metrics(2, {"loss": 2.0})
    second.finish("KILLED", timeout_s=120)
    run = MlflowClient(uri).get_run(first.run_id)
    assert warnings == []
    assert run.info.status == "KILLED"
    assert run.data.params == {"seed": "7", "steps": "10", "new": "1"}
    assert run.data.tags["changed.steps"] == "20"
    assert history(uri, first.run_id, "loss") == {1: 3.0, 2: 2.0}


def test_many_parameters_and_long_values_are_kept(uri):
    warnings = []
    tracker = open_tracker(uri, warnings, params={f"p{number}": number for number in range(250)} | {"long": "y" * 9000})
    tracker.finish(timeout_s=120)
    params = MlflowClient(uri).get_run(tracker.run_id).data.params
    assert warnings == []
    assert len(params) == 251
    assert params["p249"] == "249"
    assert params["long"].startswith("yyy")


def test_an_unreachable_server_gives_one_warning_and_nothing_else():
    warnings = []
    before = dict(os.environ)
    tracker = open_tracker("http://127.0.0.1:1", warnings)
    for step in range(100):
        tracker.log_metrics(step, {"loss": 1.0})
    tracker.log_text("x", "a.txt")
    assert tracker.run_id is None
    tracker.finish("FINISHED")
    tracker.log_metrics(101, {"loss": 1.0})
    assert len(warnings) == 1
    assert "MLflow at http://127.0.0.1:1 cannot be written: no server answers there. Training goes on" in warnings[0]
    assert dict(os.environ) == before


def test_a_run_id_that_does_not_exist_gives_one_warning(uri):
    warnings = []
    tracker = open_tracker(uri, warnings, run_id="0" * 32)
    assert tracker.run_id is None
    tracker.finish()
    assert len(warnings) == 1
    assert "0" * 32 in warnings[0]


def test_one_refused_record_does_not_lose_the_others(uri, tmp_path):
    warnings = []
    tracker = open_tracker(uri, warnings)
    tracker.log_artifact(tmp_path / "missing.bin")
    tracker.log_artifact(tmp_path / "missing too.bin")
    tracker.log_metrics(1, {"loss": 1.0})
    tracker.finish(timeout_s=120)
    assert len(warnings) == 1
    assert "missing.bin" in warnings[0]
    assert history(uri, tracker.run_id, "loss") == {1: 1.0}
    assert MlflowClient(uri).get_run(tracker.run_id).info.status == "FINISHED"


def test_what_is_logged_before_mlflow_can_be_opened_waits_up_to_the_bound(tmp_path):
    blocked = tmp_path / "store"
    blocked.write_text("a file where the folder should be")
    warnings = []
    tracker = open_tracker(f"sqlite:///{blocked}/mlflow.db", warnings, retry_open_s=0.1, max_queued=100)
    assert tracker.run_id is None
    for step in range(150):
        tracker.log_metrics(step, {"loss": float(step)})
    blocked.unlink()
    while tracker.run_id is None:
        time.sleep(0.05)
    tracker.finish(timeout_s=120)
    assert len(warnings) == 2
    assert "cannot be written" in warnings[0]
    assert "50 records are lost" in warnings[1]
    assert sorted(history(tracker.uri, tracker.run_id, "loss")) == list(range(50, 150))


def test_status_is_checked(uri):
    tracker = open_tracker(uri, [])
    with pytest.raises(ValueError, match="status is 'done'; expected one of FINISHED, FAILED, KILLED"):
        tracker.finish("done")
    tracker.finish(timeout_s=120)
    tracker.finish("FAILED")
    assert MlflowClient(uri).get_run(tracker.run_id).info.status == "FINISHED"


def test_without_mlflow_installed_training_goes_on():
    code = (
        "import sys; sys.modules['mlflow'] = None\n"
        "from raysp.tracking.mlflow_tracker import MlflowTracker\n"
        "t = MlflowTracker(uri='http://h', experiment='e', on_warning=print)\n"
        "t.log_metrics(1, {'a': 1.0}); print(t.run_id); t.finish()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    warning, run_id = done.stdout.splitlines()
    assert "is not installed; pip install 'raysp[train]'. Training goes on without it" in warning
    assert run_id == "None"


def test_the_null_tracker_takes_everything(tmp_path):
    tracker = NullTracker()
    tracker.log_metrics(1, {"loss": 1.0})
    tracker.log_params({"a": 1})
    tracker.log_text("x", "a.txt")
    tracker.log_artifact(tmp_path / "missing")
    tracker.finish("FAILED")
    assert (tracker.run_id, tracker.uri) == (None, None)
