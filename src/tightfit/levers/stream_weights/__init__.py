"""Frozen weights in host memory: each is on the device only while the step reads it.

Needs from the trace: which modules have frozen weights that nothing else reads, and when they are read
(`Trace.frozen`).
Offers the planner: a part of the weights elsewhere, those first that are read least often, for the seconds of copying
them; a plan that has room left then streams fewer (`eased`). Walked by the referee: a copy is there for each call of
the module, for each backward node that reads the weight, and for each op that runs again. Carried out by `host`. Each
copy has the weight's bits, so it is proven bit by bit.

It is no default: it needs room elsewhere, and it has not been measured on a GPU.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from tightfit.core import (
    Category,
    Event,
    EventKind,
    FrozenWeights,
    Lever,
    Phase,
    Plan,
    PlanMismatch,
    Status,
    Trace,
    format_bytes,
)
from tightfit.core.changed import changed
from tightfit.device.cost import copy_lanes
from tightfit.levers.interface import Given, LeverDefinition, Share, Variant, Walked, gone_ahead
from tightfit.levers.stream_weights.requests import Request, foreseen, requests_of

__all__ = ["DEFINITION"]

#: In how many steps the planner goes from all weights resident to all of them streamed.
_DIVISIONS = 4

#: How many modules are tried for what room is left when one module more would be too many.
_FILLS = 8

#: How often the room that is left says how many more may stay, before the rest is halved.
_GUESSES = 4

#: Seconds that a copy takes beside its bytes: an estimate, so that of equal bytes fewer copies are taken.
_COPY_SECONDS = 2e-5


class StreamWeights(LeverDefinition):
    lever = Lever.STREAM_WEIGHTS
    noun = "frozen weights streamed from host memory"
    summary = "frozen weights wait in host memory, and each is on the device only while the step reads it"
    waits = "frozen weights"
    is_default = False
    lowers_floor = True

    def ruled_out(self, trace: Trace) -> str:
        if trace.frozen:
            return ""
        return (
            "it has no frozen weights that their own module alone reads, in one process and on one device; leave it out"
        )

    def variants(self, step: Variant) -> Iterator[Variant]:
        order = _within(step.trace, _in_order(step.trace), step.host_room_bytes)
        whole_bytes = sum(_bytes(step.trace, each) for each in order)
        before, count = 0.0, 0
        for division in range(1, _DIVISIONS + 1):
            least = count
            while count < len(order) and (
                count == least
                or sum(_bytes(step.trace, each) for each in order[:count]) * _DIVISIONS < whole_bytes * division
            ):
                count += 1
            if count == least:
                return
            streamed = order[:count]
            seconds = copy_seconds(step.trace, streamed)
            trace = streaming(step.trace, streamed)
            # what replays copy is in the ops' seconds, which count once in the step's own
            in_ops = sum(op.seconds for op in trace.ops) - sum(op.seconds for op in step.trace.ops)
            made = step.with_setting(
                self, trace, _text(step.trace, streamed), seconds=seconds,
                host_bytes=sum(_bytes(step.trace, each) for each in streamed),
            )  # fmt: skip
            yield dataclasses.replace(made, seconds=made.seconds - in_ops, eases_seconds=seconds - in_ops - before)
            before = copy_seconds(step.trace, streamed, ahead=step.trace.copies_beside)

    def eased(self, trace: Trace, plan: Plan, peak_bytes: Callable[[Plan], int]) -> Plan:
        if not self.is_used(plan):
            return plan
        order = [each for each in _in_order(trace) if each.module in set(self._paths(plan))]

        def room(streamed: Sequence[FrozenWeights]) -> int:
            return plan.budget_bytes - peak_bytes(self._streaming(trace, plan, streamed))

        enough, too_few = len(order), -1  # the first so many are streamed
        left_bytes, guesses = plan.budget_bytes - plan.peak_bytes, 0
        while enough - too_few > 1:
            # a weight that stays raises the peak by its bytes at most, and by less where one of its copies is there
            guess, stay_bytes = enough, 0
            while guess > 0 and stay_bytes + _bytes(trace, order[guess - 1]) <= left_bytes:
                guess -= 1
                stay_bytes += _bytes(trace, order[guess])
            guesses += 1
            if guesses > _GUESSES:
                guess = (enough + too_few) // 2
            guess = max(too_few + 1, min(guess, enough - 1))
            found_bytes = room(order[:guess])
            if found_bytes >= 0:
                enough, left_bytes = guess, found_bytes
            else:
                too_few = guess
        streamed, tries = order[:enough], 0
        for each in sorted(streamed, key=lambda each: -_bytes(trace, each)):
            if 0 < _bytes(trace, each) <= left_bytes and tries < _FILLS:
                tries += 1
                left = [other for other in streamed if other is not each]
                found_bytes = room(left)
                if found_bytes >= 0:
                    streamed, left_bytes = left, found_bytes
        return self._streaming(trace, plan, streamed)

    def _streaming(self, trace: Trace, plan: Plan, streamed: Sequence[FrozenWeights]) -> Plan:
        """`plan` with these weights streamed and no others."""
        known = set(self._paths(plan))
        ahead = self.is_ahead(plan)
        before = copy_seconds(trace, [each for each in trace.frozen if each.module in known], ahead=ahead)
        more = copy_seconds(trace, streamed, ahead=ahead) - before
        settings = {name: text for name, text in plan.settings.items() if name != self.lever.value}
        if streamed:
            settings[self.lever.value] = _text(trace, streamed)
        return dataclasses.replace(
            plan, settings=settings, other_seconds=max(0.0, plan.other_seconds + more),
            step_seconds=plan.step_seconds + more, status=Status.FEASIBLE,
        )  # fmt: skip

    def under(self, trace: Trace, plan: Plan) -> Trace:
        if not self.is_used(plan):
            return trace
        known = {each.module: each for each in trace.frozen}
        paths = self._paths(plan)
        lacking = next((path for path in paths if path not in known), None)
        if lacking is not None:
            raise PlanMismatch(
                f"the plan streams the frozen weights of {lacking!r}, and this trace does not know when they are read: "
                "make the plan anew, of this step"
            )
        return streaming(trace, [known[path] for path in paths], ahead=self.is_ahead(plan))

    def ahead(self, trace: Trace, plan: Plan) -> Plan:
        if not self.is_used(plan):
            return plan
        known = set(self._paths(plan))
        return gone_ahead(
            plan, self.lever, _beside_seconds(trace, [each for each in trace.frozen if each.module in known])
        )

    def moved(self, plan: Plan, path: Callable[[str], str]) -> Plan:
        sizes = plan.settings[self.lever.value].split()[:2]
        text = " ".join([*sizes, *(path(each) or _ROOT for each in self._paths(plan))])
        return dataclasses.replace(plan, settings={**plan.settings, self.lever.value: text})

    def in_force(self, model: Any, plan: Plan, given: Given) -> AbstractContextManager[None]:
        from tightfit.levers.stream_weights.host import streaming as streamed_from_host

        return streamed_from_host(
            model, self._paths(plan), given.pool, given.stats, given.device, ahead=self.is_ahead(plan)
        )

    def left_in_host(self, plan: Plan) -> Collection[str]:
        return frozenset(self._paths(plan)) if self.is_used(plan) else ()

    def new_stats(self) -> Any:
        from tightfit.levers.stream_weights.host import Streamed

        return Streamed()

    def not_compiled(self, plan: Plan, whole: bool) -> str:
        return "streams frozen weights from host memory" if self.is_used(plan) else ""

    def share(self, walked: Walked) -> Share | None:
        if not self.is_used(walked.plan):
            return None
        streamed = [each for each in walked.planned.frozen if each.module in set(self._paths(walked.plan))]
        return Share(
            lever=self.lever,
            bought_bytes=walked.bought_by_setting(self.lever),
            seconds=copy_seconds(walked.planned, streamed, ahead=self.is_ahead(walked.plan)),
            flops=0,
            what=self.said(walked.plan).removesuffix(": the same bits"),
        )

    def how(self, plan: Plan) -> str:
        return "with frozen weights in host memory"

    def said(self, plan: Plan) -> str:
        host_bytes, frozen_bytes = self._sizes(plan)
        count = len(self._paths(plan))
        return (
            f"{format_bytes(host_bytes)} of {format_bytes(frozen_bytes)} of frozen weights wait in host memory "
            f"({count} module{'s' if count > 1 else ''}), {format_bytes(frozen_bytes - host_bytes)} are resident"
            f"{', copied while others are read' if self.is_ahead(plan) else ''}: the same bits"
        )

    def fact(self, plan: Plan) -> tuple[str, str | None]:
        return "frozen weights", self.said(plan) if self.is_used(plan) else None

    def host_bytes(self, planned: Trace, plan: Plan) -> int:
        return self._sizes(plan)[0]

    def _sizes(self, plan: Plan) -> tuple[int, int]:
        host_bytes, frozen_bytes, *_ = plan.settings[self.lever.value].split()
        return int(host_bytes), int(frozen_bytes)

    def _paths(self, plan: Plan) -> list[str]:
        return [path if path != _ROOT else "" for path in plan.settings[self.lever.value].split()[2:]]


#: The model itself in the text of a plan, whose path is empty.
_ROOT = "."


def _text(trace: Trace, streamed: Sequence[FrozenWeights]) -> str:
    """For the settings of a plan: streamed bytes, all that could be streamed, and the modules."""
    sizes = [sum(_bytes(trace, each) for each in some) for some in (streamed, trace.frozen)]
    return " ".join([*map(str, sizes), *(each.module or _ROOT for each in streamed)])


def _bytes(trace: Trace, weights: FrozenWeights) -> int:
    return sum(trace.values[value].size_bytes for value in weights.values)


def _reads(trace: Trace) -> dict[int, int]:
    """How often backward asks for each value that autograd saved."""
    found: dict[int, int] = defaultdict(int)
    for saved in trace.saved:
        found[saved.value] += saved.read
    return found


def _in_order(trace: Trace) -> list[FrozenWeights]:
    """Those first whose bytes are copied least often in a step; of others, those that are read first in forward. Early
    blocks' weights are copied while little else lives: at the start of forward and at the end of backward."""
    reads = _reads(trace)

    def copies(weights: FrozenWeights) -> float:
        saved_bytes = sum(trace.values[value].size_bytes * reads[value] for value in weights.values)
        return len(weights.spans) + saved_bytes / max(1, _bytes(trace, weights))

    return sorted(trace.frozen, key=lambda each: (round(copies(each), 3), each.spans[0][0], each.module))


def _within(trace: Trace, order: Sequence[FrozenWeights], room_bytes: int | None) -> list[FrozenWeights]:
    """Those of `order`, the first first, that find room in `room_bytes` of host memory together."""
    found, taken_bytes = [], 0
    for each in order:
        if room_bytes is None or taken_bytes + _bytes(trace, each) <= room_bytes:
            found.append(each)
            taken_bytes += _bytes(trace, each)
    return found


def copy_seconds(trace: Trace, streamed: Sequence[FrozenWeights], *, ahead: bool = False) -> float:
    """What it takes to copy these weights in a step, but for what replays read. Whole numbers are added up, so that
    the order of a module's values does not matter. `ahead`: what of it is not beside the compute."""
    reads = _reads(trace)
    _, back = copy_lanes(trace)
    copies = [(value, len(each.spans) + reads[value]) for each in streamed for value in each.values]
    copied_bytes = sum(trace.values[value].size_bytes * count for value, count in copies)
    seconds = copied_bytes / back.bytes_per_second + sum(count for _, count in copies) * _COPY_SECONDS
    return seconds - _beside_seconds(trace, streamed) if ahead else seconds


def _beside_seconds(trace: Trace, streamed: Sequence[FrozenWeights]) -> float:
    """How long copies that begin one request early run beside the compute."""
    _, back = copy_lanes(trace)
    done = [0.0]  # seconds of the ops before each event
    for event in trace.events:
        done.append(done[-1] + (trace.ops[event.subject].seconds if event.what is EventKind.OP else 0.0))
    found = 0.0
    for one, other in foreseen(requests_of(trace, streamed)):
        sizes = [trace.values[value].size_bytes for value in other.values]
        seconds = sum(sizes) / back.bytes_per_second + len(sizes) * _COPY_SECONDS
        found += min(seconds, done[other.event] - done[one.event])
    return found


def streaming(trace: Trace, streamed: Sequence[FrozenWeights], *, ahead: bool = False) -> Trace:
    """`trace` with these weights elsewhere but while they are read. The copies that an op finds there count as bytes
    that the op holds beyond its results. `ahead`: copies are there from the request before their own on."""
    static = dict(trace.static_bytes)
    size_of = {value: trace.values[value].size_bytes for each in streamed for value in each.values}
    held: dict[int, int] = defaultdict(int)  # by op id
    for each in streamed:
        size_bytes = _bytes(trace, each)
        category = Category.QUANTISED if each.is_quantised else Category.PARAMETERS
        static[category.value] = static.get(category.value, 0) - size_bytes
        for first, end in each.spans:
            for op_id in range(first, end):
                held[op_id] += size_bytes
    loaded: dict[int, int] = {}
    for event in trace.events:
        if event.what is EventKind.LOAD and trace.saved[event.subject].value in size_of:
            loaded[event.subject] = size_of[trace.saved[event.subject].value]
        elif event.what is EventKind.RELEASE:
            loaded.pop(event.subject, None)
        elif event.what is EventKind.OP and loaded:
            held[event.subject] += sum(loaded.values())
    pairs = foreseen(requests_of(trace, streamed)) if ahead else []
    for one, other in pairs:
        for event in trace.events[one.event : other.event] if one.phase is Phase.FORWARD else ():
            if event.what is EventKind.OP:
                held[event.subject] += sum(size_of[value] for value in other.values)
    _, back = copy_lanes(trace)
    ops = []
    for op in trace.ops:
        again_bytes = sum(size_of.get(value, 0) for value in op.inputs) if op.phase is Phase.FORWARD else 0
        if held.get(op.id) or again_bytes:
            op = dataclasses.replace(
                op,
                scratch_bytes=op.scratch_bytes + held.get(op.id, 0),
                scratch_again_bytes=op.rerun_scratch_bytes + again_bytes,
                # a replay copies once more; forward's own copies are counted apart, this one time too many
                seconds=op.seconds + again_bytes / back.bytes_per_second,
            )
        ops.append(op)
    made = dataclasses.replace(trace, static_bytes=static, ops=tuple(ops))
    in_backward = [pair for pair in pairs if pair[0].phase is Phase.BACKWARD]
    return _fetched_in_backward(made, in_backward) if in_backward else made


def _fetched_in_backward(trace: Trace, pairs: Sequence[tuple[Request, Request]]) -> Trace:
    """`trace` with what is copied ahead in backward as values of its own, since replays in between find it there."""
    values = list(trace.values)
    before: dict[int, list[Event]] = defaultdict(list)
    behind: dict[int, list[Event]] = defaultdict(list)
    for one, other in pairs:
        for copied in other.values:
            like, maker = trace.values[copied], trace.ops[-1].id  # of backward or later, so that it is not of forward
            values.append(dataclasses.replace(like, id=len(values), producer=maker, needed=False, natural_end=None))
            begun = behind[one.event] if one.is_load else before[one.event]
            begun.append(Event(what=EventKind.ALLOC, subject=values[-1].id))
            before[other.event].insert(0, Event(what=EventKind.FREE, subject=values[-1].id))
    events: list[Event] = []
    places = []  # of the events that there are already
    for place, event in enumerate(trace.events):
        events += before.get(place, ())
        places.append(len(events))
        events += [event, *behind.get(place, ())]
    places.append(len(events))
    at = trace.optimizer
    return dataclasses.replace(
        trace,
        values=tuple(v if v.natural_end is None else changed(v, natural_end=places[v.natural_end]) for v in values),
        events=tuple(events),
        optimizer=None if at is None else dataclasses.replace(at, events=places[at.events]),
    )


DEFINITION = StreamWeights()
