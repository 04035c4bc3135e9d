"""The command line: arguments in, text or one JSON document out. What the commands do is elsewhere.

Results go to stdout, progress and the one line of an error to stderr. Invariant: exit 0 means yes, 1 means that the
answer is no (does not fit, a proof failed), 2 means wrong input, 130 means interrupted; a traceback only ever comes
with `--debug`. Nothing heavy is imported before a command needs it, so `--help` answers at once.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from tightfit.cli import stdout
from tightfit.cli.calibrate import calibrate
from tightfit.cli.check import check
from tightfit.cli.doctor import doctor
from tightfit.cli.measure import measure
from tightfit.cli.output import EXIT_INTERRUPTED, EXIT_NO, EXIT_WRONG_INPUT, Command, emit, say_on_stderr
from tightfit.cli.plan import plan
from tightfit.cli.report import report
from tightfit.cli.train import train
from tightfit.core import (
    BudgetInfeasible,
    Interrupts,
    InvalidInput,
    PlanMismatch,
    ReplayDiverged,
    TightfitError,
    Unsupported,
    format_bytes,
    refused_bytes,
)

#: The extra that brings a package which the base install leaves out, by the name that is imported.
EXTRAS = {
    "transformers": "transformers", "tokenizers": "transformers", "accelerate": "transformers", "tqdm": "transformers",
    "peft": "peft", "trl": "trl", "datasets": "trl", "pyarrow": "trl", "yaml": "trl",
    "bitsandbytes": "bitsandbytes", "matplotlib": "png",
}  # fmt: skip


# The profiler, which counts bytes on the CPU, otherwise prints USDT lines on stderr (5 is not enough). It is read when
# torch is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
# The allocator warns that the profiler will not see the end of blocks from before it, which the counts allow for.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# Advice that these log on import and load is not about what was asked here.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


app = typer.Typer(
    name="tightfit",
    help="Fit a PyTorch training step into a byte budget.",
    epilog=(
        "Try: tightfit check llama-2-7b --gpu rtx-4090 --method qlora (will it fit?); tightfit train --budget 60% (a "
        "small model, in a minute or two); tightfit doctor (what is wrong in this stack?)"
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


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


# in the order of --help
for _command in (measure, check, plan, train, report, doctor, calibrate):
    # train reads the options that it does not know as TRL's
    _others = {"allow_extra_args": True, "ignore_unknown_options": True} if _command is train else {}
    app.command(cls=Command, context_settings=_others)(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. Errors are one line on stderr."""
    asked = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with stdout.own():
            return _run(asked)
    except BrokenPipeError:  # the reader of the result (`| head`) has gone
        return EXIT_NO
    except stdout.NotWritten as error:
        say_on_stderr(f"cannot write the result: {error}")
        return EXIT_NO


def _run(asked: list[str]) -> int:
    debug = "--debug" in asked
    given = [argument for argument in asked if argument != "--debug"]  # so that it may stand after the command too
    try:
        with Interrupts():
            code = typer.main.get_command(app).main(args=given, prog_name="tightfit", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except _USAGE_ERROR as error:
        if debug:
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(error.format_message())
        else:
            say_on_stderr(error.format_message())
        return EXIT_WRONG_INPUT
    except TightfitError as error:
        _tell_launcher(error)
        if debug:
            raise
        say_on_stderr(_by_options(str(error)))
        if isinstance(error, BudgetInfeasible) and "--json" in given:  # the answer is no, and it has its figures
            emit(json.dumps({
                "fits": False, "budget_bytes": error.budget_bytes, "least_bytes": error.least_bytes,
                "advice": [_by_options(each) for each in error.advice],
                **({} if error.host_budget_bytes is None else {
                    "host_budget_bytes": error.host_budget_bytes, "host_bytes": error.host_bytes,
                }),
            }))  # fmt: skip
        return exit_code(error)
    except (KeyboardInterrupt, typer.Abort):
        if debug:
            raise
        say_on_stderr("interrupted")
        return EXIT_INTERRUPTED
    except (BrokenPipeError, stdout.NotWritten):
        raise
    except Exception as error:
        _tell_launcher(error)
        if debug:
            raise
        if isinstance(error, ModuleNotFoundError) and (lacking := _lacking(error, given)):
            say_on_stderr(lacking)
            return EXIT_WRONG_INPUT
        if (asked_bytes := refused_bytes(error)) is not None:
            from tightfit.accelerator import host_memory_bytes

            has = host_memory_bytes()
            say_on_stderr(
                f"{format_bytes(asked_bytes)} at once were asked for, and this machine did not give them"
                + (f" (it has {format_bytes(has)} in all)" if has is not None else "")
                + ": use a smaller --batch, --seq or model"
            )
            return EXIT_NO
        say_on_stderr(f"{type(error).__name__}: {error} (run again with --debug to see where)")
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


def _by_options(line: str) -> str:
    """What a message says in Python's words, in the command line's: it has no `beside`."""

    def levers(found: re.Match[str]) -> str:
        from tightfit.levers import allowed

        return "--levers " + ",".join([*(each.lever.value for each in allowed(None)), found[1]])

    return re.sub(r"\bbeside='([a-z_,]+)'", levers, line)


def exit_code(error: TightfitError) -> int:
    """1 when the answer is no, 2 when the question was wrong."""
    if isinstance(error, (BudgetInfeasible, ReplayDiverged)):
        return EXIT_NO
    if isinstance(error, (InvalidInput, Unsupported, PlanMismatch)):
        return EXIT_WRONG_INPUT
    return EXIT_NO
