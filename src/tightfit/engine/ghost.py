"""Stand-ins for results that nobody reads.

A ghost has the true shape, strides, offset, dtype and device of an op's output, and no memory. Python code and
autograd may look at all of that; reading the data raises `GhostRead`.

Invariant: a ghost never reaches a kernel, so a wrong plan can fail but cannot give a wrong gradient.
Refused: every op on a ghost except views of it, which are ghosts, and making a fresh tensor of its shape.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from tightfit.trace import METADATA_ONLY


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
    def of(cls, tensor: torch.Tensor, device: torch.device | None = None) -> Shape:
        return cls(tensor.size(), tensor.stride(), int(tensor.storage_offset()), tensor.dtype, device or tensor.device)


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

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch leaves it untyped
        return f"Ghost(shape={tuple(self.shape)}, dtype={self.dtype})"

    def outline(self) -> torch.Tensor:
        """The same shape on the `meta` device, where views and fresh tensors can be worked out."""
        reach = self.storage_offset() + 1 + sum((n - 1) * s for n, s in zip(self.size(), self.stride(), strict=True))
        whole = torch.empty(max(reach, 0), dtype=self.dtype, device="meta")
        return whole.as_strided(self.size(), self.stride(), self.storage_offset())

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch's own docs do

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func.is_view:
            outlines = [t.outline() if isinstance(t, Ghost) else t for t in args]
            return pytree.tree_map_only(
                torch.Tensor, lambda t: cls(Shape.of(t, args[0].device)), func(*outlines, **(kwargs or {}))
            )
        if func in METADATA_ONLY:
            source = args[0]
            options = {"device": source.device, **{k: v for k, v in (kwargs or {}).items() if v is not None}}
            return func(source.outline(), *args[1:], **options)
        raise GhostRead(f"{func} read a value that the plan says nobody reads in replay")
