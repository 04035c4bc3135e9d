"""`tightfit calibrate`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from tightfit.cli.options import Json
from tightfit.cli.output import can_write, console_on_stdout, emit, progress_shown
from tightfit.core import InvalidInput, to_json
from tightfit.device.calibration import path_of


def calibrate(
    device: Annotated[
        str | None,
        typer.Option(help="cpu, or the card: cuda (AMD's too), xpu, mps.", show_default="the card, or cpu without one"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write the device file.", show_default="where check and plan find it")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure this machine's device in less than a minute, for check, plan, fit and doctor to reckon with.

    Memory that can be used, what libraries keep for matrix products, the rates of matrix products, of moving bytes and
    of copies, the launch of an op, the allocator's settings. Let nothing else run meanwhile.
    """
    can_write({"--out": out})
    from tightfit import accelerator, forecast

    where = accelerator.current() if device is None else accelerator.device_named(device)
    path = path_of(accelerator.model_of(where)) if out is None else out
    if out is None:  # before anything is measured; `save` makes the folders that are not there
        there = next(each for each in path.parents if each.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise InvalidInput(f"cannot write to {str(path)!r}: {str(there)!r} is not yours to write; give --out")
    with progress_shown() as say:
        made = forecast.calibrate(where, progress=say)
    made.save(path)
    if as_json:
        emit(json.dumps({"path": str(path), **to_json(made)}))
        return
    from tightfit.report import calibration_table

    console_on_stdout().print(calibration_table(made))
    emit(
        f"{path}: check, plan, fit and doctor reckon with it" + ("" if out is None else f" given --calibration {path}")
    )
