"""The mark that a value made again is compared by: it sees every bit and every place, and makes no copy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tightfit.step.checksum import checksum
from tightfit.verify.peak import PeakMeter

CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sort": lambda t: t.sort(0)[0],
    "flip": lambda t: t.flip(0),
    "flip columns": lambda t: t.flip(1),
    "roll": lambda t: t.roll(1, 0),
    "roll columns": lambda t: t.roll(1, 1),
    "transpose": lambda t: t.t().contiguous(),
    "swap": lambda t: torch.cat([t[1:2], t[:1], t[2:]]),
    "negative": lambda t: -t,
    "half of it": lambda t: torch.cat([t[:7], t[7:] * 0.5]),
    "one bit": lambda t: torch.cat([t.flatten()[:-1], t.flatten()[-1:] * (1 + 2**-7)]).view_as(t),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
@pytest.mark.parametrize("size", [14, 15, 64])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_tensor_changes_its_mark(change: str, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    first = torch.randn(size, size).to(dtype)
    if dtype.is_complex and change == "sort":
        pytest.skip("complex numbers have no order")
    other = CHANGES[change](first)
    assert not torch.equal(first, other)
    wide = [torch.randn(size, size + 3).to(dtype) for _ in range(2)]  # not dense
    for tensor, place in zip((first, other), wide, strict=True):
        place[:, 1:-2] = tensor
    assert int(checksum(first)) == int(checksum(first.clone()))
    assert int(checksum(first)) != int(checksum(other))
    assert int(checksum(first.t())) != int(checksum(other.t()))
    assert int(checksum(wide[0][:, 1:-2])) != int(checksum(wide[1][:, 1:-2]))
    assert int(checksum(first[1:])) != int(checksum(other[1:])) or torch.equal(first[1:], other[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8])
@pytest.mark.parametrize("shape", [(), (1,), (2,), (8, 8), (64, 256), (3, 4, 6)])
def test_another_constant_has_another_mark(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    marks = {int(checksum(torch.full(shape, each, dtype=dtype))) for each in range(20)}
    assert len(marks) == 20
    marks = {int(checksum(torch.full((*shape, 2), each, dtype=dtype)[..., 0])) for each in range(20)}
    assert len(marks) == 20


def test_masks_and_signs() -> None:
    torch.manual_seed(0)
    mask = torch.rand(32, 32) > 0.5
    for tensor in (mask, torch.where(mask, 1.0, -1.0), torch.where(mask, 1.0, -1.0).double()):
        others = [tensor, tensor.roll(2, 0), tensor.roll(2, 1), tensor.logical_not().to(tensor.dtype), tensor.flip(0)]
        assert len({int(checksum(each)) for each in others}) == len(others)


def test_expanded_conjugated_and_empty() -> None:
    row = torch.randn(6)
    assert int(checksum(row.expand(4, 6))) != int(checksum((row * 2).expand(4, 6)))
    number = torch.randn(4, dtype=torch.complex64)
    assert int(checksum(number.conj())) == int(checksum(number.conj()))
    assert checksum(torch.empty(0, 3)) is not None
    assert checksum(torch.eye(3).to_sparse()) is None


def test_no_copy_is_made() -> None:
    tensor = torch.randn(1 << 11, 1 << 10)
    for each in (tensor, tensor.t(), tensor[:, 3:-2], tensor.bfloat16()[1:], tensor.flatten()[1:]):
        with PeakMeter("cpu") as meter:
            checksum(each)
        assert meter.rise_bytes < 200_000
