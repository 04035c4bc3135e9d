"""What a planned module is known by."""

from __future__ import annotations

import hashlib

from torch import nn


def signature_of(module: nn.Module) -> str:
    """Class, parameters (name, shape, dtype, trainable or not) of a unit, shortened; equal for equal units."""
    parts = [
        f"{name}:{tuple(p.shape)}:{p.dtype}:{p.requires_grad}"
        for name, p in module.named_parameters(remove_duplicate=False)
    ]
    digest = hashlib.sha256("|".join(parts).encode()).hexdigest()[:12]
    return f"{type(module).__qualname__}({len(parts)} parameters, {digest})"
