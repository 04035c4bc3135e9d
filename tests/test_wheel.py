"""The wheel has what the program needs besides its modules and nothing of the tests; what it lacks names its extra."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import tightfit
from tightfit.cli.program import EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

#: Imported at the start of a process: it hides what a base install does not bring.
BARE = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {sorted(EXTRAS)!r} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build", reason="the package build is not installed (it is in the extra dev)")
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def test_what_is_in_the_wheel(built: Path) -> None:
    names = set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())
    for source in (ROOT / "src" / "tightfit").rglob("*"):
        if source.is_file() and "__pycache__" not in source.parts:
            assert f"tightfit/{source.relative_to(ROOT / 'src' / 'tightfit').as_posix()}" in names
    for needed in ("catalog/gpus.toml", "catalog/models.toml", "report/page.html", "py.typed"):
        assert f"tightfit/{needed}" in names
    assert all(name.startswith(("tightfit/", "tightfit-")) for name in names)


def test_what_is_in_the_sdist(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in (
        "pyproject.toml", "README.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "constraints.txt",
        "tests/test_wheel.py",
    ):  # fmt: skip
        assert needed in names


def brought_by(extra: str) -> set[str]:
    """The packages that an extra brings besides the base install."""
    found: set[str] = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        name = re.split(r"[<>=\[ ]", requirement)[0]
        if name == "tightfit":
            found = found.union(*map(brought_by, requirement.partition("[")[2].rstrip("]").split(",")))
        else:
            found.add(name)
    return found


def test_every_command_is_in_the_extra_all() -> None:
    for extra in set(PROJECT["optional-dependencies"]) - {"all", "dev", "docs"}:
        assert brought_by(extra) <= brought_by("all")
    assert brought_by("transformers") | brought_by("peft") <= brought_by("trl")  # `train` names that one alone


def test_every_import_of_what_a_base_install_lacks_names_its_extra() -> None:
    imported: set[str] = set()
    plug_ins = {"axolotl.py"}  # imported by the tool that they are for, which brings what they need
    for path in (ROOT / "src").rglob("*.py"):
        if path.name in plug_ins:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    base = {re.split(r"[<>=\[ ]", requirement)[0] for requirement in PROJECT["dependencies"]}
    assert imported - sys.stdlib_module_names - base - {"tightfit"} == set(EXTRAS)
    for extra in EXTRAS.values():
        assert brought_by(extra)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("plan gpt2", "tightfit plan needs the package transformers, which is not installed: pip install "
         "'tightfit[transformers]'"),
        ("train", "tightfit train needs the package transformers, which is not installed: pip install 'tightfit[trl]'"),
        ("doctor run.yaml", "reading a run's YAML needs the package pyyaml (No module named 'yaml'): pip install "
         "'tightfit[trl]'"),
        pytest.param("check gpt2", "pip install 'tightfit[transformers]'", marks=pytest.mark.slow),
        pytest.param("measure gpt2", "pip install 'tightfit[transformers]'", marks=pytest.mark.slow),
        pytest.param("doctor gpt2", "pip install 'tightfit[transformers]'", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_base_install_names_the_extra(asked: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BARE)
    (tmp_path / "run.yaml").write_text("max_length: 8\n")
    path = os.pathsep.join([str(tmp_path), str(Path(tightfit.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-m", "tightfit", *asked.split()], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("tightfit: ") and line.endswith(said)


def test_the_release_workflow_builds_tests_and_publishes() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    jobs = workflow["jobs"]
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML reads the key `on` as true
    assert jobs["publish"]["needs"] == "test" and jobs["test"]["needs"] == "build"
    assert jobs["publish"]["permissions"] == {"id-token": "write"} and jobs["publish"]["environment"] == "release"
