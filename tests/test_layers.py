"""The layers hold: planning and reporting need no torch, and nothing is imported from below.

Two proofs. The dynamic one imports each no-torch module in a process where torch cannot be imported; a module
that is missing fails. The static one reads every import statement of the package, those inside functions and
under `TYPE_CHECKING` too, and refuses an import of a lower line and a module that has no line yet.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "tightfit"

# From the ground up. A module may import its own line and the lines before it.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"core"}),
    frozenset({"catalog", "cost", "allocator", "unroll", "settings", "stdout"}),
    frozenset({"plan"}),
    frozenset({"report"}),
    frozenset({"parallel", "ranks", "step", "loss", "tiles", "fake", "trace", "units", "engine"}),
    frozenset({"verify", "measure", "fitting", "switches"}),
    frozenset({"integrations", "recipe", "train", "forecast", "doctor"}),
    frozenset({"cli", "__main__"}),
)
LINE = {module: line for line, modules in enumerate(LAYERS) for module in modules}
FIRST_TORCH_LINE = LINE["trace"]
# `tightfit` itself re-exports verbs of every layer up to `verify`, so only the lines after that may use it.
ROOT_LINE = LINE["verify"]

NO_TORCH = [
    "tightfit",
    *(f"tightfit.{name}" for name in ("core", "cost", "catalog", "allocator", "unroll", "plan", "report")),
]

IMPORT_WITHOUT_TORCH = """
import importlib, importlib.abc, pkgutil, sys

class NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError(f"{name} was imported by a module that must not need torch")
        return None

sys.meta_path.insert(0, NoTorch())
sys.modules["torch"] = None
module = importlib.import_module(sys.argv[1])
assert module.__file__, f"{sys.argv[1]} is an empty folder"
if sys.argv[1] != "tightfit":  # the package's own children include the torch side
    for child in pkgutil.walk_packages(getattr(module, "__path__", ()), module.__name__ + "."):
        importlib.import_module(child.name)
assert sys.modules["torch"] is None
"""


@pytest.mark.parametrize("module", NO_TORCH)
def test_imports_without_torch(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT_TORCH, module], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_block_on_torch_works() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT_TORCH, "torch.nn"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0


def first_part(path: Path) -> str:
    """`plan` for both plan/program.py and plan/__init__.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line number, dotted name) of everything that `source`, a module inside `package`, imports anywhere."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def offences(source: str, layer: str, package: str = "tightfit") -> list[str]:
    """What `source`, a module of `layer`, imports against the order."""
    found = []
    for number, name in imports(source, package):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if top == "torch" and LINE[layer] < FIRST_TORCH_LINE:
            found.append(f"{number}: {layer} is planned without torch but imports {name}")
        if top != "tightfit" or (target.startswith("__") and target != "__main__"):  # e.g. tightfit.__version__
            continue
        if LINE.get(target, ROOT_LINE) > LINE[layer] or (target not in LINE and LINE[layer] <= ROOT_LINE):
            found.append(f"{number}: {layer} imports {name} from below")
    return found


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_module_has_its_line() -> None:
    here = {first_part(path) for path in SOURCES}
    assert here <= LINE.keys(), f"say in LAYERS where {sorted(here - LINE.keys())} belong"
    assert here >= LINE.keys() - {"__main__"}, f"in LAYERS but not in src: {sorted(LINE.keys() - here)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_is_imported_from_below(path: Path) -> None:
    layer = first_part(path)
    if layer not in LINE:
        pytest.fail(f"say in LAYERS where {layer} belongs")
    package = ".".join(("tightfit", *path.relative_to(PACKAGE).parts[:-1]))
    found = offences(path.read_text(encoding="utf-8"), layer, package)
    assert not found, "\n".join(f"{path}:{offence}" for offence in found)


@pytest.mark.parametrize(
    ("source", "layer", "refused"),
    [
        ("from tightfit.core import Plan", "plan", False),
        ("from tightfit.plan.program import recipe", "engine", False),
        ("from tightfit.trace import trace", "plan", True),
        ("from tightfit import trace", "plan", True),
        ("def f():\n    import tightfit.verify", "engine", True),
        ("from tightfit import __version__", "core", False),
        ("import tightfit", "measure", True),
        ("import tightfit", "train", False),
        ("from tightfit import fit", "cli", False),
        ("import tightfit.cli", "train", True),
        ("from .. import cli", "plan", True),
        ("from ..core import Plan", "plan", False),
        ("from . import frontier", "plan", False),
        ("import torch.nn", "report", True),
        ("from torch import nn", "engine", False),
        ("import torchvision", "plan", False),
    ],
)
def test_the_static_check(source: str, layer: str, refused: bool) -> None:
    package = "tightfit.plan" if layer == "plan" else "tightfit"
    assert bool(offences(source, layer, package)) is refused
