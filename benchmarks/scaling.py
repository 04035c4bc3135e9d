"""What checkpointing saves and costs from GPT-2 to 70B shapes, and the standard question; all forecast, no GPU.

    python benchmarks/scaling.py     # some minutes; writes benchmarks/results/scaling.json

Per shape (full fine-tuning for GPT-2's family, LoRA r=16 for the rest; bf16, batch 1, 1,024 or 2,048 tokens, an H100's
kernels): the activation peak (peak minus what lives through the step) and the recomputed FLOPs without checkpointing,
with every block recomputed, and with plans for a half and a quarter of the activation peak.

The standard question: Llama-2-7B in 16 bits at batch 1 without checkpointing, from which length on do activations pass
20 GB (10^9 bytes)? For frozen weights with LoRA and for full fine-tuning, by bisection over fake steps.
"""

from __future__ import annotations

import json
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import drawn
import transformers

from tightfit.catalog import gpu
from tightfit.core import BudgetInfeasible, Plan
from tightfit.device.cost import retimed
from tightfit.forecast import Setup, trace_setup
from tightfit.forecast.recording import reached
from tightfit.plan import Effort, every_block, plan, simulate
from tightfit.step.environment import environment

RESULTS = Path(__file__).parent / "results" / "scaling.json"
SHAPES = (
    ("gpt2", "full", 1024), ("gpt2-medium", "full", 1024), ("gpt2-large", "full", 1024), ("gpt2-xl", "full", 1024),
    ("llama-2-7b", "lora", 2048), ("llama-3-8b", "lora", 2048), ("llama-2-13b", "lora", 2048),
    ("qwen2.5-32b", "lora", 2048), ("llama-2-70b", "lora", 2048),
)  # fmt: skip
EFFORT = Effort(points=60, solver_seconds=1.0, proves=False)
LIMIT_BYTES = 20 * 10**9


def row(name: str, method: str, seq: int) -> dict[str, Any]:
    device = gpu("h100-sxm")
    recorded = retimed(
        trace_setup(Setup(model=name, method=method, batch=1, seq=seq, optimizer="none"), device), reached(device)
    )
    fixed = sum(recorded.static_bytes.values())
    unplanned = simulate(recorded)
    step_seconds = sum(op.seconds for op in recorded.ops)

    def figures(made: Plan | None) -> dict[str, Any]:
        line = simulate(recorded, made)
        return {
            "activation_peak_bytes": line.peak_bytes - fixed,
            "share": round((line.peak_bytes - fixed) / (unplanned.peak_bytes - fixed), 4),
            "recompute_of_forward": round(line.recompute_flops / max(1, _forward(recorded)), 4),
            "slowdown_estimated": round(1 + line.recompute_seconds / step_seconds, 4),
        }

    modes = {"none": figures(None), "every-block": figures(every_block(recorded, effort=EFFORT))}
    for share in (0.5, 0.25):
        budget = fixed + int(share * (unplanned.peak_bytes - fixed))
        try:
            modes[f"tightfit at {share:.0%}"] = figures(plan(recorded, budget, effort=EFFORT))
        except BudgetInfeasible as error:
            least = (error.least_bytes - fixed) / (unplanned.peak_bytes - fixed)
            modes[f"tightfit at {share:.0%}"] = {"least_share": round(least, 4)}
    return {"model": name, "method": method, "seq": seq, "static_bytes": fixed, "modes": modes}


def _forward(recorded: Any) -> int:
    return sum(op.flops for op in recorded.ops if op.phase.value == "forward")


def passes_limit(method: str) -> dict[str, Any]:
    """The shortest length in steps of 64 at which the activation peak is over 20 GB."""
    device = gpu("h100-sxm")

    def activations(seq: int) -> int:
        recorded = trace_setup(Setup(model="llama-2-7b", method=method, batch=1, seq=seq, optimizer="none"), device)
        line = simulate(recorded)
        gradients = 0 if method != "full" else line.by_category["gradients"][line.peak_event]
        return line.peak_bytes - sum(recorded.static_bytes.values()) - gradients

    low, high = 1, 4096 // 64  # low is under, high over, or nothing is
    if activations(high * 64) <= LIMIT_BYTES:
        return {"method": method, "seq": None, "activation_bytes": activations(4096)}
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (middle, high) if activations(middle * 64) <= LIMIT_BYTES else (low, middle)
    return {"method": method, "seq": high * 64, "activation_bytes": activations(high * 64),
            "below": {"seq": low * 64, "activation_bytes": activations(low * 64)}}  # fmt: skip


def main() -> int:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    rows = []
    for shape in SHAPES:
        rows.append(row(*shape))
        print(json.dumps(rows[-1]), flush=True)
    answers = [passes_limit(method) for method in ("full", "lora", "qlora")]
    print(json.dumps(answers), flush=True)
    record = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment(),
              "rows": rows, "standard_question": answers}  # fmt: skip
    drawn.write(RESULTS, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
