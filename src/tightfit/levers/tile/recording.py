"""What tiles need from the trace: the head whose logits feed the loss, modules that work row by row, and the step
recorded again with tiles in force.

Invariant: recorded again only where the loss, or the largest unit, is a large part of what cannot be recomputed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tightfit.core import Category, TiledModule, Tiling, Trace
from tightfit.levers.interface import RecordedStep
from tightfit.levers.tile.force import in_force
from tightfit.levers.tile.head import TileStats, refusal
from tightfit.levers.tile.modules import modules_sought


@dataclass(slots=True)
class Sought:
    """The module whose output feeds the step's cross entropy."""

    path: str | None = None
    rows: int = 0  # of the logits
    row_bytes: int = 0  # of a row of them
    reason: str = ""  # why there is none that can be tiled; empty also where there is no cross entropy at all


#: How far from the loss a head is looked for, in autograd nodes.
_NEAR = 32


@contextlib.contextmanager
def head_sought(model: nn.Module, units: Sequence[str]) -> Iterator[Sought]:
    """While a forward runs inside, find the module outside the `units` that makes the logits of its cross entropy."""
    found = Sought()
    outside = {
        id(module): path
        for path, module in model.named_modules()
        if path and not any(path == unit or unit == "" or path.startswith(unit + ".") for unit in units)
        and not any(unit.startswith(path + ".") for unit in units)
    }  # fmt: skip
    made: dict[Any, tuple[str, nn.Module, int, torch.Size]] = {}
    heads: set[str] = set()

    def seen(module: nn.Module, args: Any, output: Any) -> None:
        path = outside.get(id(module))
        if path is None or not isinstance(output, torch.Tensor) or output.grad_fn is None:
            return
        given = [a for a in args if isinstance(a, torch.Tensor)]
        if len(args) == 1 and len(given) == 1 and given[0].shape[:-1] == output.shape[:-1] and output.dim() > 1:
            # the innermost module that made it comes first
            made.setdefault(output.grad_fn, (path, module, given[0].shape[-1], output.shape))

    def cross_entropy(input: Any, target: Any) -> None:
        node, best = getattr(input, "grad_fn", None), None
        for _ in range(_NEAR):
            if node is None:
                break
            if node in made:
                best = made[node]
                if best[2] != best[3][-1]:  # a module that keeps the width (a soft cap) is no head
                    break
            following = [each for each, _ in node.next_functions if each is not None]
            node = following[0] if len(following) == 1 else None
        if best is None or best[2] == best[3][-1]:
            found.reason = "no module outside the units makes the logits of the loss"
        elif refused := refusal(best[1]):
            found.reason = f"{best[0]} cannot be tiled: {refused}"
        elif input.dim() == 2 and not target.is_floating_point():
            heads.add(best[0])
            found.path, found.rows = best[0], found.rows + best[3][:-1].numel()
            found.row_bytes = best[3][-1] * input.element_size()
            if len(heads) > 1:
                found.path, found.reason = None, f"several heads feed the loss: {', '.join(sorted(heads))}"

    class Mode(TorchFunctionMode):
        """Sees cross entropy by whatever name it was imported."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if getattr(func, "__name__", "") == "cross_entropy":
                given = dict(zip(("input", "target"), args, strict=False)) | kwargs
                if isinstance(given.get("input"), torch.Tensor) and isinstance(given.get("target"), torch.Tensor):
                    cross_entropy(given["input"], given["target"])
            return func(*args, **kwargs)

    handle = nn.modules.module.register_module_forward_hook(seen)
    try:
        with Mode():
            yield found
    finally:
        handle.remove()
        made.clear()


#: A tile of logits: at most this, but no more than 64 tiles and no fewer than 8.
_TILE_BYTES = 1 << 25


def rows_of_tile(rows: int, row_bytes: int) -> int:
    """How many of `rows` rows of logits of `row_bytes` are made at once."""
    return max(1, -(-rows // 64), min(-(-rows // 8), _TILE_BYTES // max(1, row_bytes)))


@contextlib.contextmanager
def watching(model: nn.Module, units: list[str], is_fake: bool) -> Iterator[tuple[Sought, list[TiledModule]]]:
    """While a forward runs inside, find what of the step could be tiled: its head, and modules of its units."""
    with head_sought(model, units) as sought, modules_sought(model, units, is_fake) as token_wise:
        yield sought, token_wise


#: A loss that is less than this part of the peak is not worth tiles.
_WORTH = 0.10


def with_tiled(step: RecordedStep, recorded: Trace, sought: Sought, token_wise: Sequence[TiledModule]) -> Trace:
    """`recorded` with the step recorded again with tiles in force, where these can matter; and why not, where they
    cannot."""
    line = step.unplanned(recorded)
    loss_bytes = max(line.by_category[Category.LOSS.value], default=0)
    # about what is left when every unit is recomputed
    floor_bytes = line.peak_bytes - max(line.by_category[Category.SAVED.value], default=0)
    found: list[Trace] = []
    reasons: tuple[str, ...] = ()
    head = Tiling()
    if loss_bytes >= _WORTH * max(1, floor_bytes):
        if sought.path is not None:
            tiling = _of_head(sought)
            variant, asked_by = _tiled(step, tiling)
            if variant is None:
                reasons = (f"the head and the loss cannot be tiled: the logits are asked for whole, by {asked_by}",)
            else:
                head = tiling
                found.append(variant)
        elif sought.reason:
            reasons = (f"the head and the loss cannot be tiled: {sought.reason}",)
    if token_wise and _unit_owns_peak(step, found[-1] if found else recorded):
        variant, _ = _tiled(step, dataclasses.replace(head, modules=tuple(token_wise)))
        if variant is not None:
            found.append(variant)
    return dataclasses.replace(recorded, tiled=tuple(found), notes=(*recorded.notes, *reasons))


def all_tiled(step: RecordedStep, sought: Sought, token_wise: Sequence[TiledModule]) -> Trace | None:
    """The step with its head and its modules in tiles, as far as they can be; None where neither can."""
    head, modules = _of_head(sought), Tiling(modules=tuple(token_wise))
    for tiling in dict.fromkeys((dataclasses.replace(head, modules=modules.modules), head, modules)):
        if tiling != Tiling() and (variant := _tiled(step, tiling)[0]) is not None:
            return variant
    return None


def _of_head(sought: Sought) -> Tiling:
    """The head alone in tiles; nothing where there is none that can be."""
    return (
        Tiling() if sought.path is None else Tiling(head=sought.path, rows=rows_of_tile(sought.rows, sought.row_bytes))
    )


def _tiled(step: RecordedStep, tiling: Tiling) -> tuple[Trace | None, str]:
    """The trace with `tiling` in force; None where the logits are made whole all the same, and by whom."""
    stats = TileStats()

    def is_whole() -> bool:
        return tiling.head is not None and bool(stats.whole or not stats.losses)

    variant = step.again(in_force(step.model, tiling, stats, list(step.modules)), is_whole)
    if variant is None:
        return None, stats.asked_by or "what is no cross entropy of class indices"
    return dataclasses.replace(variant, tiling=tiling), ""


def _unit_owns_peak(step: RecordedStep, recorded: Trace) -> bool:
    """With every unit recomputed, is it one of them that needs the most?"""
    line = step.every_block(dataclasses.replace(recorded, tiled=()))
    paths = {unit.path for unit in recorded.units if not unit.pinned}
    return any(f" of {path}:" in line.peak_owner for path in paths)
