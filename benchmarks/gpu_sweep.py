"""The forecast against a real GPU: predictions are written first, measured after, and every miss is kept.

    python benchmarks/gpu_sweep.py --predict --gpu h200      # without the GPU: results/gpu_predictions_h200.json
    python benchmarks/gpu_sweep.py --gpu h200                # on it: results/gpu_measured_h200.json, beside them

A case is a model of the catalog (random weights), a method, a batch and a length, an optimizer and a way to run the
step. Allocated and reserved are `torch.cuda.max_memory_allocated` and `max_memory_reserved` over three steps.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import drawn
import torch
import transformers

import tightfit
from tightfit.catalog import gpu
from tightfit.device.allocator import peaks
from tightfit.forecast import Setup, trace_setup
from tightfit.plan import Effort, every_block, lowest, plan, simulate
from tightfit.plan.simulate import allocations
from tightfit.step.environment import environment
from tightfit.verify.measure import every_block_checkpointed

RESULTS = Path(__file__).parent / "results"
EFFORT = Effort(points=60, solver_seconds=1.0, proves=False)
CASES = tuple(
    (Setup(model=model, method=method, batch=batch, seq=seq, optimizer=optimizer), mode)
    for model, method, batch, seq, optimizer in (
        ("gpt2", "full", 4, 1024, "adamw"),
        ("gpt2-medium", "full", 4, 1024, "adamw-fused"),
        ("gpt2-xl", "lora", 2, 1024, "adamw"),
        ("llama-3.2-1b", "full", 1, 2048, "adamw"),
        ("llama-3.2-1b", "qlora", 2, 4096, "adamw"),
        ("qwen2.5-1.5b", "lora", 2, 2048, "adamw-fused"),
        ("llama-2-7b", "lora", 1, 2048, "adamw"),
        ("llama-2-7b", "qlora", 1, 4096, "adamw"),
    )
    for mode in ("none", "every-block", "tightfit")
)


def predicted(setup: Setup, mode: str, device: Any) -> tuple[dict[str, int], Any]:
    recorded = trace_setup(setup, device)
    made = None
    if mode == "every-block":
        made = every_block(recorded, effort=EFFORT)
    elif mode == "tightfit":
        fixed, top = sum(recorded.static_bytes.values()), simulate(recorded).peak_bytes
        try:
            made = plan(recorded, fixed + (top - fixed) * 6 // 10, effort=EFFORT)
        except tightfit.BudgetInfeasible:
            made = lowest(recorded, effort=EFFORT)
    allocated, reserved = peaks(*allocations(recorded, made))
    return {"allocated_bytes": allocated, "reserved_bytes": reserved}, made


def measured(setup: Setup, mode: str, made: Any) -> dict[str, int]:
    from tightfit.forecast import DTYPES
    from tightfit.forecast.recording import _optimizer
    from tightfit.integrations.bitsandbytes import quantise
    from tightfit.integrations.peft import add_lora
    from tightfit.integrations.transformers import load_model, random_batch

    device = torch.device("cuda")
    weights = DTYPES[setup.dtype][0]
    torch.cuda.empty_cache()
    if setup.method == "qlora":  # packed layer by layer on the way to the GPU would need hooks; it is small enough here
        model: Any = quantise(load_model(setup.model, dtype=weights, device=device)[0], weights)
    else:
        model, _ = load_model(setup.model, dtype=weights, device=device)
    if setup.method != "full":
        model = add_lora(model, rank=setup.rank)
    optimizer = _optimizer(model, setup.optimizer) if setup.optimizer != "none" else None
    batch = random_batch(model, setup.batch, setup.seq)
    context: Any = contextlib.nullcontext()
    if mode == "every-block":
        context = every_block_checkpointed(model)
    elif mode == "tightfit":
        recorded = tightfit.trace(model, batch, optimizer=optimizer)
        context = tightfit.apply(model, plan(recorded, made.budget_bytes))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with context:
        for _ in range(3):
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            del loss
            if optimizer is not None:
                optimizer.step()
            model.zero_grad(set_to_none=True)
    return {"allocated_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--gpu", default="h200")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    device = gpu(given.gpu)
    before = RESULTS / f"gpu_predictions_{device.name}.json"
    known = {} if given.predict else {json.dumps(r["case"]): r for r in json.loads(before.read_text())["rows"]}
    rows: list[dict[str, Any]] = []
    for setup, mode in CASES:
        case = {**dataclasses.asdict(setup), "mode": mode}
        figures, made = predicted(setup, mode, device)
        row: dict[str, Any] = {"case": case, "predicted": figures}
        if not given.predict:
            row["predicted"] = known[json.dumps(case)]["predicted"]  # what was written before, not what is said now
            try:
                row["measured"] = measured(setup, mode, made)
                row["error"] = {k: row["predicted"][k] / row["measured"][k] - 1 for k in row["predicted"]}
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {error}"
        rows.append(row)
        print(json.dumps(row), flush=True)
    record = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment(), "rows": rows}
    target = before if given.predict else RESULTS / f"gpu_measured_{device.name}.json"
    drawn.write(target, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
