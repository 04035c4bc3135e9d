"""A deep model's trace from a shallow one's: repeat the blocks that do the same.

Idea: each block of a decoder does the same to its neighbours. So the trace of eighty blocks differs from the trace of
four only in how often the middle is repeated. What a block does is written down relative to the block itself ("this
block's third value", "the last value of the block before"). These notes are compared for two neighbours. Only if they
are equal, the first of the two is repeated between them. A trace of any depth then costs the time of a few blocks.

Invariant: the result is the trace that the deep model itself would give, entry by entry (the tests compare them).
Refused: blocks that differ, blocks that reach past their neighbours, and blocks whose order in backward is not the
reverse of forward. The answer is then `None`, and the deep model itself has to be traced. No torch here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from tightfit.core import Event, EventKind, Frame, Op, Saved, Trace, Unit, Value
from tightfit.core.changed import changed
from tightfit.trace.unroll_weights import FrozenBlocks, repeated_frozen

__all__ = ["LEAST_BLOCKS", "trace_digest", "unroll"]


def trace_digest(units: Iterable[Unit], ops: Iterable[Op], values: Iterable[Value]) -> str:
    """What a plan is bound to: the units' programs and parameters, every op's name, and the bytes that each op
    makes."""
    made: dict[int, int] = defaultdict(int)
    for value in values:
        if value.producer is not None:
            made[value.producer] += value.size_bytes
    content = json.dumps([[u.path, u.digest, u.signature] for u in units] + [[op.name, made[op.id]] for op in ops])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def unroll(trace: Trace, paths: Sequence[str], period: int = 1) -> Trace | None:
    """The trace of the model whose units are `paths`, made from `trace`, whose units are a shallow excerpt of them.

    `period`: how many neighbouring units make one block. The third block is repeated until there are as many units as
    `paths` names. The answer is `None` when the trace has less than five blocks, has no two equal blocks in its middle,
    or is of another kind.
    """
    missing = len(paths) - len(trace.units)
    if missing == 0:
        return trace
    if missing < 0 or missing % period or len(trace.frames) != len(trace.units):
        return None
    if len(trace.units) % period or len(trace.units) // period < LEAST_BLOCKS:
        return None
    blocks = _Blocks.of(trace, period)
    if blocks is None or blocks.template(2) != blocks.template(3):
        return None
    whole = blocks.repeated(2, missing // period, paths)
    if whole is None:
        return None
    tiled = (unroll(variant, paths, period) for variant in trace.tiled)
    return dataclasses.replace(whole, tiled=tuple(variant for variant in tiled if variant is not None))


#: The first and the last block are special, the second hands its gradient to the first, and two must be compared.
LEAST_BLOCKS = 5


#: What FSDP2 does before a block's backward: it fills the block's weights, and looks at them.
_GATHERS = frozenset({"storage.resize_", "fsdp.split_with_sizes_copy.default"})
_LOOKS = frozenset({"aten.view.default", "aten.as_strided.default", "aten.detach.default", "aten.slice.Tensor"})


def _gathered(trace: Trace, load: int) -> int:
    """The event where the backward of a block begins, whose weights are filled before `load` reads the first tensor."""
    at = load - 1
    while at >= 0 and trace.events[at].what is not EventKind.LOAD:
        event = trace.events[at]
        if event.what is EventKind.OP and trace.ops[event.subject].name == "fsdp.split_with_sizes_copy.default":
            break
        at -= 1
    else:
        return load
    while at > 0:
        before = trace.events[at - 1]
        if before.what is EventKind.OP and trace.ops[before.subject].name not in _GATHERS | _LOOKS:
            break
        if before.what not in (EventKind.OP, EventKind.ALLOC, EventKind.FREE):
            break
        at -= 1
    return at


#: A block and those on both sides of it.
_NEIGHBOURS = 3


class _Blocks:
    """A trace cut into blocks: which events belong to each block's forward and backward, and which block owns what."""

    def __init__(self, trace: Trace, period: int, forward: list[int], backward: list[int]) -> None:
        self.trace, self.period = trace, period
        self.count = len(forward) - 1
        events = trace.events
        self.block_of_event: list[int | None] = [None] * len(events)
        self.offset: list[int] = list(range(len(events)))
        self.spans: dict[tuple[str, int], range] = {}
        for k in range(self.count):
            self.spans["forward", k] = range(forward[k], forward[k + 1])
            # backward runs the blocks in reverse; nothing marks the end of the first block's, so it counts as outside
            self.spans["backward", k] = range(backward[k], backward[k - 1]) if k else range(0)
        for (_, k), span in self.spans.items():
            for i in span:
                self.block_of_event[i] = k
        self.frozen = FrozenBlocks(trace, period)
        self._own()

    @classmethod
    def of(cls, trace: Trace, period: int) -> _Blocks | None:
        count = len(trace.units) // period
        enters = {e.subject: i for i, e in enumerate(trace.events) if e.what is EventKind.ENTER}
        exits = {e.subject: i for i, e in enumerate(trace.events) if e.what is EventKind.EXIT}
        first_load: dict[int, int] = {}
        for i, event in enumerate(trace.events):
            if event.what is EventKind.LOAD:
                frame = trace.saved[event.subject].frame
                if frame is not None:
                    first_load.setdefault(frame // period, i)
        order = [frame.unit for frame in trace.frames]
        if order != [unit.path for unit in trace.units] or len(first_load) != count:
            return None
        forward = [enters[k * period] for k in range(count)] + [exits[count * period - 1] + 1]
        backward = [_gathered(trace, first_load[k]) for k in range(count)] + [len(trace.events)]
        falling = backward[:-1]
        if forward != sorted(forward) or falling != sorted(falling, reverse=True) or forward[-1] > falling[-1]:
            return None
        return cls(trace, period, forward, backward)

    # -- who owns what

    def _own(self) -> None:
        trace = self.trace
        self.owner: dict[str, dict[int, tuple[int, int]]] = {"op": {}, "value": {}, "saved": {}, "frame": {}}
        self.owned: list[dict[str, list[int]]] = [
            {"op": [], "value": [], "saved": [], "frame": []} for _ in range(self.count)
        ]

        def claim(kind: str, subject: int, block: int) -> None:
            mine = self.owned[block][kind]
            self.owner[kind][subject] = (block, len(mine))
            mine.append(subject)

        for event, block in zip(trace.events, self.block_of_event, strict=True):
            if block is not None and event.what is EventKind.OP:
                claim("op", event.subject, block)
            elif block is not None and event.what is EventKind.ALLOC:
                claim("value", event.subject, block)
        for frame in trace.frames:
            claim("frame", frame.id, frame.id // self.period)
        for saved in trace.saved:
            if saved.frame is not None:
                claim("saved", saved.id, saved.frame // self.period)
        # parameters and what else was there before: a block's own when nobody else touches them, but for its
        # neighbours, in whose time FSDP2 gathers its weights
        users: dict[int, set[int | None]] = defaultdict(set)
        order: dict[int, None] = {}
        for op in trace.ops:
            block = self.owner["op"].get(op.id, (None, 0))[0]
            for value in (*op.inputs, *(v for v in op.outputs if v is not None)):
                users[value].add(block)
                order[value] = None
        allocated = {e.subject for e in trace.events if e.what is EventKind.ALLOC}
        for value in order:
            if value in allocated or None in users[value]:
                continue
            near = sorted(user for user in users[value] if user is not None)
            if near[-1] - near[0] < _NEIGHBOURS:
                claim("value", value, (near[0] + near[-1]) // 2)
        for index, block in self.frozen.block_of.items():
            for value in trace.frozen[index].values:
                if value not in users and value not in allocated:
                    claim("value", value, block)

    def _ref(self, kind: str, subject: int | None, block: int) -> Any:
        if subject is None:
            return None
        found = self.owner[kind].get(subject)
        return ("global", 0, subject) if found is None else ("own", found[0] - block, found[1])

    def _event_ref(self, event: int | None, block: int) -> Any:
        """A place in the order of events, relative to the block."""
        if event is None:
            return None
        for name in ("forward", "backward"):
            for k in range(max(0, block - 1), min(self.count, block + 2)):
                span = self.spans[name, k]
                if event in span:
                    return (name, k - block, event - span.start)
        return ("global", 0, event)

    def _unit_ref(self, path: str | None, block: int) -> Any:
        if path is None:
            return None
        index = next((i for i, unit in enumerate(self.trace.units) if unit.path == path), None)
        return ("path", 0, path) if index is None else ("unit", index // self.period - block, index % self.period)

    # -- what a block does, relative to it

    def template(self, block: int) -> Any:
        trace, own = self.trace, self.owned[block]
        return (
            tuple(self._events(("forward", block))), tuple(self._events(("backward", block))),
            tuple(self._op(i, block) for i in own["op"]), tuple(self._value(i, block) for i in own["value"]),
            tuple(self._saved(i, block) for i in own["saved"]), tuple(self._frame(i, block) for i in own["frame"]),
            tuple(u.digest + u.signature + u.pinned for u in trace.units[block * self.period :][: self.period]),
        )  # fmt: skip

    def _events(self, span: tuple[str, int]) -> Iterable[tuple[EventKind, Any]]:
        for i in self.spans[span]:
            event = self.trace.events[i]
            yield event.what, self._ref(_KIND[event.what], event.subject, span[1])

    def _op(self, op_id: int, block: int) -> tuple[Any, ...]:
        op = self.trace.ops[op_id]
        return (
            op.name, op.ordinal, op.kind, op.phase, op.flops, op.scratch_bytes,
            tuple(self._ref("value", v, block) for v in op.inputs),
            tuple(self._ref("value", v, block) for v in op.outputs),
            self._ref("frame", op.frame, block), self._unit_ref(op.unit, block),
        )  # fmt: skip

    def _value(self, value_id: int, block: int) -> tuple[Any, ...]:
        value = self.trace.values[value_id]
        return (
            value.size_bytes, value.dtype, value.shape, value.needed, value.ordinal, value.category,
            self._ref("op", value.producer, block), self._unit_ref(value.unit, block),
            self._event_ref(value.natural_end, block),
        )  # fmt: skip

    def _saved(self, saved_id: int, block: int) -> tuple[Any, ...]:
        saved = self.trace.saved[saved_id]
        return (
            self._ref("value", saved.value, block),
            self._ref("frame", saved.frame, block),
            saved.ordinal,
            saved.read,
        )

    def _frame(self, frame_id: int, block: int) -> tuple[Any, ...]:
        return tuple(self._ref("value", v, block) for v in self.trace.frames[frame_id].inputs)

    # -- the deep trace

    def repeated(self, block: int, times: int, paths: Sequence[str]) -> Trace | None:
        """The trace with `times` copies of `block` after it."""
        plan = [*range(block + 1), *([block] * times), *range(block + 1, self.count)]
        build = _Build(self, plan, block, times, paths)
        return build.trace() if build.possible() else None


_KIND = {
    EventKind.OP: "op", EventKind.ALLOC: "value", EventKind.FREE: "value", EventKind.LOAD: "saved",
    EventKind.RELEASE: "saved", EventKind.ENTER: "frame", EventKind.EXIT: "frame", EventKind.READY: "value",
}  # fmt: skip


class _Build:
    """Builds the new trace and numbers everything anew. `sources[position]` is the block that the new block repeats.

    One thing because each of its steps numbers what the next ones refer to.
    """

    def __init__(self, blocks: _Blocks, sources: list[int], block: int, times: int, paths: Sequence[str]) -> None:
        self.blocks, self.sources, self.block, self.times, self.paths = blocks, sources, block, times, paths
        self.reaches_over = False
        self.numbers: dict[tuple[str, int | None, int], int] = {}  # (kind, new block or None, number there) -> new id
        self._number()

    def possible(self) -> bool:
        """Nothing outside the blocks may depend on one in the middle, and no block on one beyond its neighbours."""
        blocks, trace = self.blocks, self.blocks.trace
        for k in range(blocks.count):
            for kind, detail in (("op", blocks._op), ("value", blocks._value), ("saved", blocks._saved)):
                for subject in blocks.owned[k][kind]:
                    if any(abs(distance) > 1 for distance in _distances(detail(subject, k))):
                        return False
            for name in ("forward", "backward"):
                if k in (self.block, self.block + 1) and any(
                    abs(distance) > 1 for _, ref in blocks._events((name, k)) for distance in _distances(ref)
                ):
                    return False
        middle = (self.block, self.block + 1)
        for op in trace.ops:
            if op.id not in blocks.owner["op"]:
                touched = (blocks.owner["value"].get(v, (None,))[0] for v in (*op.inputs, *op.outputs) if v is not None)
                if any(k in middle for k in touched):
                    return False
        return True

    def _number(self) -> None:
        blocks, trace = self.blocks, self.blocks.trace
        for kind, count in (("value", len(trace.values)), ("saved", len(trace.saved)), ("frame", len(trace.frames))):
            # what belongs to no block keeps its old order; the blocks follow one another
            fresh = iter(range(count * (self.times + 2)))
            before = [i for i in range(count) if i not in blocks.owner[kind]]
            for subject in before:
                self.numbers[kind, None, subject] = next(fresh)
            for position, source in enumerate(self.sources):
                for i in range(len(blocks.owned[source][kind])):
                    self.numbers[kind, position, i] = next(fresh)
        self.events: list[tuple[EventKind, str, int | None, int]] = []  # what, kind, new block, number there
        self.places: dict[tuple[str, int, int], int] = {}  # (forward or backward, new block, offset) -> new event
        self.global_places: dict[int, int] = {}
        forward = {blocks.spans["forward", k].start: k for k in range(blocks.count)}
        backward = {blocks.spans["backward", k].start: k for k in range(1, blocks.count)}
        index = 0
        while index < len(trace.events):
            if index in forward:
                k = forward[index]
                for position in self._positions(k):
                    self._emit("forward", k, position)
                index = blocks.spans["forward", k].stop
            elif index in backward:
                k = backward[index]
                for position in reversed(self._positions(k)):
                    self._emit("backward", k, position)
                index = blocks.spans["backward", k].stop
            else:
                self.global_places[index] = len(self.events)
                self._emit_global(trace.events[index])
                index += 1
        fresh_op = 0
        for what, kind, where, number in self.events:
            if what is EventKind.OP:
                self.numbers[kind, where, number] = fresh_op
                fresh_op += 1

    def _positions(self, block: int) -> list[int]:
        return [position for position, source in enumerate(self.sources) if source == block]

    def _emit(self, name: str, block: int, position: int) -> None:
        for offset, (what, ref) in enumerate(self.blocks._events((name, block))):
            self.places[name, position, offset] = len(self.events)
            self._put(what, ref, position)

    def _put(self, what: EventKind, ref: Any, position: int) -> None:
        where, distance, number = ref
        kind = _KIND[what]
        if where == "global":
            self.events.append((what, kind, None, number))
        else:
            self.events.append((what, kind, self._near(position, distance), number))

    def _near(self, position: int, distance: int) -> int:
        """The new block at `distance` from the one at `position`; beyond a neighbour, counted in the old order."""
        if abs(distance) <= 1:
            return position + distance
        target = self.sources[position] + distance
        return self._positions(target)[0 if distance > 0 else -1]

    def _emit_global(self, event: Event) -> None:
        kind = _KIND[event.what]
        found = self.blocks.owner[kind].get(event.subject)
        if found is None:
            self.events.append((event.what, kind, None, event.subject))
            return
        for position in self._positions(found[0]):  # what ends with the step ends for every copy
            self.events.append((event.what, kind, position, found[1]))

    # -- resolving

    def _new(self, kind: str, ref: Any, position: int | None) -> int | None:
        if ref is None:
            return None
        where, distance, number = ref
        if where == "global":
            return self.numbers[kind, None, number]
        assert position is not None
        return self.numbers[kind, self._near(position, distance), number]

    def _new_old(self, kind: str, subject: int | None) -> int | None:
        """The new number of something that an entry outside the blocks refers to."""
        if subject is None:
            return None
        found = self.blocks.owner[kind].get(subject)
        if found is None:
            return self.numbers[kind, None, subject]
        return self.numbers[kind, self._positions(found[0])[-1], found[1]]

    def _path(self, ref: Any, position: int) -> str | None:
        if ref is None:
            return None
        where, distance, number = ref
        if where == "path":
            return str(number)
        return str(self.paths[self._near(position, distance) * self.blocks.period + number])

    def _place(self, ref: Any, position: int) -> int | None:
        if ref is None:
            return None
        where, distance, offset = ref
        if where == "global":
            return self._global_place(offset)
        return self.places[where, position + distance, offset]

    def _global_place(self, event: int) -> int:
        """New index of an old event that is in no neighbouring block."""
        if event in self.global_places:
            return self.global_places[event]
        k = self.blocks.block_of_event[event]
        assert k is not None
        for name in ("forward", "backward"):
            span = self.blocks.spans[name, k]
            if event in span:
                return self.places[name, self._positions(k)[-1], event - span.start]
        raise AssertionError(event)

    def trace(self) -> Trace:
        blocks, old = self.blocks, self.blocks.trace
        ops: dict[int, Op] = {}
        values: dict[int, Value] = {}
        saved: dict[int, Saved] = {}
        frames: dict[int, Frame] = {}
        programs = {}
        for op in old.ops:
            if op.id not in blocks.owner["op"]:
                number = self.numbers["op", None, op.id]
                ops[number] = changed(
                    op, id=number, inputs=tuple(self._known(v) for v in op.inputs),
                    outputs=tuple(self._new_old("value", v) for v in op.outputs), unit=self._old_path(op.unit),
                    frame=self._new_old("frame", op.frame),
                )  # fmt: skip
        for value in old.values:
            if value.id not in blocks.owner["value"]:
                number = self.numbers["value", None, value.id]
                natural = None if value.natural_end is None else self._global_place(value.natural_end)
                values[number] = changed(
                    value, id=number, producer=self._new_old("op", value.producer), natural_end=natural,
                    unit=self._old_path(value.unit),
                )  # fmt: skip
        for each in old.saved:
            if each.id not in blocks.owner["saved"]:
                number = self.numbers["saved", None, each.id]
                saved[number] = changed(each, id=number, value=self._known(each.value))
        for position, source in enumerate(self.sources):
            own = blocks.owned[source]
            for i, op_id in enumerate(own["op"]):
                *_, inputs, outputs, frame, unit = blocks._op(op_id, source)
                number = self.numbers["op", position, i]
                ops[number] = changed(
                    old.ops[op_id], id=number, inputs=tuple(self._must("value", r, position) for r in inputs),
                    outputs=tuple(self._new("value", r, position) for r in outputs),
                    frame=self._new("frame", frame, position), unit=self._path(unit, position),
                )  # fmt: skip
            for i, value_id in enumerate(own["value"]):
                *_, producer, unit, natural_ref = blocks._value(value_id, source)
                number = self.numbers["value", position, i]
                values[number] = changed(
                    old.values[value_id], id=number, producer=self._new("op", producer, position),
                    unit=self._path(unit, position), natural_end=self._place(natural_ref, position),
                )  # fmt: skip
            for i, saved_id in enumerate(own["saved"]):
                value_ref, frame_ref, _, _ = blocks._saved(saved_id, source)
                number = self.numbers["saved", position, i]
                saved[number] = changed(
                    old.saved[saved_id], id=number, value=self._must("value", value_ref, position),
                    frame=self._new("frame", frame_ref, position),
                )  # fmt: skip
            for i, frame_id in enumerate(own["frame"]):
                number = self.numbers["frame", position, i]
                frames[number] = Frame(
                    id=number, unit=self.paths[position * blocks.period + i],
                    inputs=tuple(self._must("value", r, position) for r in blocks._frame(frame_id, source)),
                )  # fmt: skip
                programs[number] = old.programs[frame_id]
        events = tuple(
            Event(what=what, subject=self.numbers[kind, position, number])
            for what, kind, position, number in self.events
        )
        all_ops = tuple(ops[i] for i in range(len(ops)))
        all_values = tuple(values[i] for i in range(len(values)))
        all_frames = tuple(frames[i] for i in range(len(frames)))
        units = tuple(self._units(all_ops, all_frames))
        return dataclasses.replace(
            old, units=units, frames=all_frames, ops=all_ops, values=all_values,
            saved=tuple(saved[i] for i in range(len(saved))), events=events, programs=programs,
            digest=trace_digest(units, all_ops, all_values),
            frozen=repeated_frozen(blocks.frozen, blocks, self, len(all_ops)),
            losses=tuple(
                dataclasses.replace(
                    loss, log_softmax=self.numbers["op", None, loss.log_softmax],
                    nll_backward=self.numbers["op", None, loss.nll_backward],
                    softmax_backward=self.numbers["op", None, loss.softmax_backward],
                )
                for loss in old.losses
            ),
            rowwise=tuple(
                dataclasses.replace(
                    ops, first=self.numbers["op", None, ops.first], last=self.numbers["op", None, ops.last],
                    buffer=self.numbers["value", None, ops.buffer],
                )
                for ops in old.rowwise
            ),
        )  # fmt: skip

    def _op_number(self, op: int) -> int:
        """The new number of the first copy of an op."""
        found = self.blocks.owner["op"].get(op)
        if found is None:
            return self.numbers["op", None, op]
        return min(self.numbers["op", position, found[1]] for position in self._positions(found[0]))

    def _must(self, kind: str, ref: Any, position: int) -> int:
        number = self._new(kind, ref, position)
        assert number is not None
        return number

    def _known(self, value: int) -> int:
        number = self._new_old("value", value)
        assert number is not None
        return number

    def _old_path(self, path: str | None) -> str | None:
        if path is None:
            return None
        index = next((i for i, unit in enumerate(self.blocks.trace.units) if unit.path == path), None)
        if index is None:
            return path
        period = self.blocks.period
        return self.paths[self._positions(index // period)[-1] * period + index % period]

    def _units(self, ops: Sequence[Op], frames: Sequence[Frame]) -> Iterable[Unit]:
        in_frame: dict[int, list[int]] = defaultdict(list)
        for op in ops:
            if op.frame is not None:
                in_frame[op.frame].append(op.id)
        period = self.blocks.period
        for frame in frames:
            source = self.sources[frame.id // period] * period + frame.id % period
            yield dataclasses.replace(
                self.blocks.trace.units[source], path=frame.unit, op_ids=tuple(in_frame[frame.id])
            )


def _distances(detail: Any) -> Iterable[int]:
    """How many blocks away the references in a template entry reach."""
    if isinstance(detail, tuple):
        if len(detail) == 3 and detail[0] in ("own", "unit"):
            yield detail[1]
        else:
            for each in detail:
                yield from _distances(each)
