"""The command line: arguments in, text or one JSON document out. What the commands do is elsewhere.

One module for each command; `options` has the options that several share, `output` where results and progress go,
`program` the exit codes and the one line of an error.

Invariant: exit 0 means yes, 1 means that the answer is no (does not fit, a proof failed), 2 means wrong input, 130
means interrupted. A traceback only ever comes with `--debug`. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

from tightfit.cli.program import app, main

__all__ = ["app", "main"]
