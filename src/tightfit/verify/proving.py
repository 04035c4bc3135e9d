"""Prove a plan on the real model: the same gradients, a peak within budget, a prediction that held.

The reference is the same step without the plan, from the same parameters, buffers and random state. Gradients and
buffers are compared bit by bit; the peak is the allocator's own count of a whole step, the optimizer's included. A plan
with tiles adds sums in another order: its loss and gradients may be as far from the same step in float64 as 1.5 times
the step without the plan is. So may those of a compiled step, whose kernels are fused otherwise under another plan: the
step without the plan is the compiled one there, random masks are those of the uncompiled step (so that float64 can
have them too), and steps with the compiler's own random numbers are compared with each other.

Invariant: the model, its gradients, the optimizer's state and every random state are left as they were found.
Refused: nothing is passed on trust; a gradient that is missing, of another shape, stride or dtype, is a failure.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tightfit.core import Check, Plan, Proof, require_norm
from tightfit.levers import changes_optimizer, of_units
from tightfit.step.environment import environment
from tightfit.step.patches import compiled_entries, no_key_value_cache, own_checkpointing_off, uncompiled
from tightfit.step.run import LossFunction, compute_loss
from tightfit.step.snapshot import undisturbed
from tightfit.verify.float64 import compiled_checks, float64_checks
from tightfit.verify.gradients import Outcome, Switch, compared
from tightfit.verify.peak import checks_of_peak
from tightfit.verify.seconds import time_check
from tightfit.verify.stepped import check_of_optimizer


def verify(
    model: nn.Module,
    batch: Any,
    plan: Plan,
    loss: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    max_norm: float | None = None,
) -> Proof:
    """Run the step with and without `plan` and compare.

    The step without the plan is run twice first; what differs between its own repeats (atomics, threads) is named, and
    held to a bound from the repeats in place of its bits.

    Checks: `gradients` (every parameter, bit by bit; with tiles, each parameter's error against float64, and `loss`
    too), `buffers` (only where there are any), `peak` (measured
    against the budget, 0.5 %), `prediction` (measured against predicted, 0.5 %), `optimizer` (only for a plan that
    changes how it steps: parameters, state and gradients after two steps, bit by bit), `time` (ratio of interleaved
    steps; reported, cannot fail). Pass the same `loss` and `optimizer` that the plan was traced with.

    `max_norm`: whole steps clip to this total norm, as those of `fit(..., max_norm=)` do, with the plan and without it.
    Pass the one that the model was fitted with.

    Raises `PlanMismatch`, `InvalidInput`. A check that fails is not raised: see `Proof.passed`.
    """
    require_norm(max_norm)
    with undisturbed(model, batch) as restart, no_key_value_cache(model), own_checkpointing_off(model):

        def step() -> None:
            restart()
            compute_loss(model, batch, loss).backward()

        def observe() -> Outcome:
            step()
            return Outcome(model)

        with uncompiled(model), restart.watching():
            reference = observe()
        spread = reference.spread(model, step)
        switch = Switch(model, of_units(plan))
        with switch as applied:
            planned = observe()
            stats = applied.stats()
        if compiled_entries(model):
            checks = compiled_checks(model, batch, switch, loss, restart)
            checks += [c for c in compared(model, reference, planned, observe, spread) if c.name == "buffers"]
        elif plan.exact:
            checks = compared(model, reference, planned, observe, spread)
        else:
            checks = float64_checks(model, batch, switch, loss, restart)
            checks += [c for c in compared(model, reference, planned, observe, spread) if c.name == "buffers"]
        del planned, reference
        with Switch(model, plan, optimizer) if changes_optimizer(plan) else switch:
            of_peak = checks_of_peak(model, batch, plan, loss, optimizer, restart, max_norm)
        if optimizer is not None and changes_optimizer(plan):
            checks.append(check_of_optimizer(model, batch, plan, loss, optimizer, restart, max_norm))
        checks += of_peak
        checks.append(time_check(model, batch, switch, loss, restart, fallbacks=stats.fallbacks))
        switch.close()
    return Proof(checks=tuple(checks), environment=environment())


def gradient_checks(
    model: nn.Module,
    batch: Any,
    plan: Plan,
    loss: LossFunction | None = None,
    reference: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> tuple[Check, ...]:
    """The checks `gradients` and `buffers` of `verify` alone: three steps, no optimizer. The compared step runs inside
    `reference()`: torch's own checkpointing, where the plain step does not fit."""
    with undisturbed(model, batch) as restart, no_key_value_cache(model), own_checkpointing_off(model):

        def step() -> None:
            with reference():
                restart()
                compute_loss(model, batch, loss).backward()

        def observe() -> Outcome:
            step()
            return Outcome(model)

        with uncompiled(model), restart.watching():
            expected = observe()
        spread = expected.spread(model, step)
        switch = Switch(model, of_units(plan))
        with switch:
            restart()
            compute_loss(model, batch, loss).backward()
            planned = Outcome(model)
        checks = compared(model, expected, planned, observe, spread)
        if compiled_entries(model):
            checks = [check for check in checks if check.name == "buffers"]
            checks += compiled_checks(model, batch, switch, loss, restart)
        elif not plan.exact:
            checks = [check for check in checks if check.name == "buffers"]
            checks += float64_checks(model, batch, switch, loss, restart)
        switch.close()
        return tuple(checks)
