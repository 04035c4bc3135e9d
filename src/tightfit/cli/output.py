"""Where a command writes: its result, its progress, its files; and what its exit status says.

Invariant: stdout is the result's alone (`cli.stdout`).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

from tightfit.cli import stdout
from tightfit.core import (
    InvalidInput,
    output_file,
    percentage,
)
from tightfit.device.calibration import using

if TYPE_CHECKING:
    from rich.console import Console

    from tightfit.core import Lever, Trace


EXIT_NO, EXIT_WRONG_INPUT, EXIT_INTERRUPTED = 1, 2, 130


class Command(TyperCommand):
    """A command whose libraries print to stderr; its own result goes to `stdout.results()`. Its option `calibration`
    names the device file that is in use meanwhile."""

    def invoke(self, ctx: Any) -> Any:
        with stdout.for_libraries(), using(ctx.params.get("calibration")):
            return super().invoke(ctx)


def console_on_stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def console_on_stdout() -> Console:
    from rich.console import Console

    return Console(file=stdout.results(), highlight=False)


def emit(text: str) -> None:
    """A line of the result."""
    typer.echo(text, file=stdout.results())


@contextlib.contextmanager
def progress_shown() -> Iterator[Callable[[str], None]]:
    """A function that says on stderr what is being done: a live line on a terminal, plain lines elsewhere."""
    console = console_on_stderr()
    if not console.is_terminal:
        yield lambda what: console.print(f"{what} ...", highlight=False)
        return
    with console.status("starting") as status:
        yield lambda what: status.update(f"{what} ...")


def can_write(outputs: dict[str, Path | None]) -> None:
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


def say_if_above_all(budget: str) -> None:
    percent = percentage(budget)
    if percent is not None and percent > 100:
        say_on_stderr(
            f"a budget of {budget} is above the peak of the step without a plan, so nothing has to be recomputed"
        )


def say_in_vain(trace: Trace, asked: Collection[Lever] | None) -> None:
    """A line for levers that were asked for and that the step does not allow."""
    from tightfit.levers import ruled_out

    for line in ruled_out(trace, asked):
        say_on_stderr(line)


def write_page(path: Path, document: dict[str, Any]) -> None:
    from tightfit.core import write_text
    from tightfit.report import page

    write_text(path, page(document))


def progress_unsaid(_: str) -> None:
    """Progress that is not shown."""


def say_on_stderr(message: str) -> None:
    line = " ".join(message.split())
    try:
        typer.echo(f"tightfit: {line}", err=True)
        sys.stderr.flush()
    except OSError:  # nobody reads standard error, or its disk is full: the exit status still tells
        with contextlib.suppress(OSError):  # what is left in the buffer would fail once more at exit, with status 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
