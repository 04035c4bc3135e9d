"""When a results file was drawn, from which code, and whether that code has changed since.

    python benchmarks/drawn.py                       # a table of all results; names the packages that changed
    python benchmarks/drawn.py stamp measure_gpt2    # a file that a command wrote, just now, gets its record

Idea: `MEASURES` says which parts of `src/tightfit` each results file measures. `write` puts a digest of each of them
into the file. Whether the code has changed since is then seen by making the digests again, without git.

Invariant: comments, docstrings and blank lines are not in a digest, since they move no figure. A file without a digest
counts as older than the code. Refused: a results file that `MEASURES` does not have.
"""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
SOURCE = ROOT / "src" / "tightfit"

_TRACED = ("core", "device", "step", "trace")
_PLANNED = (*_TRACED, "levers", "plan")
_APPLIED = (*_PLANNED, "engine", "fitting", "verify")
_FORECAST = (*_PLANNED, "catalog", "forecast", "integrations")
#: By results file: the parts of src/tightfit that its figures depend on. A part is a package or a module.
MEASURES: dict[str, tuple[str, ...]] = {
    "by_hand": _APPLIED,
    "callback": (*_APPLIED, "integrations"),
    "compiled": _APPLIED,
    "forecast": (*_FORECAST, "engine", "verify/peak.py"),
    "gpt2_bars": (*_APPLIED, "integrations", "train"),
    "gpu_measured": _APPLIED,
    "levers": (*_FORECAST, "engine", "fitting", "verify"),
    "measure_gpt2": (*_APPLIED, "integrations/transformers.py", "integrations/peft.py"),
    "optimum": _PLANNED,
    "micro_batches": _APPLIED,
    "overhead": _APPLIED,
    "page": ("report",),
    "peers": _APPLIED,
    "planning": ("core", "device", "levers", "plan"),
    "random_modules": _APPLIED,
    "rounding": ("verify/rounding.py", "verify/float64.py", "levers/tile"),
    "scaling": _FORECAST,
    "several_gpus": (*_FORECAST, "engine", "fitting", "verify"),
    "seconds": _APPLIED,
    "step": _APPLIED,
    "streaming": (*_APPLIED, "integrations/peft.py", "integrations/bitsandbytes.py"),
    "switches": (*_APPLIED, "doctor/traps"),
    "timeline": _PLANNED,
    "trainer_step": (
        *_TRACED, "plan/simulate.py", "forecast/setup.py", "forecast/recording.py", "integrations/trainer_step.py",
        "integrations/transformers.py", "integrations/peft.py", "verify/peak.py",
    ),
    "traps": (*_PLANNED, "engine", "doctor/traps"),
    "versions": (".",),
    "whole_step": (*_APPLIED, "integrations/peft.py", "integrations/bitsandbytes.py"),
    "zoo": _APPLIED,
}  # fmt: skip


#: Registered once and for all, with a commit for each of their tables: never drawn again but with a new date.
REGISTERED = ("gpu_predictions",)


def measures(name: str) -> tuple[str, ...]:
    """The parts that the results file `name` measures; one per GPU has the GPU's name at its end."""
    for known in (name, name.rsplit("_", 1)[0]):
        if known in MEASURES:
            return MEASURES[known]
    raise KeyError(f"benchmarks/results/{name}.json is not in MEASURES of benchmarks/drawn.py: say what it measures")


def sources(name: str, source: Path = SOURCE, known: dict[str, str] | None = None) -> dict[str, str]:
    """A digest of each part that `name` measures, and of the script that draws it. `known`: digests of parts that were
    made already, to which the others are added."""
    known = {} if known is None else known
    for part in measures(name):
        if part not in known:
            known[part] = digest(part, source)
    script = {"gpu_measured": "gpu/run"}.get(name, name)
    return {part: known[part] for part in measures(name)} | {"script": digest(f"{script}.py", Path(__file__).parent)}


def digest(part: str, source: Path = SOURCE) -> str:
    """Of the code of one part of `source`; '' where there is none."""
    place = source / part
    files = sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
    found = hashlib.sha256()
    count = 0
    for file in files:
        if "__pycache__" in file.parts or not file.is_file():
            continue
        text = file.read_bytes()
        if file.suffix == ".py":
            text = "\n".join(_code(text.decode("utf-8"))).encode()
        found.update(f"{file.relative_to(source).as_posix()}\0".encode() + text + b"\0")
        count += 1
    return found.hexdigest()[:16] if count else ""


def _code(text: str) -> list[str]:
    """The lines of a module without comments on lines of their own, docstrings and blank lines."""
    left_out: set[int] = set()
    holders: list[ast.AST] = [ast.parse(text)]
    while holders:
        node = holders.pop()
        holders += [each for each in ast.iter_child_nodes(node) if isinstance(each, ast.stmt | ast.ExceptHandler)]
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            left_out.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = enumerate(text.splitlines(), start=1)
    return [
        line.rstrip()
        for number, line in lines
        if number not in left_out and line.strip() and not line.lstrip().startswith("#")
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One results file, or one part of it that is drawn by itself."""

    file: str
    part: str
    date: str
    commit: str
    torch: str
    changed: tuple[str, ...]  # parts of the source that are not what they were


def changed(
    block: Mapping[str, Any], name: str, source: Path = SOURCE, known: dict[str, str] | None = None
) -> tuple[str, ...]:
    """The parts that `name` measures whose code is not that of `block`. `known`: as in `sources`."""
    then = block["sources"]
    return tuple(part for part, now in sources(name, source, known).items() if then.get(part) != now)


def every(results: Path = RESULTS, source: Path = SOURCE) -> list[Drawn]:
    """What is known of each results file, in the order of names."""
    found: list[Drawn] = []
    known: dict[str, str] = {}
    for file in sorted(results.glob("*.json")):
        if file.stem in REGISTERED:
            continue
        document = json.loads(file.read_text(encoding="utf-8"))
        unknown = {"date": "", "commit": "", "torch": "", "sources": {}}  # of a file that was brought from elsewhere
        for block in document.get("drawn", [unknown]):
            found.append(
                Drawn(
                    file=file.name, part=block.get("part", ""), date=block["date"], commit=block["commit"],
                    torch=block["torch"], changed=changed(block, file.stem, source, known),
                )
            )  # fmt: skip
    return found


def write(
    file: Path,
    document: Mapping[str, Any],
    *,
    parts: Sequence[str] | None = None,
    torch: str | None = None,
    indent: int | None = 1,
) -> None:
    """Write a results file, with the record of when and from what it was drawn.

    `parts`: those of the file that are drawn now, by their names; the records of the others stay. `torch`: the version
    that was measured, by default this interpreter's.
    """
    block = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(),
        "torch": torch or metadata.version("torch"), "sources": sources(file.stem),
    }  # fmt: skip
    blocks: list[dict[str, Any]] = [block]
    if parts is not None:
        before = json.loads(file.read_text(encoding="utf-8")).get("drawn", []) if file.exists() else []
        blocks = [each for each in before if each.get("part") not in parts]
        blocks = sorted([*blocks, *({"part": part, **block} for part in parts)], key=lambda each: each.get("part", ""))
    text = json.dumps(
        {**document, "drawn": blocks}, indent=indent, separators=None if indent is not None else (",", ":")
    )
    temporary = file.with_suffix(".json.part")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(file)


def rows_of_others(file: Path, key: str, drawn_now: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a results file whose `key` is none of those that are drawn now."""
    before = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    return [row for row in before if row[key] not in drawn_now]


def record_of_rows(
    file: Path,
    rows_of: Callable[[str], Iterable[dict[str, Any]]],
    names: Sequence[str],
    *,
    order: Sequence[str],
    key: str,
    then: str,
) -> dict[str, Any]:
    """The document for `write`: the rows of `names`, each said as soon as it is there, and those of others as they were
    in the file. Rows are in the `order` of what they have under `key`, then by what they have under `then`."""
    from tightfit.step.environment import environment  # results are read without torch too

    rows = rows_of_others(file, key, names)
    for name in names:
        for row in rows_of(name):
            rows.append(row)
            print(json.dumps(row), flush=True)
    rows.sort(key=lambda row: (order.index(row[key]), row[then]))
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment(), "rows": rows}


def commit() -> str:
    """The commit that is checked out; '' without git."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        dirty = subprocess.run(
            ["git", "status", "--short", "src", "tests"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip() + ("+changes" if dirty.stdout else "")


def table() -> str:
    """A Markdown table of all results."""
    rows = ["| file | drawn | commit | torch | code changed since |", "|---|---|---|---|---|"]
    for each in every():
        name = f"`{each.file}`" + (f" ({each.part})" if each.part else "")
        answer = "**yes**" if each.changed else "no"
        rows.append(f"| {name} | {each.date[:10]} | {each.commit} | {each.torch} | {answer} |")
    return "\n".join(rows) + "\n"


def main() -> int:
    if sys.argv[1:2] == ["stamp"]:
        for name in sys.argv[2:]:
            file = RESULTS / f"{name}.json"
            write(file, json.loads(file.read_text(encoding="utf-8")))
        return 0
    for each in every():
        name = each.file + (f" ({each.part})" if each.part else "")
        changes = ", ".join(each.changed) or "-"
        print(f"{name:36} {each.date[:10]} {each.commit:16} torch {each.torch:12} changed: {changes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
