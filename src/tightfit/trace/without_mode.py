"""What a recording sees otherwise than a step does, since it is made under a dispatch mode, put right.

Invariant: ops keep their order; only when values are made and freed is corrected.
"""

from __future__ import annotations

import re
from typing import Any

from tightfit.core import EventKind
from tightfit.trace.profiler import ENGINE, risen_bytes, run_by
from tightfit.trace.recorder import Call, Recorder

__all__ = ["as_without_mode", "scratch_from"]


def scratch_from(full: Recorder, profiler: Any) -> None:
    """Take two things from a profile of the pass: each op's scratch bytes, and what would be added in place."""
    calls = full.dispatched
    risen = risen_bytes(profiler, len(calls))
    as_without_mode(full, run_by(profiler, len(calls)), on_host=True)
    for call, rise in zip(calls, risen, strict=True):
        call.scratch_bytes = max(0, rise - call.out_bytes)


#: What backward adds to zeros of its own, into a new tensor under a dispatch mode and in place without one.
_INTO_ZEROS = (
    "aten.index_add.default", "aten.index_put.default", "aten.masked_scatter.default", "aten.put.default",
    "aten.scatter.src", "aten.scatter_add.default",
)  # fmt: skip
_ZEROS = ("aten.new_zeros.default", "aten.zeros.default", "aten.zeros_like.default")
#: A node that is torch's own; those of custom functions have no number.
_TORCHS_NODE = re.compile(r"Backward\d+$")


#: What gives its gradient to all the places of an extreme value evenly.
_EVENLY = re.compile(r"(Max|Min|Median|Nanmedian)Backward\d+$")


def as_without_mode(full: Recorder, run_by: list[str], *, on_host: bool) -> None:
    """Correct the record for what a backward does otherwise where no dispatch mode is on.

    `run_by`: the node of autograd that ran each call.
    """
    _add_in_place(full, run_by)
    if on_host:
        _fill_evenly(full, run_by)


def _fill_evenly(full: Recorder, run_by: list[str]) -> None:
    """Correct the record for the gradient of an extreme value of a whole tensor, on the host.

    There torch makes one mask of the places that share the value and the gradient's zeros, counts the places, and fills
    the zeros in. Under a dispatch mode, and on a card, it makes more masks, and the gradient after the count
    (`evenly_distribute_backward` in FunctionsManual.cpp). So the gradient is recorded as made before the count, and the
    masks that it does not read as freed there.
    """
    before: list[Call] = []  # calls of one such node, up to its count
    for call, node in zip(full.dispatched, run_by, strict=True):
        counted = bool(before) and before[-1].name == "aten.sum.default"
        if not _EVENLY.search(node):
            before = []
        elif not counted:
            before.append(call)
        elif call.name == "aten.mul.Tensor" and len(call.fresh) == 1:
            used = {value for value, _ in call.reads}
            spent = [(EventKind.FREE, v) for each in before[:-1] for v in each.fresh if v not in used]
            moved = [event for event in spent if event in full.events] + [(EventKind.ALLOC, call.fresh[0])]
            full.events = [event for event in full.events if event not in moved]
            at = full.events.index((EventKind.ALLOC, before[-1].fresh[0]))
            full.events[at:at] = moved
            before = []


def _is_in_place(full: Recorder, call: Call, node: str) -> bool:
    """Is the result of `call`, which `node` ran, its first argument where no dispatch mode is on?"""
    if call.name == "aten.add.Tensor":
        return node == ENGINE and not call.adds_to_view
    # the mean of scattered values counts them into a new tensor in either case
    if call.name not in _INTO_ZEROS or not _TORCHS_NODE.search(node) or node.startswith("ScatterReduce"):
        return False
    made_by = full.storages[call.reads[0][0]].producer
    return made_by is not None and full.calls[made_by].name in _ZEROS


def _add_in_place(full: Recorder, run_by: list[str]) -> None:
    """Correct the record for what a backward adds in place, where nobody else holds the first addend: gradients that
    the engine sums, and zeros into which the gradient of an indexed read is put.

    Under a dispatch mode neither is done in place (`isTensorSubclassLike` in torch/csrc/autograd/input_buffer.cpp and
    FunctionsManual.cpp). Where the first addend dies at the sum, its bytes become the sum's, so it is recorded as
    freed before the sum is made and not after. A view holds its base (the gradient of a linear layer's weight is one),
    so nothing is summed into it.
    """
    position = {subject: i for i, (what, subject) in enumerate(full.events) if what is EventKind.OP}
    for call, node in zip(full.dispatched, run_by, strict=True):
        in_place = _is_in_place(full, call, node)
        call.sums_tied = call.sums_tied and node == ENGINE
        if len(call.fresh) != 1 or not call.reads or not (in_place or call.sums_tied):
            continue
        old, new = call.reads[0][0], call.fresh[0]
        at = position[call.id]
        until = next((i for i in range(at + 1, len(full.events)) if full.events[i][0] is EventKind.OP), None)
        dies = next(
            (i for i in range(at + 1, until or len(full.events)) if full.events[i] == (EventKind.FREE, old)), None
        )
        if dies is None or full.storages[old].size_bytes != full.storages[new].size_bytes:
            call.sums_tied = False
            continue
        if not in_place:
            continue
        made = full.events.index((EventKind.ALLOC, new), max(0, at - 4))
        # the two moves together shift the op's own event by one place
        del full.events[dies]
        full.events.insert(made, (EventKind.FREE, old))
        position[call.id] = at + 1
