"""Parameters, optimizer state and gradients after whole steps, with a plan that changes how the optimizer steps.

Invariant: afterwards the parameters and the optimizer's state are what they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from tightfit.core import Check, Plan
from tightfit.engine import apply
from tightfit.levers import of_units
from tightfit.levers.step_in_backward.hooks import gradients_told
from tightfit.step.optimizers import bare
from tightfit.step.run import LossFunction
from tightfit.verify.gradients import copy_of, difference
from tightfit.verify.peak import run_step, untrained

__all__ = ["check_of_optimizer"]

#: The first makes the optimizer's state, the second steps with it.
_STEPS = 2


def check_of_optimizer(
    model: nn.Module,
    batch: Any,
    plan: Plan,
    loss: LossFunction | None,
    optimizer: torch.optim.Optimizer,
    restart: Callable[[], None],
    max_norm: float | None = None,
) -> Check:
    """Whole steps with and without `plan`, clipped to `max_norm` if that is given: parameters, state, and each gradient
    as it was used, compared bit by bit."""

    def after(in_force: AbstractContextManager[Any]) -> dict[str, torch.Tensor]:
        told: dict[torch.Tensor, torch.Tensor] = {}

        def listen(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            told[parameter] = copy_of(parameter.grad)

        with untrained(optimizer), in_force, gradients_told(listen):
            for _ in range(_STEPS):
                told.clear()
                restart()
                run_step(model, batch, loss, optimizer, max_norm)
            found = {}
            for name, parameter in model.named_parameters():
                if not parameter.requires_grad:
                    continue
                gradient = told.get(parameter) if parameter.grad is None else copy_of(parameter.grad)
                if gradient is not None:
                    found[f"the gradient of {name}"] = gradient
                found[name] = copy_of(parameter)
                state = bare(optimizer).state.get(parameter, {})
                found.update({f"{k} of {name}": copy_of(v) for k, v in state.items() if isinstance(v, torch.Tensor)})
        return found

    # a plan with tiles adds sums in another order, so there the same plan is the reference
    reference = after(contextlib.nullcontext() if plan.exact else apply(model, of_units(plan)))
    planned = after(apply(model, plan, optimizer=optimizer))
    names = [*reference, *(name for name in planned if name not in reference)]
    wrong = {name: how for name in names if (how := difference(reference.get(name), planned.get(name)))}
    first = next(iter(wrong.items()), None)
    return Check(
        name="optimizer",
        expected=f"{len(reference)} identical: parameters, state, gradients",
        measured=f"{len(reference)} identical"
        if first is None
        else f"{len(wrong)} of {len(names)} wrong: {first[0]} {first[1]}",
        tolerance=f"none: bit for bit, after {_STEPS} steps",
        passed=first is None,
    )
