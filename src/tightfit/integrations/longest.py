"""The longest batch that a data loader can give, as far as it can be seen before the training.

A plan serves every batch that is no longer than the one it was made for, so the longest should come first. Examples are
measured by what the loader's own collator makes of each alone (a DPO example is a prompt with two answers, cut to a
length), and the longest of them are collated.

Invariant: nothing is taken from the loader; the random states are those from before. Refused: a data set that can be
read only once, an empty one.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tightfit.core import InvalidInput, Unsupported
from tightfit.step.run import tensors_in
from tightfit.step.snapshot import random_states, restore_random_states

__all__ = ["Extent", "longest_batch", "plain", "telling_examples"]

_LOOK_SECONDS = 3.0  # how long to look through a data set for its longest examples
_STREAM_EXAMPLES = 256  # how far to look into a stream
_IGNORED = -100  # the label of a token that is not learnt


def plain(batch: Any) -> Any:
    """`batch` with dicts for mappings of its own kind: in a tokenizer's `BatchEncoding` torch sees no tensors."""
    if isinstance(batch, Mapping) or hasattr(batch, "keys"):
        return {key: plain(batch[key]) for key in batch}
    return [plain(item) for item in batch] if isinstance(batch, list) else batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """What makes a batch long, told by shapes alone: its elements, its longest dimension but the first, its rows."""

    elements: int = 0
    length: int = 0
    rows: int = 0

    @classmethod
    def of(cls, batch: Any) -> Extent:
        """The extent of one batch, a tree of tensors."""
        tensors = [t for t in tensors_in(plain(batch)) if t.dim()]
        return cls(
            elements=max((t.numel() for t in tensors), default=0),
            length=max((max(t.shape[1:], default=0) for t in tensors), default=0),
            rows=max((t.shape[0] for t in tensors if t.dim() > 1), default=0),
        )

    def exceeds(self, other: Extent) -> bool:
        """Has this batch more of anything than `other`?"""
        return self.elements > other.elements or self.length > other.length or self.rows > other.rows

    def joined(self, other: Extent) -> Extent:
        """The least that neither exceeds."""
        return Extent(
            elements=max(self.elements, other.elements),
            length=max(self.length, other.length),
            rows=max(self.rows, other.rows),
        )


def longest_batch(loader: Any, size: int) -> tuple[Any, str]:
    """What the loader's collator makes of the `size` longest examples, and what could not be seen (empty: nothing).

    When lengths differ, the shortest example takes the place of one of them if the batch gets no smaller by it: a
    padded batch also costs its mask.

    Raises `InvalidInput` for an empty data set, `Unsupported` for one that looking at would use up.
    """
    states = random_states()
    try:
        return _longest(loader, size)
    finally:
        restore_random_states(states)


def _longest(loader: Any, size: int) -> tuple[Any, str]:
    dataset, collate = loader.dataset, loader.collate_fn
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        examples = iter(dataset)
        if examples is dataset:
            raise Unsupported(
                "looking at this data set would use it up: give the longest batch as TightfitCallback(batch=...)"
            )
        seen = list(itertools.islice(examples, max(size, _STREAM_EXAMPLES)))
        if not seen:
            raise InvalidInput("the training data set is empty")
        lengths, _ = _lengths(seen, collate)
        unseen = f"the first {len(seen)} examples of a stream" if len(seen) >= _STREAM_EXAMPLES else ""
        dataset = seen
    else:
        if len(dataset) == 0:
            raise InvalidInput("the training data set is empty")
        lengths, whole = _lengths(dataset, collate)
        unseen = "" if whole else f"{len(lengths)} of {len(dataset)} examples"
    order = sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True)
    batch = collate([dataset[i] for i in order[:size]])
    if 1 < size < len(order) and lengths[order[size - 1]] == lengths[order[0]] != lengths[order[-1]]:
        padded = collate([dataset[i] for i in [*order[: size - 1], order[-1]]])
        if Extent.of(padded).elements >= Extent.of(batch).elements:
            batch = padded
    return batch, unseen


def telling_examples(dataset: Any, collate: Any) -> list[Any]:
    """A short example and two long ones, by which a mean over tokens is told from a mean over examples."""
    states = random_states()
    try:
        indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        seen = dataset if indexed else list(itertools.islice(iter(dataset), _STREAM_EXAMPLES))
        lengths, _ = _lengths(seen, collate)
    finally:
        restore_random_states(states)
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    if len(order) < 2:
        raise InvalidInput("one example alone cannot be cut into micro-batches")
    middle = order[len(order) // 2]  # the very shortest may have no token that is learnt
    return [seen[index] for index in (middle, *[i for i in reversed(order) if i != middle][:2])]


def _lengths(dataset: Any, collate: Any) -> tuple[Sequence[tuple[int, int]], bool]:
    """Tokens and learnt labels of each example, for as many as `_LOOK_SECONDS` allow; and whether that is all."""
    end = time.monotonic() + _LOOK_SECONDS
    lengths = []
    for index in range(len(dataset)):
        lengths.append(_length(dataset[index], collate))
        if time.monotonic() > end:
            break
    return lengths, len(lengths) == len(dataset)


def _length(example: Any, collate: Any) -> tuple[int, int]:
    if isinstance(example, Mapping) and "input_ids" in example:
        labels = example.get("labels")
        if isinstance(labels, torch.Tensor):
            learnt = int((labels != _IGNORED).sum()) if labels.dim() else 0
        else:
            learnt = sum(label != _IGNORED for label in labels) if isinstance(labels, Sequence) else 0
        return len(example["input_ids"]), learnt
    return Extent.of(collate([example])).elements, 0
