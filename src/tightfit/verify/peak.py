"""The peak of a whole step by the allocator's own count, against the budget and the prediction.

Invariant: the model's own weights are never updated; `untrained` undoes a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import nn

from tightfit import accelerator
from tightfit.core import Check, Plan, Unsupported, format_bytes
from tightfit.engine import apply
from tightfit.levers import of_units
from tightfit.levers.step_in_backward.hooks import clipped_backward
from tightfit.step.optimizers import bare
from tightfit.step.parallel import local_of
from tightfit.step.patches import compiled_entries, no_key_value_cache, uncompiled
from tightfit.step.ranks import are_several
from tightfit.step.run import LossFunction, compute_loss, cpu_profile, device_of, static_bytes_by_category
from tightfit.step.snapshot import undisturbed
from tightfit.trace.profiler import memory_events, moment_of
from tightfit.verify.gradients import copy_of

PEAK_TOLERANCE = 0.005

_RELEASED = "tightfit: released"  # marks a moment in a profile


class PeakMeter:
    """How far the allocator's count of live bytes rises inside the block.

    On a card: what torch says its allocator allocated at most (`max_memory_allocated`); `Unsupported` where it does not
    count that. On the host: the profiler's memory events, which need no other profiler to be running. Read `rise_bytes`
    after the block.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.rise_bytes = 0
        self._profiler: Any = None
        self._before_bytes = 0
        self._released_bytes = 0

    def __enter__(self) -> PeakMeter:
        require_counted(self.device)
        if accelerator.is_card(self.device):
            self._before_bytes = accelerator.peak_begun(self.device)
        else:
            self._profiler = cpu_profile()
            self._profiler.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._profiler is None:
            self.rise_bytes = accelerator.peak_risen_bytes(self.device, self._before_bytes)
            return
        self._profiler.__exit__(kind, error, where)
        level = 0
        released_at = moment_of(self._profiler, _RELEASED) if self._released_bytes else None
        for nanosecond, changed_bytes in memory_events(self._profiler):
            if released_at is not None and nanosecond > released_at:
                level, released_at = level - self._released_bytes, None
            level += changed_bytes
            self.rise_bytes = max(self.rise_bytes, level)
        self._profiler = None

    def released(self, size_bytes: int) -> None:
        """Inside the block: that many bytes which were there before it have just gone, as old gradients do. The host's
        profiler does not tell the size of such blocks."""
        if self._profiler is not None and size_bytes > 0 and not self._released_bytes:
            self._released_bytes = size_bytes
            with torch.profiler.record_function(_RELEASED):
                pass


def require_counted(device: torch.device) -> None:
    """Raise `Unsupported` where nothing counts the peak of a step on `device`."""
    if line := accelerator.peak_unknown(device):
        raise Unsupported(line)


def static_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, batch: Any = None) -> int:
    """Bytes that live through a whole step: parameters, gradients that exist now, buffers, batch, optimizer state."""
    return sum(static_bytes_by_category(model, batch, optimizer).values())


def peak_checks(
    model: nn.Module,
    batch: Any,
    plan: Plan,
    loss: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    max_norm: float | None = None,
) -> tuple[Check, ...]:
    """The checks `peak` and `prediction` of `verify` alone: one planned step, and one before it that makes the
    optimizer's state."""
    with undisturbed(model, batch) as restart, no_key_value_cache(model):
        # no step of the optimizer in this backward, which nothing would undo
        with apply(model, of_units(plan)), uncompiled(model), restart.watching():
            compute_loss(model, batch, loss).backward()
        with apply(model, plan, optimizer=optimizer):
            return tuple(checks_of_peak(model, batch, plan, loss, optimizer, restart, max_norm))


def measured_peak_bytes(
    model: nn.Module,
    batch: Any,
    in_force: contextlib.AbstractContextManager[Any],
    loss: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> int:
    """The peak of a whole step within `in_force`, by the allocator's count, compiled where the model is."""
    with undisturbed(model, batch) as restart, no_key_value_cache(model):
        with uncompiled(model), restart.watching():
            compute_loss(model, batch, loss).backward()
        with in_force:
            return peak_bytes(model, batch, loss, optimizer, restart)


def run_step(
    model: nn.Module,
    batch: Any,
    loss: LossFunction | None,
    optimizer: torch.optim.Optimizer | None,
    max_norm: float | None = None,
) -> None:
    """Forward, backward, clipping to `max_norm` as `fit` does it, optimizer step; the gradients stay."""

    def backward() -> None:
        compute_loss(model, batch, loss).backward()

    if max_norm is None:
        backward()
    else:
        clipped_backward(model, batch, None if optimizer is None else bare(optimizer), max_norm, backward)
    if optimizer is not None:
        optimizer.step()


def peak_bytes(
    model: nn.Module,
    batch: Any,
    loss: LossFunction | None,
    optimizer: torch.optim.Optimizer | None,
    restart: Callable[[], None],
    max_norm: float | None = None,
    *,
    learns: bool = False,
) -> int:
    """The highest count of live bytes in one whole step, once the optimizer has its state. `learns`: a first step shows
    the plan in force what to copy ahead in the others."""
    with untrained(optimizer):
        # state is made, and code compiled, in the first step
        if learns or optimizer is not None or compiled_entries(model):
            restart()
            run_step(model, batch, loss, optimizer, max_norm)
        found = []
        # gloo's threads hold a buffer a little longer now and then, so there the steps that they did not count
        for _ in range(_GLOO_STEPS if are_several(model) and accelerator.is_host(device_of(model)) else 1):
            restart()
            before_bytes = static_bytes(model, optimizer, batch)
            with PeakMeter(device_of(model)) as meter:
                run_step(model, batch, loss, optimizer, max_norm)
            found.append(before_bytes + meter.rise_bytes)
    return min(found)


_GLOO_STEPS = 6


@contextlib.contextmanager
def untrained(optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Let the optimizer step inside; afterwards the parameters and its state are what they were."""
    if optimizer is None:
        yield
        return
    optimizer = bare(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    values = [copy_of(p) for p in parameters]
    states = {
        p: {k: (v, copy_of(v)) if isinstance(v, torch.Tensor) else (v, v) for k, v in optimizer.state[p].items()}
        for p in parameters
        if p in optimizer.state
    }
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                local_of(parameter).copy_(value)
            for parameter in parameters:
                if parameter not in states:
                    optimizer.state.pop(parameter, None)
                    continue
                restored = {}
                for key, (original, value) in states[parameter].items():
                    if isinstance(original, torch.Tensor):
                        local_of(original).copy_(value)
                    restored[key] = original
                optimizer.state[parameter] = restored


def checks_of_peak(
    model: nn.Module,
    batch: Any,
    plan: Plan,
    loss: LossFunction | None,
    optimizer: torch.optim.Optimizer | None,
    restart: Callable[[], None],
    max_norm: float | None = None,
) -> list[Check]:
    """`peak` and `prediction` of the step as it is now. They fail where nothing counts the peak: it is not proven."""
    if line := accelerator.peak_unknown(device_of(model)):
        expected = f"at most {format_bytes(plan.budget_bytes)} ({plan.budget_bytes} B)"
        return [Check(name="peak", expected=expected, measured="not measured", tolerance=line, passed=False)]
    measured_bytes = peak_bytes(model, batch, loss, optimizer, restart, max_norm, learns=bool(plan.ahead))
    compiled = bool(compiled_entries(model))
    over = measured_bytes / plan.budget_bytes - 1
    off = measured_bytes / plan.peak_bytes - 1
    measured = f"{format_bytes(measured_bytes)} ({measured_bytes} B)"
    return [
        Check(
            name="peak",
            expected=f"at most {format_bytes(plan.budget_bytes)} ({plan.budget_bytes} B)",
            measured=measured,
            tolerance=f"{PEAK_TOLERANCE:.1%} over",
            passed=over <= PEAK_TOLERANCE,
        ),
        Check(
            name="prediction",
            expected=f"{format_bytes(plan.peak_bytes)} ({plan.peak_bytes} B)",
            measured=f"{measured}, off by {off:+.3%}",
            tolerance="reported only: a compiled step has other temporaries than the one that was traced"
            if compiled
            else f"{PEAK_TOLERANCE:.1%} either way",
            passed=compiled or abs(off) <= PEAK_TOLERANCE,
        ),
    ]
