"""The step that a Trainer is about to run, as its own code computes it: its loss, its statistics, its trace.

Invariant: nothing of a Trainer's loss is written down a second time. Refused: a step that neither runs here nor can be
traced without running it (`Unsupported`).
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import TrainerCallback

from tightfit import accelerator
from tightfit.core import InvalidInput, Trace, Unsupported
from tightfit.step.run import parameter_tensors
from tightfit.step.snapshot import random_states, restore_random_states
from tightfit.trace.fake import logging_step
from tightfit.trace.recording import trace

__all__ = [
    "recorded", "replaced", "report_first", "running_trainer", "statistics_kept", "trainer_loss", "weights_beside",
]  # fmt: skip


def trainer_loss(trainer: Any) -> Callable[[nn.Module, Any], torch.Tensor]:
    """What `Trainer.training_step` computes before it calls backward, as one function of model and `_step`."""
    count = trainer.args.gradient_accumulation_steps
    fetch = type(trainer).get_batch_samples  # not the one that notes what is fetched

    def loss(model: nn.Module, step: Any) -> torch.Tensor:
        batch = step["batch"]
        _, items = fetch(trainer, iter([batch] * count), count, trainer.args.device)
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
        with trainer.compute_loss_context_manager(), logging_step():  # TRL's losses fill its log
            value: Any = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
        result: torch.Tensor = value if scaled else value / count
        return result

    return loss


#: What losses add to that is no plain value: TRL's (`_metrics`, older releases' `_stored_metrics`), ms-swift's
#: (`custom_metrics`), and Axolotl's, which counts tokens in the Trainer's state.
_STATISTICS = ("_metrics", "_logs", "_entropy_window_stats", "_stored_metrics", "custom_metrics", "tokens")
_PLAIN = (bool, int, float, str, bytes, type(None))


@contextmanager
def statistics_kept(trainer: Any) -> Iterator[None]:
    """Undo what `compute_loss` adds to statistics of its own in steps that train nothing."""
    held, state = vars(trainer), vars(getattr(trainer, "state", None) or trainer)
    plain = {name: value for name, value in held.items() if isinstance(value, _PLAIN)}
    kept = [(of, {name: copy.deepcopy(of[name]) for name in _STATISTICS if name in of}) for of in (held, state)]
    if "current_gradient_accumulation_steps" not in held:  # the Trainer sets it at its first step
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    try:
        yield
    finally:
        held.update(plain)
        for of, statistics in kept:
            for name in _STATISTICS:
                if name not in statistics:  # it came with the first loss
                    of.pop(name, None)
            of.update(statistics)


def recorded(
    model: nn.Module, step: Any, loss: Callable[[nn.Module, Any], torch.Tensor], optimizer: Any, tiles: bool
) -> Trace:
    """The step's trace: a real one, or on fake tensors where the plain step does not fit the device."""
    try:
        return trace(model, step, loss=loss, optimizer=optimizer, tiles=tiles)
    except torch.OutOfMemoryError as error:
        model.zero_grad(set_to_none=True)
        with contextlib.suppress(RuntimeError):
            accelerator.empty_cache()
        states = random_states()  # kernels that are tried out for their scratch draw from the real generators
        try:
            device = next(model.parameters()).device
            return trace(model, step, loss=loss, optimizer=optimizer, fake=True, device=device, tiles=tiles)
        except (InvalidInput, Unsupported) as refused:
            raise Unsupported(
                f"the plain step does not fit this device ({error}), and its loss cannot be traced without running it "
                f"({refused}): give a shorter batch to plan for as TightfitCallback(batch=...)"
            ) from refused
        finally:
            restore_random_states(states)


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """`owner.name` as `make` gives it, on this object alone, until the context ends."""
    had_own, original = name in vars(owner), getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        if had_own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


def weights_beside(trainer: Any, model: nn.Module) -> list[torch.Tensor]:
    """Weights of other models that the Trainer holds on the model's device: DPO's reference, a teacher, a judge."""
    own = {id(p) for p in model.parameters()}
    kind = next(model.parameters()).device.type
    others = [m for m in vars(trainer).values() if isinstance(m, nn.Module)]
    found = [t for m in others for p in m.parameters() if id(p) not in own for t in parameter_tensors(p)]
    return [t for t in found if t.device.type == kind]


def running_trainer() -> transformers.Trainer:
    """The Trainer that is calling this callback.

    It hands its callbacks everything but itself, and only it knows how its loss is computed (a subclass, a
    `compute_loss_func`, label smoothing, the division by the tokens of all accumulated batches), so it is read from
    the call stack.
    """
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, transformers.Trainer):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    raise Unsupported("this callback plans the step of a transformers.Trainer, but no Trainer is running it")


def report_first(callback: TrainerCallback, trainer: transformers.Trainer) -> None:
    """Move `callback` before the reporters, which read the logs in the order of the callbacks."""
    callbacks = trainer.callback_handler.callbacks
    callbacks.remove(callback)
    callbacks.insert(0, callback)
