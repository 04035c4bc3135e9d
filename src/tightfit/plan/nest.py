"""Nested recompute: keep only some units' inputs, and make the others again by sweeps over the units before them.

Idea: take a chain of units, each of which hands one value to the next. Besides the first unit's input, `slots` inputs
can be stored at once. Backward needs the units from right to left. When it comes to a unit whose input is gone, a
*sweep* starts from the last stored input, runs through the units between, and so makes the missing input again. On the
way it stores other inputs in the free slots. Which inputs to store is the classic problem of reversing a chain in
little memory. The table below solves it exactly, also for units of different cost, by the recursion

    P(a, b, s) = min over m of  seconds(a..m) + P(m, b, s - 1) + P(a, m, s)
    P(a, b, 0) = sum of seconds(a..j) over a < j < b

P(a, b, s) is the cost of the backward of the units a to b - 1, when the input of a is there and s slots are free. The
forward is the first sweep and costs nothing. But the input of the last unit that it passes is gone when backward
begins, unless it has a slot.

Invariant: `schedule` takes the least seconds of all schedules with as many slots. With equal units it takes as many
steps as Griewank and Walther's. Refused: nothing; a step without such a chain has no nestings. No torch here.

Sources: Griewank and Walther, "Algorithm 799: revolve", ACM TOMS 26(1), 2000; Chen, Xu, Zhang, Guestrin, "Training deep
nets with sublinear memory cost", arXiv:1604.06174; Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova, "Optimal
checkpointing for heterogeneous chains", arXiv:1911.13214.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tightfit.core import Action, Advance, Choice, Trace, Unsupported
from tightfit.plan.program import leading_to, recipe

__all__ = ["Link", "Nesting", "Nestings", "Sweep", "chains", "cheapest", "nesting", "schedule", "slot_counts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """`unit` hands `value` to `user`, as its input number `place`."""

    unit: str
    user: str
    value: int  # id
    ordinal: int  # of the value in `unit`
    place: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A sweep from the input of unit `base` to the input of unit `target`, by place in the chain. On the way it stores
    the inputs of the units `stores`."""

    base: int
    target: int
    stores: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Nesting:
    """The inputs that are not kept, and the sweeps that make them again."""

    links: tuple[Link, ...]  # whose values are not kept in forward
    advances: tuple[Advance, ...]
    passes: Mapping[str, int]  # how often sweeps run through a unit

    def lends(self, unit: str) -> frozenset[int]:
        return frozenset(link.ordinal for link in self.links if link.unit == unit)

    def borrowed(self, unit: str) -> frozenset[int]:
        """Ids of the values that the unit is given and that are not kept for it."""
        return frozenset(link.value for link in self.links if link.user == unit)

    def on(self, choice: Choice) -> Choice:
        """`choice` with what the nesting adds to it."""
        places = {link.place for link in self.links if link.user == choice.unit}
        lends = self.lends(choice.unit)
        return dataclasses.replace(
            choice,
            actions=tuple(Action.RECOMPUTE if v in lends else action for v, action in enumerate(choice.actions)),
            inputs=tuple(
                Action.RECOMPUTE if k in places else choice.inputs[k] if k < len(choice.inputs) else Action.KEEP
                for k in range(max(max(places, default=-1) + 1, len(choice.inputs)))
            ),
            lends=tuple(sorted(lends)),
        )


def chains(trace: Trace) -> tuple[tuple[Link, ...], ...]:
    """The longest runs of units that each hand one value to the next and can make it again."""
    calls: dict[str, int] = defaultdict(int)
    for frame in trace.frames:
        calls[frame.unit] += 1
    pinned = {unit.path for unit in trace.units if unit.pinned}
    found: list[list[Link]] = [[]]
    for before, after in zip(trace.frames, trace.frames[1:], strict=False):
        handed = [
            (place, trace.values[v])
            for place, v in enumerate(after.inputs)
            if trace.values[v].unit == before.unit and trace.values[v].ordinal is not None
        ]
        program = trace.programs[before.id]
        plain = calls[before.unit] == calls[after.unit] == 1 and not pinned & {before.unit, after.unit}
        link = None
        if plain and program.needed and len(handed) == 1:
            place, value = handed[0]
            assert value.ordinal is not None
            with contextlib.suppress(Unsupported):
                recipe(program, frozenset(), frozenset([value.ordinal]))
                link = Link(unit=before.unit, user=after.unit, value=value.id, ordinal=value.ordinal, place=place)
        if link is None:
            found.append([])
        else:
            found[-1].append(link)
    return tuple(tuple(links) for links in found if len(links) > 1)


class Nestings:
    """Ways to keep fewer and fewer inputs of a trace. There are none for a step without a chain of units."""

    def __init__(self, trace: Trace, *, few: bool = False) -> None:
        self._trace, self._chains = trace, chains(trace)
        self._most = max((len(links) for links in self._chains), default=0)
        self.slots = slot_counts(self._most, few=few)

    def of(self, slots: int) -> Nesting:
        """With so many slots for the longest chain, and in proportion for the others."""
        parts = [
            nesting(links, seconds, max(1, slots * len(links) // self._most))
            for links, seconds in zip(self._chains, self._seconds, strict=True)
        ]
        return Nesting(
            links=tuple(link for part in parts for link in part.links),
            advances=tuple(sweep for part in reversed(parts) for sweep in part.advances),
            passes={unit: times for part in parts for unit, times in part.passes.items()},
        )

    @functools.cached_property
    def _seconds(self) -> list[list[float]]:
        return [[_pass_seconds(self._trace, link) for link in links] for links in self._chains]


def slot_counts(links: int, *, few: bool) -> tuple[int, ...]:
    """The numbers of slots to try for a chain of so many links, from the largest down. `few`: only some of them, each a
    good part smaller than the one before."""
    every = range(links - 1, 0, -1)
    return tuple(slots for slots in every if not few or slots in (links // 2, links // 4, 2))


#: The search ends when so many nestings in a row are no cheaper. Each has this part fewer slots than the one before.
_IN_VAIN = 3
_FEWER = 4


def cheapest(first: int, count: int, seconds: Callable[[int], float]) -> int:
    """The place of the cheapest of `count` nestings from the place `first` on, as far as few of them tell.

    They are tried from the least sweeping to the most. More sweeping may cost less, because units keep what it frees.
    Then those between the best and its neighbours are tried.
    """
    known = {first: seconds(first)}
    best = place = first
    in_vain = 0
    while in_vain < _IN_VAIN and place + 1 < count:
        place += max(1, (count - place) // _FEWER)
        known[place] = seconds(place)
        best, in_vain = (place, 0) if known[place] < known[best] else (best, in_vain + 1)
    while True:
        tried = sorted(known)
        at = tried.index(best)
        between = {(one + other) // 2 for one, other in itertools.pairwise(tried[max(0, at - 1) : at + 2])} - {*tried}
        if not between:
            return best
        known |= {place: seconds(place) for place in between}
        best = min(known, key=lambda place: known[place])


def _pass_seconds(trace: Trace, link: Link) -> float:
    """Seconds of running through `link.unit` when it keeps nothing."""
    frame = next(frame for frame in trace.frames if frame.unit == link.unit)
    program, lends = trace.programs[frame.id], frozenset([link.ordinal])
    chosen = recipe(program, frozenset(), lends)
    ran = set(leading_to(program, chosen, link.ordinal))
    unit = next(unit for unit in trace.units if unit.path == link.unit)
    return sum(trace.ops[op].seconds for op in unit.op_ids if trace.ops[op].ordinal in ran)


def nesting(links: Sequence[Link], seconds: Sequence[float], slots: int) -> Nesting:
    """The cheapest nesting in which at most `slots` inputs of the chain, besides its first unit's, are kept at once.

    `seconds[i]`: of running through the i-th unit, which the i-th link belongs to.
    """
    units = [links[0].unit, *(link.user for link in links)]
    kept, sweeps = schedule(tuple(seconds), slots)
    passes: dict[str, int] = defaultdict(int)
    for sweep in sweeps:
        for place in range(sweep.base, sweep.target):
            passes[units[place]] += 1
    return Nesting(
        links=tuple(link for place, link in enumerate(links, start=1) if place not in kept),
        advances=tuple(
            Advance(base=units[s.base], target=units[s.target], stores=tuple(units[m] for m in s.stores))
            for s in sweeps
        ),
        passes=dict(passes),
    )


@functools.lru_cache(maxsize=256)
def schedule(seconds: tuple[float, ...], slots: int) -> tuple[frozenset[int], tuple[Sweep, ...]]:
    """The schedule of a chain of `len(seconds) + 1` units: the places of the inputs that are kept in forward, and the
    sweeps of backward.

    `seconds[i]`: of running through unit i. The last unit is never run through.
    """
    tables = _tables(seconds)
    tables.reach(slots)
    kept: list[int] = []
    spine: list[tuple[int, int, int]] = []
    start, free = 0, slots
    while free and start < tables.units - 1:
        middle = tables.first(start, free)
        spine.append((start, middle, free))
        kept.append(middle)
        start, free = middle, free - 1
    sweeps = [Sweep(base=start, target=j, stores=()) for j in range(tables.units - 1, start, -1)]
    # what was stored to the right is gone by then, so all the slots that were free at its split are free again
    for begin, end, room in reversed(spine):
        sweeps += _reversed(tables, begin, end, room)
    return frozenset(kept), tuple(sweeps)


def _reversed(tables: _Tables, begin: int, end: int, slots: int) -> list[Sweep]:
    """The sweeps that take the units `begin` to `end - 1` backward, when the input of `begin` is there."""
    if end - begin < 2:
        return []
    spine: list[tuple[int, int, int]] = []
    start, free = begin, slots
    while free and end - start > 1:
        middle = tables.split(start, end, free)
        spine.append((start, middle, free))
        start, free = middle, free - 1
    stores = tuple(middle for _, middle, _ in spine if middle != end - 1)
    sweeps = [Sweep(base=begin, target=end - 1, stores=stores)]
    sweeps += [Sweep(base=start, target=j, stores=()) for j in range(end - 2, start, -1)]
    for left, right, room in reversed(spine):
        sweeps += _reversed(tables, left, right, room)
    return sweeps


@functools.lru_cache(maxsize=16)
def _tables(seconds: tuple[float, ...]) -> _Tables:
    """One object for a chain: what is worked out for many slots says all of fewer."""
    return _Tables(seconds)


class _Tables:
    """The recursion above, for all ranges, and for as many slots as have been asked about."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self.units = count = len(seconds) + 1
        self.run = np.concatenate([[0.0], np.cumsum(seconds)])  # run[j] - run[i]: through units i to j - 1
        cost = np.zeros((count + 1, count + 1))
        for a in range(count):
            cost[a, a + 2 :] = np.cumsum(self.run[a + 1 :] - self.run[a])[: count - a - 1]
        # by slots
        self.cost, self.splits = [cost], [np.zeros((count + 1, count + 1), dtype=np.int64)]
        # the split of the forward itself, which has passed every unit when backward begins
        self.forward, self.firsts = [cost[:count, count].copy()], [np.zeros(count, dtype=np.int64)]

    def reach(self, slots: int) -> None:
        """Work out what is asked of so many slots."""
        count, run = self.units, self.run
        for s in range(len(self.cost), slots + 1):
            # a range that has a slot for every input with one slot fewer is as it was
            cost, splits = self.cost[-1].copy(), self.splits[-1].copy()
            for length in range(max(2, min(s + 2, count)) if s > 1 else 2, count + 1):  # all ranges of one together
                begins = np.arange(count - length + 1)[:, None]
                middles = begins + np.arange(1, length)[None, :]
                totals = run[middles] - run[begins] + self.cost[-1][middles, begins + length] + cost[begins, middles]
                best, rows = totals.argmin(axis=1), begins[:, 0]
                cost[rows, rows + length] = totals[rows, best]
                splits[rows, rows + length] = middles[rows, best]
            forward, firsts = np.zeros(count), np.zeros(count, dtype=np.int64)
            for a in range(count - 1):
                middles = np.arange(a + 1, count)
                totals = self.forward[-1][middles] + cost[a, middles]
                best_of_all = int(np.argmin(totals))
                forward[a], firsts[a] = totals[best_of_all], middles[best_of_all]
            self.cost.append(cost)
            self.splits.append(splits)
            self.forward.append(forward)
            self.firsts.append(firsts)

    def split(self, begin: int, end: int, slots: int) -> int:
        return int(self.splits[slots][begin, end])

    def first(self, begin: int, slots: int) -> int:
        return int(self.firsts[slots][begin])
