"""What torch keeps in force for a thread while a step runs: dispatch modes, hooks for saved tensors, the grad mode.

Invariant: after an error all of it is as it was before, wherever the error came. `with` alone does not promise that.
It leaves what it entered, but not where Ctrl-C comes after the entering and before the block, nor where Ctrl-C comes
while something is left. A mode or a hook that stays would see every later step of the process. Refused: nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode, _push_mode

__all__ = ["kept_in_force", "modes_off", "quietly"]


class kept_in_force:
    """What was in force before the block is in force after it, also where Ctrl-C tore what was entered inside."""

    __slots__ = ("_grad", "_hooks", "_modes")

    def __enter__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._hooks = _innermost_hooks()
        self._modes = _get_current_dispatch_mode_stack()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            return
        torch.set_grad_enabled(self._grad)
        while (hooks := _innermost_hooks()) is not None and hooks != self._hooks:
            torch._C._autograd._pop_saved_tensors_default_hooks()
        present = _get_current_dispatch_mode_stack()
        same = 0
        while same < min(len(present), len(self._modes)) and present[same] is self._modes[same]:
            same += 1
        for _mode in present[same:]:
            _pop_mode()
        for mode in self._modes[same:]:
            _push_mode(mode)


def _innermost_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


class modes_off:
    """No dispatch mode sees what runs inside.

    torch has the same as a generator. Where Ctrl-C comes as it begins, Python ends that generator some time later, and
    the modes are back after all else has been tidied.
    """

    __slots__ = ("_modes",)

    def __enter__(self) -> None:
        self._modes: list[Any] = []
        for _mode in _get_current_dispatch_mode_stack():
            self._modes.append(_pop_mode())

    def __exit__(self, *_: object) -> None:
        while self._modes:
            _push_mode(self._modes.pop())


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """No dispatch mode sees what runs inside, no history is made, and tensors are ordinary ones."""
    with modes_off(), torch.inference_mode(False), torch.no_grad():
        yield
