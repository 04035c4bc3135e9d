"""How a tensor lies on its storage, so that another storage can be read as it was."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Geometry(NamedTuple):
    """How a tensor lies on its storage."""

    size: torch.Size
    stride: tuple[int, ...]
    storage_offset: int
    dtype: torch.dtype
    conjugated: bool
    negated: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Geometry:
        return cls(
            tensor.size(), tensor.stride(), int(tensor.storage_offset()), tensor.dtype, tensor.is_conj(),
            tensor.is_neg(),
        )  # fmt: skip

    def on(self, tensor: torch.Tensor) -> torch.Tensor:
        """This geometry on the storage of `tensor`."""
        if tensor.dtype != self.dtype:
            return self.on_storage(tensor.untyped_storage())
        return self._read(tensor.as_strided(self.size, self.stride, self.storage_offset))

    def on_storage(self, storage: torch.UntypedStorage) -> torch.Tensor:
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return self._read(empty.set_(storage, self.storage_offset, self.size, self.stride))

    def _read(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.conjugated:
            tensor = tensor.conj()
        return torch._neg_view(tensor) if self.negated else tensor


def is_dense(tensor: torch.Tensor) -> bool:
    """Do the elements follow each other in memory without gaps, in any order of the dimensions?"""
    dimensions = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1)
    follows = 1
    for stride, size in dimensions:
        if stride != follows:
            return False
        follows *= size
    return True


def alone(buffer: torch.Tensor) -> torch.Tensor:
    """The host memory of `buffer` as a storage of its own, so that whoever saves the tensor does not save what lies
    beside it. torch's cache of pinned memory does not know of copies out of it: they are to be waited for before
    `buffer` goes."""
    return torch.from_numpy(buffer.numpy())


def laid_out_like(tensor: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """A tensor like `tensor`, which has no gaps, on the host memory of `buffer`, as a storage of its own."""
    size_bytes = tensor.numel() * tensor.element_size()
    return alone(buffer[:size_bytes]).view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
