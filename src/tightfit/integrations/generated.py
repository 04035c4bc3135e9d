"""Trainers that generate their batches while they train (TRL's GRPO and RLOO): where their step begins, and how long it
can get.

What such a trainer reads from its data loader are prompts. `Trainer._prepare_inputs` makes completions of them, scores
them and gives the batch of the step. So a plan can first be made there, inside the step. It is made for the longest
completion that the settings allow; a longer prompt is planned for anew.

Invariant: completions are generated and scored without a plan, as without the callback, and do not count towards the
step's peak. Refused: vLLM (`tightfit.integrations.trl`), several processes, micro-batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import transformers
from torch.nn import functional as F

from tightfit.core import Unsupported
from tightfit.integrations.longest import Extent, plain

__all__ = ["extent_of", "generates", "longest_completions", "prepared", "refuse", "waiting_batches", "with_batches"]

_COMPLETIONS = "completion_ids"


def generates(trainer: Any) -> bool:
    """Does this trainer make its batches itself, while it trains? ms-swift's only add to those of the data loader."""
    kind = type(trainer)
    if kind._prepare_inputs is transformers.Trainer._prepare_inputs:
        return False
    return hasattr(trainer.args, "max_completion_length") or any(name.startswith("_generate") for name in dir(kind))


def _in_its_step(trainer: Any) -> bool:
    """Does this trainer generate in `training_step` itself (TRL's on-policy GKD, its online DPO and what derives from
    it)? There the plan would be in force meanwhile."""
    kind = type(trainer)
    if hasattr(kind, "generate_on_policy_outputs"):
        return bool(getattr(trainer.args, "lmbda", 1.0))
    own_step = kind.training_step is not transformers.Trainer.training_step
    return own_step and any(name.startswith(("_generate", "generate_")) for name in dir(kind))


def prepared(trainer: Any, batch: Any) -> Any:
    """A batch of the data loader as the trainer's loss takes it: on its device, with what the trainer adds."""
    prepare = transformers.Trainer._prepare_inputs if generates(trainer) else type(trainer)._prepare_inputs
    return prepare(trainer, plain(batch))


def refuse(trainer: Any, in_parts: bool) -> None:
    """Raise `Unsupported` for what was not tried with generated batches. `in_parts`: they are to be cut."""
    if not generates(trainer):
        if _in_its_step(trainer):
            raise Unsupported(
                f"{type(trainer).__name__} generates text inside its training step, whose bytes and lengths no plan "
                "knows of: leave the callback out (GKD with lmbda=0 generates nothing)"
            )
        if in_parts and type(trainer)._prepare_inputs is not transformers.Trainer._prepare_inputs:
            raise Unsupported(
                f"{type(trainer).__name__} adds to each batch (_prepare_inputs), and micro-batches are not tried with "
                "that: leave micro_batch out, or the callback"
            )
        return
    asked = "micro_batch" if in_parts else f"{trainer.args.world_size} processes" if trainer.args.world_size > 1 else ""
    if asked:
        raise Unsupported(
            f"{type(trainer).__name__} generates its batches while it trains, which TightfitCallback plans for in one "
            f"process and uncut: leave {asked} out, or the callback"
        )


def longest_completions(batch: Mapping[str, Any], trainer: Any) -> dict[str, Any]:
    """`batch` as it would be with completions of all the tokens that the settings allow."""
    found = dict(batch)
    completions = found.get(_COMPLETIONS)
    most = getattr(trainer.args, "max_completion_length", None)
    if not isinstance(completions, torch.Tensor) or completions.dim() != 2 or not most:
        return found
    length = completions.shape[1]
    for name, value in batch.items():  # per token of a completion: ids, masks, log-probabilities
        per_token = isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape == completions.shape
        if per_token and length < most:
            found[name] = F.pad(value, (0, most - length), value=_padding(trainer) if name == _COMPLETIONS else 0)
    return found


def extent_of(batch: Any) -> Extent:
    """The extent of a generated batch: a sequence is a prompt with its completion, which lie in two tensors."""
    if not isinstance(batch, Mapping):
        return Extent.of(batch)
    parts = [batch.get(name) for name in ("prompt_ids", _COMPLETIONS)]
    if not all(isinstance(part, torch.Tensor) and part.dim() == 2 for part in parts):
        return Extent.of(batch)
    return Extent.of({**batch, "sequences": torch.cat(cast(list[torch.Tensor], parts), dim=1)})


def _padding(trainer: Any) -> int:
    tokens = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    return int(getattr(tokens, "pad_token_id", None) or 0)


def waiting_batches(trainer: Any) -> int:
    """How many batches wait beside that of the step: one generation is for several steps."""
    buffered = getattr(trainer, "_buffered_inputs", None)
    return max(0, len(buffered) - 1) if isinstance(buffered, list) else 0


def with_batches(
    at_rest: Callable[[], contextlib.AbstractContextManager[None]], ready: Callable[[Any], None], trainer: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What takes the place of `_prepare_inputs`: batches are made `at_rest`, and those to train on are told `ready`."""

    def make(prepare: Callable[..., Any]) -> Callable[..., Any]:
        def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
            with at_rest():
                inputs = prepare(*args, **kwargs)
                if trainer.model.training:
                    ready(inputs)
            return inputs

        return prepare_inputs

    return make
