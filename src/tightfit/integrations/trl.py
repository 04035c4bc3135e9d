"""What TRL's trainers do that a plan has to know: a default of theirs, and features that no plan can stand beside.

TRL switches checkpointing on in every config unless the user says otherwise; `is_default_checkpointing` tells that from
a user's own choice. Nothing here imports TRL: a trainer is looked at by what it has.

Refused: activation offloading (saved tensors would be moved by two), completions that vLLM generates.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from tightfit.core import Unsupported

__all__ = ["is_default_checkpointing", "refuse", "refuse_offloading"]

_SWITCHES = ("activation_checkpointing", "gradient_checkpointing")


def is_default_checkpointing(args: Any) -> bool:
    """Is checkpointing on because the class of `args` has it on by default, and with no options of the user's?"""
    defaults = {f.name: f.default for f in dataclasses.fields(args)} if dataclasses.is_dataclass(args) else {}
    by_default = any(defaults.get(name) is True for name in _SWITCHES)
    options = any(getattr(args, f"{name}_kwargs", None) for name in _SWITCHES)
    return by_default and not options


def refuse_offloading(args: Any, context: Any = None) -> None:
    """Raise `Unsupported` where saved tensors are moved to the host. `context`: what the trainer's steps run in."""
    if getattr(args, "activation_offloading", False) or not isinstance(context, (type(None), contextlib.nullcontext)):
        raise Unsupported(
            "activation_offloading=True and TightfitCallback(budget=...) both decide where saved tensors live: "
            "set activation_offloading=False, or leave the callback out"
        )


def refuse(trainer: Any) -> None:
    """Raise `Unsupported` for what TRL offers and a plan cannot stand beside."""
    refuse_offloading(trainer.args, getattr(trainer, "maybe_activation_offload_context", None))
    if getattr(trainer, "use_vllm", False):
        raise Unsupported(
            "use_vllm=True and TightfitCallback(budget=...) were not tried together: vLLM takes memory of its own, "
            "which no plan counts; set use_vllm=False, or leave the callback out"
        )
