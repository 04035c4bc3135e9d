"""What a plan says of a machine is what its step takes there: of the device, of host memory, of a file."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.plan.stacks import TINY, half_frozen
from tests.plan.stacks import mean_square as loss
from torch import nn

import tightfit
from tightfit import forecast
from tightfit.cli.program import main
from tightfit.core import Account, Backing, InvalidInput, Plan, Trace, format_bytes, from_json, parse_levers, to_json
from tightfit.device.allocator import CachingAllocator
from tightfit.engine import apply
from tightfit.plan import lowest, simulate
from tightfit.plan.account import account, account_lines, bytes_reserved, host_bytes, host_said
from tightfit.plan.simulate import allocations
from tightfit.report import forecast_document, forecast_report, forecast_table
from tightfit.report.text import explain

WIDTH, ROWS = 256, 2048
MOVING = [
    ("stream_weights", "frozen weights"),
    ("state_in_host", "optimizer state"),
    ("gradients_in_host", "gradients"),
    ("offload", "kept values"),
]
BUFFERS = 4096 * 16  # each is rounded up to a page; there are fewer than 16


def stack() -> nn.Sequential:
    return half_frozen(WIDTH, [4 * WIDTH] * 4)


class Planned:
    """A step, and a plan of it that moves something by one lever."""

    def __init__(self, lever: str) -> None:
        self.model, self.batch = stack(), torch.randn(ROWS, WIDTH).requires_grad_()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad])
        self.trace = tightfit.trace(self.model, self.batch, loss=loss, optimizer=self.optimizer)
        if lever == "offload":
            self.plan = tightfit.plan(self.trace, "90%", levers=["recompute", lever])
        else:
            self.plan = lowest(self.trace, levers=parse_levers(f"recompute,{lever}"))
        ((self.name, self.told_bytes),) = host_bytes(self.trace, self.plan).items()
        assert self.name == lever and self.told_bytes > 0

    def steps(self) -> None:
        for _ in range(2):
            loss(self.model, self.batch).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def text_of(shown: Any) -> str:
    console = Console(width=240, record=True, file=io.StringIO())
    console.print(shown)
    return console.export_text()


@pytest.mark.parametrize(("lever", "said"), MOVING)
def test_host_memory_is_what_the_pool_holds(lever: str, said: str) -> None:
    made = Planned(lever)
    trace, plan, told_bytes = made.trace, made.plan, made.told_bytes
    assert host_bytes(trace, tightfit.plan(trace, "100%")) == {}
    told = account(trace, plan)
    assert (told.pinned_bytes, told.pageable_bytes, told.file_bytes) == (0, told_bytes, 0)
    assert told.waiting == {"pinned": {}, "pageable": {lever: told_bytes}, "file": {}}
    with apply(made.model, plan, optimizer=made.optimizer) as applied:
        made.steps()
        assert told_bytes <= applied.pool.most_bytes <= told_bytes + BUFFERS
        assert applied.pool.taken == {
            Backing.PINNED: 0, Backing.PAGEABLE: applied.pool.taken_bytes, Backing.FILE: 0
        }  # fmt: skip
        assert told_bytes <= applied.pool.taken_bytes <= told_bytes + BUFFERS
        applied.trace = trace
        assert f"in host memory: {host_said({lever: told_bytes})}" in str(applied)
        assert f"the process: {format_bytes(plan.peak_bytes)} allocated on the device, " in str(applied)
        assert f"{format_bytes(told_bytes)} in pageable host memory" in str(applied)
    text = text_of(explain(trace, plan))
    assert f"in host memory: {host_said({lever: told_bytes})}" in text
    assert f"on the device, {format_bytes(told_bytes)} in pageable host memory" in text
    assert said in host_said({lever: told_bytes})


@pytest.mark.parametrize("lever", [lever for lever, _ in MOVING])
def test_what_is_spilled_is_in_a_file(lever: str, tmp_path: Path) -> None:
    made = Planned(lever)
    told = account(made.trace, made.plan, spilled=True)
    assert (told.pinned_bytes, told.pageable_bytes, told.file_bytes) == (0, 0, made.told_bytes)
    with apply(made.model, made.plan, optimizer=made.optimizer, spill=tmp_path) as applied:
        made.steps()
        taken = applied.pool.taken
        assert made.told_bytes <= taken[Backing.FILE] <= made.told_bytes + BUFFERS
        assert taken[Backing.PAGEABLE] == taken[Backing.PINNED] == 0
        applied.trace = made.trace
        assert f"{format_bytes(made.told_bytes)} in a file" in str(applied)
        assert f"in a file: {host_said({lever: made.told_bytes})}" in str(applied)
        assert "host memory: " not in str(applied) and "pageable" not in str(applied)


def test_what_was_mapped_from_a_file_is_in_it() -> None:
    made = Planned("stream_weights")
    part = made.told_bytes // 3
    told = account(made.trace, made.plan, mapped_bytes={"stream_weights": part, "offload": 7})
    assert (told.pinned_bytes, told.pageable_bytes, told.file_bytes) == (0, made.told_bytes - part, part)
    assert told.waiting["file"] == {"stream_weights": part}
    told = account(made.trace, made.plan, mapped_bytes={"stream_weights": made.told_bytes}, spilled=True)
    assert (told.pageable_bytes, told.file_bytes) == (0, made.told_bytes)
    with apply(made.model, made.plan, optimizer=made.optimizer) as applied:
        applied.trace = made.trace
        applied._stats.levers["stream_weights"].mapped_bytes = made.told_bytes
        assert f"{format_bytes(made.told_bytes)} in a file" in str(applied) and "pageable" not in str(applied)


def test_fit_spills(tmp_path: Path) -> None:
    made = Planned("offload")
    model, rows = made.model, made.batch
    loss(model, rows).backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    made.optimizer.zero_grad()
    with pytest.raises(InvalidInput, match="it is no folder"):
        tightfit.fit(model, rows, "70%", loss, spill=tmp_path / "missing")
    with tightfit.fit(model, rows, "70%", loss, levers="recompute,offload", spill=tmp_path) as applied:
        loss(model, rows).backward()
        assert applied.pool.taken[Backing.FILE] > 0 == applied.pool.taken[Backing.PAGEABLE]
        assert "in a file" in str(applied)
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(plain) == len(found) and all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


@pytest.fixture(scope="module")
def moved() -> tuple[Trace, Plan]:
    made = Planned("state_in_host")
    return made.trace, made.plan


def on_a_card(trace: Trace) -> Trace:
    """As a trace of a real card says it, whose random states leave 16 bytes there."""
    return dataclasses.replace(trace, copies_beside=True, random_state_bytes=16)


def test_a_card_reserves_by_its_allocator_and_what_waits_is_pinned(moved: tuple[Trace, Plan]) -> None:
    trace, plan = on_a_card(moved[0]), moved[1]
    told = account(trace, plan)
    allocator = CachingAllocator()
    static, step = allocations(trace, plan)
    for i, size_bytes in enumerate(static):
        allocator.allocate(("static", i), size_bytes)
    throughout = set(allocator.live())
    for _ in range(2):
        for key, size_bytes in step:
            if size_bytes > 0:
                allocator.allocate(key, size_bytes)
            else:
                allocator.free(key)
        for key in set(allocator.live()) - throughout:
            allocator.free(key)
    assert told.reserved_bytes == allocator.reserved_peak_bytes > told.allocated_bytes == plan.peak_bytes
    waiting = sum(host_bytes(trace, plan).values())
    assert (told.pinned_bytes, told.pageable_bytes, told.file_bytes) == (waiting, 0, 0)
    assert bytes_reserved(trace, plan, plan.peak_bytes // 2) is None
    line, elsewhere = account_lines(told, 2**40)
    assert line == (
        f"the process: {format_bytes(told.allocated_bytes)} allocated and {format_bytes(told.reserved_bytes)} reserved "
        f"on the device, {format_bytes(waiting)} in pinned host memory"
    )
    assert elsewhere == f"in host memory: {format_bytes(waiting)} of at most 1.00 TiB: optimizer state " + (
        format_bytes(waiting)
    )


def test_the_cpu_has_no_caching_allocator(moved: tuple[Trace, Plan]) -> None:
    trace, plan = moved
    told = account(trace, plan)
    assert told.allocated_bytes == told.reserved_bytes == plan.peak_bytes == simulate(trace, plan).peak_bytes
    assert "reserved" not in account_lines(told)[0]
    unmoved = account(trace, tightfit.plan(trace, "100%"))
    assert account_lines(unmoved) == [
        f"the process: {format_bytes(unmoved.allocated_bytes)} allocated on the device, nothing waits elsewhere"
    ]


def test_an_account_survives_json(moved: tuple[Trace, Plan]) -> None:
    told = account(*moved)
    assert from_json(Account, json.loads(json.dumps(to_json(told))), "the text") == told


# ------------------------------------------------------------------------------------------ who shows it


@pytest.mark.slow
def test_check_says_the_account_of_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = forecast.Setup(model="tightfit-demo", method="full", batch=1, seq=64, dtype="bf16", optimizer="adamw")
    allowed, device = parse_levers("recompute,state_in_host,optimizer_chunks"), forecast.device_asked("24GiB")
    trace = forecast.trace_setup(setup, device)
    room = (lowest(trace, levers=allowed).peak_bytes + lowest(trace, levers=parse_levers("recompute")).peak_bytes) // 2
    answer = forecast.check(setup, device, budget=room, search=False, levers=allowed)
    told, mode = answer.account, answer.modes[-1]
    assert told is not None and answer.fits
    assert (told.allocated_bytes, told.reserved_bytes) == (mode.peak_bytes, mode.reserved_bytes)
    assert told.allocated_bytes < told.reserved_bytes <= room
    assert told.waiting["pinned"] == answer.host_bytes and told.pinned_bytes == sum(answer.host_bytes.values()) > 0
    document = json.loads(json.dumps(forecast_report(answer)))
    assert document["account"] == to_json(told) and document["host_bytes"] == answer.host_bytes
    text = text_of(forecast_table(answer))
    for line in account_lines(told):
        assert line in text
    facts = forecast_document(answer)["facts"]
    assert f"{format_bytes(told.pinned_bytes)} in pinned host memory" in facts["the process"]
    assert facts["in host memory"].startswith(format_bytes(told.pinned_bytes))
    # near the limit a card reserves less than one with enough room, and the account says what its own mode says
    monkeypatch.setattr("tightfit.forecast.answer.bytes_reserved", lambda *_: told.reserved_bytes - 512)
    answer = forecast.check(setup, device, budget=room, search=False, levers=allowed)
    assert answer.account is not None
    assert answer.account.reserved_bytes == answer.modes[-1].reserved_bytes == told.reserved_bytes - 512
    hopeless = forecast.check(setup, device, budget=2**20, search=False, levers=parse_levers("recompute"))
    assert hopeless.account is None and "the process" not in forecast_document(hopeless)["facts"]


def test_plan_says_the_account_in_json_in_words_and_on_its_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(TINY))
    asked = ["plan", str(tmp_path), "--batch", "1", "--seq", "16", "--levers", "recompute,state_in_host",
             "--budget", "70%"]  # fmt: skip
    assert main([*asked, "--json", "--html", "plan.html"]) == 0
    document = json.loads(capsys.readouterr().out)
    told = from_json(Account, document["account"], "the answer")
    assert told.allocated_bytes == told.reserved_bytes == document["peak_bytes"]
    assert told.waiting["pageable"] == {"state_in_host": told.pageable_bytes} and told.pageable_bytes > 0
    assert f"{format_bytes(told.pageable_bytes)} in pageable host memory" in Path("plan.html").read_text()
    assert main([*asked, "--explain"]) == 0
    out = capsys.readouterr().out
    assert account_lines(told)[0] in " ".join(out.split())
