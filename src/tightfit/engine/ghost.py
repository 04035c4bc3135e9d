"""Stand-ins for results that nobody reads.

A ghost has the true shape, strides, offset, dtype and device of an op's output, and no memory. Python code and
autograd may look at all of that; reading the data raises `GhostRead`.

Invariant: a ghost never reaches a kernel, so a wrong plan can fail but cannot give a wrong gradient.
Refused: every op on a ghost except taking another handle to it, and making a fresh tensor of its shape.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tightfit.trace import METADATA_ONLY

_HANDLES = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}


class GhostRead(RuntimeError):
    """Somebody asked for the data of a tensor that the plan said nobody would read."""


class Shape(NamedTuple):
    """Everything about a tensor but its data."""

    size: torch.Size
    stride: tuple[int, ...]
    storage_offset: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Shape:
        return cls(tensor.size(), tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device)


class Ghost(torch.Tensor):
    """A tensor without data. A wrapper subclass without an inner tensor: no storage is ever allocated."""

    __slots__ = ()

    @staticmethod
    def __new__(cls, shape: Shape) -> Ghost:
        made: Ghost = torch.Tensor._make_wrapper_subclass(
            cls, shape.size, strides=shape.stride, storage_offset=shape.storage_offset, dtype=shape.dtype,
            device=shape.device,
        )  # fmt: skip
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Ghost(shape={tuple(self.shape)}, dtype={self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _HANDLES:
            return cls(Shape.of(args[0]))
        if func in METADATA_ONLY:
            source = args[0]
            options = {"device": source.device, **{k: v for k, v in (kwargs or {}).items() if v is not None}}
            outline = torch.empty_strided(source.size(), source.stride(), dtype=source.dtype, device="meta")
            return func(outline, *args[1:], **options)
        raise GhostRead(f"{func} read a value that the plan says nobody reads in replay")
