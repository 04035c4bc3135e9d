"""Sizes, JSON and files: what is parsed at the edge, and what a damaged plan is answered with."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightfit.core import (
    Action,
    BudgetInfeasible,
    Choice,
    InvalidInput,
    Kind,
    Plan,
    Program,
    Proof,
    Status,
    Step,
    TightfitError,
    Trace,
    dumps,
    format_apart,
    format_bytes,
    loads,
    parse_bytes,
    reason_of,
    write_text,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("22GiB", 22 * 2**30), ("22GB", 22 * 10**9), ("1.5 KiB", 1536), ("800mb", 8 * 10**8), ("123", 123),
        ("7b", 7), (5, 5), (" 2 TiB ", 2**41), (".5KB", 500), ("60%", 600), ("12.5 %", 125), ("150%", 1500),
    ],
)  # fmt: skip
def test_parse_bytes(text: Any, expected: int) -> None:
    assert parse_bytes(text, whole_bytes=1000) == expected


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "-1GiB", "1e9", "22 GiB GiB", "22QiB", "0", 0, -1, "0%", "-5%", "%", "nan", True, None, 1.5, "1_000"],
)
def test_parse_bytes_refuses(text: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_bytes(text, whole_bytes=1000)
    assert "\n" not in str(caught.value)


def test_a_percentage_needs_a_whole() -> None:
    with pytest.raises(InvalidInput, match="percentage"):
        parse_bytes("60%")


@given(st.integers(1, 2**60))
def test_bytes_survive_being_written_out(size: int) -> None:
    assert parse_bytes(str(size)) == size
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (11_620_000, 11_650_000, ("11.08 MiB", "11.11 MiB")),
        (2**30, 2**30, ("1.00 GiB", "1.00 GiB")),
        (2**20, 2**30, ("1.00 MiB", "1.00 GiB")),
        (12 * 2**30, 12 * 2**30 + 1, ("12.000000000 GiB", "12.000000001 GiB")),
        (511, 512, ("511 B", "512 B")),
    ],
)
def test_two_sizes_are_told_apart(one: int, other: int, expected: tuple[str, str]) -> None:
    assert format_apart(one, other) == expected
    assert all(text in str(BudgetInfeasible(one, other)) for text in expected)


def a_plan() -> Plan:
    program = Program(
        steps=(Step(name="aten.mm.default", kind=Kind.PURE, outputs=(0, None), writes=(0,)),),
        slots=(0, -1),
        wanted=(True, False),
        values=1,
        held=(),
    )
    choice = Choice(unit="h.0", actions=(Action.RECOMPUTE,), signature="Block", program="abc")
    return Plan(
        budget_bytes=10, choices=(choice,), status=Status.FEASIBLE, peak_bytes=9, step_seconds=1.5,
        recompute_seconds=0.5, bound_seconds=0.25, recompute_flops=3, forward_flops=4, unplanned_peak_bytes=12,
        replays=1, trace_digest="d", versions={"torch": "2"}, programs={"abc": program},
    )  # fmt: skip


def test_plan_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    a_plan().save(path)
    assert Plan.load(path) == a_plan()
    data = json.loads(path.read_text())
    assert (data["type"], data["schema_version"]) == ("Plan", 1)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"], "a temporary file was left behind"


def damaged() -> dict[str, str]:
    whole = json.loads(dumps(a_plan()))

    def with_(**changes: Any) -> str:
        return json.dumps({**whole, **changes})

    lacking = dict(whole)
    del lacking["budget_bytes"]
    return {
        "empty": "",
        "cut off": dumps(a_plan())[:-40],
        "no object": "[1]",
        "another type": with_(type="Trace"),
        "no type": json.dumps({"budget_bytes": 1}),
        "a later version": with_(schema_version=99),
        "an unknown key": with_(extra=1),
        "a missing key": json.dumps(lacking),
        "text for a number": with_(budget_bytes="10"),
        "a fraction for bytes": with_(peak_bytes=1.5),
        "true for a number": with_(peak_bytes=True),
        "an unknown status": with_(status="splendid"),
        "a list for a mapping": with_(versions=[]),
        "null": with_(choices=None),
        "an unknown action": with_(choices=[{**whole["choices"][0], "actions": ["burn"]}]),
        "deep": "[" * 100_000,
    }


@pytest.mark.parametrize("name", damaged())
def test_a_damaged_plan_is_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(damaged()[name])
    with pytest.raises(InvalidInput) as caught:
        Plan.load(path)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing.json"):
        with pytest.raises(InvalidInput, match="cannot read"):
            Plan.load(path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInput):
        Plan.load(tmp_path / "binary")
    with pytest.raises(InvalidInput, match="no tightfit trace"):
        loads(Trace, dumps(a_plan()))


def test_writing_is_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    path.write_text("before")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_text(path, "after")
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    with pytest.raises(InvalidInput, match="cannot write"):
        write_text(tmp_path / "no" / "plan.json", "x")


@pytest.mark.parametrize("kind", ["fifo", "socket", "folder", "link to a fifo", "loop"])
def test_only_regular_files_are_replaced(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    path = Path("there")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    else:
        os.mkfifo("fifo")
        path.symlink_to("fifo")

    def entries() -> dict[str, tuple[int, int, int]]:  # a link that is followed has another time of access
        return {
            entry.name: (stat.st_mode, stat.st_ino, stat.st_mtime_ns)
            for entry in tmp_path.iterdir()
            for stat in [entry.lstat()]
        }

    before = entries()
    with pytest.raises(InvalidInput, match="cannot write to 'there'"):
        write_text(path, "x")
    assert entries() == before


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_written_through(there: bool, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "plan.json", tmp_path / "link.json"
    if there:
        target.write_text("before")
    link.symlink_to(target)
    write_text(link, "after")
    assert link.is_symlink() and not target.is_symlink()
    assert target.read_text() == "after"
    assert [entry.name for entry in (tmp_path / "far").iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("heading:\n    ValueError: 63 is odd\n    more", "heading: ValueError: 63 is odd"),
        ("\n  one\ntwo", "one"),
        ("one: ", "one:"),
        ("", "ValueError"),
    ],
)
def test_a_heading_is_not_a_reason(said: str, reason: str) -> None:
    assert reason_of(ValueError(said)) == reason


def test_errors_are_of_one_family() -> None:
    error = BudgetInfeasible(10, 20, ("buy a larger card",))
    assert isinstance(error, TightfitError)
    assert (error.budget_bytes, error.least_bytes) == (10, 20)
    assert "20 B" in str(error) and "larger card" in str(error)


def test_an_empty_proof_has_no_check_of_a_name() -> None:
    proof = Proof(checks=(), environment={})
    assert proof.passed
    with pytest.raises(StopIteration):
        proof["gradients"]
