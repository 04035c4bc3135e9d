"""Seconds of a step with and without the plan, taken in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tightfit import accelerator
from tightfit.core import Check
from tightfit.step.patches import compiled_entries
from tightfit.step.run import LossFunction, compute_loss, device_of
from tightfit.verify.gradients import Switch

TIMED_STEPS = 3


def timed(device: torch.device, run: Callable[[], None]) -> float:
    """Seconds of `run`, the device's queue drained before and after."""
    accelerator.synchronize(device)
    started = time.perf_counter()
    run()
    accelerator.synchronize(device)
    return time.perf_counter() - started


def time_check(
    model: nn.Module,
    batch: Any,
    switch: Switch,
    loss: LossFunction | None,
    restart: Callable[[], None],
    fallbacks: int,
) -> Check:
    device, plan = device_of(model), switch.plan

    def step() -> None:
        compute_loss(model, batch, loss).backward()

    if compiled_entries(model):  # both ways, so that no compilation is timed
        restart()
        step()
        with switch:
            restart()
            step()
    ratios = []
    for _ in range(TIMED_STEPS):
        restart()
        without = timed(device, step)
        with switch:
            restart()
            ratios.append(timed(device, step) / without)
    found = f"{statistics.median(ratios):.2f} x, median of {TIMED_STEPS} interleaved pairs"
    return Check(
        name="time",
        expected=f"{plan.slowdown:.2f} x the step without the plan",
        measured=found + (f"; {fallbacks} units were replayed whole" if fallbacks else ""),
        tolerance="reported only: seconds are noisy",
        passed=True,
    )
