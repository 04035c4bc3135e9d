"""Deferred logits: a tensor without storage that knows the head and what was done to it row by row.

Invariant: whoever asks for their values gets the ordinary logits, made once, under ordinary autograd.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tightfit.core import Unsupported
from tightfit.levers.tile.head import Head, HeadCall, Job, TiledLoss, applied, refusal
from tightfit.step.modes import modes_off
from tightfit.step.run import tensors_in


def outline_of(head: Head, hidden: torch.Tensor) -> tuple[int, torch.dtype] | None:
    """Width and dtype of the head's output; None when it is not one row per row."""
    if head.is_linear:
        dtype = head.autocast.dtype if head.autocast.enabled else hidden.dtype
        return head.module.out_features, dtype  # type: ignore[return-value]  # a linear layer's
    with modes_off(), torch.no_grad():
        row = hidden.detach().reshape(-1, hidden.shape[-1])[:1]
        out = head.logits(row)
    if not isinstance(out, torch.Tensor) or out.dim() != 2 or out.shape[0] != 1:
        return None
    return out.shape[1], out.dtype


class _Defer(torch.autograd.Function):
    """The autograd node behind deferred logits, for a gradient that reaches them as a tensor of their own."""

    @staticmethod
    def forward(ctx: Any, head: Head, chain: Any, outline: Any, hidden: torch.Tensor, *_: Any) -> torch.Tensor:
        ctx.head, ctx.chain, ctx.hidden = head, chain, hidden
        shape, dtype = outline
        return Deferred(shape, dtype, hidden.device)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        head = ctx.head
        with torch.enable_grad():
            hidden = ctx.hidden.detach().requires_grad_(ctx.needs_input_grad[3])
            out = applied(ctx.chain, head.logits(hidden))
        wanted = [t for t in (hidden, *head.parameters) if t.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, gradients, allow_unused=True))
        return None, None, None, *(next(found) if t.requires_grad else None for t in (hidden, *head.parameters))


class Deferred(torch.Tensor):
    """Logits that nobody has computed. `hidden` (..., width) are the rows that they would come from."""

    head: Head
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
            made = applied(self.chain, self.head.logits(self.hidden))
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
    out = defer(source.head, chain, outline, hidden) if graph else Deferred(outline[0], outline[1], hidden.device)
    out.head, out.hidden, out.chain, out.parent, out.how = source.head, hidden, chain, source, how
    source.root.family.append(weakref.ref(out))
    return out


def defer(head: Head, chain: Any, outline: Any, hidden: torch.Tensor) -> Deferred:
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

    with modes_off():
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
            applied(source.chain, source.head.logits(rows[at : at + source.head.rows])).argmax(-1)
            for at in range(0, rows.shape[0], source.head.rows)
        ]
        out = torch.cat(found) if found else rows.new_empty(0, dtype=torch.long)
    out = out.reshape(source.hidden.shape[:-1])
    return out.unsqueeze(-1) if keepdim else out


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
    job = Job(head, input.chain, reduction, ignore_index, label_smoothing)
    head.stats.losses += 1
    if head.stats.witness is not None:
        head.stats.witness(HeadCall(job, input.hidden.detach(), target, weight))
    input.root.in_loss = True
    loss: torch.Tensor = TiledLoss.apply(job, input.hidden, target, weight, *head.parameters)
    return loss


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
