"""How long planning takes, and how near to its bound it comes, on shapes far larger than this machine.

    python benchmarks/planning.py               # some minutes; writes benchmarks/results/planning.json
    python benchmarks/planning.py --only 7B     # one shape, the other as it was

Fake traces (no weights, no memory) of Llama shapes with LoRA r=16 on all linear layers, batch 1 x 2,048, bf16; then a
plan at ten budgets from the lowest peak up. The gap is what a plan may be from the best at most, as a part of the
step's proven seconds. `plan_seconds` are of the processor, so that other work beside it counts less.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import drawn
import torch
import transformers

import tightfit
from tightfit.integrations.peft import add_lora
from tightfit.plan import lowest

RESULTS = Path(__file__).parent / "results" / "planning.json"
SHAPES = {
    "7B, 32 blocks": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                      "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "70B, 80 blocks": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                       "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000},
}  # fmt: skip
STEPS = 10  # budgets: the lowest peak, and so many tenths of the way from there to the peak without a plan


def rows_of(name: str) -> Iterator[dict[str, Any]]:
    shape = SHAPES[name]
    with torch.device("meta"):
        config: Any = transformers.LlamaConfig(**shape, max_position_embeddings=4096, dtype=torch.bfloat16)
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model = add_lora(model, rank=16).train()
        ids = torch.zeros(1, 2048, dtype=torch.long)
    started = time.perf_counter()
    trace = tightfit.trace(model, {"input_ids": ids, "labels": ids}, fake=True)
    trace_seconds = time.perf_counter() - started
    started = time.process_time()
    low = lowest(trace)
    lowest_seconds = time.process_time() - started
    unplanned = tightfit.simulate(trace).peak_bytes
    fixed = sum(trace.static_bytes.values())
    step_seconds = sum(op.seconds for op in trace.ops)
    for step in range(STEPS):
        budget = low.peak_bytes + step * (unplanned - low.peak_bytes) // STEPS
        started = time.process_time()
        plan = tightfit.plan(trace, budget)
        yield {
            "model": name,
            "activation_share": round((budget - fixed) / (unplanned - fixed), 4),
            "trace_seconds": round(trace_seconds, 1),
            "lowest_seconds": round(lowest_seconds, 1),
            "recompute_flops_share": round(plan.recompute_flops / max(1, plan.forward_flops), 4),
            "status": plan.status.value,
            "gap_of_step": round(
                (plan.recompute_seconds - plan.bound_seconds) / (step_seconds + plan.bound_seconds), 5
            ),
            "plan_seconds": round(time.process_time() - started, 2),
        }


def main() -> int:
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[name.partition(",")[0] for name in SHAPES], help="this shape alone")
    asked = parser.parse_args()
    names = [name for name in SHAPES if asked.only in (None, name.partition(",")[0])]
    record = drawn.record_of_rows(RESULTS, rows_of, names, order=list(SHAPES), key="model", then="activation_share")
    drawn.write(RESULTS, record, parts=names)
    return 0


if __name__ == "__main__":
    sys.exit(main())
