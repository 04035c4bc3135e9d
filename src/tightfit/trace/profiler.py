"""What torch's profiler tells of a step: bytes by the allocator's own count, and which node of autograd ran which op.

Invariant: where the profiler lost events, the answer is zero or nothing. It is never a guess.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tightfit import accelerator
from tightfit.step.ops import changes_nothing, op_name
from tightfit.trace.timing import Sample, Stopwatch

_aten = torch.ops.aten


class Timer(TorchDispatchMode):
    """A mode for a pass that only measures: seconds of each op and, between `marks`, how the allocator saw each op."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.names: list[str] = []
        self.samples: list[Sample] = []
        self.stopwatch = Stopwatch(device)
        self.finished: list[bool] = []  # an op that raised is no op of the step, but has left its mark
        self.device = device
        self.has_queue = accelerator.is_card(device)
        self.counts = accelerator.counts_peak(device)
        self.risen_bytes: list[int] = []  # zeros on a card that does not count them; the host's profiler knows its own

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten.detach.default or func.namespace == "profiler" or changes_nothing(func, args):
            return func(*args, **(kwargs or {}))
        self.names.append(op_name(func))
        self.finished.append(False)
        out = self._timed(func, args, kwargs or {})
        self.finished[-1] = True
        return out

    def _timed(self, func: Any, args: Any, kwargs: Any) -> Any:
        with torch.profiler.record_function(MARK):
            before = accelerator.peak_begun(self.device) if self.has_queue and self.counts else 0
            self.stopwatch.start()
            out = func(*args, **kwargs)
            self.samples.append(self.stopwatch.stop())
            if self.has_queue:
                self.risen_bytes.append(accelerator.peak_risen_bytes(self.device, before) if self.counts else 0)
        return out


MARK = "tightfit::op"


def risen_bytes(profiler: Any, count: int) -> list[int]:
    """For each marked op, by how much the CPU allocator's count rose inside it."""
    events = profiler.profiler.kineto_results.events()
    marks = sorted((e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == MARK)
    memory = memory_events(profiler)
    if len(marks) != count:
        return [0] * count  # the profiler lost events; scratch is then only known as zero
    risen = []
    cursor = 0
    for start, end in marks:
        while cursor < len(memory) and memory[cursor][0] < start:
            cursor += 1
        level = top = 0
        while cursor < len(memory) and memory[cursor][0] <= end:
            level += memory[cursor][1]
            top = max(top, level)
            cursor += 1
        risen.append(top)
    return risen


_ENGINE = "autograd::engine::evaluate_function: "


#: What runs an op that autograd's engine calls itself, between two nodes, to sum gradients that meet.
ENGINE = "the engine"


def run_by(profiler: torch.profiler.profile, count: int) -> list[str]:
    """For each marked op: the node of autograd that ran it in a backward (`MulBackward0`), or `ENGINE`, or nothing."""
    results: Any = profiler.profiler
    threads: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
    for event in results.kineto_results.events():
        name = event.name()
        if name != "[memory]":
            threads[event.start_thread_id()].append((event.start_ns(), -(event.start_ns() + event.duration_ns()), name))
    marks: list[tuple[int, str]] = []
    for events in threads.values():
        open_events: list[tuple[int, str]] = []
        for start, minus_end, name in sorted(events):
            while open_events and open_events[-1][0] <= start:
                open_events.pop()
            if name == MARK:
                # the node's own event has the engine event's name without its prefix
                names = [each for _, each in open_events]
                engine = max((i for i, each in enumerate(names) if each.startswith(_ENGINE)), default=None)
                node = "" if engine is None else names[engine].removeprefix(_ENGINE)
                marks.append((start, node if engine is None or node in names[engine + 1 :] else ENGINE))
            open_events.append((-minus_end, name))
    marks.sort()
    return [node for _, node in marks] if len(marks) == count else [""] * count


def moment_of(profiler: torch.profiler.profile, name: str) -> int | None:
    """The nanosecond at which the first op or marked range of that name began. None: there is none."""
    results: Any = profiler.profiler
    return min((event.start_ns() for event in results.kineto_results.events() if event.name() == name), default=None)


def memory_events(profiler: torch.profiler.profile) -> list[tuple[int, int]]:
    """Every allocation and release that a finished CPU profile saw, in order: pairs of (nanosecond, change in bytes).

    Releases of what was allocated before the profile began are left out. For these torch reports the size of another
    block that was once at the same address.
    """
    results: Any = profiler.profiler
    found = []
    open_nodes = list(results.kineto_results.experimental_event_tree())
    while open_nodes:
        node = open_nodes.pop()
        open_nodes += node.children
        if node.tag == torch._C._profiler._EventType.Allocation:
            found.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
    found.sort()
    alive: set[int] = set()
    changes = []
    for nanosecond, address, changed_bytes in found:
        if changed_bytes > 0:
            alive.add(address)
        elif address not in alive:
            continue
        else:
            alive.remove(address)
        changes.append((nanosecond, changed_bytes))
    return changes
