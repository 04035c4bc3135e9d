"""Choose one option for each unit without a solver, by Lagrangian prices, repair and descent.

Idea: put a price on the bytes of every moment of the step. Each unit then chooses the option that is cheapest for
itself alone. The sum of these costs is a lower bound for every choice that fits (Fisher, Management Science 27(1),
1981). Prices rise at moments that are too full and fall at others (a subgradient method, with Polyak's step length). A
choice that does not fit is repaired by exchanging options, those first that free the most bytes for a second. A choice
that fits is improved by any exchange after which it still fits.

Invariant: a choice that is returned fits. The bound is not above the cost of any choice that fits.
Refused: a proof that nothing fits. `plan.choose` calls this module where the solver has no answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["cheapest", "lowest"]

Floats = np.ndarray[Any, np.dtype[np.float64]]
Whole = np.ndarray[Any, np.dtype[np.int64]]

#: How often prices are changed, and after how many changes a choice is repaired.
_ROUNDS, _REPAIRS_EVERY = 300, 25


def cheapest(seconds: Floats, usage: Floats, room: Floats, groups: Sequence[slice]) -> tuple[list[int] | None, float]:
    """One column of each group, of few seconds in all, such that `usage[:, columns].sum() <= room` in every row; and a
    lower bound of the seconds.

    `seconds`: (columns,); `usage`: bytes, (rows, columns); `room`: bytes, (rows,). The columns are None when no choice
    was found.
    """
    scale = float(max(1.0, np.abs(usage).max(initial=0.0)))
    usage, room = usage / scale, room / scale
    prices = np.zeros(len(room))
    best: list[int] | None = None
    best_seconds, bound, eager = np.inf, -np.inf, 1.0
    since = 0
    for turn in range(_ROUNDS):
        priced = seconds + prices @ usage
        chosen = [group.start + int(np.argmin(priced[group])) for group in groups]
        over = usage[:, chosen].sum(axis=1) - room
        rounding = 1e-12 * float(np.abs(priced[chosen]).sum() + prices @ np.abs(room))
        value = float(priced[chosen].sum() - prices @ room) - rounding
        since = 0 if value > bound else since + 1
        bound = max(bound, value)
        if since >= 15:
            eager, since = eager / 2, 0
        if turn % _REPAIRS_EVERY == 0 or (over <= 0).all():
            fitting = _repaired(seconds, usage, room, groups, chosen)
            if fitting is not None and float(seconds[fitting].sum()) < best_seconds:
                best, best_seconds = fitting, float(seconds[fitting].sum())
        if best_seconds - bound <= 1e-12 + 1e-9 * abs(bound):
            break
        # a row with room left and no price stays as it is, so it must not count in the step's length
        steep = np.where((over > 0) | (prices > 0), over, 0.0)
        length = float(steep @ steep)
        if length < 1e-18:
            break
        target = best_seconds if best is not None else value + 0.1 * (abs(value) + float(seconds.max(initial=0.0)))
        prices = np.maximum(0.0, prices + eager * max(target - value, 1e-12) / length * steep)
    return best, min(bound, best_seconds)


def lowest(seconds: Floats, usage: Floats, base: Floats, groups: Sequence[slice]) -> list[int]:
    """One column of each group, such that the largest of `base + usage[:, columns].sum()` is low.

    Found by descent, unit by unit, from the last column of each group. Among equally low columns the one of the fewest
    `seconds` is taken.
    """
    chosen = [group.stop - 1 for group in groups]
    level = base + usage[:, chosen].sum(axis=1)
    for _ in range(20):
        before = list(chosen)
        for index, group in enumerate(groups):
            without = level - usage[:, chosen[index]]
            tops = (without[:, None] + usage[:, group]).max(axis=0, initial=-np.inf)
            column = group.start + int(np.lexsort((seconds[group], tops))[0])
            chosen[index] = column
            level = without + usage[:, column]
        if chosen == before:
            break
    return chosen


def _repaired(
    seconds: Floats, usage: Floats, room: Floats, groups: Sequence[slice], start: Sequence[int]
) -> list[int] | None:
    """A choice near `start` that fits, improved as far as exchanges improve it. None: none was found."""
    chosen = np.array(start)
    group_of = np.concatenate([np.full(group.stop - group.start, i) for i, group in enumerate(groups)])

    def best_of_each(worth: Floats) -> list[tuple[int, int]]:
        """The best exchange of each group that has one, as (group, column), from the best on."""
        columns = [group.start + int(np.argmax(worth[group])) for group in groups]
        tops = worth[columns]
        return [(int(i), columns[i]) for i in np.argsort(-tops, kind="stable") if tops[i] > 0]

    over = usage[:, chosen].sum(axis=1) - room
    while (too_much := float(np.maximum(over, 0.0).sum())) > 0:
        current = chosen[group_of]
        freed = too_much - np.maximum(over[:, None] + usage - usage[:, current], 0.0).sum(axis=0)
        dearer = np.maximum(seconds - seconds[current], 0.0) + 1e-15
        exchanges = best_of_each(np.where(freed > 1e-12, freed / dearer, 0.0))
        if not exchanges:
            return None
        for group, column in exchanges:  # many at once: looking at all columns takes far longer than one exchange
            after = over + usage[:, column] - usage[:, chosen[group]]
            left = float(np.maximum(after, 0.0).sum())
            if left < too_much:
                chosen[group], over, too_much = column, after, left
            if too_much <= 0:
                break
    while True:
        current = chosen[group_of]
        fits = (over[:, None] + usage - usage[:, current] <= 0).all(axis=0)
        exchanges = best_of_each(np.where(fits, seconds[current] - seconds - 1e-15, 0.0))
        if not exchanges:
            return [int(column) for column in chosen]
        for group, column in exchanges:
            after = over + usage[:, column] - usage[:, chosen[group]]
            if (after <= 0).all():
                chosen[group], over = column, after
