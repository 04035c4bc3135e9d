"""transformers' switch for checkpointing, by the names that the installed release has for it."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedModel

NEW = hasattr(PreTrainedModel, "activation_checkpointing_enable")
PREFIX = "activation" if NEW else "gradient"
#: Can only some of the layers be checkpointed?
EVERY_N_LAYERS = (
    "every_n_layers" in inspect.signature(getattr(PreTrainedModel, f"{PREFIX}_checkpointing_enable")).parameters
)


def switch_on(model: Any, *args: Any, **kwargs: Any) -> None:
    getattr(model, f"{PREFIX}_checkpointing_enable")(*args, **kwargs)


def switch_off(model: Any) -> None:
    getattr(model, f"{PREFIX}_checkpointing_disable")()


def is_on(model: Any) -> bool:
    return bool(getattr(model, f"is_{PREFIX}_checkpointing"))
