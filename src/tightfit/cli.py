"""The command line: arguments in, text or one JSON document out. What the commands do is elsewhere.

Results go to stdout, progress and the one line of an error to stderr. Invariant: exit 0 means yes, 1 means that the
answer is no (does not fit, a proof failed), 2 means wrong input, 130 means interrupted; a traceback only ever comes
with `--debug`. Nothing heavy is imported before a command needs it, so `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from tightfit import stdout
from tightfit.core import (
    BudgetInfeasible,
    InvalidInput,
    PlanMismatch,
    ReplayDiverged,
    TightfitError,
    Unsupported,
    format_bytes,
    output_file,
    parse_bytes,
    parse_levers,
    percentage,
    refused_bytes,
)

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import nn

    from tightfit.core import Trace

__all__ = ["app", "main"]

# the profiler, which counts bytes on the CPU, otherwise prints USDT lines on stderr (5 is not enough); read when
# torch is loaded
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

EXIT_NO, EXIT_WRONG_INPUT, EXIT_INTERRUPTED = 1, 2, 130

#: The extra that brings a package which the base install leaves out, by the name that is imported.
EXTRAS = {
    "transformers": "transformers", "tokenizers": "transformers", "accelerate": "transformers", "tqdm": "transformers",
    "peft": "peft", "trl": "trl", "datasets": "trl", "pyarrow": "trl", "yaml": "trl",
    "bitsandbytes": "bitsandbytes", "matplotlib": "png",
}  # fmt: skip

# advice that they log on import and load is not about what was asked here
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

app = typer.Typer(
    name="tightfit",
    help="Fit a PyTorch training step into a byte budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class _Command(TyperCommand):
    """A command whose libraries print to stderr; its own result goes to `stdout.results()`."""

    def invoke(self, ctx: Any) -> Any:
        with stdout.for_libraries():
            return super().invoke(ctx)


# ----------------------------------------------------------------------------------------------- options

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A name in the catalog, a folder with config.json, or a hub id owner/name."),
]
Batch = Annotated[int, typer.Option(help="Sequences in a batch.")]
Seq = Annotated[int, typer.Option(help="Tokens in a sequence.")]
Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Method = Annotated[str, typer.Option(help="full or lora.")]
OptimizerName = Annotated[str, typer.Option("--optimizer", help="adamw, adamw8bit, sgd or none.")]
Budget = Annotated[str, typer.Option(help="A size (22GiB), or a percentage of the unplanned step's peak.")]
Levers = Annotated[
    str,
    typer.Option(
        help="What the plan may use: recompute, loss_in_place, tile, nest, offload; all; all,-tile for all but one.",
        show_default="all that give the same bits, tiles where nothing else fits; no offload",
    ),
]
Seed = Annotated[int, typer.Option(help="For weights, data and dropout.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Html = Annotated[
    Path | None, typer.Option("--html", help="Also write one self-contained page there.", show_default="no page")
]


def _version(wanted: bool) -> None:
    if wanted:
        from tightfit import __version__

        typer.echo(f"tightfit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Fit a PyTorch training step into a byte budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A model in training mode with its batch and optimizer, ready for a step."""

    model: nn.Module
    origin: str  # where the weights are from
    batch: dict[str, torch.Tensor]
    optimizer: torch.optim.Optimizer | None


def _prepare(
    name: str, *, batch: int, seq: int, dtype: str, device: str, method: str, optimizer: str, budget: str, seed: int
) -> _Prepared:
    """Build what `measure` and `plan` work on. Raises `InvalidInput` before anything large is made, where it can."""
    parse_bytes(budget, whole_bytes=2**40)  # what it is a percentage of is known later, its form is not
    if method not in ("full", "lora"):
        raise InvalidInput(f"unknown method {method!r}: use full or lora")
    if optimizer not in ("adamw", "adamw8bit", "sgd", "none"):
        raise InvalidInput(f"unknown optimizer {optimizer!r}: use adamw, adamw8bit, sgd or none")
    if not 0 <= seed < 2**32:
        raise InvalidInput(f"expected a seed from 0 to {2**32 - 1}, not {seed}")
    for option, value, least in (("--batch", batch, 1), ("--seq", seq, 2)):
        if value < least:
            raise InvalidInput(f"expected {option} of at least {least}, not {value}")
    from tightfit.integrations.transformers import (
        config_named,
        device_named,
        dtype_named,
        load_model,
        random_batch,
        require_memory,
    )

    made: Any
    kind, where = dtype_named(dtype), device_named(device)
    require_memory(config_named(name), batch, seq, dtype=kind, device=where)
    made, origin = load_model(name, dtype=kind, device=where, seed=seed)
    tokens = random_batch(made, batch, seq, seed)
    if method == "lora":
        from tightfit.integrations.peft import add_lora

        made = add_lora(made)
    return _Prepared(model=made, origin=origin, batch=tokens, optimizer=_optimizer(made, optimizer))


def _optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer | None:
    """The optimizer called `name` over the trainable parameters. Its learning rate changes no bytes."""
    import torch

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(trainable, lr=1e-5)
    if name == "sgd":
        return torch.optim.SGD(trainable, lr=1e-5)
    if name == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise Unsupported(
                f"adamw8bit needs the package bitsandbytes ({error}): pip install 'tightfit[bitsandbytes]'"
            ) from None
        made: torch.optim.Optimizer = AdamW8bit(trainable, lr=1e-5)
        return made
    return None


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _stdout() -> Console:
    from rich.console import Console

    return Console(file=stdout.results(), highlight=False)


def _emit(text: str) -> None:
    """A line of the result."""
    typer.echo(text, file=stdout.results())


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A function that says on stderr what is being done: a live line on a terminal, plain lines elsewhere."""
    console = _stderr()
    if not console.is_terminal:
        yield lambda what: console.print(f"{what} ...", highlight=False)
        return
    with console.status("starting") as status:
        yield lambda what: status.update(f"{what} ...")


# ---------------------------------------------------------------------------------------------- commands


@app.command(cls=_Command)
def measure(
    model: Model,
    batch: Batch = 4,
    seq: Seq = 512,
    dtype: Dtype = "fp32",
    device: Device = "cpu",
    method: Method = "full",
    optimizer: OptimizerName = "adamw",
    budget: Budget = "60%",
    levers: Levers = "",
    repeats: Annotated[int, typer.Option(help="Timed steps of each, interleaved.", min=1)] = 3,
    seed: Seed = 0,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Real steps side by side: no checkpointing, every block, tightfit at --budget."""
    _can_write({"--html": html})
    allowed = parse_levers(levers)
    prepared = _prepare(
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
    from tightfit.measure import measure as run_measure
    from tightfit.report import measurement_document, measurement_report, measurement_table, study

    traces: list[Trace] = []
    with _progress() as say:
        measured = run_measure(
            prepared.model,
            prepared.batch,
            budget=budget,
            levers=allowed,
            optimizer=prepared.optimizer,
            repeats=repeats,
            progress=say,
            described={"model": model, "method": method, "batch": batch, "seq": seq, "dtype": dtype},
            traced=traces.append,
        )
        if html is not None:
            say("planning for other budgets too, for the page")
            _write_page(html, measurement_document(measured, study(traces[0], measured.plan)))
    _say_if_above_all(budget)
    if as_json:
        _emit(json.dumps(measurement_report(measured)))
    else:
        _stdout().print(measurement_table(measured))
    if any(row.gradients == "differs" for row in measured.rows):
        raise typer.Exit(EXIT_NO)


@app.command(cls=_Command)
def check(
    model: Model,
    gpu: Annotated[str, typer.Option(help="A GPU of the catalog (rtx-4090), a size (24GiB), or all.")] = "rtx-4090",
    method: Annotated[str, typer.Option(help="full, lora or qlora.")] = "full",
    batch: Annotated[int, typer.Option(help="Sequences in a batch.")] = 1,
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
            help="Whose step: model (its own loss, as transformers' Trainer takes it), or sft (TRL's, as installed)."
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
    lengths: Annotated[
        Path | None, typer.Option(help="Lengths of the examples: a histogram, a list, or JSON lines; sets --seq.")
    ] = None,
    search: Annotated[bool, typer.Option(help="Look for the largest batch and the longest sequence.")] = True,
    calibrate: Annotated[
        Path | None, typer.Option(help="Measure this machine's device, write it as a catalog file, and stop.")
    ] = None,
    device: Annotated[str, typer.Option(help="What --calibrate measures: cpu or cuda.")] = "cpu",
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Will it run on --gpu? Needs neither the GPU nor the weights."""
    _can_write({"--calibrate": calibrate, "--html": html})
    from tightfit import forecast
    from tightfit.report import forecast_document, forecast_report, forecast_table, gpus_table, study

    if calibrate is not None:
        from tightfit.core import write_text
        from tightfit.integrations.transformers import device_named

        text = forecast.calibrated("here", device_named(device))
        write_text(calibrate, text)
        _emit(f"{calibrate}: use it with TIGHTFIT_CATALOG={calibrate} and --gpu here")
        return
    told: tuple[str, ...] = ()
    if lengths is not None:
        seq, line = forecast.longest_length(lengths)
        told = (line,)
    warnings.simplefilter("ignore")  # what libraries say about themselves is not about what was asked
    if seq is None:
        seq = forecast.default_length(model)
    setup = forecast.Setup(
        model=model, method=method, batch=batch, seq=seq, dtype=dtype, optimizer=optimizer, rank=rank,
        accumulate=accumulate, world_size=world_size, strategy=strategy, reshard=reshard, trainer=trainer,
    ).checked()  # fmt: skip
    if gpu.strip().lower() == "all":
        with _progress() as say:
            answers = forecast.which_gpus(setup, budget=budget, progress=say)
        answers = [dataclasses.replace(a, notes=(*told, *a.notes)) for a in answers]
        if as_json:
            _emit(json.dumps({**forecast_report(answers[0]), "gpus": [forecast_report(a) for a in answers]}))
        else:
            _stdout().print(gpus_table(answers))
        if not any(answer.fits for answer in answers):
            raise typer.Exit(EXIT_NO)
        return
    target = forecast.device_asked(gpu)
    traces: list[Trace] = []
    with _progress() as say:
        answer = forecast.check(setup, target, budget=budget, search=search, progress=say, traced=traces.append)
        answer = dataclasses.replace(answer, notes=(*told, *answer.notes))
        if html is not None:
            say("planning for other budgets too, for the page")
            _write_page(html, forecast_document(answer, study(traces[0], answer.plan)))
    if as_json:
        _emit(json.dumps(forecast_report(answer)))
    else:
        _stdout().print(forecast_table(answer))
    if not answer.fits:
        raise typer.Exit(EXIT_NO)


@app.command(cls=_Command)
def plan(
    model: Model,
    batch: Batch = 4,
    seq: Seq = 512,
    dtype: Dtype = "fp32",
    device: Device = "cpu",
    method: Method = "full",
    optimizer: OptimizerName = "adamw",
    budget: Budget = "60%",
    levers: Levers = "",
    seed: Seed = 0,
    explain: Annotated[bool, typer.Option("--explain", help="Show the plan unit by unit, and why.")] = False,
    out: Annotated[Path, typer.Option(help="Where to write the plan.")] = Path("plan.json"),
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
    _can_write({"--out": out, "--html": html, "--chrome": chrome, "--snapshot": snapshot})
    allowed = parse_levers(levers)
    prepared = _prepare(
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
    from tightfit.plan import plan as make_plan
    from tightfit.report import chrome_trace, memory_snapshot, plan_document, plan_report, study
    from tightfit.report import explain as explained
    from tightfit.trace import trace

    with _progress() as say:
        say("tracing one step")
        recorded = trace(prepared.model, prepared.batch, optimizer=prepared.optimizer)
        say("planning")
        made = make_plan(recorded, budget, levers=allowed)
        if html is not None:
            say("planning for other budgets too, for the page")
            _write_page(html, plan_document(made, model, study(recorded, made)))
    if chrome is not None:
        from tightfit.core import write_text
        from tightfit.plan import simulate

        write_text(chrome, json.dumps(chrome_trace(simulate(recorded, made))))
    if snapshot is not None:
        from tightfit.core import write_bytes

        write_bytes(snapshot, memory_snapshot(recorded, made))
    made.save(out)
    _say_if_above_all(budget)
    if as_json:
        _emit(json.dumps({"path": str(out), **plan_report(made)}))
        return
    if explain:
        _stdout().print(explained(recorded, made))
    _emit(
        f"{out}: {made.status.value}, peak {format_bytes(made.peak_bytes)} of a budget of "
        f"{format_bytes(made.budget_bytes)}, {made.replays} units replayed"
    )


@app.command(cls=_Command, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
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
    batch: Annotated[int | None, typer.Option(help="Sequences in a batch.", show_default="8, or the config's")] = None,
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
    seed: Annotated[
        int | None, typer.Option(help="For weights, data and dropout.", show_default="0, or the config's")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cpu, or the config's")] = None,
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
    as_json: Json = False,
) -> None:
    """Fine-tune with TRL inside --budget and leave the evidence in a run folder. Takes TRL's SFT options too."""
    from tightfit import train as training

    options = training.TrainOptions(
        config=config,
        model=model,
        data=data,
        method=method,
        batch=batch,
        seq=seq,
        steps=steps,
        lr=lr,
        budget=budget,
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
        arguments=tuple(context.args),
    )
    result = training.train(options, _stderr())
    _say_if_above_all(str(result.options.budget))
    if as_json:
        _emit(json.dumps(training.to_report(result)))
    else:
        _stdout().print(training.summary(result))
    if result.status == "interrupted":
        raise typer.Exit(EXIT_INTERRUPTED)
    if not result.passed:
        raise typer.Exit(EXIT_NO)


@app.command(cls=_Command)
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder that `tightfit train` left.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the page.", show_default="RUN/report.html")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write a summary for issues there.")] = None,
    png: Annotated[Path | None, typer.Option(help="Also draw timeline and curve there; needs matplotlib.")] = None,
    as_json: Json = False,
) -> None:
    """One self-contained HTML page of a run."""
    from tightfit.report import draw, markdown_of, run_document, run_table

    document = run_document(run)
    target = out or run / "report.html"
    _can_write({"--out": target, "--markdown": markdown, "--png": png})
    _write_page(target, document)
    if markdown is not None:
        from tightfit.core import write_text

        write_text(markdown, markdown_of(document))
    if png is not None:
        draw(document, png)
    if as_json:
        _emit(json.dumps({"path": str(target), **{k: v for k, v in document.items() if k != "study"}}))
    else:
        _stdout().print(run_table(document))
        _emit(f"{target}")
    if not document["good"]:
        raise typer.Exit(EXIT_NO)


def _can_write(outputs: dict[str, Path | None]) -> None:
    """Raise `InvalidInput` unless each path, by the option that names it, can be written and no two are one file."""
    taken: dict[Path, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        try:
            target = output_file(path)
        except InvalidInput as error:
            raise InvalidInput(f"{error}; give a file in a folder that exists as {option}") from None
        if target in taken:
            raise InvalidInput(f"{taken[target]} and {option} are one file, {str(target)!r}: give each its own")
        taken[target] = option


def _say_if_above_all(budget: str) -> None:
    percent = percentage(budget)
    if percent is not None and percent > 100:
        _say(f"a budget of {budget} is above the peak of the step without a plan, so nothing has to be recomputed")


def _write_page(path: Path, document: dict[str, Any]) -> None:
    from tightfit.core import write_text
    from tightfit.report import page

    write_text(path, page(document))


@app.command(cls=_Command)
def doctor(
    asked: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A model as for check, or the YAML of a TRL, transformers or accelerate run.",
            show_default="the stack alone",
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(help="full, lora or qlora.", show_default="the run's, or full")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences in a batch.", show_default="the run's, or 1")] = None,
    seq: Annotated[
        int | None,
        typer.Option(help="Tokens in a sequence.", show_default="the run's, or 2048 or the model's positions"),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="As for check.", show_default="the run's, or bf16")] = None,
    optimizer: Annotated[str | None, typer.Option(help="As for check.", show_default="the run's, or adamw")] = None,
    rank: Annotated[int | None, typer.Option(help="Of the LoRA adapters.", show_default="the run's, or 16")] = None,
    kernels: Annotated[
        str | None,
        typer.Option(help="Whose the step's kernels are: cuda or cpu.", show_default="cuda, or cpu with use_cpu"),
    ] = None,
    trainer: Annotated[
        str | None, typer.Option(help="How a YAML is read: sft, dpo or transformers.", show_default="by its keys")
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Also run the probes that take longer than seconds.")] = False,
    as_json: Json = False,
) -> None:
    """The environment record, the known traps with evidence and mend, and why checkpointing does not save more.

    Every trap is probed on the installed versions. For a model or a run it is also said whether the trap bites there
    (exit status 1 if one does), who owns the peak of its step, and the cheapest fix, simulated.
    """
    from tightfit import doctor as consultation
    from tightfit.report import doctor_table

    if kernels not in (None, "cpu", "cuda"):
        raise InvalidInput(f"unknown --kernels {kernels!r}: use cuda or cpu")
    changed = {
        "method": method, "batch": batch, "seq": seq, "dtype": dtype, "optimizer": optimizer, "rank": rank,
    }  # fmt: skip
    if asked is None:
        given = [
            name for name, value in {**changed, "kernels": kernels, "trainer": trainer}.items() if value is not None
        ]
        if given:
            raise InvalidInput(f"--{given[0]} is about a step, but no MODEL or YAML was given")
    record = _environment_record()
    with _progress() as say, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries say about themselves is not about what was asked
        case = None if asked is None else consultation.case_of(asked, trainer=trainer, **changed)
        peak = None
        if case is not None and case.setup is not None:
            case, peak = consultation.peak_of(case, kernels=kernels, progress=say)
        run, setup = (case.run, case.setup) if case is not None else (None, None)
        if case is None and not sys.stderr.isatty():  # seconds of work: nothing to say in a pipe
            say = _nothing
        found = consultation.findings(run=run, peak=peak, setup=setup, deep=deep, progress=say)
    report = consultation.document(case, found, peak, deep=deep)
    if as_json:
        _emit(json.dumps({**record, **report}))
    else:
        width = max(len(name) for name in record)
        for name, value in record.items():
            _emit(f"{name:<{width}}  {'not installed' if value is None else value}")
        _stdout().print(doctor_table(report))
    if case is not None and report["bites"]:
        raise typer.Exit(EXIT_NO)


def _nothing(_: str) -> None:
    """Progress that is not shown."""


def _environment_record() -> dict[str, str | None]:
    """Versions of everything tightfit works with (`None`: not installed), and the machine."""
    from tightfit import __version__
    from tightfit.step import environment

    found = environment()
    packages = (
        "tightfit", "torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "safetensors", "highspy",
    )  # fmt: skip
    record: dict[str, str | None] = {package: found.pop(package, None) for package in packages}
    record["tightfit"] = __version__
    found.setdefault("cuda_devices", "none")
    return {**record, **found}


# -------------------------------------------------------------------------------------------------- main


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. Errors are one line on stderr."""
    asked = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with stdout.own():
            return _run(asked)
    except BrokenPipeError:  # the reader of the result (`| head`) has gone
        return EXIT_NO
    except stdout.NotWritten as error:
        _say(f"cannot write the result: {error}")
        return EXIT_NO


def _run(asked: list[str]) -> int:
    debug = "--debug" in asked
    given = [argument for argument in asked if argument != "--debug"]  # so that it may stand after the command too
    try:
        code = typer.main.get_command(app).main(args=given, prog_name="tightfit", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except _USAGE_ERROR as error:
        if debug:
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(error.format_message())
        else:
            _say(error.format_message())
        return EXIT_WRONG_INPUT
    except TightfitError as error:
        _tell_launcher(error)
        if debug:
            raise
        _say(str(error))
        return exit_code(error)
    except (KeyboardInterrupt, typer.Abort):
        if debug:
            raise
        _say("interrupted")
        return EXIT_INTERRUPTED
    except (BrokenPipeError, stdout.NotWritten):
        raise
    except Exception as error:
        _tell_launcher(error)
        if debug:
            raise
        if isinstance(error, ModuleNotFoundError) and (lacking := _lacking(error, given)):
            _say(lacking)
            return EXIT_WRONG_INPUT
        if (asked_bytes := refused_bytes(error)) is not None:
            from tightfit.step import host_memory_bytes

            has = host_memory_bytes()
            _say(
                f"{format_bytes(asked_bytes)} at once were asked for, and this machine did not give them"
                + (f" (it has {format_bytes(has)} in all)" if has is not None else "")
                + ": use a smaller --batch, --seq or model"
            )
            return EXIT_NO
        _say(f"{type(error).__name__}: {error} (run again with --debug to see where)")
        return EXIT_NO


def _lacking(error: ModuleNotFoundError, given: list[str]) -> str:
    """What to install where a package of an extra is not there; empty where it is none of those."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS or importlib.util.find_spec(package) is not None:  # it is there, and a part of it is not
        return ""
    command = next((word for word in given if not word.startswith("-")), "")
    extra = "trl" if command == "train" else EXTRAS[package]  # train needs all of them, so that one install will do
    return f"tightfit {command} needs the package {package}, which is not installed: pip install 'tightfit[{extra}]'"


def _tell_launcher(error: Exception) -> None:
    """Where torchrun started this process: the first cause, which it shows beside the rank's number."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    handler.initialize()
    handler.record_exception(error)


# typer brings its own copy of click since 0.20 or so: whichever it is, the base of its usage errors
_USAGE_ERROR: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def exit_code(error: TightfitError) -> int:
    """1 when the answer is no, 2 when the question was wrong."""
    if isinstance(error, (BudgetInfeasible, ReplayDiverged)):
        return EXIT_NO
    if isinstance(error, (InvalidInput, Unsupported, PlanMismatch)):
        return EXIT_WRONG_INPUT
    return EXIT_NO


def _say(message: str) -> None:
    line = " ".join(message.split())
    with contextlib.suppress(OSError):  # nobody reads standard error, or its disk is full: the exit status still tells
        typer.echo(f"tightfit: {line}", err=True)


if __name__ == "__main__":
    sys.exit(main())
