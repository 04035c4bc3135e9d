"""The optimizer's step in a trace, put in another way. What the levers of the optimizer have in common.

Invariant: forward and backward keep their ops and values, and what other levers did to them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable

from tightfit.core import (
    Category,
    Event,
    EventKind,
    OptimizerPart,
    OptimizerStep,
    ParameterBytes,
    Phase,
    Stretch,
    Trace,
    Value,
)
from tightfit.core.by_trace import once_for_a_trace

#: Seconds that a call of one more op takes: Python, dispatcher, launch. An estimate, so that of two ways that both fit
#: the one with fewer calls is taken.
_CALL_SECONDS = 2e-5


def cut_text(at: OptimizerStep) -> str:
    """How much is stepped at once, for the settings of a plan."""
    return f"{at.chunk_bytes} sliced" if at.sliced else str(at.chunk_bytes)


def cut_of(text: str) -> tuple[int, bool]:
    """What `cut_text` wrote: bytes, and whether larger parameters are sliced."""
    size_bytes, _, sliced = text.partition(" ")
    return int(size_bytes), sliced == "sliced"


def moved(stretch: Stretch, ops: int, values: int) -> Stretch:
    """`stretch` with its ops counted from `ops` and its values from `values`."""
    return Stretch(
        ops=tuple(
            dataclasses.replace(
                op, id=op.id + ops, inputs=tuple(v + values for v in op.inputs),
                outputs=tuple(None if v is None else v + values for v in op.outputs),
            )
            for op in stretch.ops
        ),
        values=tuple(
            dataclasses.replace(
                value, id=value.id + values, producer=None if value.producer is None else value.producer + ops
            )
            for value in stretch.values
        ),
        events=tuple(
            Event(what=event.what, subject=event.subject + (ops if event.what is EventKind.OP else values))
            for event in stretch.events
        ),
    )  # fmt: skip


def only_made(stretch: Stretch) -> Stretch:
    """`stretch` with the values alone that it makes. Parameters, gradients and state are in the trace already."""
    made: dict[int, Value] = {}
    for value in stretch.values:
        if value.producer is not None:
            made[value.id] = dataclasses.replace(value, id=len(made))
    ops = tuple(
        dataclasses.replace(
            op,
            inputs=tuple(made[v].id for v in op.inputs if v in made),
            outputs=tuple(made[v].id for v in op.outputs if v is not None and v in made),
        )
        for op in stretch.ops
    )
    events = tuple(
        event if event.what is EventKind.OP else Event(what=event.what, subject=made[event.subject].id)
        for event in stretch.events
    )
    return Stretch(ops=ops, values=tuple(made.values()), events=events)


def highest_bytes(stretches: Iterable[Stretch]) -> int:
    """How far the live bytes rise in the stretches, which run one after the other."""
    level = highest = 0
    for stretch in stretches:
        for event in stretch.events:
            if event.what is EventKind.ALLOC:
                level += stretch.values[event.subject].size_bytes
            elif event.what is EventKind.FREE:
                level -= stretch.values[event.subject].size_bytes
            highest = max(highest, level)
    return highest


def whole_step(trace: Trace, at: OptimizerStep) -> Stretch:
    """The step as the trace has it, with numbers of its own."""
    found = Stretch(ops=trace.ops[at.ops :], values=trace.values[at.values :], events=trace.events[at.events :])
    return moved(found, -at.ops, -at.values)


def added_seconds(trace: Trace, before: Trace) -> float:
    """Seconds that the optimizer's ops of `trace` take longer than those of `before`. It is never nothing, so that a
    plan without the lever is preferred where both fit."""
    counts = [sum(op.phase is Phase.OPTIMIZER for op in each.ops) for each in (trace, before)]
    return max(1, counts[0] - counts[1]) * _CALL_SECONDS


# -- which parameters' state waits in host memory: those of at least so many bytes


def _waits(parameter: ParameterBytes, least_bytes: int | None) -> bool:
    return least_bytes is not None and parameter.size_bytes >= least_bytes and parameter.state_bytes > 0


def waiting_bytes(at: OptimizerStep, least_bytes: int) -> int:
    """Bytes of the state of parameters of at least `least_bytes`."""
    return sum(p.state_bytes for part in at.in_chunks for p in part.parameters if _waits(p, least_bytes))


def state_in_host(trace: Trace, least_bytes: int) -> Trace:
    """`trace` with the state of parameters of at least `least_bytes` in host memory but for their own step, and the
    step in chunks."""
    at = trace.optimizer
    assert at is not None
    state = Category.OPTIMIZER_STATE.value
    left = trace.static_bytes[state] - waiting_bytes(at, least_bytes)
    moved_out = dataclasses.replace(
        trace,
        static_bytes={**trace.static_bytes, state: left},
        optimizer=dataclasses.replace(at, waits_from_bytes=least_bytes),
    )
    return in_chunks(moved_out)


class _Retold:
    """A trace without its optimizer's step, to which parts of the step are put."""

    def __init__(self, trace: Trace, at: OptimizerStep) -> None:
        self.trace, self.at = trace, at
        self.ops, self.values = list(trace.ops[: at.ops]), list(trace.values[: at.values])
        self.events: list[Event] = []

    def put(self, part: OptimizerPart) -> None:
        """The step of `part`, with the state that waits elsewhere there meanwhile."""
        stretch = moved(part.stretch, len(self.ops), len(self.values))
        if not stretch.ops:
            return
        self.values += stretch.values
        brought = []
        for parameter in part.parameters:
            if _waits(parameter, self.at.waits_from_bytes):
                brought.append(len(self.values))
                value = Value(
                    id=len(self.values), size_bytes=parameter.state_bytes, dtype=parameter.dtype,
                    shape=(), producer=stretch.ops[0].id, unit=None, needed=False, category=Category.OPTIMIZER_STATE,
                )  # fmt: skip
                self.values.append(value)
        self.ops += stretch.ops
        self.events += [Event(what=EventKind.ALLOC, subject=value_id) for value_id in brought]
        self.events += stretch.events
        self.events += [Event(what=EventKind.FREE, subject=value_id) for value_id in brought]

    def made(self) -> Trace:
        return dataclasses.replace(
            self.trace, ops=tuple(self.ops), values=tuple(self.values), events=tuple(self.events)
        )


@once_for_a_trace
def in_chunks(trace: Trace) -> Trace:
    """`trace` with the optimizer's step a few parameters at a time."""
    at = trace.optimizer
    assert at is not None
    told = _Retold(trace, at)
    told.events += trace.events[: at.events]
    for part in at.in_chunks:
        told.put(part)
    return told.made()


def not_in_backward(trace: Trace) -> str:
    """Why no parameter of `trace` can be stepped in backward; empty: all can."""
    at = trace.optimizer
    if at is None:
        return "the trace has no optimizer's step"
    if at.refused:
        return at.refused
    if trace.static_bytes.get(Category.GRADIENTS.value, 0):
        return "there are gradients before the step: accumulated ones are stepped when all are there"
    ready = [trace.values[e.subject] for e in trace.events[: at.events] if e.what is EventKind.READY]
    if not ready:
        return "the trace does not say when gradients are there"
    came = Counter((value.dtype, value.size_bytes) for value in ready)
    if came - Counter((p.dtype, p.size_bytes) for part in at.in_chunks for p in part.parameters):
        return "the model has trained parameters that the optimizer does not hold"
    return ""


def in_backward(trace: Trace) -> Trace:
    """`trace` with each parameter stepped as soon as its gradient is there, and the gradient given back."""
    at = trace.optimizer
    assert at is not None
    alone = _by_kind(at)
    told = _Retold(trace, at)
    last = {e.subject: i for i, e in enumerate(trace.events[: at.events]) if e.what is EventKind.READY}
    for index, event in enumerate(trace.events[: at.events]):
        told.events.append(event)
        if event.what is EventKind.READY:
            gradient = trace.values[event.subject]
            told.put(alone[gradient.dtype, gradient.size_bytes])
            if last[gradient.id] == index:
                told.events.append(Event(what=EventKind.FREE, subject=gradient.id))
    return told.made()


def _by_kind(at: OptimizerStep) -> dict[tuple[str, int], OptimizerPart]:
    """The step of one parameter, by its dtype and bytes. A gradient may have been made in another shape than its
    parameter's, so of several parameters with the same bytes the one counts whose step rises highest."""
    found: dict[tuple[str, int], OptimizerPart] = {}
    for part in at.alone:
        kind = part.parameters[0].dtype, part.parameters[0].size_bytes
        if kind not in found or highest_bytes([part.stretch]) > highest_bytes([found[kind].stretch]):
            found[kind] = part
    return found
