"""Make a `Trace` from two recorded passes: the dry pass and the full pass.

Invariant: the ids of ops, values, saved tensors and frames are their positions in the trace.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from tightfit import accelerator
from tightfit.core import (
    Category,
    Device,
    Event,
    EventKind,
    Frame,
    Loss,
    Op,
    Phase,
    Program,
    Saved,
    Trace,
    Unit,
    Value,
    to_json,
)
from tightfit.device.cost import NOMINAL_CPU, NOMINAL_CUDA
from tightfit.step.environment import calibrated_here, environment
from tightfit.step.parallel import (
    resharded,
)
from tightfit.step.run import (
    device_of,
    leading_sizes,
)
from tightfit.step.signature import signature_of
from tightfit.trace.fake import FakeStep
from tightfit.trace.programs import program_of
from tightfit.trace.recorder import Call, Recorder
from tightfit.trace.unroll import trace_digest


@dataclass
class Assembly:
    """Turns two recorded passes into the frozen `Trace`.

    One thing because ops, values, saved tensors and events refer to one another by position.
    """

    model: nn.Module
    batch: Any
    dry: Recorder
    full: Recorder
    modules: Mapping[str, nn.Module]
    static: dict[str, int]
    gradients: set[int]
    fake: FakeStep | None
    notes: tuple[str, ...]
    seconds: Mapping[int, float]  # of each call that was timed
    pinned: dict[str, str] = field(default_factory=dict)

    def trace(self) -> Trace:
        full = self.full
        natural = self._natural_ends()
        outside = {
            (value, full.storages[value].frame)
            for value, frame, _ in full.saved
            if full.storages[value].frame is not None and full.storages[value].frame != frame
        }
        programs = {}
        for frame in full.frames:
            held = [i for i, v in enumerate(frame.values) if v not in natural or (v, frame.id) in outside]
            programs[frame.id] = program_of(full, frame, full.read, held)
            if frame.pinned:
                self.pinned.setdefault(frame.unit, frame.pinned)
        for path in {frame.unit for frame in full.frames}:
            if len({programs[frame.id].steps for frame in full.frames if frame.unit == path}) > 1:
                self.pinned.setdefault(path, "its calls in one step run different ops, and there is one plan for all")
        self._share_wanted(programs)
        needed = {full.saved[s][0] for s in full.read}
        units = self._units(programs)
        loss = self._loss_values()
        ops = tuple(
            Op(
                id=c.id, unit=c.unit, ordinal=c.ordinal, name=c.name, inputs=tuple(v for v, _ in c.reads),
                outputs=tuple(c.outputs), seconds=self.seconds.get(c.id, 0.0), flops=c.flops, kind=c.kind,
                phase=c.phase, frame=c.frame, scratch_bytes=c.scratch_bytes, sums_tied=c.sums_tied,
            )
            for c in full.calls
        )  # fmt: skip
        values = tuple(
            Value(
                id=s.id, size_bytes=s.size_bytes, dtype=s.dtype, shape=s.shape, producer=s.producer,
                unit=None if s.frame is None else full.frames[s.frame].unit, needed=s.id in needed,
                ordinal=s.ordinal, natural_end=natural.get(s.id),
                category=Category.GRADIENTS if s.id in self.gradients
                else Category.COLLECTIVES if s.collective
                else Category.LOSS if s.id in loss else Category.TEMPORARIES,
            )
            for s in full.storages
        )  # fmt: skip
        return Trace(
            units=units,
            frames=tuple(Frame(id=f.id, unit=f.unit, inputs=f.inputs) for f in full.frames),
            ops=ops,
            values=values,
            saved=tuple(
                Saved(id=i, value=value, frame=frame, ordinal=ordinal, read=i in full.read)
                for i, (value, frame, ordinal) in enumerate(full.saved)
            ),
            events=tuple(Event(what=what, subject=subject) for what, subject in full.events),
            programs=programs,
            static_bytes=self.static,
            device=self._device(),
            environment=environment(),
            digest=trace_digest(units, ops, values),
            batch_sizes=leading_sizes(self.batch),
            random_state_bytes=self._random_state_bytes(),
            notes=self.notes,
            losses=tuple(self._losses()),
            rowwise=tuple(full.rowwise),
            out_bytes_per_second=self.target.d2h_bytes_per_second,
            back_bytes_per_second=self.target.h2d_bytes_per_second,
            copies_beside=not self.target.is_host,
            resharded=resharded(self.model),
            expandable_segments=self.target.expandable_segments,
            calibration=self.target.calibration,
            frozen=tuple(full.frozen()),
        )

    @functools.cached_property
    def target(self) -> Device:
        """The device whose rates the planner reckons with: what was measured on it, where that was done."""
        if self.fake is not None and self.fake.target is not None:
            return self.fake.target
        device = accelerator.HOST if self.fake is not None else device_of(self.model)
        return calibrated_here(device, NOMINAL_CUDA if accelerator.has_streams(device) else NOMINAL_CPU)

    def _device(self) -> str:
        target = None if self.fake is None else self.fake.target
        return str(device_of(self.model)) if target is None else target.name

    def _random_state_bytes(self) -> int:
        """Bytes that one saved generator state takes on the device. A saved state of a GPU's generator is a CPU
        tensor."""
        if self.fake is not None and self.fake.cuda:
            return 0
        with _disable_current_modes():
            return accelerator.saved_state_bytes(device_of(self.model))

    def _loss_values(self) -> set[int]:
        """The values that are made after the last unit's forward and before the first unit's backward."""
        full = self.full
        exits = [i for i, (what, _) in enumerate(full.events) if what is EventKind.EXIT]
        loads = (
            i for i, (what, s) in enumerate(full.events) if what is EventKind.LOAD and full.saved[s][1] is not None
        )
        first, last = max(exits, default=0), next(loads, len(full.events))
        return {s for what, s in full.events[first:last] if what is EventKind.ALLOC} if exits else set()

    def _losses(self) -> Iterator[Loss]:
        """The cross entropies outside the units whose saved log-probabilities are only read by their own backward."""
        full = self.full
        readers: dict[int, list[Call]] = defaultdict(list)
        for call in full.calls:
            for value in dict.fromkeys(v for v, _ in call.reads):
                readers[value].append(call)
        freed = {subject: i for i, (what, subject) in enumerate(full.events) if what is EventKind.FREE}
        position = {subject: i for i, (what, subject) in enumerate(full.events) if what is EventKind.OP}
        for log_softmax, rows_bytes in full.log_softmaxes:
            call = full.calls[log_softmax]
            if call.frame is not None or len(call.fresh) != 1:
                continue
            saved = call.fresh[0]
            backward = [c for c in readers[saved] if c.phase is Phase.BACKWARD]
            names = [c.name for c in readers[saved]]
            if names != [
                f"aten.{n}.default" for n in ("nll_loss_forward", "nll_loss_backward", "_log_softmax_backward_data")
            ]:
                continue
            likelihood, softmax = backward
            size = full.storages[saved].size_bytes
            alike = all(len(c.fresh) == 1 and full.storages[c.fresh[0]].size_bytes == size for c in backward)
            made = [c.fresh[0] for c in backward] if alike else []
            if not made or any(v not in freed for v in (saved, *made)) or freed[saved] < position[softmax.id]:
                continue
            if [c.id for c in readers[made[0]]] != [softmax.id]:
                continue
            yield Loss(
                log_softmax=log_softmax,
                nll_backward=likelihood.id,
                softmax_backward=softmax.id,
                rows_bytes=rows_bytes,
            )

    def _share_wanted(self, programs: dict[int, Program]) -> None:
        """A plan has one program for each unit. So what backward reads in one call of a unit counts as read in all
        equal calls."""
        alike: dict[Any, list[int]] = defaultdict(list)
        for frame in self.full.frames:
            program = programs[frame.id]
            alike[frame.unit, program.slots, tuple(step.name for step in program.steps)].append(frame.id)
        for frames in alike.values():
            if len(frames) > 1:
                wanted = tuple(any(each) for each in zip(*(programs[f].wanted for f in frames), strict=True))
                programs.update({f: dataclasses.replace(programs[f], wanted=wanted) for f in frames})

    def _natural_ends(self) -> dict[int, int]:
        """For each value that dies in the dry pass, the event of the full pass after which only autograd holds it."""
        op_event = {subject: i for i, (what, subject) in enumerate(self.full.events) if what is EventKind.OP}
        ends: dict[int, int] = {}
        last = -1
        for what, subject in self.dry.events:
            if what is EventKind.OP:
                last = subject
            elif what is EventKind.FREE:
                ends[subject] = op_event[last]
        return ends

    def _units(self, programs: Mapping[int, Program]) -> tuple[Unit, ...]:
        units = []
        for path, module in self.modules.items():
            frames = [f for f in self.full.frames if f.unit == path]
            if not frames:
                continue
            content = json.dumps(
                [[to_json(programs[f.id]), [self.full.storages[v].size_bytes for v in f.values]] for f in frames]
            )
            units.append(
                Unit(
                    path=path,
                    digest=hashlib.sha256(content.encode()).hexdigest()[:16],
                    op_ids=tuple(c for f in frames for c in f.calls),
                    signature=signature_of(module),
                    pinned=self.pinned.get(path, ""),
                )
            )
        return tuple(units)
