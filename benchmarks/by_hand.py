"""Models that are checkpointed by hand: what that holds and runs again, and what tightfit makes of the same.

    python benchmarks/by_hand.py              # writes benchmarks/results/by_hand.json
    python benchmarks/by_hand.py --only gru   # one row, the others as they were

By hand: DenseNet-121's `memory_efficient=True` (timm's flag), `torch.utils.checkpoint` around ten turns of a recurrent
loop, `checkpoint_sequential` over a plain stack. Each row has the measured peak of a step's activations (the
allocator's count less what lives throughout) and the FLOPs that run again as a part of the forward's. tightfit is asked
twice: for the peak of the hand-made way, and for its lowest. Gradients are compared bit by bit with the step without a
plan.

timm is no dependency: without it the row is left out, and says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import drawn

os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import tightfit
from tightfit.core import BudgetInfeasible, Plan
from tightfit.plan import lowest
from tightfit.step.environment import environment
from tightfit.step.snapshot import undisturbed
from tightfit.verify.measure import FlopCount
from tightfit.verify.peak import measured_peak_bytes

RESULTS = Path(__file__).parent / "results" / "by_hand.json"


class Turns(nn.Module):
    """A GRU cell over 120 turns; `chunk`: so many turns are checkpointed together."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(32, 64), nn.Linear(64, 10)
        self.chunk = 0

    def turns(self, state: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        for turn in range(inputs.shape[1]):
            state = self.cell(inputs[:, turn], state)
        return state

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        state = inputs.new_zeros(inputs.shape[0], 64)
        if not self.chunk:
            return self.head(self.turns(state, inputs))
        for begin in range(0, inputs.shape[1], self.chunk):
            state = checkpoint(self.turns, state, inputs[:, begin : begin + self.chunk], use_reentrant=False)
        return self.head(state)


class Stack(nn.Module):
    """Forty layers in a row, as `checkpoint_sequential` wants them."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.LayerNorm(256)) for _ in range(40)]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(256, 10)
        self.segments = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.segments:
            return self.head(checkpoint_sequential(self.layers, self.segments, inputs, use_reentrant=False))
        return self.head(self.layers(inputs))


#: A model without checkpointing, its batch, and what switches its hand-made checkpointing on and off.
Made = tuple[nn.Module, torch.Tensor, Callable[[bool], None]]


def gru() -> Made:
    model = Turns()
    return model, torch.randn(64, 120, 32), lambda on: setattr(model, "chunk", 10 if on else 0)


def stack() -> Made:
    model = Stack()
    return model, torch.randn(512, 256), lambda on: setattr(model, "segments", 6 if on else 0)


def densenet() -> Made:
    import timm

    model = timm.create_model("densenet121", num_classes=10)

    def by_hand(on: bool) -> None:
        for module in model.modules():
            if type(module).__name__ == "DenseLayer":
                module.grad_checkpointing = module.memory_efficient = on

    return model, torch.randn(8, 3, 64, 64), by_hand


ROWS: dict[str, Callable[[], Made]] = {
    "densenet121": densenet, "gru": gru, "stack": stack,
}  # fmt: skip


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    out = model(batch)
    return functional.cross_entropy(out, torch.arange(out.shape[0]) % 10)


def measured(model: nn.Module, batch: torch.Tensor, static: int) -> tuple[int, int]:
    """(peak of the activations in bytes, FLOPs of a step)."""
    peak = measured_peak_bytes(model, batch, contextlib.nullcontext(), loss=loss_of)
    with undisturbed(model, batch), FlopCount() as count:
        loss_of(model, batch).backward()
    return peak - static, count.flops


def row(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    try:
        model, batch, by_hand = ROWS[name]()
    except ImportError as error:
        return {"model": name, "status": f"not measured: {error}"}
    model.train()
    began = time.perf_counter()
    trace = tightfit.trace(model, batch, loss=loss_of)
    traced = time.perf_counter() - began
    static = sum(trace.static_bytes.values())
    forward = sum(op.flops for op in trace.ops if op.phase.value == "forward")
    plain, flops = measured(model, batch, static)

    def as_row(plan: Plan, seconds: float) -> dict[str, Any]:
        proof = tightfit.verify(model, batch, plan, loss=loss_of)
        return {
            "peak_bytes": plan.peak_bytes - static, "rerun": round(plan.recompute_flops / forward, 4),
            "passed": proof.passed, "gradients": proof["gradients"].measured,
            "planning_seconds": round(seconds, 1), "units": sum(not c.keeps_all for c in plan.choices),
        }  # fmt: skip

    began = time.perf_counter()
    least = lowest(trace)
    found: dict[str, Any] = {
        "model": name, "status": "measured", "units": len(trace.units), "trace_seconds": round(traced, 1),
        "none": {"peak_bytes": plain}, "tightfit_lowest": as_row(least, time.perf_counter() - began),
    }  # fmt: skip
    by_hand(True)
    hand, hand_flops = measured(model, batch, static)
    found["by_hand"] = {"peak_bytes": hand, "rerun": round((hand_flops - flops) / forward, 4)}
    by_hand(False)
    began = time.perf_counter()
    try:
        equal = tightfit.plan(trace, static + hand)
        found["tightfit_at_equal_peak"] = as_row(equal, time.perf_counter() - began)
    except BudgetInfeasible as error:
        found["tightfit_at_equal_peak"] = {"status": str(error)}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(ROWS))
    only = parser.parse_args().only
    rows = {each["model"]: each for each in json.loads(RESULTS.read_text())["rows"]} if RESULTS.exists() else {}
    for name in (only,) if only else ROWS:
        rows[name] = row(name)
        print(json.dumps(rows[name]), flush=True)
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "rows": [rows[name] for name in ROWS if name in rows],
    }
    drawn.write(RESULTS, record, parts=[only] if only else list(ROWS))
    failed = [each["model"] for each in rows.values() if each.get("tightfit_lowest", {}).get("passed") is False]
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
