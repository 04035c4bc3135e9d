"""One module, or one package, for each lever: what a plan may do to take bytes down.

A lever is one line of `core.Lever` and the module of that name here, whose `DEFINITION` says everything about it
(`interface.LeverDefinition`): what it needs from the trace, what it offers the planner, how the referee walks it, how
the engine carries it out, how it is proven, how it is explained. Nobody else knows a lever by name.

There are two kinds. A lever of the *step* changes the step before the units are planned: it offers other tellings of
the trace (`loss_in_place`, `tile`). A lever of the *units* grants the planner one of its three mechanisms for a unit's
values (`recompute`, `nest`, `offload`).

Invariant: planning needs no torch, so a definition imports its torch side only in the methods that need it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Collection, Sequence

from tightfit.core import Lever, LeversAsked, Plan, PlanMismatch, Trace, by_name
from tightfit.levers.interface import Grant, LeverDefinition, Variant

__all__ = [
    "allowed", "as_recorded", "changes_optimizer", "defined", "every", "exact_only", "granted", "inexact",
    "not_allowed", "of_units", "require_known", "ruled_out", "used",
]  # fmt: skip


@functools.cache
def defined(lever: Lever) -> LeverDefinition:
    """The definition of `lever`: `DEFINITION` in the module that has its name."""
    found: LeverDefinition = importlib.import_module(f"{__name__}.{lever.value}").DEFINITION
    return found


def every() -> tuple[LeverDefinition, ...]:
    """All definitions, in the order of `Lever`."""
    return tuple(defined(lever) for lever in Lever)


def allowed(levers: Collection[Lever] | None) -> tuple[LeverDefinition, ...]:
    """The definitions of `levers`; of those that a plan uses by default where that is None."""
    return tuple(each for each in every() if (each.is_default if levers is None else each.lever in levers))


def used(plan: Plan) -> tuple[LeverDefinition, ...]:
    """The definitions of the levers that `plan` uses."""
    return tuple(each for each in every() if each.is_used(plan))


def changes_optimizer(plan: Plan) -> bool:
    """Does `plan` change how the optimizer steps?"""
    return any(lever.steps_optimizer for lever in used(plan))


def of_units(plan: Plan) -> Plan:
    """`plan` without what it does to the optimizer: for steps that end with backward."""
    gone = {lever.lever.value for lever in used(plan) if lever.steps_optimizer}
    return dataclasses.replace(plan, settings={k: v for k, v in plan.settings.items() if k not in gone})


def as_recorded(trace: Trace, host_budget_bytes: int | None = None) -> Variant:
    """`trace` before any lever is chosen. `host_budget_bytes`: the most that may wait in host memory; None: no
    limit."""
    begun = {each: each.begun(trace) for each in every()}
    return Variant(
        trace=trace,
        levers=frozenset(each.lever for each, fields in begun.items() if fields),
        decided={name: value for fields in begun.values() for name, value in fields.items()},
        host_budget_bytes=host_budget_bytes,
    )


def require_known(plan: Plan) -> None:
    """Raises `PlanMismatch` for a plan by a lever that this release does not have."""
    if unknown := sorted(set(plan.settings).union(plan.inexact, plan.ahead) - {lever.value for lever in Lever}):
        raise PlanMismatch(
            f"the plan uses the lever {unknown[0]!r}, which this release of tightfit does not have: make it anew"
        )


def ruled_out(
    trace: Trace, levers: Collection[Lever] | None, beside: Collection[Lever] | None = None
) -> tuple[str, ...]:
    """What to tell who named levers that no plan for `trace` can use: a line for each reason.

    Only levers that were named by themselves are told of. Default ones are not where they would be allowed anyway:
    `beside` the default ones, and in a list that has all exact ones of these and more.
    """
    default = frozenset(each.lever for each in allowed(None))
    named, more = by_name(levers), by_name(beside)
    found: dict[str, list[str]] = {}
    for each in allowed((named - default if named >= exact_only(default) else named) | (more - default)):
        if reason := each.ruled_out(trace):
            found.setdefault(reason, []).append(each.lever.value)
    return tuple(not_allowed(names, reason) for reason, names in found.items())


def not_allowed(names: Sequence[str], reason: str) -> str:
    """That these levers were asked for in vain. `reason`: as in `LeverDefinition.ruled_out`."""
    if len(names) == 1:
        return f"{names[0]} was asked for, and this step does not allow it: {reason}"
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{listed} were asked for, and this step does not allow them: {reason}"


def granted(levers: Collection[Lever] | None) -> Grant:
    """What the levers let the planner do with the values of a unit."""
    grants = Grant.NOTHING
    for each in allowed(levers):
        grants |= each.grants
    return grants


def exact_only(levers: Collection[Lever] | None) -> frozenset[Lever]:
    """Those of `levers`, by default of the default ones, that give the same bits."""
    return LeversAsked((each.lever for each in allowed(levers) if each.is_exact), by_name(levers))


def inexact(levers: Collection[Lever] | None) -> tuple[LeverDefinition, ...]:
    """Those of `levers`, by default of the default ones, that do not."""
    return tuple(each for each in allowed(levers) if not each.is_exact)
