"""A host budget: whatever asks for a plan gets none with more in host memory, and is told which limit binds."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.plan.stacks import TINY, half_frozen
from tests.plan.stacks import mean_square as loss
from torch import nn

import tightfit
from tightfit import forecast
from tightfit import plan as planning
from tightfit.cli.program import main
from tightfit.core import (
    BudgetInfeasible,
    InvalidInput,
    Lever,
    Plan,
    Trace,
    dumps,
    loads,
    parse_host_budget,
    parse_levers,
)
from tightfit.fitting import micro_batches
from tightfit.fitting.micro_batches import gradients_in_place
from tightfit.forecast import search
from tightfit.forecast.advice import more_in_host
from tightfit.integrations.recovery import lower
from tightfit.levers import as_recorded, defined
from tightfit.levers.interface import Variant
from tightfit.plan import Effort, simulate, solver, table, ways
from tightfit.plan.account import host_bytes
from tightfit.plan.tighter import tighter
from tightfit.report import study
from tightfit.step.ranks import _described, _error_of
from tightfit.verify.measure import measure

WIDTH, ROWS = 128, 1024
QUICK = Effort(points=12, solver_seconds=30.0, proves=False)  # a limit that a busy machine does not reach
plan, lowest = functools.partial(tightfit.plan, effort=QUICK), functools.partial(planning.lowest, effort=QUICK)
MOVING = ("offload", "stream_weights", "state_in_host", "gradients_in_host")


def stack() -> nn.Sequential:
    """Blocks of two widths, every second one frozen, so that each lever has large and small things to move."""
    return half_frozen(WIDTH, (4 * WIDTH, 2 * WIDTH, 2 * WIDTH, 4 * WIDTH))


def batch(rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, WIDTH).requires_grad_()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])


def recorded(lever: str = "") -> Trace:
    """The step with times that are the same on every machine. For gradients that wait: a later micro-batch of half the
    rows, which finds some."""
    return _recorded(lever == "gradients_in_host")


@functools.cache
def _recorded(accumulates: bool) -> Trace:
    model = stack()
    with gradients_in_place(model, accumulates):
        rows = batch(ROWS // 2 if accumulates else ROWS)
        trace = tightfit.trace(model, rows, loss=loss, optimizer=adamw(model))
    sizes = {v.id: v.size_bytes for v in trace.values}
    ops = tuple(
        dataclasses.replace(op, seconds=1e-5 + 1e-9 * sum(sizes[v] for v in op.outputs if v is not None))
        for op in trace.ops
    )
    return dataclasses.replace(trace, ops=ops)


def waiting(made: Plan, trace: Trace | None = None) -> int:
    return sum(host_bytes(trace or recorded(), made).values())


def levers(*names: str) -> frozenset[Lever]:
    return frozenset(parse_levers(",".join(("recompute", *names))) or ())


@functools.cache
def between(lever: str, part: float) -> tuple[int, int]:
    """A budget between the lowest peak with `lever` and that with nothing in host memory; and what a plan for it has
    there where nobody limits that."""
    trace = recorded(lever)
    low = lowest(trace, levers=levers(lever)).peak_bytes
    without = lowest(trace, levers=levers(lever), host_budget=0).peak_bytes
    budget_bytes = int(low + part * (without - low))
    return budget_bytes, waiting(plan(trace, budget_bytes, levers=levers(lever)), trace)


@pytest.mark.parametrize("lever", MOVING)
def test_no_plan_has_more_in_host_memory(lever: str) -> None:
    trace, peak_bytes = recorded(lever), simulate(recorded(lever)).peak_bytes
    most = waiting(lowest(trace, levers=levers(lever)), trace)
    assert most > 0
    budget_bytes = int(peak_bytes * 0.8)
    free = plan(trace, budget_bytes, levers=levers(lever))
    assert waiting(free, trace) > 0  # or the budget says nothing about the lever
    for part in (1.0, 0.6, 0.2, 0.0):
        limit = int(part * waiting(free, trace))
        made = plan(trace, budget_bytes, levers=levers(lever), host_budget=limit)
        assert waiting(made, trace) <= limit == made.host_budget_bytes
        assert simulate(trace, made).peak_bytes == made.peak_bytes <= budget_bytes
        if part == 1:
            assert dataclasses.replace(made, host_budget_bytes=None) == free  # what is not reached changes nothing
    assert not waiting(made, trace) and made.added_seconds > free.added_seconds


@pytest.mark.parametrize("lever", MOVING)
def test_a_part_of_what_could_wait_is_used(lever: str) -> None:
    """With a part of what a lever would take its plan is faster than with nothing there: it is not all or nothing."""
    trace = recorded(lever)
    budget_bytes = int(simulate(trace).peak_bytes * 0.75)
    most = waiting(lowest(trace, levers=levers(lever)), trace) * 3 // 4
    nothing, part = (plan(trace, budget_bytes, levers=levers(lever), host_budget=limit) for limit in (0, most))
    assert 0 < waiting(part, trace) <= most and part.added_seconds < nothing.added_seconds


@pytest.mark.parametrize("lever", [Lever.STREAM_WEIGHTS, Lever.STATE_IN_HOST])
def test_levers_offer_what_just_fits(lever: Lever) -> None:
    """Also where it is less than the first of the few divisions that they offer without a limit."""
    sizes = (16, 48, 80, 112, 144, 176)  # no two layers have the same bytes
    model = nn.Sequential(*(layer for wide in sizes for layer in (nn.Linear(8, wide), nn.Linear(wide, 8))))
    if lever is Lever.STREAM_WEIGHTS:
        model[1:].requires_grad_(False)
    trace = tightfit.trace(model, torch.randn(4, 8).requires_grad_(), loss=loss, optimizer=adamw(model))

    def offered(limit: int | None) -> list[int]:
        return [step.host_bytes for step in defined(lever).variants(as_recorded(trace, limit))]

    free = offered(None)
    assert len(free) == 4
    middle = (free[-2] + free[-1]) // 2 if lever is Lever.STATE_IN_HOST else free[0] - 1
    assert max(offered(middle)) <= middle and not set(offered(middle)) <= set(free)
    assert offered(free[-1]) == free


def test_a_limit_that_is_not_reached_costs_no_second_search(monkeypatch: pytest.MonkeyPatch) -> None:
    budget_bytes, free_bytes = between("offload", 1.3)
    asked: list[int | None] = []

    def watched(trace: Trace, effort: Effort, limit: int | None = None) -> Any:
        asked.append(limit)
        return ways.way_of(trace, effort, limit)

    monkeypatch.setattr("tightfit.plan.planning.way_of", watched)
    plan(recorded(), budget_bytes, levers=levers("offload"), host_budget=free_bytes)
    assert asked == [None]
    plan(recorded(), budget_bytes, levers=levers("offload"), host_budget=free_bytes - 1)
    assert asked == [None, None, free_bytes - 1]


def test_all_levers_share_one_host_budget() -> None:
    together = ("offload", "state_in_host")
    trace, every = recorded(), levers(*together)
    low = lowest(trace, levers=every)
    apart = [waiting(lowest(trace, levers=levers(lever))) for lever in together]
    assert waiting(low) > max(apart)
    limit = waiting(low) // 2
    for made in (
        lowest(trace, levers=every, host_budget=limit),
        plan(trace, int(simulate(trace).peak_bytes * 0.6), levers=every, host_budget=limit),
    ):
        assert 0 < waiting(made) <= limit


@pytest.mark.parametrize("lever", MOVING)
def test_which_limit_binds_is_said_in_one_line(lever: str) -> None:
    trace = recorded(lever)
    budget_bytes, free_bytes = between(lever, 0.5)
    limit = free_bytes // 50
    with pytest.raises(BudgetInfeasible, match="the host budget is what binds") as caught:
        plan(trace, budget_bytes, levers=levers(lever), host_budget=limit)
    error = caught.value
    assert "\n" not in str(error) and "raise the host budget, or the budget" in str(error)
    assert error.host_budget_bytes == limit and error.budget_bytes == budget_bytes
    assert error.host_bytes is not None and limit < error.host_bytes <= free_bytes
    # what it says would do does
    enough = plan(trace, budget_bytes, levers=levers(lever), host_budget=error.host_bytes)
    assert waiting(enough, trace) <= error.host_bytes
    made = plan(trace, error.least_bytes, levers=levers(lever), host_budget=limit)
    assert made.peak_bytes <= error.least_bytes and waiting(made, trace) <= limit
    again = _error_of(_described(error), 0)  # as the other ranks hear of it
    assert str(again) == str(error) and isinstance(again, BudgetInfeasible)


def test_a_budget_that_no_host_memory_would_hold_is_said_to_bind() -> None:
    trace = recorded()
    floor = lowest(trace, levers=levers("offload")).peak_bytes
    with pytest.raises(BudgetInfeasible, match=r"without the host budget of .* which is too much as well") as caught:
        plan(trace, floor * 9 // 10, levers=levers("offload"), host_budget="64KiB")
    assert caught.value.host_bytes is None and "binds" not in str(caught.value)
    with pytest.raises(BudgetInfeasible) as caught:  # nothing of this would move anything
        plan(trace, floor * 9 // 10, levers=levers(), host_budget="64KiB")
    assert "host" not in str(caught.value)


def test_the_limit_holds_without_a_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    budget_bytes, free_bytes = between("offload", 1.3)

    def broken(*_: Any) -> Any:
        raise RuntimeError("no solver")

    monkeypatch.setattr(solver, "engine", broken)
    table._found.cache_clear()
    trace = dataclasses.replace(recorded())
    made = plan(trace, budget_bytes, levers=levers("offload"), host_budget=free_bytes // 2)
    assert 0 < waiting(made) <= free_bytes // 2 and made.peak_bytes <= budget_bytes
    assert waiting(lowest(trace, levers=levers("offload"), host_budget=free_bytes // 2)) <= free_bytes // 2
    table._found.cache_clear()


def test_a_lever_that_does_not_say_what_it_moves_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The account is asked about every plan, so a lever whose variants hide their bytes gets none through."""
    honest = Variant.by

    def silent(self: Variant, *args: Any, host_bytes: int = 0, **more: Any) -> Variant:
        return honest(self, *args, **more)

    budget_bytes, free_bytes = between("state_in_host", 0.5)
    monkeypatch.setattr(Variant, "by", silent)
    monkeypatch.setattr(Variant, "host_room_bytes", property(lambda self: None))
    trace = dataclasses.replace(recorded())
    assert waiting(plan(trace, budget_bytes, levers=levers("state_in_host")), trace) == free_bytes
    with pytest.raises(BudgetInfeasible):
        plan(trace, budget_bytes, levers=levers("state_in_host"), host_budget=free_bytes // 2)


@pytest.mark.parametrize(
    ("asked", "found"), [(None, None), (0, 0), ("0", 0), ("0 GiB", 0), ("1.5KiB", 1536), (7, 7), (" 2MB ", 2_000_000)]
)
def test_sizes_are_read(asked: Any, found: int | None) -> None:
    assert parse_host_budget(asked) == found


@pytest.mark.parametrize("asked", ["50%", "", "lots", "-1", -1, True, "3 parsecs", 1.5])
def test_what_is_no_size_is_refused_in_one_line(asked: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_host_budget(asked)
    assert "\n" not in str(caught.value)


def test_plans_of_before_are_read() -> None:
    made = plan(recorded(), "100%", host_budget="1GiB")
    document = json.loads(dumps(made))
    assert document["host_budget_bytes"] == 2**30 and loads(Plan, json.dumps(document)) == made
    del document["host_budget_bytes"]
    assert loads(Plan, json.dumps(document)).host_budget_bytes is None


def test_plans_that_follow_from_a_plan_keep_its_limit() -> None:
    """A smaller one after running out of memory, one for a tenth less, those of the page."""
    trace, allowed = recorded(), levers("offload")
    budget_bytes, free_bytes = between("offload", 1.3)
    limit = free_bytes // 2
    made = plan(trace, budget_bytes, levers=allowed, host_budget=limit)
    smaller = lower(trace, made, allowed)
    assert smaller.peak_bytes < made.peak_bytes and waiting(smaller) <= limit == smaller.host_budget_bytes
    lowest_bytes = int(lowest(trace, levers=levers()).peak_bytes / 0.9)  # what a tenth less than this is
    for at_most, expected in ((None, "would take"), (0, "no exact plan")):
        other = dataclasses.replace(made, budget_bytes=lowest_bytes - 1000, host_budget_bytes=at_most)
        other = dataclasses.replace(other, peak_bytes=lowest_bytes - 1000)
        assert expected in tighter(trace, other)
    assert study(trace, made, points=4, effort=Effort(points=12, proves=False)).points


@pytest.mark.parametrize("several", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["whole", "micro-batches"])
def test_fit_obeys_in_every_plan_that_it_makes(several: bool) -> None:
    model = stack()
    optimizer = adamw(model)
    peak_bytes = simulate(recorded()).peak_bytes
    asked: dict[str, Any] = {"levers": levers("offload"), "optimizer": optimizer, "host_budget": "2MiB"}
    rows = torch.randn(ROWS, WIDTH)
    if several:
        applied = tightfit.fit(model, rows, int(peak_bytes * 0.5), loss, micro_batch=ROWS // 2, **asked)
    else:
        applied = tightfit.fit(Whole(model), {"rows": rows}, int(peak_bytes * 0.8), **asked)
    try:
        assert applied.trace is not None and applied.plan.host_budget_bytes == 2 * 2**20
        assert 0 < waiting(applied.plan, applied.trace) <= 2 * 2**20
        if not several:
            first = applied.plan
            applied.model(rows=torch.randn(ROWS * 5 // 4, WIDTH)).backward()
            assert applied.plan is not first and applied.trace is not None
            assert 0 < waiting(applied.plan, applied.trace) <= 2 * 2**20
            assert applied.pool.most_bytes <= 2 * 2**20
            assert "of at most 2.00 MiB" in str(applied)
    finally:
        applied.remove()


class Whole(nn.Module):
    """A model that computes its own loss, so that `fit` can plan anew."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return loss(self.inner, rows)


def test_measure_and_micro_batches_pass_it_on() -> None:
    model, trace = stack(), recorded()
    budget_bytes, free_bytes = between("offload", 1.3)
    limit = free_bytes // 2
    measured = measure(
        model, batch(), budget=budget_bytes, loss=loss, optimizer=adamw(model), levers=levers("offload"), repeats=1,
        host_budget=limit,
    )  # fmt: skip
    assert measured.plan.host_budget_bytes == limit and measured.rows[-1].gradients == "identical"
    low, _ = between("offload", 0.5)
    _, made, _ = micro_batches.exactly(trace, low, levers("offload"), frozenset(), 0)
    assert made is None
    _, made, _ = micro_batches.exactly(trace, low, levers("offload"), frozenset())
    assert made is not None


def test_the_searches_of_a_forecast_obey() -> None:
    budget_bytes, free_bytes = between("offload", 0.5)
    trace, allowed = recorded(), levers("offload")  # of the CPU: reserved bytes are the peak
    assert search.fitted(trace, budget_bytes, search.QUICK, allowed) is not None
    assert search.fitted(trace, budget_bytes, search.QUICK, allowed, free_bytes // 50) is None
    assert search.least(trace, budget_bytes, allowed).runs
    assert not search.least(trace, budget_bytes, allowed, free_bytes // 50).runs
    (said,) = more_in_host(trace, budget_bytes, allowed, free_bytes // 50)
    assert "is what binds: with " in said and said.endswith("in host memory it fits")
    assert not list(more_in_host(trace, budget_bytes, allowed, None))


@pytest.mark.slow
def test_a_forecast_says_that_the_host_budget_binds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tightfit.forecast.answer.advice_for", lambda *_: ())  # it tries other setups, which takes long
    setup = forecast.Setup(model="tightfit-demo", method="full", batch=1, seq=64, dtype="bf16", optimizer="adamw")
    allowed, device = levers("state_in_host", "optimizer_chunks"), forecast.device_asked("24GiB")
    trace = forecast.trace_setup(setup, device)
    room = (lowest(trace, levers=allowed).peak_bytes + lowest(trace, levers=levers()).peak_bytes) // 2
    answers = [
        forecast.check(setup, device, budget=room, search=False, levers=allowed, host_budget=limit)
        for limit in (None, 1000)
    ]
    assert [answer.fits for answer in answers] == [True, False]
    assert sum(answers[0].host_bytes.values()) > 1000 and answers[1].host_budget_bytes == 1000
    assert answers[1].advice[0].startswith("the host budget of 1000 B is what binds: with ")


@pytest.mark.slow
def test_all_cards_are_asked_with_the_levers_and_the_limit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tightfit.forecast.answer.gpu_names", lambda: ("rtx-4090",))
    setup = forecast.Setup(model="tightfit-demo", method="full", batch=1, seq=64, dtype="bf16", optimizer="adamw")
    allowed = levers("state_in_host", "optimizer_chunks")
    trace = forecast.trace_setup(setup, forecast.device_asked("rtx-4090"))
    monkeypatch.setattr("tightfit.forecast.answer.trace_setup", lambda *_, **__: trace)
    room = (lowest(trace, levers=allowed).peak_bytes + lowest(trace, levers=levers()).peak_bytes) // 2
    asked = ["check", setup.model, "--seq", "64", "--dtype", "bf16", "--gpu", "all", "--budget", str(room), "--levers"]
    asked.append(",".join(sorted(each.value for each in allowed)))
    assert main(asked) == 0 and "in host" in capsys.readouterr().out
    assert main([*asked, "--host-budget", "1000", "--json"]) == 1
    (answer,) = json.loads(capsys.readouterr().out)["gpus"]
    assert not answer["fits"] and answer["host_budget_bytes"] == 1000


def test_the_command_line_obeys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(TINY))
    asked = ["plan", str(tmp_path), "--batch", "1", "--seq", "16", "--levers", "recompute,state_in_host", "--json"]

    def run(*more: str) -> tuple[int, dict[str, Any], str]:
        status = main([*asked, *more])
        out, err = capsys.readouterr()
        return status, json.loads(out) if out else {}, err.splitlines()[-1]

    status, found, said = run("--budget", "70%", "--host-budget", "1KiB")
    assert status == 1 and "the host budget is what binds" in said
    assert found["host_budget_bytes"] == 1024 < found["host_bytes"] and not found["fits"]
    status, _, said = run("--host-budget", "50%")
    assert status == 2 and "no percentage such as '50%'" in said


def test_train_passes_it_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tightfit.integrations.transformers import TightfitCallback
    from tightfit.train.asked import Asked
    from tightfit.train.options import TrainOptions, check_options

    asked = Asked(options=TrainOptions(host_budget="3MiB", levers="recompute,offload"), config=None)
    assert asked.recipe().fit.host_budget == asked.resolved().host_budget == "3MiB"
    config = {"model_name_or_path": "gpt2", "host_budget": 0}
    assert parse_host_budget(Asked(options=TrainOptions(), config=config).recipe().fit.host_budget) == 0
    with pytest.raises(InvalidInput):
        check_options(TrainOptions(host_budget="10%"))
    with pytest.raises(InvalidInput):
        TightfitCallback("60%", host_budget="10%")
    spilling = Asked(options=TrainOptions(spill=str(tmp_path)), config=None)
    assert spilling.recipe().fit.spill == spilling.resolved().spill == str(tmp_path)
    told: list[Any] = []
    monkeypatch.setattr("tightfit.integrations.trainer.planned", lambda *_, **named: told.append(named) or (None, None))
    callback = TightfitCallback("60%", host_budget="3MiB", spill=tmp_path)
    callback._trainer = SimpleNamespace(args=SimpleNamespace(max_grad_norm=1.0, gradient_accumulation_steps=2))
    callback._plan_for({}, nn.Linear(1, 1), None)
    assert (told[0]["host_budget"], told[0]["spilled"]) == (3 * 2**20, True)  # what waits does so in a file


@pytest.mark.parametrize(
    ("spill", "said"),
    [
        (5, "expected spill as the path of a folder, not 5"),
        (["here"], "expected spill as the path of a folder, not \\['here'\\]"),
        ("", "spill is an empty path: give '.' if the working directory is meant"),
        ("/missing", "cannot spill to '/missing': it is no folder; make it, or choose another"),
        ("/dev/null", "cannot spill to '/dev/null': it is no folder"),
        ("/proc", "cannot spill to '/proc': no file can be made there .*; choose another folder"),
    ],
)
def test_what_cannot_be_spilled_to_is_said_before_anything_runs(spill: Any, said: str) -> None:
    from tightfit.integrations.lightning import TightfitCallback as Lightning
    from tightfit.integrations.transformers import TightfitCallback

    made = plan(recorded(), "100%")
    asks: list[Any] = [
        lambda: tightfit.fit(stack(), batch(), "90%", loss, spill=spill),
        lambda: tightfit.apply(stack(), made, spill=spill),
        lambda: TightfitCallback("60%", spill=spill),
        lambda: Lightning("60%", spill=spill),
    ]
    for ask in asks:
        with pytest.raises(InvalidInput, match=said):
            ask()


@pytest.mark.parametrize("spill", ["", "/proc"])
@pytest.mark.parametrize("in_config", [False, True])
def test_train_says_so_with_its_exit_status(
    spill: str, in_config: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["train", "--spill", spill]
    if in_config:
        (tmp_path / "train.yaml").write_text(json.dumps({"model_name_or_path": "gpt2", "spill": spill}))
        asked = ["train", "--config", str(tmp_path / "train.yaml")]
    assert main(asked) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "spill" in line
