"""Kept sets of a unit whose own backward holds less at its worst moment.

Idea: `plan.frontier` trades the bytes that a unit holds from forward to backward against seconds. It does not see what
the unit's backward holds for a while: values that are made again wait there until they are used. Keeping a narrow
value in the middle can mean that what lies before it is made later, so that the two halves are never there together.
From some points of the frontier this module adds and takes away one kept value at a time, as long as the worst moment
gets lower. All sets on the way are points: each has its own bytes, seconds and worst moment.

Invariant: what a set holds is what the caller says (`plan.table`).
Refused: nothing; where no change helps there are no points.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

from tightfit.core import Program, Unsupported
from tightfit.plan.frontier import Frontier, Point


class Worst(Protocol):
    def __call__(self, kept: frozenset[int], /, *, others: int) -> tuple[float, float]: ...


#: So many sets are tried in all, and at most so many for one unit. One costs about a millisecond.
TRIES, TRIES_EACH = 3200, 800

#: With fewer tries than this for one unit the way down would end before it leads anywhere.
_FEWEST_TRIES = 60

#: A change must lower the moment by this part of it, so that the way down is short.
_LOWER = 1e-3


def leaner(program: Program, found: Frontier, worst: Worst, *, others: int, kinds: int) -> list[Point]:
    """Points of a unit, where `others` units like it hold as much as it keeps while its backward runs.

    `worst(kept, others)` says what a set does: the bytes at its worst moment, and its seconds. `kinds` such searches
    are made in all.

    `kept_bytes` of these points says nothing: no bound may be taken from them.

    The way down starts at the point that keeps the fewest values and at three of the frontier. It counts what the
    others keep once fully and once not at all.
    """
    tries = min(TRIES_EACH, TRIES // kinds)
    if tries < _FEWEST_TRIES:
        return []
    values = sorted({v for step in program.steps for v in step.reads}.union(program.needed) - set(program.held))
    ways = [(start, weight) for start in starts_of(found) for weight in dict.fromkeys((0, others))]
    points: dict[frozenset[int], Point] = {}
    for start, weight in ways:
        for kept, seconds in _descent(functools.partial(worst, others=weight), start.kept, values, tries // len(ways)):
            points[kept] = Point(kept=kept, kept_bytes=0, seconds=seconds, passed_bytes=1)
    return list(points.values())


def starts_of(found: Frontier) -> list[Point]:
    """Where the ways down start."""
    assert found.barest is not None
    points = found.points
    return list(dict.fromkeys((found.barest, *(points[len(points) * part // 4] for part in (2, 1, 3)))))


def _descent(
    worst: Callable[[frozenset[int]], tuple[float, float]], kept: frozenset[int], values: list[int], tries: int
) -> list[tuple[frozenset[int], float]]:
    """The sets on the way down from `kept`, with their seconds. `worst` says of a set its worst moment and its
    seconds."""
    found: list[tuple[frozenset[int], float]] = []
    least, _ = worst(kept)
    since = 0  # changes without success
    while since < len(values):
        for value in values:
            if tries <= 0 or since >= len(values):
                return found
            tries -= 1
            since += 1
            changed = kept ^ {value}
            try:
                moment, seconds = worst(changed)
            except Unsupported:
                continue
            if moment < least * (1 - _LOWER):
                kept, least, since = changed, moment, 0
                found.append((kept, seconds))
    return found
