"""A batch cut by rows, and what a loss is a mean of.

Idea: a micro-batch is some rows of a batch. A tensor whose first dimension counts the rows is cut; what has one row, or
no dimension, or is no tensor, belongs to every part. The loss of the whole is a weighted sum of the losses of the
parts. The weights depend on what the loss divides by: nothing (`SUM`), the rows (`ROWS`), the labels that count
(`LABELS`), or those of them that follow a token (`NEXT_LABELS`, for losses that shift).

Invariant: no row is lost and none is in two parts. Refused: a batch in which tensors disagree about the number of rows
(`Unsupported`).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tightfit.core import Unsupported
from tightfit.step.run import tensors_in

__all__ = ["Divisor", "row_count", "rows_taken", "weights_of"]

_IGNORED = -100  # the label of a token that is not learnt


class Divisor(enum.Enum):
    """What a loss divides its sum by."""

    SUM = "nothing: it is a sum"
    ROWS = "the rows of the batch"
    NEXT_LABELS = "the labels that count, without the first of each row"
    LABELS = "the labels that count"


def row_count(batch: Any) -> int:
    """Raises `Unsupported` where the rows of `batch` cannot be told."""
    named = _named(batch)
    sizes = {int(tensor.shape[0]) for _, tensor in named if tensor.dim()}
    many = sizes - {1}
    if len(many) > 1:
        shown = ", ".join(f"{name} {tuple(t.shape)}" for name, t in named if t.dim() and t.shape[0] != 1)
        raise Unsupported(f"the batch cannot be cut by rows: its tensors disagree about how many there are ({shown})")
    if not sizes:
        raise Unsupported("the batch cannot be cut by rows: it has no tensor with a dimension")
    return many.pop() if many else 1


def _named(batch: Any) -> list[tuple[str, torch.Tensor]]:
    if isinstance(batch, Mapping):
        return [(str(key), tensor) for key, value in batch.items() for tensor in tensors_in(value)]
    return [(f"tensor {place}", tensor) for place, tensor in enumerate(tensors_in(batch))]


def rows_taken(batch: Any, rows: Sequence[int] | slice) -> Any:
    """Some rows of `batch`. A slice gives views."""
    count = row_count(batch)
    if count == 1:
        return batch

    def taken(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.dim() or leaf.shape[0] != count:
            return leaf
        return leaf[rows if isinstance(rows, slice) else torch.tensor(list(rows), device=leaf.device)]

    plain = {key: batch[key] for key in batch} if isinstance(batch, Mapping) else batch
    return pytree.tree_map(taken, plain)


def _labels(batch: Any, skip: int) -> int | None:
    """How many labels of `batch` count; none: it has no labels of classes."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or not labels.dim():
        return None
    if skip and labels.dim() < 2:
        return None
    return int((labels[..., skip:] != _IGNORED).sum())


def weights_of(divisor: Divisor, parts: Sequence[Any], rows: Sequence[int]) -> tuple[float, ...] | None:
    """By what the loss of each part is multiplied, so that the sum is the loss of the whole. None: `divisor` cannot be
    what the loss divides by. `rows`: of each part."""
    if divisor is Divisor.SUM:
        return (1.0,) * len(parts)
    counts: list[int | None] = list(rows)
    if divisor is not Divisor.ROWS:
        counts = [_labels(part, int(divisor is Divisor.NEXT_LABELS)) for part in parts]
    known = [count for count in counts if count is not None]
    whole = sum(known)
    return tuple(count / whole for count in known) if len(known) == len(counts) and whole else None
