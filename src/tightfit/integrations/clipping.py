"""A Trainer that clips gradients by their total norm, under a plan that steps each parameter in backward.

Its `training_step` runs twice on each batch: the first time for the norms alone, the second time to clip and step. When
the Trainer then asks torch to clip, it is told the norm that was found.

Invariant: the first run leaves no mark: statistics, random states, buffers and attributes are put back. Refused: steps
and losses of the user's own, whose Python code may count what it does, and batches that are generated in the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tightfit.integrations import generated
from tightfit.integrations.own_step import statistics_kept
from tightfit.levers.step_in_backward import hooks
from tightfit.step.optimizers import bare

__all__ = ["in_two_passes", "not_in_two_passes"]


def not_in_two_passes(trainer: Any) -> str:
    """What in this Trainer cannot run twice; empty: nothing."""
    if generated.generates(trainer):
        return "max_grad_norm with generated batches"
    for name in ("training_step", "compute_loss", "_prepare_inputs"):
        made_in = getattr(type(trainer), name).__module__
        if not made_in.startswith(("transformers.", "trl.")):
            return f"max_grad_norm with a {name} of your own ({made_in})"
    return ""


def in_two_passes(trainer: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    """`original` is the `training_step` of `trainer`."""

    def training_step(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        def run(is_first: bool) -> Any:
            if not is_first:
                return original(model, inputs, *args, **kwargs)
            with statistics_kept(trainer):
                return original(model, dict(inputs), *args, **kwargs)

        return hooks.in_two_passes(model, inputs, bare(trainer.optimizer), trainer.args.max_grad_norm, run)[0]

    return training_step
