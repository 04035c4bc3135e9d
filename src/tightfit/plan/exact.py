"""The best choices for a whole step, by one integer program over it.

Idea: `plan.moments` tells the live bytes at any moment as a sum over what the units keep and run again. A step has
thousands of moments, and few of them bind. So the program starts with the fullest of the step without a plan. Its
answer goes to the referee (`plan.simulate`). Moments that pass the budget there become rows of the program, and it is
solved again. An answer that the referee finds within the budget is the best there is, since rows were only left out.

Invariant: what is found is the referee's word. The bound is that of a program with fewer rows than the whole, so it
holds in whatever round the search ends.
Refused: sweeps (nested recompute) and values off the device. What is proven holds for choices without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from tightfit.core import Action, Choice, Program, Timeline, Trace, Unsupported
from tightfit.plan import solver
from tightfit.plan.indexed import indexed
from tightfit.plan.moments import Linear, LiveBytes, Moment
from tightfit.plan.simulate import Walk
from tightfit.plan.solver import MixedProgram

Kept = Mapping[str, frozenset[int]]  # ordinals of the kept values, by unit

#: So many moments are added to the program at a time.
_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The best choices that were found (None: none better than those that were known), and what is proven.

    `bound`: no choices take fewer seconds within the budget or, where the lowest peak is looked for, have a lower peak
    in bytes.
    """

    kept: Kept | None
    line: Timeline | None
    bound: float
    rounds: int


class _Noted(Walk):
    """The referee's walk, with the moment of each entry of its timeline."""

    def timeline(self) -> Timeline:
        self.moments: list[Moment] = []
        self._again: Iterator[Moment] = iter(())
        return super().timeline()

    def _run_again(self, replayed, ops, index):  # type: ignore[no-untyped-def]
        self._again = iter([Moment(index, replayed.frame, ordinal) for ordinal in ops])
        super()._run_again(replayed, ops, index)

    def _mark(self, label: str, scratch_bytes: int) -> None:
        self.moments.append(next(self._again, Moment(self.at)))
        super()._mark(label, scratch_bytes)


class WholeStep:
    """The program of one step."""

    def __init__(self, trace: Trace) -> None:
        self.trace, index = trace, indexed(trace)
        programs: dict[str, Program] = {}
        for unit in trace.units:
            program = index.program_of(unit.path)
            if program is not None and not unit.pinned and program.needed:
                programs[unit.path] = program
        self.live = LiveBytes(trace, programs)
        self.programs = programs
        self.step_seconds = sum(op.seconds for op in trace.ops)

    @property
    def columns(self) -> int:
        return len(self.live.costs)

    def cheapest(self, budget_bytes: int, known: Kept, *, nodes: int, rounds: int = 8, gap: float = 2e-4) -> Found:
        """The choices of the fewest seconds within the budget, starting from `known` ones that are within it. `gap` is
        a part of the step's seconds."""
        return self._search(budget_bytes, known, nodes, rounds, gap)

    def lowest(self, known: Kept, *, nodes: int, rounds: int = 8, gap: float = 2e-4, alike: bool = False) -> Found:
        """The choices of the lowest peak. `alike`: equal units keep the same."""
        return self._search(None, known, nodes, rounds, gap, alike)

    def _search(
        self, budget_bytes: int | None, known: Kept, nodes: int, rounds: int, gap: float, alike: bool = False
    ) -> Found:
        moments, line = self.walked(known)
        cost = line.recompute_seconds if budget_bytes is not None else float(line.peak_bytes)
        scale = self.step_seconds if budget_bytes is not None else float(line.peak_bytes)
        best: tuple[Kept | None, Timeline | None] = (None, None)
        bound, wanted = 0.0, dict[Moment, None]()
        fresh = _fullest(self.walked({path: self._all(path) for path in self.programs})[0], wanted)
        fresh += [m for m in _fullest(moments, wanted) if m not in fresh]
        for turn in range(1, rounds + 1):
            wanted |= dict.fromkeys(fresh)
            answer = self._solved(list(wanted), budget_bytes, known if best[0] is None else best[0], nodes, gap, scale, alike)
            if answer is None:
                break
            kept, proven = answer
            bound = max(bound, proven)
            if kept is None:
                break
            try:
                moments, line = self.walked(kept)
            except Unsupported:
                break
            holds = budget_bytes is None or line.peak_bytes <= budget_bytes
            found = line.recompute_seconds if budget_bytes is not None else float(line.peak_bytes)
            if holds and found < cost:
                best, cost = (kept, line), found
            if cost - bound <= gap * scale:
                break
            limit = bound if budget_bytes is None else budget_bytes
            fresh = _fullest([each for each in moments if each[1] > limit], wanted)
            if not fresh:
                break
        return Found(kept=best[0], line=best[1], bound=min(bound, cost), rounds=turn)

    def _all(self, path: str) -> frozenset[int]:
        return frozenset(range(self.programs[path].values))

    def choices(self, kept: Kept) -> tuple[Choice, ...]:
        return tuple(
            Choice(
                unit=unit.path,
                signature=unit.signature,
                program=unit.digest,
                actions=tuple(
                    Action.KEEP if v in kept[unit.path] else Action.RECOMPUTE
                    for v in range(self.programs[unit.path].values)
                ),
            )
            for unit in self.trace.units
            if unit.path in kept
        )

    def walked(self, kept: Kept) -> tuple[list[tuple[Moment, int]], Timeline]:
        walk = _Noted(self.trace, self.choices(kept))
        line = walk.timeline()
        return list(zip(walk.moments, line.live_bytes, strict=True)), line

    def _solved(
        self,
        moments: list[Moment],
        budget_bytes: int | None,
        known: Kept,
        nodes: int,
        gap: float,
        scale: float,
        alike: bool,
    ) -> tuple[Kept | None, float] | None:
        live = self.live
        sums = [live.at(moment) for moment in moments]
        frames = dict.fromkeys(frame for _, opened in sums for frame in sorted(opened))
        rows = [*live.rows]
        for frame, call in live.calls.items():
            if frame in frames or call.rows and len([c for c in live.calls.values() if c.unit == call.unit]) > 1:
                rows += call.rows
        seen: set[int] = set()
        pending = [column for each, _ in sums for column, _ in each.columns]
        while pending:
            column = pending.pop()
            if column not in seen:
                seen.add(column)
                more = live.rows_of.get(column, ())
                rows += more
                pending += [c for row in more for c, _ in row.columns]
        place: dict[int, int] = {}
        first: dict[object, int] = {}
        if alike:
            digests = {unit.path: unit.digest for unit in self.trace.units}
            for (path, each), column in (*live.keeps.items(), *live.reruns.items()):
                pass
        same = self._alike() if alike else {}
        for row in (*rows, *(each for each, _ in sums), *live.keeps.values(), *live.reruns.values()):
            for column, _ in row.columns:
                column = same.get(column, column)
                place.setdefault(column, len(place))
        count = len(place)
        costs = np.zeros(count + 2)
        upper = np.ones(count + 2)
        integer = np.zeros(count + 2, dtype=bool)
        for column, cost in enumerate(live.costs):
            if (at := place.get(same.get(column, column))) is not None:
                costs[at] += cost
                upper[at] = min(upper[at], live.upper[column])
        start = np.full(count + 2, np.nan)
        for (path, value), keep in live.keeps.items():
            for column, _ in keep.columns:
                at = place[same.get(column, column)]
                integer[at] = True
                start[at] = float(value in known[path])
        peak, one = count, count + 1
        unit = solver.scale_of(max((abs(a) for each, _ in sums for _, a in each.columns), default=1.0))
        table: list[tuple[list[int], list[float]]] = []
        high: list[float] = []
        for row in rows:
            table.append(_columns(row, place, same))
            high.append(-row.constant)
        for each, _ in sums:
            columns, amounts = _columns(each, place, same)
            amounts = [a / unit for a in amounts]
            if budget_bytes is None:
                columns, amounts = [*columns, peak], [*amounts, -1.0]
            table.append((columns, amounts))
            high.append(((budget_bytes or 0) - each.constant) / unit)
        if budget_bytes is None:
            tie = 1e-6 * scale / unit / max(self.step_seconds, 1e-12)
            costs *= tie
            costs[peak] = 1.0
            upper[peak] = np.inf
            factor = unit
        else:
            factor = max(float(costs.max()), 1e-12) / 1000
            costs /= factor
            costs[one] = scale / factor
        lower = np.zeros(count + 2)
        lower[one] = 1.0
        program = MixedProgram.of(
            table, row_low=[-np.inf] * len(table), row_high=high, costs=costs, lower=lower, upper=upper,
            integer=integer, start=start, nodes=nodes,
        )  # fmt: skip
        answer = solver.solve(program, seconds=30.0, gap=gap)
        own = float(costs[one])
        bound = max(0.0, answer.bound - own) * factor
        if answer.values is None:
            return (None, bound) if answer.verdict is solver.Verdict.UNSOLVED else (None, bound)
        kept = {
            path: frozenset(
                v for v in range(program_.values)
                if not (columns := live.keeps[path, v].columns)
                or answer.values[place[same.get(columns[0][0], columns[0][0])]] > 0.5
            )
            for path, program_ in self.programs.items()
        }  # fmt: skip
        return kept, bound

    def _alike(self) -> dict[int, int]:
        """Columns of units that are alike, and the column of the first of them."""
        live = self.live
        digests = {unit.path: unit.digest for unit in self.trace.units}
        counts = {path: sum(call.unit == path for call in live.calls.values()) for path in self.programs}
        first: dict[object, int] = {}
        found = {}
        for name, table in (("keeps", live.keeps), ("reruns", live.reruns)):
            for (path, number), each in table.items():
                for column, _ in each.columns:
                    found[column] = first.setdefault((name, digests[path], counts[path], number), column)
        return found


def _columns(row: Linear, place: Mapping[int, int], same: Mapping[int, int]) -> tuple[list[int], list[float]]:
    merged: dict[int, float] = {}
    for column, amount in row.columns:
        at = place[same.get(column, column)]
        merged[at] = merged.get(at, 0.0) + amount
    return list(merged), list(merged.values())


def _fullest(moments: list[tuple[Moment, int]], known: Mapping[Moment, None]) -> list[Moment]:
    """The fullest moments that are not known yet."""
    fresh = {moment: size for moment, size in moments if moment not in known}
    return sorted(fresh, key=lambda moment: -fresh[moment])[:_ROWS]
