"""What `TightfitCallback` costs once it has planned: ops and forwards per step, beside a Trainer without it.

    python benchmarks/callback.py              # counts alone; a minute; writes benchmarks/results/callback.json
    python benchmarks/callback.py --seconds    # step times too, the runs taking turns; for a quiet machine

A small Llama in `Trainer`, two accumulated batches per step, all of one length. Ops are what the dispatcher sees
between the ends of two steps, the optimizer's included, views counted on their own; forwards are calls of the model.
With a budget that holds the plain step nothing is recomputed, so whatever is counted beyond the plain run is the
callback's own. The counts are of steps after the second; what planning and proof take before the first step is counted
on its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import drawn
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils import logging

from tightfit.integrations.transformers import TightfitCallback
from tightfit.step.environment import environment

RESULTS = Path(__file__).parent / "results" / "callback.json"
STEPS, ACCUMULATED, TURNS = 8, 2, 5
BUDGETS: dict[str, str | None] = {"without": None, "budget 100%": "100%", "budget 85%": "85%"}


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops = self.views = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.views += func.is_view  # makes no bytes and runs no kernel
        self.ops += not func.is_view
        return func(*args, **(kwargs or {}))


class Meter(TrainerCallback):  # type: ignore[misc]
    """Per step: ops, forwards, seconds, and what the engine says it did."""

    def __init__(self, ours: TightfitCallback | None, counts: bool) -> None:
        self.ours, self.counts = ours, counts
        self.steps: list[dict[str, float]] = []
        self.forwards = self.forwards_before = 0
        self.count: Count | None = None
        self.engine = (0, 0)
        self.began = 0.0

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].register_forward_pre_hook(self.forward)

    def forward(self, *_: Any) -> None:
        self.forwards += 1

    def stats(self) -> tuple[int, int]:
        if self.ours is None or self.ours.applied is None:
            return 0, 0
        stats = self.ours.applied.stats()
        return stats.replays, stats.rerun_ops

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.forwards_before, self.forwards = self.forwards, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if self.count is not None:
            self.count.__exit__(None, None, None)
        engine = self.stats()
        if state.global_step > 2:
            replays, rerun = (a - b for a, b in zip(engine, self.engine, strict=True))
            ops, views = (0, 0) if self.count is None else (self.count.ops, self.count.views)
            self.steps.append({
                "ops": ops, "views": views, "forwards": self.forwards, "replays": replays, "rerun_ops": rerun,
                "seconds": now - self.began,
            })  # fmt: skip
        self.forwards, self.count, self.engine = 0, None, engine
        if self.counts and state.global_step < args.max_steps:
            self.count = Count()
            self.count.__enter__()
        self.began = time.perf_counter()


def run(budget: str | None, counts: bool) -> tuple[Meter, TightfitCallback | None]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, vocab_size=1024,
            use_cache=False,
        )
    )  # fmt: skip
    ours = TightfitCallback(budget) if budget else None
    meter = Meter(ours, counts)
    rows = torch.randint(0, 1024, (64, 128), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder, max_steps=STEPS, per_device_train_batch_size=4, use_cpu=True, report_to="none",
                gradient_accumulation_steps=ACCUMULATED, save_strategy="no", logging_strategy="no", disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            data_collator=default_data_collator,
            callbacks=[each for each in (meter, ours) if each is not None],
        )  # fmt: skip
        trainer.train()
    return meter, ours


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", action="store_true", help="measure step times too; needs a quiet machine")
    wants_seconds = parser.parse_args().seconds
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = []
    for name, budget in BUDGETS.items():
        meter, ours = run(budget, counts=True)
        steps = [{k: v for k, v in step.items() if k != "seconds"} for step in meter.steps[:-1]]
        if any(step != steps[0] for step in steps):
            raise SystemExit(f"{name}: the counts differ from step to step: {steps}")
        rows.append({
            "run": name, **steps[0], "steps_counted": len(steps),
            "forwards_before_the_first_step": meter.forwards_before,
            "peak_bytes": max(ours.peaks) if ours else None,
            "predicted_peak_bytes": ours.plan.peak_bytes if ours and ours.plan else None,
            "budget_bytes": ours.plan.budget_bytes if ours and ours.plan else None,
        })  # fmt: skip
    plain = rows[0]
    for row in rows:
        row["extra_views"] = row["views"] - plain["views"]
        row["extra_ops"] = row["ops"] - plain["ops"]
        row["extra_forwards"] = row["forwards"] - plain["forwards"]
        row["extra_ops_beside_replays"] = row["extra_ops"] - row["rerun_ops"]
    ratios = None
    if wants_seconds:
        found: dict[str, list[float]] = {name: [] for name in BUDGETS}
        for _ in range(TURNS):
            for name, budget in BUDGETS.items():
                found[name] += [step["seconds"] for step in run(budget, counts=False)[0].steps]
        medians = {name: statistics.median(seconds) for name, seconds in found.items()}
        ratios = {name: round(seconds / medians["without"], 3) for name, seconds in medians.items()}
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment(), "rows": rows,
        "accumulated_batches": ACCUMULATED, "time_ratio": ratios,
        "time_ratio_note": "" if wants_seconds else "not measured: the machine was not quiet; run with --seconds",
    }  # fmt: skip
    print(json.dumps({k: v for k, v in record.items() if k != "environment"}, indent=1))
    drawn.write(RESULTS, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
