"""Optimizer state that waits in host memory, and is on the device while its parameter is stepped.

Idea: what waits is a tensor in host memory in the place of the device's own, in `optimizer.state` itself. So whoever
reads the state, `state_dict()` first of all, reads the right numbers under the right keys.

On the CPU the memory lies outside torch's allocator, as what is offloaded does: it stands for another device.

State that is loaded goes to host memory at once. torch would put all of it on the device first, which may be too small:
with state that is loaded before, `loaded_on_host` is around the loading.

Invariant: outside a step the state has the bytes that it would have without this. On leaving, state is where it came
from: on the device, unless it was loaded into host memory or the device has no room for it (a warning says so).
"""

from __future__ import annotations

import contextlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch.optim import Optimizer

from tightfit.core import TightfitError
from tightfit.levers.optimizer_step import Waiting
from tightfit.step.geometry import laid_out_like
from tightfit.step.modes import quietly
from tightfit.step.optimizers import Part, around_parts, bytes_of, has_gradients, is_movable, movable_state
from tightfit.step.run import elsewhere, reachable

__all__ = ["HostState", "loaded_on_host", "settled"]


#: Takes a tensor that was loaded for a parameter: what its state is to have instead.
Take = Callable[[torch.Tensor, Any, torch.Tensor], torch.Tensor]


class HostState:
    """While it is open, the state of the parameters that `waiting` chooses waits in room of `pool`. What finds no room
    there stays on the device.

    `ahead`: the state of a part comes while the part before is stepped, and leaves while the next one is. The host's
    numbers are right again when the whole step is over, and the optimizer reads none of them before."""

    def __init__(self, optimizer: Optimizer, waiting: Waiting, pool: Any, *, ahead: bool = False) -> None:
        self.optimizer, self.waiting, self.pool, self.ahead = optimizer, waiting, pool, ahead
        self._is_reachable = reachable(optimizer)
        self._chosen: dict[torch.Tensor, bool] = {}
        # by parameter and name: room in host memory, which is used again in every step
        self._rooms: dict[torch.Tensor, dict[Any, torch.Tensor]] = {}
        self._buffers: dict[torch.Tensor, list[torch.Tensor]] = defaultdict(list)
        self._from_host: set[torch.Tensor] = set()  # parameters whose state was in host memory before
        self._coming: dict[torch.Tensor, Any] = {}  # by the room, what is on its way out of it
        self._leaving: list[Any] = []  # what the part before has sent out
        self._sent_from: set[torch.device] = set()  # since the step began
        self._undo = contextlib.ExitStack()

    @contextlib.contextmanager
    def there(self, part: Part, following: Part | None) -> Iterator[None]:
        """The state of `part` is on the device."""
        moving, is_stepped = self._moving(part), has_gradients(part)
        for parameter in moving:
            self._bring(parameter)
        if self.ahead and is_stepped and following is not None:
            for parameter in self._moving(following):
                self._fetch(parameter)
        try:
            yield
        finally:
            if is_stepped:
                self._land()
            for parameter in moving:
                self._send(parameter, begins=self.ahead)

    def over(self) -> None:
        """The host's numbers are right, and nothing is under way."""
        self._land()
        while self._coming:  # for nothing: its memory must not be used before it is there
            self._coming.popitem()[1].taken()
        while self._sent_from:
            self.pool.finish_out(self._sent_from.pop())

    def _moving(self, part: Part) -> list[torch.Tensor]:
        return [p for p in part.parameters if p.grad is not None and self._waits(p)]

    def _fetch(self, parameter: torch.Tensor) -> None:
        """Begin to bring the state of `parameter`. Where there is no room yet, it comes for its own step."""
        rooms = self._rooms.get(parameter, {})
        for name, value in movable_state(self.optimizer, parameter).items():
            if value is rooms.get(name):
                with contextlib.suppress(torch.OutOfMemoryError):
                    self._coming[value] = self.pool.begin_back(value, parameter.device)

    def _land(self) -> None:
        """Let go of what the part before has sent out."""
        for each in self._leaving:
            each.land()
        self._leaving.clear()

    def _waits(self, parameter: torch.Tensor) -> bool:
        if parameter not in self._chosen:  # a group may have come
            trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
            chosen = zip(trained, self.waiting.chosen(map(bytes_of, trained)), strict=True)
            # what waits already goes on waiting, whichever of the equal ones would be chosen now
            self._chosen |= {each: waits or self._chosen.get(each, False) for each, waits in chosen}
            self._chosen.setdefault(parameter, bytes_of(parameter) >= self.waiting.from_bytes)  # trained no longer
        return self._chosen[parameter]

    def _bring(self, parameter: torch.Tensor, *, waits: bool = False) -> None:
        rooms = self._rooms.get(parameter, {})
        for name, value in movable_state(self.optimizer, parameter).items():
            if value is rooms.get(name):
                coming = self._coming.pop(value, None)
                if coming is not None:
                    self.optimizer.state[parameter][name] = coming.taken()
                    continue
                fresh = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=parameter.device)
                self.optimizer.state[parameter][name] = fresh.copy_(value, non_blocking=not waits)

    def _send(self, parameter: torch.Tensor, *, begins: bool = False) -> None:
        for name, value in movable_state(self.optimizer, parameter).items():
            self.optimizer.state[parameter][name] = self._sent(parameter, name, value, begins=begins)

    def _sent(self, parameter: torch.Tensor, name: Any, value: torch.Tensor, *, begins: bool = False) -> torch.Tensor:
        """`value` in its room; itself, where there is none. `begins`: it is on its way there when this returns."""
        rooms = self._rooms.setdefault(parameter, {})
        room = rooms.get(name)
        if value is room:
            return value
        if room is None and value in elsewhere:  # left there by one before this
            rooms[name] = value
            return value
        if room is None or room.shape != value.shape or room.dtype != value.dtype:
            room = self._room_like(parameter, value)
            if room is None:
                return value.to(parameter.device)
            rooms[name] = room
        if begins and value.device == parameter.device:
            self._leaving.append(self.pool.begin_out(value, room))
            self._sent_from.add(value.device)
        else:
            room.copy_(value)  # done when it returns: whoever reads the state may read the host's numbers at once
        return room

    def _room_like(self, parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor | None:
        size_bytes = value.numel() * value.element_size()
        try:
            buffer = self.pool.room(size_bytes, parameter.device)
        except TightfitError as error:  # its parameter has been stepped: to end here would leave half a step
            warnings.warn(f"{error}; the optimizer state that was to wait there stays on the device", stacklevel=2)
            return None
        if buffer is None:
            return None
        self._buffers[parameter].append(buffer)
        room = laid_out_like(value, buffer)
        elsewhere[room] = True
        return room

    def __enter__(self) -> HostState:
        self._undo.enter_context(around_parts(self.optimizer, self))
        for parameter in list(self.optimizer.state):
            if isinstance(parameter, torch.Tensor) and self._waits(parameter):
                state = movable_state(self.optimizer, parameter).values()
                if any(value.device != parameter.device for value in state):
                    self._from_host.add(parameter)
                self._send(parameter)
        _settle(self.optimizer, lambda parameter: not self._waits(parameter))
        self._undo.enter_context(_taken_at_loading(self.optimizer, self._waits, self._sent))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._undo.close()
        left = 0
        if self._is_reachable():  # else nobody will read it, and Python's collector may run at any time
            with quietly():  # in a recorded forward, too
                left = self._brought_back()
        self._rooms.clear()
        self._buffers.clear()  # of what stays in host memory; its state holds them
        _warn_of(left)

    def _brought_back(self) -> int:
        """Put all that waits on the device. For how many parameters there is no room."""
        left = 0
        for parameter in list(self._rooms):
            if parameter in self._from_host:
                continue
            try:
                self._bring(parameter, waits=True)  # the rooms may be gone before the device has read them
            except torch.OutOfMemoryError:
                left += 1
                continue
            for buffer in self._buffers.pop(parameter, ()):
                self.pool.room_is_free(buffer, parameter.device)
        return left


@contextlib.contextmanager
def loaded_on_host(optimizer: Optimizer) -> Iterator[None]:
    """What is loaded into `optimizer` meanwhile is not on its parameters' device but in host memory. It cannot step so:
    `HostState` or `settled` comes next."""
    with _taken_at_loading(optimizer, lambda parameter: True, lambda parameter, name, value: value):
        yield


def settled(optimizer: Optimizer) -> None:
    """Put what a loading left in host memory on the device of its parameter, if there is room."""
    _warn_of(_settle(optimizer, lambda parameter: True))


def _settle(optimizer: Optimizer, which: Callable[[torch.Tensor], bool]) -> int:
    """The same for some parameters. How many have found no room."""
    left = 0
    for parameter in list(optimizer.state):
        if not isinstance(parameter, torch.Tensor) or not which(parameter):
            continue
        for name, value in movable_state(optimizer, parameter).items():
            if value.device == parameter.device:
                continue
            try:
                optimizer.state[parameter][name] = value.to(parameter.device)
            except torch.OutOfMemoryError:
                left += 1
                break
    return left


def _warn_of(left: int) -> None:
    if left:
        warnings.warn(
            f"the device has no room for the optimizer state of {left} parameters: it stays in host memory, where it "
            "can be saved; the optimizer cannot step with it unless a plan with state_in_host is in force",
            stacklevel=3,
        )


@contextlib.contextmanager
def _taken_at_loading(optimizer: Optimizer, which: Callable[[torch.Tensor], bool], take: Take) -> Iterator[None]:
    """Meanwhile `load_state_dict` leaves the movable state of some parameters to `take`."""
    taken: list[tuple[torch.Tensor, dict[Any, Any]]] = []

    def before(optimizer: Optimizer, document: dict[str, Any]) -> dict[str, Any] | None:
        taken.clear()
        numbers = [number for group in document["param_groups"] for number in group["params"]]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if len(numbers) != len(parameters):
            return None  # which torch refuses
        state = dict(document["state"])
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state and which(parameter):
                taken.append((parameter, state[number]))
                state[number] = {name: value for name, value in state[number].items() if not is_movable(value)}
        return {**document, "state": state}

    def after(optimizer: Optimizer) -> None:
        for parameter, state in taken:
            loaded = optimizer.state[parameter]
            optimizer.state[parameter] = {
                name: loaded[name] if name in loaded else take(parameter, name, _as_loaded(parameter, value))
                for name, value in state.items()
            }
        taken.clear()

    with contextlib.ExitStack() as hooks:
        hooks.callback(optimizer.register_load_state_dict_pre_hook(before).remove)
        hooks.callback(optimizer.register_load_state_dict_post_hook(after).remove)
        yield


def _as_loaded(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value` with the dtype that torch's `Optimizer.load_state_dict` gives it."""
    return value.to(parameter.dtype) if parameter.is_floating_point() else value
