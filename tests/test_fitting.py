"""A plan for the longest batch: shorter ones under the same plan and budget, longer ones as the user chose."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import transformers
from tests.levers.test_optimizer import heavy
from torch import nn

import tightfit
from tightfit.core import BudgetInfeasible, InvalidInput
from tightfit.fitting import fit as fitting
from tightfit.verify.gradients import Outcome, differences
from tightfit.verify.peak import PeakMeter, static_bytes

#: Where it is of no account what the plan is like: it is found soonest.
RECOMPUTE = "recompute"


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=3, n_embd=64, n_head=4, vocab_size=512, n_positions=256, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).train()


def tokens(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 512, (rows, length), generator=torch.Generator().manual_seed(rows * length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One entry per trace that `fit` makes."""
    made: list[int] = []
    honest = fitting.trace

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        return honest(*args, **kwargs)

    monkeypatch.setattr(fitting, "trace", counted)
    yield made


def outcome(model: nn.Module, batch: Any) -> Outcome:
    model.zero_grad()
    torch.manual_seed(7)
    model(**batch).loss.backward()
    return Outcome(model)


def peak_bytes(model: nn.Module, batch: Any) -> int:
    model.zero_grad()
    before = static_bytes(model, None, batch)
    with PeakMeter("cpu") as meter:
        model(**batch).loss.backward()
    return before + meter.rise_bytes


def test_shorter_batches(traces: list[int]) -> None:
    model = gpt2()
    applied = tightfit.fit(model, tokens(4, 128), "55%")
    for rows, length in ((4, 128), (4, 97), (3, 128), (2, 64), (2, 2), (1, 7), (1, 1), (4, 128)):
        batch = tokens(rows, length)
        before = applied.stats()
        assert peak_bytes(model, batch) <= applied.plan.budget_bytes * 1.005
        if rows > 1:  # a single row calls other ops in attention's reshapes: whole replays, counted
            assert (applied.stats() - before).fallbacks == 0
        found = outcome(model, batch)
        applied.suspend()
        assert not differences(outcome(model, batch), found)
        applied.resume(applied.plan, applied.trace)
    assert applied.stats().replays > 0
    assert len(traces) == 1
    applied.remove()


def test_a_longer_batch_is_planned_anew_for_the_same_bytes(traces: list[int]) -> None:
    model = gpt2()
    applied = tightfit.fit(model, tokens(4, 96), "90%")
    first = applied.plan
    longer = tokens(4, 128)
    expected = outcome(model, longer)  # planned anew inside
    assert len(traces) == 2
    assert applied.plan is not first
    assert applied.plan.budget_bytes == first.budget_bytes
    assert peak_bytes(model, longer) <= first.budget_bytes * 1.005
    assert len(traces) == 2
    applied.remove()
    assert not differences(outcome(model, longer), expected)
    assert not model._forward_pre_hooks
    assert "forward" not in model.transformer.h[0].__dict__


def test_more_rows_of_the_same_tokens_are_not_longer(traces: list[int]) -> None:
    model = gpt2()
    with tightfit.fit(model, tokens(4, 128), "70%") as applied:
        assert peak_bytes(model, tokens(8, 64)) <= applied.plan.budget_bytes * 1.005
    assert len(traces) == 1


def test_a_longer_batch_that_fits_nowhere() -> None:
    model = gpt2()
    with tightfit.fit(model, tokens(2, 32), "90%") as applied:
        before = applied.plan
        with pytest.raises(BudgetInfeasible):
            model(**tokens(8, 256))
        assert applied.plan is before
        assert peak_bytes(model, tokens(2, 32)) <= before.budget_bytes * 1.005


def test_refused() -> None:
    model = gpt2()
    with tightfit.fit(model, tokens(2, 64), "70%", longer="refuse"):
        with pytest.raises(InvalidInput, match=r"length 65 came.*at most 128 and 64"):
            model(**tokens(1, 65))
        with pytest.raises(InvalidInput, match="192 elements"):
            model(**tokens(3, 64))
        with torch.no_grad():
            model(**tokens(4, 200))  # nothing is held here
        model.eval()
        model(**tokens(4, 200))
        model.train()
        model(**tokens(2, 64)).loss.backward()


def test_allowed(traces: list[int]) -> None:
    model = gpt2()
    longer = tokens(2, 128)
    with tightfit.fit(model, tokens(2, 64), "70%", longer="allow"):
        found = outcome(model, longer)
    assert not differences(outcome(model, longer), found)
    assert len(traces) == 1


def test_with_a_loss_function_it_warns_once() -> None:
    model = gpt2()

    def loss(subject: Any, batch: Any) -> torch.Tensor:
        return subject(input_ids=batch["input_ids"]).logits.float().logsumexp(-1).mean()

    with tightfit.fit(model, tokens(2, 64), "80%", loss=loss):
        with pytest.warns(UserWarning, match="the budget is not promised"):
            loss(model, tokens(2, 96)).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss(model, tokens(2, 96)).backward()


def test_another_word() -> None:
    with pytest.raises(InvalidInput, match="'replan', 'refuse', 'allow'"):
        tightfit.fit(gpt2(), tokens(1, 8), "80%", longer="maybe")


def accumulated_peak_bytes(model: nn.Module, batch: Any, loss: Any = None) -> int:
    before = static_bytes(model, None, batch)
    with PeakMeter("cpu") as meter:
        (model(**batch).loss if loss is None else loss(model, batch)).backward()
    return before + meter.rise_bytes


def logits_loss(subject: Any, batch: Any) -> torch.Tensor:
    return subject(input_ids=batch["input_ids"]).logits.float().logsumexp(-1).mean()


@pytest.mark.parametrize("loss", [None, logits_loss])
def test_accumulated_gradients_are_planned_for_once(traces: list[int], loss: Any) -> None:
    model, batch = gpt2(), tokens(4, 64)
    with tightfit.fit(model, batch, "80%", loss=loss) as applied:
        budget_bytes, first = applied.plan.budget_bytes, applied.plan
        for turn in range(3):
            model.zero_grad()
            torch.manual_seed(7)
            for micro in range(3):
                if turn:
                    assert accumulated_peak_bytes(model, batch, loss) <= budget_bytes * 1.005, micro
                else:  # planning profiles a step, and under torch 2.11 one profiler inside another ends it
                    (model(**batch).loss if loss is None else loss(model, batch)).backward()
                assert (applied.plan is first) == (micro == 0)
                assert applied.plan.budget_bytes == budget_bytes
        assert len(traces) == 2
        found = Outcome(model)
    model.zero_grad()
    torch.manual_seed(7)
    for _ in range(3):
        accumulated_peak_bytes(model, batch, loss)
    assert not differences(Outcome(model), found)


def test_a_model_fitted_with_gradients_needs_no_second_plan(traces: list[int]) -> None:
    model, batch = gpt2(), tokens(4, 64)
    model(**batch).loss.backward()
    with tightfit.fit(model, batch, "80%") as applied:
        for _ in range(2):
            assert accumulated_peak_bytes(model, batch) <= applied.plan.budget_bytes * 1.005
        model.zero_grad()
        accumulated_peak_bytes(model, batch)
    assert len(traces) == 1


def test_accumulated_gradients_refused_and_allowed(traces: list[int]) -> None:
    model, batch = gpt2(), tokens(2, 64)
    with tightfit.fit(model, batch, "80%", longer="refuse", levers=RECOMPUTE):
        model(**batch).loss.backward()
        with pytest.raises(InvalidInput, match="have gradients already"):
            model(**batch)
    model.zero_grad()
    with tightfit.fit(model, batch, "80%", longer="allow", levers=RECOMPUTE):
        model(**batch).loss.backward()
        with pytest.warns(UserWarning, match="the budget is not promised"):
            model(**batch).loss.backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**batch).loss.backward()
    assert len(traces) == 2


def test_accumulated_gradients_when_the_loss_functions_batch_is_gone() -> None:
    model = gpt2()
    with tightfit.fit(model, tokens(2, 64), "80%", loss=logits_loss, levers=RECOMPUTE):
        logits_loss(model, tokens(2, 64)).backward()
        with pytest.warns(UserWarning, match="fit the model while it has gradients"):
            logits_loss(model, tokens(2, 64)).backward()


# ------------------------------------------------------------------------------------- what is trained changes


def adapted() -> Any:
    """With two adapters of PEFT's, whose ops differ: one has dropout, the other one more module."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=512, use_cache=False, **shape)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora, adapter_name="a")
    model.add_adapter("b", peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"]))
    return model.train()


def test_each_adapter_has_a_plan_of_its_own(traces: list[int]) -> None:
    model, batch = adapted(), tokens(4, 64)
    plain = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        plain[name] = outcome(model, batch)
    model.zero_grad()
    model.set_adapter("a")
    plans = {}
    with tightfit.fit(model, batch, "70%") as applied:
        budget_bytes = applied.plan.budget_bytes
        for turn, name in enumerate("abab"):
            model.set_adapter(name)
            assert not differences(plain[name], outcome(model, batch))
            assert plans.setdefault(name, applied.plan) is applied.plan  # the one that it had before
            assert applied.stats().fallbacks == 0 and applied.stats().replays == 3 * (turn + 1)
            if turn > 1:
                assert peak_bytes(model, batch) <= budget_bytes * 1.005
                applied._stats.replays -= 3
        assert plans["a"] is not plans["b"] and plans["b"].budget_bytes == budget_bytes
    assert len(traces) == 2


def test_layers_that_are_frozen_and_freed_have_plans_of_their_own(traces: list[int]) -> None:
    model, batch = gpt2(), tokens(4, 64)
    with tightfit.fit(model, batch, "80%", loss=logits_loss) as applied:
        first = applied.plan
        for trained in (False, True, False):
            model.zero_grad()
            for parameter in (*model.transformer.wte.parameters(), *model.transformer.h[:2].parameters()):
                parameter.requires_grad_(trained)
            model.transformer.wpe.requires_grad_(trained)
            logits_loss(model, batch).backward()
            assert (applied.plan is first) == trained
        assert applied.stats().fallbacks == 0 and len(traces) == 2


def test_another_adapter_refused_and_allowed(traces: list[int]) -> None:
    model, batch = adapted(), tokens(2, 64)
    with tightfit.fit(model, batch, "80%", longer="refuse", levers=RECOMPUTE):
        model.set_adapter("b")
        with pytest.raises(InvalidInput, match="a step that trains other parameters"):
            model(**batch)
    model.set_adapter("a")
    with tightfit.fit(model, batch, "80%", longer="allow", levers=RECOMPUTE):
        model.set_adapter("b")
        with pytest.warns(UserWarning, match="the budget is not promised; fit the model anew"):
            found = outcome(model, batch)
    assert not differences(outcome(model, batch), found)
    assert len(traces) == 2


@pytest.mark.parametrize("longer", ["replan", "refuse"])
def test_a_forward_that_trains_nothing_is_let_through(traces: list[int], longer: str) -> None:
    model, batch = adapted(), tokens(2, 64)
    with model.disable_adapter():
        plain = model(**batch).loss.item()
    with tightfit.fit(model, batch, "80%", longer=longer, levers=RECOMPUTE) as applied:
        before = applied.plan
        with model.disable_adapter():
            assert model(**batch).loss.item() == plain
        assert applied.plan is before and len(traces) == 1


def test_an_optimizer_of_other_parameters_is_told() -> None:
    model, batch = adapted(), tokens(2, 64)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    with tightfit.fit(model, batch, "80%", optimizer=optimizer, levers=RECOMPUTE):
        model.set_adapter("b")
        with pytest.raises(
            InvalidInput, match=r"holds none of the parameters that are trained now.*fit the model anew"
        ):
            model(**batch)


@pytest.mark.slow
def test_an_adapter_that_no_plan_fits_is_told_before_it_runs() -> None:
    model, batch = adapted(), tokens(4, 64)
    model.add_adapter("large", peft.LoraConfig(r=512, target_modules=["up_proj", "down_proj"]))
    model.set_adapter("a")
    with tightfit.fit(model, batch, "70%", levers=RECOMPUTE) as applied:
        before = applied.plan
        model.set_adapter("large")
        with pytest.raises(BudgetInfeasible):
            model(**batch)
        model.set_adapter("a")
        outcome(model, batch)
        assert applied.plan is before and applied.stats().fallbacks == 0


def test_the_least_that_is_named_is_the_least_whatever_was_asked_for() -> None:
    """Weights and state alone may be more than the budget: even then it is a budget that works, in tiles where these
    are allowed."""
    model, optimizer = heavy()
    ids = torch.randint(0, 400, (32, 64))
    least = []
    for exact in (False, True):
        with pytest.raises(tightfit.BudgetInfeasible) as caught:
            tightfit.fit(model, ids, 1000, optimizer=optimizer, exact=exact)
        least.append(caught.value.least_bytes)
    assert least[0] < least[1]
    with pytest.warns(UserWarning, match="tiles"):
        applied = tightfit.fit(model, ids, least[0], optimizer=optimizer)
    assert not applied.plan.exact
    applied.remove()
