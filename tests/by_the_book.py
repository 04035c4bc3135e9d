"""Ops take what their FLOPs and bytes say, not what a busy machine gives: in the fast tests, and in ranks of theirs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock


@contextmanager
def seconds_by_the_book(rank: int = 0) -> Iterator[list[tuple[Any, str, Any]]]:
    """Gives the functions that measure, each with its owner and name. In `make test-slow` they stay: ops are timed.

    Memory is slower for a higher `rank`, since no two ranks measure the same: each would plan otherwise.
    """
    from tightfit.device.cost import op_seconds
    from tightfit.trace import passes, timing

    def by_work(groups: Iterable[Any]) -> dict[int, float]:
        return {
            n: op_seconds(each.flops, each.moved_bytes * (1 + 9 * rank), "float32")
            for each in groups for n in each.calls
        }  # fmt: skip

    book = (
        (passes, "fitted", by_work), (passes.StepRecording, "_time_again", lambda *_: None),
        (timing, "_faults", lambda: 0),
    )  # fmt: skip
    measured = [(owner, name, getattr(owner, name)) for owner, name, _ in book]
    with ExitStack() as patched:
        for each in () if os.environ.get("TIGHTFIT_TESTS_TIME_OPS") else book:
            patched.enter_context(mock.patch.object(*each))
        yield measured
