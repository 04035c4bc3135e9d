"""Frozen weights that need not be on the device all the time: which a model has, and which storages stand for one.

A weight that waits in host memory is on the device as a *copy* while something reads it. Whoever would hold such a copy
from forward to backward (the tape does) holds its `Lender` instead, and asks it for another copy.

Invariant: a copy is an ordinary tensor. It goes when nobody holds it, so nothing can be written over it before.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import UninitializedParameter

from tightfit.step.modules import plain_path
from tightfit.step.run import is_elsewhere, parameter_tensors, tensors_in

__all__ = ["FrozenModule", "Lender", "frozen_modules", "lend", "lender_of", "nodes_between", "nodes_of_its_own"]

#: A smaller part of the largest is not worth a copy: of the weights of a module, and of the modules of a model.
_SMALL = 1e-3


class Lender(Protocol):
    """One weight, in host memory."""

    @property
    def version(self) -> Any:
        """Another one whenever the weight was changed."""

    def copy(self, version: Any) -> torch.Tensor:
        """A copy on the device, which lies as the weight does. Raises `RuntimeError` for another version."""


_lent: dict[int, tuple[weakref.ref[Any], Lender]] = {}  # by address of the copy's storage


def lend(copy: torch.Tensor, lender: Lender) -> None:
    """Let it be known that `copy` is one of `lender`'s."""
    storage = copy.untyped_storage()
    address = storage._cdata

    def gone(reference: Any) -> None:
        if address in _lent and _lent[address][0] is reference:
            del _lent[address]

    _lent[address] = weakref.ref(storage, gone), lender


def lender_of(tensor: torch.Tensor) -> Lender | None:
    """Whose copy `tensor` lies in. None: it is no copy of a weight."""
    if not _lent or tensor.layout is not torch.strided:
        return None
    try:
        storage = tensor.untyped_storage()
    except NotImplementedError:  # a subclass without a storage
        return None
    known = _lent.get(storage._cdata)
    return known[1] if known is not None and known[0]() is storage else None


@dataclass(frozen=True)
class FrozenModule:
    """A module with weights of its own that are frozen, and that no other module holds."""

    path: str
    module: nn.Module
    shared: frozenset[int]  # storages that several modules hold, by address

    def tensors(self) -> list[torch.Tensor]:
        """Its frozen weights as they are now, each on a storage of its own, and the scales of those in 4 bits."""
        found: list[torch.Tensor] = []
        for parameter in self.module._parameters.values():
            if parameter is not None and _is_plain(parameter) and not parameter.requires_grad:
                found += [parameter, *parameter_tensors(parameter)[1:]]
        found = [t for t in found if _fills_its_storage(t) and _address(t) not in self.shared]
        largest = max((_bytes(t) for t in found), default=0)
        return [t for t in found if _bytes(t) > _SMALL * largest]

    @property
    def is_quantised(self) -> bool:
        return any(getattr(p, "quant_state", None) is not None for p in self.module._parameters.values())

    @property
    def size_bytes(self) -> int:
        return sum(_bytes(tensor) for tensor in self.tensors())


def frozen_modules(model: nn.Module) -> list[FrozenModule]:
    """The modules of `model` with frozen weights of their own, but for those with very small ones."""
    holders: Counter[int] = Counter()
    for module in model.modules():
        own = [p for p in module._parameters.values() if p is not None and p.layout is torch.strided]
        held = [t for p in own if not isinstance(p, UninitializedParameter) for t in parameter_tensors(p)]
        held += [b for b in module._buffers.values() if b is not None and b.layout is torch.strided]
        # a parameter that a module has under two names is tied as well
        holders.update([_address(t) for t in held])
    shared = frozenset(address for address, count in holders.items() if count > 1)
    found = [FrozenModule(plain_path(path), module, shared) for path, module in model.named_modules()]
    sizes = {each.path: each.size_bytes for each in found}
    largest = max(sizes.values(), default=0)
    return [each for each in found if sizes[each.path] > _SMALL * largest]


def nodes_of_its_own(out: Any, given: Any) -> list[Any]:
    """The backward nodes in Python (`torch.autograd.Function`) behind `out`, as far as they were made of `given`. They
    may hold weights where no hook for saved tensors sees them: bitsandbytes keeps a 4-bit weight on its `ctx`."""
    return [node for node in nodes_between(given, out) if isinstance(node, torch.autograd.function.BackwardCFunction)]


def nodes_between(given: Any, out: Any) -> Iterator[Any]:
    """The backward nodes that a call made which was given `given` and gave `out`."""
    before: set[Any] = {t.grad_fn for t in tensors_in(given) if t.grad_fn is not None}
    oldest = max((node._sequence_nr() for node in before), default=-1)
    seen = set(before)
    pending: list[Any] = [t.grad_fn for t in tensors_in(out) if t.grad_fn is not None]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node._sequence_nr() <= oldest:  # made before this call
            continue
        yield node
        pending += [following for following, _ in node.next_functions]


def _is_plain(parameter: torch.Tensor) -> bool:
    """Is it a tensor of torch's own, or a weight of bitsandbytes in 4 bits?"""
    kind = type(parameter)
    plain = kind is nn.Parameter or isinstance(parameter, FakeTensor) or getattr(parameter, "quant_state", None)
    return bool(plain) and parameter.layout is torch.strided


def _fills_its_storage(tensor: torch.Tensor) -> bool:
    """Is it all there is on its storage? Host memory is cut into rooms."""
    return _bytes(tensor) == tensor.untyped_storage().nbytes() > 0 or is_elsewhere(tensor)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
