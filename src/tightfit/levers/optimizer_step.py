"""The optimizer's step in a trace, put in another way. What the levers of the optimizer have in common.

Invariant: forward and backward keep their ops and values, and what other levers did to them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from tightfit.core import (
    Category,
    Event,
    EventKind,
    Lever,
    OptimizerPart,
    OptimizerStep,
    ParameterBytes,
    Phase,
    Plan,
    Status,
    Stretch,
    Trace,
    Value,
)
from tightfit.core.by_trace import once_for_a_trace
from tightfit.device.cost import copy_lanes

T = TypeVar("T")

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


def copying_seconds(trace: Trace, out_bytes: int, back_bytes: int, *, ahead: bool) -> float:
    """What the step waits for copies while the optimizer steps. `ahead`: those of both directions run at once, beside
    the ops."""
    out, back = copy_lanes(trace)
    seconds = out_bytes / out.bytes_per_second, back_bytes / back.bytes_per_second
    if not ahead:
        return sum(seconds)
    return max(0.0, max(seconds) - sum(op.seconds for op in trace.ops if op.phase is Phase.OPTIMIZER))


def not_by_parts(trace: Trace) -> str:
    """Why the optimizer of `trace` cannot step a few parameters at a time; empty: it can."""
    at = trace.optimizer
    if at is None:
        return "the trace has no optimizer's step"
    if at.refused or not at.in_chunks:
        return at.refused or "the optimizer's step cannot be taken a few parameters at a time"
    return ""


def with_advice(trace: Trace, reason: str) -> str:
    """`reason`, why a lever of the optimizer's step is ruled out, and what to do; empty where it is."""
    return (
        reason and f"{reason}; {'give the optimizer, or leave it out' if trace.optimizer is None else 'leave it out'}"
    )


# -- which parameters' state waits in host memory


class Waiting(NamedTuple):
    """Parameters of at least `from_bytes`, and the first `some` of those that are smaller, but not than
    `some_from_bytes`: in a stack of equal blocks, parameters have few sizes."""

    from_bytes: int
    some: int = 0
    some_from_bytes: int = 0

    @classmethod
    def of(cls, text: str) -> Waiting:
        """What `str` wrote."""
        from_bytes, _, more = text.partition("+")
        some, _, some_from = more.partition("x")
        return cls(int(from_bytes), int(some or 0), int(some_from or 0))

    def __str__(self) -> str:
        return f"{self.from_bytes}+{self.some}x{self.some_from_bytes}" if self.some else str(self.from_bytes)

    def chosen(self, sizes: Iterable[int]) -> Iterator[bool]:
        """Is it this one? Asked of the bytes of all trained parameters, in the optimizer's order."""
        left = self.some
        for size_bytes in sizes:
            is_among_some = left > 0 and self.some_from_bytes <= size_bytes < self.from_bytes
            left -= is_among_some
            yield is_among_some or size_bytes >= self.from_bytes


def waiting_of(at: OptimizerStep) -> Waiting | None:
    """Whose state waits elsewhere in `at`."""
    return (
        None if at.waits_from_bytes is None else Waiting(at.waits_from_bytes, at.waits_some, at.waits_some_from_bytes)
    )


def _parameters(at: OptimizerStep) -> list[ParameterBytes]:
    return [parameter for part in at.in_chunks for parameter in part.parameters]


def waiting_bytes(at: OptimizerStep, waiting: Waiting) -> int:
    """Bytes of the state that waits elsewhere."""
    parameters = _parameters(at)
    chosen = waiting.chosen(parameter.size_bytes for parameter in parameters)
    return sum(parameter.state_bytes for parameter, waits in zip(parameters, chosen, strict=True) if waits)


def by_size(at: OptimizerStep) -> list[tuple[Waiting, int]]:
    """From one parameter to all of them, the largest first and of equal ones the first: one more each time, and the
    bytes of their state."""
    alike: dict[int, list[int]] = defaultdict(list)
    for parameter in _parameters(at):
        alike[parameter.size_bytes].append(parameter.state_bytes)
    distinct = sorted(alike, reverse=True)
    found, moved_bytes = [], 0
    for place, size_bytes in enumerate(distinct):
        # the least that tells these from smaller ones, whatever the device rounds sizes to; the last are all
        from_bytes = distinct[place + 1] + 1 if place + 1 < len(distinct) else 1
        for some, state_bytes in enumerate(alike[size_bytes], start=1):
            moved_bytes += state_bytes
            is_all = some == len(alike[size_bytes])
            found.append((Waiting(from_bytes) if is_all else Waiting(size_bytes + 1, some, from_bytes), moved_bytes))
    return found


def state_in_host(trace: Trace, waiting: Waiting, *, ahead: bool = False) -> Trace:
    """`trace` with the state of these parameters in host memory but for their own step, and the step in chunks.
    `ahead`: it comes while the chunk before is stepped, and is there until the next one was."""
    at = trace.optimizer
    assert at is not None
    state = Category.OPTIMIZER_STATE.value
    left = trace.static_bytes[state] - waiting_bytes(at, waiting)
    moved_out = dataclasses.replace(
        trace,
        static_bytes={**trace.static_bytes, state: left},
        optimizer=dataclasses.replace(
            at, waits_from_bytes=waiting.from_bytes, waits_some=waiting.some,
            waits_some_from_bytes=waiting.some_from_bytes, state_ahead=ahead,
        ),
    )  # fmt: skip
    return in_chunks(moved_out)


# -- which gradients wait in host memory: those of at least so many bytes


def gradients_stay(trace: Trace) -> str:
    """Why no gradient of `trace` can wait in host memory; empty: all can."""
    at = trace.optimizer
    return not_by_parts(trace) or ("" if at is None else _not_told(trace, at))


def _not_told(trace: Trace, at: OptimizerStep) -> str:
    """Why the trace does not say of each trained parameter when its gradient is there; empty: it does."""
    ready = [trace.values[e.subject] for e in trace.events[: at.events] if e.what is EventKind.READY]
    if not ready:
        return "the trace does not say when gradients are there"
    came = Counter((value.dtype, value.size_bytes) for value in ready)
    if came - Counter((p.dtype, p.size_bytes) for part in at.in_chunks for p in part.parameters):
        return "the model has trained parameters that the optimizer does not hold"
    return ""


def waiting_gradients(trace: Trace, least_bytes: int) -> tuple[int, int]:
    """Bytes of the gradients of at least `least_bytes`, and those that backward of this trace adds to."""
    at = trace.optimizer
    assert at is not None
    there = {v.id for v in trace.values[: at.values] if v.category is Category.GRADIENTS and v.producer is None}
    ready = {event.subject for event in trace.events[: at.events] if event.what is EventKind.READY}
    sizes = {v: trace.values[v].size_bytes for v in there | ready}
    sizes = {v: size_bytes for v, size_bytes in sizes.items() if size_bytes >= least_bytes}
    return sum(sizes.values()), sum(size_bytes for v, size_bytes in sizes.items() if v in there & ready)


def gradients_in_host(trace: Trace, least_bytes: int) -> Trace:
    """`trace` with gradients of at least `least_bytes` in host memory, but while backward adds to one, or makes it, and
    for their own step, which is taken in chunks."""
    at = trace.optimizer
    assert at is not None
    values, events = list(trace.values[: at.values]), list(trace.events[: at.events])
    there = [v for v in values if v.category is Category.GRADIENTS and v.producer is None]
    left_bytes = sum(v.size_bytes for v in there if v.size_bytes >= least_bytes)
    written: dict[int, int] = {}  # by value, the event of the op that changed it last
    comes: dict[int, list[int]] = defaultdict(list)  # before an event
    goes: dict[int, list[int]] = defaultdict(list)  # after one
    last = {event.subject: i for i, event in enumerate(events) if event.what is EventKind.READY}
    for index, event in enumerate(events):
        if event.what is EventKind.OP:
            written.update((v, index) for v in trace.ops[event.subject].outputs if v is not None)
        if event.what is not EventKind.READY or values[event.subject].size_bytes < least_bytes:
            continue
        gradient = values[event.subject]
        if gradient.producer is not None:
            if last[gradient.id] == index:
                goes[index].append(gradient.id)
        elif gradient.id in written:  # it is brought for what backward adds to it
            added_at = written[gradient.id]
            values.append(dataclasses.replace(gradient, id=len(values), producer=events[added_at].subject))
            comes[added_at].append(values[-1].id)
            goes[index].append(values[-1].id)
    told: list[Event] = []
    for index, event in enumerate(events):
        told += [Event(what=EventKind.ALLOC, subject=value_id) for value_id in comes.get(index, ())]
        told.append(event)
        told += [Event(what=EventKind.FREE, subject=value_id) for value_id in goes.get(index, ())]
    gradients = Category.GRADIENTS.value
    moved_out = dataclasses.replace(
        trace,
        ops=trace.ops[: at.ops], values=tuple(values), events=tuple(told),
        static_bytes={**trace.static_bytes, gradients: trace.static_bytes.get(gradients, 0) - left_bytes},
        optimizer=dataclasses.replace(
            at, values=len(values), events=len(told), gradients_wait_from_bytes=least_bytes
        ),
    )  # fmt: skip
    return in_chunks(moved_out)


class _Retold:
    """A trace without its optimizer's step, to which parts of the step are put."""

    def __init__(self, trace: Trace, at: OptimizerStep) -> None:
        self.trace, self.at = trace, at
        self.ops, self.values = list(trace.ops[: at.ops]), list(trace.values[: at.values])
        self.events: list[Event] = []

    def put(self, part: OptimizerPart, state_waits: Iterable[bool]) -> None:
        """The step of `part`, with the gradients that wait elsewhere there meanwhile, and the state that does
        (`state_waits`: of each parameter)."""
        stretch = moved(part.stretch, len(self.ops), len(self.values))
        if not stretch.ops:
            return
        self.values += stretch.values
        brought = [*self._gradients(part, stretch), *self._state(part, state_waits, stretch)]
        self._step(stretch)
        self._let_go(brought)

    def put_ahead(self, turns: Iterable[tuple[OptimizerPart, list[bool]]]) -> None:
        """The steps of parts in turn, where the state of each comes during the step before its own and has left when
        the step behind its own is done."""
        stepped = [(part, waits) for part, waits in turns if part.stretch.ops]
        coming, there, leaving = iter(stepped), list[list[int]](), list[int]()
        for part, _ in stepped:
            stretch = moved(part.stretch, len(self.ops), len(self.values))
            self.values += stretch.values
            for each, waits in itertools.islice(coming, 1 if there else 2):
                there.append(list(self._state(each, waits, stretch)))
            gradients = list(self._gradients(part, stretch))
            self._step(stretch)
            self._let_go([*gradients, *leaving])
            leaving = there.pop(0)
        self._let_go(leaving)

    def _step(self, stretch: Stretch) -> None:
        self.ops += stretch.ops
        self.events += stretch.events

    def _let_go(self, value_ids: Iterable[int]) -> None:
        self.events += [Event(what=EventKind.FREE, subject=value_id) for value_id in value_ids]

    def _gradients(self, part: OptimizerPart, before: Stretch) -> Iterator[int]:
        """Those of the gradients of `part` that wait elsewhere come before the ops of `before`."""
        gradients_from = self.at.gradients_wait_from_bytes
        for parameter in part.parameters:
            if gradients_from is not None and parameter.size_bytes >= gradients_from:
                yield self._brought(Category.GRADIENTS, parameter.size_bytes, parameter.dtype, before)

    def _state(self, part: OptimizerPart, waits: Iterable[bool], before: Stretch) -> Iterator[int]:
        """The same for the state of `part`."""
        for parameter, is_waiting in zip(part.parameters, waits, strict=True):
            if is_waiting and parameter.state_bytes:
                yield self._brought(Category.OPTIMIZER_STATE, parameter.state_bytes, parameter.dtype, before)

    def _brought(self, category: Category, size_bytes: int, dtype: str, before: Stretch) -> int:
        value = Value(
            id=len(self.values), size_bytes=size_bytes, dtype=dtype, shape=(), producer=before.ops[0].id, unit=None,
            needed=False, category=category,
        )  # fmt: skip
        self.values.append(value)
        self.events.append(Event(what=EventKind.ALLOC, subject=value.id))
        return value.id

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
    waits = _state_waits(at, _parameters(at))
    turns = [(part, list(itertools.islice(waits, len(part.parameters)))) for part in at.in_chunks]
    if at.state_ahead:
        told.put_ahead(turns)
    else:
        for part, state_waits in turns:
            told.put(part, state_waits)
    return told.made()


def _state_waits(at: OptimizerStep, parameters: Sequence[ParameterBytes]) -> Iterator[bool]:
    """Does the state of each of `parameters`, all or one, wait elsewhere?"""
    waiting = waiting_of(at)
    return iter([False] * len(parameters)) if waiting is None else waiting.chosen(p.size_bytes for p in parameters)


def not_in_backward(trace: Trace) -> str:
    """Why no parameter of `trace` can be stepped in backward; empty: all can."""
    at = trace.optimizer
    if at is None:
        return "the trace has no optimizer's step"
    if at.refused:
        return at.refused
    if at.waits_some:
        return "state of some of several equal parameters waits elsewhere, and the trace does not tell these apart"
    if trace.static_bytes.get(Category.GRADIENTS.value, 0):
        return "there are gradients before the step: accumulated ones are stepped when all are there"
    return _not_told(trace, at)


def in_backward(trace: Trace) -> Trace:
    """`trace` with each parameter stepped as soon as its gradient is there, and the gradient given back. Gradients of a
    tied weight are summed in place."""
    at = trace.optimizer
    assert at is not None
    alone = _by_kind(at)
    told = _Retold(trace, at)
    events = _tied_in_place(trace, at)
    last = {e.subject: i for i, e in enumerate(events) if e.what is EventKind.READY}
    for index, event in enumerate(events):
        told.events.append(event)
        if event.what is EventKind.READY:
            gradient = trace.values[event.subject]
            part = alone[gradient.dtype, gradient.size_bytes]
            told.put(part, _state_waits(at, part.parameters))
            if last[gradient.id] == index:
                told.events.append(Event(what=EventKind.FREE, subject=gradient.id))
    return told.made()


def _tied_in_place(trace: Trace, at: OptimizerStep) -> list[Event]:
    """The events before the optimizer's step. Where gradients of a tied weight are summed, the first becomes it."""
    events = list(trace.events[: at.events])
    for op in trace.ops[: at.ops]:
        first, made = (op.inputs[0], op.outputs[0]) if op.sums_tied else (None, None)
        if first is None or made is None:
            continue
        freed, allocated = Event(what=EventKind.FREE, subject=first), Event(what=EventKind.ALLOC, subject=made)
        if freed in events:
            events.remove(freed)
            events.insert(events.index(allocated), freed)
    return events


def _by_kind(at: OptimizerStep) -> dict[tuple[str, int], OptimizerPart]:
    """The step of one parameter, by its dtype and bytes. A gradient may have been made in another shape than its
    parameter's, so of several parameters with the same bytes the one counts whose step rises highest."""
    found: dict[tuple[str, int], OptimizerPart] = {}
    for part in at.alone:
        kind = part.parameters[0].dtype, part.parameters[0].size_bytes
        if kind not in found or highest_bytes([part.stretch]) > highest_bytes([found[kind].stretch]):
            found[kind] = part
    return found


def eased_to(plan: Plan, divisions: Sequence[T], made: Callable[[T], Plan], peak_bytes: Callable[[Plan], int]) -> Plan:
    """`plan`, or what is made of it by the first of `divisions` that is within its budget. They move ever more."""
    enough, too_few = len(divisions), -1  # places in `divisions`; the last place is what the plan has
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        if peak_bytes(made(divisions[middle])) <= plan.budget_bytes:
            enough = middle
        else:
            too_few = middle
    return plan if enough == len(divisions) else made(divisions[enough])


def with_setting(plan: Plan, lever: Lever, text: str, more_seconds: float) -> Plan:
    """`plan` with another setting of `lever`, which takes so many seconds more."""
    return dataclasses.replace(
        plan, settings={**plan.settings, lever.value: text},
        other_seconds=max(0.0, plan.other_seconds + more_seconds), step_seconds=plan.step_seconds + more_seconds,
        status=Status.FEASIBLE,
    )  # fmt: skip
