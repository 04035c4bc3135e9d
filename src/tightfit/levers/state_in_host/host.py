"""Optimizer state that waits in host memory, and is on the device while its parameter is stepped.

Idea: what waits is a tensor in host memory in the place of the device's own, in `optimizer.state` itself. So whoever
reads the state, `state_dict()` first of all, reads the right numbers under the right keys.

On the CPU the memory lies outside torch's allocator, as what is offloaded does: it stands for another device.

Invariant: outside a step the state has the bytes that it would have without this. On leaving, all of it is on the
device again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch.optim import Optimizer

from tightfit.step.geometry import alone
from tightfit.step.optimizers import AROUND, Part, bytes_of, movable_state
from tightfit.step.run import elsewhere

__all__ = ["HostState"]


class HostState:
    """While it is open, the state of parameters of at least `least_bytes` waits in room of `pool`. What finds no room
    there stays on the device."""

    def __init__(self, optimizer: Optimizer, least_bytes: int, pool: Any) -> None:
        self.optimizer, self.least_bytes, self.pool = optimizer, least_bytes, pool
        # by parameter and name: room in host memory, which is used again in every step
        self._rooms: dict[torch.Tensor, dict[Any, torch.Tensor]] = {}
        self._buffers: list[tuple[torch.Tensor, torch.device]] = []

    @contextlib.contextmanager
    def _there(self, part: Part) -> Iterator[None]:
        """The state of `part` is on the device."""
        moving = [p for p in part.parameters if p.grad is not None and bytes_of(p) >= self.least_bytes]
        for parameter in moving:
            self._bring(parameter)
        try:
            yield
        finally:
            for parameter in moving:
                self._send(parameter)

    def _bring(self, parameter: torch.Tensor, *, waits: bool = False) -> None:
        rooms = self._rooms.get(parameter, {})
        for name, value in movable_state(self.optimizer, parameter).items():
            if value is rooms.get(name):
                fresh = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=parameter.device)
                self.optimizer.state[parameter][name] = fresh.copy_(value, non_blocking=not waits)

    def _send(self, parameter: torch.Tensor) -> None:
        rooms = self._rooms.setdefault(parameter, {})
        for name, value in movable_state(self.optimizer, parameter).items():
            room = rooms.get(name)
            if value is room:
                continue
            if room is None or room.shape != value.shape or room.dtype != value.dtype:
                room = self._room_like(value)
                if room is None:
                    continue
                rooms[name] = room
            room.copy_(value)  # done when it returns: the optimizer may read the host's numbers at once
            self.optimizer.state[parameter][name] = room

    def _room_like(self, value: torch.Tensor) -> torch.Tensor | None:
        size_bytes = value.numel() * value.element_size()
        buffer = self.pool.room(size_bytes, value.device)
        if buffer is None:
            return None
        self._buffers.append((buffer, value.device))
        room: torch.Tensor = alone(buffer[:size_bytes]).view(value.dtype).as_strided(value.shape, value.stride())
        elsewhere[room] = True
        return room

    def __enter__(self) -> HostState:
        setattr(self.optimizer, AROUND, self._there)
        for parameter in list(self.optimizer.state):
            if isinstance(parameter, torch.Tensor) and bytes_of(parameter) >= self.least_bytes:
                self._send(parameter)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        delattr(self.optimizer, AROUND)
        for parameter in list(self._rooms):
            self._bring(parameter, waits=True)  # the rooms may be gone before the device has read them
        self._rooms.clear()
        while self._buffers:
            self.pool.room_is_free(*self._buffers.pop())
