"""`tightfit report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tightfit.cli.options import Json
from tightfit.cli.output import EXIT_NO, can_write, console_on_stdout, emit, write_page


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
    can_write({"--out": target, "--markdown": markdown, "--png": png})
    write_page(target, document)
    if markdown is not None:
        from tightfit.core import write_text

        write_text(markdown, markdown_of(document))
    if png is not None:
        draw(document, png)
    if as_json:
        emit(json.dumps({"path": str(target), **{k: v for k, v in document.items() if k != "study"}}))
    else:
        console_on_stdout().print(run_table(document))
        emit(f"{target}")
    if not document["good"]:
        raise typer.Exit(EXIT_NO)
