"""What each option of a unit does to the live bytes of the step, in the step's events.

Idea: an option drops saved tensors, holds what its replays read, and makes values again before the events of backward
that ask for them. Each of these is some bytes between two events. Blocks that are alike do the same at other places of
the step, so it is worked out for one of them and moved to the others. Whether they are alike is not taken from their
digests: all that an effect is made of is compared, with the events counted from the unit's own forward and backward.

Invariant: written without the referee (`plan.simulate`), which walks the same step in its own way. Refused: nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tightfit.core import EventKind, Program, Saved, Trace
from tightfit.plan.casts import cast_anew
from tightfit.plan.frontier import Point
from tightfit.plan.indexed import indexed
from tightfit.plan.nest import Nesting
from tightfit.plan.program import Recipe, demanded, dropped_slots, first_random, leading_to, reads_copy, recipe

__all__ = ["Alike", "Effect", "Effects", "Where", "alike"]

#: Whether an event belongs to a unit's forward or to its backward must be clear by so many events on either side.
_UNCLEAR = 3

#: Where in a unit's part of the step an event is that comes after all of its own.
_LATER = (3, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What an option does."""

    lives: Sequence[tuple[float, int, int]]  # so many more bytes after one event and until another
    spikes: Sequence[tuple[int, float]]  # what replays before an event add for a while on top of everything else there
    apart: Sequence[tuple[int, int, int]]  # of values that several units may hold: one that this holds, after and until
    ran: Sequence[Sequence[int]]  # which ops of the unit run again together; ordinals
    seconds: float  # of the replays


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Where in a step a unit is: the event at which its forward begins, the one at which its backward does, the middle
    between the two, and the end of the step; and ids of the values that it has to do with, in an order that alike units
    share."""

    enter: int
    first: int
    turn: float
    end: int
    numbers: tuple[int, ...]

    def moved(self, found: Effect, there: Where, seconds: float) -> Effect:
        """`found`, the effect of a unit `there`, as that of a unit here."""
        if self == there:
            return dataclasses.replace(found, seconds=seconds)
        forward, backward, end = self.enter - there.enter, self.first - there.first, self.end - there.end
        turn, last = there.turn, there.end

        def here(event: int) -> int:
            if event < 0:
                return event
            return event + (forward if event < turn else backward if event < last else end)

        numbers = self.numbers
        return Effect(
            lives=[(size, here(after), here(until)) for size, after, until in found.lives],
            spikes=[(here(event), top) for event, top in found.spikes],
            apart=[
                (numbers[there.numbers.index(value_id)], here(after), here(until))
                for value_id, after, until in found.apart
            ],
            ran=found.ran,
            seconds=seconds,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Alike:
    """What is known of all units that are alike, in whatever step, and grows as it is asked for."""

    effects: dict[frozenset[int], tuple[Where, Effect]]  # by what is kept, with the unit that it was worked out for
    leaner: dict[Hashable, Sequence[Point]]  # by all else that `plan.leaner` is told


@functools.lru_cache(maxsize=256)
def alike(kind: Hashable) -> Alike:
    """Of the units of one kind. The variants of a step that levers make have the same units, and so have the steps that
    differ in seconds alone."""
    return Alike(effects={}, leaner={})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """What is asked of the ops of one frame for every option, by their ordinals."""

    reads: Sequence[tuple[int, ...]]  # value ids
    made: Sequence[tuple[int, ...]]
    sizes: Mapping[int, int]  # bytes of what is made
    made_bytes: Sequence[int]
    scratch_bytes: Sequence[int]
    last_release: int

    def run_again(self, ops: Sequence[int], event: int, until: Mapping[int, int]) -> tuple[float, list[int]]:
        """What the ops do that run before `event`: (the most bytes that they add for a while beyond the values that
        they leave, those values). What they make is left if it is wanted `until` a later event."""
        left: list[int] = []
        passing: dict[int, int] = {}  # value -> last op of this batch that reads it
        for op in ops:
            for value_id in self.reads[op]:
                if value_id in passing:
                    passing[value_id] = op
            for value_id in self.made[op]:
                if until.get(value_id, -1) > event:
                    left.append(value_id)
                else:
                    passing[value_id] = op
        goes: dict[int, int] = {}  # bytes, by the op after which they go
        for value_id, op in passing.items():
            goes[op] = goes.get(op, 0) + self.sizes[value_id]
        level = top = 0.0
        for op in ops:
            level += self.made_bytes[op]
            top = max(top, level + self.scratch_bytes[op])
            level -= goes.get(op, 0)
        return top - level, left


class Effects:
    """The trace, indexed for all that an option does in it.

    One thing because every effect is told by the same index of the trace.
    """

    def __init__(self, trace: Trace, nesting: Nesting | None) -> None:
        self.trace = trace
        self.nesting = nesting or Nesting(links=(), advances=(), passes={})
        self.programs: dict[str, Program] = {}  # of units that can be planned: one for all calls
        self._shapes: dict[str, tuple[Alike, Where] | None] = {}
        self._calls: dict[int, _Call] = {}  # by frame
        self.apart: frozenset[int] = frozenset()  # values that replays of several units may hold
        self.marks = [i for i, e in enumerate(trace.events) if e.what is EventKind.OP]
        self.op_event = {trace.events[i].subject: i for i in self.marks}
        self.mark_at = np.searchsorted(np.array(self.marks), np.arange(len(trace.events) + 1))  # first mark at or after
        self.freed = {e.subject: i for i, e in enumerate(trace.events) if e.what is EventKind.FREE}
        self.released = {e.subject: i for i, e in enumerate(trace.events) if e.what is EventKind.RELEASE}
        self.load: dict[int, int] = {}
        self.enter: dict[int, int] = {}
        self.exit: dict[int, int] = {}
        for i, event in enumerate(trace.events):
            if event.what is EventKind.LOAD:
                self.load.setdefault(event.subject, i)
            elif event.what is EventKind.ENTER:
                self.enter[event.subject] = i
            elif event.what is EventKind.EXIT:
                self.exit[event.subject] = i
        self.frames_of: dict[str, list[int]] = defaultdict(list)
        for frame in trace.frames:
            self.frames_of[frame.unit].append(frame.id)
        self.slots: dict[int, list[int]] = defaultdict(list)
        self.saved_of: dict[int, list[Saved]] = defaultdict(list)
        for saved in trace.saved:
            self.saved_of[saved.value].append(saved)
        self.kept_elsewhere: dict[int, int] = {}  # value -> last release by a saved tensor of another frame
        for saved in trace.saved:
            if saved.frame is not None:
                self.slots[saved.frame].append(saved.id)
        self.values: dict[int, dict[int, int]] = defaultdict(dict)
        self.ops: dict[int, list[int]] = defaultdict(list)
        for op in trace.ops:
            if op.frame is not None and op.ordinal is not None:
                self.ops[op.frame].append(op.id)
        self.readers: dict[int, set[str]] = defaultdict(set)  # units whose ops read a value
        for op in trace.ops:
            if op.frame is not None:
                for value_id in op.inputs:
                    self.readers[value_id].add(trace.frames[op.frame].unit)
        self.maker: dict[int, int] = {}
        for value in trace.values:
            if value.producer is not None and value.ordinal is not None:
                frame_id = trace.ops[value.producer].frame
                assert frame_id is not None
                self.values[frame_id][value.ordinal] = value.id
                self.maker[value.id] = frame_id
        self.casts_of = indexed(trace).casts_of
        self.maker |= {value_id: frame for frame, casts in self.casts_of.items() for value_id in casts}
        end_of_step = len(trace.events)
        for saved in trace.saved:
            if saved.value in self.maker and self.maker[saved.value] != saved.frame:
                end = self.released.get(saved.id, end_of_step)
                self.kept_elsewhere[saved.value] = max(self.kept_elsewhere.get(saved.value, -1), end)

    def _away(self, path: str, frame: int, point: Point) -> frozenset[int]:
        """Value ids that wait off the device between the frame's forward and its backward."""
        inputs = self.trace.frames[frame].inputs
        return frozenset([*(self.values[frame][v] for v in point.away), *(inputs[k] for k in point.inputs_away)])

    def _recipe(self, path: str, point: Point) -> Recipe:
        lends = self.nesting.lends(path)
        return recipe(self.programs[path], point.kept - lends, lends)

    def _recipes(self, path: str, point: Point) -> dict[int, Recipe]:
        """What each call of the unit does when `point` is chosen; calls in which nothing runs again are left out."""
        found = {}
        chosen = self._recipe(path, point)
        for frame in self.frames_of[path]:
            if (
                chosen.lends
                or point.away
                or point.inputs_away
                or any(s in self.load for _, s in self._dropped_slots(path, frame, chosen))
            ):
                found[frame] = chosen
        return found

    def _replays(self, path: str, point: Point) -> bool:
        return bool(self._recipes(path, point))

    def _dropped_slots(self, path: str, frame: int, chosen: Recipe) -> list[tuple[int, int]]:
        """Saved tensors that autograd does not hold when `chosen` is chosen: pairs of (ordinal, saved id)."""
        dropped = dropped_slots(self.programs[path], self.trace.programs[frame], chosen)
        return [(i, self.slots[frame][i]) for i, _ in dropped]

    def _effect(self, path: str, point: Point) -> Effect:
        """What choosing `point` does. Worked out once for units that are alike in all that it is made of."""
        shape = self._shape_of(path)
        if shape is None or point.away or point.inputs_away:
            return self._worked_out(path, point)
        alike, where = shape
        if point.kept not in alike.effects:
            found = self._worked_out(path, point)
            alike.effects[point.kept] = where, found
            return found
        there, found = alike.effects[point.kept]
        (frame,) = self.frames_of[path]
        return where.moved(found, there, self._spent(path, frame, self._recipe(path, point), found.ran))

    def _shape_of(self, path: str) -> tuple[Alike, Where] | None:
        if path not in self._shapes:
            self._shapes[path] = self._shape(path)
        return self._shapes[path]

    def _shape(self, path: str) -> tuple[Alike, Where] | None:
        """What the unit has in common with those that are like it in everything that an effect is made of but for
        seconds; and where it is. None: it is called several times, or it casts weights.

        Events count from where the unit's forward begins, or from where its backward does, whichever is nearer.
        """
        trace, frames = self.trace, self.frames_of[path]
        (frame, *others) = frames
        loads = [self.load[slot] for slot in self.slots[frame] if slot in self.load]
        if others or not loads or self.casts_of[frame] or path not in self.programs:
            return None
        end_of_step, enter, leave, first = len(trace.events), self.enter[frame], self.exit[frame], min(loads)
        turn = (leave + first) / 2
        latest = max(max(self.load.get(slot, -1), self.released.get(slot, end_of_step)) for slot in self.slots[frame])
        unclear = False

        def place(event: int) -> tuple[int, int]:
            nonlocal unclear
            if event < 0 or event >= end_of_step:
                return (2, min(event, 0))
            unclear = unclear or abs(event - turn) < _UNCLEAR
            return (0, event - enter) if event < turn else (1, event - first)

        numbers: dict[int, int] = {}  # of values, in the order in which the unit has to do with them
        ops = []
        for ordinal in range(len(self.ops[frame])):
            op = trace.ops[self.ops[frame][ordinal]]
            own = tuple(
                (numbers.setdefault(v, len(numbers)), trace.values[v].producer == op.id)
                for v in op.outputs
                if v is not None
            )
            reads = tuple(numbers.setdefault(v, len(numbers)) for v in op.inputs)
            ops.append((reads, own, op.rerun_scratch_bytes))
        ordinals = tuple((v, numbers.setdefault(value_id, len(numbers))) for v, value_id in self.values[frame].items())
        slots = []
        for slot in self.slots[frame]:
            saved = trace.saved[slot]
            times = place(self.load.get(slot, end_of_step)), place(self.released.get(slot, end_of_step))
            slots.append((numbers.setdefault(saved.value, len(numbers)), saved.read, slot in self.load, times))
        borrowed = self.nesting.borrowed(path)
        values = []
        for value_id in numbers:
            value = trace.values[value_id]
            is_own, end = self.maker.get(value_id) == frame, self.freed.get(value_id, end_of_step)
            # what stays until the unit is through is not held by its replays
            ends = [_LATER if not is_own and end > latest else place(end)]
            if is_own:
                natural = end if value.natural_end is None else value.natural_end
                ends += [place(natural), place(self.kept_elsewhere.get(value_id, -1))]
            born = value.producer is None
            kinds = born, is_own, value_id in borrowed, value_id in self.apart
            values.append((value.size_bytes, value.ordinal, kinds, tuple(ends)))
        kind = (
            self.programs[path], trace.programs[frame], trace.random_state_bytes, self.nesting.lends(path),
            place(leave), tuple(ops), ordinals, tuple(slots), tuple(values),
        )  # fmt: skip
        if unclear:
            return None
        return alike(kind), Where(enter=enter, first=first, turn=turn, end=end_of_step, numbers=tuple(numbers))

    def _worked_out(self, path: str, point: Point) -> Effect:
        trace, values = self.trace, self.trace.values
        lives: list[tuple[float, int, int]] = []
        spikes: list[tuple[int, float]] = []
        apart: list[tuple[int, int, int]] = []
        ran: list[Sequence[int]] = []
        seconds = 0.0
        end_of_step = len(trace.events)

        def live(size: float, after: int, until: int) -> None:
            """`size` more bytes between the events `after` and `until`."""
            if until > after:
                lives.append((size, after, until))

        state_bytes = trace.random_state_bytes
        for frame, chosen in self._recipes(path, point).items():
            ids, call = self.values[frame], self._call(frame)
            program = trace.programs[frame]
            dropped = self._dropped_slots(path, frame, chosen)
            loads = sorted((self.load[s], i) for i, s in dropped if s in self.load)
            event_of = {i: event for event, i in loads}
            batches = [(event_of[i], ops) for i, ops in demanded(program, chosen, tuple(i for _, i in loads))]
            away = self._away(path, frame, point)
            brought = {*self.nesting.borrowed(path), *away, *self.casts_of[frame]}
            # what dropped saved tensors held is freed at once; what is made again is freed with the last of them
            until: dict[int, int] = {}
            for ordinal, slot in dropped:
                value_id = ids[program.slots[ordinal]]
                if trace.saved[slot].read:
                    until[value_id] = max(until.get(value_id, -1), self.released.get(slot, end_of_step))
                else:
                    until.setdefault(value_id, -1)
            for value_id in until:
                value = values[value_id]
                end = self.freed.get(value_id, end_of_step)
                natural = end if value.natural_end is None else value.natural_end
                live(-value.size_bytes, max(natural, self.kept_elsewhere.get(value_id, -1)), end)
            runs_at = {op: event for event, ops in batches for op in ops}  # by ordinal
            made = {value_id for op in chosen.runs for value_id in call.made[op]}
            for_ops: Mapping[int, int] = {}
            if chosen.replays and self.casts_of[frame]:
                for_ops, casting = cast_anew(
                    trace, self.programs[path], frame, self.casts_of[frame],
                    {self.ops[frame][op]: event for op, event in runs_at.items()}, live,
                    saved_of=self.saved_of, freed=self.freed, released=self.released, load=self.load,
                )  # fmt: skip
                seconds += casting
            held: dict[int, int] = {}
            last_read: dict[int, int] = {}
            for ordinal in chosen.runs:
                step, event = program.steps[ordinal], runs_at.get(ordinal, -1)
                for value_id in call.reads[ordinal]:
                    own = values[value_id].ordinal if value_id in made else None
                    if own is not None and reads_copy(step, chosen, own):
                        if value_id not in call.made[ordinal] and event > last_read.get(value_id, -1):
                            last_read[value_id] = event
                    elif values[value_id].producer is not None and value_id not in brought:
                        wanted = call.last_release if event < 0 else event
                        if wanted > held.get(value_id, -1):
                            held[value_id] = wanted
            for value_id, event in held.items():
                end = self.freed.get(value_id, end_of_step)
                if value_id not in self.apart:
                    live(values[value_id].size_bytes, end, event)
                elif event > end:
                    apart.append((value_id, end, event))
            for value_id in away:
                self._waits(frame, value_id, {self.ops[frame][op]: event for op, event in runs_at.items()}, live)
            for value_id, last in last_read.items():  # what is made again is there as long as either wants it
                if last > until.get(value_id, -1):
                    until[value_id] = last
            for event, ops in batches:
                top, left = call.run_again(ops, event, until)
                for value_id in left:
                    live(values[value_id].size_bytes, event - 1, until[value_id])
                top += for_ops.get(event, 0) + (state_bytes if chosen.states else 0)
                spikes.append((event, top))
            drawn = first_random(program)
            if drawn is not None:
                extra = len(chosen.states | {drawn}) * state_bytes
                live(extra, self.enter[frame], self.exit[frame])
                gone = batches[-1][0] if batches else call.last_release
                live(len(chosen.states) * state_bytes, self.exit[frame], gone)
            seconds = self._spent(path, frame, chosen, [ops for _, ops in batches], seconds)
            ran += [ops for _, ops in batches]
        return Effect(lives=lives, spikes=spikes, apart=apart, ran=ran, seconds=seconds)

    def _call(self, frame: int) -> _Call:
        if frame not in self._calls:
            ops = [self.trace.ops[op_id] for op_id in self.ops[frame]]
            made = [tuple(self._made_by(op.id)) for op in ops]
            sizes = {v: self.trace.values[v].size_bytes for values in made for v in values}
            released = [self.released.get(slot, len(self.trace.events)) for slot in self.slots[frame]]
            self._calls[frame] = _Call(
                reads=[tuple(dict.fromkeys(op.inputs)) for op in ops],
                made=made,
                sizes=sizes,
                made_bytes=[sum(sizes[v] for v in values) for values in made],
                scratch_bytes=[op.rerun_scratch_bytes for op in ops],
                last_release=max(released, default=-1),
            )
        return self._calls[frame]

    def _spent(
        self, path: str, frame: int, chosen: Recipe, ran: Sequence[Sequence[int]], seconds: float = 0.0
    ) -> float:
        """`seconds` and those of what runs again."""
        ops = self.ops[frame]
        for batch in ran:
            spent = 0.0
            for ordinal in batch:
                spent += self.trace.ops[ops[ordinal]].seconds
            seconds += spent
        for lent in chosen.lends:
            passing = leading_to(self.trace.programs[frame], chosen, lent)
            once = sum(self.trace.ops[ops[op]].seconds for op in passing)
            seconds += once * self.nesting.passes.get(path, 0)
        return seconds

    def _waits(
        self, frame: int, value_id: int, runs_at: Mapping[int, int], live: Callable[[float, int, int], None]
    ) -> None:
        """Tell `live` that a value is off the device until the frame's backward first wants it."""
        trace = self.trace
        value, end_of_step = trace.values[value_id], len(trace.events)
        slots = [s for s in self.slots[frame] if trace.saved[s].value == value_id]
        reads = [event for op, event in runs_at.items() if value_id in trace.ops[op].inputs]
        first = min([*(self.load[s] for s in slots if s in self.load), *reads], default=end_of_step)
        last = max([*(self.released.get(s, end_of_step) for s in slots if s in self.load), *reads], default=-1)
        end = self.freed.get(value_id, end_of_step)
        natural = end if value.natural_end is None else value.natural_end
        others = [self.released.get(s.id, end_of_step) for s in self.saved_of.get(value_id, ()) if s.frame != frame]
        gone = max(natural, self.exit[frame], *others, -1)
        live(-value.size_bytes, gone, end)
        live(value.size_bytes, max(first, gone) - 1, last)

    def _made_by(self, op_id: int) -> list[int]:
        return [v for v in self.trace.ops[op_id].outputs if v is not None and self.trace.values[v].producer == op_id]
