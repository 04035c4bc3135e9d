"""The frozen weights of a deep model's blocks, from those of a few: the part of `unroll` that repeats `Trace.frozen`.

Invariant: what is named is named as the deep model's own trace would. Where the blocks' weights are not alike, or are
read beyond a neighbour, none is named; a module outside the blocks that runs inside the repeated ones is left out. What
is not named stays on the device. No torch here.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Protocol

from tightfit.core import FrozenWeights, Trace

__all__ = ["FrozenBlocks", "repeated_frozen"]


class FrozenBlocks:
    """Which block each entry of `Trace.frozen` is in."""

    def __init__(self, trace: Trace, period: int) -> None:
        self.block_of: dict[int, int] = {}  # by place in `Trace.frozen`
        self.unit_of: dict[int, str] = {}
        self.inside: dict[int, list[int]] = defaultdict(list)  # by block
        unit_at = {unit.path: index for index, unit in enumerate(trace.units)}
        for index, each in enumerate(trace.frozen):
            parts = each.module.split(".")
            for count in range(len(parts), 0, -1):
                path = ".".join(parts[:count])
                if path in unit_at:
                    block = unit_at[path] // period
                    self.block_of[index], self.unit_of[index] = block, path
                    self.inside[block].append(index)
                    break


class _Short(Protocol):
    """The trace of a few blocks, and what is where relative to a block."""

    trace: Trace
    owner: dict[str, dict[int, tuple[int, int]]]

    def _ref(self, kind: str, subject: int | None, block: int) -> Any: ...
    def _unit_ref(self, path: str | None, block: int) -> Any: ...


class _Deep(Protocol):
    """The numbers of the new trace."""

    block: int  # that is repeated

    def _positions(self, block: int) -> list[int]: ...
    def _path(self, ref: Any, position: int) -> str | None: ...
    def _must(self, kind: str, ref: Any, position: int) -> int: ...
    def _known(self, value: int) -> int: ...
    def _op_number(self, op: int) -> int: ...


def repeated_frozen(found: FrozenBlocks, short: _Short, deep: _Deep, op_count: int) -> tuple[FrozenWeights, ...]:
    """The entries of the deep trace, which has `op_count` ops, in the order of its modules."""
    return tuple(_entries(found, short, deep, op_count)) if _are_alike(found, short, deep.block) else ()


def _entries(found: FrozenBlocks, short: _Short, deep: _Deep, op_count: int) -> Iterator[FrozenWeights]:
    for index, each in enumerate(short.trace.frozen):
        block = found.block_of.get(index)
        if block is None:
            made = _outside(each, short, deep, op_count)
            if made is not None:
                yield made
        elif index == found.inside[block][0]:
            for position in deep._positions(block):
                for one in found.inside[block]:
                    suffix, unit, values, is_quantised, spans = _relative(found, short, one, block)
                    yield FrozenWeights(
                        module=f"{deep._path(unit, position)}{suffix}",
                        values=tuple(sorted(deep._must("value", ref, position) for ref in values)),
                        is_quantised=is_quantised,
                        spans=tuple(
                            _span(op_count if ref is None else deep._must("op", ref, position), count)
                            for ref, count in spans
                        ),
                    )


def _span(first: int, count: int) -> tuple[int, int]:
    return first, first + count


def _outside(each: FrozenWeights, short: _Short, deep: _Deep, op_count: int) -> FrozenWeights | None:
    """Of a module in no block; none where it runs in a block that is repeated, whose copies run it as well."""
    ops, values = short.owner["op"], short.owner["value"]
    touched = {ops[op][0] for first, end in each.spans for op in range(first, end) if op in ops}
    touched |= {values[value][0] for value in each.values if value in values}
    if touched & {deep.block, deep.block + 1}:
        return None
    end_of_all = len(short.trace.ops)
    return dataclasses.replace(
        each,
        values=tuple(sorted(deep._known(value) for value in each.values)),
        spans=tuple(
            _span(op_count if first == end_of_all else deep._op_number(first), end - first) for first, end in each.spans
        ),
    )


def _relative(found: FrozenBlocks, short: _Short, index: int, block: int) -> tuple[Any, ...]:
    """An entry relative to its block: the rest of its path, its unit, values, is it in 4 bits, and where it is read.

    That is the first op and how many there are; None stands for the end of all ops."""
    each, path = short.trace.frozen[index], found.unit_of[index]
    end_of_all = len(short.trace.ops)
    return (
        each.module[len(path) :], short._unit_ref(path, block),
        tuple(short._ref("value", value, block) for value in each.values), each.is_quantised,
        tuple(
            (None if first == end_of_all else short._ref("op", first, block), end - first) for first, end in each.spans
        ),
    )  # fmt: skip


def _are_alike(found: FrozenBlocks, short: _Short, block: int) -> bool:
    """Are the frozen weights of `block` read as those of the block after it, and is each block's in one place?"""
    for some in found.inside.values():
        if some != list(range(some[0], some[0] + len(some))):
            return False
    one, other = ([_relative(found, short, index, k) for index in found.inside[k]] for k in (block, block + 1))
    refs = [ref for _, _, values, _, spans in one for ref in (*values, *(first for first, _ in spans))]
    return one == other and all(ref is None or ref[0] == "global" or abs(ref[1]) <= 1 for ref in refs)
