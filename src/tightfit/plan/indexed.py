"""A recorded step, looked up once for every walk that the referee makes over it.

Idea: a search asks the referee about the same trace hundreds of times. What does not depend on a plan is found the
first time and kept as long as the trace.

Invariant: nothing here depends on a plan, and nobody writes to it. Refused: nothing.
"""

from __future__ import annotations

import contextlib
import enum
import gc
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

from tightfit.core import Category, EventKind, Op, Phase, Program, Saved, Trace, Value
from tightfit.core.by_trace import once_for_a_trace
from tightfit.plan.casts import casts_of
from tightfit.plan.program import shared

__all__ = ["PLACE", "STATIC", "IndexedStep", "collecting_at_rests", "indexed", "rest", "without_collecting"]

#: Where a category stands in a row of live bytes.
PLACE = {category: place for place, category in enumerate(Category)}

#: Whose bytes are there when the step begins.
STATIC = (
    Category.PARAMETERS,
    Category.QUANTISED,
    Category.WORKSPACE,
    Category.GRADIENTS,
    Category.OPTIMIZER_STATE,
    Category.BUFFERS,
    Category.INPUTS,
    Category.COLLECTIVES,
)


class IndexedStep:
    """Of one trace."""

    def __init__(self, trace: Trace) -> None:
        self.ops_of: dict[int, list[Op]] = defaultdict(list)  # by frame, in the order of their ordinals
        for op in trace.ops:
            if op.frame is not None and op.ordinal is not None:
                self.ops_of[op.frame].append(op)
        #: What the ops of each frame make, ids in the order of the ops' ordinals.
        self.made_of = {
            frame: [tuple(v for v in op.outputs if v is not None and trace.values[v].producer == op.id) for op in ops]
            for frame, ops in self.ops_of.items()
        }
        self.values_of: dict[int, dict[int, int]] = {frame.id: {} for frame in trace.frames}  # ids, by ordinal
        for value in trace.values:
            if value.producer is not None and value.ordinal is not None:
                frame_id = trace.ops[value.producer].frame
                assert frame_id is not None
                self.values_of[frame_id][value.ordinal] = value.id
        self.slots_of: dict[int, list[Saved]] = defaultdict(list)  # by frame
        self.saved_of: dict[int, list[Saved]] = defaultdict(list)  # by value
        for saved in trace.saved:
            self.saved_of[saved.value].append(saved)
            if saved.frame is not None:
                self.slots_of[saved.frame].append(saved)
        self.calls: dict[str, list[Program]] = defaultdict(list)  # by unit
        for frame in trace.frames:
            self.calls[frame.unit].append(trace.programs[frame.id])
        self._shared: dict[str, Program | None] = {}
        self._index_events(trace)
        self.casts_of = casts_of(trace)  # by frame
        self.places = [PLACE[category_of(trace, value)] for value in trace.values]  # where a value's bytes are counted
        self.labels = [_label(op) for op in trace.ops]

    def _index_events(self, trace: Trace) -> None:
        """The events by what happens at them; by subject."""
        at: dict[EventKind, dict[int, int]] = {what: {} for what in EventKind}
        self.first_load: dict[int, int] = {}
        for index, event in enumerate(trace.events):
            at[event.what][event.subject] = index
            if event.what is EventKind.LOAD:
                self.first_load.setdefault(event.subject, index)
        self.released, self.enters, self.exits = at[EventKind.RELEASE], at[EventKind.ENTER], at[EventKind.EXIT]
        freed, end = at[EventKind.FREE], len(trace.events)
        self.ends = [freed.get(value.id, end) for value in trace.values]  # the event after which a value is gone
        self.gone: dict[int, list[int]] = defaultdict(list)  # the values that go after an event
        for value in trace.values:
            if value.producer is not None:
                self.gone[self.ends[value.id]].append(value.id)
        self.sizes = [value.size_bytes for value in trace.values]
        self.scratch_bytes = [op.scratch_bytes for op in trace.ops]
        #: At each event: the value that comes, the op that is done, the values that go.
        self.happens: list[tuple[int | None, int | None, Sequence[int]]] = [
            (
                event.subject if event.what is EventKind.ALLOC else None,
                event.subject if event.what is EventKind.OP else None,
                self.gone.get(place, ()),
            )
            for place, event in enumerate(trace.events)
        ]

    def program_of(self, unit: str) -> Program | None:
        """One program for all calls of a unit; none: the calls run different ops."""
        if unit not in self._shared:
            self._shared[unit] = shared(self.calls[unit])
        return self._shared[unit]


def category_of(trace: Trace, value: Value) -> Category:
    """Under which category the bytes of a value are counted."""
    if value.category is not Category.TEMPORARIES:
        return value.category
    in_forward = value.producer is not None and trace.ops[value.producer].phase is Phase.FORWARD
    return Category.SAVED if value.needed and in_forward else Category.TEMPORARIES


def _label(op: Op) -> str:
    if op.phase is Phase.OPTIMIZER:
        return f"optimizer step: {op.name}"
    return f"{op.phase.value} of {op.unit or 'outside the units'}: {op.name}"


@once_for_a_trace
def indexed(trace: Trace) -> IndexedStep:
    """The index of `trace`."""
    return IndexedStep(trace)


@contextlib.contextmanager
def without_collecting() -> Iterator[None]:
    """Python looks for no garbage in cycles meanwhile. Planning makes none, but so many small objects that looking for
    it took a fifth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _Rests(enum.Enum):
    """What a rest does."""

    NOTHING = enum.auto()
    COLLECTS = enum.auto()
    FREEZES = enum.auto()  # after it has collected


_rests: ContextVar[_Rests] = ContextVar("rests", default=_Rests.NOTHING)


@contextlib.contextmanager
def collecting_at_rests() -> Iterator[None]:
    """Garbage in cycles is only looked for where `rest` is called meanwhile, and what is left then is not looked at
    again until this closes. A forecast makes traces of a hundred thousand entries each, and a search for garbage would
    walk through all of them every time. Where something is frozen already it walks: a part of what is frozen cannot be
    let go of."""
    outer = _rests.get()
    freezes = outer is _Rests.FREEZES or (outer is _Rests.NOTHING and not gc.get_freeze_count())
    token = _rests.set(_Rests.FREEZES if freezes else _Rests.COLLECTS)
    try:
        with without_collecting():
            yield
    finally:
        _rests.reset(token)
        if freezes and outer is _Rests.NOTHING:
            gc.unfreeze()


def rest() -> None:
    """A recording has ended, which leaves fake tensors in cycles."""
    if _rests.get() is not _Rests.NOTHING:
        gc.collect()
    if _rests.get() is _Rests.FREEZES:
        gc.freeze()
