"""Copies of streamed weights, made when they are asked for or one request early.

Which request comes next is learnt from the steps before, by what asked (`requests` says which are foreseen). In the
first step nothing is. What was fetched for a request that does not come is dropped at the next one.

A copy that is on its way reads host memory, which anyone may write as soon as the step returns. So the host waits for
the copy before its reader is queued. What is under way meanwhile is one request's copies, and the device computes what
was queued before.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, Protocol

import torch

from tightfit.core import Phase

__all__ = ["Fetched", "Fetching", "Key"]

#: What asks, and when.
Key = tuple[Phase, Hashable]


class Fetched(Protocol):
    """One weight in host memory."""

    @property
    def version(self) -> Any:
        """Another one whenever the weight was changed."""

    def begin(self) -> Any:
        """Begin to copy it to the device."""

    def drop(self, coming: Any) -> None:
        """Let go of what was begun for nothing."""

    def fresh(self, coming: Any = None) -> torch.Tensor:
        """A copy on the device; `coming`: it was begun before."""


class Asking(Protocol):
    """What asks for weights."""

    def wanted(self) -> Iterable[Fetched]:
        """The weights that it will ask for."""


class Fetching:
    """`ahead`: copies begin one request early, as soon as it is known which one comes."""

    def __init__(self, *, ahead: bool) -> None:
        self.ahead = ahead
        self._following: dict[Key, Key | None] = {}  # None: not always the same one
        self._first: set[Key] = set()  # requests with which forward or backward begins
        self._last: Key | None = None
        self._steps = 0  # that have begun
        self._pending: dict[Fetched, tuple[Any, Any]] = {}  # by weight: its version, and what is on its way

    def copies(self, key: Key, weights: Iterable[Fetched]) -> dict[Any, torch.Tensor]:
        """The weights on the device, for what asks now."""
        if not self.ahead or _is_replay(key):
            return {weight: weight.fresh() for weight in weights}
        pending, self._pending = self._pending, {}
        found = {}
        for weight in (asked := list(weights)):
            if weight in pending and _is_current(weight, pending[weight]):
                found[weight] = pending.pop(weight)[1]
        _drop(pending)
        copies = {weight: weight.fresh(found.pop(weight, None)) for weight in asked}
        self._learn(key)
        self._begin(self._following.get(key))
        return copies

    def _learn(self, key: Key) -> None:
        before, self._last = self._last, key
        if before is not None and self._following.setdefault(before, key) != key:
            self._following[before] = None
        if before is None or before[0] is not key[0]:
            self._first.add(key)
            self._steps += key[0] is Phase.FORWARD

    def _begin(self, following: Key | None) -> None:
        if following is None or self._steps < 2 or following[0] is not self._last_phase or following in self._first:
            return
        asking: Any = following[1]
        try:
            for weight in asking.wanted():
                self._pending[weight] = weight.version, weight.begin()
        except torch.OutOfMemoryError:  # they come when they are asked for
            self.forget()

    @property
    def _last_phase(self) -> Phase | None:
        return None if self._last is None else self._last[0]

    def forget(self) -> None:
        """Drop what is on its way: it is not known any more what comes next."""
        pending, self._pending = self._pending, {}
        _drop(pending)

    def close(self) -> None:
        """Nothing is fetched ahead any more."""
        self.ahead = False
        self.forget()


def _drop(pending: dict[Fetched, tuple[Any, Any]]) -> None:
    for weight, (_, coming) in pending.items():
        weight.drop(coming)
    pending.clear()


def _is_current(weight: Fetched, begun: tuple[Any, Any]) -> bool:
    """Is the weight what it was when its copy began?"""
    return bool(begun[0] == weight.version)


def _is_replay(key: Key) -> bool:
    """Is a module called while a backward runs?"""
    return key[0] is Phase.FORWARD and torch._C._current_graph_task_id() != -1
