"""How long planning takes, and how near to its bound it comes, on shapes far larger than this machine.

    python benchmarks/planning.py     # some minutes; writes benchmarks/results/planning.json

Fake traces (no weights, no memory) of Llama shapes with LoRA r=16 on all linear layers, batch 1 x 2,048, bf16; then a
plan at several budgets between the floor and the unplanned peak. The gap is that of the whole step's seconds.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import drawn
import torch
import transformers

import tightfit
from tightfit.integrations.peft import add_lora
from tightfit.plan.choose import Model
from tightfit.step.environment import environment

RESULTS = Path(__file__).parent / "results" / "planning.json"
SHAPES = {
    "7B, 32 blocks": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                      "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "70B, 80 blocks": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                       "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000},
}  # fmt: skip
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def main() -> int:
    transformers.logging.set_verbosity_error()
    rows = []
    for name, shape in SHAPES.items():
        with torch.device("meta"):
            config: Any = transformers.LlamaConfig(**shape, max_position_embeddings=4096, dtype=torch.bfloat16)
            model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model = add_lora(model, rank=16).train()
            ids = torch.zeros(1, 2048, dtype=torch.long)
        started = time.perf_counter()
        trace = tightfit.trace(model, {"input_ids": ids, "labels": ids}, fake=True)
        trace_seconds = time.perf_counter() - started
        started = time.perf_counter()
        Model(trace)
        frontier_seconds = time.perf_counter() - started
        unplanned = tightfit.simulate(trace).peak_bytes
        fixed = sum(trace.static_bytes.values())
        for share in SHARES:
            row: dict[str, Any] = {"model": name, "activation_share": share, "trace_seconds": round(trace_seconds, 1),
                                   "frontier_seconds": round(frontier_seconds, 1)}  # fmt: skip
            started = time.perf_counter()
            try:
                plan = tightfit.plan(trace, fixed + int(share * (unplanned - fixed)))
            except tightfit.BudgetInfeasible as error:
                row["least_share"] = round((error.least_bytes - fixed) / (unplanned - fixed), 4)
            else:
                row |= {
                    "recompute_flops_share": round(plan.recompute_flops / max(1, plan.forward_flops), 4),
                    "status": plan.status.value,
                    "gap_of_step": round((plan.recompute_seconds - plan.bound_seconds) / plan.step_seconds, 5),
                }  # fmt: skip
            row["plan_seconds"] = round(time.perf_counter() - started, 2)
            rows.append(row)
            print(json.dumps(row), flush=True)
    record = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment(), "rows": rows}
    drawn.write(RESULTS, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
