"""A deep trace made from a shallow one is the deep model's own: every entry's digest, every byte, every plan."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import tightfit
from tightfit.core import Lever, Trace
from tightfit.integrations.bitsandbytes import quantise
from tightfit.integrations.peft import add_lora
from tightfit.levers import as_recorded, defined
from tightfit.plan import Effort
from tightfit.step.modules import find_units
from tightfit.trace.unroll import unroll

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "gpt2": (1, "n_layer", {"n_embd": 64, "n_head": 4, "vocab_size": 256, "n_positions": 64}),
    "llama": (1, "num_hidden_layers", {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 256, **HEADS}),
    "mixtral": (1, "num_hidden_layers", {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 256,
                                         "num_local_experts": 4, **HEADS}),
    "gemma2": (2, "num_hidden_layers", {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 256, "head_dim": 16,
                                        "sliding_window": 16, **HEADS}),
}  # fmt: skip


def trace_of(arch: str, blocks: int, method: str, device: str | None) -> tuple[Trace, list[str]]:
    period, depth, config = SHAPES[arch]
    torch.manual_seed(0)
    with torch.device("meta"):
        made = AutoConfig.for_model(arch, **config, **{depth: blocks * period})
        model: Any = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).train()
        if method == "qlora":
            model = quantise(model, torch.bfloat16)
        if method != "full":
            model = add_lora(model, rank=4)
    ids = torch.zeros(2, 32, dtype=torch.long)
    recorded = tightfit.trace(model, {"input_ids": ids, "labels": ids}, fake=True, device=device)
    return recorded, list(find_units(model))


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("arch", "method", "device"),
    [
        ("gpt2", "full", "cuda"),
        pytest.param("gemma2", "full", "cuda", marks=slow),  # its layers alternate
        pytest.param("llama", "lora", None, marks=slow),
        pytest.param("gpt2", "full", None, marks=slow), pytest.param("llama", "lora", "cuda", marks=slow),
        pytest.param("mixtral", "full", None, marks=slow), pytest.param("mixtral", "full", "cuda", marks=slow),
        pytest.param("gemma2", "full", None, marks=slow),
    ],
)  # fmt: skip
def test_unrolled_is_the_deep_models_own_trace(arch: str, method: str, device: str | None) -> None:
    few, _ = trace_of(arch, 5, method, device)
    deep, paths = trace_of(arch, 8, method, device)
    made = unroll(few, paths, SHAPES[arch][0])
    assert made is not None
    made = dataclasses.replace(made, static_bytes=deep.static_bytes)
    assert made.digest == deep.digest
    assert tightfit.simulate(made) == tightfit.simulate(deep)
    fixed, top = sum(deep.static_bytes.values()), tightfit.simulate(deep).peak_bytes
    effort = Effort(solver_seconds=0.5, proves=False)  # any plan will do
    plan = tightfit.plan(made, fixed + (top - fixed) * 9 // 10, effort=effort)
    assert tightfit.simulate(made, plan) == tightfit.simulate(deep, plan)  # one digest: the plan is both's


def described(recorded: Trace) -> list[tuple[Any, ...]]:
    """Frozen weights, each value by what it is and who reads it: two traces number values in another order."""
    readers: dict[int, list[int]] = defaultdict(list)
    for op in recorded.ops:
        for value in op.inputs:
            readers[value].append(op.id)

    def said(number: int) -> tuple[Any, ...]:
        value = recorded.values[number]
        return value.size_bytes, value.dtype, value.shape, tuple(readers[number])

    return [(each.module, sorted(map(said, each.values)), each.is_quantised, each.spans) for each in recorded.frozen]


@slow
@pytest.mark.parametrize(
    ("arch", "method", "device"),
    [
        ("llama", "lora", "cuda"), ("llama", "qlora", "cuda"), ("gemma2", "lora", "cuda"), ("gpt2", "lora", None),
        ("mixtral", "lora", "cuda"), ("llama", "qlora", None),
    ],
)  # fmt: skip
def test_unrolled_knows_the_frozen_weights_of_every_block(arch: str, method: str, device: str | None) -> None:
    few, _ = trace_of(arch, 5, method, device)
    deep, paths = trace_of(arch, 8, method, device)
    made = unroll(few, paths, SHAPES[arch][0])
    assert made is not None and len(deep.frozen) > len(few.frozen) > 0
    assert described(made) == described(deep)
    made = dataclasses.replace(made, static_bytes=deep.static_bytes)
    streams = defined(Lever.STREAM_WEIGHTS)
    for one, other in zip(streams.variants(as_recorded(made)), streams.variants(as_recorded(deep)), strict=True):
        assert one.decided == other.decided
        assert tightfit.simulate(one.trace) == tightfit.simulate(other.trace)


class Reaching(nn.Module):
    """Every block also reads what the block two before it made."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = [x, x]
        for block in self.blocks:
            made.append(block(made[-1]) * made[-2])
        return made[-1].sum()


def test_blocks_that_reach_over_their_neighbours_are_not_unrolled() -> None:
    few = tightfit.trace(Reaching(6), torch.randn(4, 8), fake=True)
    deep = tightfit.trace(Reaching(9), torch.randn(4, 8), fake=True)
    made = unroll(few, [unit.path for unit in deep.units])
    assert made is None or tightfit.simulate(made).live_bytes == tightfit.simulate(deep).live_bytes


def test_blocks_that_differ_are_not_unrolled() -> None:
    widths = [8, 8, 16, 8, 8, 8]
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, w), nn.Tanh(), nn.Linear(w, 8)) for w in widths))
    few = tightfit.trace(blocks, torch.randn(4, 8), loss=lambda m, b: m(b).sum(), fake=True)
    assert unroll(few, [f"{i}" for i in range(9)]) is None
    assert unroll(few, [f"{i}" for i in range(4)]) is None  # fewer than were traced
