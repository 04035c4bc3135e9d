"""The wheel has what the program needs besides its modules, and nothing of the tests."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    for needed in ("pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt", "tests/test_wheel.py"):
        assert needed in names


def test_every_command_is_in_the_extra_all() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (whole,) = extras["all"]
    for extra in set(extras) - {"all", "dev", "docs"}:
        assert extra in whole


def test_the_release_workflow_builds_tests_and_publishes() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    jobs = workflow["jobs"]
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML reads the key `on` as true
    assert jobs["publish"]["needs"] == "test" and jobs["test"]["needs"] == "build"
    assert jobs["publish"]["permissions"] == {"id-token": "write"} and jobs["publish"]["environment"] == "release"
