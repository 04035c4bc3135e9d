"""The state around a call that its replay must find again: autocast, grad mode, default device and dtype, the switches
of kernels, random states, and the buffers and attributes of the module.

Invariant: what is entered for a forward or a replay is left again, also when it raises, and wherever Ctrl-C comes.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from tightfit import accelerator
from tightfit.accelerator import numerics
from tightfit.core import Unsupported
from tightfit.step.modes import kept_in_force


class _Active(threading.local):
    depth = 0


_active = _Active()


def is_active() -> bool:
    """Is this thread inside a frame's forward or replay? If it is, units inside that frame run as they are."""
    return _active.depth > 0


class activated:
    """This thread is inside a frame."""

    __slots__ = ()

    def __enter__(self) -> None:
        _active.depth += 1

    def __exit__(self, *_: object) -> None:
        _active.depth -= 1


class kept_as_found(kept_in_force):
    """After an error, what was in force before the block is in force again, and this thread inside as many frames.

    It stands before all else that a frame enters: a frame that was never left would let no plan work in this thread.
    """

    __slots__ = ("_depth",)

    def __enter__(self) -> None:
        super().__enter__()
        self._depth = _active.depth

    def __exit__(self, kind: object, *rest: object) -> None:
        _active.depth = self._depth
        super().__exit__(kind, *rest)


_NOTHING = object()


def called_in(
    context: AbstractContextManager[Any], name: str, function: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """`function(*args, **kwargs)` within `context`. The context must not swallow the function's error, because there
    would be no result."""
    out: Any = _NOTHING
    with context:
        out = function(*args, **kwargs)
    if out is _NOTHING:
        raise Unsupported(
            f"the first context of context_fn swallowed an error of {name}, so that there is no result to go on with: "
            "let the error through"
        )
    return out


def _function_modes() -> list[Any]:
    return _get_current_function_mode_stack() if torch._C._len_torch_function_stack() else []


class AmbientState:
    """The settings that decide which ops a forward calls and which bits they give; restored for its replay."""

    __slots__ = ("attention", "autocast", "default_dtype", "modes", "switches")

    def __init__(self, devices: Iterable[torch.device]) -> None:
        cache = torch.is_autocast_cache_enabled()
        self.autocast = [(*state, cache) for state in accelerator.autocast_states(devices)]
        self.attention = [enabled() for enabled, _ in accelerator.ATTENTION_SWITCHES]
        self.switches = numerics.switches()
        self.default_dtype = torch.get_default_dtype()
        # `with torch.device(...)`, which says where new tensors are made, and whatever else changes what functions do
        self.modes = _function_modes()

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        now = [enabled() for enabled, _ in accelerator.ATTENTION_SWITCHES]
        dtype = torch.get_default_dtype()
        with contextlib.ExitStack() as stack:
            for kind, enabled, cast_dtype, cache in self.autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=cast_dtype, cache_enabled=cache))
            stack.enter_context(numerics.restored(self.switches))
            active = set(map(id, _function_modes()))
            for mode in self.modes:
                if id(mode) not in active:  # torch has a mode off while a function that it saw is running, as backward
                    stack.enter_context(mode)
            try:
                self._attention(self.attention, now)
                if dtype != self.default_dtype:
                    torch.set_default_dtype(self.default_dtype)
                yield
            finally:
                self._attention(now, self.attention)
                if dtype != self.default_dtype:
                    torch.set_default_dtype(dtype)

    def _attention(self, wanted: list[bool], present: list[bool]) -> None:
        for want, have, (_, switch) in zip(wanted, present, accelerator.ATTENTION_SWITCHES, strict=True):
            if want != have:
                switch(want)


class ModuleState:
    """The buffers and attributes of a unit and of all modules in it, which a whole replay must not change.

    What is reassigned is put back, and so is what a list, dict or set held. Tensors that ops change in place are not
    put back here: the replay itself does not write them again.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self.tables: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.contents: list[tuple[Any, Any]] = []
        for each in () if module is None else module.modules():
            self.tables.append((each.__dict__, dict(each.__dict__)))
            for value in each.__dict__.values():
                if type(value) in (list, dict, set):  # `_buffers` is one of them
                    self.contents.append((value, value.copy()))

    def put_back(self) -> None:
        for table, before in self.tables:
            if len(table) != len(before) or any(table.get(name) is not value for name, value in before.items()):
                table.clear()
                table.update(before)
        for container, before in self.contents:
            if _is_same(container, before):
                continue
            if type(container) is list:
                container[:] = before
            else:
                container.clear()
                container.update(before)


def _is_same(container: Any, before: Any) -> bool:
    """Compared by identity, because what lies in a container may refuse to be compared."""
    if len(container) != len(before):
        return False
    if type(container) is dict:
        return all(container.get(key, before) is value for key, value in before.items())
    return all(a is b for a, b in zip(container, before))


def foreign_random_states() -> dict[str, Any]:
    states: dict[str, Any] = {"python": random.getstate()}
    if "numpy" in sys.modules:
        states["numpy"] = sys.modules["numpy"].random.get_state()
    return states


def restore_foreign_random_states(states: Mapping[str, Any]) -> None:
    if "python" in states:
        random.setstate(states["python"])
    if "numpy" in states:
        sys.modules["numpy"].random.set_state(states["numpy"])
