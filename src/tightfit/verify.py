"""Prove a plan on the real model: the same gradients, a peak within budget, a prediction that held.

The reference is the same step without the plan, from the same parameters, buffers and random state. Gradients and
buffers are compared bit by bit; the peak is the allocator's own count of a whole step, the optimizer's included.

Invariant: the model, its gradients, the optimizer's state and every random state are left as they were found.
Refused: nothing is passed on trust; a gradient that is missing, of another shape, stride or dtype, is a failure.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn

from tightfit.core import Check, Plan, Proof, format_bytes, make_verb
from tightfit.engine import apply
from tightfit.step import (
    LossFunction,
    compute_loss,
    device_of,
    environment,
    no_key_value_cache,
    static_bytes_by_category,
    undisturbed,
)
from tightfit.trace import memory_events

__all__ = ["Outcome", "PeakMeter", "differences", "run_step", "static_bytes", "timed", "untrained", "verify"]

PEAK_TOLERANCE = 0.005
TIMED_STEPS = 3


class PeakMeter:
    """How far the allocator's count of live bytes rises inside the block.

    CUDA: `torch.cuda.max_memory_allocated`. CPU: the profiler's memory events, which need no other profiler to be
    running. Read `rise_bytes` after the block.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.rise_bytes = 0
        self._profiler: Any = None
        self._before_bytes = 0

    def __enter__(self) -> PeakMeter:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before_bytes = torch.cuda.memory_allocated(self.device)
        else:
            activities = [torch.profiler.ProfilerActivity.CPU]
            self._profiler = torch.profiler.profile(activities=activities, profile_memory=True)
            self._profiler.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.rise_bytes = torch.cuda.max_memory_allocated(self.device) - self._before_bytes
            return
        self._profiler.__exit__(kind, error, where)
        level = 0
        for _, changed_bytes in memory_events(self._profiler):
            level += changed_bytes
            self.rise_bytes = max(self.rise_bytes, level)
        self._profiler = None


def static_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, batch: Any = None) -> int:
    """Bytes that live through a whole step: parameters, gradients that exist now, buffers, batch, optimizer state."""
    return sum(static_bytes_by_category(model, batch, optimizer).values())


def verify(
    model: nn.Module,
    batch: Any,
    plan: Plan,
    loss: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Proof:
    """Run the step with and without `plan` and compare.

    Checks: `gradients` (every parameter, bit by bit), `buffers` (only where there are any), `peak` (measured
    against the budget, 0.5 %), `prediction` (measured against predicted, 0.5 %), `time` (ratio of interleaved steps;
    reported, cannot fail). Pass the same `loss` and `optimizer` that the plan was traced with.

    Raises `PlanMismatch`, `InvalidInput`. A check that fails is not raised: see `Proof.passed`.
    """
    with undisturbed(model, batch) as restart, no_key_value_cache(model):

        def observe() -> Outcome:
            restart()
            compute_loss(model, batch, loss).backward()
            return Outcome(model)

        with restart.watching():
            observe()
        reference = observe()
        with apply(model, plan) as applied:
            planned = observe()
            stats = applied.stats()
        checks = _compared(reference, planned, observe)
        del planned, reference
        with apply(model, plan):
            measured_bytes = _peak_bytes(model, batch, loss, optimizer, restart)
        checks += _peak_checks(plan, measured_bytes)
        checks.append(_time_check(model, batch, plan, loss, restart, fallbacks=stats.fallbacks))
    return Proof(checks=tuple(checks), environment=environment())


# ------------------------------------------------------------------------------------------- gradients


class Outcome:
    """Copies, on the CPU, of what a step leaves behind."""

    def __init__(self, model: nn.Module) -> None:
        self.gradients = {
            name: None if p.grad is None else _copy(p.grad) for name, p in model.named_parameters() if p.requires_grad
        }
        self.buffers: dict[str, torch.Tensor | None] = {
            name: _copy(b) for name, b in model.named_buffers() if not b.is_meta
        }


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_sparse:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor.detach())
    return tensor.detach().to("cpu", copy=True)


def _differs(expected: torch.Tensor | None, found: torch.Tensor | None) -> str:
    """How `found` is another tensor than `expected`; empty when they are the same bit for bit."""
    if expected is None or found is None:
        return "" if expected is found else "is missing" if found is None else "is there, though it should not be"
    if expected.layout is not found.layout:
        return f"has the layout {found.layout}, not {expected.layout}"
    if expected.is_sparse:
        expected, found = expected.coalesce().to_dense(), found.coalesce().to_dense()
    for what in ("shape", "dtype"):
        if getattr(expected, what) != getattr(found, what):
            return f"has the {what} {getattr(found, what)}, not {getattr(expected, what)}"
    if expected.stride() != found.stride():
        return f"has the strides {found.stride()}, not {expected.stride()}"
    if _bits(expected).equal(_bits(found)):
        return ""
    return f"differs by up to {_largest_difference(expected, found):.3g}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes as integers, so that NaN equals NaN and zero does not equal minus zero."""
    return tensor.flatten().view(torch.uint8)


def _largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    wide = torch.complex128 if one.is_complex() else torch.float64
    return float((one.to(wide) - other.to(wide)).abs().max())


def differences(expected: Outcome, found: Outcome) -> dict[str, str]:
    """Parameters and buffers that are not the same bit for bit, and how."""
    pairs = [(expected.gradients, found.gradients), (expected.buffers, found.buffers)]
    return {key: how for one, other in pairs for key in one if (how := _differs(one[key], other.get(key)))}


def _compared(reference: Outcome, planned: Outcome, observe: Callable[[], Outcome]) -> list[Check]:
    checks = []
    again: Outcome | None = None
    pairs: list[tuple[str, Mapping[str, torch.Tensor | None], Mapping[str, torch.Tensor | None]]] = [
        ("gradients", reference.gradients, planned.gradients),
        ("buffers", reference.buffers, planned.buffers),
    ]
    for name, expected, found in pairs:
        if name == "buffers" and not expected:
            continue
        wrong = {key: how for key in expected if (how := _differs(expected[key], found[key]))}
        tolerance = "none: bit for bit"
        if wrong:
            again = again or observe()
            repeated = again.gradients if name == "gradients" else again.buffers
            # a kernel that adds in any order gives other bits each time; the plan can only be held to the same
            unstable = {key for key in wrong if _differs(expected[key], repeated[key]).startswith("differs by")}
            excused = {key for key in unstable if _within(expected[key], found[key], repeated[key])}
            wrong = {key: how for key, how in wrong.items() if key not in excused}
            if excused:
                tolerance = f"bit for bit, but for {len(excused)} that vary without the plan too: twice that"
        first = next(iter(wrong.items()), None)
        checks.append(
            Check(
                name=name,
                expected=f"{len(expected)} identical",
                measured=f"{len(expected)} identical"
                if first is None
                else f"{len(wrong)} of {len(expected)} wrong: {first[0]} {first[1]}",
                tolerance=tolerance,
                passed=first is None,
            )
        )
    return checks


def _within(expected: torch.Tensor | None, found: torch.Tensor | None, repeated: torch.Tensor | None) -> bool:
    if expected is None or found is None or repeated is None or expected.shape != found.shape:
        return False
    return _largest_difference(expected, found) <= 2 * _largest_difference(expected, repeated)


# ------------------------------------------------------------------------------------------------ peak


def run_step(model: nn.Module, batch: Any, loss: LossFunction | None, optimizer: torch.optim.Optimizer | None) -> None:
    """Forward, backward, optimizer step; the gradients stay."""
    compute_loss(model, batch, loss).backward()
    if optimizer is not None:
        optimizer.step()


def _peak_bytes(
    model: nn.Module,
    batch: Any,
    loss: LossFunction | None,
    optimizer: torch.optim.Optimizer | None,
    restart: Callable[[], None],
) -> int:
    """The highest count of live bytes in one whole step, once the optimizer has its state."""
    with untrained(optimizer):
        if optimizer is not None:
            restart()
            run_step(model, batch, loss, optimizer)
        restart()
        before_bytes = static_bytes(model, optimizer, batch)
        with PeakMeter(device_of(model)) as meter:
            run_step(model, batch, loss, optimizer)
    return before_bytes + meter.rise_bytes


@contextlib.contextmanager
def untrained(optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Let the optimizer step inside; afterwards the parameters and its state are what they were."""
    if optimizer is None:
        yield
        return
    optimizer = getattr(optimizer, "optimizer", optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    values = [_copy(p) for p in parameters]
    states = {
        p: {k: (v, _copy(v)) if isinstance(v, torch.Tensor) else (v, v) for k, v in optimizer.state[p].items()}
        for p in parameters
        if p in optimizer.state
    }
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
            for parameter in parameters:
                if parameter not in states:
                    optimizer.state.pop(parameter, None)
                    continue
                restored = {}
                for key, (original, value) in states[parameter].items():
                    if isinstance(original, torch.Tensor):
                        original.copy_(value)
                    restored[key] = original
                optimizer.state[parameter] = restored


def _peak_checks(plan: Plan, measured_bytes: int) -> list[Check]:
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
            tolerance=f"{PEAK_TOLERANCE:.1%} either way",
            passed=abs(off) <= PEAK_TOLERANCE,
        ),
    ]


# ------------------------------------------------------------------------------------------------ time


def timed(device: torch.device, run: Callable[[], None]) -> float:
    """Seconds of `run`, the device's queue drained before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _time_check(
    model: nn.Module, batch: Any, plan: Plan, loss: LossFunction | None, restart: Callable[[], None], fallbacks: int
) -> Check:
    device = device_of(model)

    def step() -> None:
        compute_loss(model, batch, loss).backward()

    ratios = []
    for _ in range(TIMED_STEPS):
        restart()
        without = timed(device, step)
        with apply(model, plan):
            restart()
            ratios.append(timed(device, step) / without)
    unplanned_seconds = plan.step_seconds - plan.recompute_seconds
    expected = plan.step_seconds / unplanned_seconds if unplanned_seconds else 1.0
    found = f"{statistics.median(ratios):.2f} x, median of {TIMED_STEPS} interleaved pairs"
    return Check(
        name="time",
        expected=f"{expected:.2f} x the step without the plan",
        measured=found + (f"; {fallbacks} units were replayed whole" if fallbacks else ""),
        tolerance="reported only: seconds are noisy",
        passed=True,
    )


make_verb(__name__, verify)
