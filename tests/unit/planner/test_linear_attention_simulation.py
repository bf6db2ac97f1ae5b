"""The simulated table of benchmarks/linear_attention_simulation.py: its parts, and what it writes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

_SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "linear_attention_simulation.py"
_HALF = {"whole_s": 1e-3, "summary_s": 4e-4, "intra_s": 2e-4, "combine_s": 1e-6}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module; it puts the root on the path, which is taken back."""
    spec = importlib.util.spec_from_file_location("linear_attention_simulation", _SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before, sys.modules[spec.name] = list(sys.path), module
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_derived_times_are_in_proportion_to_tokens_but_for_a_launch_and_states(script: ModuleType) -> None:
    shape, machine = script.Model().shape, script.Machine()
    (small, _), (large, backward) = (script.derived_passes(n, shape, machine) for n in (1024, 4096))
    assert large.whole_s - machine.launch_s == pytest.approx(4 * (small.whole_s - machine.launch_s))
    assert large.summary_s == pytest.approx(4 * small.summary_s)
    assert large.combine_s == small.combine_s
    assert backward.summary_s == pytest.approx(2.5 * large.summary_s)


def test_measured_times_are_interpolated_and_beyond_in_proportion(script: ModuleType) -> None:
    twice = {**_HALF, "whole_s": 3e-3}
    rows = [{"tokens": n, "forward": half, "backward": half} for n, half in ((1000, _HALF), (2000, twice))]
    passes = script.measured_passes({"passes": rows})
    times = [passes(tokens)[0] for tokens in (500, 1000, 1500, 2000, 4000)]
    assert [time.whole_s for time in times] == pytest.approx([5e-4, 1e-3, 2e-3, 3e-3, 6e-3])
    assert {time.combine_s for time in times} == {1e-6}


def test_an_all_gather_crosses_to_each_node_once_and_is_no_slower_than_messages_to_all(script: ModuleType) -> None:
    model, machine = script.Model(), script.Machine()

    def passes(tokens: float) -> object:
        return script.derived_passes(tokens, model.shape, machine)

    rows = script.simulate((32768, 2097152), 64, model, machine, passes)
    speed = {(row["tokens"], row["method"]): row["tokens_per_s"] for row in rows}
    for tokens in (32768, 2097152):
        fastest = speed[tokens, script.ALL_GATHER]
        assert all(fastest >= other for (count, _), other in speed.items() if count == tokens)
        assert speed[tokens, "lasp1"] > speed[tokens, script.PUBLISHED_LASP1] > speed[tokens, "ring"]
    assert machine.all_gather_s(8, 8) < machine.all_gather_s(8, 16)
    assert script.compared(rows, 64, model, machine, passes)
    assert len({row["layer_bytes"] for row in rows if row["method"] == "lasp2"}) == 1


def test_the_script_writes_a_table_a_plot_and_what_is_behind_them(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    times = tmp_path / "times.json"
    times.write_text(
        json.dumps({"hardware": "a test", "passes": [{"tokens": 4096, "forward": _HALF, "backward": _HALF}]})
    )
    options = ["--ranks", "16", "--tokens", "65536,2097152", "--kernel-times", str(times), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["linear_attention_simulation.py", *options, "--commit", "abc"])
    script.main()
    result = json.loads((tmp_path / "linear_attention_simulation.json").read_text())
    assert result["local_times"] == "measured on a test (times.json)"
    assert {row["method"] for row in result["rows"]} >= {"lasp2", "lasp1", "zeco", "ulysses", "ring"}
    text = (tmp_path / "linear_attention_simulation.md").read_text()
    assert "Predicted, not measured" in text
    assert "| 2048K |" in text
    assert (tmp_path / "linear_attention_simulation.png").stat().st_size > 0
