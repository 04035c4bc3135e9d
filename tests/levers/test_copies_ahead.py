"""Copies that begin before they are needed: what is there at once is in the prediction, and the bits stay.

On the CPU there is nothing beside which to copy. A plan that says `ahead` has the same tensors there, at the same
moments as on a card, all the same. The waits are tried on the card that does not exist (`tests/pretend`).
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tightfit.core import Phase, Plan, PlanMismatch, Trace, dumps, loads
from tightfit.engine import Applied
from tightfit.levers.stream_weights import DEFINITION as STREAM
from tightfit.levers.stream_weights.requests import Request, foreseen, requests_of
from tightfit.plan import lowest, simulate
from tightfit.step.run import elsewhere, is_elsewhere
from tightfit.verify.peak import PeakMeter

OF_STATE = "recompute,state_in_host"
OF_WEIGHTS = "recompute,stream_weights"


def stack() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(6)))
    return model, torch.optim.AdamW(model.parameters(), 1e-2)


BATCH = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(batch).square().mean()
    return found


@pytest.fixture(scope="module")
def recorded() -> Trace:
    model, optimizer = stack()
    return tightfit.trace(model, BATCH, loss, optimizer=optimizer)


def on_card(trace: Trace) -> Trace:
    """The step of a device whose copies run beside the compute, as slow as it takes for them to matter."""
    return dataclasses.replace(trace, copies_beside=True, out_bytes_per_second=1e9, back_bytes_per_second=1e9)


def with_ahead(trace: Trace, plan: Plan, *names: str) -> Plan:
    ahead = dataclasses.replace(plan, ahead=names)
    peak_bytes = simulate(trace, ahead).peak_bytes
    return dataclasses.replace(ahead, peak_bytes=peak_bytes, budget_bytes=peak_bytes)


def assert_held(model: nn.Module, plan: Plan, **step: Any) -> None:
    proof = tightfit.verify(model, BATCH, plan, loss=loss, **step)
    assert proof.passed, str(proof)
    assert abs(float(proof["prediction"].measured.split("off by ")[1].rstrip("%"))) <= 0.05, str(proof)


@pytest.mark.parametrize("levers", [OF_STATE, f"{OF_STATE},gradients_in_host"])
def test_state_of_the_parts_before_and_behind_is_in_the_peak(recorded: Trace, levers: str) -> None:
    plan = lowest(recorded, levers=levers)
    ahead = with_ahead(recorded, plan, "state_in_host")
    state = [simulate(recorded, each).by_category["optimizer_state"] for each in (plan, ahead)]
    assert max(state[1]) > 2.5 * max(state[0])
    assert ahead.peak_bytes > 1.05 * plan.peak_bytes
    for each in (plan, ahead):
        model, optimizer = stack()
        assert_held(model, each, optimizer=optimizer)


def test_on_the_cpu_nothing_is_copied_ahead(recorded: Trace) -> None:
    plan = tightfit.plan(recorded, lowest(recorded, levers=OF_STATE).peak_bytes * 2, levers=OF_STATE)
    assert plan.ahead == ()


def test_state_comes_ahead_where_there_is_room(recorded: Trace) -> None:
    trace = on_card(recorded)
    least = lowest(trace, levers=OF_STATE)
    needed = simulate(trace, dataclasses.replace(least, ahead=("state_in_host",))).peak_bytes
    made = {size: tightfit.plan(trace, size, levers=OF_STATE) for size in (least.peak_bytes, needed - 1, needed)}
    assert [plan.ahead for plan in made.values()] == [(), (), ("state_in_host",)]
    for size, plan in made.items():
        assert plan.peak_bytes == simulate(trace, plan).peak_bytes <= size
    # half of the copies run beside the other half
    without, ahead = made[least.peak_bytes], made[needed]
    assert 0.4 * without.other_seconds < ahead.other_seconds <= 0.5 * without.other_seconds
    assert ahead.step_seconds < without.step_seconds


def test_a_plan_says_what_is_copied_ahead(recorded: Trace) -> None:
    plan = lowest(recorded, levers=OF_STATE)
    ahead = dataclasses.replace(plan, ahead=("state_in_host",))
    assert loads(Plan, dumps(ahead)) == ahead and ahead.decisions != plan.decisions
    of_before = dumps(plan).replace(', "ahead": []', "")
    assert of_before != dumps(plan) and loads(Plan, of_before) == plan
    with pytest.raises(PlanMismatch, match="'other'"):
        simulate(recorded, dataclasses.replace(plan, ahead=("other",)))


# -------------------------------------------------------------------------------------------- weights


class Adapted(nn.Module):
    """Frozen weights with a trained path of low rank beside them."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.requires_grad_(False)
        self.first, self.second = nn.Linear(width, 4, bias=False), nn.Linear(4, width, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        own = self.down(nn.functional.gelu(self.up(hidden)))
        return hidden + own + self.second(self.first(hidden).tanh())


class Blocks(nn.Module):
    """`turns`: which block comes when."""

    def __init__(self, *turns: int) -> None:
        super().__init__()
        self.blocks, self.turns = nn.ModuleList(Adapted() for _ in range(max(turns) + 1)), turns

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        for turn in self.turns:
            rows = self.blocks[turn](rows)
        return rows.square().mean()


class Around(nn.Module):
    """A module with frozen weights of its own around another one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(48, 48), requires_grad=False)
        self.inner = Blocks(0, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner((rows @ self.scale).tanh()) + (rows @ self.scale).sin().mean()
        return found


def in_four_bit() -> nn.Module:
    pytest.importorskip("bitsandbytes")
    from tightfit.integrations.bitsandbytes import quantise

    made = Blocks(0, 1, 2)
    trained = [(block.first, block.second) for block in made.blocks]
    for block in made.blocks:
        del block.first, block.second
    quantise(made, torch.float32)
    for block, (block.first, block.second) in zip(made.blocks, trained, strict=True):
        block.first.requires_grad_(True), block.second.requires_grad_(True)
    return made


ROWS = torch.randn(16, 48, generator=torch.Generator().manual_seed(0))
MODELS: dict[str, Callable[[], nn.Module]] = {
    "in a row": lambda: Blocks(0, 1, 2),
    "twice in the same order": lambda: Blocks(0, 1, 0, 1),
    "twice in another order": lambda: Blocks(0, 1, 0, 2),
    "the same one twice": lambda: Blocks(0, 0, 1),
    "around others": Around,
    "in 4 bits": in_four_bit,
}


def called(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(rows)
    return found


def steps(model: nn.Module, plan: Plan | None, count: int = 4) -> tuple[list[torch.Tensor], list[Any]]:
    """Losses and gradients of so many steps of a copy of `model`, and what was counted after each."""
    model, found, counts = copy.deepcopy(model), [], []
    applied = None if plan is None else tightfit.apply(model, plan)
    for _ in range(count):
        loss = model(ROWS)
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        model.zero_grad()
        counts += [] if applied is None else [applied.stats().levers["stream_weights"]]
    return found, counts


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(map(torch.equal, one, other))


def streamed(trace: Trace, levers: str) -> Plan:
    """The least peak; without other levers, all that it streams and nothing else."""
    plan = lowest(trace, levers=OF_WEIGHTS if levers == "stream_weights" else levers)
    if levers != "stream_weights":
        return plan
    return with_ahead(trace, dataclasses.replace(tightfit.plan(trace, "100%"), settings=plan.settings))


@pytest.mark.parametrize("levers", ["stream_weights", OF_WEIGHTS, f"{OF_WEIGHTS},offload"])
@pytest.mark.parametrize("name", MODELS)
def test_weights_that_come_ahead_are_in_the_peak(name: str, levers: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    trace = tightfit.trace(model, ROWS, called)
    plan = streamed(trace, levers)
    ahead = with_ahead(trace, plan, "stream_weights")
    assert ahead.peak_bytes > plan.peak_bytes
    proof = tightfit.verify(model, ROWS, ahead, loss=called)
    assert proof.passed, str(proof)
    assert abs(float(proof["prediction"].measured.split("off by ")[1].rstrip("%"))) <= 0.05, str(proof)
    expected, _ = steps(model, None)
    found, counts = steps(model, ahead)
    assert same(expected, found)
    # the engine foresees what the referee does, and nothing in the first step
    order = requests_of(trace, trace.frozen)
    values = sum(len(other.values) for _, other in foreseen(order))
    assert [each.ahead for each in counts] == [values * step for step in range(4)] and values > 0
    assert counts[-1].dropped == 0


def test_which_requests_are_foreseen() -> None:
    def request(phase: Phase, name: str) -> Request:
        return Request((phase, name), 0, (0,), is_load=False)

    def pairs(forward: str, backward: str) -> str:
        order = [request(Phase.FORWARD, name) for name in forward] + [request(Phase.BACKWARD, n) for n in backward]
        return " ".join(f"{one.key[1]}{other.key[1]}" for one, other in foreseen(order))

    assert pairs("abc", "CBA") == "ab bc CB BA"
    assert pairs("abab", "") == "ab ab"  # the first of forward is not, and what comes after b is not always a
    assert pairs("abac", "CA") == "CA"
    assert pairs("aab", "BA") == "BA"
    assert pairs("a", "A") == pairs("", "") == ""


def test_weights_come_ahead_where_there_is_room() -> None:
    torch.manual_seed(0)
    model = Blocks(0, 1, 2)
    trace = on_card(tightfit.trace(model, ROWS, called))
    trace = dataclasses.replace(trace, ops=tuple(dataclasses.replace(op, seconds=1e-3) for op in trace.ops))
    for levers in ("stream_weights", OF_WEIGHTS):
        least = streamed(trace, "stream_weights")
        needed = simulate(trace, dataclasses.replace(least, ahead=("stream_weights",))).peak_bytes
        made = [tightfit.plan(trace, size, levers=levers) for size in (least.peak_bytes, needed)]
        assert [plan.ahead for plan in made] == [(), ("stream_weights",)]
        # all but the first copies of forward and backward run beside the compute
        assert made[1].other_seconds < 0.3 * made[0].other_seconds and made[1].step_seconds < made[0].step_seconds
        for plan in made:
            assert plan.peak_bytes == simulate(trace, plan).peak_bytes <= plan.budget_bytes
        assert "copied while others are read" in STREAM.said(made[1])
        assert tightfit.plan(dataclasses.replace(trace, copies_beside=False), needed, levers=levers).ahead == ()


def test_every_lever_that_copies_ahead_at_once() -> None:
    torch.manual_seed(0)
    model = Blocks(0, 1, 2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    trace = tightfit.trace(model, ROWS, called, optimizer=optimizer)
    for levers in ("state_in_host,gradients_in_host", "step_in_backward"):
        plan = lowest(trace, levers=f"{OF_WEIGHTS},{levers}")
        names = [name for name in ("state_in_host", "stream_weights") if name in plan.settings]
        ahead = with_ahead(trace, plan, *names)
        assert set(ahead.settings) >= {*levers.split(","), "stream_weights"}
        proof = tightfit.verify(model, ROWS, ahead, loss=called, optimizer=optimizer)
        assert proof.passed, str(proof)
        assert abs(float(proof["prediction"].measured.split("off by ")[1].rstrip("%"))) <= 0.05, str(proof)


# ------------------------------------------------------------------------------- a model that is dropped


def in_force(lever: str) -> tuple[nn.Module, torch.optim.Optimizer | None, Applied]:
    """A model with a plan in force and a step behind it, in a cycle with what belongs to it."""

    def made() -> tuple[nn.Module, torch.optim.Optimizer | None]:
        return stack() if lever != "stream_weights" else (Blocks(0, 1, 2), None)

    rows, run = (BATCH, loss) if lever != "stream_weights" else (ROWS, called)
    model, optimizer = made()
    plan = lowest(tightfit.trace(model, rows, run, optimizer=optimizer), levers=f"recompute,{lever}")
    model, optimizer = made()  # not the one that was recorded, which a recording may know a while
    applied = tightfit.apply(model, plan, optimizer=optimizer)
    run(model, rows).backward()
    if optimizer is not None:
        optimizer.step()
    model.__dict__["all of it"] = model, optimizer, applied
    return model, optimizer, applied


@pytest.mark.parametrize("lever", ["stream_weights", "state_in_host", "gradients_in_host"])
def test_what_the_collector_takes_is_not_brought_back_first(lever: str) -> None:
    """A model is dropped with its plan in force. What runs when Python finds that has the memory for itself."""
    gc.collect()
    gc.disable()
    try:
        model = weakref.ref(in_force(lever)[0])
        assert model() is not None
        with PeakMeter("cpu") as collecting:
            gc.collect()
    finally:
        gc.enable()
    assert collecting.rise_bytes == 0
    assert model() is None


@pytest.mark.parametrize("lever", ["stream_weights", "state_in_host", "gradients_in_host"])
def test_what_somebody_still_has_is_brought_back(lever: str) -> None:
    model, optimizer, applied = in_force(lever)

    def waiting() -> bool:
        if optimizer is None:
            return any(map(is_elsewhere, model.parameters()))
        if lever == "gradients_in_host":
            return any(p.grad is not None and is_elsewhere(p.grad) for p in model.parameters())
        return any(value in elsewhere for state in optimizer.state.values() for value in state.values())

    assert waiting()
    applied.remove()
    assert not waiting()


@pytest.mark.parametrize("lever", ["stream_weights", "state_in_host", "gradients_in_host"])
def test_what_outlives_the_plan_is_brought_back_when_the_collector_takes_the_plan(lever: str) -> None:
    """Somebody goes on with a part of what was fitted."""
    model, optimizer, applied = in_force(lever)
    kept = list(model.parameters()) if lever != "state_in_host" else []
    states = {} if optimizer is None or lever != "state_in_host" else optimizer.state
    plan_in_force = weakref.ref(applied)

    def waiting() -> bool:
        state = [value for each in states.values() for value in each.values()]
        return any(map(is_elsewhere, (*kept, *(p.grad for p in kept if p.grad is not None)))) or any(
            value in elsewhere for value in state
        )

    assert waiting()
    if lever == "state_in_host":
        model.__dict__["all of it"] = model, applied  # the optimizer is still there
    del model, applied
    if lever != "state_in_host":
        del optimizer
    gc.collect()
    assert plan_in_force() is None
    assert not waiting()
