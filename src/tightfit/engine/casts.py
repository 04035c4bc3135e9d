"""Autocast's copies of weights, as the tape has them.

Idea: autocast keeps the copy that it makes of a weight until its context ends. Autograd would hold it until the end of
backward; in a unit that runs again nobody needs to, since the weight is there to be cast once more.

Invariant: what is made anew has the bits of the copy: the same op on the same version of the weight. In a unit's first
replay that is compared, since a change through `.data` raises no version. Refused: a weight that was changed in place
since the forward (`RuntimeError`). Without a plan autograd takes that, where it holds nothing but the copy.

Source: torch/csrc/autograd and aten/src/ATen/autocast_mode.cpp (the cache, and what clears it).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from tightfit.engine.versions import version_of
from tightfit.step.geometry import Geometry

__all__ = ["Cast", "CastView"]


class Cast:
    """Stands for autocast's copy of a weight: the copy itself while anybody holds it, otherwise the cast made anew.

    What is made anew stays until the last of those that are expected to ask for it has asked.
    """

    __slots__ = ("args", "func", "kwargs", "made", "storage", "uses", "version", "weights_version")

    def __init__(self, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.storage: weakref.ref[Any] = weakref.ref(out.untyped_storage())
        self.version = version_of(out)
        self.weights_version = version_of(args[0])
        self.uses = 0  # how often it will be asked for
        self.made: torch.Tensor | None = None

    def tensor(self, geometry: Geometry, keep: bool) -> torch.Tensor:
        """`keep`: whoever asks will ask once more."""
        storage = self.storage()
        if storage is not None:
            return geometry.on_storage(storage)
        made = self.made
        if made is None:
            weight = self.args[0]
            if version_of(weight) != self.weights_version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation "
                    f"between forward and backward: a weight of shape {list(weight.shape)}, of which autocast made a "
                    f"copy, is at version {version_of(weight)}; expected version {self.weights_version}"
                )
            made = self.func(*self.args, **self.kwargs)
            self.made = None if keep else made
        return geometry.on(made)

    def count_down(self) -> None:
        """One of those that were expected to ask has what it asked for."""
        self.uses -= 1
        if self.uses <= 0:
            self.made = None


class CastView:
    """Stands for a tensor that lies in autocast's copy of a weight."""

    __slots__ = ("cast", "geometry")

    def __init__(self, cast: Cast, geometry: Geometry) -> None:
        self.cast, self.geometry = cast, geometry
