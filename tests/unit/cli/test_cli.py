import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from planner import CostModel, RecomputePolicy, StepPlan, load_preset, read_lengths, validate_plan
from raysp.cli import describe_error, main
from raysp.errors import Interrupted, RayspError

PRESET = "flexsp-gpt7b-64xa100-40g"
LENGTHS = [5000, 300, 120, 9000, 64, 700, 2500, 33, 12000, 800, 60, 410]


class Outcome:
    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    def assert_refused(self, pattern, *, code=2):
        assert (self.code, self.out) == (code, "")
        assert self.err.count("\n") == 1
        assert self.err.startswith("raysp: error: ")
        assert re.search(pattern, self.err), self.err


@pytest.fixture
def raysp(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")

    def call(*args):
        with pytest.raises(SystemExit) as exit_:
            main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        return Outcome(exit_.value.code, out, err)

    return call


@pytest.fixture
def lengths_file(tmp_path):
    path = tmp_path / "lengths.txt"
    path.write_text("".join(f"{length}\n" for length in LENGTHS))
    return path


@pytest.fixture
def plan_file(raysp, lengths_file, tmp_path):
    path = tmp_path / "plans" / "plan.json"
    arguments = ["--lengths", lengths_file, "--preset", PRESET, "--num-gpus", 64, "--node-limit", 10]
    assert raysp("plan", *arguments, "--output", path).code == 0
    return path


def process(*args, **options):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=120, check=False, **options)


def test_plan_writes_what_it_shows(raysp, lengths_file, tmp_path):
    path = tmp_path / "new" / "plan.json"
    arguments = ["plan", "--lengths", lengths_file, "--preset", PRESET, "--node-limit", 10]
    shown = raysp(*arguments, "--output", path)
    assert (shown.code, shown.err) == (0, "")
    plan = StepPlan.load(path)
    assert validate_plan(plan, read_lengths(lengths_file), load_preset(PRESET)) == []
    # The preset was measured on 64 GPUs.
    assert plan.num_ranks == 64
    assert "groups (degree x count)" in shown.out
    assert f"{plan.micro_batches[0].groups[0].degree} x " in shown.out
    assert f"step {plan.predicted_step_time_s:.3f} s predicted" in shown.out
    assert "found by: " in shown.out
    assert f"written to {path}" in shown.out
    printed = json.loads(raysp(*arguments, "--json").out)
    assert {**printed, "solve_time_s": 0} == {**plan.to_content(), "solve_time_s": 0}
    assert os.listdir(path.parent) == ["plan.json"]


def test_plan_follows_its_options(raysp, lengths_file):
    arguments = ["plan", "--lengths", lengths_file, "--preset", PRESET, "--num-gpus", 32, "--json"]
    plan = json.loads(raysp(*arguments, "--policy", "static:8", "--attention", "ring").out)
    groups = [group for micro_batch in plan["micro_batches"] for group in micro_batch["groups"]]
    assert {(group["degree"], group["attention"]) for group in groups} == {(8, "ring")}
    assert plan["num_ranks"] == 32


def test_plan_with_a_cost_model_file(raysp, lengths_file, tmp_path):
    load_preset(PRESET).save(tmp_path / "model.json")
    shown = raysp("plan", "--lengths", lengths_file, "--cost-model", tmp_path / "model.json", "--num-gpus", 16)
    assert shown.code == 0


def test_plan_shows_the_recompute_policy_of_groups(raysp, lengths_file, tmp_path):
    policy = RecomputePolicy(name="full", bytes_per_token=1e5, compute_factor=1.3)
    model = dataclasses.replace(load_preset(PRESET), model_state_bytes_total=1e9, recompute_policies=(policy,))
    model.save(tmp_path / "model.json")
    # 31,000 tokens need all the memory that recomputing saves.
    shown = raysp("plan", "--lengths", lengths_file, "--cost-model", tmp_path / "model.json", "--num-gpus", 1)
    assert "local, recompute full" in shown.out


def test_plan_refuses_bad_input(raysp, lengths_file, tmp_path):
    base = ["plan", "--lengths", lengths_file]
    raysp(*base).assert_refused("neither of --preset NAME and --cost-model FILE given; expected exactly one")
    raysp(*base, "--preset", PRESET, "--cost-model", "x").assert_refused("both of --preset")
    raysp(*base, "--preset", "nope").assert_refused(f"unknown preset 'nope'; expected one of .*{PRESET}")
    raysp(*base, "--cost-model", tmp_path / "x").assert_refused("cannot read cost model")
    raysp("plan", "--lengths", tmp_path / "x", "--preset", PRESET).assert_refused("cannot read lengths file")
    raysp(*base, "--preset", PRESET, "--policy", "best").assert_refused("policy is 'best'; expected adaptive")
    raysp(*base, "--preset", PRESET, "--num-gpus", 0).assert_refused("--num-gpus")
    (tmp_path / "bad.txt").write_text("5\nx\n")
    raysp("plan", "--lengths", tmp_path / "bad.txt", "--preset", PRESET).assert_refused("line 2 is 'x'; expected")
    (tmp_path / "long.txt").write_text("5\n100000000\n")
    raysp("plan", "--lengths", tmp_path / "long.txt", "--preset", PRESET).assert_refused("100000000|sequence 1")


def test_plan_that_cannot_be_written_is_failed_work(raysp, lengths_file):
    shown = raysp("plan", "--lengths", lengths_file, "--preset", PRESET, "--output", lengths_file / "plan.json")
    shown.assert_refused("cannot write .*; expected a file that can be created", code=1)


def test_validate_accepts_a_good_plan_and_names_the_faults_of_a_bad_one(raysp, lengths_file, plan_file, tmp_path):
    shown = raysp("validate", plan_file, "--lengths", lengths_file, "--preset", PRESET)
    assert (shown.code, shown.err) == (0, "")
    assert f"{plan_file} is valid: 12 sequences on 64 GPUs" in shown.out
    (tmp_path / "other.txt").write_text("".join(f"{length}\n" for length in LENGTHS[:-1]))
    refused = raysp("validate", plan_file, "--lengths", tmp_path / "other.txt", "--preset", PRESET)
    refused.assert_refused("is not valid for .*num_sequences is 12, but the batch has 11.*Plan again with raysp plan")


def test_validate_refuses_a_changed_file(raysp, lengths_file, plan_file):
    plan_file.write_text(plan_file.read_text().replace('"num_ranks": 64', '"num_ranks": 63'))
    raysp("validate", plan_file, "--lengths", lengths_file, "--preset", PRESET).assert_refused("plan_id")
    plan_file.write_text("{")
    raysp("validate", plan_file, "--lengths", lengths_file, "--preset", PRESET).assert_refused("plan.json")
    raysp("validate", "nowhere", "--lengths", lengths_file, "--preset", PRESET).assert_refused(
        "cannot read plan nowhere"
    )


def test_explain_says_what_bounds_the_plan(raysp, lengths_file, plan_file):
    arguments = ["explain", plan_file, "--lengths", lengths_file, "--preset", PRESET, "--what-if-time-limit-s", 0.02]
    shown = raysp(*arguments)
    assert (shown.code, shown.err) == (0, "")
    for text in (
        "micro-batch",
        "why 0:",
        "long sequences",
        "what if",
        "twice the memory",
        "one node fewer",
        "static:1",
    ):
        assert text in shown.out
    content = json.loads(raysp(*arguments, "--json").out)
    assert content["plan_id"] == StepPlan.load(plan_file).plan_id
    assert any("micro-batch 0:" in line for line in content["lines"])
    rows = {row["name"]: row for row in content["what_ifs"]}
    assert rows["memory-x2"]["step_time_s"] <= rows["replanned"]["step_time_s"] <= content["step_time_s"]
    assert [item["num_tokens"] for item in content["long_sequences"]] == sorted(LENGTHS, reverse=True)[:5]
    assert content["long_sequences"][0]["replanned_saved_s"] >= content["long_sequences"][0]["saved_s"] >= 0


def test_explain_leaves_out_what_ifs_on_request(raysp, lengths_file, plan_file):
    arguments = ["explain", plan_file, "--lengths", lengths_file, "--preset", PRESET, "--no-what-if"]
    shown = raysp(*arguments)
    assert shown.code == 0
    assert "what if" not in shown.out
    content = json.loads(raysp(*arguments, "--json").out)
    assert (content["what_ifs"], content["what_if_time_limit_s"]) == ([], None)
    raysp(*arguments, "--what-if-time-limit-s", -1).assert_refused("what-if-time-limit-s")


def test_simulate_compares_policies_and_sizes(raysp, lengths_file, tmp_path):
    arguments = ["simulate", "--lengths", lengths_file, "--preset", PRESET, "--num-gpus", "8,16", "--num-gpus", 8]
    arguments += ["--batch-size", 6, "--num-batches", 2, "--time-limit-s", 0.01]
    shown = raysp(*arguments, "--output", tmp_path / "s.json", "--plot", tmp_path / "s.png")
    assert (shown.code, shown.err) == (0, "")
    for text in ("best static", "batch-adaptive", "raysp", "tokens/s", f"written to {tmp_path / 's.json'}"):
        assert text in shown.out
    assert "FlexSP" not in shown.out
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / "s.json").read_text())
    assert (content["num_gpus"], content["complete"], content["marginal_values"]) == ([8, 16], True, [])
    assert {(step["num_ranks"], step["batch"]) for step in content["steps"]} == {(8, 0), (8, 1), (16, 0), (16, 1)}
    assert sum(step["num_tokens"] for step in content["steps"] if step["policy"] == "adaptive") == 2 * sum(LENGTHS)
    best = [row for row in content["summaries"] if row["policy"] == "best static"]
    assert [row["num_ranks"] for row in best] == [8, 16]
    assert all(row["relative_to_adaptive"] >= 1 for row in best)
    assert content["cost_model"]["sha256"] == load_preset(PRESET).sha256


def test_simulate_prints_json_of_flexsp_and_what_a_node_is_worth(raysp):
    arguments = ["simulate", "--lengths", "wikipedia", "--preset", PRESET, "--batch-size", 8, "--num-batches", 1]
    arguments += ["--max-length", 9000, "--time-limit-s", 0.01, "--num-gpus", 8, "--flexsp-cpu-s", 0.1, "--marginal"]
    printed = json.loads(raysp(*arguments, "--policies", "static:8,flexsp,adaptive", "--json").out)
    assert [step["policy"] for step in printed["steps"]] == ["static:8", "flexsp", "adaptive"]
    assert all(row["relative_to_flexsp"] > 0 for row in printed["summaries"])
    (value,) = printed["marginal_values"]
    assert (value["num_ranks"], value["gpus_per_node"]) == (8, 8)
    assert value["gained_per_added_node"] >= value["gained_per_added_gpu"] >= 0
    assert value["reason"] in raysp(*arguments).out


def test_simulate_says_why_batches_do_not_fit(raysp, lengths_file):
    arguments = ["simulate", "--lengths", lengths_file, "--preset", PRESET, "--num-gpus", 2, "--batch-size", 12]
    shown = raysp(*arguments, "--num-batches", 1)
    assert shown.code == 0
    assert "1 of 1 do not fit" in shown.out
    assert re.search(r"2 GPUs, batch 0, raysp: .*Use more ranks", shown.out)


def test_simulate_refuses_bad_input(raysp, lengths_file, tmp_path):
    base = ["simulate", "--lengths", lengths_file, "--preset", PRESET]
    raysp(*base, "--num-gpus", "8,x").assert_refused("--num-gpus has 'x'; expected integers of at least 1")
    raysp(*base, "--num-gpus", "0").assert_refused("--num-gpus has '0'")
    raysp(*base, "--policies", "best").assert_refused("policy is 'best'; expected static")
    raysp(*base, "--policies", "flexsp").assert_refused("expected --flexsp-cpu-s SECONDS")
    raysp(*base, "--plot", tmp_path / "s.jpg").assert_refused(r"s\.jpg is not a \.png file")
    raysp(*base, "--batch-size", 0).assert_refused("--batch-size")
    raysp("simulate", "--lengths", "nope", "--preset", PRESET).assert_refused("no file and no distribution 'nope'")
    raysp("simulate", "--lengths", lengths_file).assert_refused("neither of --preset NAME and --cost-model FILE")


def test_simulate_keeps_what_is_done_after_ctrl_c(tmp_path):
    output = tmp_path / "s.json"
    command = ["simulate", "--lengths", "wikipedia", "--preset", PRESET, "--num-batches", "500", "--batch-size", "32"]
    command += ["--time-limit-s", "0.01", "--policies", "batch-adaptive,adaptive", "--output", str(output)]
    code = (
        "import os, signal, sys\n"
        "from planner import simulation\n"
        "real, done = simulation.plan_step, []\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def plan_step(*args, **options):\n"
        "    done.append(1)\n"
        "    if len(done) == 5: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(*args, **options)\n"
        "simulation.plan_step = plan_step\n"
        "from raysp.cli import main; main(sys.argv[1:])\n"
    )
    done = process("-c", code, *command)
    assert done.returncode == 130
    assert "2 batches; predicted; stopped early" in done.stdout
    content = json.loads(output.read_text())
    assert (content["complete"], len(content["steps"])) == (False, 4)


def test_lengths_of_a_file_a_dataset_and_a_parquet_file_agree(raysp, lengths_file, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.table({"input_ids": [[1] * length for length in LENGTHS]}), folder / "a.parquet")
    profiles = [
        json.loads(raysp("lengths", place, "--json").out) for place in (lengths_file, folder, folder / "a.parquet")
    ]
    assert profiles[0] == profiles[1] == profiles[2]
    assert profiles[0]["num_tokens"] == sum(LENGTHS)
    assert profiles[0]["max_tokens"] == 12000
    split = json.loads(raysp("lengths", folder, "--max-length", 1000, "--json").out)
    assert (split["num_tokens"], split["max_tokens"]) == (sum(LENGTHS), 1000)
    shown = raysp("lengths", folder)
    assert f"12 sequences, {sum(LENGTHS):,} tokens" in shown.out
    assert "8,193 - 16,384" in shown.out


def test_lengths_plot_is_a_png(raysp, lengths_file, tmp_path):
    shown = raysp("lengths", lengths_file, "--plot", tmp_path / "p" / "l.png")
    assert shown.code == 0
    assert (tmp_path / "p" / "l.png").read_bytes().startswith(b"\x89PNG")
    raysp("lengths", lengths_file, "--plot", tmp_path / "l.jpg").assert_refused(r"l\.jpg is not a \.png file")


def test_lengths_of_a_shipped_distribution_says_that_it_is_a_sample(raysp):
    shown = raysp("lengths", "wikipedia")
    assert (shown.code, shown.err) == (0, "")
    assert "wikipedia: a sample of 100,000 from the table that ships with raysp; 200,000 documents" in shown.out
    assert "FlexSP" in shown.out
    content = json.loads(raysp("lengths", "wikipedia", "--max-length", 4096, "--json").out)
    assert (content["sampled_from"], content["num_sequences"], content["max_tokens"]) == ("wikipedia", 100_000, 4096)


def test_lengths_takes_a_file_before_a_distribution_of_that_name(raysp, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wikipedia").write_text("5\n70\n")
    content = json.loads(raysp("lengths", "wikipedia", "--json").out)
    assert (content["sampled_from"], content["num_tokens"]) == (None, 75)
    split = json.loads(raysp("lengths", "wikipedia", "--max-length", 50, "--json").out)
    assert (split["num_sequences"], split["num_tokens"], split["max_tokens"]) == (3, 75, 50)


def test_lengths_against_another_source_shows_both_and_a_verdict(raysp, tmp_path):
    shown = raysp("lengths", "wikipedia", "--against", "prolong", "--plot", tmp_path / "both.png")
    assert (shown.code, shown.err) == (0, "")
    assert "against prolong" in shown.out
    assert re.search(r"lengths drifted: median 3\d\d tokens instead of 1,9\d\d", shown.out)
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    drift = json.loads(raysp("lengths", "wikipedia", "--against", "prolong", "--json").out)["drift"]
    assert drift["drifted"]
    assert drift["statistic"] > 0.5 > drift["threshold"]
    same = json.loads(raysp("lengths", "prolong", "--against", "prolong", "--json").out)
    assert not same["drift"]["drifted"]
    assert same["against"]["num_tokens"] != same["num_tokens"]


def test_lengths_refuses_bad_input(raysp, tmp_path):
    raysp("lengths", tmp_path / "x").assert_refused("cannot read lengths file")
    for arguments in (["wikipedi"], ["wikipedia", "--against", "wikipedi"]):
        raysp("lengths", *arguments).assert_refused(
            "no file and no distribution 'wikipedi'; expected a file or one of long-documents, .*prolong, wikipedia"
        )
    raysp("lengths", tmp_path / "x.parquet").assert_refused(r"x\.parquet does not exist; expected a folder")
    raysp("lengths", tmp_path).assert_refused(r"has no \.parquet file")
    pq.write_table(pa.table({"input_ids": [[1], []]}), tmp_path / "a.parquet")
    raysp("lengths", tmp_path).assert_refused("sequence 1 has 0 tokens; expected at least 1")
    assert raysp("lengths", tmp_path, "--drop-empty").code == 0
    (tmp_path / "a.parquet").write_bytes(b"broken")
    raysp("lengths", tmp_path).assert_refused("expected a complete Parquet file")


def test_prepare_reports_what_it_wrote_and_left_out(raysp, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for name, content in {"a.py": b"x = 1\n", "b.py": b"\xff\xfe\xfa", "c.py": b"", "d.txt": b"no"}.items():
        (source / name).write_bytes(content)
    arguments = ["prepare", source, "--output", tmp_path / "out", "--train-tokenizer", 400, "--include", "*.py"]
    shown = raysp(*arguments)
    assert shown.code == 0
    assert f"{tmp_path / 'out'}: 1 documents, " in shown.out
    assert "the input has too little text for a vocabulary of 400" in shown.out
    assert "left out: 1 undecodable files, for example b.py" in shown.out
    assert "left out: 1 empty documents, for example c.py" in shown.out
    again = raysp(*arguments)
    assert again.code == 0
    assert "is already prepared from this input with these settings" in again.out
    report = json.loads(raysp(*arguments, "--overwrite", "--exclude", "b.py", "--json").out)
    assert (report["already_prepared"], report["info"]["left_out"]["undecodable_files"]) == (False, 0)
    raysp(*arguments).assert_refused("already holds a dataset made from other input or settings")


def test_prepare_refuses_bad_input(raysp, tmp_path):
    output = ["--output", tmp_path / "out"]
    raysp("prepare", tmp_path / "x", *output).assert_refused("x does not exist; expected a folder or a file")
    (tmp_path / "a.txt").write_text("hello")
    raysp("prepare", tmp_path / "a.txt", *output).assert_refused("no tokenizer is given; expected --tokenizer PATH")
    raysp("prepare", tmp_path / "a.txt", *output, "--format", "csv").assert_refused("'csv'; expected auto, text, jsonl")
    raysp("prepare", tmp_path / "a.txt").assert_refused("Missing option '--output'")
    assert not (tmp_path / "out").exists()


def test_doctor_finds_what_is_installed_and_says_how_to_get_the_rest(raysp):
    found = {finding["name"]: finding for finding in json.loads(raysp("doctor", "--json").out)}
    for name in ("Python", "numpy", "HiGHS (solver)", "torch", "ray", "mlflow", "pyarrow", "aten (kernel)"):
        assert found[name]["found"], name
        assert found[name]["remedy"] == ""
    for finding in found.values():
        assert (finding["found"] is None) == bool(finding["remedy"]), finding
    assert {"CUDA", "NCCL", "CBC (solver)", "flash-attn", "flash-attn-4", "liger-kernel"} <= found.keys()
    assert {"fla-core", "Ray token", "transformers", "tokenizers"} <= found.keys()
    shown = raysp("doctor")
    assert shown.code == 0
    assert "torch" in shown.out


def test_doctor_never_shows_the_token(raysp, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "very-secret")
    shown = raysp("doctor", "--json")
    assert "very-secret" not in shown.out
    assert "in RAY_AUTH_TOKEN" in shown.out


def test_doctor_fails_where_something_required_is_missing():
    code = (
        "import sys; from importlib import metadata; real = metadata.version\n"
        "def version(name):\n"
        "    if name in ('torch', 'ray'): raise metadata.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "metadata.version = version\n"
        "from raysp.cli import main; main(['doctor'])\n"
    )
    done = process("-c", code)
    assert done.returncode == 1
    assert "pip install 'raysp[train]'" in done.stdout
    assert "required and missing: torch, aten (kernel), ray; expected all of them" in done.stderr


def test_usage_errors_are_one_line_with_exit_code_2(raysp):
    raysp("plan", "--bogus").assert_refused("No such option: --bogus")
    raysp("frobnicate").assert_refused("No such command 'frobnicate'")
    raysp("plan").assert_refused("Missing option '--lengths'")
    raysp("train").assert_refused("Missing option '--config'")
    raysp("submit", "--config", "x").assert_refused("Missing option '--address'")


def test_train_and_calibrate_refuse_a_missing_configuration(raysp, tmp_path):
    missing = tmp_path / "x.toml"
    raysp("train", "--config", missing).assert_refused("cannot read the configuration")
    raysp("calibrate", "--config", missing, "--output", tmp_path / "o").assert_refused("cannot read the configuration")


def test_calibrate_fits_samples_of_a_file_and_the_model_plans(raysp, lengths_file, tmp_path):
    rows = [
        f"{tokens},{degree},{(1e-9 * tokens**2 + 1e-5 * tokens) / degree + 0.1 + 0.01 * (degree > 1)},{1e5 * tokens / degree}"
        for tokens in (1000, 5000, 20000)
        for degree in (1, 2)
    ]
    (tmp_path / "samples.csv").write_text("\n".join(["lengths,degree,time_s,memory_bytes", *rows]))
    base = ["calibrate", "--samples", tmp_path / "samples.csv", "--output", tmp_path / "new" / "mine.json"]
    known = ["--num-gpus", 2, "--memory-limit-bytes", 1e10, "--model-state-bytes", 0]
    shown = raysp(*base, *known, "--num-heads", 8, "--attention", "ring")
    assert shown.code == 0, shown.err
    assert "measured and fitted" in shown.out
    assert "error 0.0% on average" in shown.out
    model = CostModel.load(tmp_path / "new" / "mine.json")
    assert (model.name, model.attention, model.num_heads) == ("mine", "ring", 8)
    assert model.a1_s_per_token2 == pytest.approx(1e-9)
    assert raysp("plan", "--lengths", lengths_file, "--cost-model", tmp_path / "new" / "mine.json").code == 0


def test_calibrate_refuses_bad_samples_and_options(raysp, tmp_path):
    samples = tmp_path / "samples.csv"
    base = ["calibrate", "--output", tmp_path / "o.json"]
    known = ["--num-gpus", 2, "--memory-limit-bytes", 1e10, "--model-state-bytes", 0, "--bytes-per-token", 1]
    raysp(*base).assert_refused("neither of --config FILE and --samples FILE given")
    raysp(*base, "--config", "x", "--samples", "y").assert_refused("both of --config FILE")
    raysp(*base, "--config", "x", "--num-gpus", 2).assert_refused("--num-gpus goes with --samples")
    raysp(*base, "--samples", samples, "--set", "a=1", *known).assert_refused("--set goes with --config")
    raysp(*base, "--samples", samples, *known[2:]).assert_refused("--samples needs --num-gpus")
    raysp(*base, "--samples", samples, *known).assert_refused("cannot read samples")
    # Times that no length explains.
    rows = "".join(f"{tokens},1,{time_s}\n" for tokens, time_s in ((10, 9), (20, 0.1), (30, 7), (40, 0.2)))
    samples.write_text("lengths,degree,time_s\n" + rows)
    raysp(*base, "--samples", samples, *known).assert_refused("the fit misses the samples by .* on average")
    raysp(*base, "--samples", samples, *known, "--memory-limit-bytes", "nan").assert_refused(
        "memory_limit_bytes is nan"
    )
    assert not (tmp_path / "o.json").exists()


def test_help_shows_every_command_and_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from raysp.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as e: code = e.code\n"
        "heavy = {'torch', 'ray', 'mlflow', 'pyarrow', 'transformers', 'tokenizers', 'pulp', 'matplotlib', 'numba'}\n"
        "print('heavy', sorted(heavy & set(sys.modules)), code)\n"
    )
    done = process("-c", code, env={**os.environ, "COLUMNS": "100"})
    assert done.stdout.rstrip().endswith("heavy [] 0")
    for name in (
        "plan",
        "simulate",
        "validate",
        "explain",
        "prepare",
        "lengths",
        "calibrate",
        "train",
        "submit",
        "doctor",
        "stop",
    ):
        assert re.search(rf"│ {name} ", done.stdout), name


def test_without_arguments_the_help_is_shown_and_python_m_works():
    done = process("-m", "raysp")
    assert done.returncode == 0
    assert "Usage: raysp" in done.stdout


def test_planning_works_without_the_train_extra_and_the_rest_says_what_to_install(lengths_file, tmp_path):
    blocked = (
        "import sys\n"
        "for name in ('torch', 'ray', 'mlflow', 'pyarrow', 'transformers', 'tokenizers', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "from raysp.cli import main; main(sys.argv[1:])\n"
    )
    plan = process("-c", blocked, "plan", "--lengths", str(lengths_file), "--preset", PRESET, "--node-limit", "5")
    assert plan.returncode == 0, plan.stderr
    for arguments, package, extra in (
        (["lengths", str(tmp_path)], "pyarrow", "train"),
        (["prepare", str(tmp_path), "--output", "x"], "tokenizers", "train"),
        (["lengths", str(lengths_file), "--plot", str(tmp_path / "l.png")], "matplotlib", "plot"),
    ):
        done = process("-c", blocked, *arguments)
        assert done.returncode == 2
        assert done.stderr == (
            f"raysp: error: this needs {package}, which is not installed; expected the extra '{extra}'. "
            f"Run pip install 'raysp[{extra}]'.\n"
        )


def test_unexpected_errors_are_one_line_and_a_traceback_on_request(raysp, lengths_file, monkeypatch):
    assert describe_error(KeyError("a\nb")) == ("KeyError: 'a\\nb' (add --debug to see where)", 1)
    assert describe_error(Interrupted("stopped at step 3")) == ("stopped at step 3", 130)
    assert describe_error(RayspError("two\nlines")) == ("two lines", 1)
    arguments = ["plan", "--lengths", lengths_file, "--preset", "nope"]
    raysp(*arguments).assert_refused("unknown preset")
    for debug in (raysp(*arguments, "--debug"), raysp("--debug", *arguments)):
        assert debug.code == 2
        assert "Traceback (most recent call last)" in debug.err
        assert debug.err.splitlines()[-1].startswith("raysp: error: unknown preset")
    monkeypatch.setenv("RAYSP_DEBUG", "1")
    assert "Traceback" in raysp(*arguments).err


def test_a_reader_that_stops_early_is_no_error(lengths_file):
    code = "import sys; from raysp.cli import main; sys.stdin.readline(); main(sys.argv[1:])"
    reader, writer = os.pipe()
    command = [sys.executable, "-c", code, "plan", "--lengths", str(lengths_file), "--preset", PRESET, "--json"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    os.close(reader)
    _, err = child.communicate("go\n", timeout=120)
    assert (child.returncode, err) == (1, "")


def test_ctrl_c_ends_with_130_and_leaves_nothing(raysp, tmp_path):
    for name, copies in (("small", 1), ("large", 20)):
        (tmp_path / name).mkdir()
        for number in range(copies):
            (tmp_path / name / f"{number}.txt").write_text("all work and no play " * 50_000)
    assert raysp("prepare", tmp_path / "small", "--output", tmp_path / "one", "--train-tokenizer", 300).code == 0
    command = [
        "prepare",
        tmp_path / "large",
        "--output",
        tmp_path / "two",
        "--tokenizer",
        tmp_path / "one" / "tokenizer",
    ]
    # Where the tests themselves run in the background, children would inherit that SIGINT is ignored.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from raysp.cli import main; main(sys.argv[1:])"
    )
    arguments = [sys.executable, "-c", code, *command]
    child = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    # The folder in progress appears before the tokenizing of 20 MB, which takes seconds.
    while child.poll() is None and not list(tmp_path.glob(".two.partial-*")):
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=120)
    assert (child.returncode, out) == (130, b"")
    assert sorted(os.listdir(tmp_path)) == ["large", "one", "small"]
