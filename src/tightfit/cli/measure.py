"""`tightfit measure`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from tightfit.core import (
    HOST_KIND,
    parse_host_budget,
    parse_levers,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tightfit.core import Measurement, Trace
from tightfit.cli.options import (
    Budget,
    Device,
    Dtype,
    GlobalBatch,
    HostBudget,
    Html,
    Json,
    Levers,
    Method,
    Model,
    OptimizerName,
    Seed,
    Seq,
    batches_asked,
)
from tightfit.cli.output import (
    EXIT_NO,
    can_write,
    console_on_stdout,
    emit,
    progress_shown,
    say_if_above_all,
    say_in_vain,
    write_page,
)
from tightfit.cli.prepared import prepare


def measure(
    model: Model,
    batch: Annotated[
        str, typer.Option(help="Sequences in a batch; auto: the fastest micro-batches of --global-batch.")
    ] = "4",
    global_batch: GlobalBatch = None,
    seq: Seq = 512,
    dtype: Dtype = "fp32",
    device: Device = HOST_KIND,
    method: Method = "full",
    optimizer: OptimizerName = "adamw",
    budget: Budget = "60%",
    levers: Levers = "",
    host_budget: HostBudget = None,
    repeats: Annotated[int, typer.Option(help="Timed steps of each, interleaved.", min=1)] = 3,
    seed: Seed = 0,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Real steps side by side: no checkpointing, every block, tightfit at --budget."""
    can_write({"--html": html})
    allowed, limit = parse_levers(levers), parse_host_budget(host_budget)
    size, several = batches_asked(batch, global_batch)
    rows = size if several is None else several
    prepared = prepare(
        model,
        batch=rows,
        seq=seq,
        dtype=dtype,
        device=device,
        method=method,
        optimizer=optimizer,
        budget=budget,
        seed=seed,
    )
    from tightfit.fitting.measuring import measure_micro_batches
    from tightfit.report import measurement_document, measurement_report, measurement_table, study
    from tightfit.verify.measure import measure as run_whole

    run_measure: Callable[..., Measurement] = run_whole if several is None else measure_micro_batches
    traces: list[Trace] = []
    with progress_shown() as say:
        measured = run_measure(
            prepared.model,
            prepared.batch,
            budget=budget,
            levers=allowed,
            host_budget=limit,
            optimizer=prepared.optimizer,
            repeats=repeats,
            progress=say,
            described={"model": model, "method": method, "batch": rows, "seq": seq, "dtype": dtype},
            traced=traces.append,
        )
        if html is not None:
            say("planning for other budgets too, for the page")
            write_page(html, measurement_document(measured, study(traces[0], measured.plan)))
    say_if_above_all(budget)
    if several is None:  # else `fit` has said it
        say_in_vain(traces[0], allowed)
    if as_json:
        emit(json.dumps(measurement_report(measured)))
    else:
        console_on_stdout().print(measurement_table(measured))
    if any(row.gradients == "differs" for row in measured.rows):
        raise typer.Exit(EXIT_NO)
