"""A source brings back a value that a tape does not hold: from the unit before (`engine.chain`), or from the pool
(`engine.offload`)."""

from __future__ import annotations

from typing import Protocol

import torch


class Source(Protocol):
    """Brings back one value of a tape."""

    def seal(self) -> None:
        """The forward of the tape's unit is over."""

    def take(self, keep: bool) -> torch.Tensor:
        """The value, as a tensor on its whole storage. `keep`: the value will be asked for again."""

    def forget(self) -> None:
        """Let go of what the source can bring once more."""
