"""YAML files of settings: what is wrong with one is told in one line that says where, by `train` and by `doctor`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tightfit.core import InvalidInput
from tightfit.doctor.run import read_run
from tightfit.train.recipe import read_config
from tightfit.train.settings import read_yaml


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("seed: 1\nlr: 2\nseed: 3\n", "'seed' twice (lines 1 and 3)"),
        ("a:\n  - b: 1\n    'b': 2\n", "'b' twice (lines 2 and 3)"),
        ('{"a": 1, "a": 2}', "'a' twice (lines 1 and 1)"),
    ],
)
def test_a_key_that_stands_twice_is_refused(text: str, lines: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    for read in (read_config, read_run):
        with pytest.raises(InvalidInput) as error:
            read(path)
        assert str(error.value) == f"{str(path)!r} gives {lines}: keep one of them"


def test_what_is_no_repetition_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "base: &base {x: 1, y: 2}\nmid: &mid {<<: *base, x: 3}\ntop: {<<: *mid, <<: *base, y: 4}\n1: one\n'1': text\n"
    )
    found = read_yaml(tmp_path / "run.yaml", "config")
    assert found["mid"] == {"x": 3, "y": 2} and found["top"]["y"] == 4 and found[1] == "one" and found["1"] == "text"


@contextlib.contextmanager
def usual_recursion_limit() -> Iterator[None]:
    """Python's own, which libraries that other tests import may have raised."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nmax_steps: 9999-99-99\n", "has '9999-99-99' in line 2, which YAML takes for a date that it is not"),
        ("a: !!int ''\n", "has '' in line 1, which YAML takes for a whole number"),
        ("a: !!timestamp x\n", "has 'x' in line 1, which YAML takes for a date"),
        ("a: !!bool x\n", "has 'x' in line 1, which YAML takes for true or false"),
        ("a: 1\n---\nb: 2\n", "holds several YAML documents (another begins in line 2): keep one in a file"),
        ("a: 1\n\tb: 2\n", "is not YAML (line 2): found character"),
        ("a: 1\nb: \x01\n", "is not YAML (line 2): special characters are not allowed"),
        ("a: !!python/object/apply:os.getcwd []", "is not YAML (line 1): could not determine a constructor"),
        ("[" * 500, "is nested too deep"),
        ("é", "is not UTF-8 text (byte 0): save it as UTF-8"),
    ],
)
def test_what_is_no_settings_is_told_with_its_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode("latin-1"))
    for read in (read_config, read_run):
        with pytest.raises(InvalidInput) as error, usual_recursion_limit():
            read(path)
        assert said in str(error.value) and repr(str(path)) in str(error.value) and "\n" not in str(error.value)
