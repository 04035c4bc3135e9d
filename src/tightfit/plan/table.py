"""What each option of each unit does to the live bytes of the step, moment by moment.

Idea: the step's marks (one per op) are cut into segments where units begin and end. A unit's choice changes the
live bytes by an amount that is the same all through the segments of others, and that is known mark by mark in
its own.

Invariant: written without the referee (`plan.simulate`), which walks the same step in its own way. Refused: nothing;
a unit that cannot be planned has one option, which keeps everything.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tightfit.core import EventKind, Program, Trace, Unsupported
from tightfit.plan.effects import Effect, Effects
from tightfit.plan.effort import THOROUGH, Effort
from tightfit.plan.frontier import Frontier, Input, Point, frontier
from tightfit.plan.holders import counted_once, holding
from tightfit.plan.leaner import leaner, starts_of
from tightfit.plan.nest import Nesting
from tightfit.plan.program import leading_to, recipe, shared

Floats = np.ndarray[Any, np.dtype[np.float64]]

#: Of a unit's points, so many or not many more are also looked at with what they keep off the device.
_MOVED = 8


#: A kind of unit gets so many times its share of the points, so one of an eighth of the largest gets as many as that.
_SHARES = 8


#: Of the option that keeps everything.
_NOTHING = Effect(lives=(), spikes=(), apart=(), ran=(), seconds=0.0)


class Table(Effects):
    """The options of every unit of a trace, and what each does at each moment. Nothing here depends on the budget.

    One thing because every effect is told on the same marks and the same index of the trace.
    """

    def __init__(
        self,
        trace: Trace,
        effort: Effort = THOROUGH,
        nesting: Nesting | None = None,
        *,
        offload: bool = False,
        lean: bool = False,
        host_room_bytes: int | None = None,
    ) -> None:
        super().__init__(trace, nesting)
        self.effort, self.offload = effort, offload
        self.host_room_bytes = host_room_bytes  # what all units together may move; None: no limit
        self.base = self._base()
        self._cut()
        self.frontiers: dict[str, Frontier] = {}
        self.options: dict[str, tuple[Point | None, ...]] = {}  # None: keep everything, no engine in the unit
        known: dict[tuple[str, tuple[Input, ...]], Frontier] = {}
        shares = self._shares()
        for unit in trace.units:
            frames = self.frames_of[unit.path]
            points: tuple[Point | None, ...] = (None,)
            program = shared([trace.programs[f] for f in frames])
            if program is not None and not unit.pinned and program.needed:
                self.programs[unit.path] = program
                kind = unit.digest, self._held_inputs(unit.path)
                if kind not in known:
                    try:
                        many = self._many(program, shares[unit.digest], len(shares))
                        known[kind] = self._frontier(program, frames, many, kind[1])
                    except Unsupported:
                        known[kind] = Frontier(points=())
                self.frontiers[unit.path] = found = known[kind]
                choosable = found.points  # the last is the one that keeps the fewest values
                if found.barest is not None and found.barest not in choosable:
                    choosable += (found.barest,)
                if self.nesting.lends(unit.path):  # the engine has work there even if backward asks for nothing
                    points = choosable
                else:
                    points += tuple(p for p in choosable if self._replays(unit.path, p))
                if offload:  # before the plain points: the last is the one that keeps the fewest bytes
                    points = points[:1] + tuple(self._moved(unit.path)) + points[1:]
            self.options[unit.path] = points
        self.apart = self._apart()
        if lean:
            self._add_leaner()
        self._tabulate()

    def _add_leaner(self) -> None:
        """Give every unit options whose own backward holds less at its worst moment, before its last option."""
        alike: dict[tuple[str, int], list[str]] = defaultdict(list)
        for unit in self.trace.units:
            if unit.path in self.frontiers and self.frontiers[unit.path].points:
                alike[unit.digest, len(self.frames_of[unit.path])].append(unit.path)
        for paths in alike.values():
            # when the last of them runs backward, all others still hold what they keep
            last = paths[-1]
            found = self._leaner(last, others=len(paths) - 1, kinds=len(alike))
            for path in paths:
                options = self.options[path]
                more = tuple(p for p in found if p not in options and self._replays(path, p))
                self.options[path] = options[:-1] + more + options[-1:] if options[-1] is not None else options

    def _leaner(self, path: str, *, others: int, kinds: int) -> Sequence[Point]:
        """Looked for once for the unit, and for those that are alike where as many bytes are live around them."""
        shape, frontier = self._shape_of(path), self.frontiers[path]

        def found() -> list[Point]:
            worst = functools.partial(self._worst, path)
            return leaner(self.programs[path], frontier, worst, others=others, kinds=kinds)

        if shape is None:
            return found()
        (frame,), own = self.frames_of[path], self._own_marks(path)
        around = self.base[own] - sum(self.trace.static_bytes.values())
        seconds = tuple(self.trace.ops[op].seconds for op in self.ops[frame])
        key = tuple(starts_of(frontier)), others, kinds, around.tobytes(), bool(own.all()), seconds
        known = shape[0].leaner
        if key not in known:
            known[key] = found()
        return known[key]

    def _own_marks(self, path: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """The marks of the unit's own forward and backward."""
        own = np.zeros(len(self.marks), dtype=bool)
        for frame in self.frames_of[path]:
            for start, end in self.spans[frame]:
                own[start:end] = True
        return own

    def _apart(self) -> frozenset[int]:
        """Values that replays of several units may hold."""
        made = (v for v in self.readers if self.trace.values[v].producer is not None)
        readers = {v: len(self.readers[v] & self.programs.keys()) for v in made}
        return counted_once([value.size_bytes for value in self.trace.values], readers)

    def _base(self) -> Floats:
        """Live bytes at each mark of the step as it was recorded."""
        trace = self.trace
        change = np.zeros(len(trace.events) + 1)
        for i, event in enumerate(trace.events):
            if event.what is EventKind.ALLOC:
                change[i] += trace.values[event.subject].size_bytes
            elif event.what is EventKind.FREE:
                change[i] -= trace.values[event.subject].size_bytes
        live = np.cumsum(change) + sum(trace.static_bytes.values())
        scratch = np.array([trace.ops[trace.events[i].subject].scratch_bytes for i in self.marks])
        return np.asarray(live[self.marks] + scratch, dtype=np.float64) + self._not_kept()

    def _not_kept(self) -> Floats:
        """How the live bytes change at each mark because some unit inputs are not kept, and sweeps make them again."""
        trace = self.trace
        change = np.zeros(len(self.marks) + 1)
        stored_at = {unit: self._first_demand(unit) for unit in (link.user for link in self.nesting.links)}
        for sweep in self.nesting.advances:
            stored_at |= {unit: self._first_demand(sweep.target) for unit in sweep.stores}
        others: dict[int, int] = defaultdict(lambda: -1)
        borrowed = {link.value: link.user for link in self.nesting.links}
        for saved in trace.saved:
            user = borrowed.get(saved.value)
            if user is not None and (saved.frame is None or trace.frames[saved.frame].unit != user):
                others[saved.value] = max(others[saved.value], self.released.get(saved.id, len(trace.events)))
        for link in self.nesting.links:
            value = trace.values[link.value]
            end = self.freed.get(value.id, len(trace.events))
            natural = end if value.natural_end is None else value.natural_end
            gone, again = max(natural, others[value.id]), min(stored_at[link.user], end)
            if again > gone:
                change[self.mark_at[gone + 1]] -= value.size_bytes
                change[self.mark_at[again]] += value.size_bytes
        return np.asarray(np.cumsum(change)[: len(self.marks)])

    # -- one unit

    def _held_inputs(self, path: str) -> tuple[Input, ...]:
        """The values from outside that only replays of this unit would hold between its forward and its backward."""
        trace = self.trace
        found = []
        for frame in self.frames_of[path]:
            found += [
                Input(
                    size_bytes=trace.values[value_id].size_bytes,
                    read_by=frozenset(
                        ordinal for ordinal, op in enumerate(self.ops[frame]) if value_id in trace.ops[op].inputs
                    ),
                )
                for value_id in self._waiting_inputs(path, frame)
            ]
        return tuple(found)

    def _waiting_inputs(self, path: str, frame: int) -> list[int]:
        """Ids of values from outside that no other unit reads and that are gone, as the step was recorded, before the
        frame's backward first asks for a saved tensor."""
        trace = self.trace
        first = min((self.load[s] for s in self.slots[frame] if s in self.load), default=-1)
        borrowed = self.nesting.borrowed(path)
        return [
            value_id
            for value_id in dict.fromkeys(v for op in self.ops[frame] for v in trace.ops[op].inputs)
            if self.maker.get(value_id) != frame
            and trace.values[value_id].producer is not None
            and self.readers[value_id] == {path}
            and value_id not in borrowed
            and self.freed.get(value_id, len(trace.events)) < first
        ]

    def _shares(self) -> dict[str, float]:
        """Of each kind of unit, by digest: its part of the step's seconds, where the kind that has the most has 1."""
        seconds: dict[str, float] = defaultdict(float)
        for unit in self.trace.units:
            seconds[unit.digest] += sum(self.trace.ops[op].seconds for op in unit.op_ids)
        most = max(seconds.values(), default=0.0) or 1.0
        return {digest: each / most for digest, each in seconds.items()}

    def _many(self, program: Program, share: float, kinds: int) -> int:
        """How many points to look for in the frontier of a unit. Large units and many kinds (a mixture of experts
        routes differently in each) get fewer points. So does a kind that has little of the step beside the others:
        what its points are apart is little, too."""
        points = self.effort.points
        of_its_share = math.ceil(_SHARES * points * share)
        return max(min(12, points), min(points, 8000 // max(1, len(program.steps)), 800 // kinds, of_its_share))

    def _frontier(self, program: Program, frames: Sequence[int], many: int, inputs: tuple[Input, ...]) -> Frontier:
        """The frontier of a unit over all its calls, with about `many` points."""
        trace = self.trace
        sizes = [sum(trace.values[self.values[f][v]].size_bytes for f in frames) for v in range(program.values)]
        seconds = [sum(trace.ops[self.ops[f][i]].seconds for f in frames) for i in range(len(program.steps))]
        return _found(program, tuple(sizes), tuple(seconds), many, inputs)

    def _moved(self, path: str) -> Iterator[Point]:
        """Points of the unit with its inputs, with what it keeps, or with both waiting off the device."""
        program, points = self.programs[path], self.frontiers[path].points
        inputs = self._movable_inputs(path)
        for point in points[:: max(1, -(-len(points) // _MOVED))]:
            runs = self._recipe(path, point).runs
            again = {v for op in runs for v in program.steps[op].writes}
            kept = point.kept - again - self.nesting.lends(path) - set(program.held)
            for away, inputs_away in ((frozenset(), inputs), (kept, frozenset()), (kept, inputs)):
                if away or inputs_away:
                    yield dataclasses.replace(point, away=frozenset(away), inputs_away=frozenset(inputs_away))

    def _movable_inputs(self, path: str) -> frozenset[int]:
        """Which inputs may wait off the device, by place: those that are made in the step and that no other unit holds
        for backward."""
        trace = self.trace
        holders: dict[int, set[str]] = defaultdict(set)
        for saved in trace.saved:
            holders[saved.value].add("" if saved.frame is None else trace.frames[saved.frame].unit)
        frames = [trace.frames[f] for f in self.frames_of[path]]
        borrowed = self.nesting.borrowed(path)
        return frozenset(
            place
            for place in range(min(len(frame.inputs) for frame in frames))
            if all(
                trace.values[v].producer is not None and holders[v] <= {path} and v not in borrowed
                for v in (frame.inputs[place] for frame in frames)
            )
        )

    # -- all units, cut into segments

    def _cut(self) -> None:
        """Cut the step's marks into segments, where units begin and end, and where autocast lets go of its copies."""
        trace = self.trace
        ends = (trace.values[v].natural_end for casts in self.casts_of.values() for v in casts)
        cuts = {0, *(int(self.mark_at[end + 1]) for end in ends if end is not None)}
        self.spans: dict[int, list[tuple[int, int]]] = {}
        for frame in trace.frames:
            forward = (int(self.mark_at[self.enter[frame.id]]), int(self.mark_at[self.exit[frame.id]]))
            touched = [
                i for s in self.slots[frame.id] for i in (self.load.get(s), self.released.get(s)) if i is not None
            ]
            self.spans[frame.id] = [forward]
            if touched:
                self.spans[frame.id].append((int(self.mark_at[min(touched)]), int(self.mark_at[max(touched)]) + 1))
            for start, end in self.spans[frame.id]:
                cuts |= {start, end}
        self.starts = np.array(sorted(c for c in cuts if c < len(self.marks)), dtype=np.int64)
        self.base_top = np.maximum.reduceat(self.base, self.starts)

    def _tabulate(self) -> None:
        """Fill `table[unit][option, segment]`: the bytes that the option adds to the segment's fullest mark."""
        # each sweep has a row of its own: the live bytes just before it, and what the largest unit on the way adds
        sweeps = self._sweeps()
        before = [mark for mark, _ in sweeps]
        self.away_bytes: dict[str, list[int]] = {}  # that each option moves
        self.table: dict[str, Floats] = {}
        self.seconds: dict[str, list[float]] = {}
        held: dict[str, list[dict[int, tuple[int, int]]]] = {}
        for path, options in self.options.items():
            effects = [_NOTHING if option is None else self._effect(path, option) for option in options]
            self.table[path] = self._rows(path, effects, before)
            held[path] = [self._held_apart(effect) for effect in effects]
            self.seconds[path] = [effect.seconds for effect in effects]
            self.away_bytes[path] = [self._moved_bytes(path, option) for option in options]
        self.base_top = np.concatenate([self.base_top, [self.base[mark] + top for mark, top in sweeps]])
        firsts = np.concatenate([self.starts, np.array(before, dtype=np.int64)])
        lasts = np.concatenate([self.starts[1:] - 1, [len(self.marks) - 1], np.array(before, dtype=np.int64)])
        self.holding = holding(held, [value.size_bytes for value in self.trace.values], firsts, lasts)

    def _held_apart(self, effect: Effect) -> dict[int, tuple[int, int]]:
        """The values of `apart` that an option holds, with the first and the last mark."""
        found: dict[int, tuple[int, int]] = {}
        for value_id, after, until in effect.apart:
            first, last = found.get(value_id, (len(self.marks), -1))
            found[value_id] = min(first, int(self.mark_at[after + 1])), max(last, int(self.mark_at[until]))
        return found

    def _rows(self, path: str, effects: Sequence[Effect], before: Sequence[int]) -> Floats:
        """A row for each of the effects of a unit's options.

        Outside the unit's own segments the live bytes change at few marks, and in between they stay as they are. So the
        marks at which segments begin, the unit's own, and those at which something changes are all that are looked at.
        """
        own = self._own_segments(path)
        mine = [np.arange(start, end) for frame in self.frames_of[path] for start, end in self.spans[frame]]
        ends = np.append(self.starts[1:], len(self.marks))
        mine += [np.arange(self.starts[i], ends[i]) for i in np.nonzero(own)[0]]
        lives = [(place, *life) for place, effect in enumerate(effects) for life in effect.lives]
        places, sizes, after, until = np.array(lives, dtype=np.int64).reshape(-1, 4).T
        begin, end = self.mark_at[after + 1], self.mark_at[until]
        peaks = [self.mark_at[event] for effect in effects for event, _ in effect.spikes]
        looked = np.unique(np.concatenate([self.starts, *mine, begin, end, peaks, before]).astype(np.int64))
        change = np.zeros((len(effects), len(looked)))
        np.add.at(change, (places, np.searchsorted(looked, begin)), sizes)
        np.add.at(change, (places, np.searchsorted(looked, end)), -sizes)
        delta = np.cumsum(change, axis=1)
        # what is behind the last mark is nowhere
        delta = delta[:, : int(np.searchsorted(looked, len(self.marks)))]
        segments = np.searchsorted(looked, self.starts)
        rows = np.maximum.reduceat(delta, segments, axis=1)
        # in the unit's own segments the change differs from mark to mark: take the fullest mark with the change
        base = self.base[looked[: delta.shape[1]]]
        together = np.maximum.reduceat(base + delta, segments, axis=1) - self.base_top
        rows = np.where(own, together, rows)
        for place, effect in enumerate(effects):
            for event, top in effect.spikes:
                mark = int(self.mark_at[event])
                segment = int(np.searchsorted(self.starts, mark, side="right")) - 1
                # live just before the replay begins, plus all that it leaves, plus what it adds for a while
                live = self._just_before(mark, float(delta[place, np.searchsorted(looked, mark)]))
                rows[place, segment] = max(rows[place, segment], live + top - self.base_top[segment])
        return np.concatenate([rows, delta[:, np.searchsorted(looked, before)]], axis=1)

    def _moved_bytes(self, path: str, option: Point | None) -> int:
        if option is None:
            return 0
        moved = (v for f in self.frames_of[path] for v in self._away(path, f, option))
        return sum(self.trace.values[v].size_bytes for v in moved)

    def _sweeps(self) -> list[tuple[int, float]]:
        """For each sweep: (the mark just before it, the most bytes that it adds for a while)."""
        units = [unit.path for unit in self.trace.units]
        tops = {link.unit: self._passing_bytes(link.unit) for link in self.nesting.links}
        found = []
        for sweep in self.nesting.advances:
            way = units[units.index(sweep.base) : units.index(sweep.target)]
            mark = int(self.mark_at[self._first_demand(sweep.target)])
            found.append((max(0, mark - 1), max(tops.get(path, 0.0) for path in way)))
        return found

    def _first_demand(self, path: str) -> int:
        """Event at which the unit's backward first asks for a saved tensor."""
        loads = [self.load[s] for f in self.frames_of[path] for s in self.slots[f] if s in self.load]
        return min(loads, default=len(self.trace.events) - 1)

    def _passing_bytes(self, path: str) -> float:
        """The most bytes that running through a unit adds when it keeps nothing, its input and output included."""
        trace, (frame,) = self.trace, self.frames_of[path]
        program = self.programs[path]
        lends = self.nesting.lends(path)
        chosen = recipe(program, frozenset(program.held) - lends, lends)
        (lent,) = lends
        order = [self.ops[frame][op] for op in leading_to(program, chosen, lent)]
        last = {v: op for op in order for v in trace.ops[op].inputs}
        level = sum(trace.values[v].size_bytes for v in self.nesting.borrowed(path))
        top = level
        for number in order:
            op = trace.ops[number]
            level += sum(trace.values[v].size_bytes for v in self._made_by(number))
            casts = self.casts_of[frame].keys() & set(op.inputs)
            top = max(top, level + op.rerun_scratch_bytes + sum(trace.values[v].size_bytes for v in casts))
            inputs = dict.fromkeys(v for v in op.inputs if v not in casts)
            mine = [v for v in inputs if last[v] == number and self.maker.get(v) == frame]
            level -= sum(trace.values[v].size_bytes for v in mine if trace.values[v].ordinal != lent)
        return float(top)

    def _worst(self, path: str, kept: frozenset[int], others: int) -> tuple[float, float]:
        """Of a unit that keeps `kept`: the most bytes above the static ones during its own forward and backward, while
        `others` units hold what it holds outside of those; and the seconds of its replays.

        Raises `Unsupported` for a set that cannot be.
        """
        effect = self._worked_out(path, Point(kept=kept, kept_bytes=0, seconds=0.0, passed_bytes=1))
        change = np.zeros(len(self.marks) + 1)
        held = [(self.trace.values[value_id].size_bytes, after, until) for value_id, after, until in effect.apart]
        for size, after, until in (*effect.lives, *held):
            change[self.mark_at[after + 1]] += size
            change[self.mark_at[until]] -= size
        change = np.cumsum(change)[: len(self.marks)]
        own = self._own_marks(path)
        outside = float(change[~own].min(initial=0.0))
        most = float((self.base + change)[own].max(initial=0.0))
        for event, top in effect.spikes:
            mark = self.mark_at[event]
            most = max(most, self._just_before(mark, change[mark]) + top)
        return most - sum(self.trace.static_bytes.values()) + others * outside, effect.seconds

    def tightest(self) -> dict[str, int]:
        """Of each unit the option that leaves the lowest peak in its own backward while all others hold as much. One
        that keeps a little more than the fewest may need far less there.

        Returns: unit path -> index of its option.
        """
        known: dict[tuple[str, tuple[Point | None, ...]], int] = {}
        for unit in reversed(self.trace.units):
            kind = unit.digest, self.options[unit.path]
            if kind not in known:
                known[kind] = self._tightest(unit.path)
        return {unit.path: known[unit.digest, self.options[unit.path]] for unit in self.trace.units}

    def _tightest(self, path: str) -> int:
        others = len(self.trace.units) - 1
        worst = [
            math.inf if point is None else self._worst(path, point.kept, others)[0] for point in self.options[path]
        ]
        return min(range(len(worst)), key=lambda index: (worst[index], -index))

    def _just_before(self, mark: int, change: float) -> float:
        """Live bytes when a replay begins, with the values that it will leave behind: the live bytes of the mark that
        reads them, without what that mark's op itself makes and holds."""
        scratch = self.trace.ops[self.trace.events[self.marks[mark]].subject]
        made = sum(
            self.trace.values[v].size_bytes
            for v in scratch.outputs
            if v is not None and self.trace.values[v].producer == scratch.id
        )
        return float(self.base[mark] + change - scratch.scratch_bytes - made)

    def _own_segments(self, path: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
        own = np.zeros(len(self.starts), dtype=bool)
        for frame in self.frames_of[path]:
            for start, end in self.spans[frame]:
                own |= (self.starts >= start) & (self.starts < end)
        return own

    # -- the integer program


@functools.lru_cache(maxsize=256)
def _found(
    program: Program, sizes_bytes: tuple[int, ...], seconds: tuple[float, ...], many: int, inputs: tuple[Input, ...]
) -> Frontier:
    """Solved once for a trace and for what a lever makes of it, which leaves the units as they are."""
    return frontier(program, sizes_bytes, seconds, many, inputs)
