"""FSDP2 inside a budget, one per rank: torchrun --nproc-per-node 2 examples/fsdp.py

Every rank calls `fit` at the same place. They agree on one plan, and stop together where they cannot.
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import tightfit

for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29517")):
    os.environ.setdefault(name, alone)
dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank = dist.get_rank()

torch.manual_seed(0)
config = LlamaConfig(hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4, vocab_size=256)
model = LlamaForCausalLM(config).train()
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

tokens = torch.randint(256, (4, 128), generator=torch.Generator().manual_seed(rank))
batch = {"input_ids": tokens, "labels": tokens}

applied = tightfit.fit(model, batch, budget="70%", optimizer=optimizer)  # the one line; "22GiB" on a GPU
for _ in range(3):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"rank {rank}: loss {loss.item():.3f}, planned {applied.plan.peak_bytes:,} B of {applied.plan.budget_bytes:,} B")
applied.remove()

proof = tightfit.verify(model, batch, applied.plan, optimizer=optimizer)
assert proof["gradients"].passed, proof["gradients"].measured
dist.destroy_process_group()
