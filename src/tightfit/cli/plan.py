"""`tightfit plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tightfit.cli.options import (
    Batch,
    Budget,
    Calibration,
    Device,
    Dtype,
    HostBudget,
    Html,
    Json,
    Levers,
    Method,
    Model,
    OptimizerName,
    Seed,
    Seq,
)
from tightfit.cli.output import (
    can_write,
    console_on_stdout,
    emit,
    progress_shown,
    say_if_above_all,
    say_in_vain,
    write_page,
)
from tightfit.cli.prepared import prepare
from tightfit.core import (
    HOST_KIND,
    format_bytes,
    parse_host_budget,
    parse_levers,
    to_json,
)


def plan(
    model: Model,
    batch: Batch = 4,
    seq: Seq = 512,
    dtype: Dtype = "fp32",
    device: Device = HOST_KIND,
    method: Method = "full",
    optimizer: OptimizerName = "adamw",
    budget: Budget = "60%",
    levers: Levers = "",
    host_budget: HostBudget = None,
    seed: Seed = 0,
    explain: Annotated[bool, typer.Option("--explain", help="Show the plan unit by unit, and why.")] = False,
    out: Annotated[Path, typer.Option(help="Where to write the plan.")] = Path("plan.json"),
    calibration: Calibration = None,
    html: Html = None,
    chrome: Annotated[
        Path | None, typer.Option(help="Also write the timeline as a Chrome trace (ui.perfetto.dev).")
    ] = None,
    snapshot: Annotated[
        Path | None, typer.Option(help="Also write the step as a memory snapshot (pytorch.org/memory_viz).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Trace one step, plan it for --budget, write plan.json."""
    can_write({"--out": out, "--html": html, "--chrome": chrome, "--snapshot": snapshot})
    allowed, limit = parse_levers(levers), parse_host_budget(host_budget)
    prepared = prepare(
        model,
        batch=batch,
        seq=seq,
        dtype=dtype,
        device=device,
        method=method,
        optimizer=optimizer,
        budget=budget,
        seed=seed,
    )
    from tightfit.engine.limits import planned_here
    from tightfit.levers import ruled_out
    from tightfit.plan import plan as make_plan
    from tightfit.plan.account import account
    from tightfit.report import chrome_trace, memory_snapshot, plan_document, plan_report, study
    from tightfit.report import explain as explained
    from tightfit.step.run import device_of
    from tightfit.trace.recording import trace

    with progress_shown() as say:
        say("tracing one step")
        recorded = trace(prepared.model, prepared.batch, optimizer=prepared.optimizer)
        say("planning")
        made = planned_here(
            recorded, budget, limit, device_of(prepared.model),
            lambda budget, limit: make_plan(recorded, budget, levers=allowed, host_budget=limit),
        )  # fmt: skip
        if html is not None:
            say("planning for other budgets too, for the page")
            write_page(html, plan_document(made, model, study(recorded, made), account(recorded, made)))
    if chrome is not None:
        from tightfit.core import write_text
        from tightfit.plan import simulate

        write_text(chrome, json.dumps(chrome_trace(simulate(recorded, made))))
    if snapshot is not None:
        from tightfit.core import write_bytes

        write_bytes(snapshot, memory_snapshot(recorded, made))
    made.save(out)
    say_if_above_all(budget)
    if as_json or not explain:
        say_in_vain(recorded, allowed)
    if as_json:
        more = {"calibration": recorded.calibration, "account": to_json(account(recorded, made))}
        emit(json.dumps({"path": str(out), **plan_report(made), **more}))
        return
    if explain:
        console_on_stdout().print(explained(recorded, made))
        for line in ruled_out(recorded, allowed):
            emit(line)
    if recorded.calibration:
        emit(f"calibration: {recorded.calibration}")
    emit(
        f"{out}: {made.status.value}, peak {format_bytes(made.peak_bytes)} of a budget of "
        f"{format_bytes(made.budget_bytes)}, {made.replays} units replayed"
    )
