"""A finished run in words and as a report."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.table import Table

from tightfit.core import (
    format_bytes,
    to_json,
)
from tightfit.train.options import END_STEPS, OVER, RunResult


def summary(result: RunResult) -> Table:
    """The run's evidence as a table: what was asked, what was predicted, what was measured."""
    table = Table(title=f"tightfit train: {result.status}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    plan, proof = result.plan, result.proof
    if plan is not None:
        whole = result.unplanned_peak_bytes or plan.unplanned_peak_bytes

        def of_whole(size_bytes: int) -> str:
            return f"{format_bytes(size_bytes)}  ({size_bytes / whole:.1%})"

        if result.unplanned_peak_bytes is not None:
            table.add_row("peak without a plan, measured", of_whole(result.unplanned_peak_bytes))
        else:
            table.add_row("peak without a plan, predicted", of_whole(plan.unplanned_peak_bytes))
        asked_bytes = plan.budget_bytes if result.budget_bytes is None else result.budget_bytes
        table.add_row("budget", of_whole(asked_bytes))
        table.add_row("peak predicted", of_whole(plan.peak_bytes))
        if result.peak_bytes is not None:
            over = result.peak_bytes > asked_bytes * OVER
            measured = of_whole(result.peak_bytes)
            table.add_row("peak measured, all steps", f"[red]{measured} over budget[/red]" if over else measured)
        if result.micro_batches is not None:
            cut = result.micro_batches
            table.add_row("micro-batches", f"{cut.accumulation} of {cut.size} for a global batch of {cut.global_batch}")
        share = f" ({plan.recompute_flops / plan.forward_flops:.1%} of the forward)" if plan.forward_flops else ""
        table.add_row("recompute, FLOPs a step", f"{plan.recompute_flops / 1e9:,.2f} GFLOP{share}", end_section=False)
        seconds = f" ({plan.recompute_seconds / plan.step_seconds:.1%} of the step)" if plan.step_seconds else ""
        table.add_row("recompute, seconds a step", f"{plan.recompute_seconds:.4f} s{seconds}")
    if proof is not None:
        gradients = proof["gradients"]
        held = "within the tolerance of tiles" if result.tiled else "identical"
        table.add_row(
            "gradients on a real batch", held if gradients.passed else f"[red]differ: {gradients.measured}[/red]"
        )
    same = result.losses_identical
    if same is None:
        table.add_row("first losses against no budget", "not compared")
    else:
        steps = min(len(result.losses), len(result.compared_losses))
        table.add_row(
            f"first {steps} losses against no budget, same seed",
            "the same bit for bit"
            if same
            else f"differ by up to {result.losses_apart:.3g}, as tiles may"
            if result.tiled
            else f"differ by up to {result.losses_apart:.3g}, as micro-batches may"
            if result.cut
            else "[red]differ[/red]",
        )
    if result.loss_start is not None and result.loss_end is not None:
        table.add_row("loss at the start", f"{result.loss_start:.3f}")
        table.add_row(f"loss at the end (mean of {min(END_STEPS, len(result.losses))})", f"{result.loss_end:.3f}")
        table.add_row(
            "steps", f"{len(result.losses)} in {result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s"
        )
    if result.retries:
        last = result.retries[-1]
        table.add_row(
            f"out of memory, survived {len(result.retries)} times",
            f"last at step {last.step}, then a plan for {format_bytes(last.budget_bytes_after)}",
        )
    table.add_row("run folder", str(result.folder))
    return table


def to_report(result: RunResult) -> dict[str, Any]:
    """The result as JSON-ready data, without the plan's programs (they are in `plan.json`)."""
    data = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    plan = result.plan
    data["plan"] = (
        None if plan is None else {k: v for k, v in to_json(plan).items() if k not in ("choices", "programs")}
    )
    data["folder"] = str(result.folder)
    data["losses_identical"] = result.losses_identical
    data["loss_start"], data["loss_end"] = result.loss_start, result.loss_end
    data["passed"] = result.passed
    report: dict[str, Any] = to_json(data)
    return report
