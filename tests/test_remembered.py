"""What an op on fake tensors gave once is given again for arguments that are alike, and only then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tightfit.trace.remembered import Remembered

aten = torch.ops.aten


class Counting(TorchDispatchMode):
    """Counts what reaches the fake mode, which is below it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func] += func.namespace == "aten"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def counted() -> Iterator[Counting]:
    with FakeTensorMode(), Counting() as counting:
        yield counting


def outline(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@pytest.mark.parametrize(
    ("op", "made"),
    [
        (aten.mm.default, lambda n: ((torch.randn(n, 4), torch.randn(4, 3).t().contiguous().t()), {})),
        (aten.mul.Tensor, lambda n: ((torch.randn(n, 4).t(), 2.0), {})),
        (aten.cat.default, lambda n: (([torch.randn(n, 2), torch.randn(n, 3)], 1), {})),
        (aten.nll_loss_forward.default, lambda n: ((torch.randn(n, 9), torch.zeros(n).long(), None, 0, -100), {})),
        (aten._to_copy.default, lambda n: ((torch.randn(n, 4),), {"dtype": torch.bfloat16})),
    ],
    ids=lambda each: str(each).removeprefix("aten.") if "aten" in str(each) else "",
)
def test_new_tensors_are_made_anew_without_asking_again(counted: Counting, op: Any, made: Any) -> None:
    remembered = Remembered()
    seen: set[int] = set()
    for rows in (5, 5, 6, 5, 6):
        args, kwargs = made(rows)
        plain = op(*args, **kwargs)
        before = counted.calls[op]
        found = remembered.result(op, args, kwargs)
        assert counted.calls[op] - before == (rows not in seen)
        seen.add(rows)
        pair = (found,) if isinstance(found, torch.Tensor) else found
        others = (plain,) if isinstance(plain, torch.Tensor) else plain
        assert [outline(each) for each in pair] == [outline(each) for each in others]
        given = {address(each) for each in args if isinstance(each, torch.Tensor)}
        assert given.isdisjoint(map(address, pair)) and len(set(map(address, pair))) == len(pair)
        assert type(pair[0]) is type(others[0]) and pair[0].fake_mode is others[0].fake_mode  # type: ignore[attr-defined]


def test_views_lie_in_what_they_are_views_of(counted: Counting) -> None:
    remembered = Remembered()
    base = torch.randn(6, 8)
    for turn, (start, at) in enumerate(((1, 0), (1, 0), (1, 2), (1, 2))):
        given = base[at : at + 4]
        args = (given, 0, start, start + 2)
        before = counted.calls[aten.slice.Tensor]
        found = remembered.result(aten.slice.Tensor, args, {})
        assert counted.calls[aten.slice.Tensor] - before == (turn % 2 == 0)
        assert address(found) == address(base) and outline(found) == outline(given[start : start + 2])
        assert found.storage_offset() == (at + start) * 8


def test_what_is_written_to_is_given_back(counted: Counting) -> None:
    remembered = Remembered()
    for turn in range(2):
        target, out = torch.randn(3, 3), torch.empty(3, 3)
        before = counted.calls.total()
        assert remembered.result(aten.add_.Tensor, (target, 1), {}) is target
        assert remembered.result(aten.mm.out, (target, target), {"out": out}) is out
        assert counted.calls.total() - before == (0 if turn else 2)


def test_numbers_are_told_apart_by_their_kind(counted: Counting) -> None:
    remembered = Remembered()
    whole = torch.ones(3, dtype=torch.long)
    assert remembered.result(aten.mul.Tensor, (whole, 1), {}).dtype is torch.int64
    assert remembered.result(aten.mul.Tensor, (whole, 1.0), {}).dtype is torch.float32
    assert remembered.result(aten.mul.Tensor, (whole, 1), {}).dtype is torch.int64


def test_values_lists_and_shapes_in_place_are_asked_for_each_time(counted: Counting) -> None:
    remembered = Remembered()
    for _ in range(2):
        given = torch.randn(4, 6)
        before = counted.calls.total()
        assert len(remembered.result(aten.split.Tensor, (given, 2), {})) == 2
        remembered.result(aten.unsqueeze_.default, (given, 0), {})
        assert given.shape == (1, 4, 6)
        with pytest.raises(Exception, match="nonzero"):
            remembered.result(aten.nonzero.default, (given,), {})
        assert counted.calls.total() - before == 3
