"""What each lever takes off the peak, how far down all of them go, and the curve from keep-everything to the floor.

    python benchmarks/levers.py [floor|forecast|curves ...]     # some 30 minutes; writes benchmarks/results/levers.json

- `floor`: GPT-2 (124M), 1 x 1,024 tokens, full fine-tuning, fp32, dropout on, on the CPU, real steps: no checkpointing,
  every block (`torch.utils.checkpoint`) and the lowest plan by each set of levers, side by side. The gradients of an
  earlier micro-batch are there before the step, so the activation peak (peak minus what was live before) holds none of
  the 498 MB that recompute cannot touch; without them the optimizer's step is the peak of all but the first row.
- `forecast`: Llama-3-8B's shape, QLoRA, 1 x 8,192 tokens, H100: the lowest peak by each set of levers, no GPU.
- `curves`: for three steps, plans at 14 budgets from the floor to keep-everything by all levers and by smaller sets;
  seconds are estimated, bytes are the referee's.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import drawn

os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import tightfit
from tightfit.catalog import gpu
from tightfit.core import BudgetInfeasible, Lever, Plan, Trace
from tightfit.forecast import Setup, trace_for
from tightfit.integrations.transformers import load_model, random_batch
from tightfit.plan import Effort, every_block, lowest, plan, simulate
from tightfit.plan.shares import shares
from tightfit.step.environment import environment
from tightfit.verify.measure import measure

RESULTS = Path(__file__).parent / "results" / "levers.json"
EFFORT = Effort(points=40, solver_seconds=1.0, proves=False)
RECOMPUTE = {Lever.RECOMPUTE}
SETS: dict[str, set[Lever]] = {
    "recompute": RECOMPUTE,
    "+ loss in place": RECOMPUTE | {Lever.LOSS_IN_PLACE},
    "+ nesting": RECOMPUTE | {Lever.LOSS_IN_PLACE, Lever.NEST},
    "+ tiles": RECOMPUTE | {Lever.LOSS_IN_PLACE, Lever.NEST, Lever.TILE},
    "+ offload (all)": set(Lever),
}
SMALLER: dict[str, set[Lever]] = {
    "recompute": RECOMPUTE,
    "recompute, loss in place": RECOMPUTE | {Lever.LOSS_IN_PLACE},
    "recompute, loss in place, nest": RECOMPUTE | {Lever.LOSS_IN_PLACE, Lever.NEST},
    "recompute, tile": RECOMPUTE | {Lever.TILE},
    "recompute, loss in place, offload": RECOMPUTE | {Lever.LOSS_IN_PLACE, Lever.OFFLOAD},
}
BUDGETS = 14


def floor() -> dict[str, Any]:
    model, _ = load_model("gpt2", dtype=torch.float32)
    batch = random_batch(model, 1, 1024)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    recorded = tightfit.trace(model, batch)
    rows = []
    for name, levers in SETS.items():
        least = lowest(recorded, levers=levers)
        measured = measure(model, batch, budget=least.peak_bytes, levers=levers, repeats=3)
        none, blocks, mine = measured.rows
        if not rows:
            rows += [_measured("no checkpointing", none, blocks), _measured("every block", blocks, blocks)]
        rows.append(_measured(name, mine, blocks) | {"exact": measured.plan.exact})
        print(rows[-1], flush=True)
        gc.collect()
    return {"model": "gpt2", "batch": 1, "seq": 1024, "dtype": "fp32", "method": "full", "rows": rows}


def _measured(name: str, row: Any, blocks: Any) -> dict[str, Any]:
    return {
        "levers": name,
        "activation_peak_bytes": row.activation_peak_bytes,
        "of_every_block": round(row.activation_peak_bytes / blocks.activation_peak_bytes, 4),
        "predicted_off": round(row.predicted_peak_bytes / row.peak_bytes - 1, 6),
        "recompute_of_forward": round(row.recompute_flops / row.forward_flops, 4),
        "seconds_of_every_block": round(row.step_seconds / blocks.step_seconds, 3),
        "gradients": row.gradients,
    }


def forecast() -> dict[str, Any]:
    setup = Setup(model="llama-3-8b", method="qlora", batch=1, seq=8192, optimizer="adamw")
    recorded = trace_for(setup, gpu("h100-sxm"), tiles=True)
    blocks = every_block(recorded, effort=EFFORT)
    rows = [_forecast("no checkpointing", recorded, None, blocks), _forecast("every block", recorded, blocks, blocks)]
    for name, levers in SETS.items():
        made = lowest(recorded, levers=levers, effort=EFFORT)
        rows.append(_forecast(name, recorded, made, blocks))
        print(rows[-1], flush=True)
    bought = [
        {"lever": each.lever.value, "bought_bytes": each.bought_bytes, "seconds": each.seconds, "how": each.what}
        for each in shares(recorded, made)
    ]
    return {"model": setup.model, "method": setup.method, "batch": 1, "seq": setup.seq, "rows": rows, "shares": bought}


def _forecast(name: str, recorded: Trace, made: Plan | None, blocks: Plan) -> dict[str, Any]:
    line = simulate(recorded, made)
    step_seconds = sum(op.seconds for op in recorded.ops)
    return {
        "levers": name,
        "peak_bytes": line.peak_bytes,
        "of_every_block": round(line.peak_bytes / blocks.peak_bytes, 4),
        "recompute_of_forward": round(line.recompute_flops / blocks.forward_flops, 4),
        "slowdown_estimated": round(1 + _cost(made) / step_seconds, 4),
        "owner": line.peak_owner,
    }


def _cost(made: Plan | None) -> float:
    return 0.0 if made is None else made.recompute_seconds + made.tile_seconds + made.offload_seconds


def curves() -> list[dict[str, Any]]:
    found = []
    for setup in (
        Setup(model="gpt2", method="full", batch=4, seq=1024, dtype="fp32", optimizer="none", accumulate=True),
        Setup(model="llama-2-7b", method="lora", batch=1, seq=4096, optimizer="none"),
        Setup(model="llama-3-8b", method="qlora", batch=1, seq=8192, optimizer="none"),
    ):
        recorded = trace_for(setup, gpu("h100-sxm"), tiles=True)
        found.append(
            {"model": setup.model, "method": setup.method, "batch": setup.batch, "seq": setup.seq} | curve(recorded)
        )
        print(setup.model, [(p["share"], p["slowdown_estimated"]) for p in found[-1]["points"]], flush=True)
    return found


def curve(recorded: Trace) -> dict[str, Any]:
    fixed = sum(recorded.static_bytes.values())
    step_seconds = sum(op.seconds for op in recorded.ops)
    unplanned = simulate(recorded).peak_bytes
    least = lowest(recorded, levers=set(Lever), effort=EFFORT).peak_bytes
    points = []
    for place in range(BUDGETS):
        budget = least + round((unplanned - least) * (place / (BUDGETS - 1)) ** 2)  # closer together near the floor
        made = plan(recorded, budget, levers=set(Lever), effort=EFFORT)
        points.append(
            {
                "budget_bytes": budget,
                "activation_peak_bytes": made.peak_bytes - fixed,
                "share": round((made.peak_bytes - fixed) / (unplanned - fixed), 4),
                "slowdown_estimated": round(1 + _cost(made) / step_seconds, 5),
                "recompute_of_forward": round(made.recompute_flops / made.forward_flops, 4),
                "offloaded_bytes": made.offloaded_bytes,
                "sweeps": len(made.advances),
                "tiled": not made.exact,
                "smaller_sets": {
                    name: _slowdown(recorded, budget, levers, step_seconds) for name, levers in SMALLER.items()
                },
            }
        )
    return {"floor_bytes": least, "unplanned_peak_bytes": unplanned, "points": points}


def _slowdown(recorded: Trace, budget: int, levers: Collection[Lever], step_seconds: float) -> float | None:
    try:
        made = plan(recorded, budget, levers=levers, effort=EFFORT)
    except BudgetInfeasible:
        return None
    return round(1 + _cost(made) / step_seconds, 5)


def main() -> None:
    parts = {"floor": floor, "forecast": forecast, "curves": curves}
    asked = sys.argv[1:] or list(parts)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in asked:
        results[name] = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "result": parts[name]()}
        results["environment"] = environment()
        drawn.write(RESULTS, results, parts=[name])


if __name__ == "__main__":
    main()
