"""What `fit` promises of bits, of names, and of a model's own checkpointing."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import warnings
from typing import Any

import pytest
import torch
from tests.names import is_on, switch_on
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import tightfit
from tightfit.core import BudgetInfeasible, InvalidInput, Lever, Trace, format_bytes, levers_named
from tightfit.integrations.trainer import TightfitCallback
from tightfit.plan import lowest
from tightfit.plan.micro_batches import QUICK
from tightfit.plan.tighter import tighter
from tightfit.verify.gradients import Outcome, differences
from tightfit.verify.peak import peak_checks


def made(vocabulary: int = 256, layers: int = 3) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2, vocab_size=vocabulary,
        attention_dropout=0.1, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    ids = torch.randint(0, vocabulary, (4, 64))
    return model, {"input_ids": ids, "labels": ids}


@functools.cache
def recorded(tiles: bool = False) -> Trace:
    return tightfit.trace(*made(), tiles=tiles)


def outcome(model: nn.Module, batch: Any) -> Outcome:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    model(**batch).loss.backward()
    return Outcome(model)


def test_a_models_own_checkpointing_makes_way_and_comes_back() -> None:
    model, batch = made()
    expected = outcome(copy.deepcopy(model), batch)
    unplanned = tightfit.simulate(recorded(), None).peak_bytes
    switch_on(model, {"use_reentrant": False})
    flags = [getattr(module, "gradient_checkpointing", None) for module in model.modules()]
    assert tightfit.simulate(tightfit.trace(model, batch, tiles=False), None).peak_bytes == unplanned
    assert [getattr(module, "gradient_checkpointing", None) for module in model.modules()] == flags
    with pytest.warns(UserWarning, match="own checkpointing is off while tightfit's plan is in force"):
        applied = tightfit.fit(model, batch, "95%")
    assert not is_on(model)
    assert applied.plan.exact and applied.plan.budget_bytes == int(unplanned * 0.95)
    assert not differences(expected, outcome(model, batch))
    assert not applied.stats().fallbacks
    applied.remove()
    assert [getattr(module, "gradient_checkpointing", None) for module in model.modules()] == flags and is_on(model)
    with tightfit.apply(model, applied.plan):
        assert not is_on(model)
        assert not differences(expected, outcome(model, batch))
    assert is_on(model)


@pytest.mark.parametrize(
    ("switch", "on"), [("gradient_checkpointing", True), ("grad_checkpointing", True), ("grad_checkpointing", 1)]
)
def test_the_proof_is_of_the_plan_and_not_of_the_models_own_checkpointing(switch: str, on: int) -> None:
    """diffusers and transformers call the switch by one name, timm by the other, where it may be a number."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in "123")
            setattr(self, switch, False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False) if getattr(self, switch) else block(x)
            return x

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    model, batch = Blocks(), torch.randn(256, 64)
    unplanned = tightfit.simulate(tightfit.trace(model, batch, loss=loss, tiles=False)).peak_bytes
    setattr(model, switch, on)
    with pytest.warns(UserWarning, match="own checkpointing is off while tightfit's plan is in force"):
        applied = tightfit.fit(model, batch, "90%", loss=loss)
    assert applied.plan.budget_bytes == int(unplanned * 0.9) and not getattr(model, switch)
    applied.remove()
    proof = tightfit.verify(model, batch, applied.plan, loss=loss)
    assert proof.passed, [(check.name, check.measured) for check in proof.checks if not check.passed]
    assert all(check.passed for check in peak_checks(model, batch, applied.plan, loss=loss))
    assert getattr(model, switch) is on and tightfit.active(model).by == "torch"


def budget_for_tiles(model: nn.Module, batch: Any) -> int:
    """One that nothing exact can hold, and tiles can."""
    trace = tightfit.trace(model, batch)
    exact, any_bits = lowest(trace, levers=("recompute", "loss_in_place", "nest")), lowest(trace)
    assert not any_bits.exact and any_bits.peak_bytes < exact.peak_bytes
    return (exact.peak_bytes + any_bits.peak_bytes) // 2


def test_a_plan_that_is_not_exact_is_said_once_and_can_be_forbidden() -> None:
    model, batch = made(4096, layers=2)
    budget = budget_for_tiles(model, batch)
    with pytest.warns(UserWarning, match="exact=True forbids it") as told:
        applied = tightfit.fit(model, batch, budget)
    assert len([w for w in told if "exact=True" in str(w.message)]) == 1
    assert not applied.plan.exact
    applied.remove()
    with pytest.raises(BudgetInfeasible) as error:
        tightfit.fit(model, batch, budget, exact=True)
    assert error.value.least_bytes > budget
    assert "without exact=True tiles would take" in str(error.value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # who names tiles knows
        with tightfit.fit(model, batch, budget, levers=("recompute", "loss_in_place", "nest", "tile")) as applied:
            assert not applied.plan.exact
    with pytest.raises(InvalidInput, match="exact=True forbids tiles"):
        tightfit.fit(model, batch, budget, levers="all", exact=True)


def test_levers_are_given_by_name() -> None:
    (model, batch), trace = made(), recorded()
    by_name = tightfit.plan(trace, "90%", levers=("recompute", Lever.LOSS_IN_PLACE))
    assert by_name == tightfit.plan(trace, "90%", levers={Lever.RECOMPUTE, Lever.LOSS_IN_PLACE})
    assert by_name == tightfit.plan(trace, "90%", levers="recompute,loss-in-place")
    with tightfit.fit(model, batch, "90%", levers=("recompute", "offload")) as applied:
        assert applied.plan.peak_bytes <= applied.plan.budget_bytes
    assert TightfitCallback("90%", levers=["recompute"], exact=True).levers == {Lever.RECOMPUTE}
    assert levers_named(None) is None and levers_named([]) == frozenset()


@pytest.mark.parametrize("asked", [("recompute", "ofload"), "ofload", [3]])
def test_a_name_that_is_nearly_right_is_suggested(asked: Any) -> None:
    with pytest.raises(InvalidInput) as error:
        levers_named(asked)
    assert "use recompute, " in str(error.value)
    assert asked == [3] or "did you mean 'offload'?" in str(error.value)


def test_no_bits_are_promised_of_compiled_models() -> None:
    model, _ = made()
    plan = tightfit.plan(recorded(), "80%")
    assert plan.exact
    model.compile(backend="eager")
    with tightfit.apply(model, plan) as applied:
        assert "bit for bit" not in str(applied) and "verify holds them to float64" in str(applied)


def test_a_plan_in_force_says_what_it_is() -> None:
    model, batch = made()
    with tightfit.fit(model, batch, "70%") as applied:
        said = str(applied)
        assert "gradients: bit for bit those without it" in said and "levers: recompute" in said
        assert f"budget: {format_bytes(applied.plan.budget_bytes)}" in said and "the peak is at: " in said
        shown = applied._repr_html_()
        lower_bytes = int(applied.plan.peak_bytes * 0.9)
        assert applied.trace is not None
        lower = tightfit.plan(applied.trace, lower_bytes, exact=True)
        (line,) = re.findall(r"a tenth less: (.*) would take (.*) x", said)
        assert line[0] == format_bytes(lower_bytes)
        assert float(line[1]) == pytest.approx(lower.slowdown, abs=0.02)
    assert shown.startswith("<table>") and shown.count("<tr>") == len(said.splitlines())
    with tightfit.apply(model, lowest(recorded(tiles=True), effort=QUICK)) as applied:
        assert "a tenth less" not in str(applied)  # a plan alone does not say what the step's values are
        applied.trace = recorded(tiles=True)
        assert "a tenth less: no plan without nested recompute holds " in str(applied)


def test_tiles_that_were_not_tried_are_not_said_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise BudgetInfeasible(1, 2, "")

    trace = recorded(tiles=True)
    exact = tightfit.plan(trace, "100%")
    monkeypatch.setitem(tighter.__globals__, "plan", refused)
    assert exact.exact and tighter(trace, exact).startswith("no exact plan without nested recompute holds ")


def test_advice_is_in_the_batch_that_the_user_counts() -> None:
    """KTO's trainer makes one row of all tokens, beside a batch of two."""
    trace = dataclasses.replace(recorded(), batch_sizes=(160, 4, 4, 4))
    peak, fixed = tightfit.simulate(trace).peak_bytes, sum(trace.static_bytes.values())
    with pytest.raises(BudgetInfeasible, match=r"a batch of [123] instead of 4 would need about"):
        tightfit.plan(trace, fixed + (peak - fixed) * 6 // 10, levers=["loss_in_place"])


def test_advice_names_the_units_that_are_kept_whole() -> None:
    trace = recorded()
    units = tuple(dataclasses.replace(unit, pinned="it is given a cache") for unit in trace.units)
    with pytest.raises(BudgetInfeasible, match=r"3 of 3 units are kept whole, as model.layers.0: it is given a cache"):
        tightfit.plan(dataclasses.replace(trace, units=units), sum(trace.static_bytes.values()) + 1)
