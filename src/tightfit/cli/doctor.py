"""`tightfit doctor`."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from tightfit.catalog import require_model
from tightfit.cli.options import Calibration, Json
from tightfit.cli.output import EXIT_NO, console_on_stdout, emit, progress_shown, progress_unsaid
from tightfit.core import (
    InvalidInput,
)
from tightfit.core.errors import unknown

#: Endings of what is a run's settings or its script, and no model.
_FILES = (".yaml", ".yml", ".json", ".py")


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
    calibration: Calibration = None,
    deep: Annotated[bool, typer.Option("--deep", help="Also run the probes that take longer than seconds.")] = False,
    as_json: Json = False,
) -> None:
    """The environment record, the known traps with evidence and mend, and why checkpointing does not save more.

    Every trap is probed on the installed versions. For a model or a run it is also said whether the trap bites there
    (exit status 1 if one does), who owns the peak of its step, and the cheapest fix, simulated.
    """
    if asked is not None and Path(asked).suffix.lower() not in _FILES:
        require_model(asked)
    from tightfit import doctor as consultation
    from tightfit.report import doctor_table

    kinds = ("cuda", "cpu")
    if kernels is not None and kernels not in kinds:
        raise unknown("--kernels", kernels, kinds)
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
    with progress_shown() as say, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries say about themselves is not about what was asked
        case = None if asked is None else consultation.case_of(asked, trainer=trainer, **changed)
        peak = None
        if case is not None and case.setup is not None:
            case, peak = consultation.peak_of(case, kernels=kernels, progress=say)
        run, setup = (case.run, case.setup) if case is not None else (None, None)
        if case is None and not sys.stderr.isatty():  # seconds of work: nothing to say in a pipe
            say = progress_unsaid
        found = consultation.findings(run=run, peak=peak, setup=setup, deep=deep, progress=say)
    report = consultation.document(case, found, peak, deep=deep)
    if as_json:
        emit(json.dumps({**record, **report}))
    else:
        width = max(len(name) for name in record)
        for name, value in record.items():
            emit(f"{name:<{width}}  {'not installed' if value is None else value}")
        console_on_stdout().print(doctor_table(report))
    if case is not None and report["bites"]:
        raise typer.Exit(EXIT_NO)


def _environment_record() -> dict[str, str | None]:
    """Versions of everything tightfit works with (`None`: not installed), and the machine."""
    from tightfit import __version__
    from tightfit.step.environment import calibration_said, environment

    found = environment()
    packages = (
        "tightfit", "torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "safetensors", "highspy",
    )  # fmt: skip
    record: dict[str, str | None] = {package: found.pop(package, None) for package in packages}
    record["tightfit"] = __version__
    found.setdefault("cuda_devices", "none")
    return {**record, **found, "calibration": calibration_said() or "none"}
