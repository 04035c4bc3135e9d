"""Every exact lever at once on 40 small steps: the peak predicted against the peak measured, and ten steps bit for bit.

    python benchmarks/whole_step.py              # some 20 minutes; writes benchmarks/results/whole_step.json
    python benchmarks/whole_step.py --only mlp   # one of the steps, the others as they were

The eight steps of `optimum.py` with AdamW, at five budgets each, from the lowest peak that all levers reach up. Two
more shapes stream their weights: LoRA on a Llama, in float32 and in 4 bits. For each budget: what the plan uses, its
predicted peak, the highest of ten steps by the allocator's count, and whether losses, trained weights and optimizer
state of the ten steps are those of the run without a plan.

Two steps are cut into micro-batches of at most two rows, whose gradients are accumulated. They are compared with the
same micro-batches without a plan, since micro-batches add in another order than the whole batch.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import drawn

os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch
import transformers
from optimum import STEPS, gpt2, llama, words
from streaming import put_in_force, trained
from torch import nn

import tightfit
from tightfit.core import Plan
from tightfit.fitting.micro_batches import gradients_in_place
from tightfit.integrations.bitsandbytes import no_repacking, quantise
from tightfit.integrations.peft import add_lora
from tightfit.levers import used
from tightfit.plan import Effort, lowest
from tightfit.step.rows import rows_taken
from tightfit.step.run import compute_loss
from tightfit.verify.peak import PeakMeter, static_bytes

RESULTS = Path(__file__).parent / "results" / "whole_step.json"
SHARES = (0.0, 0.15, 0.3, 0.5, 0.75)  # of the way from the lowest peak to the step's own
LEVERS = (
    "recompute,loss_in_place,nest,offload,state_in_host,optimizer_chunks,step_in_backward,stream_weights,"
    "gradients_in_host"
)
EFFORT = Effort(points=20, solver_seconds=1.0, proves=False)
RUN = 10

CASES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    **{name: made for name, made in STEPS.items() if name != "llama-lora"},
    "llama-lora": lambda: words(add_lora(llama(), rank=8), 2, 96),
    "llama-qlora": lambda: words(add_lora(quantise(llama(), torch.float32), rank=8), 2, 96),
}
#: Steps that are cut into micro-batches, of at most so many rows.
CUT_ROWS = 2
CUT_CASES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "gpt2-cut": lambda: words(gpt2(), 6, 96),
    "llama-cut": lambda: words(llama(), 6, 96),
}


def steps(model: nn.Module, batch: Any, plan: Plan | None, start: list[torch.Tensor]) -> tuple[list[torch.Tensor], int]:
    """Losses, trained weights and state after `RUN` steps, and the highest peak of one."""
    optimizer = begun(model, start)

    def backward() -> torch.Tensor:
        loss = compute_loss(model, batch)
        loss.backward()
        return loss.detach().clone()

    with put_in_force(model, plan, optimizer):
        return stepped(model, batch, optimizer, backward)


def begun(model: nn.Module, start: list[torch.Tensor]) -> torch.optim.Optimizer:
    """A new optimizer, with the weights and the random state as they were at the start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter, value in zip(trained(model), start, strict=True):
            parameter.copy_(value)
    return torch.optim.AdamW(trained(model), 1e-3, foreach=True)


def stepped(
    model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer, backward: Callable[[], torch.Tensor]
) -> tuple[list[torch.Tensor], int]:
    """Losses, trained weights and state after `RUN` steps with this `backward`, and the highest peak of one."""
    found: list[torch.Tensor] = []
    peak_bytes = 0
    for _ in range(RUN):
        gc.collect()  # what is freed in a step and was made before it would not be counted
        before_bytes = static_bytes(model, optimizer, batch)
        with PeakMeter("cpu") as meter:
            found.append(backward())
            optimizer.step()
            optimizer.zero_grad()
        peak_bytes = max(peak_bytes, before_bytes + meter.rise_bytes)
    state = [v for each in optimizer.state.values() for v in each.values() if isinstance(v, torch.Tensor)]
    return [*found, *(t.detach().clone() for t in (*trained(model), *state))], peak_bytes


def rows_of(name: str) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    if name in CUT_CASES:
        yield from rows_of_cut(name, *CUT_CASES[name]())
        return
    model, batch = CASES[name]()
    with no_repacking(model):
        optimizer = torch.optim.AdamW(trained(model), 1e-3, foreach=True)
        trace = tightfit.trace(model, batch, optimizer=optimizer, tiles=False)
        least, most = lowest(trace, levers=LEVERS, effort=EFFORT).peak_bytes, tightfit.simulate(trace).peak_bytes
        start = [p.detach().clone() for p in trained(model)]
        buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
        plain, plain_peak_bytes = steps(model, batch, None, start)
        for share in SHARES:
            budget = least + int(share * (most - least))
            plan = tightfit.plan(trace, budget, levers=LEVERS, effort=EFFORT)
            with torch.no_grad():
                for n, b in model.named_buffers():
                    b.copy_(buffers[n])
            found, peak_bytes = steps(model, batch, plan, start)
            yield row_of(name, share, plan, plain, plain_peak_bytes, found, peak_bytes)


def row_of(
    name: str,
    share: float,
    plan: Plan,
    plain: list[torch.Tensor],
    plain_peak_bytes: int,
    found: list[torch.Tensor],
    peak_bytes: int,
) -> dict[str, Any]:
    return {
        "step": name, "share": share, "plain_peak_bytes": plain_peak_bytes, "budget_bytes": plan.budget_bytes,
        "of_plain": round(plan.budget_bytes / plain_peak_bytes, 3), "predicted_peak_bytes": plan.peak_bytes,
        "peak_bytes": peak_bytes, "off": round(peak_bytes / plan.peak_bytes - 1, 6),
        "identical": len(plain) == len(found) and all(torch.equal(a, b) for a, b in zip(plain, found, strict=True)),
        "levers": [each.lever.value for each in used(plan)],
    }  # fmt: skip


def rows_of_cut(name: str, model: nn.Module, batch: Any) -> Iterator[dict[str, Any]]:
    start = [p.detach().clone() for p in trained(model)]
    part = rows_taken(batch, slice(0, CUT_ROWS))
    with gradients_in_place(model, True):
        trace = tightfit.trace(model, part, optimizer=begun(model, start), tiles=False)
    # by the effort that `fit` has
    least, most = lowest(trace, levers=LEVERS).peak_bytes, tightfit.simulate(trace).peak_bytes
    for share in SHARES:
        budget = least + int(share * (most - least))
        optimizer = begun(model, start)
        applied = tightfit.fit(
            model, batch, budget, optimizer=optimizer, levers=LEVERS, micro_batch=CUT_ROWS, host_budget="1GiB"
        )
        parts = list(applied.parts(batch))
        torch.manual_seed(1)
        found, peak_bytes = stepped(model, batch, optimizer, lambda: applied.backward(batch))  # noqa: B023  # at once
        plan, chosen = applied.plan, applied.micro_batches
        applied.remove()
        assert chosen is not None
        optimizer = begun(model, start)

        def backward() -> torch.Tensor:
            total = None
            for some, weight in parts:  # noqa: B023  # at once
                loss = compute_loss(model, some) * weight
                loss.backward()
                total = loss.detach() if total is None else total + loss.detach()
            assert total is not None
            return total

        yield {
            **row_of(name, share, plan, *stepped(model, batch, optimizer, backward), found, peak_bytes),
            "micro_batch": chosen.size, "accumulation": chosen.accumulation,
        }  # fmt: skip


def main() -> int:
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*CASES, *CUT_CASES]
    parser.add_argument("--only", choices=every, help="this step alone")
    asked = parser.parse_args()
    names = [asked.only] if asked.only else every
    record = drawn.record_of_rows(RESULTS, rows_of, names, order=every, key="step", then="share")
    drawn.write(RESULTS, record, parts=names)
    return 0


if __name__ == "__main__":
    sys.exit(main())
