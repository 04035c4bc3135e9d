"""A saved tensor as Python may hold it between forward and backward.

Invariant: what is held shares the tensor's bytes and its version counter, and leads back to no op. Refused: nothing.
"""

from __future__ import annotations

import torch

from tightfit.step.modes import modes_off

__all__ = ["without_history"]


def without_history(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` for whoever packs it. An op that saves its own result (`tanh`, `softmax`) would be held by that result,
    and hold it. Where no backward comes, neither would ever go, and Python's collector does not see such a circle
    (https://docs.pytorch.org/docs/stable/notes/autograd.html, hooks for saved tensors)."""
    if tensor.grad_fn is None:
        return tensor
    # the guard is one object of C++ and takes a tenth of the time, but would pass over what a subclass does, too
    with torch._C._DisableTorchDispatch() if type(tensor) is torch.Tensor else modes_off():
        return tensor.detach()
