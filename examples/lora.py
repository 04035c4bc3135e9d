"""A LoRA Llama in two thirds of its memory, with the plan saved, read again and explained."""

import tempfile
from pathlib import Path

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import tightfit
from tightfit.integrations.peft import add_lora
from tightfit.integrations.transformers import random_batch
from tightfit.report import explain, proof_table

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, vocab_size=1000
)
model = add_lora(LlamaForCausalLM(config), rank=8)
batch = random_batch(model, batch=4, seq=128)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

trace = tightfit.trace(model, batch, optimizer=optimizer)
plan = tightfit.plan(trace, "66%")
with tempfile.TemporaryDirectory() as folder:
    plan.save(Path(folder) / "plan.json")
    plan = tightfit.Plan.load(Path(folder) / "plan.json")

console = Console()
console.print(explain(trace, plan))
with tightfit.apply(model, plan) as applied:
    model(**batch).loss.backward()
    console.print(applied.stats())
model.zero_grad()
proof = tightfit.verify(model, batch, plan, optimizer=optimizer)
console.print(proof_table(proof))
assert proof.passed
