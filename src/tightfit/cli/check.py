"""`tightfit check`."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tightfit.core import Trace
from tightfit.catalog import require_model
from tightfit.cli.options import MODEL_HELP, Calibration, GlobalBatch, HostBudget, Html, Json, Levers, batches_asked
from tightfit.cli.output import EXIT_NO, can_write, console_on_stdout, emit, progress_shown, write_page
from tightfit.cli.site import refuse_beside_site, write_site
from tightfit.core import AUTO, HOST_KIND, InvalidInput, format_apart, parse_bytes, parse_host_budget, parse_levers
from tightfit.core.errors import unknown
from tightfit.device.calibration import NO_FILE


def check(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default="with --site, all of the catalog"),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="A GPU of the catalog (rtx-4090), a size (24GiB), all, or here: the device that was calibrated.",
            show_default="rtx-4090, or here with --calibration",
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="full, lora or qlora.", show_default="full; with --site, all three")
    ] = None,
    batch: Annotated[
        str,
        typer.Option(
            help="Sequences in a batch; with --trainer dpo, pairs; auto: the fastest micro-batches of --global-batch."
        ),
    ] = "1",
    global_batch: GlobalBatch = None,
    seq: Annotated[
        int | None, typer.Option(help="Tokens in a sequence.", show_default="2048, or the model's positions")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="bf16, fp16, fp32; bf16-mixed, fp16-mixed: fp32 weights, autocast.")
    ] = "bf16",
    optimizer: Annotated[
        str, typer.Option(help="adamw, adamw-fused, adamw8bit, paged-adamw8bit, sgd or none.")
    ] = "adamw",
    rank: Annotated[int, typer.Option(help="Of the LoRA adapters.")] = 16,
    trainer: Annotated[
        str,
        typer.Option(
            help="Whose step: model (its own loss, as in transformers' Trainer), sft or dpo (TRL's, as installed)."
        ),
    ] = "model",
    accumulate: Annotated[
        bool, typer.Option("--accumulate", help="Gradients of earlier micro-batches are there when a step begins.")
    ] = False,
    world_size: Annotated[
        int, typer.Option("--world-size", help="GPUs that train together; the answer is of each.")
    ] = 1,
    strategy: Annotated[str, typer.Option(help="How they share the step: ddp, fsdp2, or one.")] = "one",
    reshard: Annotated[
        bool, typer.Option(help="FSDP2: give a unit's weights back after its forward, and gather them again.")
    ] = True,
    budget: Annotated[
        str | None,
        typer.Option(help="A size, or a percentage of the GPU's memory.", show_default="all that is usable"),
    ] = None,
    levers: Levers = "",
    host_budget: HostBudget = None,
    most: Annotated[
        str | None,
        typer.Option("--max", help="A size: exit status 1 if the step takes more. A guard for CI."),
    ] = None,
    guarded: Annotated[
        str, typer.Option("--max-of", help="Whose bytes --max judges: tightfit, every-block or none (no plan).")
    ] = "tightfit",
    lengths: Annotated[
        Path | None, typer.Option(help="Lengths of the examples: a histogram, a list, or JSON lines; sets --seq.")
    ] = None,
    search: Annotated[bool, typer.Option(help="Look for the largest batch and the longest sequence.")] = True,
    calibrate: Annotated[
        Path | None, typer.Option(help="Measure this machine's device, write it as a catalog file, and stop.")
    ] = None,
    device: Annotated[str, typer.Option(help="What --calibrate measures: cpu or the card.")] = HOST_KIND,
    calibration: Calibration = None,
    html: Html = None,
    site: Annotated[
        Path | None,
        typer.Option(
            help="A folder: write the page of models by method by length by card there, or add MODEL to it.",
            show_default="no site",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Will it run on --gpu? Needs neither the GPU nor the weights."""
    can_write({"--calibrate": calibrate, "--html": html})
    if site is not None:
        refuse_beside_site({
            "--html": html, "--max": most, "--lengths": lengths, "--levers": levers, "--budget": budget,
            "--calibrate": calibrate, "--global-batch": global_batch, "--world-size": world_size != 1,
            "--strategy": strategy != "one", "--batch auto": batch.strip().lower() == AUTO,
            "--host-budget": host_budget,
        })  # fmt: skip
        write_site(
            site, as_json=as_json, model=model, method=method, seq=seq, gpu=gpu, batch=batch, dtype=dtype,
            optimizer=optimizer, rank=rank, trainer=trainer, accumulate=accumulate,
        )  # fmt: skip
        return
    if calibrate is None:
        if model is None:
            raise InvalidInput("say which model: tightfit check MODEL; without one, --site OUT asks about all of them")
        require_model(model)
    from tightfit import forecast
    from tightfit.report import MODES, forecast_document, forecast_report, forecast_table, gpus_table, study

    if calibrate is not None:
        from tightfit.accelerator import device_named
        from tightfit.core import write_text

        write_text(calibrate, forecast.catalog_entry(forecast.calibrate(device_named(device)), forecast.HERE))
        emit(f"{calibrate}: use it with TIGHTFIT_CATALOG={calibrate} and --gpu here")
        return
    allowed, most_waiting = parse_levers(levers), parse_host_budget(host_budget)
    size, several = batches_asked(batch, global_batch)
    told: tuple[str, ...] = ()
    if lengths is not None:
        seq, line = forecast.longest_length(lengths)
        told = (line,)
    warnings.simplefilter("ignore")  # what libraries say about themselves is not about what was asked
    assert model is not None
    if seq is None:
        seq = forecast.default_length(model)
    setup = forecast.Setup(
        model=model, method=method or "full", batch=size, seq=seq, dtype=dtype, optimizer=optimizer, rank=rank,
        accumulate=accumulate, world_size=world_size, strategy=strategy, reshard=reshard, trainer=trainer,
    ).checked()  # fmt: skip
    if gpu is None:
        gpu = "rtx-4090" if calibration in (None, NO_FILE) else forecast.HERE
    if guarded not in MODES:
        raise unknown("--max-of", guarded, MODES)
    if most is None and guarded != "tightfit":
        raise InvalidInput("--max-of says whose bytes --max judges: give --max too")
    if most is not None:
        most_bytes = parse_bytes(most)
        if gpu.strip().lower() == "all":
            raise InvalidInput("--max is about one device: give it with one --gpu")
        if budget is not None and guarded == "tightfit":
            raise InvalidInput("--max is the budget of the plan that it judges: leave --budget out, or say --max-of")
    if gpu.strip().lower() == "all":
        if several is not None:
            raise InvalidInput(
                "--batch auto has each card run another step, and --gpu all compares cards by one: give --batch a "
                "number, or one --gpu"
            )
        with progress_shown() as say:
            answers = forecast.which_gpus(setup, budget=budget, levers=allowed, progress=say, host_budget=most_waiting)
        answers = [dataclasses.replace(a, notes=(*told, *a.notes)) for a in answers]
        if as_json:
            emit(json.dumps({**forecast_report(answers[0]), "gpus": [forecast_report(a) for a in answers]}))
        else:
            console_on_stdout().print(gpus_table(answers))
        if not any(answer.fits for answer in answers):
            raise typer.Exit(EXIT_NO)
        return
    target = forecast.device_asked(gpu)
    if most is not None and guarded == "tightfit":
        budget = str(max(1, min(most_bytes, forecast.usable_bytes(target))))  # a device without room says so
    traces: list[Trace] = []
    with progress_shown() as say:
        asked: dict[str, Any] = {
            "budget": budget, "search": search, "levers": allowed, "progress": say, "traced": traces.append,
            "host_budget": most_waiting,
        }  # fmt: skip
        if several is None:
            answer = forecast.check(setup, target, **asked)
        else:
            answer = forecast.check_micro_batches(setup, target, several, **asked)
        answer = dataclasses.replace(answer, notes=(*told, *answer.notes))
        if html is not None:
            say("planning for other budgets too, for the page")
            write_page(html, forecast_document(answer, study(traces[0], answer.plan)))
    guard = None
    if most is not None:
        taken = next(mode.reserved_bytes for mode in answer.modes if mode.mode == guarded)
        guard = {"max_bytes": most_bytes, "mode": guarded, "reserved_bytes": taken, "within": taken <= most_bytes}
    if as_json:
        emit(json.dumps({**forecast_report(answer), "max": guard}))
    else:
        console_on_stdout().print(forecast_table(answer), crop=False)  # a command may be wider than the terminal
        if guard is not None:
            said = "within" if guard["within"] else "more than"
            found, limit = format_apart(taken, most_bytes)
            emit(f"--max: {MODES[guarded]} takes {found}, {said} {limit}")
    if not (answer.fits if guard is None or guarded == "tightfit" else guard["within"]):
        raise typer.Exit(EXIT_NO)
