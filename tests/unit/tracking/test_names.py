from pathlib import Path

import pytest

from raysp.tracking.names import resolve_uri, sqlite_path, valid_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("loss", "loss"),
        ("train.seed", "train.seed"),
        ("group/time s:1-2", "group/time s:1-2"),
        ("b[0]", "b_0_"),
        ("recall@5", "recall_5"),
        ("/abs", "abs"),
        ("a//b", "a/b"),
        ("../up", "_/up"),
        (".", "_"),
        ("", "_"),
        ("x" * 300, "x" * 250),
    ],
)
def test_names_become_valid(name, expected):
    assert valid_name(name) == expected
    assert valid_name(expected) == expected


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        (None, "sqlite:////work/dir/mlflow.db"),
        ("sqlite:///runs/a.db", "sqlite:////work/dir/runs/a.db"),
        ("sqlite:///a.db?timeout=5", "sqlite:////work/dir/a.db?timeout=5"),
        ("sqlite:////data/a.db", "sqlite:////data/a.db"),
        ("http://host:5000", "http://host:5000"),
        ("postgresql://host/db", "postgresql://host/db"),
    ],
)
def test_uris_become_absolute(uri, expected):
    assert resolve_uri(uri, folder=Path("/work/dir")) == expected


def test_only_sqlite_files_have_a_path():
    assert sqlite_path("sqlite:////data/a.db") == Path("/data/a.db")
    assert sqlite_path("sqlite:///:memory:") is None
    assert sqlite_path("http://host") is None
