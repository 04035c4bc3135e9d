"""Options that several commands share, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tightfit.core import InvalidInput, Lever, parse_batch


def batches_asked(batch: str, global_batch: int | None) -> tuple[int, int | None]:
    """`--batch N` as N and None; `--batch auto --global-batch N` as 1, which any card may have, and N.

    Raises `InvalidInput` for one without the other.
    """
    size = parse_batch(batch)
    if not isinstance(size, str):
        if global_batch is not None:
            raise InvalidInput(
                "--global-batch is what --batch auto cuts into micro-batches: give both, or --batch alone"
            )
        return size, None
    if global_batch is None:
        raise InvalidInput("--batch auto cuts a global batch into micro-batches: say how large it is (--global-batch)")
    if global_batch < 1:
        raise InvalidInput(f"expected --global-batch of at least 1, not {global_batch}")
    return 1, global_batch


MODEL_HELP = "A name in the catalog, a folder with config.json, or a hub id owner/name."


Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]


Batch = Annotated[int, typer.Option(help="Sequences in a batch.")]


GlobalBatch = Annotated[
    int | None,
    typer.Option("--global-batch", help="Sequences in a step, with --batch auto.", show_default="none"),
]


Seq = Annotated[int, typer.Option(help="Tokens in a sequence.")]


Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]


Device = Annotated[str, typer.Option(help="cpu, or the card: cuda (AMD's too), xpu, mps.")]


Method = Annotated[str, typer.Option(help="full or lora.")]


OptimizerName = Annotated[str, typer.Option("--optimizer", help="adamw, adamw8bit, sgd or none.")]


Budget = Annotated[str, typer.Option(help="A size (22GiB), or a percentage of the unplanned step's peak.")]


Levers = Annotated[
    str,
    typer.Option(
        help=f"What the plan may use: {', '.join(lever.value for lever in Lever)}; all; all,-tile for all but one.",
        show_default="all that give the same bits, tiles where nothing else fits; no offload",
    ),
]


HostBudget = Annotated[
    str | None,
    typer.Option(
        "--host-budget",
        metavar="<bytes>",
        help="The most that the plan may have wait in host memory: a size (64GiB), or 0.",
        show_default="no limit",
    ),
]


Seed = Annotated[int, typer.Option(help="For weights, data and dropout.")]


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="<path>",
        help="A device file that tightfit calibrate wrote; none: no file.",
        show_default="the device's own, if it was calibrated",
    ),
]


Html = Annotated[
    Path | None, typer.Option("--html", help="Also write one self-contained page there.", show_default="no page")
]
