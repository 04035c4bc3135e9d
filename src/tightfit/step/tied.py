"""The gradients of tied weights, before autograd adds them up.

Idea: a weight that several modules hold gets a gradient from each of them. Autograd adds the second to the first in
place, unless something else holds the first one's storage. A linear layer's is a view of a matrix product, and a view
holds its base, so a tied embedding's gradient is there three times while it is summed: twice, and once more as the sum.
A hook on the node that makes such a gradient sees it before autograd keeps it, and may give the same numbers without a
base in its place.

Invariant: nothing is computed here, and nobody else holds the gradient that is given another place. That is so of a
matrix product's own: the node that turns it round made this view for the weight alone. Any other node may give one
tensor to two weights, as an addition does. Autograd then copies for the second, because both hold one tensor; of two
tensors with one storage it would take each, and a write to one weight's gradient would be one to the other's.
Not seen: a weight that a module reads which does not hold it, and a view that somebody keeps by a hook on its node.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tightfit.step.weights import nodes_between

__all__ = ["tied_gradients", "without_base"]

#: What is told of a gradient, and may give another in its place.
Told = Callable[[torch.Tensor], "torch.Tensor | None"]


def without_base(gradient: torch.Tensor) -> torch.Tensor | None:
    """The same numbers in the same storage, and no view. None: it is no view, or is to be differentiated."""
    return gradient.detach() if gradient._is_view() and not torch.is_grad_enabled() else None


@contextlib.contextmanager
def tied_gradients(model: nn.Module, told: Told) -> Iterator[None]:
    """Meanwhile `told` is called with each gradient that a module makes of a trained weight which others hold too."""
    counts = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    tied = frozenset(each for each, holders in counts.items() if holders > 1)
    with contextlib.ExitStack() as hooks:
        for module in model.modules():
            own = [p for p in module._parameters.values() if p is not None]
            if any(id(p) in tied and p.requires_grad and p.is_leaf for p in own):
                hooks.callback(module.register_forward_hook(_Called(told, tied), with_kwargs=True).remove)
        yield


#: The nodes of matrix products, and the one that turns round what they make of a weight that was turned round.
_PRODUCTS, _TURNED = frozenset({"MmBackward0", "AddmmBackward0"}), "TBackward0"


class _Called:
    """A module has run: watch the nodes of its call that end in a weight of its own that is among `tied`."""

    def __init__(self, told: Told, tied: frozenset[int]) -> None:
        self.told, self.tied = told, tied

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        own = self.tied.intersection(map(id, module._parameters.values()))
        makers: dict[Any, list[str]] = defaultdict(list)  # of what comes to a node
        for node in nodes_between((args, kwargs), out):
            for after, _ in node.next_functions:
                makers[after].append(node.name())
        for node, names in makers.items():
            if node is None or node.name() != _TURNED or not _PRODUCTS.issuperset(names):
                continue
            ((after, _),) = node.next_functions
            if id(getattr(after, "variable", None)) in own:
                node.register_hook(functools.partial(_made, self.told))

    def __reduce__(self) -> tuple[Any, ...]:
        """In a copy of the model, a pickled one too: a hook that does nothing, and needs no tightfit to be loaded."""
        return getattr, (contextlib.nullcontext(), "__exit__")


def _made(told: Told, gradients: tuple[Any, ...], _: Any) -> tuple[Any, ...] | None:
    (gradient,) = gradients
    other = None if gradient is None else told(gradient)
    return None if other is None else (other,)
