"""Shipped length distributions: samples agree with their tables; splitting keeps tokens; strict JSON."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import LengthDistribution, LengthsError, list_distributions, load_distribution, split_lengths

NAMES = ["long-documents", "pretrain-mix", "prolong", "wikipedia", "wlbllm-128k"]
SCRIPT = Path(__file__).parents[3] / "benchmarks" / "build_distributions.py"


def table(**changes: object) -> LengthDistribution:
    content = {
        "name": "small",
        "num_sequences": 3,
        "mean_tokens": 40.0,
        "source": "here",
        "licence": "CC0-1.0",
        "derivation": "made up",
        "probabilities": (0.0, 0.5, 1.0),
        "lengths": (10, 20, 100),
    }
    return LengthDistribution(**{**content, **changes})


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_distributions", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_names() -> None:
    assert list_distributions() == NAMES
    with pytest.raises(LengthsError, match=r"unknown distribution 'wiki'; expected one of long-documents, .*wlbllm"):
        load_distribution("wiki")


@pytest.mark.parametrize("name", NAMES)
def test_samples_agree_with_the_table_and_with_the_published_mean(name: str) -> None:
    distribution = load_distribution(name)
    lengths = distribution.sample(100_000, seed=0)
    q = np.array([0.05, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999])
    tolerance = np.array([0.03] * 5 + [0.08] * 2)
    assert (np.abs(np.quantile(lengths, q) / distribution.quantile(q) - 1) <= tolerance).all()
    assert distribution.table_mean_tokens == pytest.approx(distribution.mean_tokens, rel=0.003)
    assert lengths.mean() == pytest.approx(distribution.mean_tokens, rel=0.03)
    for tail in distribution.tails:
        longer = lengths[tail.above_tokens < lengths]
        assert len(longer) / len(lengths) == pytest.approx(tail.sequence_share, abs=0.005)
        assert longer.sum() / lengths.sum() == pytest.approx(tail.token_share, abs=0.015)


@pytest.mark.parametrize("name", NAMES)
def test_tables_say_where_they_are_from_and_read_back_as_written(name: str) -> None:
    distribution = load_distribution(name)
    assert distribution.name == name
    assert distribution.licence == "Apache-2.0"
    assert "release" in distribution.source
    assert 200 < len(distribution.lengths) < 400
    assert LengthDistribution.from_json(distribution.to_json()) == distribution


def test_long_documents_are_long_and_histogram_says_what_it_is() -> None:
    assert load_distribution("long-documents").lengths[0] >= 16384
    assert "log-uniform" in load_distribution("pretrain-mix").derivation


def test_quantiles_are_log_linear_between_the_points() -> None:
    assert table().quantile([[0, 0.25], [0.5, 1]]).tolist() == [[10, 14], [20, 100]]
    with pytest.raises(LengthsError, match="outside of 0 to 1"):
        table().quantile(-0.1)


def test_tails_are_the_integral_of_the_quantiles() -> None:
    distribution = table()
    exact = np.exp(np.interp((np.arange(200_000) + 0.5) / 200_000, [0, 0.5, 1], np.log([10, 20, 100])))
    assert distribution.table_mean_tokens == pytest.approx(exact.mean(), rel=1e-6)
    for above in (9, 10, 15, 20, 64, 99, 100):
        tail = distribution.tail(above)
        assert tail.sequence_share == pytest.approx((exact > above).mean(), abs=1e-4)
        assert tail.token_share == pytest.approx(exact[exact > above].sum() / exact.sum(), abs=1e-4)
    assert [tail.above_tokens for tail in distribution.tails] == [16, 32, 64]
    flat = table(lengths=(7, 7, 7))
    assert (flat.table_mean_tokens, flat.tail(6).token_share, flat.tail(7).token_share) == (7, 1, 0)


@given(lengths=st.lists(st.integers(1, 500), max_size=20), max_length=st.integers(1, 100))
def test_split_keeps_the_tokens_in_order(lengths: list[int], max_length: int) -> None:
    by_hand = [
        piece
        for length in lengths
        for piece in [max_length] * ((length - 1) // max_length) + [(length - 1) % max_length + 1]
    ]
    assert split_lengths(lengths, max_length).tolist() == by_hand


def test_sampling_is_repeatable_and_splits_instead_of_dropping() -> None:
    distribution = load_distribution("prolong")
    whole = distribution.sample(1000, seed=7)
    assert (whole == distribution.sample(1000, seed=7)).all()
    assert (whole != distribution.sample(1000, seed=8)).any()
    split = distribution.sample(1000, seed=7, max_length=4096)
    assert (split == split_lengths(whole, 4096)[:1000]).all()
    assert split.max() == 4096
    assert distribution.sample(0, seed=7, max_length=4096).tolist() == []


def test_min_length_draws_from_the_documents_that_have_it() -> None:
    distribution = load_distribution("wikipedia")
    plain = distribution.sample(200_000, seed=1)
    long = distribution.sample(50_000, seed=2, min_length=2000)
    assert long.min() >= 2000
    assert np.median(long) == pytest.approx(np.median(plain[plain >= 2000]), rel=0.03)
    assert (distribution.sample(500, seed=3, min_length=1) == distribution.sample(500, seed=3)).all()


def test_bad_draws_are_refused() -> None:
    for keywords, message in (
        ({"num": -1}, "cannot draw -1"),
        ({"num": 1, "max_length": 0}, "max_length is 0"),
        ({"num": 1, "min_length": 101}, "longest document of small has 100"),
    ):
        with pytest.raises(LengthsError, match=message):
            table().sample(seed=0, **keywords)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (10, 20)}, "3 probabilities and 2 lengths"),
        ({"probabilities": (0.0, 0.0, 1.0)}, "ascend from 0 to 1"),
        ({"probabilities": (0.0, 0.5, 0.9)}, "ascend from 0 to 1"),
        ({"lengths": (10, 9, 100)}, "must not descend"),
        ({"lengths": (0, 9, 100)}, "at least 1"),
    ],
)
def test_malformed_tables_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(LengthsError, match=message):
        table(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 9}, "schema_version 9; expected 1"),
        ({"extra": 1}, "unknown key"),
        ({"source": ""}, "non-empty string"),
        ({"quantiles": [[0, 1, 2]]}, r"quantiles\[0\] has 3 values"),
        ({"quantiles": [[0, 1.5]]}, "integer"),
    ],
)
def test_malformed_json_is_refused(changes: dict, message: str) -> None:
    content = json.loads(table().to_json())
    content.update(changes)
    with pytest.raises(LengthsError, match=message):
        LengthDistribution.from_json(json.dumps(content))


def test_builder_makes_tables_of_files_the_same_each_time(builder: ModuleType, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name in ("wikipedia", "wlbllm_128k", "prolong"):
        lengths = np.exp(generator.normal(8, 1.2, 5000)).astype(int) + 1
        (tmp_path / f"{name}.txt").write_text("".join(f"{length}\n" for length in lengths))
    with (tmp_path / "pretrain_histogram.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("range", "number"), ("[0, 10]", 100), ("[11, 1000]", 300)])
    first, again = (builder.build(tmp_path) for _ in range(2))
    assert sorted(distribution.name for distribution in first) == NAMES
    assert [a.to_json() for a in first] == [b.to_json() for b in again]
    prolong = next(distribution for distribution in first if distribution.name == "prolong")
    lengths = np.loadtxt(tmp_path / "prolong.txt", dtype=int)
    assert prolong.mean_tokens == pytest.approx(lengths.mean())
    assert prolong.table_mean_tokens == pytest.approx(lengths.mean(), rel=0.01)
    assert (prolong.lengths[0], prolong.lengths[-1]) == (lengths.min(), lengths.max())
    mix = next(distribution for distribution in first if distribution.name == "pretrain-mix")
    assert mix.quantile([0.25, 1]).tolist() == [10, 1000]
    assert mix.mean_tokens == pytest.approx(0.25 * 9 / np.log(10) + 0.75 * 990 / np.log(100))
