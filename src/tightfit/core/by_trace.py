"""What is worked out for a trace, found again while the trace is in use.

Idea: a search asks the same of a trace many times over: what a lever makes of it, what a walk through it says. Traces
are told apart by identity, since to compare two of them takes longer than most of that work.

Invariant: what is kept for a trace goes with it, and nobody writes to it. Refused: nothing.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from tightfit.core.recorded import Trace

__all__ = ["LatestOfTraces", "once_for_a_trace"]

T = TypeVar("T")


def once_for_a_trace(make: Callable[[Trace], T]) -> Callable[[Trace], T]:
    """`make`, which is only called the first time that a trace is asked about."""
    known: dict[int, tuple[weakref.ref[Trace], T]] = {}

    @functools.wraps(make)
    def found(trace: Trace) -> T:
        key = id(trace)
        if key not in known:
            known[key] = weakref.ref(trace, lambda _: known.pop(key, None)), make(trace)
        return known[key][1]

    return found


class LatestOfTraces(Generic[T]):
    """The latest answers to questions about traces, so many of them."""

    def __init__(self, many: int) -> None:
        self.many = many
        self._known: dict[tuple[int, Hashable], tuple[weakref.ref[Trace], T]] = {}

    def of(self, trace: Trace, question: Hashable, answer: Callable[[], T]) -> T:
        """The answer that is known to `question` about `trace`, or a new one."""
        key = id(trace), question
        known = self._known.pop(key, None)
        if known is None:
            known = weakref.ref(trace, lambda _: self._known.pop(key, None)), answer()
        self._known[key] = known  # the last is the latest
        while len(self._known) > self.many:
            self._known.pop(next(iter(self._known)), None)  # another thread may have been here
        return known[1]
