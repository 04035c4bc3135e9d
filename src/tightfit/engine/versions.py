"""How often a tensor was changed in place: what tells the engine that a replay would read something else.

Idea: torch counts every op that may write, also a `set_` that leaves a tensor where it is
(`step.ops.changes_nothing`). Adapters of a parameter come with one in every forward. The engine's modes see them, and
they are taken off torch's count.

Invariant: a change that torch counts and no mode saw stays counted. Refused: nothing. A change through `.data` is
counted by nobody, so replays compare bits as well (`engine.checksum`).
"""

from __future__ import annotations

import weakref

import torch

__all__ = ["left_as_it_is", "version_of"]

#: Storage address -> the storage, and how often a tensor of it was left as it is.
_left: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}


def version_of(tensor: torch.Tensor) -> int:
    """torch's count of the changes to `tensor` and its views, less those that change nothing; -1 where torch does not
    count."""
    if tensor.is_inference():
        return -1
    if not _left or tensor.layout is not torch.strided or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return tensor._version
    _, times = _left.get(tensor.untyped_storage()._cdata, (None, 0))
    return tensor._version - times


def left_as_it_is(tensor: torch.Tensor) -> None:
    """An op is about to count as a change of `tensor`, and is none."""
    storage = tensor.untyped_storage()
    address = storage._cdata
    known, times = _left.get(address) or (weakref.ref(storage, lambda _: _left.pop(address, None)), 0)
    _left[address] = known, times + 1
