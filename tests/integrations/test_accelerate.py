"""accelerate: models spread over devices, accumulation and mixed precision through `Accelerator`."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, dispatch_model
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from transformers import LlamaConfig, LlamaForCausalLM

import tightfit
from tightfit.core import BudgetInfeasible, InvalidInput, Unsupported
from tightfit.integrations import accelerate
from tightfit.integrations.peft import add_lora
from tightfit.plan import simulate
from tightfit.step.run import static_bytes_by_category
from tightfit.verify.gradients import Outcome, differences

IDS = torch.randint(0, 256, (4, 48), generator=torch.Generator().manual_seed(1))
BATCH = {"input_ids": IDS, "labels": IDS}


def llama(layers: int = 4) -> Any:
    """Llama-2-7B's proportions at a small size."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=172, num_hidden_layers=layers, num_attention_heads=4, vocab_size=256,
        attention_dropout=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def spread(base: Any, folder: Path, second_half: str) -> Any:
    places = {f"model.layers.{i}": "cpu" if i < 2 else second_half for i in range(4)}
    places |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    return dispatch_model(base, device_map=places, offload_dir=str(folder), main_device="cpu", force_hooks=True)


def step(model: Any) -> Outcome:
    torch.manual_seed(5)
    model.zero_grad()
    model(**BATCH).loss.backward()
    return Outcome(model)


@pytest.mark.slow
def test_a_frozen_half_on_disk(tmp_path: Path) -> None:
    model = add_lora(llama(), rank=4)
    for path, parameter in model.named_parameters():
        if ".layers.2." in path or ".layers.3." in path:
            parameter.requires_grad_(False)
    spread(model.base_model.model, tmp_path, "disk")
    assert any(p.is_meta for p in model.parameters())
    expected = step(model)
    applied = accelerate.fit(model, BATCH, {"cpu": "80%"})
    assert applied.plan.replays > 0 and applied.active_units
    assert not differences(expected, step(model))
    assert applied.stats().replays == applied.plan.replays
    applied.remove()
    proof = tightfit.verify(model, BATCH, applied.plan)
    assert proof["gradients"].passed, proof.checks


def test_trainable_weights_on_disk_are_refused(tmp_path: Path) -> None:
    model = llama()
    spread(model, tmp_path, "disk")
    with pytest.raises(Unsupported, match="rest on disk"):
        accelerate.fit(model, BATCH, "80%")


def two_devices(model: Any) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The step of a CPU model as if its halves ran on two GPUs."""
    recorded = tightfit.trace(model, BATCH, tiles=False)
    half = len(recorded.units) // 2
    devices = {unit.path: f"cuda:{int(unit.path[-1]) // half}" for unit in recorded.units}
    fixed = static_bytes_by_category(model, BATCH)
    halves = {device: {kind: size // 2 for kind, size in fixed.items()} for device in ("cuda:0", "cuda:1")}
    return recorded, devices, accelerate.device_traces(recorded, devices, halves)


def test_every_byte_is_on_one_device() -> None:
    recorded, _, traces = two_devices(llama())
    for index, value in enumerate(recorded.values):
        assert sum(seen.values[index].size_bytes for seen in traces.values()) == value.size_bytes
    whole = simulate(recorded)
    parts = [simulate(seen) for seen in traces.values()]
    assert len({len(line.live_bytes) for line in (whole, *parts)}) == 1
    odd = sum(whole.live_bytes) - sum(sum(line.live_bytes) for line in parts)
    assert abs(odd) <= 8 * len(whole.live_bytes), "halves of odd static sizes lose a byte each, nothing else is lost"
    assert all(line.peak_bytes < whole.peak_bytes for line in parts)


@pytest.mark.parametrize("tight", ["cuda:0", "cuda:1"])
def test_only_the_tight_device_recomputes(tight: str) -> None:
    model = llama()
    expected = step(copy.deepcopy(model))
    recorded, devices, traces = two_devices(model)
    peaks = {device: simulate(seen).peak_bytes for device, seen in traces.items()}
    budgets: dict[str, str | int] = dict(peaks)
    budgets[tight] = peaks[tight] * 85 // 100
    made = accelerate.plan(recorded, traces, budgets, devices)
    for device, seen in traces.items():
        line = simulate(seen, dataclasses.replace(made, trace_digest=seen.digest))
        assert line.peak_bytes <= int(budgets[device])
    with tightfit.apply(model, made) as applied:
        assert {devices[path] for path in applied.active_units} == {tight}
        assert not differences(expected, step(model))
        assert applied.stats().replays == made.replays > 0


def test_the_device_that_is_too_small_is_named() -> None:
    recorded, devices, traces = two_devices(llama(layers=2))
    with pytest.raises(BudgetInfeasible, match="on cuda:1"):
        accelerate.plan(recorded, traces, {"cuda:0": "100%", "cuda:1": "5%"}, devices)


@pytest.mark.parametrize(("budget", "said"), [({"cuda:3": "1GiB"}, "runs on cpu only"), ({}, "no budget for cpu")])
def test_budgets_for_other_devices(budget: dict[Any, Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        accelerate.fit(llama(), BATCH, budget)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_accumulation_and_mixed_precision_through_accelerator(precision: str) -> None:
    def losses(budget: str | None) -> list[float]:
        AcceleratorState._reset_state(True)
        plugin = GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False)
        accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_plugin=plugin)
        bare = llama()
        model, optimizer = accelerator.prepare(bare, torch.optim.AdamW(bare.parameters(), lr=1e-3))
        applied = tightfit.fit(model, BATCH, budget, optimizer=optimizer) if budget else None
        torch.manual_seed(7)
        found = []
        for _ in range(20):
            with accelerator.accumulate(model):
                loss = model(**BATCH).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            found.append(loss.item())
        if applied is not None:
            assert applied.stats().replays > 0
            applied.remove()
        AcceleratorState._reset_state(True)
        return found

    plain = losses(None)
    assert losses("85%") == plain and len(set(plain)) > 10
