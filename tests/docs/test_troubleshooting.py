"""docs/troubleshooting.md is about messages that exist: each of them is found in the source, each error has a part.

A documented message stands in a line of its own, **`in bold code`**, with … for what varies; the source's f-strings are
read with … for their braces.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
MESSAGE = re.compile(r"\*\*`(.+)`\*\*")
ERROR = re.compile(r"class ([A-Z]\w*)\((?:TightfitError|InvalidInput|Unsupported|OutOfMemory)\b")


def said(node: ast.expr) -> str:
    """The text of a string expression, … where it depends on something."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(said(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return "…"


@functools.cache  # parsing the whole source takes seconds
def messages_of_the_source() -> tuple[str, ...]:
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Constant, ast.JoinedStr)) and (text := said(node)).strip("… "):
                found.append(text)
    return tuple(found)


def documented() -> list[str]:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return [match[1] for line in lines if (match := MESSAGE.fullmatch(line))]


def is_said(message: str, source: tuple[str, ...]) -> bool:
    """Do the fixed words of `message` stand in one string of the source, in order and next to what varies?"""
    pattern = re.compile("…*".join(re.escape(part) for part in re.split("…+", message)))
    return any(pattern.search(text) for text in source)


def test_there_are_messages() -> None:
    assert len(documented()) > 40


@pytest.mark.parametrize("message", documented())
def test_message_is_in_the_source(message: str) -> None:
    assert is_said(message, messages_of_the_source()), f"no string of src/ says: {message}"


def test_a_message_that_nobody_says_is_found_out() -> None:
    source = messages_of_the_source()
    assert is_said("a budget of … cannot hold this step", source)
    assert not is_said("a budget of … cannot hold that step", source)
    assert not is_said("a budget of … cannot … hold this step", source)


def test_every_error_has_a_part() -> None:
    errors = {name for path in (ROOT / "src").rglob("*.py") for name in ERROR.findall(path.read_text(encoding="utf-8"))}
    parts = set(re.findall(r"(?m)^## (\w+)$", PAGE.read_text(encoding="utf-8")))
    assert "BudgetInfeasible" in errors
    assert errors <= parts, f"no part about {sorted(errors - parts)}"


def test_every_lever_is_told() -> None:
    from tightfit.core import Lever

    text = (ROOT / "docs" / "levers.md").read_text(encoding="utf-8")
    missing = [lever.value for lever in Lever if f"| `{lever.value}` |" not in text]
    assert not missing, missing
