"""One point per unit, so that the whole step fits: an integer program over the units' options.

Idea: `plan.table` says what each option does to the live bytes of each segment of the step. "The peak stays under the
budget" is then one linear constraint per segment.

Invariant: the constraints are never weaker than the table says; whether they hold for the step is for
`plan.simulate` to decide, which the caller asks. The bound comes from a relaxation in which every unit may
take the least of everything, so no plan of this kind takes fewer seconds.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tightfit.core import Action, Choice
from tightfit.device.cost import copy_lanes
from tightfit.plan import lagrange, solver
from tightfit.plan.frontier import Point
from tightfit.plan.holders import nothing
from tightfit.plan.nest import Nesting
from tightfit.plan.one_of_each import FEW, TIE, OneOfEach, columns_of, solved
from tightfit.plan.solver import MixedProgram, Verdict
from tightfit.plan.table import Floats, Table

#: The name of the way in which options are chosen where the solver has no answer.
LAGRANGE = "Lagrangian prices"

#: Bytes weigh this much against seconds, so that every release of the solver prefers the same of equally fast choices.
_HAIR = 1e-7

#: Where options are many, a choice is good enough if it is proven to be this near to the best, in parts of the step ...
_GAP = 1e-3

#: ... or this near for a nesting, of which no bound is asked; ...
_NESTED_GAP = 5e-3

#: ... and a bound if it is proven to be within this part of the highest that this program gives.
_BOUND_GAP = 5e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    points: Mapping[str, int]  # unit path -> index of its point; -1: keep everything
    seconds: float
    how: frozenset[str] = frozenset()  # by which ways the points were found and chosen


class Model(Table):
    """The integer program over the options: which of them, so that the step fits.

    One thing because the ways to solve the program share its rows and columns.
    """

    def peak_bytes(self, points: Mapping[str, int]) -> int:
        """The peak when these options are chosen, as the model computes it. `points`: unit path -> index of its
        option."""
        return int(self._use(points).max())

    def _use(self, points: Mapping[str, int]) -> Floats:
        """Live bytes in each segment when these options are chosen."""
        use = sum((self.table[path][index] for path, index in points.items()), self.base_top)
        return np.asarray(use + self.holding.usage[:, self.holding.needed(points.items())].sum(axis=1))

    def near(self, points: Mapping[str, int], many: int) -> list[dict[str, int]]:
        """The `many` choices of the lowest peaks among those that differ from `points` in one unit or in all units that
        are alike. The peaks are as the model computes them."""
        use = self._use(points)
        alike: dict[tuple[str, int], list[str]] = defaultdict(list)
        for unit in self.trace.units:
            alike[unit.digest, len(self.options[unit.path])].append(unit.path)
        groups = [paths for paths in alike.values() if len(self.options[paths[0]]) > 1]
        found = []
        for paths in (*groups, *([path] for group in groups if len(group) > 1 for path in group)):
            rest = use - sum(self.table[path][points[path]] for path in paths)
            peaks = (rest + sum(self.table[path] for path in paths)).max(axis=1)
            found += [
                (peak_bytes, {path: index for path in paths})
                for index, peak_bytes in enumerate(peaks.tolist())
                if any(points[path] != index for path in paths)
            ]
        found.sort(key=lambda each: each[0])
        return [dict(points) | changed for _, changed in found[:many]]

    def is_own_moment(self, points: Mapping[str, int]) -> bool:
        """With these options, is the peak in a unit's own forward or backward, as the model computes it?"""
        use = self._use(points)
        segment = int(np.argmax(use))
        return segment < len(self.starts) and any(self._own_segments(path)[segment] for path in self.options)

    def solve(self, budget_bytes: int | None) -> Solution | None:
        """The cheapest options within the budget; with `None` as the budget, the options of the lowest peak. The answer
        is None when nothing fits. It is kept, since plans for several budgets and the lowest peak ask the same."""
        if budget_bytes not in self._solutions:
            self._solutions[budget_bytes] = self._solution(budget_bytes)
        return self._solutions[budget_bytes]

    @functools.cached_property
    def _solutions(self) -> dict[int | None, Solution | None]:
        return {}

    def _solution(self, budget_bytes: int | None) -> Solution | None:
        answer = self._solve(budget_bytes, self.table)
        if answer is None:
            return None
        how = frozenset({answer.how}).union(*(found.how for found in self.frontiers.values()))
        return Solution(points=answer.chosen, seconds=answer.seconds, how=how)

    def bound_seconds(self, budget_bytes: int) -> float:
        """No choices within the budget take fewer seconds than this. Meant for a table of the frontiers' own points."""
        found = self._solve(budget_bytes, self._relaxed)
        return 0.0 if found is None else found.bound

    def is_ruled_out(self, budget_bytes: int) -> bool:
        """Is it proven that no choices are within the budget? Meant for a table of the frontiers' own points."""
        least = sum((table.min(axis=0) for table in self._relaxed.values()), self.base_top)
        return bool((least > budget_bytes).any())

    @functools.cached_property
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
        """At every mark, the bytes of values and inputs that the unit could keep but whose keeping adds nothing there:
        Python or another frame holds them anyway, they are not made yet, or their backward has begun."""
        trace = self.trace
        change = np.zeros(len(self.marks) + 1)
        for frame in self.frames_of[path] if path in self.programs else ():
            program = self.programs[path]
            loads = [self.load[slot] for slot in self.slots[frame] if slot in self.load]
            read = {value for step in program.steps for value in step.reads}.union(program.needed)
            own = [self.values[frame][ordinal] for ordinal in read.difference(program.held)]
            for value_id in (*own, *self._waiting_inputs(path, frame)):
                value = trace.values[value_id]
                change[0] += value.size_bytes
                end = self.freed.get(value.id, len(trace.events))
                natural = end if value.natural_end is None else value.natural_end
                gone = max(natural, self.kept_elsewhere.get(value.id, -1))
                stop = min(loads, default=-1)
                if stop > gone:
                    change[self.mark_at[gone + 1]] -= value.size_bytes
                    change[self.mark_at[stop]] += value.size_bytes
        return np.asarray(np.cumsum(change)[: len(self.marks)])

    @functools.cached_property
    def _least_seconds(self) -> dict[str, list[float]]:
        """For the bound: of each option, seconds that no kept set between it and the next one is below. The frontier's
        points are apart in the seconds of ops. What autocast's casts take is not counted, because a set that takes
        longer by its ops may cast less."""
        return {
            path: [
                0.0 if point is None else min(spent, point.seconds)
                for point, spent in zip(options, self.seconds[path], strict=True)
            ]
            for path, options in self.options.items()
        }

    def _solve(self, budget_bytes: int | None, table: Mapping[str, Floats]) -> _Found | None:
        """The cheapest options by `table`; without a budget, the options of the lowest peak. The answer is None when
        nothing fits, or when nothing was found in time."""
        paths = list(self.options)
        columns = [(path, i) for path in paths for i in range(len(self.options[path]))]
        groups: list[slice] = []
        for path in paths:
            start = groups[-1].stop if groups else 0
            groups.append(slice(start, start + len(self.options[path])))
        spent = self.seconds if table is self.table else self._least_seconds
        unit_seconds = np.array([spent[path][i] for path, i in columns])
        step_seconds = sum(op.seconds for op in self.trace.ops)
        usage = np.array([table[path][i] for path, i in columns]).T if columns else np.zeros((len(self.base_top), 0))
        held = self.holding if table is self.table else nothing(len(usage))
        added = usage + held.apart(columns)  # as if each unit held what it holds alone
        usage = np.hstack([usage, held.usage])
        away = np.array([self.away_bytes[path][i] for path, i in columns], dtype=np.float64)
        lanes = copy_lanes(self.trace) if away.any() else ()
        host_room = np.inf if self.host_room_bytes is None else float(self.host_room_bytes)
        rows = list(range(len(self.base_top)))
        room = np.full(len(rows), np.inf)
        if budget_bytes is not None:
            least = self.base_top + sum((table[path].min(axis=0) for path in paths), np.zeros(len(rows)))
            if (least > budget_bytes).any():
                return None
            room = budget_bytes - self.base_top
            worst = self.base_top + sum((table[path].max(axis=0) for path in paths), held.usage.sum(axis=1))
            rows = _undominated(usage, room, [s for s in rows if worst[s] > budget_bytes])
        usage, added, room = usage[rows], added[rows], room[rows]

        second_scale = float(max(unit_seconds.max(), 1e-12)) if columns else 1.0
        costs = np.append(unit_seconds / second_scale, np.zeros(len(held.after)))
        gap = _BOUND_GAP if table is not self.table else _NESTED_GAP if self.nesting.links else _GAP
        near = 0.0 if len(columns) <= FEW else gap
        if table is self.table and usage.size:  # not for the bound, where a hair would be one too many
            costs = costs + _HAIR * (usage.mean(axis=0) - usage.mean(axis=0).min()) / max(1.0, np.ptp(usage))
        waits = [(lane.bytes_per_second * second_scale, lane.beside_seconds / second_scale) for lane in lanes]
        # the step's own seconds count too, so that the gap is a part of the whole step
        own = step_seconds / second_scale if budget_bytes is not None and near else 0.0
        top = self.base_top[rows] if budget_bytes is None else -room

        def more(program: MixedProgram) -> MixedProgram:
            program = _with_lanes(program, away, waits, 1.0 if budget_bytes is not None else TIE)
            return _within_host(program, away, host_room)

        def with_held(chosen: list[int]) -> list[int]:
            return chosen + [len(columns) + c for c in held.needed(columns[c] for c in chosen)]

        choice = OneOfEach(
            costs=costs, usage=usage, top=top, groups=groups, lowest=budget_bytes is None, own=own,
            implied=held.rows(columns), with_implied=with_held,
        )  # fmt: skip
        moves = bool(waits) or float(away.sum()) > host_room
        answer = solved(
            choice,
            seconds=self.effort.solver_seconds,
            gap=1e-4 if budget_bytes is None else near,
            more=more if moves else None,
        )
        chosen, bound, how = None, max(0.0, answer.bound - own) * second_scale, answer.how
        if answer.values is not None:
            chosen = columns_of(answer.values, groups)
        known = 0.0 if chosen is None else float(unit_seconds[chosen].sum())
        if answer.verdict is not Verdict.OPTIMAL and (chosen is None or known - bound > _BOUND_GAP * step_seconds):
            # the seconds as if no copy ran beside the compute
            priced = unit_seconds + sum((away / lane.bytes_per_second for lane in lanes), np.zeros(len(columns)))
            rows_too, tops_too = _host_row(added, top, away, host_room, lowest=budget_bytes is None)
            ours, proven = _by_prices(priced, rows_too, tops_too, groups, answer.verdict, lowest=budget_bytes is None)
            bound = bound if lanes else max(bound, proven)

            def cost(columns: list[int]) -> float:
                if budget_bytes is None:
                    return float(choice.level(columns).max())
                return float(priced[columns].sum())

            if ours is not None and (chosen is None or cost(ours) < cost(chosen)):
                chosen, how = ours, LAGRANGE
        if chosen is None:
            return None
        points = {columns[c][0]: columns[c][1] for c in chosen}
        return _Found(chosen=points, seconds=float(unit_seconds[chosen].sum()), bound=bound, how=how)

    # -- the answer as data

    def choices(self, points: Mapping[str, int], nesting: Nesting | None = None) -> tuple[Choice, ...]:
        """The chosen options as `Choice`s. `points`: unit path -> index of its option. `nesting`: another than the
        model's own."""
        chosen = (self._choice(path, self.options[path][index]) for path, index in points.items())
        return tuple(map((nesting or self.nesting).on, chosen))

    def _choice(self, path: str, point: Point | None) -> Choice:
        unit = next(u for u in self.trace.units if u.path == path)
        program = self.programs.get(path, self.trace.programs[self.frames_of[path][0]])
        kept = range(program.values) if point is None else point.kept
        away, inputs = (frozenset(), frozenset()) if point is None else (point.away, point.inputs_away)
        return Choice(
            unit=path,
            actions=tuple(
                (Action.OFFLOAD if v in away else Action.KEEP) if v in kept else Action.RECOMPUTE
                for v in range(program.values)
            ),
            signature=unit.signature,
            program=unit.digest,
            inputs=tuple(Action.OFFLOAD if k in inputs else Action.KEEP for k in range(max(inputs, default=-1) + 1)),
        )


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


def _within_host(program: MixedProgram, away: Floats, room: float) -> MixedProgram:
    """`program` with one more row: what the options move has `room` together."""
    if float(away.sum()) <= room:
        return program
    scale = solver.scale_of(float(away.max()))
    moving = [int(column) for column in np.nonzero(away)[0]]
    # the column that comes with the row is in no row, and costs nothing
    return program.extended((moving, [float(away[i]) / scale for i in moving]), high=room / scale, cost=0.0)


def _host_row(usage: Floats, top: Floats, away: Floats, room: float, *, lowest: bool) -> tuple[Floats, Floats]:
    """The rows with one for host memory among them. Where the lowest peak is looked for there is no budget to hold the
    row against, so it makes any move too dear."""
    if float(away.sum()) <= room:
        return usage, top
    if not lowest:
        return np.vstack([usage, away]), np.append(top, -room)
    dear = float(np.abs(top).max(initial=1.0)) + float(np.abs(usage).sum())
    return np.vstack([usage, np.where(away > 0, dear, 0.0)]), np.append(top, 0.0)


def _undominated(usage: Floats, room: Floats, rows: Sequence[int]) -> list[int]:
    """The rows that no other row implies. Equal blocks make many copies of the same row."""
    seen: dict[bytes, int] = {}
    for s in rows:
        key = np.round(usage[s], 0).tobytes()
        if key not in seen or room[s] < room[seen[key]]:
            seen[key] = s
    return sorted(seen.values())
