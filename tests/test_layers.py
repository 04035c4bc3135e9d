"""The layers hold: planning and reporting need no torch, nothing is imported from above, and nothing in a circle.

Two proofs. The dynamic one imports each torch-free module in a process where torch cannot be imported; a module
that is missing fails. The static one reads every import statement of the package, those inside functions and
under `TYPE_CHECKING` too. It refuses an import of a higher layer, a circle of modules, and a package that has no layer
yet. What `levers.defined` looks up by name is not seen by it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "tightfit"

SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def dotted(path: Path) -> str:
    """`plan.program` for plan/program.py, `plan` for plan/__init__.py."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = frozenset(map(dotted, SOURCES))

# From the ground up. A module may import from its own package and from the layers before it.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"core"}),
    frozenset({"catalog", "device"}),
    frozenset({"accelerator"}),
    frozenset({"step"}),
    frozenset({"levers"}),
    frozenset({"plan"}),
    frozenset({"report"}),
    frozenset({"trace"}),
    frozenset({"engine"}),
    frozenset({"verify"}),
    frozenset({"fitting"}),
    frozenset({"integrations"}),
    frozenset({"train", "forecast"}),
    frozenset({"doctor"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
LINE = {package: line for line, packages in enumerate(LAYERS) for package in packages}
# `tightfit` itself re-exports verbs of every layer up to `fitting`, so only the layers after that may use it.
ROOT_LINE = LINE["fitting"]

# What can be imported, and used, where torch is not installed: packages, and modules of packages that are not.
TORCH_FREE_PACKAGES = frozenset({"core", "catalog", "device", "plan", "report"})
TORCH_FREE_MODULES = (
    "levers",
    "levers.interface",
    "levers.without",
    "levers.recompute",
    "levers.loss_in_place",
    "levers.tile",
    "levers.nest",
    "levers.offload",
    "trace.unroll",
)
NO_TORCH = ["tightfit", *(f"tightfit.{name}" for name in (*sorted(TORCH_FREE_PACKAGES), *TORCH_FREE_MODULES))]

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
if sys.argv[2] == "whole":
    for child in pkgutil.walk_packages(getattr(module, "__path__", ()), module.__name__ + "."):
        importlib.import_module(child.name)
assert sys.modules["torch"] is None
"""


@pytest.mark.parametrize("module", NO_TORCH)
def test_imports_without_torch(module: str) -> None:
    whole = "whole" if module.removeprefix("tightfit.") in TORCH_FREE_PACKAGES else "alone"
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT_TORCH, module, whole], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_block_on_torch_works() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_WITHOUT_TORCH, "torch.nn", "alone"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0


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


def is_torch_free(module: str) -> bool:
    """`module`: dotted, without `tightfit`."""
    return module.partition(".")[0] in TORCH_FREE_PACKAGES or module in TORCH_FREE_MODULES


def offences(source: str, module: str, package: str) -> list[str]:
    """What `source`, the module of that name in `package`, imports against the order."""
    found = []
    layer = module.partition(".")[0]
    for number, name in imports(source, package):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if top == "torch" and is_torch_free(module):
            found.append(f"{number}: {module} works without torch but imports {name}")
        if top != "tightfit" or (target.startswith("__") and target != "__main__"):  # e.g. tightfit.__version__
            continue
        if LINE.get(target, ROOT_LINE) > LINE[layer] or (target not in LINE and LINE[layer] <= ROOT_LINE):
            found.append(f"{number}: {module} imports {name} from above")
        elif layer in TORCH_FREE_PACKAGES and target in LINE and not torch_free_target(rest):
            found.append(f"{number}: {module} works without torch but imports {name}, which does not")
    return found


def torch_free_target(name: str) -> bool:
    """`name`: a module, or something in one."""
    return is_torch_free(name if name in MODULES else name.rpartition(".")[0])


def test_every_package_has_its_layer() -> None:
    here = {dotted(path).partition(".")[0] for path in SOURCES}
    assert here <= LINE.keys(), f"say in LAYERS where {sorted(here - LINE.keys())} belong"
    assert here >= LINE.keys(), f"in LAYERS but not in src: {sorted(LINE.keys() - here)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_is_imported_from_above(path: Path) -> None:
    module = dotted(path)
    if module.partition(".")[0] not in LINE:
        pytest.fail(f"say in LAYERS where {module} belongs")
    package = ".".join(("tightfit", *path.relative_to(PACKAGE).parts[:-1]))
    found = offences(path.read_text(encoding="utf-8"), module, package)
    assert not found, "\n".join(f"{path}:{offence}" for offence in found)


def circle(reached: dict[str, set[str]]) -> list[str]:
    """Modules that import one another, in order; empty where there are none."""
    done: set[str] = set()

    def search(module: str, way: list[str]) -> list[str]:
        if module in way:
            return way[way.index(module) :]
        if module not in done:
            for target in sorted(reached.get(module, ())):
                if found := search(target, [*way, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in sorted(reached) if (found := search(module, []))), [])


def test_there_are_no_circles() -> None:
    known = {f"tightfit.{dotted(path)}": path for path in SOURCES}
    reached: dict[str, set[str]] = {}
    for module, path in known.items():
        package = ".".join(("tightfit", *path.relative_to(PACKAGE).parts[:-1]))
        names = {name for _, name in imports(path.read_text(encoding="utf-8"), package)}
        found = {name if name in known else name.rpartition(".")[0] for name in names}
        reached[module] = (found & known.keys()) - {module}
    found = circle(reached)
    assert not found, " imports ".join([*found, found[0]])


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_no_module_grows_beyond_what_one_reader_can_hold() -> None:
    """Longer ones say in their docstring why they are one thing."""
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        lines = len(text.splitlines())
        said = ast.get_docstring(ast.parse(text)) or ""
        assert lines <= 600 or "One thing because" in said, f"{path}: {lines} lines"


def test_no_class_does_either() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                said = ast.get_docstring(node) or ""
                assert lines <= 200 or "One thing because" in said, f"{path}: {node.name} has {lines} lines"


@pytest.mark.parametrize(
    ("source", "module", "refused"),
    [
        ("from tightfit.core import Plan", "plan.ways", False),
        ("from tightfit.plan.program import recipe", "engine.tape", False),
        ("from tightfit.trace import trace", "plan.ways", True),
        ("from tightfit import trace", "plan.ways", True),
        ("def f():\n    import tightfit.verify", "engine.tape", True),
        ("from tightfit import __version__", "core.sizes", False),
        ("import tightfit", "verify.measure", True),
        ("import tightfit", "train.run", False),
        ("from tightfit import fit", "cli.plan", False),
        ("import tightfit.cli", "train.run", True),
        ("from .. import cli", "plan.ways", True),
        ("from ..core import Plan", "plan.ways", False),
        ("from . import frontier", "plan.ways", False),
        ("import torch.nn", "report.text", True),
        ("import torch", "levers.tile", True),
        ("import torch", "levers.tile.head", False),
        ("from tightfit.step.run import call", "plan.ways", True),
        ("from tightfit.levers.tile import force", "plan.ways", True),
        ("from tightfit.levers.tile.head import HeadCall", "plan.ways", True),
        ("from tightfit.levers.interface import Grant", "plan.ways", False),
        ("from torch import nn", "engine.tape", False),
        ("import torchvision", "plan.ways", False),
    ],
)
def test_the_static_check(source: str, module: str, refused: bool) -> None:
    package = f"tightfit.{module}".rpartition(".")[0]
    assert bool(offences(source, module, package)) is refused
