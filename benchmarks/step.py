"""What one fitted step reaches: recompute for bytes kept, prediction against the allocator, gradients.

    python benchmarks/step.py          # about ten minutes; writes benchmarks/results/step.json; bytes and counts alone

- `frontier`: one block of a LoRA Llama (6 blocks, hidden 1024, fp32, r=16 on all linear layers) and of GPT-2 with
  dropout: estimated seconds rerun, as a part of the block's forward, for the part of the needed bytes that is kept.
- `prediction`: gpt2, and the LoRA Llama, at three budgets and with every block recomputed: predicted peak, the
  allocator's own count, budget, gradients; fp32, bf16 and CPU autocast, dropout on.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import drawn

os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import nn

import tightfit
from tightfit.device.cost import NOMINAL_CPU, retimed
from tightfit.integrations.peft import add_lora
from tightfit.integrations.transformers import load_model, random_batch
from tightfit.plan import every_block
from tightfit.plan.choose import Model
from tightfit.step.environment import environment

RESULTS = Path(__file__).parent / "results" / "step.json"
Made = tuple[nn.Module, dict[str, torch.Tensor], torch.optim.Optimizer]


def lora_llama(dtype: torch.dtype = torch.float32, batch: int = 2, seq: int = 256) -> Made:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=6, hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=16,
        vocab_size=8192, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = add_lora(transformers.LlamaForCausalLM(config).to(dtype), rank=16)
    return model, random_batch(model, batch, seq), _adamw(model)


def gpt2(name: str = "gpt2", dtype: torch.dtype = torch.float32, batch: int = 2, seq: int = 256) -> Made:
    model, _ = load_model(name, dtype=dtype)
    return model, random_batch(model, batch, seq), _adamw(model)


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)


def frontier() -> dict[str, Any]:
    """Share of the needed bytes kept -> least share of the block's forward seconds rerun."""
    found = {}
    for name, (model, batch, _) in (("lora llama", lora_llama()), ("gpt2 with dropout", gpt2())):
        trace = retimed(tightfit.trace(model, batch), NOMINAL_CPU)  # the same on every machine
        planner = Model(trace)
        unit = trace.units[len(trace.units) // 2]  # the first block of a LoRA model needs no input gradient
        frame = next(f.id for f in trace.frames if f.unit == unit.path)
        forward_seconds = sum(op.seconds for op in trace.ops if op.frame == frame)
        points = planner.frontiers[unit.path].points
        sizes = {v.ordinal: v.size_bytes for v in trace.values if v.unit == unit.path}
        needed_bytes = sum(sizes[v] for v in trace.programs[frame].needed)
        found[name] = {
            f"{share:.0%} kept": min(
                p.seconds / forward_seconds for p in points if p.kept_bytes <= share * needed_bytes
            )
            for share in (0.6, 0.5, 0.4)
        }
    return found


def autocast_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss: torch.Tensor = model(**batch).loss
        return loss


def prediction() -> list[dict[str, Any]]:
    cases: list[tuple[str, Callable[[], Made], Any, tuple[str, ...]]] = [
        ("gpt2, fp32", gpt2, None, ("90%", "75%", "60%", "every-block")),
        ("gpt2, bf16", lambda: gpt2(dtype=torch.bfloat16), None, ("90%", "every-block")),
        ("gpt2, autocast", gpt2, autocast_loss, ("90%", "every-block")),
        ("lora llama, fp32", lora_llama, None, ("80%", "65%", "50%", "every-block")),
        ("lora llama, bf16", lambda: lora_llama(torch.bfloat16), None, ("80%", "every-block")),
        ("lora llama, autocast", lora_llama, autocast_loss, ("80%", "every-block")),
    ]
    rows = []
    for name, make, loss, budgets in cases:
        model, batch, optimizer = make()
        trace = tightfit.trace(model, batch, loss=loss, optimizer=optimizer)
        for budget in budgets:
            if budget == "every-block":
                plan = every_block(trace)
            else:
                try:
                    plan = tightfit.plan(trace, budget)
                except tightfit.BudgetInfeasible as error:
                    plan = tightfit.plan(trace, error.least_bytes)
                    budget += f" is infeasible: the least, {error.least_bytes / plan.unplanned_peak_bytes:.0%}"
            proof = tightfit.verify(model, batch, plan, loss=loss, optimizer=optimizer)
            measured = int(proof["peak"].measured.split("(")[1].split()[0])
            rows.append(
                {
                    "case": name,
                    "budget": budget,
                    "budget_bytes": plan.budget_bytes,
                    "predicted_peak_bytes": plan.peak_bytes,
                    "measured_peak_bytes": measured,
                    "unplanned_peak_bytes": plan.unplanned_peak_bytes,
                    "prediction_off": measured / plan.peak_bytes - 1,
                    "over_budget": measured / plan.budget_bytes - 1,
                    "recompute_share_of_forward_flops": plan.recompute_flops / plan.forward_flops,
                    "status": plan.status.value,
                    "gradients": proof["gradients"].measured,
                    "passed": proof.passed,
                }
            )
            print(rows[-1], file=sys.stderr)
    return rows


def main() -> int:
    transformers.logging.set_verbosity_error()
    record: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment()}
    for part in (frontier, prediction):
        record[part.__name__] = part()
        print(json.dumps(record[part.__name__], indent=1))
    drawn.write(RESULTS, record)
    return 0 if all(row["passed"] for row in record["prediction"]) else 1


if __name__ == "__main__":
    sys.exit(main())
