"""The errors that a user may catch. Each message says what was asked, what was found and what to do.

Invariant: every error of tightfit's own is a `TightfitError`. The command line turns each into one line and an exit
code.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from tightfit.core.formats import format_apart


class TightfitError(Exception):
    """Base of every error that tightfit raises on purpose. The message is one line for the user."""


class InvalidInput(TightfitError, ValueError):
    """What was asked cannot be understood; nothing was done."""


class Unsupported(TightfitError):
    """tightfit cannot do this without risking a wrong gradient, so it does not do it at all."""


class PlanMismatch(TightfitError):
    """The plan was made for another model; the message names the first unit that differs."""


class ReplayDiverged(TightfitError, RuntimeError):
    """A unit did something else when it was run again, so its gradient cannot be trusted."""


class BudgetInfeasible(TightfitError):
    """No plan fits the budget.

    Attributes: `budget_bytes` asked, `least_bytes` the smallest peak of any plan found, `advice` what
    would help, one sentence each with its number. `host_budget_bytes`: the most that was to wait in host memory, where
    that was limited. `host_bytes`: where it is this limit that binds, the bytes in host memory with which
    `budget_bytes` would be enough.
    """

    def __init__(
        self,
        budget_bytes: int,
        least_bytes: int,
        advice: tuple[str, ...] = (),
        *,
        host_budget_bytes: int | None = None,
        host_bytes: int | None = None,
    ) -> None:
        self.budget_bytes = budget_bytes
        self.least_bytes = least_bytes
        self.advice = advice
        self.host_budget_bytes = host_budget_bytes
        self.host_bytes = host_bytes
        budget, least = format_apart(budget_bytes, least_bytes)
        message = f"a budget of {budget} cannot hold this step: the least that is feasible is {least}"
        if host_budget_bytes is not None and host_bytes is not None:
            limit, needed = format_apart(host_budget_bytes, host_bytes)
            message = (
                f"a budget of {budget} cannot hold this step with a host budget of {limit}: the host budget is what "
                f"binds; with it the least that is feasible is {least}, and {budget} would do with {needed} in host "
                "memory; raise the host budget, or the budget"
            )
        super().__init__("; ".join((message, *advice)))


def nearly(name: object, known: Iterable[str]) -> str | None:
    """The one of `known` that `name` nearly is."""
    there = {each.lower(): each for each in known}
    close = difflib.get_close_matches(str(name).strip().lower(), there, n=1)
    return there[close[0]] if close else None


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """`; did you mean 'lora'?` to stand behind a name that is nearly one of `known`; else nothing."""
    near = nearly(name, known)
    return "" if near is None else f"; did you mean {near!r}?"


def unknown(what: str, name: object, known: Iterable[str]) -> InvalidInput:
    """The error for a name that is none of `known`."""
    names = list(known)
    return InvalidInput(f"unknown {what} {name!r}{did_you_mean(name, names)}: use {', '.join(names)}")


def reason_of(error: BaseException) -> str:
    """What `error` says, for one line: its first line, and what follows while that is only a heading ("... :")."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = next((count for count, line in enumerate(lines, start=1) if not line.endswith(":")), len(lines))
    return " ".join(lines[:said])


_REFUSED = re.compile(r"DefaultCPUAllocator: .*you tried to allocate ([0-9]+) bytes")


def refused_bytes(error: BaseException) -> int | None:
    """The bytes that torch asked the host for in vain, where that is what `error` says."""
    found = _REFUSED.search(str(error)) if isinstance(error, RuntimeError) else None
    return int(found[1]) if found else None
