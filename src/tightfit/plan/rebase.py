"""A plan that was made of one recording of a step, as a plan of another: how a plan file is used again.

Idea: a plan says which values are kept, not how large they are, and a unit is known by the ops that it runs. So one
file serves each framework that trains the same model on the same kind of batch. What a wrapper puts before the paths of
the units, or takes away, is found by comparing them.

Invariant: what is decided stays. What is said of bytes, FLOPs and recompute is the referee's word on this step, and
nothing is said to be proven of it. Refused (`PlanMismatch`): a unit that is missing, differs, or runs other ops than
the plan was made for; a lever that needs what this step does not have.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from tightfit.core import Action, Choice, Phase, Plan, PlanMismatch, Program, Status, Trace, Unit
from tightfit.device.cost import copy_lanes, fresh_seconds, unplanned_seconds
from tightfit.levers import every
from tightfit.plan.program import shared
from tightfit.plan.simulate import simulate, under

__all__ = ["rebased"]

_ANEW = "make the plan anew, of this step"


def rebased(plan: Plan, trace: Trace) -> Plan:
    """`plan`, whatever recording it was made of, as a plan of the step of `trace`. Its budget stays, and its peak is
    what the referee says of this step, which may be more: whoever asks decides what follows.

    The seconds of levers beside recompute and offload (tiles, the optimizer in chunks) stay as the plan has them.
    Raises `PlanMismatch`, which names the first unit that differs.
    """
    moved = _paths(plan, [unit.path for unit in trace.units])
    draft = dataclasses.replace(
        plan,
        trace_digest=trace.digest,
        choices=tuple(dataclasses.replace(choice, unit=moved(choice.unit)) for choice in plan.choices),
        advances=tuple(
            dataclasses.replace(
                each, base=moved(each.base), target=moved(each.target), stores=tuple(map(moved, each.stores))
            )
            for each in plan.advances
        ),
    )
    for lever in every():
        if lever.is_used(plan):
            draft = lever.moved(draft, moved)
    return _refereed(_for_units_of(under(trace, draft), draft), trace)


# ------------------------------------------------------------------------------------------------ paths


def _paths(plan: Plan, here: Iterable[str]) -> Callable[[str], str]:
    """What the paths of the plan are in the step whose units are `here`."""
    known = set(here)
    asked = [choice.unit for choice in plan.choices if not choice.keeps_all]
    if not asked:
        return lambda path: path
    found = [move for move in _moves(asked[0], sorted(known)) if all(move(path) in known for path in asked)]
    if len(found) > 1 and not all(path in known for path in asked):
        raise PlanMismatch(
            f"the plan's unit {asked[0]!r} is {' or '.join(repr(move(asked[0])) for move in found[:2])} in this step, "
            f"and nothing says which: {_ANEW}"
        )
    if not found:
        lacking = next(path for path in asked if path not in known)
        raise PlanMismatch(
            f"the plan has the unit {lacking!r}, which this step does not have (it has {_some(sorted(known))}): {_ANEW}"
        )
    return found[0]


def _moves(path: str, here: Iterable[str]) -> Iterator[Callable[[str], str]]:
    """The ways in which `path` may be one of `here`: as it is, with something before it, without what is before it."""
    yield lambda each: each
    for other in here:
        if other != path and _ends(other, path):
            yield functools.partial(_joined, other.removesuffix(path).rstrip("."))
        elif other != path and _ends(path, other):
            yield functools.partial(_without, path.removesuffix(other).rstrip("."))


def _ends(path: str, end: str) -> bool:
    return not end or path.endswith("." + end)


def _joined(before: str, path: str) -> str:
    return f"{before}.{path}" if path else before


def _without(before: str, path: str) -> str:
    return "" if path == before else path.removeprefix(before + ".")


def _some(paths: list[str]) -> str:
    shown = ", ".join(repr(path) for path in paths[:3])
    return f"{shown} and {len(paths) - 3} more" if len(paths) > 3 else shown or "none"


# ------------------------------------------------------------------------------------------------ units


def _for_units_of(step: Trace, plan: Plan) -> Plan:
    """`plan` with the programs of the units of `step`, each of which is that which was planned."""
    units = {unit.path: unit for unit in step.units}
    named = {choice.unit for choice in plan.choices}
    # a deeper model has more units: they keep everything, and what a lever does in every unit it does in them too
    unnamed = (Choice(unit=unit.path, actions=()) for unit in step.units if unit.path not in named)
    calls: dict[str, list[Program]] = defaultdict(list)
    for frame in step.frames:
        calls[frame.unit].append(step.programs[frame.id])
    programs: dict[str, Program] = {}
    choices = []
    for choice in (*plan.choices, *unnamed):
        unit = units.get(choice.unit)
        if unit is None or not calls[unit.path]:
            assert choice.keeps_all, choice.unit  # `_paths` found the others
            continue
        mine = shared(calls[unit.path])
        if choice.keeps_all:
            values = calls[unit.path][0].values if mine is None else mine.values
            choices.append(
                Choice(
                    unit=unit.path, actions=(Action.KEEP,) * values, signature=unit.signature, program=unit.digest
                )
            )  # fmt: skip
            continue
        programs[unit.digest] = _as_planned(plan, choice, unit, mine)
        choices.append(dataclasses.replace(choice, program=unit.digest))
    return dataclasses.replace(plan, choices=tuple(choices), programs=programs)


def _as_planned(plan: Plan, choice: Choice, unit: Unit, mine: Program | None) -> Program:
    """The unit's program here. Raises `PlanMismatch` where it is not the one that `choice` was made for."""
    theirs = plan.programs.get(choice.program)
    if theirs is None or len(choice.actions) != theirs.values:
        raise PlanMismatch(f"the plan is damaged: it has no program for the unit {choice.unit!r}; {_ANEW}")
    if unit.signature != choice.signature:
        raise PlanMismatch(
            f"the unit {unit.path!r} differs: planned for {choice.signature}, found {unit.signature}; {_ANEW}"
        )
    if unit.pinned or mine is None:
        why = unit.pinned or "its calls run different ops"
        raise PlanMismatch(f"the unit {unit.path!r} has to keep everything in this step ({why}): {_ANEW}")
    if mine != theirs:
        raise PlanMismatch(
            f"the unit {unit.path!r} runs other ops than the plan was made for ({_difference(theirs, mine)}): the "
            f"model, its dtype, its attention kernel or the kind of batch (masks, packing) is another; {_ANEW}"
        )
    return mine


def _difference(theirs: Program, mine: Program) -> str:
    """The first op that differs, for people."""
    for number, (planned, found) in enumerate(itertools.zip_longest(theirs.steps, mine.steps)):
        if planned is None or found is None:
            return f"{len(theirs.steps)} were planned, {len(mine.steps)} run"
        if planned.name != found.name:
            return f"op {number} was {planned.name}, and is {found.name}"
        if planned != found:
            return f"op {number}, {found.name}, reads or makes other values"
    return "autograd saves other tensors"


def _refereed(plan: Plan, trace: Trace) -> Plan:
    """`plan` with what the referee says of it in this step."""
    line, unplanned = simulate(trace, plan), simulate(trace)
    out, back = copy_lanes(under(trace, plan))
    offload_seconds = out.waiting_seconds(line.offloaded_bytes) + back.waiting_seconds(line.fetched_bytes)
    made = dataclasses.replace(
        plan,
        status=Status.FEASIBLE,
        peak_bytes=line.peak_bytes,
        recompute_seconds=line.recompute_seconds,
        bound_seconds=0.0,
        recompute_flops=line.recompute_flops,
        forward_flops=sum(op.flops for op in trace.ops if op.phase is Phase.FORWARD),
        unplanned_peak_bytes=unplanned.peak_bytes,
        replays=line.replays,
        offloaded_bytes=line.offloaded_bytes,
        offload_seconds=offload_seconds,
        fresh_seconds=fresh_seconds(trace, unplanned.peak_bytes, line.peak_bytes),
    )
    return dataclasses.replace(
        made, step_seconds=unplanned_seconds(trace, made.unplanned_peak_bytes) + made.added_seconds
    )
