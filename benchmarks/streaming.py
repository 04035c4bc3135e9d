"""Frozen weights streamed from host memory, at ten budgets from the least that is feasible to the plain step's peak.

    python benchmarks/streaming.py            # about a quarter of an hour; writes benchmarks/results/streaming.json
    python benchmarks/streaming.py --quick    # four blocks, four budgets, nothing is written

A Llama shape of 24 blocks with LoRA, and one of 4 blocks in nf4 (QLoRA), on the CPU. For each budget: what the plan
streams, the predicted peak and the largest of ten steps by the allocator's count, whether losses, gradients, trained
weights and optimizer state of the ten steps are bit for bit those of the plain run, and the seconds of a step (the
least of some, the budgets taking turns, so that noise falls on all alike).
"""

from __future__ import annotations

import contextlib
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
from tightfit.core import Plan
from tightfit.integrations.bitsandbytes import no_repacking, quantise
from tightfit.integrations.peft import add_lora
from tightfit.plan import Effort, lowest
from tightfit.step.environment import environment
from tightfit.verify.peak import PeakMeter, static_bytes

RESULTS = Path(__file__).parent / "results" / "streaming.json"
SHAPE = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "vocab_size": 2048}
BATCH, SEQ, STEPS, TURNS = 1, 128, 10, 5
#: Nesting is left out, whose plans take the planner longest.
LEVERS = "recompute,loss_in_place,stream_weights"
QUICK = Effort(points=20, solver_seconds=1.0, proves=False)


def main() -> int:
    transformers.logging.set_verbosity_error()
    quick = "--quick" in sys.argv
    cases = []
    for method, blocks in (("lora", 4 if quick else 24), ("qlora", 2 if quick else 4)):
        cases.append(case(method, blocks, 4 if quick else 10))
        for row in cases[-1]["rows"]:
            print(json.dumps(row), flush=True)
    if not quick:
        document = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(),
            "cases": cases,
        }
        drawn.write(RESULTS, document)
    return 0


def case(method: str, blocks: int, budgets: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, num_hidden_layers=blocks))
    if method == "qlora":
        model = quantise(model, torch.float32)
    model = add_lora(model, rank=8).train()
    ids = torch.randint(0, SHAPE["vocab_size"], (BATCH, SEQ))
    batch = {"input_ids": ids, "labels": ids}
    with no_repacking(model):
        trace = tightfit.trace(model, batch, optimizer=torch.optim.AdamW(trained(model)))
        least = lowest(trace, levers=LEVERS, effort=QUICK).peak_bytes
        most = tightfit.simulate(trace).peak_bytes
        plans: list[Plan] = []
        planning_seconds = []
        for k in range(budgets):
            started = time.perf_counter()
            budget = least + (most - least) * k // (budgets - 1)
            plans.append(tightfit.plan(trace, budget, levers=LEVERS, effort=QUICK))
            planning_seconds.append(round(time.perf_counter() - started, 1))
            print(f"{method}: planned {k + 1} of {budgets}", file=sys.stderr, flush=True)
        start = [p.detach().clone() for p in trained(model)]
        plain, plain_peak_bytes = ten_steps(model, batch, None, start)
        runs = [ten_steps(model, batch, plan, start) for plan in plans]
        seconds: list[list[float]] = [[] for _ in (None, *plans)]
        for _ in range(TURNS):
            for place, plan in enumerate((None, *plans)):
                seconds[place].append(a_step(model, batch, plan))
        size_of = {each.module: sum(trace.values[v].size_bytes for v in each.values) for each in trace.frozen}
        in_block = [sum(size for path, size in size_of.items() if f".layers.{i}." in path) for i in range(blocks)]
        rows = []
        for place, (plan, (found, peak_bytes)) in enumerate(zip(plans, runs, strict=True)):
            host_bytes = int(plan.settings.get("stream_weights", "0").split()[0])
            rows.append(
                {
                    "budget_bytes": plan.budget_bytes,
                    "predicted_peak_bytes": plan.peak_bytes,
                    "peak_bytes": peak_bytes,
                    "off": peak_bytes / plan.peak_bytes - 1,
                    "host_bytes": host_bytes,
                    "resident_bytes": sum(size_of.values()) - host_bytes,
                    "largest_copy_bytes": max((size_of[path] for path in streamed(plan)), default=0),
                    "added_seconds": plan.added_seconds,
                    "recompute_seconds": plan.recompute_seconds,
                    "step_seconds": min(seconds[place + 1]),
                    "copied_bytes": copied_bytes(model, batch, plan),
                    "identical": all(torch.equal(a, b) for a, b in zip(plain, found, strict=True)),
                    "planning_seconds": planning_seconds[place],
                }
            )
    return {
        "method": method, "blocks": blocks, "batch": BATCH, "seq": SEQ, "shape": SHAPE,
        "block_bytes": max(in_block), "plain_peak_bytes": plain_peak_bytes, "plain_step_seconds": min(seconds[0]),
        "rows": rows,
    }  # fmt: skip


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def streamed(plan: Plan) -> list[str]:
    """The modules whose weights wait in host memory."""
    return plan.settings.get("stream_weights", "").split()[2:]


def put_in_force(model: Any, plan: Plan | None, optimizer: Any = None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if plan is None else tightfit.apply(model, plan, optimizer=optimizer)


def ten_steps(model: Any, batch: Any, plan: Plan | None, start: list[torch.Tensor]) -> tuple[list[torch.Tensor], int]:
    """Losses, gradients, weights and state; and the highest peak of a step that begins with the optimizer's state."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter, value in zip(trained(model), start, strict=True):
            parameter.copy_(value)
    optimizer = torch.optim.AdamW(trained(model), 1e-3)
    found, peak_bytes = [], 0
    with put_in_force(model, plan, optimizer):
        for step in range(STEPS):
            optimizer.zero_grad()
            before_bytes = static_bytes(model, optimizer, batch)
            with PeakMeter("cpu") as meter:
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
            if step:
                peak_bytes = max(peak_bytes, before_bytes + meter.rise_bytes)
            found += [loss.detach(), *(p.grad.clone() for p in trained(model) if p.grad is not None)]
            del loss
    found += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    optimizer.zero_grad()
    return [*found, *(p.detach().clone() for p in trained(model))], peak_bytes


def a_step(model: Any, batch: Any, plan: Plan | None) -> float:
    with put_in_force(model, plan):
        model(**batch).loss.backward()
        started = time.perf_counter()
        model(**batch).loss.backward()
        seconds = time.perf_counter() - started
    model.zero_grad()
    return seconds


def copied_bytes(model: Any, batch: Any, plan: Plan) -> int:
    """By a step, from host memory to the device."""
    with put_in_force(model, plan) as applied:
        model(**batch).loss.backward()
        found = applied.stats().levers["stream_weights"].copied_bytes
    model.zero_grad()
    return int(found)


if __name__ == "__main__":
    raise SystemExit(main())
