"""When a step reads the frozen weights of each module: what a lever needs that has them on the device only then.

Invariant: a module is only named where nothing else reads its weights, and nothing writes them.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tightfit.core import EventKind, FrozenWeights
from tightfit.step.parallel import Strategy, strategy_of
from tightfit.step.patches import MethodPatch, compiled_entries
from tightfit.step.weights import FrozenModule, frozen_modules, nodes_of_its_own
from tightfit.trace.recorder import Recorder


@dataclass
class _Seen:
    """One module's calls in a pass."""

    frozen: FrozenModule
    values: set[int]
    spans: list[tuple[int, int]] = field(default_factory=list)  # by op ids
    saved: list[tuple[int, int]] = field(default_factory=list)  # by saved ids
    is_read_elsewhere: bool = False  # or written


def watches_weights(model: nn.Module) -> bool:
    """Not where other parties keep weights elsewhere themselves, or code is compiled."""
    devices = {p.device for p in model.parameters()}
    return strategy_of(model) is Strategy.ONE and len(devices) == 1 and not compiled_entries(model)


class WeightsWatch:
    """Notes the calls of modules with frozen weights, in one pass of `recorder`."""

    def __init__(self, recorder: Recorder, model: nn.Module) -> None:
        self.recorder = recorder
        self.seen = []
        for each in frozen_modules(model):  # what belongs to a 4-bit weight is no parameter, so it is told of here
            values = {value for t in each.tensors() for value in [recorder.value_of(t)[0]] if value is not None}
            self.seen.append(_Seen(each, values))

    def patches(self) -> list[MethodPatch]:
        return [MethodPatch(seen.frozen.module, functools.partial(self._watched, seen)) for seen in self.seen]

    def _watched(self, seen: _Seen, original: Callable[..., Any]) -> Callable[..., Any]:
        recorder = self.recorder

        def forward(*args: Any, **kwargs: Any) -> Any:
            first = len(recorder.calls), len(recorder.saved)
            out = original(*args, **kwargs)
            if recorder.recording:
                seen.spans.append((first[0], len(recorder.calls)))
                seen.saved.append((first[1], len(recorder.saved)))
                for node in nodes_of_its_own(out, (args, kwargs)):
                    self._follow(seen, node)
            return out

        return forward

    def _follow(self, seen: _Seen, node: Any) -> None:
        recorder = self.recorder
        begun: list[int] = []

        def before(*_: Any) -> None:
            begun.append(len(recorder.calls))

        def after(*_: Any) -> None:
            seen.spans.append((begun.pop(), len(recorder.calls)))

        node.register_prehook(before)
        node.register_hook(after)

    def found(self) -> Iterator[FrozenWeights]:
        """The modules whose weights are read as the invariant says."""
        recorder = self.recorder
        owner = {value: seen for seen in self.seen for value in seen.values}
        for saved, (value, *_) in enumerate(recorder.saved):
            if value in owner and not _within(saved, owner[value].saved):
                owner[value].is_read_elsewhere = True
        open_loads: dict[int, int] = defaultdict(int)  # by value
        for what, subject in recorder.events:
            if what in (EventKind.LOAD, EventKind.RELEASE):
                value = recorder.saved[subject][0]
                if what is EventKind.LOAD:
                    open_loads[value] += 1
                elif subject in recorder.read:
                    open_loads[value] -= 1
            elif what is EventKind.OP:
                call = recorder.calls[subject]
                for value in {v for v, _ in call.reads} | set(call.writes):
                    seen = owner.get(value)
                    if seen is not None and (
                        value in call.writes or not (open_loads[value] > 0 or _within(subject, seen.spans))
                    ):
                        seen.is_read_elsewhere = True
        for seen in self.seen:
            if seen.spans and not seen.is_read_elsewhere:
                yield FrozenWeights(
                    module=seen.frozen.path,
                    values=tuple(sorted(seen.values)),
                    is_quantised=seen.frozen.is_quantised,
                    spans=tuple(seen.spans),
                )


def _within(number: int, spans: Iterable[tuple[int, int]]) -> bool:
    return any(first <= number < end for first, end in spans)
