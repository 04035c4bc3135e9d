"""When a step asks for streamed weights, and which copies of them can begin one request early: the referee's side.

A request is a call of a module, the backward of a node that holds weights itself, or a saved weight that backward
reads. While what one request brought is read, the copies for the next one are made. Which one is next is known where
it was the same one after every such request of a step. The first request of forward and that of backward are never
foreseen: before them the device is at its fullest. What replays read is copied when it is asked for.

Invariant: the same requests and the same copies as in the engine (`fetching`).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from tightfit.core import EventKind, FrozenWeights, Phase, Trace

__all__ = ["Request", "foreseen", "requests_of"]


class Request(NamedTuple):
    """The step asks for `values`: for a call before `event`, for a saved tensor at it."""

    key: tuple[Phase, Hashable]  # what asks, and when: it may ask several times
    event: int
    values: tuple[int, ...]
    is_load: bool

    @property
    def phase(self) -> Phase:
        return self.key[0]


def requests_of(trace: Trace, streamed: Sequence[FrozenWeights]) -> list[Request]:
    """The requests of the step, in order."""
    found: list[tuple[tuple[int, bool, int], Request]] = []
    at = {event.subject: place for place, event in enumerate(trace.events) if event.what is EventKind.OP}
    for each in streamed:
        for first, end in each.spans:
            if first in at:
                # of calls that begin with the same op, one that runs none was over before, and the longest is outermost
                order = at[first], first < end, -end
                key = trace.ops[first].phase, each.module
                found.append((order, Request(key, at[first], each.values, is_load=False)))
    known = {value for each in streamed for value in each.values}
    for place, event in enumerate(trace.events):
        if event.what is EventKind.LOAD and trace.saved[event.subject].value in known:
            value = trace.saved[event.subject].value
            found.append(((place, False, 0), Request((Phase.BACKWARD, value), place, (value,), is_load=True)))
    return [request for _, request in sorted(found, key=lambda each: each[0])]


def foreseen(order: Sequence[Request]) -> list[tuple[Request, Request]]:
    """Of the requests of a step: one, and the next one, whose copies are made meanwhile."""
    following: dict[tuple[Phase, Hashable], set[tuple[Phase, Hashable]]] = defaultdict(set)
    first = {request.key for request in order[:1]}
    for one, other in zip(order, [*order[1:], *order[:1]], strict=True):
        following[one.key].add(other.key)
        if one.phase is not other.phase:
            first.add(other.key)
    return [
        (one, other)
        for one, other in itertools.pairwise(order)
        if len(following[one.key]) == 1 and one.phase is other.phase and other.key not in first
    ]
