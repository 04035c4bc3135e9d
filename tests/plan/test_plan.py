"""Whole plans against brute force: every keep set of every unit of small real modules, judged by `simulate`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.plan.stacks import Lean, brute_force, traced
from torch import nn

import tightfit
from tightfit.core import Action, BudgetInfeasible, Choice, InvalidInput, PlanMismatch, Status, Trace
from tightfit.plan import choose, every_block, one_of_each, solver
from tightfit.plan.choose import Model
from tightfit.plan.effort import THOROUGH
from tightfit.plan.planning import feasible
from tightfit.plan.program import kept_values, recipe
from tightfit.plan.simulate import simulate_choices

SHAPES = [(2, 16, 4, 64), (2, 8, 64, 64), (3, 8, 8, 32), (3, 16, 4, 64, Lean), (2, 16, 64, 64, Lean)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [1.0, 0.9, 0.75, 0.6, 0.53, 0.45, 0.37, 0.3, 0.22, 0.15, 0.07, 0.0])
def test_plan_against_every_combination(shape: tuple[Any, ...], share: float) -> None:
    trace, every = traced(*shape), brute_force(*shape)
    least = min(peak for peak, _ in every)
    unplanned = tightfit.simulate(trace).peak_bytes
    budget = least + int(share * (unplanned - least))
    best = min(seconds for peak, seconds in every if peak <= budget)
    plan = tightfit.plan(trace, budget)
    assert plan.peak_bytes <= budget
    assert plan.recompute_seconds >= best - 1e-9, "faster than brute force: the simulator and the planner disagree"
    assert plan.bound_seconds <= best + 1e-9, "the bound is no bound"
    if plan.status is Status.OPTIMAL:
        assert plan.recompute_seconds == pytest.approx(best)
    step_seconds = sum(op.seconds for op in trace.ops)
    assert plan.recompute_seconds <= best + 0.01 * (step_seconds + best), "far from the optimum"


def test_every_block_keeps_nothing_and_is_replayed_whole() -> None:
    trace = traced(*SHAPES[2])
    plan = every_block(trace)
    program = trace.programs[0]
    for choice in plan.choices:
        assert not recipe(program, kept_values(choice.actions)).captured - set(program.held)
    assert plan.replays == len(trace.units)


def test_a_budget_that_holds_the_step_plans_nothing() -> None:
    trace = traced(*SHAPES[2])
    plan = tightfit.plan(trace, "100%")
    assert plan.replays == 0
    assert plan.recompute_seconds == 0
    assert plan.status is Status.OPTIMAL
    assert all(choice.keeps_all for choice in plan.choices)


def test_infeasible_says_the_least_and_it_is_feasible() -> None:
    trace = traced(*SHAPES[2])
    with pytest.raises(BudgetInfeasible) as caught:
        tightfit.plan(trace, 1000)
    assert caught.value.budget_bytes == 1000
    assert str(caught.value).count("\n") == 0
    assert caught.value.advice
    least = min(peak for peak, _ in brute_force(*SHAPES[2]))
    assert least <= caught.value.least_bytes <= least * 1.02
    assert tightfit.plan(trace, caught.value.least_bytes).peak_bytes <= caught.value.least_bytes


def test_feasible_is_the_plan_or_nothing() -> None:
    trace = traced(*SHAPES[2])
    whole_bytes = tightfit.plan(trace, "100%").unplanned_peak_bytes
    with pytest.raises(BudgetInfeasible) as caught:
        tightfit.plan(trace, 1000)
    least_bytes = caught.value.least_bytes
    for budget_bytes in (least_bytes, (least_bytes + whole_bytes) // 2, whole_bytes):
        assert feasible(trace, budget_bytes, effort=THOROUGH) == tightfit.plan(trace, budget_bytes)
    assert feasible(trace, least_bytes - 1, effort=THOROUGH) is None
    assert feasible(trace, least_bytes, effort=THOROUGH, kinds=(False,)) is None  # a trace without tiles


@pytest.mark.parametrize("budget", ["x", "-1GiB", "0", 0, -5, "12QB", "", "nan%", True])
def test_a_budget_that_is_none(budget: object) -> None:
    with pytest.raises(InvalidInput):
        tightfit.plan(traced(*SHAPES[2]), budget)


def test_simulate_refuses_a_foreign_plan() -> None:
    plan = tightfit.plan(traced(*SHAPES[2]), "100%")
    with pytest.raises(PlanMismatch, match="trace"):
        tightfit.simulate(traced(*SHAPES[0]), plan)


@functools.cache
def transformer() -> Trace:
    torch.manual_seed(0)
    layers = (nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True) for _ in range(2))
    model = nn.Sequential(nn.Embedding(300, 32), nn.Sequential(*layers), nn.Linear(32, 300))
    tokens = torch.randint(0, 300, (4, 48))
    return tightfit.trace(
        model, tokens, loss=lambda m, b: nn.functional.cross_entropy(m(b).flatten(0, 1), b.flatten()), units="1.*"
    )


def with_noise(trace: Trace, seed: int) -> Trace:
    """`trace` as a busier machine would have timed it."""
    ops = tuple(
        dataclasses.replace(op, seconds=op.seconds * random.Random(f"{seed} {op.ordinal}").choice((0.4, 1.0, 3.0)))
        for op in trace.ops
    )
    return dataclasses.replace(trace, ops=ops)


@pytest.mark.parametrize(
    "make", [pytest.param(transformer, marks=pytest.mark.slow), functools.partial(traced, *SHAPES[0])]
)
def test_the_least_does_not_depend_on_noisy_seconds(make: Callable[[], Trace]) -> None:
    leasts = []
    traces = [with_noise(make(), seed) for seed in range(4)]
    for trace in traces:
        with pytest.raises(BudgetInfeasible) as caught:
            tightfit.plan(trace, 1000)
        leasts.append(caught.value.least_bytes)
    assert len(set(leasts)) == 1, leasts
    for trace in traces:
        assert tightfit.plan(trace, leasts[0]).peak_bytes <= leasts[0]


class Chain(nn.Module):
    """A unit of a few random ops that is wide inside, so that its own backward holds the peak."""

    OPS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
        torch.tanh, torch.sigmoid, torch.exp, lambda x: x * x, lambda x: x.cumsum(-1), lambda x: x.softmax(-1),
        lambda x: torch.cat([x, x], -1), lambda x: x[..., ::2] * x[..., 1::2],
    )  # fmt: skip

    def __init__(self, draw: random.Random, count: int) -> None:
        super().__init__()
        self.ops = [draw.choice(self.OPS) for _ in range(count)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for op in self.ops:
            y = op(y)
        return x + y.mean(-1, keepdim=True)


def random_chains(seed: int) -> Trace:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    depth = draw.choice((1, 2, 2))
    chains = (Chain(draw, draw.randrange(3, 8 if depth == 1 else 5)) for _ in range(depth))
    model = nn.Sequential(nn.Linear(8, 32), nn.Sequential(*chains))
    units = [f"1.{index}" for index in range(depth)]
    trace = tightfit.trace(model, torch.randn(64, 8), loss=lambda m, b: m(b).square().mean(), units=units)
    ops = tuple(dataclasses.replace(op, seconds=draw.choice((1e-3, 3e-3, 1e-2))) for op in trace.ops)
    return dataclasses.replace(trace, ops=ops)


def every_outcome(trace: Trace) -> list[tuple[int, float]]:
    """(peak, seconds run again) by the referee of every combination of what the units keep."""
    options = []
    for unit, frame in zip(trace.units, trace.frames, strict=True):
        program = trace.programs[frame.id]
        free = sorted({v for step in program.steps for v in step.reads}.union(program.needed).difference(program.held))
        found = []
        for kept in itertools.product((Action.KEEP, Action.RECOMPUTE), repeat=len(free)):
            chosen = dict(zip(free, kept, strict=True))
            actions = tuple(chosen.get(v, Action.KEEP) for v in range(program.values))
            found.append(Choice(unit=unit.path, actions=actions, signature=unit.signature, program=unit.digest))
        options.append(found)
    lines = (simulate_choices(trace, choices) for choices in itertools.product(*options))
    return [(line.peak_bytes, line.recompute_seconds) for line in lines]


@pytest.mark.parametrize("seed", range(24))
def test_the_bound_is_below_every_plan(seed: int) -> None:
    trace = random_chains(seed)
    outcomes = every_outcome(trace)
    peaks = sorted({peak for peak, _ in outcomes})
    model = Model(trace)
    for budget in {*peaks[:3], *peaks[:: max(1, len(peaks) // 8)]}:
        plan = None
        with contextlib.suppress(BudgetInfeasible):
            plan = tightfit.plan(trace, budget)
        best = min(seconds for peak, seconds in outcomes if peak <= budget)
        # without an answer of the relaxation a plan gets the bound 0, which would hide that it forbids too much
        relaxed = model._solve(budget, model._relaxed)
        assert relaxed is not None, "the relaxation forbids what is possible"
        assert relaxed.bound <= best + 1e-9
        assert not model.is_ruled_out(budget)
        if plan is not None:
            assert plan.bound_seconds <= best + 1e-9, "the bound is no bound"
            assert plan.recompute_seconds >= best - 1e-9
            assert plan.status is not Status.OPTIMAL or plan.recompute_seconds == pytest.approx(best)


def test_rows_that_bind_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where options are many, the solver sees few rows at first. The answer holds all of them, and is as good."""
    model = Model(transformer())
    least = model.solve(None)
    assert least is not None
    most = int(model.base_top.max())
    low = model.peak_bytes(least.points)
    budgets = [low + (most - low) * tenths // 10 for tenths in range(1, 9)]
    exact = [model.solve(budget) for budget in budgets]
    proven = [model.bound_seconds(budget) for budget in budgets]
    monkeypatch.setattr(choose, "FEW", 0)
    for name in ("FEW", "_EACH"):
        monkeypatch.setattr(one_of_each, name, 0 if name == "FEW" else 1)
    for name in ("_ROWS", "_RELAXED_ROWS"):
        monkeypatch.setattr(one_of_each, name, 1)
    step_seconds = sum(op.seconds for op in model.trace.ops)
    put: list[int] = []
    monkeypatch.setattr(
        solver, "engine", lambda program, *rest: put.append(len(program.row_low)) or solver.highs(program, *rest)
    )
    for budget, best, bound in zip(budgets, exact, proven, strict=True):
        found = model.solve(budget)
        assert found is not None
        assert best is not None
        assert model.peak_bytes(found.points) <= budget
        assert found.seconds <= best.seconds + 3e-4 * step_seconds
        assert model.bound_seconds(budget) <= bound + 1e-9, "fewer rows cannot prove more"
    lowest = model.solve(None)
    assert lowest is not None
    assert model.peak_bytes(lowest.points) <= low * 1.0002
    assert len(set(put)) > 1, "no row was ever added"
