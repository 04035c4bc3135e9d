"""YAML files of settings: a key that stands twice is an error that says where."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tightfit.core import InvalidInput
from tightfit.doctor.run import read_run
from tightfit.train.recipe import read_config
from tightfit.train.settings import parse_yaml


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


def test_what_is_no_repetition_is_read() -> None:
    text = (
        "base: &base {x: 1, y: 2}\nmid: &mid {<<: *base, x: 3}\ntop: {<<: *mid, <<: *base, y: 4}\n1: one\n'1': text\n"
    )
    found = parse_yaml(text, "a file")
    assert found["mid"] == {"x": 3, "y": 2} and found["top"]["y"] == 4 and found[1] == "one" and found["1"] == "text"


def test_nothing_runs() -> None:
    with pytest.raises(yaml.YAMLError):
        parse_yaml("a: !!python/object/apply:os.getcwd []", "a file")
