"""Eight bytes that depend on all bits of a tensor, to compare a value that was made again with the original.

Idea: torch has no hash that depends on positions and needs no copy. So the tensor's memory is laid out as a grid with
rows of odd length. The grid is summed along each direction (numbers narrower than 64 bits are combined by
`torch.hash_tensor` instead). The sums are mixed, each is multiplied by a weight of its own, and all are summed once
more. If something moves inside the tensor, a row or a column changes. Because the rows are odd, a change that is the
same everywhere (another constant, a flipped sign) does not cancel itself.

Invariant: nothing is allocated but two vectors of about the square root of the tensor's size, and on the host nothing
by torch's allocator. So the first replay, which compares values by checksum, takes no more than a plan says there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from tightfit.accelerator import is_host
from tightfit.step.geometry import is_dense
from tightfit.step.modes import modes_off

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WORD_BYTES = 8
_WEIGHT = -0x61C8864680B583EB  # 2**64 over the golden ratio: its multiples are spread over all the bits
_SHIFT = 31  # brings a word's sign, which a product keeps in the highest bit, down among the others


def checksum(tensor: torch.Tensor) -> torch.Tensor | int | None:
    """A mark that depends on every bit of `tensor` and on its place: a number on the host; elsewhere a tensor of one,
    so that nobody waits for the device. None for a kind of tensor whose bits cannot be read, as on `meta` and in fake
    tensors."""
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        return None
    with modes_off(), torch.no_grad():
        try:
            return _mark(_parts(_bits(tensor)))
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError):
            return None


def differs(tensor: torch.Tensor, mark: torch.Tensor | int) -> bool:
    """Does `tensor` differ from the one that `mark` was made of?"""
    found = checksum(tensor)
    with modes_off():
        return found is not None and bool(found != mark)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as whole numbers, with each element once. A dimension that only repeats is taken once."""
    tensor = tensor.detach()
    if tensor.is_conj():
        tensor = tensor.conj()
    if tensor.is_neg():
        tensor = torch._neg_view(tensor)
    if tensor.dtype is torch.complex128:
        tensor = torch.view_as_real(tensor)
    bits = tensor.view(_INTEGERS[tensor.element_size()])
    for dim in reversed(range(bits.dim())):
        if bits.stride(dim) == 0:
            bits = bits.select(dim, 0)
    return bits


@dataclass(frozen=True, slots=True)
class _Part:
    """Whole numbers that go into a mark: themselves, or a sum over all of `over`."""

    bits: torch.Tensor
    over: tuple[int, ...] = ()

    @property
    def words(self) -> int:
        return math.prod(n for dim, n in enumerate(self.bits.shape) if dim not in self.over)

    def put(self, out: torch.Tensor) -> None:
        if not self.over:
            out.copy_(self.bits.reshape(-1))
        elif self.bits.dtype is torch.int64:
            torch.sum(self.bits, self.over, out=out)
        else:  # a sum of anything narrower would be preceded by a copy in 64 bits
            torch.ops.aten.hash_tensor.out(self.bits, self.over, out=out.view(torch.uint64))


def _parts(bits: torch.Tensor) -> list[_Part]:
    if not is_dense(bits):
        odd = bits[tuple(slice(0, n - 1 + n % 2) for n in bits.shape)]
        return [*_marginals(bits), *_marginals(odd)]
    flat = bits.as_strided((bits.numel(),), (1,))
    each = _WORD_BYTES // bits.element_size()
    rest = []
    if each > 1 and flat.storage_offset() % each == 0:
        whole = flat.numel() // each * each
        rest.append(_Part(flat[whole:]))
        flat = flat[:whole].view(torch.int64)
    length = math.isqrt(flat.numel()) | 1
    rows = flat.numel() // length
    rest.append(_Part(flat[rows * length :]))
    grid = flat[: rows * length].view(rows, length)
    return [*(_marginals(grid) if rows else ()), *rest]


def _marginals(bits: torch.Tensor) -> list[_Part]:
    """For each dimension, one number for each index along it: the sum over everything that has this index."""
    dims = range(bits.dim())
    if bits.dim() < 2:
        return [_Part(bits)]
    return [_Part(bits, tuple(d for d in dims if d != dim)) for dim in dims]


def _mark(parts: list[_Part]) -> torch.Tensor | int:
    count = sum(part.words for part in parts)
    words, weights = (_room(count, parts[0].bits.device) for _ in range(2))
    start = 0
    for part in parts:
        part.put(words[start : start + part.words])
        start += part.words
    torch.bitwise_right_shift(words, _SHIFT, out=weights)
    words ^= weights
    torch.arange(1, count + 1, out=weights)
    weights *= _WEIGHT
    words *= weights.bitwise_or_(1)
    return int(words.numpy().sum()) if is_host(words.device) else words.sum()


def _room(count: int, device: torch.device) -> torch.Tensor:
    """For `count` words. On the host they are NumPy's, which torch's allocator does not count."""
    if is_host(device):
        return torch.from_numpy(np.empty(count, dtype=np.int64))
    return torch.empty(count, dtype=torch.int64, device=device)
