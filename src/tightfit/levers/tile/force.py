"""The language-model head with its loss, a tile of rows at a time: the logits never exist whole.

Idea: while tiles are in force the head returns *deferred logits*, a tensor without storage that knows the head and its
hidden states. What is done to it row by row (casts, scaling, a soft cap, the causal shift, views that keep the
vocabulary) is taken down: a row operation on the logits is the same operation on the hidden states. Cross entropy of it
then runs tile after tile: the rows' logits, their loss and at once their gradient, which goes into the hidden states'
gradient and into sums for the head's parameters. Backward only scales what is there.

Invariants:
- Deferred logits are the output of an autograd node that knows the head, so a gradient that reaches them by any way is
  passed on rightly; and whatever asks for their values gets the ordinary logits, made once, under ordinary autograd.
- Sums over tiles are kept in float32 where the parameters' dtype is lower. Loss and gradients are not bitwise those of
  the untiled step, since sums are added in another order; `verify` holds them against float64.

Refused: a head that draws random numbers or whose parameters have hooks (the ordinary head runs), double backward
(`RuntimeError`). Where the gradient's scale is not known in forward and matters (float16, sums in bfloat16,
`reduction="none"`), each tile's logits are made again in backward instead.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from tightfit.core import InvalidInput, PlanMismatch, Tiling
from tightfit.levers.tile.deferred import Deferred, defer, outline_of
from tightfit.levers.tile.head import Autocast, Head, TileStats, refusal
from tightfit.levers.tile.modules import chunking
from tightfit.step.patches import MethodPatch, refuse_compiled


@contextlib.contextmanager
def in_force(model: nn.Module, tiling: Tiling, stats: TileStats, units: Sequence[str] = ()) -> Iterator[None]:
    """While open, the head that `tiling` names returns deferred logits in steps with gradients, and its modules in each
    of `units` run in chunks.

    Raises `PlanMismatch` when the model has no such module.
    """
    modules = dict(model.named_modules())
    patches: list[MethodPatch] = []
    try:
        if tiling.head is not None:
            module = modules.get(tiling.head)
            if module is None:
                raise PlanMismatch(
                    f"the plan tiles the head {tiling.head!r}, which this {type(model).__name__} does not have: "
                    "the plan was made for another model; make it anew"
                )
            if getattr(module.forward, "__tightfit__", False):
                raise InvalidInput(f"a plan is already in force on {tiling.head!r}; remove it first")
            patches.append(MethodPatch(module, functools.partial(_deferring, module, tiling.rows, stats)))
        for unit in units if tiling.modules else ():
            for each in tiling.modules:
                module = modules.get(f"{unit}.{each.name}")
                if module is not None:
                    patches.append(MethodPatch(module, functools.partial(chunking, module, each.tiles)))
        yield
    finally:
        while patches:
            patches.pop().undo()


def _deferring(
    module: nn.Module, rows: int, stats: TileStats, original: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.compiler.is_compiling():
            refuse_compiled(f"a {type(module).__name__} is compiled, and the plan in force computes it in tiles")
        hidden = args[0] if len(args) == 1 and not kwargs else None
        if (
            not torch.is_grad_enabled()
            or not isinstance(hidden, torch.Tensor)
            or isinstance(hidden, Deferred)
            or hidden.dim() < 2
            or not hidden.numel()
            or not hidden.is_floating_point()
            or refusal(module)
        ):
            return original(*args, **kwargs)
        trained = tuple(p for p in module.parameters() if p.requires_grad)
        if not (hidden.requires_grad or trained):
            return original(*args, **kwargs)
        head = Head(module, original, rows, stats, Autocast.now(hidden.device), trained)
        outline = outline_of(head, hidden)
        if outline is None:
            return original(*args, **kwargs)
        width, dtype = outline
        return defer(head, (), ((*hidden.shape[:-1], width), dtype), hidden)

    forward.__tightfit__ = True  # type: ignore[attr-defined]  # how a second plan, or a trace, sees this one
    return forward
