"""Autocast's copies of weights, as plans have them.

Idea: such a copy is made by no unit's program, since the next forward may find it in autocast's cache, and it goes when
autocast's context ends. A unit that runs again casts its weights once more (`engine.casts`).

Invariant: the referee and the table read the same of a trace here, and each walks the step in its own way.
Refused: nothing; a copy that is changed in place is an ordinary value.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

from tightfit.core import EventKind, Kind, Op, Program, Saved, Trace
from tightfit.plan.program import expected

__all__ = ["cast_anew", "casts_of", "dropped_casts"]

_CAST = "aten._to_copy.default"


def casts_of(trace: Trace) -> dict[int, dict[int, Op]]:
    """For each frame, the copies of weights that autocast made in it: value ids, each with the op that made it.

    Such an op belongs to no frame, because the next forward may find the copy in autocast's cache. A copy that is
    changed in place is none.
    """
    found: dict[int, dict[int, Op]] = {frame.id: {} for frame in trace.frames}
    frame: int | None = None
    for event in trace.events:
        if event.what is EventKind.ENTER:
            frame = event.subject
        elif event.what is EventKind.EXIT:
            frame = None
        elif event.what is EventKind.OP and frame is not None:
            op = trace.ops[event.subject]
            if op.name == _CAST and op.ordinal is None:
                found[frame] |= {v: op for v in op.outputs if v is not None and trace.values[v].producer == op.id}
            elif op.kind is not Kind.VIEW:
                for value_id in found[frame].keys() & set(op.outputs):
                    del found[frame][value_id]
    return found


def dropped_casts(planned: Program, saved: Collection[Saved]) -> list[tuple[Saved, bool]]:
    """Of `saved`, autocast's copies of weights that a call saved, those that are not held where the call runs again;
    each with whether backward is expected to read it."""
    found = []
    for each in saved:
        assert each.ordinal is not None
        counted = expected(planned.slots, planned.wanted, each.ordinal, -1)
        if counted is not None:
            found.append((each, counted))
    return found


def cast_anew(
    trace: Trace,
    planned: Program,
    frame: int,
    casts: Mapping[int, Op],
    runs_at: Mapping[int, int],
    live: Callable[[float, int, int], None],
    *,
    saved_of: Mapping[int, Sequence[Saved]],
    freed: Mapping[int, int],
    released: Mapping[int, int],
    load: Mapping[int, int],
) -> tuple[dict[int, int], float]:
    """Tell `live` that the copies `casts` of a frame that runs again go after its forward and are made once more.

    `runs_at`: the events before which ops run again. Also the bytes of those copies that only such ops need, by their
    event; and the seconds that it takes.
    """
    end_of_step = len(trace.events)
    passing: dict[int, int] = defaultdict(int)
    seconds = 0.0
    for value_id, op in casts.items():
        value, saved = trace.values[value_id], saved_of.get(value_id, ())
        mine = [s for s, _ in dropped_casts(planned, [s for s in saved if s.frame == frame])]
        end = freed.get(value_id, end_of_step)
        natural = end if value.natural_end is None else value.natural_end
        gone = max(natural, *(released.get(s.id, end_of_step) for s in saved if s not in mine), -1)
        live(-value.size_bytes, gone, end)
        loaded = [s.id for s in mine if s.id in load]
        reads = [event for each, event in runs_at.items() if value_id in trace.ops[each].inputs]
        first = min([*(load[s] for s in loaded), *reads], default=-1)
        last = max([*(released.get(s, end_of_step) for s in loaded), *reads], default=-1)
        if last > gone:
            live(value.size_bytes, max(first - 1, gone), last)
            seconds += op.seconds
            if last in reads:
                passing[last] += value.size_bytes
    return passing, seconds
