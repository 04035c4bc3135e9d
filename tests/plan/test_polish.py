"""What is added to the frontier's points: options with a lower moment of their own, and values kept by the referee."""

from __future__ import annotations

import contextlib
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tests.plan.stacks import Lean, steady, traced
from torch import nn

import tightfit
from tightfit.core import Action, Trace, Unsupported
from tightfit.device.cost import NOMINAL_CPU, retimed
from tightfit.plan import Effort, effects, every_block, lowest, planning, table, ways
from tightfit.plan.polish import _additions, _others, lowered, polished
from tightfit.plan.simulate import simulate_choices
from tightfit.plan.ways import way_of


@pytest.fixture(scope="module")
def llama() -> Trace:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=500, hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4
    )
    ids = torch.randint(0, 500, (2, 96))
    model = transformers.LlamaForCausalLM(config).train()
    return retimed(tightfit.trace(model, {"input_ids": ids, "labels": ids}), NOMINAL_CPU)


def test_options_of_a_lower_moment_lower_the_peak(llama: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fullest moment is in a block's own backward, which the frontier does not see."""
    monkeypatch.setattr(ways, "_WHOLE_EVENTS", 0)  # the program over the whole step would find them by itself
    monkeypatch.setattr(ways, "_latest", {})
    with_them = lowest(llama, levers=("recompute",))
    effort = Effort(points=40, solver_seconds=5.0, proves=False)
    quick = lowest(llama, levers=("recompute",), effort=effort)
    monkeypatch.setattr(ways, "_latest", {})
    monkeypatch.setattr(table, "leaner", lambda *_, **__: [])
    effects.alike.cache_clear()  # what was found for these units before
    without, quick_without = lowest(llama, levers=("recompute",)), lowest(llama, levers=("recompute",), effort=effort)
    monkeypatch.setattr(ways, "_latest", {})
    effects.alike.cache_clear()
    assert with_them.peak_bytes < 0.98 * without.peak_bytes
    assert quick.peak_bytes < 0.99 * quick_without.peak_bytes  # forecasts are made in quick searches
    assert tightfit.simulate(llama, with_them).peak_bytes == with_them.peak_bytes
    fixed = sum(llama.static_bytes.values())
    assert with_them.peak_bytes > fixed


def test_nestings_are_judged_by_units_that_hold_little_in_their_own_backward(llama: Trace) -> None:
    """Where each unit keeps the fewest bytes, its own backward needs more, and a nesting seems to reach less deep."""
    way = way_of(llama)
    for nested in way.nested:
        choices = tuple(nested.nesting.on(choice) for choice in way.fewest) if nested.nesting else ()
        assert nested.floor.peak_bytes < 0.95 * simulate_choices(llama, choices, nested.advances).peak_bytes


@pytest.mark.slow
def test_a_nesting_reaches_what_the_deepest_one_chooses() -> None:
    """In a step with adapters, blocks that are alike choose apart at the lowest peak."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = get_peft_model(transformers.LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear"))
    ids = torch.randint(0, 300, (2, 96))
    trace = tightfit.trace(model.train(), {"input_ids": ids, "labels": ids}, tiles=False)
    way = way_of(trace)
    for each in way.nested:
        assert each.reach.peak_bytes < each.floor.peak_bytes
    assert planning._nested([way], None, way.nested[-1].floor.peak_bytes - 1, None) is not None
    assert planning._nested([way], None, way.nested[-1].reach.peak_bytes - 1, None) is None


def test_nested_plans_are_polished_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a sweep makes again is never kept, and everything else may be."""
    trace = traced(6, 16, 4, 64, Lean)
    budget = lowest(trace).peak_bytes
    found = tightfit.plan(trace, budget)
    monkeypatch.setattr(planning, "polished", lambda _, choices, line, *__: (choices, line))
    without = tightfit.plan(trace, budget)
    assert found.advances and found.advances == without.advances
    assert found.recompute_seconds < 0.9 * without.recompute_seconds
    assert tightfit.simulate(trace, found).peak_bytes == found.peak_bytes <= budget
    chosen = {choice.unit: choice for choice in every_block(trace).choices}
    added = {(path, value) for _, paths, value in _additions(trace, chosen) for path in paths}
    path, value = min(added)
    chosen[path] = dataclasses.replace(chosen[path], lends=(value,))
    left = {(path, value) for _, paths, value in _additions(trace, chosen) for path in paths}
    assert left == added - {(path, value)}


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_polish_stays_within_the_budget_and_never_costs(share: float) -> None:
    trace = traced(3, 16, 4, 64, Lean)
    start = every_block(trace)
    line = simulate_choices(trace, start.choices)
    unplanned = tightfit.simulate(trace).peak_bytes
    budget = line.peak_bytes + int(share * (unplanned - line.peak_bytes))
    choices, found = polished(trace, start.choices, line, budget)
    assert found == simulate_choices(trace, choices)
    assert found.peak_bytes <= budget
    assert found.recompute_seconds <= line.recompute_seconds
    if share == 1.0:
        assert found.recompute_seconds < 0.1 * line.recompute_seconds


def test_seconds_that_a_busy_machine_bends_do_not_move_the_lowest_peak() -> None:
    trace = traced(3, 16, 4, 64, Lean)
    assert lowest(trace).peak_bytes == lowest(steady(trace)).peak_bytes


def test_the_referee_takes_the_lowest_peak_further_down(llama: Trace) -> None:
    start = every_block(llama)
    line = simulate_choices(llama, start.choices)
    choices, found = lowered(llama, start.choices, line, start.choices)
    assert found == simulate_choices(llama, choices)
    assert found.peak_bytes < line.peak_bytes
    # a unit that has to keep everything does
    whole = tuple(
        dataclasses.replace(each, actions=tuple(type(action).KEEP for action in each.actions)) for each in start.choices
    )
    assert lowered(llama, whole, simulate_choices(llama, whole), whole)[0] == whole


def test_what_is_kept_is_tried_first(llama: Trace) -> None:
    """A long unit has more values than there are tries, and only what is kept takes bytes where it is waited with."""
    chosen = {choice.unit: choice for choice in every_block(llama).choices}
    path, choice = next(iter(chosen.items()))
    mixed = dataclasses.replace(
        choice, actions=tuple(Action.KEEP if v % 2 else Action.RECOMPUTE for v in range(len(choice.actions)))
    )
    tried = _others({path: mixed}, {path: choice}, path, {}, {})[2:]
    kept = [sum(action is Action.KEEP for action in each.actions) for each, _ in tried]
    assert kept == sorted(kept) and len(set(kept)) == 2
    # then what backward reads nearest to the peak, and last what did not help before
    _, *others = range(0, len(choice.actions), 2)
    apart = {value: abs(value - others[3]) for value in others}
    tried = _others({path: mixed}, {path: choice}, path, apart, {1: 1, others[3]: 1})[2:]
    order = [value for _, value in tried]
    assert order[: len(kept) // 2 - 1] == list(range(3, len(choice.actions), 2))
    assert sorted(order[len(kept) // 2 - 1 :][:2]) == sorted((others[2], others[4]))
    assert order[-2:] == [1, others[3]] and set(order) == set(range(len(choice.actions)))


class Turns(nn.Module):
    """A cell in a loop: one long unit, whose backward has the fullest moment in its midst."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(32, 64)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        state = inputs.new_zeros(inputs.shape[0], 64)
        for turn in range(inputs.shape[1]):
            state = self.cell(inputs[:, turn], state)
        return state.square().mean()


@pytest.mark.parametrize("turns", [16, 20])  # in the first it takes more tries, in the second the peak is a sum's
def test_no_value_of_a_loop_more_or_less_takes_its_lowest_peak_down(turns: int) -> None:
    torch.manual_seed(0)
    trace = tightfit.trace(Turns(), torch.randn(32, turns, 32))
    low = lowest(trace, levers=("recompute",))
    (choice,) = low.choices
    flipped = {Action.KEEP: Action.RECOMPUTE, Action.RECOMPUTE: Action.KEEP}
    for value, action in enumerate(choice.actions):
        actions = (*choice.actions[:value], flipped[action], *choice.actions[value + 1 :])
        with contextlib.suppress(Unsupported):
            line = simulate_choices(trace, (dataclasses.replace(choice, actions=actions),))
            assert line.peak_bytes >= low.peak_bytes, value


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_no_value_more_of_a_loop_fits_and_saves_seconds(share: float) -> None:
    torch.manual_seed(0)
    trace = retimed(tightfit.trace(Turns(), torch.randn(32, 16, 32)), NOMINAL_CPU)
    low, whole = lowest(trace, levers=("recompute",)).peak_bytes, tightfit.simulate(trace).peak_bytes
    found = tightfit.plan(trace, low + int(share * (whole - low)), levers=("recompute",))
    (choice,) = found.choices
    for value, action in enumerate(choice.actions):
        if action is Action.RECOMPUTE:
            actions = (*choice.actions[:value], Action.KEEP, *choice.actions[value + 1 :])
            line = simulate_choices(trace, (dataclasses.replace(choice, actions=actions),))
            assert line.peak_bytes > found.budget_bytes or line.recompute_seconds >= found.recompute_seconds, value


def test_options_that_do_not_fit_are_not_asked_for_again() -> None:
    """The referee finds a byte too many, and the model's own peak is far below what it was asked for."""
    peaks, asked = {0: 950, 1: 880, 2: 500}, []

    def solve(target: int | None) -> Any:
        asked.append(target)
        fitting = [index for index, peak in peaks.items() if target is not None and peak <= target] or [2]
        return SimpleNamespace(points={"unit": fitting[0]}, how=frozenset())

    model = SimpleNamespace(solve=solve, peak_bytes=lambda points: peaks[points["unit"]])
    way = SimpleNamespace(
        refereed=lambda points, _: (
            points, SimpleNamespace(peak_bytes=peaks[points["unit"]] + 51, recompute_seconds=points["unit"] + 1.0)
        ),
        holds=lambda line, budget: line.peak_bytes <= budget,
        effort=Effort(proves=False),
    )  # fmt: skip
    found = planning._fitting(way, model, 1000)  # type: ignore[arg-type]
    assert found is not None and found.choices == {"unit": 1}
    assert asked[:2] == [1000, 949]
