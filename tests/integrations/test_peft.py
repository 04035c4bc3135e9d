"""LoRA's surroundings: hooks and checkpointing that others switch on unasked, 4-bit layers in evaluation mode, and
adapters of experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, TaskType, get_peft_model, prepare_model_for_kbit_training
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import tightfit
from tightfit.core import BudgetInfeasible, Unsupported
from tightfit.integrations.bitsandbytes import no_repacking, quantise
from tightfit.integrations.peft import add_lora, no_input_gradients, prepare_for_kbit_training
from tightfit.integrations.transformers import random_batch
from tightfit.plan import every_block
from tightfit.step.snapshot import Snapshot


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=256,
        max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def late_adapters(hook: bool) -> Any:
    """LoRA on the last layer alone: the three before it are a frozen prefix."""
    model = llama()
    if hook:
        model.enable_input_require_grads()
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], layers_to_transform=[3]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.train()


def gradients(model: Any, batch: Any) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_frozen_prefix_needs_no_input_gradients() -> None:
    model = late_adapters(hook=True)
    batch = random_batch(model, 4, 48)
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: None)  # somebody else's, after it
    before = list(embeddings._forward_hooks.items())
    expected = gradients(model, batch)
    with_hook = tightfit.simulate(tightfit.trace(model, batch, tiles=False)).peak_bytes
    with no_input_gradients(model) as found:
        assert found == 1
        without_hook = tightfit.simulate(tightfit.trace(model, batch, tiles=False)).peak_bytes
        measured = gradients(model, batch)
    assert list(embeddings._forward_hooks.items()) == before
    assert without_hook < with_hook * 0.9
    plain = tightfit.simulate(tightfit.trace(late_adapters(hook=False), batch, tiles=False)).peak_bytes
    assert without_hook == pytest.approx(plain, rel=0.01)
    assert expected.keys() == measured.keys()
    assert all(torch.equal(expected[name], measured[name]) for name in expected)


def test_hooks_come_back_after_an_error() -> None:
    model = late_adapters(hook=True)
    before = dict(model.get_input_embeddings()._forward_hooks)
    with pytest.raises(ZeroDivisionError), no_input_gradients(model):
        raise ZeroDivisionError
    assert dict(model.get_input_embeddings()._forward_hooks) == before


@pytest.mark.parametrize("peft_was_first", [False, True])
def test_prepared_for_kbit_training_without_checkpointing(peft_was_first: bool) -> None:
    model = quantise(llama().to(torch.bfloat16), torch.float32)
    if peft_was_first:
        model = prepare_model_for_kbit_training(model)
        assert model.is_gradient_checkpointing and model.get_input_embeddings()._forward_hooks, "PEFT's default changed"
    model = prepare_for_kbit_training(model)
    assert not model.is_gradient_checkpointing
    assert not model.get_input_embeddings()._forward_hooks
    assert model.model.norm.weight.dtype is torch.float32
    model = add_lora(model, rank=4)
    batch = random_batch(model, 4, 48)
    recorded = tightfit.trace(model, batch, tiles=False)
    fixed, top = sum(recorded.static_bytes.values()), tightfit.simulate(recorded).peak_bytes
    plan = tightfit.plan(recorded, fixed + (top - fixed) * 7 // 10)
    assert plan.replays
    proof = tightfit.verify(model, batch, plan)
    assert proof.passed, proof.checks


def test_4_bit_layers_keep_their_layout_in_evaluation() -> None:
    model = add_lora(quantise(llama(), torch.float32), rank=4)
    batch = random_batch(model, 2, 32)
    layers = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.compute_dtype = torch.bfloat16
    before = [layer.support_avx512bf16_for_cpu for layer in layers]
    expected = gradients(model, batch)
    with no_repacking(model):
        model.eval()
        with torch.no_grad():
            model(**batch)
        model.train()
        measured = gradients(model, batch)
    assert [layer.support_avx512bf16_for_cpu for layer in layers] == before
    assert all(torch.equal(expected[name], measured[name]) for name in expected)
    if not all(before):
        return  # this machine's CPU has no such kernel, so nothing is ever packed
    model.eval()
    with torch.no_grad():
        model(**batch)
    model.train()
    with pytest.raises(Unsupported, match="evaluation mode"), no_repacking(model):
        pass


def test_prefix_tuning_says_why_its_blocks_are_kept_whole() -> None:
    model = get_peft_model(llama(), PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)).train()
    ids = torch.randint(0, 256, (4, 48))
    with pytest.raises(BudgetInfeasible, match=r"4 of 4 units are kept whole, .* \(PEFT's prefix tuning gives one"):
        tightfit.fit(model, {"input_ids": ids, "labels": ids}, "70%")


def experts(implementation: str) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4, vocab_size=100, use_cache=False, experts_implementation=implementation,
    )  # fmt: skip
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapters = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=parameters)
    model = get_peft_model(MixtralForCausalLM(config), adapters).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, so what it multiplies would have no gradient
            torch.nn.init.normal_(parameter, std=0.02)
    ids = torch.randint(0, 100, (4, 32))
    return model, {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("implementation", ["grouped_mm", pytest.param("eager", marks=pytest.mark.slow)])
def test_adapters_of_experts_parameters_are_planned(implementation: str) -> None:
    """PEFT registers a parametrization in every forward, which puts the frozen parameter where it is already."""
    model, batch = experts(implementation)
    trace = tightfit.trace(model, batch, tiles=False)
    assert not any(unit.pinned for unit in trace.units)
    if implementation != "eager":  # where it depends on values which expert runs
        faked = tightfit.trace(model, batch, fake=True, tiles=False)
        assert not any(unit.pinned for unit in faked.units)
        assert tightfit.simulate(faked).peak_bytes == tightfit.simulate(trace).peak_bytes
    plan = every_block(trace)
    assert plan.peak_bytes < 0.8 * plan.unplanned_peak_bytes
    proof = tightfit.verify(model, batch, plan)
    assert proof.passed, str(proof)
    with tightfit.apply(model, plan) as applied:
        gradients(model, batch)
        stats = applied.stats()
        assert stats.replays == 3 and stats.fallbacks == 0


def test_a_routing_that_is_not_the_recorded_one_with_adapters_of_experts() -> None:
    """The unit's Python runs again, and parameters that torch counts as changed are what they were. Two layers share
    their experts: what the first has read is put in place once more by the second."""
    model, batch = experts("eager")
    layers = model.base_model.model.model.layers
    layers[1].mlp.experts = layers[0].mlp.experts
    plan = every_block(tightfit.trace(model, batch, tiles=False))
    other = {name: torch.full_like(ids, 7) for name, ids in batch.items()}  # whose tokens all go to the same two

    def twice() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        loss = model(**other).loss
        loss.backward(retain_graph=True)
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = twice()
    with tightfit.apply(model, plan) as applied:
        found = twice()
        assert applied.stats().fallbacks > 0
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_frozen_experts_are_copied() -> None:
    """What is put where it is already is not written, and needs no copy to be put back."""
    model, batch = experts("grouped_mm")
    frozen = {p.untyped_storage()._cdata for p in model.parameters() if not p.requires_grad}
    kept: list[int] = []
    keep = Snapshot._keep

    def noted(self: Snapshot, tensor: torch.Tensor) -> None:
        kept.append(tensor.untyped_storage()._cdata)
        keep(self, tensor)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Snapshot, "_keep", noted)
        trace = tightfit.trace(model, batch, tiles=False)
        assert kept and not frozen & set(kept)
        tightfit.verify(model, batch, every_block(trace))
    assert not frozen & set(kept)
