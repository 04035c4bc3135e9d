"""The engine on a card that does not exist (`tests/pretend`): a second device on the host, which has memory, queues,
random numbers and a backward thread of its own, and is as late with its copies as the rules of streams allow.

The cases run in one process of their own: torch has one accelerator in a process, and starts its backward threads once.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PRETEND = Path(__file__).parents[1] / "pretend"
CASES = [
    node.name
    for node in ast.parse((PRETEND / "cases.py").read_text()).body
    if isinstance(node, ast.FunctionDef) and any(getattr(d, "id", "") == "case" for d in node.decorator_list)
]


@pytest.fixture(scope="module")
def tried() -> dict[str, dict[str, Any]]:
    sys.path.insert(0, str(PRETEND))
    try:
        import device
    finally:
        sys.path.remove(str(PRETEND))
    if reason := device.why_not():
        pytest.skip(reason)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(
        [sys.executable, str(PRETEND / "cases.py")], capture_output=True, text=True, timeout=1800, env=environment,
        check=False,
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert rows, done.stderr[-3000:]
    return {row["case"]: {**row, "stderr": done.stderr} for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_on_the_pretend_card(name: str, tried: dict[str, dict[str, Any]]) -> None:
    assert name in tried, f"the process ended before it: {next(iter(tried.values()))['stderr'][-3000:]}"
    assert not tried[name]["error"], tried[name]["error"]


def test_there_are_cases() -> None:
    assert len(CASES) >= 20
