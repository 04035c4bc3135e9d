"""Record the optimizer's step on fake copies of the parameters, and put it behind the trace.

Invariant: no parameter is updated, and no data is copied.
"""

from __future__ import annotations

import dataclasses
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
    Phase,
    Trace,
    Unsupported,
    Value,
)
from tightfit.step.parallel import (
    local_of,
)
from tightfit.step.run import (
    tensors_in,
    unique_bytes,
)
from tightfit.trace.fake import FakeStep
from tightfit.trace.recorder import Recorder
from tightfit.trace.unroll import trace_digest


@dataclass(frozen=True)
class OptimizerRecord:
    """One step of an optimizer: what ran, and the bytes of the state that it had before."""

    tail: Recorder
    state_bytes: int


def record_optimizer(optimizer: torch.optim.Optimizer, target: Device | None = None) -> OptimizerRecord:
    """Record one step of `optimizer` on fake copies of its parameters. The first step builds the state; the second is
    recorded.

    Whether the step is `foreach` is decided as torch decides it for the real parameters, or for the target's. For fake
    parameters torch would silently switch it off.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    step = FakeStep(target, guesses=True)
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
    recorder = Recorder(dry=True, fake=step)
    recorder.phase = Phase.OPTIMIZER
    recorder.recording = False
    try:
        with mode, recorder:
            make: Any = type(optimizer)
            twin = make(groups)
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            twin.step()
            state_bytes = unique_bytes(
                tensors_in([list(s.values()) for s in twin.state.values()]), recorder.granule_bytes
            )
            recorder.calls, recorder.events = [], []
            recorder.recording = True
            twin.step()
            recorder.recording = False
    except Exception as error:
        raise Unsupported(
            f"the step of {type(optimizer).__name__} cannot be run on fake tensors ({type(error).__name__}: {error}); "
            "trace without an optimizer and leave room for its state"
        ) from error
    return OptimizerRecord(recorder, state_bytes)


def behind(trace: Trace, optimizer: OptimizerRecord) -> Trace:
    """`trace` with the optimizer's ops, values and events behind its own, renumbered."""
    tail = optimizer.tail
    static_bytes = {**trace.static_bytes, Category.OPTIMIZER_STATE.value: optimizer.state_bytes}
    ops, values = len(trace.ops), len(trace.values)
    made = {value for what, value in tail.events if what is EventKind.ALLOC}
    all_values = trace.values + tuple(
        Value(
            id=s.id + values, size_bytes=s.size_bytes, dtype=s.dtype, shape=s.shape, unit=None, needed=False,
            producer=s.producer + ops if s.producer is not None and s.id in made else None,
        )
        for s in tail.storages
    )  # fmt: skip
    all_ops = trace.ops + tuple(
        Op(
            id=c.id + ops, unit=None, ordinal=None, name=c.name, inputs=tuple(v + values for v, _ in c.reads),
            outputs=tuple(None if v is None else v + values for v in c.outputs), seconds=0.0, flops=c.flops,
            kind=c.kind, phase=c.phase,
        )
        for c in tail.calls
    )  # fmt: skip
    events = [
        Event(what=what, subject=subject + (ops if what is EventKind.OP else values))
        for what, subject in tail.events
        if what is EventKind.OP or subject in made
    ]
    return dataclasses.replace(
        trace, ops=all_ops, values=all_values, events=(*trace.events, *events), static_bytes=static_bytes,
        digest=trace_digest(trace.units, all_ops, all_values),
        tiled=tuple(behind(variant, optimizer) for variant in trace.tiled),
    )  # fmt: skip
