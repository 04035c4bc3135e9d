"""What the pages about the source name in it is there, in the file that they say."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "tightfit"
PAGES = ("docs/architecture.md", "docs/stability.md", "CONTRIBUTING.md")

CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"[\w/.]+\.(?:py|toml|md|svg|yml|txt|json)")
NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)?")
#: What runs and plans write, and no file or name of the source.
WRITTEN = frozenset({"plan.json", "record.json", "schema_version"})
PLACED = re.compile(r"`([A-Za-z_][\w.]*)`\s+\(`([\w/]+\.py)`\)")


@functools.cache
def defined(path: Path) -> frozenset[str]:
    """Functions, classes, methods and fields as `Class.name`, and names that are assigned, in one file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    found.add(f"{node.name}.{member.name}")
                elif isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
                    found |= {f"{node.name}.{member.target.id}", member.target.id}
                elif isinstance(member, ast.Assign):
                    names = {target.id for target in member.targets if isinstance(target, ast.Name)}
                    found |= {f"{node.name}.{name}" for name in names} | names
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(found)


def known() -> set[str]:
    files = [*sorted(SOURCE.rglob("*.py")), ROOT / "docs" / "generate.py"]
    packages = {path.name for path in SOURCE.iterdir() if path.is_dir()} | {"tightfit"}
    return packages.union(*map(defined, files)) | {path.stem for path in files}


def place(name: str) -> Path | None:
    """The file that a page means: seen from the package, the checkout, or one of its folders with tests and docs."""
    folders = (SOURCE, ROOT, SOURCE / "catalog", ROOT / "docs", ROOT / "benchmarks")
    return next((folder / name for folder in folders if (folder / name).exists()), None)


@pytest.mark.parametrize("page", PAGES)
def test_names_and_files_are_there(page: str) -> None:
    text = re.sub(r"(?ms)^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"))
    wrong = [
        name for name in CODE.findall(text) if FILE.fullmatch(name) and name not in WRITTEN and place(name) is None
    ]
    names = known()
    looked_up = [name for name in CODE.findall(text) if NAME.fullmatch(name) and not FILE.fullmatch(name)]
    wrong += [name for name in looked_up if name not in names and ("_" in name or "." in name) and not is_other(name)]
    assert not wrong, wrong
    for name, file in PLACED.findall(text):
        path = place(file)
        assert path is not None and name.removeprefix("tightfit.") in defined(path), f"{file} defines no {name}"


def is_other(name: str) -> bool:
    """`tightfit.core` and the like, a name of another library, or one of the page's own examples."""
    first, _, rest = name.partition(".")
    return (
        name in WRITTEN or first in ("torch", "transformers", "my_lever") or (first == "tightfit" and rest in known())
    )


def test_every_walk_names_its_files() -> None:
    walks = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").split("\n## What happens in ")[1:]
    assert len(walks) == 3
    assert all(len(PLACED.findall(walk)) >= 5 for walk in walks)
