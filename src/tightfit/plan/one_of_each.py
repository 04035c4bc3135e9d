"""One option of each unit, by an integer program: the cheapest that stay within the budget, or those of the lowest
peak.

Idea: of the hundreds of moments of a step a handful binds, so the program is solved with the fullest of them, the rows
that its answer breaks are added, and it is solved again. Where options are many, the same is done first with the
relaxation, in which a unit may be divided between its options. That takes milliseconds, and it leaves little: no more
units are divided than rows bind. The relaxation's prices bound every choice from below, and they say of each option how
far above that bound any choice with it lies. So the integer program is put with the options that lie nearest, and the
others come in only where they could still be part of a better choice.

Columns may be implied by others: each is at least the sum of some (`plan.holders`). The prices know nothing of them, so
a choice that has any is put to the integer program with all its options.

Invariant: an answer holds every row. The bound is made here from the prices, in plain arithmetic: it is right whatever
a solver said of them.
Refused: nothing; where the relaxation has no answer, the integer program is put with all options.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tightfit.plan import solver
from tightfit.plan.solver import Answer, MixedProgram, Verdict

__all__ = ["FEW", "TIE", "OneOfEach", "columns_of", "solved"]

Floats = np.ndarray[Any, np.dtype[np.float64]]
Whole = np.ndarray[Any, np.dtype[np.int64]]

#: With this many options or fewer the choice is exact. With more, the last digits would take nearly all of the time.
FEW = 400

#: So many rows are put to the solver at first where options are many, and so many are added at a time ...
_ROWS = 8

#: ... and so many to the relaxation, which takes far less.
_RELAXED_ROWS = 24

#: Of the options of each unit about so many are put to the solver at first, or `FEW` in all.
_EACH = 4

#: The lowest peak among those is enough if it is proven to be within this part of the lowest of all.
_LOW_GAP = 1e-3

#: A row that is broken by this part of the largest number of bytes is not broken: the solver promises no more.
_ROUNDING = 1e-9

#: Where the peak is minimised, a second weighs this much against it, so that the faster of equally low choices wins.
TIE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OneOfEach:
    """One column of each group is chosen. With `lowest`, the largest of `top + usage[:, chosen].sum()` is minimised;
    otherwise the costs are, while none of these is above zero. Behind the groups' columns are those that are implied.
    """

    costs: Floats  # (columns,)
    usage: Floats  # bytes; (rows, columns)
    top: Floats  # bytes; (rows,)
    groups: Sequence[slice]
    lowest: bool
    implied: Sequence[tuple[list[int], int]] = ()  # columns, and the one that is at least their sum
    with_implied: Callable[[list[int]], list[int]] = list  # adds the columns that chosen ones imply
    own: float = 0.0  # what every choice costs besides: a gap is a part of the sum

    def program(self, rows: Sequence[int], columns: Whole | None = None) -> MixedProgram:
        """The integer program with these of the rows and of the columns alone. Without a budget a last column stands
        for the peak."""
        usage, costs, groups = self.usage[list(rows)], self.costs, self.groups
        if columns is not None:
            usage, costs = usage[:, columns], costs[columns]
            ends = np.searchsorted(columns, [group.stop for group in groups]).tolist()
            groups = [slice(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
        usage, top = usage / self.scale, self.top[list(rows)] / self.scale
        count = len(costs) + self.lowest
        table: list[tuple[Sequence[int], Sequence[float]]] = []
        for amounts in usage:
            nonzero = np.nonzero(amounts)[0]
            row = nonzero.tolist(), amounts[nonzero].tolist()
            if self.lowest:
                row[0].append(count - 1)
                row[1].append(-1.0)
            table.append(row)
        for group in groups:
            table.append((range(group.start, group.stop), [1.0] * (group.stop - group.start)))
        for others, column in self.implied:
            table.append(([*others, column], [*(1.0 for _ in others), -1.0]))
        upper = np.ones(count)
        upper[len(costs) :] = np.inf
        program = MixedProgram.of(
            table,
            row_low=[-np.inf] * len(top) + [1.0] * len(groups) + [-np.inf] * len(self.implied),
            row_high=[*(-top).tolist(), *([1.0] * len(groups)), *([0.0] * len(self.implied))],
            costs=np.append(costs * TIE, 1.0) if self.lowest else costs,
            lower=np.zeros(count),
            upper=upper,
            integer=np.arange(count) < (groups[-1].stop if groups else 0),
        )
        return program

    @property
    def scale(self) -> float:
        return solver.scale_of(float(np.abs(self.usage).max(initial=0.0)))

    def level(self, chosen: list[int]) -> Floats:
        """What the rows come to when these columns are chosen."""
        return np.asarray(self.top + self.usage[:, self.with_implied(chosen)].sum(axis=1))

    def cost(self, chosen: list[int]) -> float:
        """Of one column of each group."""
        if not self.lowest:
            return float(self.costs[chosen].sum()) + self.own
        return float(self.costs[chosen].sum()) * TIE + float(self.level(chosen).max()) / self.scale

    def fullest(self, many: int) -> list[int]:
        options = self.groups[-1].stop if self.groups else 0
        level = self.top + self.usage[:, options:].sum(axis=1)
        level = sum((self.usage[:, group].max(axis=1) for group in self.groups), level)
        return sorted(np.argsort(-level, kind="stable")[:many].tolist())

    def broken(self, level: Floats, active: Sequence[int], many: int, slack: float = 0.0) -> list[int]:
        """Of the rows that are not among `active`, those that `level` breaks most, and by more than `slack`."""
        over = level - (level[active].max(initial=-np.inf) if self.lowest else 0.0)
        over[active] = 0.0
        found = np.argsort(-over, kind="stable")[:many]
        return [int(row) for row in found[over[found] > slack]]


def columns_of(values: Floats, groups: Sequence[slice]) -> list[int]:
    """The column that an answer chooses of each group."""
    return [group.start + int(np.argmax(values[group])) for group in groups]


def solved(
    choice: OneOfEach,
    *,
    seconds: float,
    gap: float,
    more: Callable[[MixedProgram], MixedProgram] | None = None,
) -> Answer:
    """The answer, proven to `gap` of the cost (zero: exact) if the solver gets there in about `seconds`. `more` adds
    columns and rows of its own to the program; the prices know nothing of them and are left out then."""
    put = _Put(choice=choice, seconds=seconds, gap=gap, more=more)
    if len(choice.costs) <= FEW:
        return put.once(list(range(len(choice.top))))
    relaxed = _relaxed(choice, seconds) if more is None and not choice.implied else None
    if relaxed is None:
        return put.by_rows(choice.fullest(_ROWS))
    many = min(max(FEW, _EACH * len(choice.groups)), len(choice.costs))
    order = np.argsort(relaxed.dearer, kind="stable")
    near = np.sort(order[:many])
    first = put.by_rows(relaxed.rows, near)
    # a choice with any other column costs at least this
    beyond = relaxed.bound + float(relaxed.dearer[order[many:]].min(initial=np.inf))
    bound = max(relaxed.bound, min(first.bound, beyond))
    if first.values is None:  # nothing with these alone, or not in time
        second = put.by_rows(relaxed.rows)
        return dataclasses.replace(second, bound=max(relaxed.bound, second.bound))
    cost = choice.cost(columns_of(first.values, choice.groups))
    if cost - bound <= gap * abs(cost):
        return dataclasses.replace(first, verdict=Verdict.OPTIMAL, bound=min(bound, cost))
    # nobody asks for the bound of the lowest peak, and a search among all options ends at its last node, and higher
    if choice.lowest and cost - bound <= _LOW_GAP * abs(cost):
        return dataclasses.replace(first, bound=min(bound, cost))
    better = np.nonzero(relaxed.bound + relaxed.dearer < cost)[0]
    if not len(np.setdiff1d(better, near)):
        return dataclasses.replace(first, bound=min(bound, cost))
    # what is known leads to a lowest peak as low in half of the time; the cheapest is looked for afresh
    second = put.by_rows(relaxed.rows, np.union1d(better, near), first.values if choice.lowest else None)
    bound = min(cost, max(bound, second.bound))
    if second.values is None or choice.cost(columns_of(second.values, choice.groups)) >= cost:
        return dataclasses.replace(first, verdict=second.verdict, bound=bound)
    return dataclasses.replace(second, bound=bound)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Relaxed:
    """What the prices of the relaxation prove."""

    rows: list[int]  # that were put to the solver; its answer breaks no other
    bound: float  # no choice costs less
    dearer: Floats  # (columns,): a choice with this column costs at least so much more than the bound


def _relaxed(choice: OneOfEach, seconds: float) -> _Relaxed | None:
    """None: the solver has no answer."""
    active, slack = choice.fullest(_RELAXED_ROWS), _ROUNDING * 1000 * choice.scale
    while True:
        program = choice.program(active)
        program = dataclasses.replace(program, integer=np.zeros(len(program.costs), dtype=bool))
        answer = solver.solve(program, seconds=seconds)
        if answer.values is None or answer.prices is None:
            return None
        level = choice.top + choice.usage @ answer.values[: len(choice.costs)]
        broken = choice.broken(level, active, _RELAXED_ROWS, slack)
        if not broken:
            break
        active = sorted({*active, *broken})
    # what a row may be above its limit costs this much for a unit; a solver's word, of which any sign is put right
    prices = np.maximum(0.0, -answer.prices[: len(active)])
    if choice.lowest:
        if not prices.sum() > 0:
            return None
        prices /= prices.sum()  # then no choice's peak is below the rows' mean at these weights
    weights = choice.costs * (TIE if choice.lowest else 1.0)
    priced = weights + prices @ choice.usage[active] / choice.scale
    least = np.array([priced[group].min() for group in choice.groups])
    fixed = float(prices @ choice.top[active]) / choice.scale
    rounding = 1e-12 * (float(np.abs(least).sum()) + float(prices @ np.abs(choice.top[active])) / choice.scale)
    sizes = [group.stop - group.start for group in choice.groups]
    return _Relaxed(
        rows=active, bound=float(least.sum()) + fixed + choice.own - rounding, dearer=priced - np.repeat(least, sizes)
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Put:
    """The integer program, as it is put to the solver."""

    choice: OneOfEach
    seconds: float
    gap: float
    more: Callable[[MixedProgram], MixedProgram] | None

    def once(self, rows: list[int], columns: Whole | None = None, start: Floats | None = None) -> Answer:
        """With these of the rows and of the columns alone. The values are of all columns, and so is `start`, a choice
        that is known to be good."""
        choice = self.choice
        program = choice.program(rows, columns)
        if start is not None:
            known = start[: len(choice.costs)] if columns is None else start[columns]
            known = np.append(known, np.full(len(program.costs) - len(known), np.nan))
            program = dataclasses.replace(program, start=known, near_start=True)
        if self.more is not None:
            program = self.more(program)
        answer = solver.solve(
            program.plus(choice.own) if choice.own else program,
            seconds=self.seconds,
            gap=self.gap,
            attainable=choice.lowest,
        )
        if columns is None or answer.values is None:
            return answer
        values = np.zeros(len(choice.costs))
        values[columns] = answer.values[: len(columns)]
        return dataclasses.replace(answer, values=values)

    def by_rows(self, active: list[int], columns: Whole | None = None, start: Floats | None = None) -> Answer:
        """With these rows at first, and with those that an answer breaks as well. An answer that breaks no row is the
        whole program's. With fewer rows a bound can only be too low, so the highest of all is taken."""
        choice, bound = self.choice, -np.inf
        while True:
            answer = self.once(active, columns, start)
            bound = max(bound, answer.bound)
            if answer.values is None:
                return answer
            level = choice.level(columns_of(answer.values, choice.groups))
            broken = choice.broken(level, active, _ROWS)
            if not broken:
                return dataclasses.replace(answer, bound=bound)
            active = sorted({*active, *broken})
