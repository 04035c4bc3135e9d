"""The memory of one GPT-2 step through time, three ways, and the trade-off of that step; two pictures of them.

    python benchmarks/timeline.py              # minutes, 5 GB; writes benchmarks/results/timeline.json, then draws
    python benchmarks/timeline.py --draw-only  # docs/timeline.png and docs/tradeoff.png from what is there

GPT-2 (124M), 2 x 512 tokens, full fine-tuning, fp32, AdamW, on the CPU: one real step is traced, op by op, and walked
through by the referee without a plan, with the plan that keeps nothing of any block, and with a plan for 60 % of the
peak. Beside it real steps are measured without anything, under `torch.utils.checkpoint` around every block, and under
the plan: the peak by the allocator's own count, and the FLOPs that are run again. The second picture shows these
three; torch's checkpointing reruns what nobody needs, too, which the plan that keeps nothing does not.
Bytes and FLOPs only; the seconds that plans weigh are a roofline's, so that a busy machine makes the same plans.
Drawing needs matplotlib.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import drawn

os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "timeline.json"
BATCH, SEQ, BUDGET = 2, 512, "60%"
SHOWN = {"none": "no checkpointing", "every-block": "nothing kept in any block", "chosen": "a plan for 60 %"}
COLOURS = {
    "parameters": "#4c566a", "gradients": "#b48ead", "optimizer_state": "#8fbcbb", "buffers": "#d8dee9",
    "inputs": "#a3be8c", "saved": "#5e81ac", "loss": "#d08770", "temporaries": "#ebcb8b",
}  # fmt: skip
GIB = 2**30


def record() -> dict[str, Any]:
    import torch

    import tightfit
    from tightfit.device.cost import NOMINAL_CPU, retimed
    from tightfit.integrations.transformers import load_model, random_batch
    from tightfit.report.study import study
    from tightfit.step.environment import environment
    from tightfit.verify.measure import FlopCount, every_block_checkpointed
    from tightfit.verify.peak import PeakMeter, run_step, static_bytes

    model, _ = load_model("gpt2", dtype=torch.float32, device=torch.device("cpu"), seed=0)
    model.train()
    batch = random_batch(model, BATCH, SEQ, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    run_step(model, batch, None, optimizer)  # so that the optimizer's state is there, as in every step but the first
    model.zero_grad()
    # what plans weigh is estimated, not measured: the same plans on a busy machine
    trace = retimed(tightfit.trace(model, batch, optimizer=optimizer), NOMINAL_CPU)
    chosen = tightfit.plan(trace, BUDGET)
    found = study(trace, chosen)
    base_bytes = static_bytes(model, optimizer, batch)

    def measured(context: AbstractContextManager[Any]) -> dict[str, float]:
        """The allocator's peak of a whole step, and the FLOPs that a forward and backward run beyond the plain ones."""
        with context:
            with FlopCount() as count:
                run_step(model, batch, None, None)
            model.zero_grad()
            with PeakMeter(torch.device("cpu")) as meter:
                run_step(model, batch, None, optimizer)
            model.zero_grad()
        return {"measured_bytes": base_bytes + meter.rise_bytes, "flops": count.flops}

    with FlopCount() as forward, torch.no_grad():
        model(**batch)
    real = {
        "none": measured(nullcontext()),
        "every-block": measured(every_block_checkpointed(model)),
        "chosen": measured(tightfit.apply(model, chosen)),
    }
    for each in real.values():
        each["measured_recompute_share"] = round((each["flops"] - real["none"]["flops"]) / forward.flops, 5)
    points = [
        {
            "name": point.name,
            "peak_bytes": point.peak_bytes,
            "recompute_share": round(point.recompute_share, 5),
            "peak_owner": point.peak_owner,
        }
        | real.get(point.name, {})
        | (
            {"moments": [{"at": m.at, "by_category": list(m.by_category)} for m in point.moments]}
            if point.name in SHOWN
            else {}
        )
        for point in found.points
    ]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "model": "gpt2",
        "batch": BATCH,
        "seq": SEQ,
        "budget_bytes": chosen.budget_bytes,
        "categories": list(found.categories),
        "points": points,
    }


def draw(found: dict[str, Any]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    points = {point["name"]: point for point in found["points"]}
    figure, axes = plt.subplots(1, 3, figsize=(7.4, 4.0), sharey=True, layout="constrained")
    for axis, (name, title) in zip(axes, SHOWN.items(), strict=True):
        moments = points[name]["moments"]
        rows = [[m["by_category"][i] / GIB for m in moments] for i in range(len(found["categories"]))]
        used = [i for i, category in enumerate(found["categories"]) if category in COLOURS]
        axis.stackplot(
            [m["at"] for m in moments], [rows[i] for i in used], step="post", linewidth=0,
            labels=[found["categories"][i].replace("_", " ") for i in used],
            colors=[COLOURS[found["categories"][i]] for i in used],
        )  # fmt: skip
        peak = points[name]["peak_bytes"] / GIB
        axis.axhline(peak, color="k", lw=0.8, ls="--")
        axis.set_title(f"{title}\npeak {peak:.2f} GiB, {points[name]['recompute_share']:.0%} rerun", fontsize=9)
        axis.set_xlim(0, 1)
        axis.set_xticks([])
        axis.set_xlabel("one step", fontsize=8)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("live, GiB", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(ROOT / "docs" / "timeline.png", dpi=110)

    figure, axis = plt.subplots(figsize=(6.0, 3.4), layout="constrained")
    peak = points["none"]["peak_bytes"]
    plans = [point for name, point in points.items() if name != "every-block"]  # as low as `lowest`, at a higher price
    curve = sorted((p["peak_bytes"] / peak, 100 * p["recompute_share"]) for p in plans)
    axis.plot([x for x, _ in curve], [y for _, y in curve], "k.-", lw=1, label="plans, by the referee")
    for name, marker, label in (
        ("none", "o", "no checkpointing"),
        ("every-block", "s", "every block, torch.utils.checkpoint"),
        ("chosen", "^", "a plan for 60 %"),
    ):
        point = points[name]
        share = point["measured_recompute_share"]
        axis.plot(point["measured_bytes"] / peak, 100 * share, marker, ms=8, label=f"{label}, measured")
    axis.set_xlabel("peak of the whole step / that without checkpointing", fontsize=9)
    axis.set_ylabel("run again, % of the forward's FLOPs", fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(ROOT / "docs" / "tradeoff.png", dpi=100)


def main() -> None:
    if "--draw-only" not in sys.argv[1:]:
        drawn.write(RESULTS, record(), indent=None)
    draw(json.loads(RESULTS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
