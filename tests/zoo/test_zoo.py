"""Architectures of transformers, tiny: gradients bit for bit, peak within budget, clean removal.

`benchmarks/zoo.py` runs every architecture that can be built; its table is in `benchmarks/results/zoo.json`.
"""

from __future__ import annotations

from types import ModuleType

import pytest

ARCHITECTURES = [
    # dense, and grouped-query with gated MLPs
    "gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "granite", "olmo2", "starcoder2", "smollm3",
    # parallel blocks, ALiBi, learned positions
    "gpt_neox", "falcon", "bloom", "opt", "cohere", "phi",
    # sliding window, soft caps, alternating layers
    "gemma2", "gemma3_text", "gpt_neo",
    # mixtures of experts with several routers
    "mixtral", "qwen2_moe", "olmoe", "deepseek_v3", "gpt_oss",
    # state-space, linear attention, hybrids
    "mamba2", "rwkv", "lfm2",
    # encoder-decoder and encoder-only
    "seq2seq:t5", "seq2seq:bart", "masked:bert", "masked:distilbert",
]  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(zoo: ModuleType, name: str) -> None:
    with zoo.quiet():
        outcome = zoo.check(name)
    assert outcome.status == "ok", outcome
    assert outcome.fallbacks == 0
    assert outcome.units >= 2
