"""The best choices for a whole step, by one integer program over it.

Idea: `plan.moments` tells the live bytes at any moment as a sum over what the units keep and run again. A step has
thousands of moments, and few of them bind. So the program starts with the fullest of the step without a plan, and of
the choices that are known. Its answer goes to the referee (`plan.simulate`). Moments that pass the budget there become
rows of the program, and it is solved again. An answer that the referee finds within the budget is the best there is,
since rows were only left out.

Invariant: what is found is the referee's word. The bound is that of a program with fewer rows than the whole, so it
holds in whatever round the search ends.
Refused: sweeps (nested recompute) and values off the device. What is proven holds for choices without them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tightfit.core import Action, Choice, Program, Timeline, Trace, Unsupported
from tightfit.plan import solver
from tightfit.plan.indexed import indexed
from tightfit.plan.moments import Linear, LiveBytes, Moment, total
from tightfit.plan.program import kept_values
from tightfit.plan.simulate import Replayed, Walk
from tightfit.plan.solver import Floats, MixedProgram, scale_of

#: Ordinals of the values that are kept, by unit.
Kept = Mapping[str, frozenset[int]]

#: So many moments are added to the program at a time, and so often.
_ROWS = 16
_ROUNDS = 8

#: After the second round the search ends where the program has more rows than this.
_MOST_ROWS = 5000

#: So many rounds in a row that neither find nor prove anything are the last.
_IN_VAIN = 2

#: A search ends after so many nodes, times the program's columns, on a busy machine too. On small programs that is
#: enough for a proof. Large ones gain most before their first node, so they get few. The seconds are for a solver that
#: does not come so far.
_NODES_TIMES_COLUMNS = 60_000
_FEWEST_NODES = 4
_SECONDS = 20.0

#: A cluster that runs again costs this much more, where the dearest costs a thousand, so that none runs for nothing.
_HAIR = 1e-5

#: Where the lowest peak is looked for, a second weighs this much against it, so that the faster of equally low wins.
_TIE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search found, and what it proved.

    `choices` and the referee's `line` of them: the best that were found; None: none better than the known ones.
    `bound`: no choices take fewer seconds within the budget. Where the lowest peak is looked for: no choices by which
    units that are alike keep the same have a lower one, in bytes.
    """

    choices: tuple[Choice, ...] | None
    line: Timeline | None
    bound: float
    how: frozenset[str]


class _Noted(Walk):
    """The referee's walk, with the moment of each entry of its timeline."""

    def timeline(self) -> Timeline:
        self.moments: list[Moment] = []
        self._again: list[Moment] = []  # of the ops that are about to run again, the last first
        return super().timeline()

    def _run_again(self, replayed: Replayed, ops: tuple[int, ...], index: int) -> None:
        self._again = [Moment(index, replayed.frame, ordinal) for ordinal in reversed(ops)]
        super()._run_again(replayed, ops, index)

    def _cast(self, value_id: int) -> None:
        again, self._again = self._again, self._again[-1:]  # a cast is part of the op for which it is made
        super()._cast(value_id)
        self._again = again

    def _mark(self, label: str, scratch_bytes: int) -> None:
        self.moments.append(self._again.pop() if self._again else Moment(self.at))
        super()._mark(label, scratch_bytes)


class WholeStep:
    """The program of one step. What does not depend on a budget is kept for the next."""

    def __init__(self, trace: Trace) -> None:
        self.trace, index = trace, indexed(trace)
        self.programs: dict[str, Program] = {}
        for unit in trace.units:
            program = index.program_of(unit.path)
            if program is not None and not unit.pinned and program.needed:
                self.programs[unit.path] = program
        self.live = LiveBytes(trace, self.programs)
        self.step_seconds = sum(op.seconds for op in trace.ops)

    def cheapest(self, known: tuple[Choice, ...], budget_bytes: int, gap: float) -> Found:
        """The choices of the fewest seconds within the budget. The search starts from `known` ones, which may be above
        it, and ends when no choices can be better by more than `gap`, a part of the step's seconds."""
        return self._search(known, budget_bytes, gap)

    def lowest(self, known: tuple[Choice, ...], gap: float) -> Found:
        """The choices of the lowest peak, where units that are alike keep the same. The search ends when none can be
        lower by more than `gap`, a part of the peak of the `known` ones."""
        return self._search(known, None, gap)

    def _search(self, known: tuple[Choice, ...], budget_bytes: int | None, gap: float) -> Found:
        limit_bytes = sys.maxsize if budget_bytes is None else budget_bytes

        def cost_of(line: Timeline) -> float:
            """Infinite above the budget."""
            if line.peak_bytes > limit_bytes:
                return math.inf
            return float(line.peak_bytes) if budget_bytes is None else line.recompute_seconds

        kept = self._kept(known)
        moments, line = self._walked(known)
        cost = cost_of(line)
        near = gap * (cost if budget_bytes is None else self.step_seconds)
        best: tuple[tuple[Choice, ...] | None, Timeline | None] = None, None
        bound, how = 0.0, set[str]()
        wanted: dict[Moment, None] = {}
        for each in (self._walked(())[0], moments):
            wanted |= dict.fromkeys(_fullest(each, wanted))
        in_vain = 0
        for turn in range(_ROUNDS):
            program = _Assembled(self, list(wanted), kept, budget_bytes, cost < math.inf)
            if turn > 1 and len(program.rows) > _MOST_ROWS:
                break
            answer = program.solved(gap)
            before, bound = (cost, bound), max(bound, answer.bound)
            if answer.kept is None:
                break
            choices = self._choices(answer.kept)
            try:
                moments, line = self._walked(choices)
            except Unsupported:
                break
            if cost_of(line) < cost:
                best, cost, kept = (choices, line), cost_of(line), answer.kept
                how.add(answer.how)
            if cost - bound <= near:
                break
            limit = bound if budget_bytes is None else budget_bytes
            fresh = _fullest([each for each in moments if each[1] > limit], wanted)
            in_vain = in_vain + 1 if before == (cost, bound) and cost < math.inf else 0
            if not fresh or in_vain == _IN_VAIN:
                break
            wanted |= dict.fromkeys(fresh)
        return Found(choices=best[0], line=best[1], bound=min(bound, cost), how=frozenset(how))

    def _kept(self, choices: tuple[Choice, ...]) -> Kept:
        chosen = {choice.unit: kept_values(choice.actions) for choice in choices}
        return {path: chosen.get(path, frozenset(range(program.values))) for path, program in self.programs.items()}

    def _choices(self, kept: Kept) -> tuple[Choice, ...]:
        found = []
        for unit in self.trace.units:
            program = self.programs.get(unit.path)
            if program is None:
                continue
            actions = (Action.KEEP if value in kept[unit.path] else Action.RECOMPUTE for value in range(program.values))
            choice = Choice(unit=unit.path, actions=tuple(actions), signature=unit.signature, program=unit.digest)
            found.append(choice)
        return tuple(found)

    def _walked(self, choices: tuple[Choice, ...]) -> tuple[list[tuple[Moment, int]], Timeline]:
        walk = _Noted(self.trace, choices)
        line = walk.timeline()
        return list(zip(walk.moments, line.live_bytes, strict=True)), line


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    kept: Kept | None
    bound: float
    how: str


class _Assembled:
    """The program over the rows of some moments, with columns of its own numbering."""

    def __init__(
        self, step: WholeStep, moments: list[Moment], known: Kept, budget_bytes: int | None, is_attainable: bool
    ) -> None:
        self.step, self.known, self.budget_bytes, self.is_attainable = step, known, budget_bytes, is_attainable
        live = step.live
        self.levels = [live.at(moment) for moment in moments]
        self.rows = live.rows_for(self.levels)
        #: Where units that are alike keep the same, the column of the first of them stands for all.
        self.same = {} if budget_bytes is not None else _alike(step)
        columns = (column for row in (*self.rows, *self.levels, *live.keeps.values()) for column, _ in row.columns)
        self.place: dict[int, int] = {}
        for column in columns:
            self.place.setdefault(self.same.get(column, column), len(self.place))

    def _placed(self, row: Linear) -> tuple[list[int], list[float]]:
        columns = row.columns
        if self.same:  # two columns may have become one
            columns = total((Linear(0.0, tuple((self.same.get(c, c), amount) for c, amount in columns)), 1.0)).columns
        return [self.place[column] for column, _ in columns], [amount for _, amount in columns]

    def solved(self, gap: float) -> _Answer:
        """The solver's answer. It is no further from the best than `gap`, a part of the step's seconds or of the peak,
        unless the search ended before."""
        live, budget_bytes = self.step.live, self.budget_bytes
        peak = len(self.place)  # one more column, for the peak
        costs, upper, lower = np.zeros(peak + 1), np.ones(peak + 1), np.zeros(peak + 1)
        hairs = np.zeros(peak + 1)
        for column, seconds in enumerate(live.costs):
            if (at := self.place.get(self.same.get(column, column))) is not None:
                costs[at] += seconds
                hairs[at] += _HAIR * (column in live.paid)
                upper[at] = min(upper[at], live.upper[column])
        integer, start = np.zeros(peak + 1, dtype=bool), np.full(peak + 1, np.nan)
        for (path, value), keep in live.keeps.items():
            for column, _ in keep.columns:
                at = self.place[self.same.get(column, column)]
                integer[at], start[at] = True, float(value in self.known[path])
        scale = scale_of(max((abs(amount) for level in self.levels for _, amount in level.columns), default=1.0))
        if budget_bytes is None:
            unit = scale
            costs *= _TIE * self.levels[0].constant / scale / max(costs.sum(), 1e-12)
            costs[peak], upper[peak] = 1.0, np.inf
        else:
            unit = max(float(costs.max()), 1e-12) / 1000
            costs = costs / unit + hairs
        table, high = [self._placed(row) for row in self.rows], [-row.constant for row in self.rows]
        for level in self.levels:
            columns, amounts = self._placed(level)
            amounts = [amount / scale for amount in amounts]
            if budget_bytes is None:
                columns, amounts = [*columns, peak], [*amounts, -1.0]
            table.append((columns, amounts))
            high.append(((budget_bytes or 0) - level.constant) / scale)
        program = MixedProgram.of(
            table, row_low=[-np.inf] * len(table), row_high=high, costs=costs, lower=lower, upper=upper,
            integer=integer, start=start, nodes=max(_FEWEST_NODES, _NODES_TIMES_COLUMNS // len(costs)),
            near_start=budget_bytes is None,
        )  # fmt: skip
        # the step's own seconds count too, so that the gap is a part of the whole step
        own = 0.0 if budget_bytes is None else self.step.step_seconds / unit
        answer = solver.solve(program.plus(own), seconds=_SECONDS, gap=gap, attainable=self.is_attainable)
        kept = None if answer.values is None else self._kept(answer.values)
        # choices may have all the hairs, so the bound is without any
        bound = answer.bound - own - (0.0 if budget_bytes is None else float(hairs @ upper))
        return _Answer(kept=kept, bound=max(0.0, bound) * unit, how=answer.how)

    def _kept(self, values: Floats) -> Kept:
        keeps = self.step.live.keeps

        def is_kept(path: str, value: int) -> bool:
            columns = keeps[path, value].columns
            return not columns or values[self.place[self.same.get(columns[0][0], columns[0][0])]] > 0.5

        return {
            path: frozenset(value for value in range(program.values) if is_kept(path, value))
            for path, program in self.step.programs.items()
        }


def _alike(step: WholeStep) -> dict[int, int]:
    """The columns of what units keep and run again, each with the same column of the first unit that is alike."""
    live = step.live
    calls: dict[str, int] = {}
    for call in live.calls.values():
        calls[call.unit] = calls.get(call.unit, 0) + 1
    kinds = {unit.path: (unit.digest, calls.get(unit.path, 0)) for unit in step.trace.units}
    firsts: dict[tuple[bool, tuple[str, int], int], int] = {}
    found = {}
    for are_kept, table in ((True, live.keeps), (False, live.reruns)):
        for (path, number), each in table.items():
            for column, _ in each.columns:
                found[column] = firsts.setdefault((are_kept, kinds[path], number), column)
    return found


def _fullest(moments: list[tuple[Moment, int]], known: Mapping[Moment, None]) -> list[Moment]:
    """The fullest moments that are not known yet."""
    fresh = [each for each in moments if each[0] not in known]
    return [moment for moment, _ in sorted(fresh, key=lambda each: -each[1])[:_ROWS]]
