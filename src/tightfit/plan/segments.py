"""Cut a long unit into a row of short ones: how the planner treats a Python loop, or a forward that is written flat.

Idea: the points of a unit's frontier differ in the bytes that the unit keeps. What its own backward holds for a moment
is not part of a point. For a block of a few dozen ops that does not matter. But a unit of a thousand ops has its peak
inside its own backward. So its ops are cut into segments, where few bytes are read across the cut. Each segment is
planned as if it were a unit, and then the choices are joined: what a segment that runs again reads of another segment
is kept. The engine needs to know nothing of segments, because its tape makes every single value again on demand
(`engine.tape`).

Invariant: the segmented trace holds the same ops, values and events in the same order. Only the unit that owns them
differs.
Refused: units that are called more than once, because one plan serves all calls; cuts between ops that change one
value.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tightfit.core import (
    Action,
    Choice,
    Event,
    EventKind,
    Frame,
    Op,
    Phase,
    Program,
    Saved,
    Step,
    Trace,
    Unit,
    Value,
    to_json,
)
from tightfit.plan.program import kept_values, recipe

#: A unit of fewer ops than this is planned as it is, exactly: a transformer block with adapters has half as many.
LONG = 256
#: So is a unit with less than this part of all units' ops: what its own backward holds is a small part of the step's.
_PART = 1 / 12
#: How many ops a segment has, about: at least a third of this, at most twice as many.
LENGTHS = (32, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Segment:
    """The ops of a unit from `start` on, up to the next segment. `values`: ordinals, in the unit, of the values that
    they make."""

    path: str
    start: int
    values: tuple[int, ...]
    program: Program


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmented:
    """A trace whose long units are cut, and how its choices become choices for the whole units."""

    trace: Trace
    whole: Trace
    segments: dict[str, tuple[_Segment, ...]]  # by unit of `whole`

    def joined(self, choices: Iterable[Choice]) -> tuple[Choice, ...]:
        """Choices for the segments as choices for the units of `whole`."""
        by_path = {choice.unit: choice for choice in choices}
        found = []
        for unit in self.whole.units:
            segments = self.segments.get(unit.path)
            found.append(by_path[unit.path] if segments is None else self._joined(unit, segments, by_path))
        return tuple(found)

    def _joined(self, unit: Unit, segments: tuple[_Segment, ...], by_path: dict[str, Choice]) -> Choice:
        (frame,) = (frame.id for frame in self.whole.frames if frame.unit == unit.path)
        program = self.whole.programs[frame]
        actions = [Action.KEEP] * program.values
        read: set[int] = set()  # of other segments, by ops that run again
        for segment in segments:
            chosen = by_path[segment.path].actions
            for ordinal, action in zip(segment.values, chosen, strict=True):
                actions[ordinal] = action
            own = set(segment.values)
            for op in recipe(segment.program, kept_values(chosen)).runs:
                read |= {v for v in program.steps[segment.start + op].reads if v not in own}
        for ordinal in read:
            actions[ordinal] = Action.KEEP
        return Choice(unit=unit.path, actions=tuple(actions), signature=unit.signature, program=unit.digest)


def segmented(trace: Trace, length: int) -> Segmented | None:
    """`trace` with each long unit cut into segments of about `length` ops; None: it has no such unit."""
    calls: dict[str, list[int]] = defaultdict(list)
    for frame in trace.frames:
        calls[frame.unit].append(frame.id)
    whole = sum(len(program.steps) for program in trace.programs.values())
    cuts: dict[int, list[int]] = {}
    for unit in trace.units:
        if len(calls[unit.path]) != 1 or unit.pinned:
            continue
        (call,) = calls[unit.path]
        steps = trace.programs[call].steps
        if len(steps) >= max(LONG, 2 * length, _PART * whole):
            cuts[call] = _cuts(trace.programs[call], _sizes(trace, call), length)
    if not cuts:
        return None
    return _Cutter(trace, cuts).segmented()


def _sizes(trace: Trace, frame: int) -> list[int]:
    """Bytes of the values of a frame, by ordinal."""
    sizes = [0] * trace.programs[frame].values
    for value in trace.values:
        if value.producer is not None and value.ordinal is not None and trace.ops[value.producer].frame == frame:
            sizes[value.ordinal] = value.size_bytes
    return sizes


def _cuts(program: Program, sizes_bytes: Sequence[int], length: int) -> list[int]:
    """Op ordinals at which a segment begins, 0 first. The cuts lie where ops after the cut read the fewest bytes from
    before it."""
    count = len(program.steps)
    made: dict[int, int] = {}
    read: dict[int, int] = {}
    tied: dict[int, int] = {}  # value -> last op that changes it, or reads it before it is changed
    for i, step in enumerate(program.steps):
        for value in step.writes:
            made.setdefault(value, i)
            tied[value] = i
        for value in step.reads:
            read[value] = i
        for value in step.reads_early:
            tied[value] = read[value] = i
    change = [0] * (count + 1)
    held = [0] * (count + 1)
    for value, first in made.items():
        if read.get(value, -1) > first:  # it crosses the cuts first + 1 to its last reader
            change[first + 1] += sizes_bytes[value]
            change[read[value] + 1] -= sizes_bytes[value]
        if tied[value] > first:
            held[first + 1] += 1
            held[tied[value] + 1] -= 1
    crossing, together = [0], [0]
    for i in range(1, count + 1):
        crossing.append(crossing[-1] + change[i])
        together.append(together[-1] + held[i])
    cuts = [0]
    while count - cuts[-1] > 2 * length:
        begin = cuts[-1]
        window = [p for p in range(begin + length // 3, begin + 2 * length) if not together[p]]
        if not window:
            window = [next((p for p in range(begin + 2 * length, count) if not together[p]), count)]
            if window == [count]:
                break
        cuts.append(min(window, key=lambda p: (crossing[p], abs(p - begin - length))))
    return cuts


class _Cutter:
    """Makes the segmented trace. Ops, values and saved tensors keep their ids; frames are numbered anew."""

    def __init__(self, trace: Trace, cuts: dict[int, list[int]]) -> None:
        self.trace, self.cuts = trace, cuts
        self.values_of: dict[int, dict[int, int]] = defaultdict(dict)  # frame -> ordinal -> value
        for value in trace.values:
            if value.producer is not None and value.ordinal is not None:
                frame = trace.ops[value.producer].frame
                assert frame is not None
                self.values_of[frame][value.ordinal] = value.id
        self.ops_of: dict[int, list[Op]] = defaultdict(list)
        for op in trace.ops:
            if op.frame is not None and op.ordinal is not None:
                self.ops_of[op.frame].append(op)
        self.first: dict[int, int] = {}  # old frame -> first of the new ones
        count = 0
        for frame_ in trace.frames:
            self.first[frame_.id] = count
            count += len(cuts.get(frame_.id, (0,)))
        self.segment_of_op: dict[int, tuple[int, int]] = {}  # op id -> (new frame, ordinal in it)
        self.segment_of_value: dict[int, tuple[int, int]] = {}
        self.segments: dict[str, tuple[_Segment, ...]] = {}
        self.frames: list[Frame] = []
        self.programs: dict[int, Program] = {}
        self.units: dict[str, list[Unit]] = {}
        self.saved: dict[int, Saved] = {saved.id: saved for saved in trace.saved}
        self.saved_in: dict[int | None, list[Saved]] = defaultdict(list)
        for saved in trace.saved:
            self.saved_in[saved.frame].append(saved)

    def segmented(self) -> Segmented:
        trace = self.trace
        units = {unit.path: unit for unit in trace.units}
        for frame in trace.frames:
            if frame.id in self.cuts:
                self._cut(frame, units[frame.unit])
                continue
            number = self.first[frame.id]
            self.frames.append(dataclasses.replace(frame, id=number))
            self.programs[number] = trace.programs[frame.id]
            for saved in self.saved_in[frame.id]:
                self.saved[saved.id] = dataclasses.replace(saved, frame=number)
            for op in self.ops_of[frame.id]:
                assert op.ordinal is not None
                self.segment_of_op[op.id] = number, op.ordinal
        events, moved = self._events()
        cut = dataclasses.replace(
            trace,
            units=tuple(each for unit in trace.units for each in self.units.get(unit.path, [unit])),
            frames=tuple(self.frames),
            ops=tuple(self._op(op) for op in trace.ops),
            values=tuple(self._value(value, moved) for value in trace.values),
            saved=tuple(self.saved[saved.id] for saved in trace.saved),
            events=tuple(events),
            programs=self.programs,
            tiled=(),
        )
        return Segmented(trace=cut, whole=trace, segments=self.segments)

    def _cut(self, frame: Frame, unit: Unit) -> None:
        trace, program = self.trace, self.trace.programs[frame.id]
        begins = self.cuts[frame.id]
        ends = [*begins[1:], len(program.steps)]
        place: dict[int, tuple[int, int]] = {}  # value ordinal -> (segment, ordinal in it)
        made: list[list[int]] = [[] for _ in begins]
        for k, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            for step in program.steps[begin:end]:
                for value in (*step.outputs, *step.writes):
                    if value is not None and value >= 0 and value not in place:
                        place[value] = k, len(made[k])
                        made[k].append(value)
        for value in range(program.values):  # what no recorded op makes is nobody's to run again
            if value not in place:
                place[value] = 0, len(made[0])
                made[0].append(value)
        slots: list[list[tuple[int, bool]]] = [[] for _ in begins]
        for saved in self.saved_in[frame.id]:
            assert saved.ordinal is not None
            value = program.slots[saved.ordinal]
            k, local = place[value] if value >= 0 else (0, -1)
            self.saved[saved.id] = dataclasses.replace(saved, frame=self.first[frame.id] + k, ordinal=len(slots[k]))
            slots[k].append((local, program.wanted[saved.ordinal]))
        ops = self.ops_of[frame.id]
        found, units = [], []
        for k, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            own = {value: local for local, value in enumerate(made[k])}
            part = Program(
                steps=tuple(_within(step, own) for step in program.steps[begin:end]),
                slots=tuple(local for local, _ in slots[k]),
                wanted=tuple(want for _, want in slots[k]),
                values=len(made[k]),
                held=tuple(sorted(own[v] for v in program.held if v in own)),
            )
            number, path = self.first[frame.id] + k, f"{unit.path}#{k}"
            ids = self.values_of[frame.id]
            inside = {ids[v] for v in made[k] if v in ids}
            inputs = dict.fromkeys(v for op in ops[begin:end] for v in op.inputs if v not in inside)
            self.frames.append(Frame(id=number, unit=path, inputs=tuple(inputs)))
            self.programs[number] = part
            sizes = [trace.values[ids[v]].size_bytes if v in ids else 0 for v in made[k]]
            content = json.dumps([to_json(part), sizes])
            units.append(
                Unit(
                    path=path,
                    digest=hashlib.sha256(content.encode()).hexdigest()[:16],
                    op_ids=tuple(op.id for op in ops[begin:end]),
                    signature=unit.signature,
                )
            )
            for local, op in enumerate(ops[begin:end]):
                self.segment_of_op[op.id] = number, local
            for local, value in enumerate(made[k]):
                if value in ids:
                    self.segment_of_value[ids[value]] = number, local
            found.append(_Segment(path=path, start=begin, values=tuple(made[k]), program=part))
        self.units[unit.path] = units
        self.segments[unit.path] = tuple(found)

    def _op(self, op: Op) -> Op:
        place = self.segment_of_op.get(op.id)
        if place is None:
            return op
        unit = self.frames[place[0]].unit if op.phase is Phase.FORWARD else op.unit
        return dataclasses.replace(op, frame=place[0], ordinal=place[1], unit=unit)

    def _value(self, value: Value, moved: Sequence[int]) -> Value:
        place = self.segment_of_value.get(value.id)
        end = None if value.natural_end is None else moved[value.natural_end]
        if place is None:
            return dataclasses.replace(value, natural_end=end)
        return dataclasses.replace(value, natural_end=end, ordinal=place[1], unit=self.frames[place[0]].unit)

    def _events(self) -> tuple[list[Event], list[int]]:
        """The events with the borders of the segments among them, and the new place of each old event."""
        trace = self.trace
        border: dict[int, int] = {}  # last op of a segment -> the frame that begins behind it
        for frame, begins in self.cuts.items():
            for k, begin in enumerate(begins[1:], start=1):
                border[self.ops_of[frame][begin - 1].id] = self.first[frame] + k
        events: list[Event] = []
        moved: list[int] = []
        for event in trace.events:
            moved.append(len(events))
            events.extend(self._renamed(event))
            if event.what is EventKind.OP and event.subject in border:
                number = border[event.subject]
                events.append(Event(what=EventKind.EXIT, subject=number - 1))
                events.append(Event(what=EventKind.ENTER, subject=number))
        return events, moved

    def _renamed(self, event: Event) -> Iterator[Event]:
        if event.what not in (EventKind.ENTER, EventKind.EXIT):
            yield event
            return
        number = self.first[event.subject]
        if event.what is EventKind.EXIT:
            number += len(self.cuts.get(event.subject, (0,))) - 1
        yield Event(what=event.what, subject=number)


def _within(step: Step, own: dict[int, int]) -> Step:
    """`step` in the numbers of its segment. What other segments make counts as coming from outside."""
    return Step(
        name=step.name,
        kind=step.kind,
        reads=tuple(own[v] for v in step.reads if v in own),
        reads_early=tuple(own[v] for v in step.reads_early if v in own),
        outputs=tuple(None if v is None else own.get(v, -1) for v in step.outputs),
        writes=tuple(own[v] for v in step.writes),
        rerunnable=step.rerunnable,
    )
