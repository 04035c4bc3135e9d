"""The model, batch and optimizer that `measure` and `plan` work on.

Invariant: wrong options are refused before anything large is made (`InvalidInput`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tightfit.catalog import require_model
from tightfit.core import InvalidInput, Unsupported, parse_bytes
from tightfit.core.errors import unknown

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A model in training mode with its batch and optimizer, ready for a step."""

    model: nn.Module
    origin: str  # where the weights are from
    batch: dict[str, torch.Tensor]
    optimizer: torch.optim.Optimizer | None


def prepare(
    name: str, *, batch: int, seq: int, dtype: str, device: str, method: str, optimizer: str, budget: str, seed: int
) -> Prepared:
    """Build what `measure` and `plan` work on. Raises `InvalidInput` before anything large is made, where it can."""
    parse_bytes(budget, whole_bytes=2**40)  # what it is a percentage of is known later, its form is not
    if method not in ("full", "lora"):
        raise unknown("method", method, ("full", "lora"))
    if optimizer not in ("adamw", "adamw8bit", "sgd", "none"):
        raise unknown("optimizer", optimizer, ("adamw", "adamw8bit", "sgd", "none"))
    if not 0 <= seed < 2**32:
        raise InvalidInput(f"expected a seed from 0 to {2**32 - 1}, not {seed}")
    for option, value, least in (("--batch", batch, 1), ("--seq", seq, 2)):
        if value < least:
            raise InvalidInput(f"expected {option} of at least {least}, not {value}")
    require_model(name)
    from tightfit.accelerator import device_named
    from tightfit.integrations.transformers import (
        config_named,
        dtype_named,
        load_model,
        random_batch,
        require_memory,
    )

    made: Any
    kind, where = dtype_named(dtype), device_named(device)
    require_memory(config_named(name), batch, seq, dtype=kind, device=where)
    made, origin = load_model(name, dtype=kind, device=where, seed=seed)
    tokens = random_batch(made, batch, seq, seed)
    if method == "lora":
        from tightfit.integrations.peft import add_lora

        made = add_lora(made)
    return Prepared(model=made, origin=origin, batch=tokens, optimizer=optimizer_named(made, optimizer))


def optimizer_named(model: nn.Module, name: str) -> torch.optim.Optimizer | None:
    """The optimizer called `name` over the trainable parameters. Its learning rate changes no bytes."""
    import torch

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(trainable, lr=1e-5)
    if name == "sgd":
        return torch.optim.SGD(trainable, lr=1e-5)
    if name == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise Unsupported(
                f"adamw8bit needs the package bitsandbytes ({error}): pip install 'tightfit[bitsandbytes]'"
            ) from None
        made: torch.optim.Optimizer = AdamW8bit(trainable, lr=1e-5)
        return made
    return None
