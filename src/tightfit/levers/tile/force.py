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
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tightfit.core import InvalidInput, PlanMismatch, Tiling
from tightfit.levers.tile.deferred import Deferred, defer, outline_of
from tightfit.levers.tile.head import Autocast, Head, TileStats, refusal
from tightfit.levers.tile.modules import chunking
from tightfit.step.patches import ForwardPatch, refuse_compiled


@contextlib.contextmanager
def in_force(model: nn.Module, tiling: Tiling, stats: TileStats, units: Sequence[str] = ()) -> Iterator[None]:
    """While open, the head that `tiling` names returns deferred logits in steps with gradients, and its modules in each
    of `units` run in chunks.

    Raises `PlanMismatch` when the model has no such module.
    """
    modules = dict(model.named_modules())
    patches: list[ForwardPatch] = []
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
            patches.append(ForwardPatch(module, functools.partial(_deferring, module, tiling.rows, stats)))
        for unit in units if tiling.modules else ():
            for each in tiling.modules:
                module = modules.get(f"{unit}.{each.name}")
                if module is not None:
                    patches.append(ForwardPatch(module, functools.partial(chunking, module, each.tiles)))
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
