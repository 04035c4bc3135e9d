"""Better choices near the chosen ones, found by the referee alone.

Idea: `plan.choose` adds up what each unit does to each stretch of the step, from above. So the chosen options may leave
room that the program cannot see. Here one more value is kept in a unit, or in all units that are alike, wherever that
saves seconds and the referee (`plan.simulate`) still finds the step within the budget. What saves most is tried first,
and of what saves the same, what backward reads first. This is done again until nothing more fits.

Where the lowest peak is wanted, the unit whose forward or backward owns the peak keeps one value more or less, or what
another unit like it keeps, wherever that takes the peak down.

Invariant: what is returned is within the budget by the referee's word, and takes no more seconds than what came in; or
it has no higher a peak. Refused: choices that move values off the device and, for the lowest peak, nested ones. These
come back as they are.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tightfit.core import Action, Advance, Choice, Program, Timeline, Trace, Unsupported
from tightfit.plan.indexed import indexed
from tightfit.plan.program import clusters, kept_values, live_clusters, shared
from tightfit.plan.simulate import simulate_choices

#: The referee walks so many events in all. On a step of a few hundred ops every value can be tried. Where fewer than
#: `_FEWEST_TRIES` are left there is no use in it. The lowest peak is asked for more seldom, and may take more walks.
_EVENTS = 120_000
_FEWEST_TRIES = 16
_LOWERING = 2  # times as many

#: So many values in a row that save as much as each other, and that did not fit, and the rest of them is left.
_FAILURES = 2


def polished(
    trace: Trace,
    choices: tuple[Choice, ...],
    line: Timeline,
    budget_bytes: int,
    advances: tuple[Advance, ...] = (),
) -> tuple[tuple[Choice, ...], Timeline]:
    """`choices`, of which the referee says `line` with the sweeps `advances`, with values kept in addition as long as
    that fits."""
    chosen = {choice.unit: choice for choice in choices}
    tries = _tries(trace, choices)
    if not tries:
        return choices, line
    first_read = {(path, value): at for path, each in _reads(trace).items() for at, value in sorted(each, reverse=True)}
    never = len(trace.events)

    def turn(addition: tuple[float, tuple[str, ...], int]) -> tuple[Any, ...]:
        """What saves most comes first, and of values that save the same the one that backward reads first: it waits for
        the shortest time."""
        gain, paths, value = addition
        soonest = min(first_read.get((path, value), never) for path in paths)
        return -gain, -len(paths), soonest, paths, -value

    before = None
    while line is not before and tries > 0:
        before = line
        failed: Counter[tuple[float, int]] = Counter()  # in a row, of those that save as much
        for gain, paths, value in sorted(_additions(trace, chosen), key=turn):
            kind = round(gain / max(before.recompute_seconds, gain), 9), len(paths)
            changed = chosen | {path: _keeping(chosen[path], value) for path in paths}
            if changed == chosen or failed[kind] >= _FAILURES:
                continue
            if tries <= 0:
                break
            tries -= 1
            found = simulate_choices(trace, tuple(changed.values()), advances)
            if found.peak_bytes <= budget_bytes and found.recompute_seconds < line.recompute_seconds:
                chosen, line = changed, found
                failed[kind] = 0
            else:
                failed[kind] += 1
    return tuple(chosen.values()), line


def lowered(
    trace: Trace, choices: tuple[Choice, ...], line: Timeline, fewest: Sequence[Choice]
) -> tuple[tuple[Choice, ...], Timeline]:
    """`choices`, of which the referee says `line`, changed in one unit at a time as long as the peak falls. `fewest`:
    each unit's choice of the fewest bytes."""
    chosen, least = {choice.unit: choice for choice in choices}, {choice.unit: choice for choice in fewest}
    tries = 0 if any(choice.lends for choice in choices) else _LOWERING * _tries(trace, choices)
    known: set[tuple[Choice, ...]] = {tuple(chosen.values())}
    tried: dict[str, Counter[int]] = defaultdict(Counter)
    reads = _reads(trace) if tries else {}
    while tries > 0:
        owner = _owner(chosen, line)
        if owner is None or least[owner].keeps_all:  # it is in no unit, or in one that has to keep everything
            break
        before = line
        for other, value in _others(chosen, least, owner, _apart(reads[owner], line.peak_event), tried[owner]):
            changed = chosen | {owner: other}
            if tuple(changed.values()) in known:
                continue
            if tries <= 0:
                break
            tries -= 1
            known.add(tuple(changed.values()))
            if value is not None:
                tried[owner][value] += 1
            try:
                found = simulate_choices(trace, tuple(changed.values()))
            except Unsupported:
                continue
            if found.peak_bytes < line.peak_bytes:
                chosen, line = changed, found
                break
        if line is before:
            break
    return tuple(chosen.values()), line


def _owner(chosen: Mapping[str, Choice], line: Timeline) -> str | None:
    """The unit that the peak depends on most, if there is one."""
    if len(chosen) == 1:  # the sums of gradients in its backward are no ops of its own
        return next(iter(chosen))
    return next((path for path in chosen if f" of {path}: " in line.peak_owner), None)


def _reads(trace: Trace) -> Mapping[str, Sequence[tuple[int, int]]]:
    """When backward reads what each unit saved: (event, value)."""
    loads = indexed(trace).first_load
    units = {frame.id: frame.unit for frame in trace.frames}
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for saved in trace.saved:
        if saved.frame is not None and saved.ordinal is not None and saved.id in loads:
            value = trace.programs[saved.frame].slots[saved.ordinal]
            found[units[saved.frame]].append((loads[saved.id], value))
    return found


def _apart(reads: Sequence[tuple[int, int]], event: int) -> Mapping[int, int]:
    """How many events before or after this one each value is read, at its nearest."""
    found: dict[int, int] = {}
    for at, value in reads:
        apart = abs(at - event)
        found[value] = min(apart, found.get(value, apart))
    return found


def _others(
    chosen: Mapping[str, Choice],
    fewest: Mapping[str, Choice],
    path: str,
    apart: Mapping[int, int],
    tried: Mapping[int, int],
) -> list[tuple[Choice, int | None]]:
    """What the unit at `path` might do in place of what it does, each with the value in which it differs, if it is one.

    What it keeps comes first: to make that again takes bytes down wherever it is only waited with. Then come the values
    that are read nearest to the peak (`apart`, in events). Where one of them is kept, what it would be made from need
    not be there. A value that was `tried` before, so many times, comes after all that were tried less often.
    """
    choice = chosen[path]
    found: list[tuple[Choice, int | None]] = [(fewest[path], None)]
    found += [
        (dataclasses.replace(choice, actions=each.actions), None)
        for each in chosen.values()
        if each.program == choice.program and len(each.actions) == len(choice.actions)
    ]
    other = {Action.KEEP: Action.RECOMPUTE, Action.RECOMPUTE: Action.KEEP}
    last = max(apart.values(), default=0) + 1

    def turn(value: int) -> tuple[int, int]:
        return tried.get(value, 0), -1 if choice.actions[value] is Action.KEEP else apart.get(value, last)

    for value in sorted(range(len(choice.actions)), key=turn):
        action = choice.actions[value]
        actions = (*choice.actions[:value], other[action], *choice.actions[value + 1 :])
        found.append((dataclasses.replace(choice, actions=actions), value))
    return found


def _tries(trace: Trace, choices: Sequence[Choice]) -> int:
    """How often the referee may be asked; 0: there is no use in it."""
    tries = _EVENTS // max(1, len(trace.events))
    if tries < _FEWEST_TRIES or any(Action.OFFLOAD in (*choice.actions, *choice.inputs) for choice in choices):
        return 0
    return tries


def _additions(trace: Trace, chosen: Mapping[str, Choice]) -> list[tuple[float, tuple[str, ...], int]]:
    """What could be kept as well: (seconds that it saves, units, value)."""
    frames: dict[str, list[int]] = defaultdict(list)
    for frame in trace.frames:
        frames[frame.unit].append(frame.id)
    seconds: dict[int, dict[int, float]] = defaultdict(dict)  # of each op, by frame and ordinal
    for op in trace.ops:
        if op.frame is not None and op.ordinal is not None:
            seconds[op.frame][op.ordinal] = op.seconds
    saved: dict[tuple[str, tuple[Action, ...], int], list[tuple[float, str]]] = defaultdict(list)
    for unit in trace.units:
        program = shared([trace.programs[frame] for frame in frames[unit.path]])
        if program is None or unit.path not in chosen:
            continue
        actions = chosen[unit.path].actions
        times = [sum(seconds[frame].get(op, 0.0) for frame in frames[unit.path]) for op in range(len(program.steps))]
        lent = chosen[unit.path].lends  # which a sweep makes again
        for value, gain in _gains(program, actions, times):
            if value not in lent:
                saved[unit.digest, actions, value].append((gain, unit.path))
    found: list[tuple[float, tuple[str, ...], int]] = []
    for (_, _, value), each in saved.items():
        found += [(gain, (path,), value) for gain, path in each]
        if len(each) > 1:
            found.append((sum(gain for gain, _ in each), tuple(path for _, path in each), value))
    return found


def _gains(program: Program, actions: Sequence[Action], seconds: Sequence[float]) -> list[tuple[int, float]]:
    """The values that the unit makes again, each with the seconds that keeping it as well would save."""
    kept = kept_values(actions)
    groups = clusters(program)

    def spent(values: frozenset[int]) -> float:
        return sum(seconds[op] for cluster in live_clusters(program, values) for op in groups[cluster])

    try:
        now = spent(kept)
    except Unsupported:
        return []
    read = {value for step in program.steps for value in step.reads}.union(program.needed)
    gains = [(value, now - spent(kept | {value})) for value in sorted(read - kept)]
    return [(value, gain) for value, gain in gains if gain > 0]


def _keeping(choice: Choice, value: int) -> Choice:
    actions = tuple(Action.KEEP if at == value else action for at, action in enumerate(choice.actions))
    return dataclasses.replace(choice, actions=actions)
