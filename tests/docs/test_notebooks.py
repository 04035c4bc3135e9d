"""The notebooks of examples/ are executed on the CPU as they are, cell by cell, by plain Python: no Jupyter is needed.

A cell's last expression is shown as a notebook shows it, by its HTML where it has one. A line that begins with `%` is
no Python, so a cell may have one only behind a `#`. No outputs are kept in the repository: they would go stale unseen.
The fast tests look at the format, and whether tightfit has what the cells call.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))

#: Reads (name, source) of the code cells and runs them in one namespace.
RUNNER = """
import ast, json, linecache, sys

names = {"__name__": "__main__"}
for name, source in json.load(sys.stdin):
    print(f"--- {name}", flush=True)
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # for tracebacks
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), names)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), name, "eval"), names)
        html = getattr(value, "_repr_html_", None)
        if value is not None:
            print(repr(value) if html is None else html())
"""


def read(path: Path) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def faults(notebook: dict[str, Any]) -> list[str]:
    """What is not as the notebook format 4.5 has it, and outputs. Source: nbformat's v4 JSON schema."""
    found = [] if (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5) else ["not of the format 4.5"]
    found += [f"no {name}" for name in ("metadata", "cells") if name not in notebook]
    ids = [cell.get("id", "") for cell in notebook["cells"]]
    if len(set(ids)) != len(ids) or not all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", each) for each in ids):
        found.append("cells without ids of their own")
    keys = {"cell_type", "id", "metadata", "source"}
    for cell in notebook["cells"]:
        code = cell["cell_type"] == "code"
        if set(cell) != keys | ({"execution_count", "outputs"} if code else set()):
            found.append(f"{cell['id']}: keys {sorted(cell)}")
        if not all(line.endswith("\n") for line in cell["source"][:-1]):
            found.append(f"{cell['id']}: lines that run into each other")
        if code and (cell["outputs"] or cell["execution_count"] is not None):
            found.append(f"{cell['id']}: outputs; clear them before you commit")
    return found


def executed(notebook: dict[str, Any], folder: Path) -> str:
    """What the code cells print. Fails with the traceback of the cell that does not run."""
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps(cells_of(notebook)), cwd=folder, capture_output=True,
        text=True, timeout=600, env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def cells_of(notebook: dict[str, Any]) -> list[tuple[str, str]]:
    """(id, source) of each code cell."""
    return [(cell["id"], "".join(cell["source"])) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def stale_calls(notebook: dict[str, Any]) -> list[str]:
    """What the cells import of tightfit and it does not have, and the calls that its functions would not take."""
    tree = ast.parse("\n".join(source for _, source in cells_of(notebook)))
    imported: dict[str, Any] = {"tightfit": importlib.import_module("tightfit")}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "tightfit":
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if hasattr(module, alias.name):
                    imported[alias.name] = getattr(module, alias.name)
                else:
                    found.append(f"{node.module} has no {alias.name}")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        try:
            called = eval(ast.unparse(node.func), dict(imported))
        except (NameError, AttributeError):  # not of tightfit, or reported above; a method of a cell's own object
            if ast.unparse(node.func).startswith("tightfit."):
                found.append(f"there is no {ast.unparse(node.func)}")
            continue
        if inspect.isbuiltin(called) or str(getattr(called, "__module__", "")).split(".")[0] != "tightfit":
            continue
        try:
            inspect.signature(called).bind(*node.args, **{str(each.arg): each.value for each in node.keywords})
        except TypeError as error:
            found.append(f"{ast.unparse(node)}: {error}")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_calls_what_there_is(path: Path) -> None:
    assert not stale_calls(read(path))


def test_a_call_that_is_none_is_found() -> None:
    def found(source: str) -> list[str]:
        return stale_calls({"cells": [{"cell_type": "code", "id": "a", "source": [source]}]})

    assert not found("from tightfit.core import parse_bytes\nparse_bytes('1GiB', whole_bytes=3)\nprint(3)")
    assert found("from tightfit.core import parse_sizes") == ["tightfit.core has no parse_sizes"]
    assert found("from tightfit.core import parse_bytes\nparse_bytes('1GiB', whole=3)")
    assert found("import tightfit\ntightfit.fitt(1)") == ["there is no tightfit.fitt"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_of_the_format_and_without_outputs(path: Path) -> None:
    assert not faults(read(path))


@pytest.mark.slow  # docs/testing.md names the fast tests of the same faults
def test_the_colab_notebook_trains_within_its_budget(tmp_path: Path) -> None:
    (path,) = (each for each in NOTEBOOKS if each.name == "colab.ipynb")
    said = executed(read(path), tmp_path)
    assert "there is no card to cap" in said
    assert re.search(r"gradients.*identical", said)
    budget, predicted, highest = map(
        lambda text: int(text.replace(",", "")),
        re.search(r"budget ([\d,]+) B, predicted ([\d,]+) B, highest step ([\d,]+) B", said).groups(),  # type: ignore[union-attr]
    )
    assert predicted <= budget and highest <= budget * 1.005
    first, last = map(float, re.search(r"loss ([\d.]+) at first, ([\d.]+) after", said).groups())  # type: ignore[union-attr]
    assert last < first
    assert "<table><tr><th>plan</th>" in said  # the plan in force, as a notebook shows it
    assert (tmp_path / "adapters" / "adapter_model.safetensors").is_file()


def test_a_broken_cell_is_found_and_named(tmp_path: Path) -> None:
    def notebook(second: str) -> dict[str, Any]:
        return {
            "cells": [
                {"cell_type": "code", "id": "first", "source": ["x = 1\n", "x"]},
                {"cell_type": "markdown", "id": "prose", "source": ["no Python"]},
                {"cell_type": "code", "id": "second", "source": [second]},
            ]
        }

    assert executed(notebook("assert x == 1"), tmp_path) == "--- first\n1\n--- second\n"
    with pytest.raises(AssertionError, match='File "second", line 1'):
        executed(notebook("assert x == 2"), tmp_path)


def test_outputs_and_a_wrong_format_are_found() -> None:
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": ["1"], "execution_count": None, "outputs": []}
    good = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [cell]}
    assert not faults(good)
    assert faults({**good, "nbformat_minor": 4})
    assert faults({**good, "cells": [cell, cell]})
    assert faults({**good, "cells": [{**cell, "execution_count": 3}]})
    assert faults({**good, "cells": [{**cell, "source": ["x = 1", "y = 2"]}]})
    assert faults({**good, "cells": [{**cell, "extra": 1}]})
