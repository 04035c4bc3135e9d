"""What the replays of several units would hold, counted once.

Idea: a replay holds what it reads from outside its unit. In a dense network every layer reads all layers before it, so
many units may hold the same value. It is there as long as any of them holds it. So a value has a column for each of its
holders, in the order in which their backwards end, the last first. The column is at least one if that unit, or one
before it in this order, holds the value. What is live at a moment is then the column of the last unit whose backward
has not come yet.

Invariant: the columns never say less than the holders do. Refused: nothing; values beyond `_MOST` columns stay with
each of their holders.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]
Marks = np.ndarray[Any, np.dtype[np.int64]]

#: So many columns are made, for the values that would be counted too often by the most bytes. The solver's time grows
#: with them.
_MOST = 1500

#: A value that could be counted too often by less than this part of all such bytes is left as it is.
_LEAST = 1e-3


def counted_once(sizes_bytes: Sequence[int], readers: Mapping[int, int]) -> frozenset[int]:
    """The values that are worth columns. `readers`: the number of units that may hold each."""
    extra = {value: sizes_bytes[value] * (count - 1) for value, count in readers.items() if count > 1}
    least_bytes = _LEAST * sum(extra.values())
    found: set[int] = set()
    columns = 0
    for value in sorted(extra, key=lambda each: (-extra[each], each)):
        columns += readers[value]
        if columns > _MOST or extra[value] <= least_bytes:
            break
        found.add(value)
    return frozenset(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """The columns. Column c stands for at least one of the options `options[c]`, or for the column `after[c]`."""

    usage: Floats  # (moments, columns): bytes
    options: tuple[tuple[tuple[str, int], ...], ...]  # (unit path, index of its option)
    after: tuple[int | None, ...]

    def rows(self, columns: Sequence[tuple[str, int]]) -> list[tuple[list[int], int]]:
        """What implies each column, where those of these options come first: (columns, of whose sum it is at least)."""
        place = {option: index for index, option in enumerate(columns)}
        found = []
        for column, (options, before) in enumerate(zip(self.options, self.after, strict=True), start=len(columns)):
            found.append(([place[option] for option in options], column))
            if before is not None:
                found.append(([len(columns) + before], column))
        return found

    def apart(self, columns: Sequence[tuple[str, int]]) -> Floats:
        """Bytes that each of these options would hold if it held them alone: (moments, options)."""
        place = {option: index for index, option in enumerate(columns)}
        found = np.zeros((len(self.usage), len(columns)))
        chain: list[int] = []
        for column, (options, before) in enumerate(zip(self.options, self.after, strict=True)):
            chain = [] if before is None else chain
            chain += [place[option] for option in options]
            found[:, chain] += self.usage[:, [column]]
        return found

    def needed(self, chosen: Iterable[tuple[str, int]]) -> list[int]:
        """The columns that are one when these options are chosen."""
        taken = set(chosen)
        found: list[int] = []
        ones: set[int] = set()
        for column, (options, before) in enumerate(zip(self.options, self.after, strict=True)):
            if before in ones or not taken.isdisjoint(options):
                ones.add(column)
                found.append(column)
        return found


def nothing(moments: int) -> Holding:
    return Holding(usage=np.zeros((moments, 0)), options=(), after=())


def holding(
    held: Mapping[str, Sequence[Mapping[int, tuple[int, int]]]],
    sizes_bytes: Sequence[int],
    firsts: Marks,
    lasts: Marks,
) -> Holding:
    """The columns for what the options hold. `held`: of each option of each unit, the values with the first and the
    last mark at which it holds them. Moments are from `firsts` to `lasts`."""
    spans: dict[int, dict[str, tuple[int, int]]] = defaultdict(dict)
    holders: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for path, options in held.items():
        for index, values in enumerate(options):
            for value, (first, last) in values.items():
                before = spans[value].get(path, (first, last))
                spans[value][path] = min(before[0], first), max(before[1], last)
                holders[value][path].append(index)
    # values that the same options hold over the same marks are one
    together: dict[tuple[tuple[str, tuple[int, int], tuple[int, ...]], ...], int] = defaultdict(int)
    for value, by_path in spans.items():
        order = sorted(by_path, key=lambda path: (-by_path[path][1], path))
        together[tuple((path, by_path[path], tuple(holders[value][path])) for path in order)] += sizes_bytes[value]
    usage: list[Floats] = []
    chosen: list[tuple[tuple[str, int], ...]] = []
    after: list[int | None] = []
    for order_, size in together.items():
        begin = min(first for _, (first, _), _ in order_)
        ends = [last for _, (_, last), _ in order_]
        for place, (path, _, indices) in enumerate(order_):
            # this holder has not let go of it, and the next one in the order has
            until = ends[place + 1] if place + 1 < len(ends) else -1
            here = (firsts <= ends[place]) & (firsts > until) & (lasts >= begin)
            usage.append(np.where(here, float(size), 0.0))
            chosen.append(tuple((path, index) for index in indices))
            after.append(len(after) - 1 if place else None)
    columns = np.array(usage).T if usage else np.zeros((len(firsts), 0))
    return Holding(usage=columns, options=tuple(chosen), after=tuple(after))
