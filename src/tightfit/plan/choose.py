"""Choose one point of its frontier for each unit, so that the whole step fits: an integer program over the units.

Idea: the live bytes of the step are looked at after each of its ops. Such a moment is a *mark*. The marks are cut into
segments wherever a unit's forward or backward begins or ends. (These segments are stretches of the whole step, other
than those of `plan.segments`.) A unit's choice changes the live bytes. In the segments of other units the change is the
same at every mark of a segment. In the unit's own segments the change is known mark by mark. So one linear constraint
for each segment is enough to say that the peak stays under the budget.

Invariant: a choice that satisfies the constraints stays under the budget as this model counts bytes. The model is
simpler than the step, so the caller asks the referee (`plan.simulate`) whether the choice holds. The bound comes from a
relaxation. In it a unit never needs more bytes than any of its kept sets of about the same seconds would need, so no
plan of this kind takes fewer seconds than the bound.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tightfit.core import Action, Choice, EventKind, Program, Saved, Trace, Unsupported
from tightfit.device.cost import copy_lanes
from tightfit.plan import lagrange, solver
from tightfit.plan.frontier import MANY, Frontier, Point, frontier
from tightfit.plan.nest import Nesting
from tightfit.plan.program import Recipe, demanded, dropped_slots, first_random, leading_to, reads_copy, recipe, shared
from tightfit.plan.solver import MixedProgram, Verdict

Floats = np.ndarray[Any, np.dtype[np.float64]]

SOLVER_SECONDS = 2.0

#: The name of the way in which options are chosen where the solver has no answer.
LAGRANGE = "Lagrangian prices"

#: Where the peak is minimised, a second weighs this much against it, so that the faster of equally low choices wins.
_TIE = 1e-6

#: Bytes weigh this much against seconds, so that every release of the solver prefers the same of equally fast choices.
_HAIR = 1e-7

#: About so many of a unit's points are also tried with the kept values off the device.
_MOVED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long to look for a plan. A plan found with less effort is as right, but may recompute more than it must."""

    points: int = MANY  # of a unit's frontier, or not many more
    solver_seconds: float = SOLVER_SECONDS  # for each choice across the units
    proves: bool = True  # also look for the bound


THOROUGH = Effort()


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    points: Mapping[str, int]  # unit path -> index of its point; -1: keep everything
    seconds: float
    bound_seconds: float
    how: frozenset[str] = frozenset()  # by which ways the points were found and chosen


class Model:
    """What planning needs to know of a trace, apart from the budget."""

    def __init__(
        self, trace: Trace, effort: Effort = THOROUGH, nesting: Nesting | None = None, *, offload: bool = False
    ) -> None:
        self.trace, self.effort, self.offload = trace, effort, offload
        self.nesting = nesting or Nesting(links=(), advances=(), passes={})
        self._index()
        self.base = self._base()
        self.programs: dict[str, Program] = {}  # of units that can be planned: one for all calls
        self.frontiers: dict[str, Frontier] = {}
        self.options: dict[str, tuple[Point | None, ...]] = {}  # None: keep everything, no engine in the unit
        known: dict[str, Frontier] = {}
        kinds = len({unit.digest for unit in trace.units})
        for unit in trace.units:
            frames = self.frames_of[unit.path]
            points: tuple[Point | None, ...] = (None,)
            program = shared([trace.programs[f] for f in frames])
            if program is not None and not unit.pinned and program.needed:
                self.programs[unit.path] = program
                if unit.digest not in known:
                    try:
                        known[unit.digest] = self._frontier(program, frames, kinds)
                    except Unsupported:
                        known[unit.digest] = Frontier(points=())
                self.frontiers[unit.path] = known[unit.digest]
                if self.nesting.lends(unit.path):  # the engine has work there even if backward asks for nothing
                    points = known[unit.digest].points
                else:
                    points += tuple(p for p in known[unit.digest].points if self._replays(unit.path, p))
                if offload:  # before the plain points: the last is the one that keeps the fewest bytes
                    points = points[:1] + tuple(self._moved(unit.path)) + points[1:]
            self.options[unit.path] = points
        self._tabulate()

    # -- the trace, indexed

    def _index(self) -> None:
        trace = self.trace
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
        self.maker: dict[int, int] = {}
        for value in trace.values:
            if value.producer is not None and value.ordinal is not None:
                frame_id = trace.ops[value.producer].frame
                assert frame_id is not None
                self.values[frame_id][value.ordinal] = value.id
                self.maker[value.id] = frame_id
        end_of_step = len(trace.events)
        for saved in trace.saved:
            if saved.value in self.maker and self.maker[saved.value] != saved.frame:
                end = self.released.get(saved.id, end_of_step)
                self.kept_elsewhere[saved.value] = max(self.kept_elsewhere.get(saved.value, -1), end)

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

    def _frontier(self, program: Program, frames: Sequence[int], kinds: int) -> Frontier:
        """The frontier of a unit over all its calls. `kinds` frontiers have to be found in all, so each gets fewer
        points where they are many."""
        trace = self.trace
        sizes = [sum(trace.values[self.values[f][v]].size_bytes for f in frames) for v in range(program.values)]
        seconds = [sum(trace.ops[self.ops[f][i]].seconds for f in frames) for i in range(len(program.steps))]
        # large units and many different ones (a mixture of experts routes differently in each) get fewer points
        many = max(
            min(12, self.effort.points), min(self.effort.points, 8000 // max(1, len(program.steps)), 800 // kinds)
        )
        return _found(program, tuple(sizes), tuple(seconds), many)

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

    def _effect(self, path: str, point: Point) -> tuple[Floats, list[tuple[int, float]], float]:
        """What choosing `point` does: the change of live bytes at every mark; the spikes (mark, bytes), which replays
        add for a while on top of everything else at that mark; and the seconds of the replays."""
        trace = self.trace
        change = np.zeros(len(self.marks) + 1)
        spikes: list[tuple[int, float]] = []
        seconds = 0.0
        end_of_step = len(trace.events)

        def live(size: float, after: int, until: int) -> None:
            """`size` more bytes at the marks between the events `after` and `until`."""
            if until > after:
                change[self.mark_at[after + 1]] += size
                change[self.mark_at[until]] -= size

        state_bytes = trace.random_state_bytes
        for frame, chosen in self._recipes(path, point).items():
            values = self.values[frame]
            program = trace.programs[frame]
            loads = sorted((self.load[s], i) for i, s in self._dropped_slots(path, frame, chosen) if s in self.load)
            event_of = {i: event for event, i in loads}
            batches = [(event_of[i], ops) for i, ops in demanded(program, chosen, tuple(i for _, i in loads))]
            last_release = max((self.released.get(s, end_of_step) for s in self.slots[frame]), default=-1)
            away = self._away(path, frame, point)
            brought = self.nesting.borrowed(path) | away
            # what dropped saved tensors held is freed at once; what is made again is freed with the last of them
            until: dict[int, int] = {}
            for ordinal, slot in self._dropped_slots(path, frame, chosen):
                value = trace.values[values[program.slots[ordinal]]]
                if trace.saved[slot].read:
                    until[value.id] = max(until.get(value.id, -1), self.released.get(slot, end_of_step))
                else:
                    until.setdefault(value.id, -1)
            for value_id in until:
                value = trace.values[value_id]
                end = self.freed.get(value_id, end_of_step)
                natural = end if value.natural_end is None else value.natural_end
                live(-value.size_bytes, max(natural, self.kept_elsewhere.get(value_id, -1)), end)
            runs_at = {self.ops[frame][op]: event for event, ops in batches for op in ops}
            made = {v for op in chosen.runs for v in self._made_by(self.ops[frame][op])}
            held: dict[int, int] = {}
            last_read: dict[int, int] = {}
            for ordinal in chosen.runs:
                op_id = self.ops[frame][ordinal]
                for value_id in trace.ops[op_id].inputs:
                    own = trace.values[value_id].ordinal if value_id in made else None
                    if own is not None and reads_copy(program.steps[ordinal], chosen, own):
                        if op_id != trace.values[value_id].producer:
                            last_read[value_id] = max(last_read.get(value_id, -1), runs_at.get(op_id, -1))
                    elif trace.values[value_id].producer is not None and value_id not in brought:
                        held[value_id] = max(held.get(value_id, -1), runs_at.get(op_id, last_release))
            for value_id, event in held.items():
                end = self.freed.get(value_id, end_of_step)
                live(trace.values[value_id].size_bytes, end, event)
            for value_id in away:
                self._waits(frame, value_id, runs_at, live)
            for event, ops in batches:
                top, left, spent = self._run_again(frame, ops, event, until, last_read)
                for value_id in left:
                    end = max(until.get(value_id, -1), last_read.get(value_id, -1))
                    live(trace.values[value_id].size_bytes, event - 1, end)
                spikes.append((int(self.mark_at[event]), top + (state_bytes if chosen.states else 0)))
                seconds += spent
            drawn = first_random(program)
            if drawn is not None:
                extra = len(chosen.states | {drawn}) * state_bytes
                live(extra, self.enter[frame], self.exit[frame])
                live(len(chosen.states) * state_bytes, self.exit[frame], batches[-1][0] if batches else last_release)
            for lent in chosen.lends:
                passing = leading_to(program, chosen, lent)
                once = sum(trace.ops[self.ops[frame][op]].seconds for op in passing)
                seconds += once * self.nesting.passes.get(path, 0)
        return np.cumsum(change)[: len(self.marks)], spikes, seconds

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

    def _run_again(
        self, frame: int, ops: Sequence[int], event: int, until: Mapping[int, int], last_read: Mapping[int, int]
    ) -> tuple[float, list[int], float]:
        """What the ops do that run before `event`: (the most bytes that they add for a while beyond the values that
        they leave, those values, the ops' seconds)."""
        trace = self.trace
        left: list[int] = []
        passing: dict[int, int] = {}  # value -> last op of this batch that reads it
        for ordinal in ops:
            op_id = self.ops[frame][ordinal]
            for value_id in trace.ops[op_id].inputs:
                if value_id in passing:
                    passing[value_id] = op_id
            for value_id in self._made_by(op_id):
                if max(until.get(value_id, -1), last_read.get(value_id, -1)) > event:
                    left.append(value_id)
                else:
                    passing[value_id] = op_id
        level = top = seconds = 0.0
        for ordinal in ops:
            op = trace.ops[self.ops[frame][ordinal]]
            level += sum(trace.values[v].size_bytes for v in self._made_by(op.id))
            top = max(top, level + op.scratch_bytes)
            level -= sum(trace.values[v].size_bytes for v, last in passing.items() if last == op.id)
            seconds += op.seconds
        return top - level, left, seconds

    # -- all units, cut into segments

    def _tabulate(self) -> None:
        """Fill `table[unit][option, segment]`: the bytes that the option adds to the segment's fullest mark."""
        trace = self.trace
        cuts = {0}
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
        # each sweep has a row of its own: the live bytes just before it, and what the largest unit on the way adds
        sweeps = self._sweeps()
        before = [mark for mark, _ in sweeps]
        self.away_bytes: dict[str, list[int]] = {}  # that each option moves
        self.table: dict[str, Floats] = {}
        self.seconds: dict[str, list[float]] = {}
        for path, options in self.options.items():
            rows, spent, moved = [], [], []
            own = self._own_segments(path)
            for option in options:
                moved.append(self._moved_bytes(path, option))
                if option is None:
                    rows.append(np.zeros(len(self.starts) + len(sweeps)))
                    spent.append(0.0)
                    continue
                delta, spikes, seconds = self._effect(path, option)
                # in the unit's own segments the change differs from mark to mark: take the fullest mark with the change
                row = np.maximum.reduceat(delta, self.starts)
                together = np.maximum.reduceat(self.base + delta, self.starts) - self.base_top
                row = np.where(own, together, row)
                for mark, top in spikes:
                    segment = int(np.searchsorted(self.starts, mark, side="right")) - 1
                    # live just before the replay begins, plus all that it leaves, plus what it adds for a while
                    row[segment] = max(row[segment], self._just_before(mark, delta) + top - self.base_top[segment])
                rows.append(np.concatenate([row, delta[before]]))
                spent.append(seconds)
            self.table[path] = np.array(rows)
            self.seconds[path] = spent
            self.away_bytes[path] = moved
        self.base_top = np.concatenate([self.base_top, [self.base[mark] + top for mark, top in sweeps]])

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
            top = max(top, level + op.scratch_bytes)
            mine = [v for v in dict.fromkeys(op.inputs) if last[v] == number and self.maker.get(v) == frame]
            level -= sum(trace.values[v].size_bytes for v in mine if trace.values[v].ordinal != lent)
        return float(top)

    def _just_before(self, mark: int, delta: Floats) -> float:
        """Live bytes when a replay begins, with the values that it will leave behind: the live bytes of the mark that
        reads them, without what that mark's op itself makes and holds."""
        scratch = self.trace.ops[self.trace.events[self.marks[mark]].subject]
        made = sum(
            self.trace.values[v].size_bytes
            for v in scratch.outputs
            if v is not None and self.trace.values[v].producer == scratch.id
        )
        return float(self.base[mark] + delta[mark] - scratch.scratch_bytes - made)

    def _own_segments(self, path: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
        own = np.zeros(len(self.starts), dtype=bool)
        for frame in self.frames_of[path]:
            for start, end in self.spans[frame]:
                own |= (self.starts >= start) & (self.starts < end)
        return own

    # -- the integer program

    def peak_bytes(self, points: Mapping[str, int]) -> int:
        """The peak when these options are chosen, as the model computes it. `points`: unit path -> index of its
        option."""
        return int((self.base_top + sum(self.table[path][index] for path, index in points.items())).max())

    def solve(self, budget_bytes: int | None, *, proves: bool = True) -> Solution | None:
        """The cheapest options within the budget; with `None` as the budget, the options of the lowest peak. The answer
        is None when nothing fits.

        With `proves=False` no bound is looked for.
        """
        answer = self._solve(budget_bytes, self.table)
        if answer is None:
            return None
        how = frozenset({answer.how}).union(*(found.how for found in self.frontiers.values()))
        if budget_bytes is None:
            return Solution(points=answer.chosen, seconds=answer.seconds, bound_seconds=0.0, how=how)
        bound = min(answer.bound, answer.seconds)
        if not (proves and self.effort.proves) or self.offload:
            bound = 0.0
        elif answer.seconds > 0:
            relaxed = self._solve(budget_bytes, self._relaxed())
            bound = 0.0 if relaxed is None else min(relaxed.bound, answer.seconds)
        return Solution(points=answer.chosen, seconds=answer.seconds, bound_seconds=bound, how=how)

    def _relaxed(self) -> dict[str, Floats]:
        """A table for the bound: for each option, bytes that are nowhere above those of any kept set with at least the
        option's seconds.

        Inside its own segments a unit lacks, at most, the values that backward has not yet asked for and those that it
        has already let go of. Outside them it also holds its kept bytes, except those of values that are there anyway
        or are not made yet.
        """
        tables = {}
        for path, options in self.options.items():
            rows = []
            own = self._own_segments(path)
            lacking = self._least_inside(path)
            inside = np.maximum.reduceat(self.base + lacking, self.starts) - self.base_top[: len(self.starts)]
            absent = self._absent(path)
            points = self.frontiers[path].points if path in self.frontiers else ()
            for option in options:
                # keeping everything stands for the fastest point, and so for the sets between that and the next
                point = option or next(iter(points), None)
                row = np.zeros(len(self.base_top))
                if point is not None:
                    holds = np.maximum(0.0, point.kept_bytes - point.passed_bytes - absent)
                    row[: len(self.starts)] = np.where(own, inside, np.minimum.reduceat(lacking + holds, self.starts))
                    row[len(self.starts) :] = lacking.min()
                rows.append(row if option is not None else np.minimum(row, 0.0))
            tables[path] = np.array(rows)
        return tables

    def _least_inside(self, path: str) -> Floats:
        """At every mark, a lower bound of the change of live bytes there: the change if everything that the unit could
        drop were dropped.

        From its first read to its last release in backward a value is live, whether it was kept or made again.
        """
        trace = self.trace
        change = np.zeros(len(self.marks) + 1)
        end_of_step = len(trace.events)
        for frame in self.frames_of[path]:
            held = set(self.programs[path].held) if path in self.programs else set(trace.programs[frame].held)
            reads: dict[int, tuple[int, int]] = {}
            for slot in self.slots[frame]:
                value = trace.values[trace.saved[slot].value]
                if self.maker.get(value.id) != frame or value.ordinal in held:
                    continue
                first, last = reads.get(value.id, (end_of_step, -1))
                if slot in self.load:
                    first, last = min(first, self.load[slot]), max(last, self.released.get(slot, end_of_step))
                reads[value.id] = first, last
            for value_id, (first, last) in reads.items():
                value = trace.values[value_id]
                end = self.freed.get(value_id, end_of_step)
                natural = end if value.natural_end is None else value.natural_end
                gone = max(natural, self.kept_elsewhere.get(value_id, -1))
                for start, stop in ((gone, min(first, end)), (max(gone, last), end)):
                    if stop > start:
                        change[self.mark_at[start + 1]] -= value.size_bytes
                        change[self.mark_at[stop]] += value.size_bytes
        return np.asarray(np.cumsum(change)[: len(self.marks)])

    def _absent(self, path: str) -> Floats:
        """At every mark, the bytes of values that the unit could keep but whose keeping adds nothing there: Python or
        another frame holds them anyway, they are not made yet, or their backward has begun."""
        trace = self.trace
        change = np.zeros(len(self.marks) + 1)
        for frame in self.frames_of[path] if path in self.programs else ():
            program = self.programs[path]
            loads = [self.load[slot] for slot in self.slots[frame] if slot in self.load]
            read = {value for step in program.steps for value in step.reads}.union(program.needed)
            for ordinal in read.difference(program.held):
                value = trace.values[self.values[frame][ordinal]]
                change[0] += value.size_bytes
                end = self.freed.get(value.id, len(trace.events))
                natural = end if value.natural_end is None else value.natural_end
                gone = max(natural, self.kept_elsewhere.get(value.id, -1))
                stop = min(loads, default=-1)
                if stop > gone:
                    change[self.mark_at[gone + 1]] -= value.size_bytes
                    change[self.mark_at[stop]] += value.size_bytes
        return np.asarray(np.cumsum(change)[: len(self.marks)])

    def _solve(self, budget_bytes: int | None, table: Mapping[str, Floats]) -> _Found | None:
        """The cheapest options by `table`; without a budget, the options of the lowest peak. The answer is None when
        nothing fits, or when nothing was found in time."""
        paths = list(self.options)
        columns = [(path, i) for path in paths for i in range(len(self.options[path]))]
        groups: list[slice] = []
        for path in paths:
            start = groups[-1].stop if groups else 0
            groups.append(slice(start, start + len(self.options[path])))
        unit_seconds = np.array([self.seconds[path][i] for path, i in columns])
        usage = np.array([table[path][i] for path, i in columns]).T if columns else np.zeros((len(self.base_top), 0))
        away = np.array([self.away_bytes[path][i] for path, i in columns], dtype=np.float64)
        lanes = copy_lanes(self.trace) if away.any() else ()
        rows = list(range(len(self.base_top)))
        room = np.full(len(rows), np.inf)
        if budget_bytes is not None:
            least = self.base_top + sum((table[path].min(axis=0) for path in paths), np.zeros(len(rows)))
            if (least > budget_bytes).any():
                return None
            room = budget_bytes - self.base_top
            worst = self.base_top + sum((table[path].max(axis=0) for path in paths), np.zeros(len(rows)))
            rows = _undominated(usage, room, [s for s in rows if worst[s] > budget_bytes])
        usage, room = usage[rows], room[rows]

        second_scale = float(max(unit_seconds.max(), 1e-12)) if columns else 1.0
        costs = unit_seconds / second_scale
        if table is self.table and usage.size:  # not for the bound, where a hair would be one too many
            costs = costs + _HAIR * (usage.mean(axis=0) - usage.mean(axis=0).min()) / max(1.0, np.ptp(usage))
        program = self._program(budget_bytes, usage, room, rows, costs, groups)
        waits = [(lane.bytes_per_second * second_scale, lane.beside_seconds / second_scale) for lane in lanes]
        answer = solver.solve(
            _with_lanes(program, away, waits, 1.0 if budget_bytes is not None else _TIE),
            seconds=self.effort.solver_seconds,
            gap=1e-4 if budget_bytes is None else 0.0,
            attainable=budget_bytes is None,
        )
        chosen, bound, how = None, max(0.0, answer.bound) * second_scale, answer.how
        if answer.values is not None:
            chosen = [group.start + int(np.argmax(answer.values[group])) for group in groups]
        if answer.verdict is not Verdict.OPTIMAL:
            # the seconds as if no copy ran beside the compute
            priced = unit_seconds + sum((away / lane.bytes_per_second for lane in lanes), np.zeros(len(columns)))
            top = self.base_top[rows] if budget_bytes is None else -room
            ours, proven = _by_prices(priced, usage, top, groups, answer.verdict, lowest=budget_bytes is None)
            bound = bound if lanes else max(bound, proven)

            def cost(columns: list[int]) -> float:
                if budget_bytes is None:
                    return float((top + usage[:, columns].sum(axis=1)).max())
                return float(priced[columns].sum())

            if ours is not None and (chosen is None or cost(ours) < cost(chosen)):
                chosen, how = ours, LAGRANGE
        if chosen is None:
            return None
        points = {columns[c][0]: columns[c][1] for c in chosen}
        return _Found(chosen=points, seconds=float(unit_seconds[chosen].sum()), bound=bound, how=how)

    def _program(
        self,
        budget_bytes: int | None,
        usage: Floats,
        room: Floats,
        rows: Sequence[int],
        costs: Floats,
        groups: Sequence[slice],
    ) -> MixedProgram:
        """The integer program: a column for each option and a row for each moment; one option must be chosen for each
        unit. Without a budget a last column stands for the peak."""
        scale = solver.scale_of(float(np.abs(usage).max(initial=0.0)))
        lowest = budget_bytes is None
        count = len(costs) + lowest
        peak = [count - 1] if lowest else []
        table: list[tuple[list[int], list[float]]] = []
        high: list[float] = []
        for place, segment in enumerate(rows):
            nonzero = [int(column) for column in np.nonzero(usage[place])[0]]
            amounts = [float(usage[place][column]) / scale for column in nonzero]
            table.append(([*nonzero, *peak], [*amounts, *(-1.0 for _ in peak)]))
            high.append(-self.base_top[segment] / scale if lowest else room[place] / scale)
        for group in groups:
            table.append((list(range(group.start, group.stop)), [1.0] * (group.stop - group.start)))
        upper = np.ones(count)
        upper[len(costs) :] = np.inf
        return MixedProgram.of(
            table,
            row_low=[-np.inf] * len(rows) + [1.0] * len(groups),
            row_high=high + [1.0] * len(groups),
            costs=np.append(costs * _TIE, 1.0) if lowest else costs,
            lower=np.zeros(count),
            upper=upper,
            integer=np.arange(count) < len(costs),
        )

    # -- the answer as data

    def choices(self, points: Mapping[str, int]) -> tuple[Choice, ...]:
        """The chosen options as `Choice`s. `points`: unit path -> index of its option."""
        return tuple(self._choice(path, self.options[path][index]) for path, index in points.items())

    def _choice(self, path: str, point: Point | None) -> Choice:
        unit = next(u for u in self.trace.units if u.path == path)
        program = self.programs.get(path, self.trace.programs[self.frames_of[path][0]])
        kept = range(program.values) if point is None else point.kept
        away, inputs = (frozenset(), frozenset()) if point is None else (point.away, point.inputs_away)
        choice = Choice(
            unit=path,
            actions=tuple(
                (Action.OFFLOAD if v in away else Action.KEEP) if v in kept else Action.RECOMPUTE
                for v in range(program.values)
            ),
            signature=unit.signature,
            program=unit.digest,
            inputs=tuple(Action.OFFLOAD if k in inputs else Action.KEEP for k in range(max(inputs, default=-1) + 1)),
        )
        return self.nesting.on(choice)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    chosen: Mapping[str, int]  # unit path -> index of its option
    seconds: float
    bound: float
    how: str


def _by_prices(
    seconds: Floats, usage: Floats, top: Floats, groups: Sequence[slice], verdict: Verdict, *, lowest: bool
) -> tuple[list[int] | None, float]:
    """The choice of `plan.lagrange`, and its bound in seconds.

    With `lowest`, it is the choice of the lowest peak over `top`. Otherwise it is a choice that stays below zero over
    `top`, which may not exist. If a solver claims that none exists, the claim stands unless such a choice is found.
    """
    fewest = lagrange.lowest(seconds, usage, top, groups)
    if lowest:
        return fewest, 0.0
    fits = bool((top + usage[:, fewest].sum(axis=1) <= 0).all())
    if not fits and verdict is Verdict.INFEASIBLE:
        return None, 0.0
    found, bound = lagrange.cheapest(seconds, usage, -top, groups)
    return (fewest if found is None and fits else found), max(0.0, bound)


def _with_lanes(program: MixedProgram, away: Floats, lanes: Sequence[tuple[float, float]], cost: float) -> MixedProgram:
    """`program` with one more column for each lane, at `cost`: the time that the step waits for the lane's copies.

    `away`: bytes that each option moves. A lane is (bytes that it copies in one unit of time, units of time in which it
    copies beside the compute).
    """
    for per_unit, beside in lanes:
        moving = [i for i, size in enumerate(away) if size]
        program = program.extended(
            ([*moving, len(program.costs)], [*(away[i] / per_unit for i in moving), -1.0]), high=beside, cost=cost
        )
    return program


@functools.lru_cache(maxsize=256)
def _found(program: Program, sizes_bytes: tuple[int, ...], seconds: tuple[float, ...], many: int) -> Frontier:
    """The frontier, solved only once for a trace and for the variants that levers of the step make of it, since these
    leave the units as they are."""
    return frontier(program, sizes_bytes, seconds, many)


def _undominated(usage: Floats, room: Floats, rows: Sequence[int]) -> list[int]:
    """The rows that no other row implies. Equal blocks make many copies of the same row."""
    seen: dict[bytes, int] = {}
    for s in rows:
        key = np.round(usage[s], 0).tobytes()
        if key not in seen or room[s] < room[seen[key]]:
            seen[key] = s
    return sorted(seen.values())
