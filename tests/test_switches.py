"""Switches: on, asked, off, each in one line, for transformers' models and for any module."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.names import EVERY_N_LAYERS, is_on, switch_off, switch_on
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import tightfit
from tightfit.core import InvalidInput
from tightfit.fitting.switches import layer_of
from tightfit.verify.gradients import Outcome, differences


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop = nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(torch.tanh(self.norm(self.a(x))))


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, vocab_size=64,
            attention_dropout=0.1,
        )
    )  # fmt: skip


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=64))


def lora() -> Any:
    return get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))


MODELS = {"llama": llama, "gpt2": gpt2, "lora": lora, "custom": Custom}


def made(name: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = MODELS[name]().train()
    if name == "custom":
        return model, torch.randn(64, 32)
    ids = torch.randint(0, 64, (4, 48))
    return model, {"input_ids": ids, "labels": ids}


def outcome(model: Any, batch: Any) -> Outcome:
    torch.manual_seed(5)
    model.zero_grad()
    loss = model(batch) if isinstance(batch, torch.Tensor) else model(**batch).loss
    loss.backward()
    return Outcome(model)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, "switch") for name in MODELS), ("llama", "every unit planned"), ("custom", "every unit planned"),
        ("llama", "budget"), ("custom", "budget"),
    ],
)  # fmt: skip
def test_on_asked_off(name: str, how: str) -> None:
    model, batch = made(name)
    expected = outcome(copy.deepcopy(model), batch)
    attributes = [dict(vars(m)) for m in model.modules()]
    assert not tightfit.active(model)
    if how == "switch":
        found = tightfit.enable(model)
        assert found.basis == "unknown" and found.saves_bytes is None and found.by == "whole units"
    else:
        probe = tightfit.trace(copy.deepcopy(model), batch, tiles=False)
        fixed, top = sum(probe.static_bytes.values()), tightfit.simulate(probe).peak_bytes
        found = tightfit.enable(model, batch, (fixed + 4 * top) // 5 if how == "budget" else None)
        assert found.by == "plan" and found.basis == "predicted" and found.plan is not None
        assert found.saves_bytes == found.plan.unplanned_peak_bytes - found.plan.peak_bytes > 0
    assert found == tightfit.active(model)
    assert found.units and set(found.units) <= {p for p, m in model.named_modules() if "Layer" in type(m).__name__ or
                                                isinstance(m, Block) or "GPT2Block" in type(m).__name__}  # fmt: skip
    assert not differences(expected, outcome(model, batch))
    with pytest.raises(InvalidInput, match="switch it off first"):
        tightfit.enable(model)
    tightfit.disable(model)
    tightfit.disable(model)
    assert not tightfit.active(model)
    now = [dict(vars(m)) for m in model.modules()]
    assert [a.keys() - {"_gradient_checkpointing_func"} for a in attributes] == [
        a.keys() - {"_gradient_checkpointing_func", "gradient_checkpointing"} | (b.keys() & {"gradient_checkpointing"})
        for a, b in zip(now, attributes, strict=True)
    ]


@pytest.mark.parametrize("name", MODELS)
def test_the_saving_is_measured_and_real(name: str) -> None:
    model, batch = made(name)
    tightfit.enable(model)
    found = tightfit.active(model, batch)
    assert found.basis == "measured" and found.saves_bytes is not None and found.saves_bytes > 0
    assert tightfit.active(model).units == found.units, "measuring switched something off"
    tightfit.disable(model)
    assert tightfit.active(model, batch).saves_bytes is None


@pytest.mark.parametrize("name", ["llama", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_predicted_saving_is_the_measured_one(name: str) -> None:
    model, batch = made(name)
    outcome(model, batch)  # gradients are there, so that both steps count them alike
    predicted = tightfit.enable(model, batch).saves_bytes
    measured = tightfit.active(model, batch).saves_bytes
    assert predicted is not None and measured == pytest.approx(predicted, rel=0.02)


def test_transformers_own_switches_are_served() -> None:
    model, batch = made("llama")
    expected = outcome(copy.deepcopy(model), batch)
    tightfit.enable(model)
    assert is_on(model)
    switch_off(model)
    assert not tightfit.active(model)
    some = {"every_n_layers": 2} if EVERY_N_LAYERS else {}
    switch_on(model, {"use_reentrant": True}, **some)  # what TRL does around a reference
    every = ("model.layers.0", "model.layers.1", "model.layers.2")
    assert tightfit.active(model).units == (every[::2] if some else every)
    assert tightfit.active(model).by == "whole units"
    calls: list[str] = []
    held = vars(model)["_tightfit"].what
    checkpoint = held.checkpoint
    for layer in model.model.layers:
        layer._gradient_checkpointing_func = lambda *a, **k: (calls.append("ours"), checkpoint(*a, **k))[1]
    assert not differences(expected, outcome(model, batch)) and calls == ["ours"] * (2 if some else 3)
    assert held.stats.replays == len(calls)
    tightfit.disable(model)
    assert not is_on(model)
    switch_on(model)
    assert tightfit.active(model).by == "torch", "our function is still served after disable"


def test_torchs_own_is_told_and_told_to_sleep_in_eval() -> None:
    model, batch = made("llama")
    switch_on(model)
    found = tightfit.active(model, batch)
    assert found.by == "torch" and len(found.units) == 3 and found.saves_bytes is not None and found.saves_bytes > 0
    model.eval()
    asleep = tightfit.active(model, batch)
    assert "eval()" in asleep.note and asleep.saves_bytes == 0


class Layer(nn.Module):
    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return torch.tanh(x * scale)


def test_both_forms_in_which_transformers_passes_a_layer() -> None:
    layer = Layer()
    x = torch.ones(2)
    forms: list[tuple[Any, tuple[Any, ...]]] = [
        (functools.partial(nn.Module.__call__.__get__(layer), scale=2.0), (x,)),  # 5.17: the bound __call__
        (functools.partial(Layer.forward, layer, scale=2.0), (x,)),  # 5.23: the class's forward and the layer
        (layer, (x,)),
        (layer.__call__, (x,)),
        (layer.forward, (x,)),
    ]
    for function, args in forms:
        assert layer_of(function, args) is layer
    assert layer_of(lambda x: x, (x,)) is None


@pytest.mark.parametrize("form", ["bound call", "forward and layer"])
def test_both_forms_give_the_same_gradients(form: str) -> None:
    """Buffers of the layer are put back after its replay: its batch norm must not count a batch twice."""
    torch.manual_seed(0)
    block = Block().train()
    twin = copy.deepcopy(block)
    x = torch.randn(8, 32, requires_grad=True)
    torch.manual_seed(1)
    twin(x).sum().backward()
    model, _ = made("llama")
    tightfit.enable(model)
    checkpoint = vars(model)["_tightfit"].what.checkpoint
    y = x.detach().clone().requires_grad_()
    torch.manual_seed(1)
    if form == "bound call":
        out = checkpoint(functools.partial(nn.Module.__call__.__get__(block)), y)
    else:
        out = checkpoint(functools.partial(Block.forward, block), y)
    out.sum().backward()
    assert not differences(Outcome(twin), Outcome(block))
    assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]


def test_bad_input_is_one_line() -> None:
    with pytest.raises(InvalidInput, match="needs a batch"):
        tightfit.enable(Custom(), budget="60%")
    with pytest.raises(InvalidInput, match=r"expected a torch\.nn\.Module"):
        tightfit.enable("gpt2")  # type: ignore[arg-type]


def test_a_model_that_was_switched_on_can_be_copied_saved_and_forgotten() -> None:
    model, batch = made("custom")
    tightfit.enable(model)
    again = pickle.loads(pickle.dumps(model))
    assert not tightfit.active(again) and not tightfit.active(copy.deepcopy(model))
    outcome(again, batch)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
