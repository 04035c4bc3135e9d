"""Copies that begin before they are needed: what is there at once is in the prediction, and the bits stay.

On the CPU there is nothing beside which to copy. A plan that says `ahead` has the same tensors there, at the same
moments as on a card, all the same. The waits are tried on the card that does not exist (`tests/pretend`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tightfit.core import Plan, PlanMismatch, Trace, dumps, loads
from tightfit.plan import lowest, simulate

OF_STATE = "recompute,state_in_host"


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
    assert proof.passed, proof
    assert abs(float(proof["prediction"].measured.split("off by ")[1].rstrip("%"))) <= 0.05, proof


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
