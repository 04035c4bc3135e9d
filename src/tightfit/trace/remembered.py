"""Results of ops on fake tensors, worked out once for arguments that are alike.

Idea: what an op on fake tensors gives is told by the outlines of its arguments: new tensors of certain shapes, an
argument that it writes to, or a view of one. torch's fake mode remembers most results too, and takes a tenth of a
millisecond to find one again. A recording asks thousands of times for the same few hundred.

Invariant: only what an op gave once, in the fake mode, is given again. Refused, and so asked of the fake mode each
time: ops whose result depends on values, that change a tensor's shape, or that give lists; tensors that are not fake,
or that the fake mode knows the values of.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from tightfit.step.run import tensors_in

__all__ = ["Remembered", "extent"]


class _Gives(enum.Enum):
    """What an op gives, by its schema."""

    NEW = "new tensors"
    ITSELF = "its first argument, written to"
    OUT = "its argument `out`, written to"
    VIEW = "a view of its first argument"
    OTHER = "what is asked for each time"


class _Made(NamedTuple):
    """One result."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


class _NotAlike(Exception):
    """An argument that its outline does not tell."""


_VALUES = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view})


class Remembered:
    """What ops have given, in one step."""

    def __init__(self) -> None:
        self._gives: dict[Any, _Gives] = {}
        self._results: dict[Any, tuple[_Made, ...]] = {}

    def result(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What `func` gives on these arguments."""
        gives = self._gives.get(func)
        if gives is None:
            gives = self._gives[func] = _by_schema(func)
        if gives is _Gives.OTHER:
            return func(*args, **kwargs)
        try:
            key: Any = (func, _outlines(args), _outlines(tuple(kwargs.items())) if kwargs else ())
            if gives is _Gives.VIEW:  # lies where its argument does
                key = (*key, args[0].storage_offset())
            known = self._results.get(key)
        except (_NotAlike, TypeError):  # an argument that cannot be hashed, or that is not told by its outline
            return func(*args, **kwargs)
        if known is None:
            out = func(*args, **kwargs)
            found = _described(func, gives, args, kwargs, out)
            if found is not None:
                self._results[key] = found
            return out
        if gives is _Gives.ITSELF:
            return args[0]
        if gives is _Gives.OUT:
            return kwargs["out"]
        if gives is _Gives.VIEW:
            return _made(known[0], args[0].fake_mode, args[0].untyped_storage())
        mode = _mode_of(args)
        made = [_made(each, mode) for each in known]
        return made[0] if len(func._schema.returns) == 1 else tuple(made)


def _by_schema(func: Any) -> _Gives:
    schema = func._schema
    if _VALUES.intersection(func.tags) or not schema.returns:
        return _Gives.OTHER
    if any(str(each.type) != "Tensor" for each in schema.returns):
        return _Gives.OTHER
    if schema.is_mutable:
        written = [place for place, each in enumerate(schema.arguments) if each.alias_info and each.alias_info.is_write]
        is_own = written == [0] and len(schema.returns) == 1 and schema.returns[0].alias_info is not None
        if func.namespace != "aten":
            return _Gives.OTHER
        names = [schema.arguments[place].name for place in written]
        return _Gives.ITSELF if is_own else _Gives.OUT if names == ["out"] else _Gives.OTHER
    if func.is_view or any(each.alias_info for each in schema.returns):
        return _Gives.VIEW if len(schema.returns) == 1 and func.namespace == "aten" else _Gives.OTHER
    return _Gives.NEW


def _outlines(arguments: tuple[Any, ...] | list[Any]) -> tuple[Any, ...]:
    """What tells arguments apart. A number's type counts: 1 is no 1.0."""
    found: list[Any] = []
    for each in arguments:
        if type(each) is FakeTensor:
            if each.constant is not None or each.layout is not torch.strided or each.dtype.is_complex:
                raise _NotAlike
            found.append((each.shape, each.stride(), each.dtype, each.fake_device))
        elif isinstance(each, torch.Tensor):
            raise _NotAlike
        elif isinstance(each, (list, tuple)):
            found.append(_outlines(each))
        else:
            found.append((type(each), each))
    return tuple(found)


def _mode_of(arguments: tuple[Any, ...] | list[Any]) -> Any:
    for each in arguments:
        if isinstance(each, FakeTensor):
            return each.fake_mode
        if isinstance(each, (list, tuple)) and (found := _mode_of(each)) is not None:
            return found
    return None


def _described(
    func: Any, gives: _Gives, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
) -> tuple[_Made, ...] | None:
    """How to make `out` again; None: it is not what the schema says, or cannot be told."""
    if gives is _Gives.ITSELF:
        return () if args and out is args[0] else None
    if gives is _Gives.OUT:
        return () if out is kwargs.get("out") else None
    # one return that is no tensor is a list of them
    results: list[Any] = [out] if isinstance(out, torch.Tensor) else list(out) if len(func._schema.returns) > 1 else []
    if not results or len(results) != len(func._schema.returns):
        return None
    if not all(type(each) is FakeTensor and each.constant is None for each in results) or _mode_of(args) is None:
        return None
    made = [each.untyped_storage()._cdata for each in results]
    if gives is _Gives.VIEW:
        if type(args[0]) is not FakeTensor or args[0].untyped_storage()._cdata != made[0]:
            return None
    else:
        given = {each.untyped_storage()._cdata for each in tensors_in(args)}
        if not given.isdisjoint(made) or len(set(made)) != len(made) or not all(map(_is_whole, results)):
            return None
    return tuple(
        _Made(tuple(each.shape), tuple(each.stride()), int(each.storage_offset()), each.dtype, each.fake_device)
        for each in results
    )


def _made(each: _Made, mode: Any, storage: torch.UntypedStorage | None = None) -> FakeTensor:
    """A fake tensor in `storage`, or in one of its own, made as the fake mode makes what it remembers."""
    with torch._C._DisableTorchDispatch():
        empty = torch.empty_strided(each.shape, each.stride, dtype=each.dtype, device="meta")
        if storage is not None:
            empty.set_(storage, each.offset, each.shape, each.stride)  # type: ignore[call-overload]
    return FakeTensor(mode, empty, each.device)


def extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How many elements a storage has at least."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if 0 not in shape else 0


def _is_whole(tensor: torch.Tensor) -> bool:
    """Is there nothing in its storage but the tensor?"""
    size_bytes = extent(tuple(tensor.shape), tensor.stride()) * tensor.element_size()
    return not tensor._is_view() and tensor.untyped_storage().nbytes() == size_bytes
