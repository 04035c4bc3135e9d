"""Architectures of transformers, tiny: gradients bit for bit, peak within budget, clean removal.

`benchmarks/zoo.py` runs every architecture that can be built; its table is in `benchmarks/results/zoo.json`.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import tightfit
from tightfit.plan import every_block
from tightfit.verify.gradients import differences

ARCHITECTURES = [
    # dense, and grouped-query with gated MLPs
    "gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "granite", "olmo2", "starcoder2", "smollm3",
    # parallel blocks, ALiBi, learned positions
    "gpt_neox", "falcon", "bloom", "opt", "cohere", "phi",
    # sliding window, soft caps, alternating layers
    "gemma2", "gemma3_text", "gpt_neo",
    # mixtures of experts with several routers
    "mixtral", "qwen2_moe", "olmoe", "deepseek_v3",
    # state-space, linear attention, hybrids
    "mamba2", "rwkv", "lfm2",
    # encoder-decoder and encoder-only
    "seq2seq:t5", "seq2seq:bart", "masked:bert", "masked:distilbert",
]  # fmt: skip


#: One of each kind; the others are like one of these in what they run.
FAST = frozenset(
    {
        "gpt2", "gpt_neox", "bloom", "gemma2", "mixtral", "gpt_oss", "mamba2", "seq2seq:t5", "masked:distilbert",
    }
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
)
def test_architecture(zoo: ModuleType, name: str) -> None:
    with zoo.quiet():
        outcome = zoo.check(name)
    assert outcome.status == "ok", outcome
    assert outcome.fallbacks == 0
    assert outcome.units >= 2


@pytest.mark.parametrize(
    "name",
    [
        "mixtral",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("seq2seq:switch_transformers", "qwen2_moe", "jetmoe")
        ),
    ],
)  # fmt: skip
def test_routing_that_differs_from_the_traced_one(zoo: ModuleType, name: str) -> None:
    """The plan is made on one batch; others are routed otherwise, and fall back where that changes what runs."""
    with zoo.quiet():
        model, batch = zoo.build(name)
        plan = every_block(tightfit.trace(model, batch, tiles=False))
        vocabulary = int(batch["labels"].max()) + 1
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            other = {
                key: torch.randint(0, vocabulary, value.shape, generator=generator) if "ids" in key or key == "labels"
                else value
                for key, value in batch.items()
            }  # fmt: skip
            reference = zoo.observe(model, other)
            with tightfit.apply(model, plan) as applied:
                assert not differences(reference, zoo.observe(model, other))
                assert applied.stats().replays == plan.replays


def test_lora_on_the_last_layers_replays_only_those(zoo: ModuleType) -> None:
    peft = pytest.importorskip("peft")
    with zoo.quiet():
        model, batch = zoo.build("llama")
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], layers_to_transform=[2])
        model = peft.get_peft_model(model, config).train()
        trace = tightfit.trace(model, batch, tiles=False)
        plan = every_block(trace)
        reference = zoo.observe(model, batch)
        with tightfit.apply(model, plan) as applied:
            assert not differences(reference, zoo.observe(model, batch))
            assert applied.stats().replays == plan.replays == 1
            assert [path.rpartition(".")[2] for path in applied.active_units] == ["2"]
