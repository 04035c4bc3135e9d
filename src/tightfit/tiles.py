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
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from tightfit.core import InvalidInput, PlanMismatch, TiledModule, Tiling, Unsupported
from tightfit.loss import torchs_own
from tightfit.step import ForwardPatch, refuse_compiled, tensors_in

__all__ = ["Deferred", "Sought", "TileStats", "head_sought", "in_force", "modules_sought", "refusal", "rows_of_tile"]

#: Bytes of a block of a weight's gradient that is made in a wider dtype before it is added to the sum.
_BLOCK_BYTES = 1 << 25

_LOW = (torch.bfloat16, torch.float16)


@dataclass(slots=True)
class TileStats:
    """What happened to deferred logits."""

    losses: int = 0  # cross entropies in tiles
    tiles: int = 0
    whole: int = 0  # times that the logits were made whole, and so the budget not kept
    asked_by: str = ""  # what first asked for them
    witness: Callable[[HeadCall], None] | None = None  # told of every cross entropy in tiles

    def __sub__(self, other: TileStats) -> TileStats:
        return TileStats(
            losses=self.losses - other.losses,
            tiles=self.tiles - other.tiles,
            whole=self.whole - other.whole,
            asked_by=self.asked_by if self.whole > other.whole else "",
        )


def refusal(module: nn.Module) -> str:
    """Why `module` cannot be run a tile at a time; empty when it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    for inner in module.modules():
        if isinstance(inner, nn.modules.dropout._DropoutNd) and inner.training and inner.p > 0:
            return "it has active dropout, whose random numbers another order of rows would change"
        if isinstance(inner, nn.modules.batchnorm._NormBase):
            return "it has a norm over the batch, so its rows are not independent"
    if any(p._backward_hooks for p in module.parameters()):
        return "its parameters have gradient hooks, which would run once per tile"
    return ""


# ------------------------------------------------------------------------------------------------- the head


@dataclass(frozen=True, slots=True)
class _Autocast:
    kind: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: torch.device) -> _Autocast:
        return cls(device.type, torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type))

    def again(self) -> contextlib.AbstractContextManager[Any]:
        # no cache: a copy made here would outlive the tile, with a history that ends in it
        if not self.enabled and not torch.is_autocast_enabled(self.kind):
            return contextlib.nullcontext()
        return torch.autocast(self.kind, enabled=self.enabled, dtype=self.dtype, cache_enabled=False)


@dataclass(slots=True)
class _Head:
    """A head as it was called once."""

    module: nn.Module
    forward: Callable[..., torch.Tensor]
    rows: int  # of a tile
    stats: TileStats
    autocast: _Autocast
    parameters: tuple[nn.Parameter, ...]  # those that are trained

    @property
    def is_linear(self) -> bool:
        """A plain linear layer, whose products can be written into the sums directly."""
        if type(self.module) is not nn.Linear or getattr(self.forward, "__func__", None) is not nn.Linear.forward:
            return False
        weight = self.module.weight
        if type(weight) is not nn.Parameter and type(weight.data).__name__ != "FakeTensor":
            return False
        return not (self.autocast.enabled and weight.dtype is torch.float64)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        with self.autocast.again():
            return self.forward(hidden)


def _outline(head: _Head, hidden: torch.Tensor) -> tuple[int, torch.dtype] | None:
    """Width and dtype of the head's output; None when it is not one row per row."""
    if head.is_linear:
        dtype = head.autocast.dtype if head.autocast.enabled else hidden.dtype
        return head.module.out_features, dtype  # type: ignore[return-value]  # a linear layer's
    with _disable_current_modes(), torch.no_grad():
        row = hidden.detach().reshape(-1, hidden.shape[-1])[:1]
        out = head.logits(row)
    if not isinstance(out, torch.Tensor) or out.dim() != 2 or out.shape[0] != 1:
        return None
    return out.shape[1], out.dtype


# ------------------------------------------------------------------------------------------ deferred logits


class _Defer(torch.autograd.Function):
    """The autograd node behind deferred logits, for a gradient that reaches them as a tensor of their own."""

    @staticmethod
    def forward(ctx: Any, head: _Head, chain: Any, outline: Any, hidden: torch.Tensor, *_: Any) -> torch.Tensor:
        ctx.head, ctx.chain, ctx.hidden = head, chain, hidden
        shape, dtype = outline
        return Deferred(shape, dtype, hidden.device)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        head = ctx.head
        with torch.enable_grad():
            hidden = ctx.hidden.detach().requires_grad_(ctx.needs_input_grad[3])
            out = _applied(ctx.chain, head.logits(hidden))
        wanted = [t for t in (hidden, *head.parameters) if t.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, gradients, allow_unused=True))
        return None, None, None, *(next(found) if t.requires_grad else None for t in (hidden, *head.parameters))


def _applied(chain: Sequence[Callable[[torch.Tensor], torch.Tensor]], logits: torch.Tensor) -> torch.Tensor:
    for each in chain:
        logits = each(logits)
    return logits


class Deferred(torch.Tensor):
    """Logits that nobody has computed. `hidden` (..., width) are the rows that they would come from."""

    head: _Head
    hidden: torch.Tensor
    chain: tuple[Callable[[torch.Tensor], torch.Tensor], ...]  # what was done to each row since the head
    parent: Deferred | None
    how: Callable[[torch.Tensor], torch.Tensor]  # from the parent's ordinary logits to these
    ordinary: torch.Tensor | None
    ordinary_without_history: torch.Tensor | None
    family: list[weakref.ref[Deferred]]  # of the head's own output: everything that was made from it
    in_loss: bool  # of the head's own output: has a loss been computed in tiles from it?

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Deferred:
        out: Deferred = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        out.parent = out.ordinary = out.ordinary_without_history = None
        out.family = []
        out.in_loss = False
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.made("pickle").__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        return self.made("deepcopy").__deepcopy__(memo)

    @property
    def width(self) -> int:
        return int(self.shape[-1])

    @property
    def root(self) -> Deferred:
        found = self
        while found.parent is not None:
            found = found.parent
        return found

    def made(self, asked_by: str, *, shared: bool = False) -> torch.Tensor:
        """The ordinary logits: made once, with their history unless that is not wanted. `shared`: as a view of those
        that they are a view of."""
        with torch._C.DisableTorchFunctionSubclass():
            history = torch.is_grad_enabled() and self.requires_grad
        if self.ordinary is not None or (not history and self.ordinary_without_history is not None):
            found = self.ordinary if self.ordinary is not None else self.ordinary_without_history
            assert found is not None
            return found if history or not found.requires_grad else found.detach()
        root = self.root
        # a few rows of many (an inspection chunk by chunk) are made by themselves
        alone = (
            not shared
            and self.hidden.shape[:-1].numel() * 4 <= root.hidden.shape[:-1].numel()
            and root.ordinary is None
        )
        if self.parent is None or alone:
            if not alone:
                self.head.stats.whole += 1
                self.head.stats.asked_by = self.head.stats.asked_by or asked_by
            made = _applied(self.chain, self.head.logits(self.hidden))
        else:
            made = self.how(self.parent.made(asked_by, shared=shared))
        if history:
            self.ordinary = made
        else:
            self.ordinary_without_history = made
        return made

    # -- what is asked of them

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in ("register_hook", "retain_grad") and any(each.root.in_loss for each in _deferred_in(args, kwargs)):
            raise Unsupported(
                f"{name} was asked of logits whose loss is computed in tiles, so no gradient of theirs ever exists; "
                "remove the plan, or make it without tiles (levers=), to look at the gradient of the logits"
            )
        if args and isinstance(args[0], Deferred) and args[0].ordinary is None:
            handler = _HANDLERS.get(name)
            if handler is not None:
                out = handler(func, *args, **kwargs)
                if out is not NotImplemented:
                    return out
        if _writes(name):
            with torch.enable_grad():  # what is changed in place are the logits that the loss will see
                for each in _deferred_in(args, kwargs):
                    for other in (each.root, *(kin for ref in each.root.family if (kin := ref()) is not None)):
                        other.made(name, shared=True)
        args, kwargs = pytree.tree_map(
            lambda item: item.made(name) if isinstance(item, Deferred) else item, (tuple(args), dict(kwargs))
        )
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's has no default arguments
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Below autograd: the values alone, the node above passes the gradient on."""
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            (source,) = args
            return _like(source, source.hidden, source.chain, lambda made: made, graph=False)
        with torch.no_grad():
            args, kwargs = pytree.tree_map(
                lambda item: item.made(str(func)) if isinstance(item, Deferred) else item, (args, kwargs or {})
            )
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # no values to print
        return f"Deferred(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


#: Asked of every tensor, and answered without any values.
_ABOUT = frozenset(
    {
        *(
            getattr(torch.Tensor, name).__get__
            for name in (
                "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "is_cuda", "is_cpu",
                "is_meta",
                "is_sparse", "is_quantized", "is_mps", "itemsize", "_version", "grad_fn", "output_nr",
            )
        ),
        torch.Tensor.size, torch.Tensor.dim, torch.Tensor.ndimension, torch.Tensor.numel, torch.Tensor.nelement,
        torch.Tensor.element_size, torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.__len__,
        torch.Tensor.__hash__, torch.Tensor.get_device, torch.is_floating_point, torch.is_complex, torch.numel,
        torch.Tensor.stride, torch.Tensor.is_contiguous, torch.Tensor.requires_grad_,
    }
)  # fmt: skip


def _writes(name: str) -> bool:
    """Does the function of this name change its first argument?"""
    if name.endswith("__"):
        return name == "__setitem__" or name in _IN_PLACE_OPERATORS
    return name.endswith("_") and name != "requires_grad_"


_IN_PLACE_OPERATORS = frozenset(
    f"__i{name}__"
    for name in (
        "add",
        "sub",
        "mul",
        "truediv",
        "div",
        "floordiv",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
    )
)


def _deferred_in(*trees: Any) -> Iterator[Deferred]:
    for leaf in tensors_in(trees):
        if isinstance(leaf, Deferred):
            yield leaf


def _like(
    source: Deferred,
    hidden: torch.Tensor,
    chain: Any,
    how: Callable[[torch.Tensor], torch.Tensor],
    *,
    dtype: torch.dtype | None = None,
    graph: bool = True,
) -> Deferred:
    """Deferred logits that come from `source`."""
    outline = ((*hidden.shape[:-1], source.width), dtype or source.dtype)
    out = _defer(source.head, chain, outline, hidden) if graph else Deferred(outline[0], outline[1], hidden.device)
    out.head, out.hidden, out.chain, out.parent, out.how = source.head, hidden, chain, source, how
    source.root.family.append(weakref.ref(out))
    return out


def _defer(head: _Head, chain: Any, outline: Any, hidden: torch.Tensor) -> Deferred:
    out: Deferred = _Defer.apply(head, chain, outline, hidden, *head.parameters)
    out.head, out.hidden, out.chain = head, hidden, chain
    return out


# -- operations on each number


def _number(item: Any) -> bool:
    if isinstance(item, Deferred):
        return False
    if isinstance(item, torch.Tensor):
        return item.dim() == 0 and not item.requires_grad
    return isinstance(item, (int, float)) and not isinstance(item, bool)


def _each(func: Any, source: Deferred, *args: Any, **kwargs: Any) -> Any:
    if not all(map(_number, args)) or kwargs:
        return NotImplemented

    def how(logits: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = func(logits, *args)
        return out

    with _disable_current_modes():
        plain = [float(a) if isinstance(a, float) else a for a in args if not isinstance(a, torch.Tensor)]
        if len(plain) == len(args):
            dtype = func(torch.empty(0, dtype=source.dtype, device="meta"), *plain).dtype
        else:
            dtype = torch.result_type(torch.empty(0, dtype=source.dtype), args[0])
    return _like(source, source.hidden, (*source.chain, how), how, dtype=dtype)


def _cast_to(dtype: torch.dtype) -> Callable[..., Any]:
    def cast(func: Any, source: Deferred, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return NotImplemented
        return _to(func, source, dtype)

    return cast


def _to(func: Any, source: Deferred, *args: Any, **kwargs: Any) -> Any:
    args = tuple(torch.empty(0, dtype=a.dtype, device=a.device) if isinstance(a, Deferred) else a for a in args)
    kwargs.pop("copy", None)  # deferred logits cannot be written through another name
    try:
        parsed: Any = torch._C._nn._parse_to(*args, **kwargs)
    except (TypeError, RuntimeError):
        return NotImplemented
    device, dtype, _, memory_format = parsed
    elsewhere = device is not None and (device.type, device.index) not in (
        (source.device.type, None), (source.device.type, source.device.index),
    )  # fmt: skip
    if memory_format is not None or elsewhere:
        return NotImplemented
    if dtype is None or dtype is source.dtype:
        return source
    if not dtype.is_floating_point:
        return NotImplemented

    def how(logits: torch.Tensor) -> torch.Tensor:
        return logits.to(dtype)

    return _like(source, source.hidden, (*source.chain, how), how, dtype=dtype)


def _type_as(func: Any, source: Deferred, other: torch.Tensor) -> Any:
    return _to(func, source, other.dtype)


# -- operations on rows


def _rows(source: Deferred, hidden: torch.Tensor, how: Callable[[torch.Tensor], torch.Tensor]) -> Deferred:
    return _like(source, hidden, source.chain, how)


def _view(func: Any, source: Deferred, *shape: Any, **kwargs: Any) -> Any:
    if kwargs or any(isinstance(item, torch.dtype) for item in shape):
        return NotImplemented
    asked = list(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)) else list(shape)
    if asked.count(-1) == 1:
        rest = 1
        for size in asked:
            rest *= 1 if size == -1 else size
        asked[asked.index(-1)] = source.numel() // rest if rest else 0
    if not asked or asked[-1] != source.width or functools.reduce(lambda a, b: a * b, asked, 1) != source.numel():
        return NotImplemented
    rows = asked[:-1]
    return _rows(
        source, source.hidden.reshape(*rows, source.hidden.shape[-1]), lambda made: made.reshape(*rows, made.shape[-1])
    )


def _flatten(func: Any, source: Deferred, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = start_dim % source.dim(), end_dim % source.dim()
    if end == source.dim() - 1:
        return source if start == end else NotImplemented
    return _rows(source, source.hidden.flatten(start, end), lambda made: made.flatten(start, end))


def _same(func: Any, source: Deferred, *_: Any, **kwargs: Any) -> Any:
    return NotImplemented if kwargs else source


def _clone(func: Any, source: Deferred, *args: Any, **kwargs: Any) -> Any:
    return _rows(source, source.hidden, lambda made: made.clone())


def _detach(func: Any, source: Deferred) -> Any:
    out = _like(source, source.hidden.detach(), source.chain, lambda made: made.detach(), graph=False)
    return out


def _leading(func: Any, source: Deferred, *args: Any, **kwargs: Any) -> Any:
    """An operation of one leading dimension, `dim` first or second."""
    dims = [a for a in args[:2] if isinstance(a, int)] if func.__name__ in _DIM_FIRST else []
    dim = kwargs.get("dim", dims[0] if dims else args[1] if len(args) > 1 else 0)
    if not isinstance(dim, int) or dim % source.dim() == source.dim() - 1:
        return NotImplemented
    if func.__name__ in _DIM_FIRST:
        args = (dim % source.dim(), *args[1:]) if args else args
    elif len(args) > 1:
        args = (args[0], dim % source.dim(), *args[2:])
    if "dim" in kwargs:
        kwargs["dim"] = dim % source.dim()
    out = func(source.hidden, *args, **kwargs)
    if isinstance(out, torch.Tensor):
        return _rows(source, out, lambda made: func(made, *args, **kwargs))

    def part(number: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def how(made: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = func(made, *args, **kwargs)[number]
            return found

        return how

    return tuple(_rows(source, each, part(number)) for number, each in enumerate(out))


_DIM_FIRST = frozenset({"narrow", "select", "unbind", "index_select"})


def _item(func: Any, source: Deferred, index: Any) -> Any:
    items = index if isinstance(index, tuple) else (index,)
    if any(not (item is None or item is Ellipsis or isinstance(item, (int, slice, torch.Tensor))) for item in items):
        return NotImplemented

    def consumed(item: Any) -> int:
        if item is None or item is Ellipsis:
            return 0
        return item.dim() if isinstance(item, torch.Tensor) and item.dtype is torch.bool else 1

    count = sum(map(consumed, items))
    after = items[[item is Ellipsis for item in items].index(True) + 1 :] if any(i is Ellipsis for i in items) else ()
    # the vocabulary is reached from the right after an ellipsis, else when every dimension is named
    reaches = bool(after) if any(i is Ellipsis for i in items) else count == source.dim()
    if reaches and items[-1] != slice(None):
        return NotImplemented
    if count > source.dim() or any(item is True or item is False for item in items):
        return NotImplemented
    return _rows(source, source.hidden[index], lambda made: made[index])


def _transpose(func: Any, source: Deferred, one: int, other: int) -> Any:
    last = source.dim() - 1
    if last in (one % source.dim(), other % source.dim()):
        return NotImplemented
    return _rows(source, source.hidden.transpose(one, other), lambda made: made.transpose(one, other))


def _argmax(func: Any, source: Deferred, dim: int | None = None, keepdim: bool = False) -> Any:
    if dim is None or dim % source.dim() != source.dim() - 1:
        return NotImplemented
    rows = source.hidden.detach().reshape(-1, source.hidden.shape[-1])
    with torch.no_grad():
        found = [
            _applied(source.chain, source.head.logits(rows[at : at + source.head.rows])).argmax(-1)
            for at in range(0, rows.shape[0], source.head.rows)
        ]
        out = torch.cat(found) if found else rows.new_empty(0, dtype=torch.long)
    out = out.reshape(source.hidden.shape[:-1])
    return out.unsqueeze(-1) if keepdim else out


# ------------------------------------------------------------------------------------------------- the loss


@dataclass(slots=True)
class _Job:
    """One cross entropy in tiles, without its tensors."""

    head: _Head
    chain: tuple[Callable[[torch.Tensor], torch.Tensor], ...]
    reduction: str
    ignore_index: int
    label_smoothing: float
    wants: list[bool] = field(default_factory=list)  # gradients of the hidden states and of each parameter

    def spans(self, rows: int) -> Iterator[slice]:
        for at in range(0, rows, self.head.rows):
            yield slice(at, min(at + self.head.rows, rows))

    def loss_of(self, logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return torchs_own(
            _applied(self.chain, logits), target, weight, ignore_index=self.ignore_index,
            reduction="none" if self.reduction == "none" else "sum", label_smoothing=self.label_smoothing,
        )  # fmt: skip


def _cross_entropy(
    func: Any,
    input: Deferred,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if (
        type(target) not in (torch.Tensor, type(input.hidden))
        or isinstance(target, Deferred)
        or input.dim() != 2
        or target.dim() != 1
        or target.is_floating_point()
        or target.shape[0] != input.shape[0]
        or not target.shape[0]
        or size_average is not None
        or reduce is not None
        or reduction not in ("none", "mean", "sum")
        or (weight is not None and weight.requires_grad)
        or refusal(input.head.module)
    ):
        return NotImplemented
    head = input.head
    job = _Job(head, input.chain, reduction, ignore_index, label_smoothing)
    head.stats.losses += 1
    if head.stats.witness is not None:
        head.stats.witness(HeadCall(job, input.hidden.detach(), target, weight))
    input.root.in_loss = True
    loss: torch.Tensor = _TiledLoss.apply(job, input.hidden, target, weight, *head.parameters)
    return loss


@dataclass(slots=True)
class HeadCall:
    """What one cross entropy in tiles was given: enough to compute it in other ways."""

    job: _Job
    hidden: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor | None

    def tiled(self) -> dict[str, torch.Tensor]:
        """Loss and gradients, by name, in tiles."""
        hidden = self.hidden.detach().requires_grad_()
        loss: torch.Tensor = _TiledLoss.apply(self.job, hidden, self.target, self.weight, *self.job.head.parameters)
        return self._named(loss, hidden, self.job.head.parameters)

    def untiled(self) -> dict[str, torch.Tensor]:
        """The same by the ordinary head."""
        hidden = self.hidden.detach().requires_grad_()
        loss = self._loss(self.job.head.logits(hidden), self.target)
        return self._named(loss, hidden, self.job.head.parameters)

    def in_float64(self, head: nn.Module, rows: int) -> dict[str, torch.Tensor]:
        """The same by `head`, a copy in float64; `rows` at a time, since sums are near exact there."""
        trained = [p for p in head.parameters() if p.requires_grad]
        hidden = self.hidden.detach().double().requires_grad_()
        divisor: Any = 1
        if self.job.reduction == "mean":
            divisor = _denominator(self.target, self.weight, self.job).double()
        weight = None if self.weight is None else self.weight.double()
        total = hidden.new_zeros(self.target.shape if self.job.reduction == "none" else ())
        for at in range(0, hidden.shape[0], rows):
            part = slice(at, at + rows)
            piece = self.job.loss_of(head(hidden[part]), self.target[part], weight) / divisor
            piece.sum().backward()
            if self.job.reduction == "none":
                total[part] = piece.detach()
            else:
                total += piece.detach()
        found = {"loss": total, "hidden states": hidden.grad}
        names = [name for name, p in self.job.head.module.named_parameters() if p.requires_grad]
        return found | {name: p.grad for name, p in zip(names, trained, strict=True)}  # type: ignore[return-value]

    def _loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        job = self.job
        return torchs_own(
            _applied(job.chain, logits), target, self.weight, ignore_index=job.ignore_index,
            reduction=job.reduction, label_smoothing=job.label_smoothing,
        )  # fmt: skip

    def _named(
        self, loss: torch.Tensor, hidden: torch.Tensor, parameters: Sequence[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        names = [name for name, p in self.job.head.module.named_parameters() if p.requires_grad]
        found = torch.autograd.grad(loss.sum(), [hidden, *parameters])
        return {"loss": loss.detach(), "hidden states": found[0], **dict(zip(names, found[1:], strict=True))}


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, job: _Job, hidden: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, *parameters: Any
    ) -> torch.Tensor:
        job.wants = [ctx.needs_input_grad[1], *ctx.needs_input_grad[4:]]
        dtypes = {hidden.dtype, job.head.autocast.dtype if job.head.autocast.enabled else hidden.dtype}
        # a gradient of low precision that is made before its scale is known is rounded once more, or vanishes
        known = job.reduction == "mean" or (job.reduction == "sum" and not dtypes & set(_LOW))
        ctx.at_once = known and torch.float16 not in dtypes and any(job.wants)
        ctx.job = job
        tiles = _Tiles(job, hidden, target, weight, parameters)
        denominator = _denominator(target, weight, job) if job.reduction == "mean" else None
        if ctx.at_once:
            scale = None
            if denominator is not None:  # nothing but ignored rows: the loss is 0 / 0, the gradient zero
                scale = torch.where(denominator > 0, denominator.reciprocal(), 0)
            loss = tiles.run(scale, gradients=True, loss=True)
            ctx.save_for_backward(*tiles.gradients())
        else:
            loss = tiles.run(None, gradients=False, loss=True)
            ctx.save_for_backward(hidden, target, weight, denominator, *parameters)
        assert loss is not None
        if denominator is not None:
            loss = loss / denominator.to(loss.dtype)
        return loss.to(tiles.loss_dtype)

    @staticmethod
    def backward(ctx: Any, *incoming: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the plan in force computes the head and its loss in tiles, so the loss has no second derivative; "
                "remove the plan, or make it without the lever TILE, to use create_graph=True"
            )
        (gradient,) = incoming
        job = ctx.job
        if ctx.at_once:
            keep = torch._C._autograd._get_current_graph_task_keep_graph()
            found = iter(ctx.saved_tensors)
            made = [next(found) if wanted else None for wanted in job.wants]
            scaled = [None if each is None else each * gradient if keep else each.mul_(gradient) for each in made]
        else:
            hidden, target, weight, denominator, *parameters = ctx.saved_tensors
            tiles = _Tiles(job, hidden, target, weight, parameters)
            if denominator is not None:
                gradient = torch.where(denominator > 0, gradient / denominator, 0).to(gradient.dtype)
            tiles.run(gradient, gradients=True, loss=False)
            scaled = []
            found = iter(tiles.gradients())
            scaled = [next(found) if wanted else None for wanted in job.wants]
        return None, scaled[0], None, None, *scaled[1:]


def _denominator(target: torch.Tensor, weight: torch.Tensor | None, job: _Job) -> torch.Tensor:
    """What the mean divides by: the rows that are not ignored, or their classes' weights. A number on the device."""
    counted = target != job.ignore_index
    if weight is None:
        return counted.sum().to(torch.float32)
    return (weight[torch.where(counted, target, 0)] * counted).sum()


def _unhooked() -> contextlib.AbstractContextManager[Any]:
    """A tile's own graph lives and dies in the tile: nobody else's hooks may see what it saves."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


class _Tiles:
    """The sums of one pass over the tiles."""

    def __init__(
        self,
        job: _Job,
        hidden: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None,
        parameters: Sequence[torch.Tensor],
    ) -> None:
        self.job, self.target, self.class_weight, self.parameters = job, target, weight, parameters
        self.of_hidden: torch.Tensor | None = None
        self.sums: list[torch.Tensor | None] = []
        self.shape = hidden.shape
        self.hidden = hidden
        self.loss_dtype = torch.float32

    def run(self, incoming: torch.Tensor | None, *, gradients: bool, loss: bool) -> torch.Tensor | None:
        """The loss before it is divided: a sum, or one number per row. `incoming`: the gradient of that."""
        job, stats = self.job, self.job.head.stats
        wants = job.wants if gradients else [False] * len(job.wants)
        if wants[0]:
            self.of_hidden = torch.empty(self.shape, dtype=self.hidden.dtype, device=self.hidden.device)
        self.sums = [
            torch.zeros(p.shape, dtype=torch.float32 if p.dtype in _LOW else p.dtype, device=p.device)
            if wanted
            else None
            for p, wanted in zip(self.parameters, wants[1:], strict=True)
        ]
        tile = self._linear_tile() if job.head.is_linear else self._tile
        total: torch.Tensor | None = None
        for rows in job.spans(self.shape[0]):
            stats.tiles += 1
            of_rows = incoming[rows] if incoming is not None and job.reduction == "none" else incoming
            with _unhooked():
                piece = tile(rows, of_rows, wants)
            self.loss_dtype = piece.dtype
            if not loss:
                continue
            wide = piece.float() if piece.dtype in _LOW and job.reduction != "none" else piece
            if job.reduction == "none":
                if total is None:
                    total = torch.empty(self.shape[0], dtype=wide.dtype, device=wide.device)
                total[rows] = wide
            elif total is None:
                total = wide
            else:
                total += wide
        return total

    def gradients(self) -> list[torch.Tensor]:
        """Of what wants one: hidden states, then parameters, each in its own dtype."""
        found = [] if self.of_hidden is None else [self.of_hidden]
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            if total is not None:
                found.append(total.to(parameter.dtype))
        self.of_hidden, self.sums = None, []
        return found

    def _scale_of(self, piece: torch.Tensor, incoming: torch.Tensor | None) -> torch.Tensor:
        if incoming is None:
            return torch.ones_like(piece)
        return incoming.to(piece.dtype)

    def _tile(self, rows: slice, incoming: torch.Tensor | None, wants: list[bool]) -> torch.Tensor:
        """Any head: its own forward and autograd, tile by tile."""
        job = self.job
        with torch.set_grad_enabled(any(wants)):
            hidden = self.hidden[rows].detach().requires_grad_(wants[0])
            piece = job.loss_of(job.head.logits(hidden), self.target[rows], self.class_weight)
        if any(wants):
            inputs = [hidden, *self.parameters]
            wanted = [t for t, want in zip(inputs, wants, strict=True) if want]
            with _Autocast(hidden.device.type, False, torch.float32).again():
                found = torch.autograd.grad(piece, wanted, self._scale_of(piece, incoming), allow_unused=True)
            made: Iterator[torch.Tensor | None] = iter(found)
            if wants[0]:
                assert self.of_hidden is not None
                of_hidden = next(made)
                self.of_hidden[rows] = 0 if of_hidden is None else of_hidden
            for total in self.sums:
                if total is not None and (each := next(made)) is not None:
                    total += each
        return piece.detach()

    def _linear_tile(self) -> Callable[[slice, torch.Tensor | None, list[bool]], torch.Tensor]:
        """A plain linear head: its products written where they belong."""
        job = self.job
        module: Any = job.head.module
        weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
        cast = job.head.autocast.dtype if job.head.autocast.enabled else None
        if cast is not None:
            weight, bias = weight.to(cast), None if bias is None else bias.to(cast)
        of_weight = self._sum_of(module.weight)
        of_bias = None if module.bias is None else self._sum_of(module.bias)

        def tile(rows: slice, incoming: torch.Tensor | None, wants: list[bool]) -> torch.Tensor:
            hidden = self.hidden[rows].detach()
            with torch.no_grad(), _Autocast(hidden.device.type, False, torch.float32).again():
                hidden = hidden if cast is None else hidden.to(cast)
                logits = functional.linear(hidden, weight, bias)
            with torch.set_grad_enabled(any(wants)):
                logits.requires_grad_(any(wants))
                piece = job.loss_of(logits, self.target[rows], self.class_weight)
            if not any(wants):
                return piece
            with _Autocast(hidden.device.type, False, torch.float32).again():
                (of_logits,) = torch.autograd.grad(piece, logits, self._scale_of(piece, incoming))
                piece = piece.detach()
                del logits
                if wants[0]:
                    assert self.of_hidden is not None
                    if self.of_hidden.dtype is of_logits.dtype:
                        torch.mm(of_logits, weight, out=self.of_hidden[rows])
                    else:
                        self.of_hidden[rows] = of_logits @ weight
                if of_weight is not None:
                    _add_product(of_weight, of_logits, hidden)
                if of_bias is not None:
                    of_bias.add_(of_logits.sum(0, dtype=of_bias.dtype))
            return piece

        return tile

    def _sum_of(self, parameter: torch.Tensor) -> torch.Tensor | None:
        # autograd hands a Function its inputs as they are, so a parameter is found by identity
        places = [i for i, each in enumerate(self.job.head.parameters) if each is parameter]
        return self.sums[places[0]] if places and self.sums else None


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`total += left.T @ right`, summed in `total`'s dtype."""
    if total.dtype is left.dtype:
        total.addmm_(left.t(), right)
        return
    step = max(1, _BLOCK_BYTES // (4 * max(1, left.shape[0] + total.shape[1])))
    native = left.is_cuda  # CUDA multiplies low-precision matrices into float32
    wide = right if native else right.to(total.dtype)
    for at in range(0, total.shape[0], step):
        columns = left[:, at : at + step].t()
        if native:
            total[at : at + step] += torch.mm(columns, wide, out_dtype=total.dtype)
        else:
            total[at : at + step].addmm_(columns.to(total.dtype), wide)


# ------------------------------------------------------------------------------------------ token-wise modules


class _Chunked(torch.autograd.Function):
    """A token-wise module over chunks of rows: holds its input alone, and runs each chunk again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        module: nn.Module,
        forward: Callable[..., torch.Tensor],
        tiles: int,
        hidden: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        ctx.module, ctx.run, ctx.tiles = module, forward, tiles
        ctx.autocast = _Autocast.now(hidden.device)
        ctx.save_for_backward(hidden, *parameters)  # these only to see whether they are changed meanwhile
        rows = hidden.reshape(-1, hidden.shape[-1])
        out: torch.Tensor | None = None
        for part in _parts(rows.shape[0], tiles):
            with ctx.autocast.again():
                made = forward(rows[part].unsqueeze(0)).squeeze(0)
            if out is None:  # no view: what follows may add to it in place
                out = torch.empty(*hidden.shape[:-1], made.shape[-1], dtype=made.dtype, device=made.device)
            out.view(-1, made.shape[-1])[part] = made
            del made
        assert out is not None
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the plan in force computes a module in tiles, so the step has no second derivative; "
                "remove the plan, or make it without the lever TILE, to use create_graph=True"
            )
        hidden, *parameters = ctx.saved_tensors
        rows, gradient = (t.reshape(-1, t.shape[-1]) for t in (hidden, gradients[0]))
        of_hidden = torch.empty_like(rows) if ctx.needs_input_grad[3] else None
        sums = [torch.zeros_like(p, dtype=torch.float32 if p.dtype in _LOW else p.dtype) for p in parameters]
        for part in _parts(rows.shape[0], ctx.tiles):
            with torch.enable_grad(), _unhooked():
                given = rows[part].detach().requires_grad_(of_hidden is not None)
                with ctx.autocast.again():
                    made = ctx.run(given.unsqueeze(0)).squeeze(0)
                wanted = [given] * (of_hidden is not None) + parameters
                with _Autocast(hidden.device.type, False, torch.float32).again():
                    found = iter(torch.autograd.grad(made, wanted, gradient[part], allow_unused=True))
            del made, given
            if of_hidden is not None:
                of_rows = next(found)
                of_hidden[part] = 0 if of_rows is None else of_rows
            for total, each in zip(sums, found, strict=True):
                if each is not None:
                    total += each
        scaled = [total.to(p.dtype) for total, p in zip(sums, parameters, strict=True)]
        return None, None, None, None if of_hidden is None else of_hidden.reshape(hidden.shape), *scaled


def _parts(rows: int, tiles: int) -> Iterator[slice]:
    step = max(1, -(-rows // tiles))
    for at in range(0, rows, step):
        yield slice(at, min(at + step, rows))


def _chunking(module: nn.Module, tiles: int, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.compiler.is_compiling():
            refuse_compiled(f"a {type(module).__name__} is compiled, and the plan in force computes it in tiles")
        hidden = args[0] if len(args) == 1 and not kwargs else None
        if (
            not torch.is_grad_enabled()
            or not isinstance(hidden, torch.Tensor)
            or hidden.dim() < 2
            or hidden.shape[:-1].numel() < 2 * tiles
            or refusal(module)
        ):
            return original(*args, **kwargs)
        trained = tuple(p for p in module.parameters() if p.requires_grad)
        if not (hidden.requires_grad or trained):
            return original(*args, **kwargs)
        out: torch.Tensor = _Chunked.apply(module, original, tiles, hidden, *trained)
        return out

    forward.__tightfit__ = True  # type: ignore[attr-defined]
    return forward


def is_token_wise(module: nn.Module, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Does a change of one token change its row of the module's output and no other, in any bit?"""
    if refusal(module):
        return False
    tokens = 13
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(1, tokens, width, generator=generator).to(device, dtype)
    with _disable_current_modes(), torch.no_grad():
        before = module.forward(given)
        if not isinstance(before, torch.Tensor) or before.shape[:-1] != given.shape[:-1]:
            return False
        for token in (0, 5, tokens - 1):
            changed = given.clone()
            changed[0, token] = changed[0, token].flip(0) * 1.5 + 0.25
            after = module.forward(changed)
            same = (after == before).all(-1)[0]
            same[token] = not same[token]
            if not bool(same.all()):
                return False
        return True


class _RowProof(TorchDispatchMode):
    """Follows the rows of one input through ops on fake tensors: every tensor that depends on it must have one
    dimension of tokens, and no op may mix what lies along it."""

    TOKENS = 7919  # a prime that is no width

    def __init__(self, given: torch.Tensor) -> None:
        super().__init__()
        self.depends: Any = WeakIdKeyDictionary()
        self.depends[given] = True
        self.holds = True

    def _dim(self, tensor: torch.Tensor) -> int | None:
        """The dimension of tokens, from the right; None: there is none, or more than one."""
        found = [i for i, size in enumerate(tensor.shape) if size == self.TOKENS]
        others = any(size % self.TOKENS == 0 and size != self.TOKENS for size in tensor.shape)
        return found[0] - tensor.dim() if len(found) == 1 and not others else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = [t for t in tensors_in((args, kwargs)) if t in self.depends]
        if given and func is not torch.ops.prim.device.default:
            for tensor in tensors_in(out):
                self.depends[tensor] = True
            self.holds = self.holds and self._keeps_rows(func, args, kwargs, given, out)
        return out

    def _keeps_rows(self, func: Any, args: Any, kwargs: Any, given: list[torch.Tensor], out: Any) -> bool:
        made = tensors_in(out)
        if not made or any(self._dim(t) is None for t in (*given, *made)):
            return False
        name = func._overloadpacket.__name__
        at = self._dim(given[0])
        if name in ("view", "_unsafe_view", "reshape"):
            # rows stay rows when nothing but ones lies before them, on both sides
            return all(t.shape[: t.dim() + self._dim(t)].numel() == 1 for t in (given[0], made[0]))  # type: ignore[operator]
        if func.is_view:
            return name not in ("as_strided", "diagonal", "unfold")
        if torch.Tag.pointwise in func.tags or name in ("clone", "_to_copy", "copy_", "empty_like", "zeros_like"):
            return len({self._dim(t) for t in (*given, *made)}) == 1
        if name in ("mm", "addmm", "gemm_4bit", "linear"):
            left = args[1] if name == "addmm" else args[0]
            return len(given) == 1 and given[0] is left and at == -2
        if name in ("mean", "sum", "amax", "amin", "var", "softmax", "_softmax", "_log_softmax"):
            asked: Any = args[1] if len(args) > 1 else None
            dims = [asked] if isinstance(asked, int) else list(asked or [])
            size = given[0].dim()
            return bool(dims) and at not in [d if d < 0 else d - size for d in dims]
        if name in ("native_layer_norm", "_fused_rms_norm"):
            return given[0] is args[0] and len(given) == 1 and at is not None and at < -len(args[1])
        if name == "cat":
            dim = args[1] if len(args) > 1 else 0
            return (dim if dim < 0 else dim - given[0].dim()) != at and len({self._dim(t) for t in given}) == 1
        return False


def is_token_wise_by_shape(module: nn.Module, width: int, dtype: torch.dtype) -> bool:
    """The same by the ops alone, for a module on fake tensors, inside their mode."""
    if refusal(module):
        return False
    given = torch.empty(1, _RowProof.TOKENS, width, dtype=dtype)
    proof = _RowProof(given)
    with torch.no_grad(), proof:
        out = module.forward(given)
    return proof.holds and isinstance(out, torch.Tensor) and out.shape[:-1] == given.shape[:-1]


@contextlib.contextmanager
def modules_sought(model: nn.Module, units: Sequence[str], fake: bool) -> Iterator[list[TiledModule]]:
    """While a forward runs inside, find the outermost modules of the `units` that are token-wise; filled at the end."""
    inside = {
        id(module): (unit, path.removeprefix(unit + "."))
        for unit in units
        if unit
        for path, module in model.named_modules()
        if path.startswith(unit + ".")
    }
    seen: dict[str, tuple[nn.Module, int, torch.dtype, torch.device] | None] = {}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if id(module) not in inside:
            return
        _, name = inside[id(module)]
        one = args[0] if len(args) == 1 and not kwargs else None
        fits = (
            isinstance(one, torch.Tensor)
            and one.dim() == 3
            and one.is_floating_point()
            and type(output) is type(one)
            and output.shape[:-1] == one.shape[:-1]
            and one.shape[:-1].numel() >= 2 * TILES
            and _is_composite(module)
        )
        if not fits:
            seen[name] = None
        elif name not in seen and one is not None:
            seen[name] = (module, one.shape[-1], one.dtype, one.device)

    found: list[TiledModule] = []
    handle = nn.modules.module.register_module_forward_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()
        # torch 2.13 forgets this table, and then warns that every `torch.compile`d module has global hooks
        nn.modules.module._global_forward_hooks_with_kwargs.pop(handle.id, None)
    names: list[str] = []
    for name, call in sorted(seen.items(), key=lambda item: item[0].count(".")):
        if call is None or any(name.startswith(outer + ".") for outer in names):
            continue
        try:
            proven = is_token_wise_by_shape(*call[:3]) if fake else is_token_wise(*call)
        except Exception:  # a module that does not take another number of tokens is not tiled, whatever it raises
            continue
        if proven:
            names.append(name)
    found += [TiledModule(name=name, tiles=TILES) for name in names]


#: Into how many chunks a token-wise module is cut.
TILES = 4


def _is_composite(module: nn.Module) -> bool:
    """Worth cutting: it makes something large on the way. A linear layer does not, with or without an adapter; a norm's
    casts are small beside its neighbours, and chunks of them would double the ops of a step."""
    return any(True for _ in module.children()) and not hasattr(module, "base_layer")


# ------------------------------------------------------------------------------------------------- in force


_HANDLERS: dict[str, Callable[..., Any]] = {
    "float": _cast_to(torch.float32), "double": _cast_to(torch.float64), "bfloat16": _cast_to(torch.bfloat16),
    "half": _cast_to(torch.float16), "to": _to, "type_as": _type_as,
    **dict.fromkeys(("mul", "div", "true_divide", "tanh", "neg", "multiply", "divide"), _each),
    **dict.fromkeys(("__mul__", "__rmul__", "__truediv__", "__neg__"), _each),
    **dict.fromkeys(("view", "reshape"), _view),
    "flatten": _flatten, "contiguous": _same, "clone": _clone, "detach": _detach, "__getitem__": _item,
    **dict.fromkeys(("split", "chunk", "narrow", "select", "unbind", "index_select", "tensor_split"), _leading),
    **dict.fromkeys(("transpose", "swapaxes"), _transpose),
    "argmax": _argmax, "cross_entropy": _cross_entropy,
}  # fmt: skip


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
                    patches.append(ForwardPatch(module, functools.partial(_chunking, module, each.tiles)))
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
        head = _Head(module, original, rows, stats, _Autocast.now(hidden.device), trained)
        outline = _outline(head, hidden)
        if outline is None:
            return original(*args, **kwargs)
        width, dtype = outline
        return _defer(head, (), ((*hidden.shape[:-1], width), dtype), hidden)

    forward.__tightfit__ = True  # type: ignore[attr-defined]  # how a second plan, or a trace, sees this one
    return forward


# -------------------------------------------------------------------------------------------- which head


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
