"""Record the optimizer's step on fake copies of the parameters, and put it behind the trace.

It is recorded as it is, and in the other ways that give the same bits: a few parameters at a time, and each parameter
alone.

Invariant: no parameter is updated, and no data is copied.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tightfit.core import (
    Category,
    Device,
    Event,
    EventKind,
    InvalidInput,
    Op,
    OptimizerPart,
    OptimizerStep,
    ParameterBytes,
    Phase,
    Stretch,
    Trace,
    Unsupported,
    Value,
)
from tightfit.levers.optimizer_step import moved, only_made
from tightfit.step.optimizers import (
    Cut,
    Part,
    bare,
    chunks,
    cut_for,
    movable_state,
    not_torchs_own,
    refusal,
    step_parts,
)
from tightfit.step.parallel import (
    local_of,
)
from tightfit.step.run import (
    elsewhere,
    tensors_in,
    unique_bytes,
)
from tightfit.trace.fake import FakeStep
from tightfit.trace.recorder import Recorder
from tightfit.trace.unroll import trace_digest


@dataclass(frozen=True)
class OptimizerRecord:
    """One step of an optimizer: what ran, in its own way and in others, and the bytes of the state it had before."""

    whole: Stretch
    state_bytes: int
    cut: Cut
    in_chunks: tuple[OptimizerPart, ...]
    alone: tuple[OptimizerPart, ...]
    refused: str


#: What numbers in the state are taken to be: one, as ASGD's weight of the mean is for long, or another number where a
#: step divides by what is left of one (NAdam).
_GUESSES = (1.0, 2.0)


def record_optimizer(
    optimizer: torch.optim.Optimizer, target: Device | None = None, *, refused: str = ""
) -> OptimizerRecord:
    """Record one step of `optimizer` on fake copies of its parameters. The first step builds the state; the second is
    recorded. `refused`: why no other ways to step are wanted.

    Whether the step is `foreach` is decided as torch decides it for the real parameters, or for the target's. For fake
    parameters torch would silently switch it off.
    """
    for guess in _GUESSES[:-1]:
        with contextlib.suppress(ZeroDivisionError):
            return _recorded_by(guess, bare(optimizer), target, refused)
    return _recorded_by(_GUESSES[-1], bare(optimizer), target, refused)


def _recorded_by(
    guess: float, optimizer: torch.optim.Optimizer, target: Device | None, refused: str
) -> OptimizerRecord:
    step = FakeStep(target, guess=guess)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    groups = []
    parameters: list[torch.Tensor] = []
    for group in optimizer.param_groups:
        chosen = dict(group)
        trained = [p for p in group["params"] if p.requires_grad]
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            from torch.optim.optimizer import _default_to_fused_or_foreach

            chosen["foreach"] = (
                step.cuda or _default_to_fused_or_foreach(trained, group.get("differentiable", False), False)[1]
            )
        with mode:
            chosen["params"] = [torch.empty(local_of(p).shape, dtype=p.dtype, requires_grad=True) for p in trained]
        parameters += chosen["params"]
        if trained:
            groups.append(chosen)
    if not groups:
        raise InvalidInput("the optimizer holds no trainable parameter")
    make: Any = type(optimizer)
    refused = refused or not_torchs_own(optimizer) or refusal(make, groups)
    builder = Recorder(dry=True, fake=step)
    builder.recording = False
    try:
        with mode:
            with builder:
                twin = make(groups)
                for parameter in parameters:
                    parameter.grad = torch.empty_like(parameter)
                twin.step()
                state = tensors_in([list(s.values()) for s in twin.state.values()])
                state_bytes = unique_bytes(state, builder.granule_bytes)
            state_bytes += unique_bytes(_idle_state(optimizer), builder.granule_bytes)
            whole = _recorded(step, twin.step)
            cut = cut_for(twin, sliced=not refused and not refusal(make, groups, sliced=True))
            in_chunks, alone = [], []
            if not refused:
                in_chunks = [_recorded_part(step, twin, part) for part in chunks(twin, cut)]
                kinds = {(p.dtype, p.shape): cut.of(g, p) for g in twin.param_groups for p in g["params"]}
                alone = [_recorded_part(step, twin, part) for part in kinds.values()]
    except Exception as error:
        if isinstance(error, ZeroDivisionError) and guess != _GUESSES[-1]:
            raise
        raise Unsupported(
            f"the step of {type(optimizer).__name__} cannot be run on fake tensors ({type(error).__name__}: {error}); "
            "trace without an optimizer and leave room for its state"
        ) from error
    return OptimizerRecord(whole, state_bytes, cut, tuple(in_chunks), tuple(alone), refused)


def _idle_state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """State of parameters that were trained before and are not now: layers that were frozen, adapters switched off."""
    idle = [state for p, state in optimizer.state.items() if not p.requires_grad]
    found = [local_of(t) for t in tensors_in([list(state.values()) for state in idle])]
    return [t for t in found if t not in elsewhere and t.layout is torch.strided]


def _recorded_part(step: FakeStep, optimizer: torch.optim.Optimizer, part: Part) -> OptimizerPart:
    granule_bytes = Recorder(dry=True, fake=step).granule_bytes
    return OptimizerPart(
        stretch=only_made(_recorded(step, lambda: step_parts(optimizer, [part]))),
        parameters=tuple(
            ParameterBytes(
                dtype=str(parameter.dtype).removeprefix("torch."),
                size_bytes=unique_bytes([parameter], granule_bytes),
                state_bytes=unique_bytes(movable_state(optimizer, parameter).values(), granule_bytes),
            )
            for parameter in part.parameters
        ),
    )


def _recorded(step: FakeStep, run: Callable[[], Any]) -> Stretch:
    """What `run` does, with numbers of its own."""
    recorder = Recorder(dry=True, fake=step)
    recorder.phase = Phase.OPTIMIZER
    with recorder:
        run()
        recorder.recording = False
    made = {value for what, value in recorder.events if what is EventKind.ALLOC}
    values = tuple(
        Value(
            id=s.id, size_bytes=s.size_bytes, dtype=s.dtype, shape=s.shape, unit=None, needed=False,
            producer=s.producer if s.id in made else None,
        )
        for s in recorder.storages
    )  # fmt: skip
    ops = tuple(
        Op(
            id=c.id, unit=None, ordinal=None, name=c.name, inputs=tuple(v for v, _ in c.reads),
            outputs=tuple(c.outputs), seconds=0.0, flops=c.flops, kind=c.kind, phase=c.phase,
        )
        for c in recorder.calls
    )  # fmt: skip
    events = tuple(
        Event(what=what, subject=subject)
        for what, subject in recorder.events
        if what is EventKind.OP or subject in made
    )
    return Stretch(ops=ops, values=values, events=events)


def behind(trace: Trace, optimizer: OptimizerRecord) -> Trace:
    """`trace` with the optimizer's ops, values and events behind its own, renumbered."""
    static_bytes = {**trace.static_bytes, Category.OPTIMIZER_STATE.value: optimizer.state_bytes}
    stretch = moved(optimizer.whole, len(trace.ops), len(trace.values))
    ops, values = trace.ops + stretch.ops, trace.values + stretch.values
    return dataclasses.replace(
        trace, ops=ops, values=values, events=(*trace.events, *stretch.events), static_bytes=static_bytes,
        digest=trace_digest(trace.units, ops, values),
        tiled=tuple(behind(variant, optimizer) for variant in trace.tiled),
        optimizer=OptimizerStep(
            ops=len(trace.ops), values=len(trace.values), events=len(trace.events),
            chunk_bytes=optimizer.cut.limit_bytes, sliced=optimizer.cut.sliced, in_chunks=optimizer.in_chunks,
            alone=optimizer.alone, refused=optimizer.refused,
        ),
    )  # fmt: skip
