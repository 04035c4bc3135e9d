"""Losses of other packages that fold tiles of logits, run a few rows at a time.

Idea: where there is no Triton, TRL's chunked loss works on a whole tile at once, with up to eight tensors of the tile's
size beside it. What it makes of a row depends on that row alone, so the same function is called on a few rows after
each other, and the tensors beside the tile are as small as those rows. Its buffer for tiles is made for more words than
small vocabularies have; it is made for as many as there are.

Invariant: loss and gradients are bit for bit those of one call, since the kernels work row by row, and the rows of the
smaller buffer are aligned as before. A call whose tensors do not all have the tile's rows goes to the package's own
function, and so does one of three rows or less. Refused: compiled calls (`Unsupported`), as `loss` does.

Source: TRL 1.16, trl/kernels/chunked_logprob.py.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tightfit.levers.loss_in_place.loss import rows_at_once
from tightfit.step.patches import refuse_compiled

_MODULE = "trl.kernels.chunked_logprob"
#: Its functions of a tile and of tensors with a number or a row for each row of it. All work in place.
_FOLDS = ("_forward_tile", "_backward_tile")
_LOSS = "ChunkedLogProbFunction"
_LEAST_BYTES = 2**16  # of rows at once: an op on so few is still more work than calling it
_COLUMNS = 2048  # the buffer has a multiple of them: a row is whole pages, as in the package's own


def slices_of(rows: int, row_bytes: int) -> list[slice]:
    """Slices of equal length, give or take a row; the last is the longest.

    None is of a single row, since torch may add up one row on several threads, in another order than many.
    """
    at_once = rows_at_once(rows, row_bytes, _LEAST_BYTES)
    pieces = max(1, min(-(-rows // at_once), rows // 2))
    ends = [rows * i // pieces for i in range(pieces + 1)]
    return list(itertools.starmap(slice, itertools.pairwise(ends)))


def columns(buffer: int, words: int) -> int:
    """Columns of the buffer, which has `buffer`, that are enough for a tile of `words`."""
    return min(buffer, -(-words // _COLUMNS) * _COLUMNS)


def _slices(tile: Any, rest: tuple[Any, ...]) -> list[slice]:
    """Empty where this is not a call of rows."""
    tensors = [tile, *(each for each in rest if isinstance(each, torch.Tensor))]
    if not isinstance(tile, torch.Tensor) or tile.dim() != 2:
        return []
    if any(each.shape[:1] != tile.shape[:1] for each in tensors):
        return []
    # what is made of a row is float32 whatever the tile is
    return slices_of(tile.shape[0], tile.shape[1] * 4)


def _by_rows(own: Callable[..., None], tile: Any, *rest: Any, **options: Any) -> None:
    if torch.compiler.is_compiling():
        refuse_compiled("the loss is compiled, and the plan in force runs it a few rows at a time")
    for rows in _slices(tile, rest) or [slice(None)]:
        own(tile[rows], *(each[rows] if isinstance(each, torch.Tensor) else each for each in rest), **options)


def _narrow(loss: Any, own: Callable[..., Any], *args: Any) -> Any:
    """`loss.apply`, with the chunk no wider than the vocabulary needs."""
    given = list(inspect.signature(loss.forward).parameters)[1:]
    if {"weight", "chunk_size"} <= set(given[: len(args)]):
        weight, chunk = args[given.index("weight")], given.index("chunk_size")
        args = (*args[:chunk], columns(args[chunk], weight.shape[0]), *args[chunk + 1 :])
    return own(*args)


@contextlib.contextmanager
def _folding(make: Callable[[Callable[..., None]], Callable[..., None]]) -> Iterator[Any]:
    """While open, `make` of each function of a tile stands for it; gives the module, if it is loaded."""
    module = sys.modules.get(_MODULE)
    before = {} if module is None else {name: own for name, own in vars(module).items() if name in _FOLDS}
    for name, own in before.items():
        setattr(module, name, make(own))
    try:
        yield module
    finally:
        for name, own in before.items():
            setattr(module, name, own)


@contextlib.contextmanager
def _changed() -> Iterator[None]:
    with _folding(lambda own: functools.partial(_by_rows, own)) as module:
        loss = getattr(module, _LOSS, None)
        if loss is not None:
            loss.apply = functools.partial(_narrow, loss, loss.apply)
        try:
            yield
        finally:
            if loss is not None:
                del loss.apply  # the class inherits it


class _Change:
    """What the plans in force change in TRL, as one: several may be, and there is one module to change."""

    def __init__(self) -> None:
        self.plans = 0
        self.open: contextlib.ExitStack | None = None

    def settle(self) -> None:
        """TRL is changed if a plan is in force. It may have been loaded after the first one."""
        if self.plans and self.open is None and _MODULE in sys.modules:
            self.open = contextlib.ExitStack()
            self.open.enter_context(_changed())
        elif not self.plans:
            self.undo()

    def undo(self) -> None:
        if self.open is not None:
            self.open.close()
            self.open = None


_change = _Change()


@contextlib.contextmanager
def by_rows() -> Iterator[None]:
    """While open, TRL's loss is folded a few rows at a time, if TRL is loaded."""
    _change.plans += 1
    _change.settle()
    try:
        yield
    finally:
        _change.plans -= 1
        _change.settle()


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """While open, TRL's loss is what it is without any plan, as `loss.out_of_place` says of torch's."""
    _change.undo()
    try:
        yield
    finally:
        _change.settle()


@contextlib.contextmanager
def folds_told(
    note: Callable[[int, int, torch.Tensor, int], contextlib.AbstractContextManager[None]],
) -> Iterator[None]:
    """While open, every call that `by_rows` would take over runs inside `note(rows, rows at once, buffer, columns)`:
    what holds the tile, and how many of its columns are enough for it."""

    def spy(own: Callable[..., None], tile: Any, *rest: Any, **options: Any) -> None:
        slices = _slices(tile, rest)
        if not slices:
            return own(tile, *rest, **options)
        at_once = slices[-1].stop - slices[-1].start
        with note(tile.shape[0], at_once, tile, columns(tile.stride(0), tile.shape[1])):
            return own(tile, *rest, **options)

    with _folding(lambda own: functools.partial(spy, own)):
        yield
