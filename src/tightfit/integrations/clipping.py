"""A Trainer that clips gradients by their total norm, under a plan that steps each parameter in backward.

Its `training_step` runs twice on each batch: the first time for the norms alone, the second time to clip and step. When
the Trainer then asks torch to clip, it is told the norm that was found.

Invariant: the first run leaves no mark: statistics, random states, buffers and attributes are put back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tightfit.integrations.own_step import statistics_kept
from tightfit.levers.step_in_backward.hooks import of_optimizer
from tightfit.step.optimizers import bare
from tightfit.step.snapshot import undisturbed

__all__ = ["in_two_passes"]


def in_two_passes(trainer: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    """`original` is the `training_step` of `trainer`."""

    def training_step(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        step = of_optimizer(bare(trainer.optimizer))
        if step is None:  # the plan in force leaves gradients where they are
            return original(model, inputs, *args, **kwargs)
        parameters: list[torch.Tensor] = list(model.parameters())
        with statistics_kept(trainer), undisturbed(model, inputs), step.measuring():
            original(model, dict(inputs), *args, **kwargs)
            total_norm = step.measured_norm(parameters)
        with step.clipping(trainer.args.max_grad_norm, total_norm):
            return original(model, inputs, *args, **kwargs)

    return training_step
