"""Deferred logits and their loss on their own, for models whose whole step has no room in float64.

Invariant: hidden states and targets are those of the step itself, so an error that its inputs have is in all results.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from tightfit.core import Tiling
from tightfit.levers.tile.force import in_force
from tightfit.levers.tile.head import HeadCall, TileStats

#: Rows of the head and its loss that are held against float64 at once.
_ROWS = 64

Named = dict[str, torch.Tensor]


def heads_in_float64(
    step: Callable[[], Any],
    model: nn.Module,
    tiling: Tiling,
    doubled: Callable[[nn.Module], nn.Module],
    in_float64: Callable[[], AbstractContextManager[None]],
) -> tuple[Named, Named, Named]:
    """Loss and gradients of each head call of `step`, by name: by the ordinary head, in tiles, and in float64."""
    calls: list[HeadCall] = []
    with in_force(model, tiling, TileStats(witness=calls.append)):
        step()
    found: tuple[Named, Named, Named] = ({}, {}, {})
    for number, call in enumerate(calls):
        twin = doubled(call.job.head.module)
        with in_float64():
            exact = call.in_float64(twin, _ROWS)
        for into, each in zip(found, (call.untiled(), call.tiled(), exact), strict=True):
            into.update({f"{name} of loss {number + 1}" if number else name: t for name, t in each.items()})
    return found
