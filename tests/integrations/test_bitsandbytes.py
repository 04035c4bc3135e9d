"""A 4-bit model's twin on `meta` has the sizes, the ops and the peak of one that is really there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tightfit
from tightfit.integrations.bitsandbytes import quantise
from tightfit.integrations.peft import add_lora
from tightfit.step.run import static_bytes_by_category


def four_bit(device: str, dtype: torch.dtype, double: bool = True) -> Any:
    config = LlamaConfig(
        hidden_size=128, intermediate_size=200, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype).train()
    return add_lora(quantise(model, dtype, double=double), rank=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "double"),
    [
        (torch.bfloat16, True),
        (torch.float32, True),
        (torch.bfloat16, False),
    ],
)
def test_the_twin_is_as_large_and_does_the_same(dtype: torch.dtype, double: bool) -> None:
    ids = torch.randint(0, 256, (2, 48))
    batch = {"input_ids": ids, "labels": ids}
    real, twin = four_bit("cpu", dtype, double), four_bit("meta", dtype, double)
    assert static_bytes_by_category(real) == static_bytes_by_category(twin)
    assert static_bytes_by_category(real)["quantised_parameters"] > 0
    measured, forecast = tightfit.trace(real, batch), tightfit.trace(twin, batch, fake=True)
    assert [op.name for op in measured.ops] == [op.name for op in forecast.ops]
    assert sum(op.flops for op in measured.ops) == sum(op.flops for op in forecast.ops)
    peaks = [tightfit.simulate(trace).peak_bytes for trace in (measured, forecast)]
    assert peaks[1] == pytest.approx(peaks[0], rel=1e-5)


def test_a_plan_from_the_twin_serves_the_real_model() -> None:
    ids = torch.randint(0, 256, (2, 48))
    batch = {"input_ids": ids, "labels": ids}
    recorded = tightfit.trace(four_bit("meta", torch.float32), batch, fake=True)
    fixed, top = sum(recorded.static_bytes.values()), tightfit.simulate(recorded).peak_bytes
    plan = tightfit.plan(recorded, fixed + (top - fixed) * 7 // 10)
    assert plan.replays
    proof = tightfit.verify(four_bit("cpu", torch.float32), batch, plan)
    assert proof.passed, proof.checks
