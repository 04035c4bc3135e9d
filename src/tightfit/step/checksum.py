"""Eight bytes that depend on all bits of a tensor, to compare a value that was made again with the original.

Idea: torch has no hash that depends on positions and needs no copy. So the tensor's memory is laid out as a grid with
rows of odd length. The grid is summed along each direction (numbers narrower than 64 bits are combined by
`torch.hash_tensor` instead). The sums are mixed, each is multiplied by a weight of its own, and all are summed once
more. If something moves inside the tensor, a row or a column changes. Because the rows are odd, a change that is the
same everywhere (another constant, a flipped sign) does not cancel itself.

Invariant: nothing is allocated but a few vectors of about the square root of the tensor's size.
"""

from __future__ import annotations

import math

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from tightfit.step.geometry import is_dense

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WORD_BYTES = 8
_WEIGHT = -0x61C8864680B583EB  # 2**64 over the golden ratio: its multiples are spread over all the bits
_SHIFT = 31  # brings a word's sign, which a product keeps in the highest bit, down among the others


def checksum(tensor: torch.Tensor) -> torch.Tensor | None:
    """A mark that depends on every bit of `tensor` and on its place. None for a kind of tensor whose bits cannot be
    read, as on `meta` and in fake tensors."""
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        return None
    with _disable_current_modes(), torch.no_grad():
        try:
            return _mark(_sums(_bits(tensor)))
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError):
            return None


def differs(tensor: torch.Tensor, mark: torch.Tensor) -> bool:
    """Does `tensor` differ from the one that `mark` was made of?"""
    found = checksum(tensor)
    with _disable_current_modes():
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


def _sums(bits: torch.Tensor) -> list[torch.Tensor]:
    if not is_dense(bits):
        odd = bits[tuple(slice(0, n - 1 + n % 2) for n in bits.shape)]
        return [*_marginals(bits), *_marginals(odd)]
    flat = bits.as_strided((bits.numel(),), (1,))
    each = _WORD_BYTES // bits.element_size()
    rest = []
    if each > 1 and flat.storage_offset() % each == 0:
        whole = flat.numel() // each * each
        rest.append(flat[whole:])
        flat = flat[:whole].view(torch.int64)
    length = math.isqrt(flat.numel()) | 1
    rows = flat.numel() // length
    rest.append(flat[rows * length :])
    grid = flat[: rows * length].view(rows, length)
    return [*(_marginals(grid) if rows else ()), *rest]


def _marginals(bits: torch.Tensor) -> list[torch.Tensor]:
    """For each dimension, one number for each index along it: the sum over everything that has this index."""
    dims = range(bits.dim())
    if bits.dim() < 2:
        return [bits.reshape(-1)]
    others = [[d for d in dims if d != dim] for dim in dims]
    if bits.dtype is torch.int64:
        return [bits.sum(each) for each in others]
    # a sum of anything narrower would be preceded by a copy in 64 bits
    return [torch.hash_tensor(bits, each).view(torch.int64) for each in others]


def _mark(vectors: list[torch.Tensor]) -> torch.Tensor:
    words = torch.cat([vector.to(torch.int64) for vector in vectors])
    words ^= words >> _SHIFT
    weights = torch.arange(1, words.numel() + 1, device=words.device)
    weights *= _WEIGHT
    words *= weights.bitwise_or_(1)
    return words.sum()
