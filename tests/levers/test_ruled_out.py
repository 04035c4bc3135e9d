"""A lever that was named and cannot be used is told, in one line; a default that cannot be used is not."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tightfit import forecast
from tightfit.cli.program import main
from tightfit.core import BudgetInfeasible, InvalidInput, Lever, LeversAsked, Trace, by_name, levers_named, parse_levers
from tightfit.fitting.micro_batches import cut_levers
from tightfit.fitting.planning import asked_in_vain
from tightfit.forecast import Setup
from tightfit.levers import ruled_out

OF_OPTIMIZER = "step_in_backward,state_in_host,gradients_in_host"
IDS = torch.arange(24)


class OwnAdamW(torch.optim.AdamW):
    """What a trial on small tensors cannot speak for."""


def network() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(4)]
    return nn.Sequential(nn.Embedding(64, 32), *blocks)


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(batch).square().mean()
    return found


def said(model: nn.Module, optimizer: torch.optim.Optimizer | None, **asked: Any) -> list[str]:
    """What `fit` warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tightfit.fit(model, IDS, "110%", loss=loss, optimizer=optimizer, **asked).remove()
    return [str(each.message) for each in caught]


def test_names_are_kept_apart_from_all() -> None:
    assert by_name(parse_levers("all,-tile")) == frozenset()
    assert by_name(parse_levers("all,nest,-offload")) == {Lever.NEST}
    assert by_name(levers_named(("recompute", Lever.NEST))) == {Lever.RECOMPUTE, Lever.NEST}
    assert by_name(frozenset({Lever.NEST})) == by_name(None) == frozenset()  # what code has put together
    asked = levers_named(frozenset({Lever.NEST}))
    assert levers_named(asked) is asked
    again = pickle.loads(pickle.dumps(asked))
    assert again == asked and isinstance(again, LeversAsked) and again.by_name == {Lever.NEST}
    _, beside = cut_levers(None, parse_levers("step_in_backward,offload") or frozenset(), True)
    assert beside == by_name(beside) == {Lever.OFFLOAD}


def test_an_optimizer_that_cannot_be_stepped_by_parts_is_said() -> None:
    model = network()
    assert said(model, OwnAdamW(model.parameters())) == []
    (line,) = said(model, OwnAdamW(model.parameters()), beside=OF_OPTIMIZER)
    assert line.startswith("state_in_host, gradients_in_host and step_in_backward were asked for, and this step")
    assert "OwnAdamW is not torch's own" in line and line.endswith("; leave it out")
    assert said(model, torch.optim.AdamW(model.parameters()), beside=OF_OPTIMIZER) == []


@pytest.mark.parametrize("beside", [{Lever.STATE_IN_HOST}, frozenset({Lever.STATE_IN_HOST}), [Lever.STATE_IN_HOST]])
def test_levers_are_named_in_any_kind_of_collection(beside: Any) -> None:
    model = network()
    (line,) = said(model, OwnAdamW(model.parameters()), beside=beside)
    assert line.startswith("state_in_host was asked for, and this step does not allow it")


@pytest.mark.parametrize("text", ["step_in_backward,-step_in_backward", "all,-step-in-backward,step_in_backward"])
def test_a_lever_that_is_asked_for_and_left_out_is_refused(text: str) -> None:
    says = f"step_in_backward is asked for and left out in '{text}': give one of the two"
    for asked in ({"beside": text}, {"levers": text}):
        with pytest.raises(InvalidInput, match=says):
            tightfit.fit(network(), IDS, "110%", loss=loss, **asked)


def test_no_optimizer_and_no_state_are_said() -> None:
    model = network()
    (line,) = said(model, None, beside="step_in_backward")
    assert line == (
        "step_in_backward was asked for, and this step does not allow it: the trace has no optimizer's step; give the "
        "optimizer, or leave it out"
    )
    (line,) = said(model, torch.optim.SGD(model.parameters()), beside="state_in_host")
    assert "the optimizer keeps no state of its parameters" in line


def test_gradients_that_are_there_already_are_said() -> None:
    model = network()
    loss(model, IDS).backward()
    (line,) = said(model, torch.optim.AdamW(model.parameters()), beside="step_in_backward")
    assert "there are gradients before the step" in line


@pytest.mark.parametrize("levers", ["recompute,step_in_backward", ("recompute", Lever.STEP_IN_BACKWARD)])
def test_levers_are_named_as_well_as_beside(levers: Any) -> None:
    (line,) = said(network(), None, levers=levers)
    assert line.startswith("step_in_backward was asked for")


#: What `check` names where a card is too small: the exact ones of the default levers, and more.
EXACT = "recompute,loss_in_place,nest,optimizer_chunks"


@pytest.mark.parametrize("levers", ["all", "all,-tile", "recompute", EXACT, f"{EXACT},offload", None])
def test_what_nobody_named_is_not_said(levers: str | None) -> None:
    assert said(network(), None, levers=levers) == []


def recorded(model: nn.Module) -> Trace:
    return tightfit.trace(model, IDS, loss=loss, fake=True)


def test_each_lever_says_what_it_lacks() -> None:
    trace = recorded(network())
    for names, lacks in (
        ("stream_weights", "no frozen weights"),
        ("loss_in_place,recompute", "no cross entropy"),
        ("tile", "recorded without tiles"),
        ("optimizer_chunks", "no optimizer's step"),
        ("recompute,nest,offload", ""),
    ):
        lines = ruled_out(trace, parse_levers(names))
        assert len(lines) == bool(lacks) and all(lacks in line for line in lines), lines
    # in a list that only adds to the default levers, those are no names
    default = "recompute,loss_in_place,tile,nest,optimizer_chunks"
    assert [line.split()[0] for line in ruled_out(trace, parse_levers(f"{default},stream_weights"))] == [
        "stream_weights"
    ]
    assert ruled_out(trace, None, parse_levers("tile")) == ()  # it is a default one


def test_units_that_are_kept_whole_are_said() -> None:
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.mul_(2)
            return x.square()

    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(Writes(), Writes()), nn.Linear(8, 8))
    trace = tightfit.trace(model, torch.randn(4, 8), loss=loss, units=["1.0", "1.1"], fake=True)
    (line,) = ruled_out(trace, parse_levers("recompute,offload"))
    assert line.startswith("recompute and offload were asked for") and "every unit is kept whole, as 1.0: it" in line


def test_where_nothing_fits_it_is_among_the_advice() -> None:
    model = network()
    trace = tightfit.trace(model, IDS, loss=loss, optimizer=OwnAdamW(model.parameters()), fake=True)
    with pytest.raises(BudgetInfeasible) as error:
        tightfit.plan(trace, "20%", beside="state_in_host")
    assert error.value.advice[0].startswith("state_in_host was asked for") and "OwnAdamW" in str(error.value)
    with pytest.raises(BudgetInfeasible) as error:
        tightfit.plan(trace, "20%")
    assert "asked for" not in str(error.value)


def test_compiled_steps_are_planned_without_what_was_named_beside() -> None:
    compiled = nn.Sequential(nn.Linear(8, 8))
    compiled[0].compile()
    trace = recorded(network())
    (line,) = asked_in_vain(compiled, trace, "60%", None, levers_named("offload"))
    assert line.startswith("offload was asked for") and "it is compiled" in line
    assert asked_in_vain(compiled, trace, "60%", None, None) == ()


SMALL = Setup(model="tightfit-demo", method="full", batch=1, seq=64, optimizer="paged-adamw8bit")


@pytest.mark.slow
def test_a_forecast_says_it_whether_or_not_it_fits() -> None:
    levers = parse_levers("recompute,state_in_host")
    lacks = "state_in_host was asked for, and this step does not allow it: paged-adamw8bit steps by kernels"
    fits = forecast.check(SMALL, forecast.device_asked("8GiB"), search=False, levers=levers)
    assert fits.fits and fits.notes[0].startswith(lacks) and not fits.advice
    no = forecast.check(SMALL, forecast.device_asked("620MiB"), search=False, levers=levers)
    assert not no.fits and no.advice[0].startswith(lacks)
    silent = forecast.check(SMALL, forecast.device_asked("8GiB"), search=False)
    assert not any("asked for" in note for note in silent.notes)


def test_several_processes_are_said() -> None:
    setup = Setup(model="tightfit-demo", method="lora", batch=1, seq=64, world_size=2, strategy="ddp")
    trace = forecast.trace_setup(setup, forecast.device_asked("8GiB"))
    of_optimizer, frozen = ruled_out(trace, parse_levers("step_in_backward,stream_weights"))
    assert "several processes share the step" in of_optimizer and "no frozen weights" in frozen


def test_the_command_line_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "plan.json")
    asked = ["plan", "tightfit-demo", "--batch", "1", "--seq", "32", "--optimizer", "none", "--out", out]
    asked += ["--budget", "100%", "--explain"]
    line = "step_in_backward was asked for, and this step does not allow it"
    assert main([*asked, "--levers", "recompute,step_in_backward"]) == 0
    told = capsys.readouterr()
    assert " ".join(told.out.split()).count(line) == 1 and line not in told.err  # a part of the explanation
    assert main([*asked[:-1], "--levers", "recompute,step_in_backward"]) == 0
    told = capsys.readouterr()
    assert line not in told.out and told.err.count(f"tightfit: {line}") == 1
    assert main(asked) == 0
    told = capsys.readouterr()
    assert "was asked for" not in told.out + told.err
