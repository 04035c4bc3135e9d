"""A saved tensor as Python may hold it between forward and backward, and tensors that nobody but their owner sees move.

Invariant: what is held shares the tensor's bytes and its version counter, and leads back to no op. Refused: nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["quietly", "without_history"]


def without_history(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` for whoever packs it. An op that saves its own result (`tanh`, `softmax`) would be held by that result,
    and hold it. Where no backward comes, neither would ever go, and Python's collector does not see such a circle
    (https://docs.pytorch.org/docs/stable/notes/autograd.html, hooks for saved tensors)."""
    if tensor.grad_fn is None:
        return tensor
    with _disable_current_modes():
        return tensor.detach()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """No dispatch mode sees what runs inside, no history is made, and tensors are ordinary ones."""
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        yield
