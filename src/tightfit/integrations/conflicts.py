"""What in a Trainer cannot stand beside a plan: what is switched off for the training, and what is refused.

Two things that both decide what to recompute cannot both be in force. What the user asked for in so many words is
refused with both names; what is there by somebody's default (TRL's configs, PEFT's `prepare_model_for_kbit_training`)
is switched off while the plan is in force, said in one line, and put back after.

Invariant: `Suspended.restore` gives every flag and hook back. Refused: see `refuse`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from torch import nn

from tightfit.core import Unsupported
from tightfit.integrations import trl
from tightfit.step.parallel import Strategy, strategy_of
from tightfit.step.patches import compiled_entries, own_checkpointing

__all__ = ["Suspended", "refuse"]

_SWITCHES = ("activation_checkpointing", "gradient_checkpointing")


def _on(args: Any) -> list[str]:
    return [name for name in _SWITCHES if getattr(args, name, None)]


def refuse(trainer: Any, model: nn.Module) -> None:
    """Raise `Unsupported`, naming both sides, for a Trainer whose step cannot be planned."""
    args = trainer.args
    if (names := _on(args)) and not trl.is_default_checkpointing(args):
        options = next((o for name in _SWITCHES if (o := getattr(args, f"{name}_kwargs", None))), None)
        said = f"{names[0]}=True" + (f" with {options}" if options else "")
        old = f" (or its old name {names[1]})" if len(names) > 1 else ""
        raise Unsupported(
            f"the training arguments say {said}{old}, and TightfitCallback(budget=...) decides what to recompute too: "
            f"set {names[0]}=False, or leave the callback out"
        )
    if getattr(args, "torch_compile", False):
        raise Unsupported(
            "torch_compile=True and TightfitCallback(budget=...): the Trainer of transformers "
            f"{transformers.__version__} compiles the model after it is planned; set torch_compile=False, or leave the "
            "plan out"
        )
    if compiled := compiled_entries(model):
        path = next(iter(compiled))
        raise Unsupported(
            f"{path or 'the model'} is compiled, and TightfitCallback(budget=...) measures the Trainer's step "
            "uncompiled: give the Trainer the model as it is, or train in a loop of your own with tightfit.fit, which "
            "plans compiled models"
        )
    if getattr(args, "use_liger_kernel", False) or any(
        type(m).__module__.startswith("liger_kernel") for m in model.modules()
    ):
        raise Unsupported(
            "use_liger_kernel=True and TightfitCallback(budget=...): Liger's kernels write memory that no op shows, so "
            "a replay could not be proven; set use_liger_kernel=False, or leave the callback out"
        )
    if args.n_gpu > 1:
        raise Unsupported(f"{args.n_gpu} GPUs are visible and the Trainer would copy the model to each: show it one")
    wrapped = trainer.model_wrapped
    if strategy_of(wrapped) is Strategy.ONE and (args.world_size > 1 or wrapped is not model):  # wrapped by now
        raise Unsupported(
            f"a model wrapped as {type(wrapped).__name__} cannot be planned: use one device, DDP or FSDP2 "
            "(fsdp_version: 2 in accelerate's config)"
        )
    trl.refuse(trainer)


class Suspended:
    """Checkpointing flags and input-gradient hooks of `model`, off until `restore`. `said`: one line, or nothing."""

    def __init__(self, trainer: Any, model: nn.Module) -> None:
        self._flags = own_checkpointing(model)
        self._hooks: list[tuple[dict[int, Callable[..., Any]], int, Callable[..., Any]]] = []
        for module, name, _ in self._flags:
            setattr(module, name, False)
        if self._flags:
            # they make a frozen prefix carry gradients, which only reentrant checkpointing needs
            self._hooks = _input_gradient_hooks(model)
            for table, key, _ in self._hooks:
                del table[key]
        self.said = ""
        if self._flags:
            owner = (
                f"{type(trainer.args).__name__}'s default {_on(trainer.args)[0]}=True"
                if _on(trainer.args)
                else "gradient checkpointing, which was on in the model,"
            )
            hooks = " and its input-gradient hook" if self._hooks else ""
            self.said = f"{owner}{hooks} is off while the plan is in force"

    def restore(self) -> None:
        """Put back what was switched off. Twice is once."""
        for module, name, value in self._flags:
            setattr(module, name, value)
        for table, key, hook in self._hooks:
            table[key] = hook
        self._flags, self._hooks = [], []


def _input_gradient_hooks(model: nn.Module) -> list[tuple[dict[int, Callable[..., Any]], int, Callable[..., Any]]]:
    """The forward hooks of `enable_input_require_grads`, of embeddings that are not trained themselves."""
    return [
        (module._forward_hooks, key, hook)
        for module in model.modules()
        if not any(p.requires_grad for p in module.parameters(recurse=False))
        for key, hook in module._forward_hooks.items()
        if getattr(hook, "__name__", "") == "make_inputs_require_grads"
        or getattr(hook, "__name__", "") == "make_inputs_require_grad"
    ]
