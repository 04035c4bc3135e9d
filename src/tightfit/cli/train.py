"""`tightfit train`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from tightfit.cli.options import Json
from tightfit.cli.output import (
    EXIT_INTERRUPTED,
    EXIT_NO,
    console_on_stderr,
    console_on_stdout,
    emit,
    say_if_above_all,
)
from tightfit.core import parse_batch


def train(
    context: typer.Context,
    config: Annotated[
        str | None, typer.Option(help="A YAML file as TRL's sft script reads it; options given here go over it.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="As for plan.", show_default="a small model made for this, or the config's")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A text file, .jsonl, .parquet or .csv, a folder of them, or python:stdlib.",
            show_default="Python's own reference text, or the config's",
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="full, lora or qlora.", show_default="full, or the config's")
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            help="Sequences in a batch; auto: the fastest micro-batches of the global batch.",
            show_default="8, or the config's",
        ),
    ] = None,
    global_batch: Annotated[
        int | None,
        typer.Option(
            "--global-batch", help="Sequences in a step, with --batch auto.", show_default="8, or the config's"
        ),
    ] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens in a sequence.", show_default="256, or the config's")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.", show_default="130, or the config's")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.", show_default="by model and method")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="A size (22GiB), or a percentage: of the GPU's memory; on the CPU, of the unplanned peak.",
            show_default="60%, or the config's",
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option("--plan", metavar="<path>", help="A plan of this step; its budget holds.", show_default="none"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="For weights, data and dropout.", show_default="0, or the config's")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, or the card: cuda (AMD's too), xpu.", show_default="cpu, or the config's")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights: fp32, bf16 or fp16.", show_default="fp32, or the config's")
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option("--optimizer", help="adamw, adamw8bit or sgd.", show_default="adamw, or the config's"),
    ] = None,
    compare_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps also run without a budget, to compare losses and peak; 0 for none.",
            show_default="5, with a config 0",
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="The run folder.", show_default="the config's output_dir, or runs/<utc time>")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out from its last checkpoint.")
    ] = False,
    oom_retries: Annotated[
        int | None, typer.Option(help="Times that running out of memory is survived.", show_default="3")
    ] = None,
    levers: Annotated[
        str | None,
        typer.Option(
            help="What the plan may use, as for plan.", show_default="what gives the same bits; tiles if nothing fits"
        ),
    ] = None,
    host_budget: Annotated[
        str | None,
        typer.Option(
            "--host-budget",
            metavar="<bytes>",
            help="The most that plans may have wait in host memory: a size (64GiB), or 0.",
            show_default="no limit, or the config's",
        ),
    ] = None,
    spill: Annotated[
        str | None,
        typer.Option(
            metavar="<folder>",
            help="What waits off the device does so in a file in this folder.",
            show_default="host memory, or the config's",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Fine-tune with TRL inside --budget and leave the evidence in a run folder. Takes TRL's SFT options too."""
    from tightfit import train as training

    options = training.TrainOptions(
        config=config,
        model=model,
        data=data,
        method=method,
        batch=None if batch is None else parse_batch(batch),
        global_batch=global_batch,
        seq=seq,
        steps=steps,
        lr=lr,
        budget=budget,
        plan=plan,
        seed=seed,
        device=device,
        dtype=dtype,
        optimizer=optimizer,
        compare_steps=compare_steps,
        out=out,
        json=as_json,
        resume=resume,
        oom_retries=oom_retries,
        levers=levers,
        host_budget=host_budget,
        spill=spill,
        arguments=tuple(context.args),
    )
    result = training.train(options, console_on_stderr())
    if result.options.budget is not None:
        say_if_above_all(result.options.budget)
    if as_json:
        emit(json.dumps(training.to_report(result)))
    else:
        console_on_stdout().print(training.summary(result))
    if result.status == "interrupted":
        raise typer.Exit(EXIT_INTERRUPTED)
    if not result.passed:
        raise typer.Exit(EXIT_NO)
