"""Whether Ctrl-C has come, told also after it has become another error.

Python raises `KeyboardInterrupt` between any two lines of whatever is running. In the middle of somebody's bookkeeping
(torch's stack of dispatch modes, a finaliser, an executor) another error may come out of it, or none at all.

Invariant: Ctrl-C still interrupts at once, and whoever handled it before handles it after. Refused: to take it from a
handler of the caller's own; then nothing is noticed here.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["Interrupts"]


class Interrupts:
    """`with Interrupts() as interrupts`: `interrupts.came` is True from the first Ctrl-C on.

    Whatever error comes out of the block after that is a `KeyboardInterrupt`. Blocks may be nested.
    """

    def __init__(self) -> None:
        self.came = False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        before = signal.getsignal(signal.SIGINT)
        ours = isinstance(getattr(before, "__self__", None), Interrupts)
        if threading.current_thread() is threading.main_thread() and (ours or before is signal.default_int_handler):
            self._before = before
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
        if self.came and error is not None and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        self._before(number, frame)
