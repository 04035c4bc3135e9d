"""Every results file says when and from what it was drawn, and is marked when that code has changed since."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
from tests.conftest import BENCHMARKS, load_benchmark

drawn = load_benchmark("drawn")
FILES = sorted(file for file in drawn.RESULTS.glob("*.json") if file.stem not in drawn.REGISTERED)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_results_file_says_what_it_was_drawn_from(file: Path) -> None:
    blocks = json.loads(file.read_text(encoding="utf-8"))["drawn"]
    assert blocks
    for block in blocks:
        assert block["date"] and block["commit"] and block["torch"]
        assert set(block["sources"]) == {*drawn.measures(file.stem), "script"}
    assert len({block.get("part") for block in blocks}) == len(blocks)


def test_every_script_writes_its_results_with_their_record() -> None:
    """One that wrote by itself would leave a file that cannot be told from an old one."""
    for script in sorted(BENCHMARKS.glob("*.py")):
        text = script.read_text(encoding="utf-8")
        if "results" not in text or script.name == "drawn.py" or script.name.startswith("draw_"):
            continue
        written = [
            node
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("write_text", "replace")
            and ast.unparse(node.func.value) in ("RESULT", "RESULTS", "target", "temporary")
        ]
        assert not written, f"{script.name}, line {written[0].lineno}: write it with drawn.write"
        assert "drawn.write(" in text, script.name


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda script: script.stem)
def test_what_a_script_imports_is_there(script: Path) -> None:
    """A benchmark is run now and then only, so a name that has moved would long go unnoticed."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tightfit":
            place = drawn.SOURCE.parent.joinpath(*str(node.module).split("."))
            text = (place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).read_text(encoding="utf-8")
            for name in (each.name for each in node.names):  # importing all of it would take half a minute
                found = re.search(rf"\b{name}\b", text) or (place / name).is_dir() or (place / f"{name}.py").exists()
                assert found, f"line {node.lineno}: {node.module} has no {name}"


def test_what_is_measured_is_there() -> None:
    for part in sorted({part for name in drawn.MEASURES for part in drawn.measures(name)}):
        assert drawn.digest(part), f"{part} is measured, and is not in src/tightfit"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    copied = tmp_path / "tightfit"
    shutil.copytree(drawn.SOURCE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    return copied


def _now(name: str) -> dict[str, dict[str, str]]:
    return {"sources": drawn.sources(name)}


def test_a_change_of_measured_code_is_seen(source: Path) -> None:
    block = _now("trainer_step")
    assert drawn.changed(block, "trainer_step", source) == ()
    for part in ("integrations/trainer_step.py", "trace/fake.py", "plan/simulate.py"):
        file = source / part
        before = file.read_text(encoding="utf-8")
        file.write_text(before + "\nLATER = 1\n", encoding="utf-8")
        (found,) = drawn.changed(block, "trainer_step", source)
        assert part.startswith(found)
        file.write_text(before, encoding="utf-8")
    assert drawn.changed(block, "trainer_step", source) == ()
    (source / "trace" / "fresh.py").write_text("NEW = 1\n", encoding="utf-8")
    assert drawn.changed(block, "trainer_step", source) == ("trace",)


def test_a_change_of_other_code_or_of_words_is_none(source: Path) -> None:
    block = _now("trainer_step")
    other = source / "report" / "text.py"
    other.write_text(other.read_text(encoding="utf-8") + "\nLATER = 1\n", encoding="utf-8")
    words = source / "trace" / "fake.py"
    text = words.read_text(encoding="utf-8")
    code = text[text.index("from __future__") :]
    words.write_text(f'"""Said otherwise."""\n\n# a word more\n{code}', encoding="utf-8")
    assert drawn.changed(block, "trainer_step", source) == ()


def test_a_file_without_digests_counts_as_older() -> None:
    assert drawn.changed({"sources": {}}, "planning") == (*drawn.measures("planning"), "script")


def test_what_no_one_declared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="not in MEASURES"):
        drawn.write(tmp_path / "another.json", {})


def test_a_part_that_is_drawn_again_leaves_the_others_record(tmp_path: Path) -> None:
    file = tmp_path / "levers.json"
    drawn.write(file, {"floor": 1, "curves": 1}, parts=["floor", "curves"])
    first = json.loads(file.read_text(encoding="utf-8"))
    first["drawn"][0]["date"] = first["drawn"][1]["date"] = "2026-01-01"
    file.write_text(json.dumps(first), encoding="utf-8")
    drawn.write(file, {"floor": 2, "curves": 1}, parts=["floor"])
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["floor"] == 2
    dates = {block["part"]: block["date"][:10] for block in found["drawn"]}
    assert dates["curves"] == "2026-01-01" != dates["floor"]


def test_the_table_marks_what_is_older(monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    for name in ("planning", "page"):
        drawn.write(results / f"{name}.json", {})
    file = source / "plan" / "choose.py"
    file.write_text(file.read_text(encoding="utf-8") + "\nLATER = 1\n", encoding="utf-8")
    found = drawn.every(results, source)
    monkeypatch.setattr(drawn, "every", lambda: found)
    page, planning = drawn.table().splitlines()[2:]
    assert page.startswith("| `page.json` |") and page.endswith("| no |")
    assert planning.startswith("| `planning.json` |") and planning.endswith("| **yes** |")
