"""What an op is, as far as the dispatcher can tell: its name, whether it draws random numbers, what it costs in FLOPs.

Source of the formulas: torch/utils/flop_counter.py, and the kernels that it leaves out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten


#: Write running statistics that their own output does not depend on in training; some hide it from the schema.
BATCH_NORMS = frozenset(
    f"aten.{name}"
    for name in (
        "native_batch_norm.default",
        "_native_batch_norm_legit.default",
        "_batch_norm_with_update.default",
        "cudnn_batch_norm.default",
        "miopen_batch_norm.default",
    )
)


def _functional(*packets: Any) -> frozenset[Any]:
    """The overloads of `packets` that write none of their arguments."""
    overloads = (getattr(packet, overload) for packet in packets for overload in packet.overloads())
    return frozenset(op for op in overloads if not op._schema.is_mutable)


#: Look only at the shape, strides and dtype of their first argument, so they run again without its data.
METADATA_ONLY = _functional(
    _aten.empty_like, _aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.rand_like, _aten.randn_like,
    _aten.new_empty, _aten.new_zeros, _aten.new_ones, _aten.new_full, _aten.new_empty_strided,
)  # fmt: skip


#: Allocate, and leave the content to whoever writes it.
UNWRITTEN = _functional(
    _aten.empty, _aten.empty_like, _aten.empty_strided, _aten.empty_permuted, _aten.new_empty, _aten.new_empty_strided,
)  # fmt: skip


def op_name(func: Any) -> str:
    """`aten.mm.default` and the like: stable across processes and releases of the same op."""
    name = _NAMES.get(func)
    if name is None:
        name = _NAMES[func] = str(func)
    return name


_NAMES: dict[Any, str] = {}


def is_random(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Does this call draw from a torch generator? Attention kernels only do so when they drop something."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            value = kwargs.get("dropout_p", args[position] if position < len(args) else argument.default_value)
            return bool(value)
    return True


def changes_nothing(func: Any, args: tuple[Any, ...]) -> bool:
    """Does the call put a tensor where it already is? `torch.nn.utils.parametrize` does so with a parameter that it is
    given, and PEFT gives it one in every forward where an adapter is of a parameter and not of a module (experts)."""
    if func is not _aten.set_.source_Tensor:
        return False
    tensor, source = args
    return tensor is source or (
        tensor.untyped_storage()._cdata == source.untyped_storage()._cdata
        and tensor.storage_offset() == source.storage_offset()
        and (tensor.shape, tensor.stride()) == (source.shape, source.stride())
    )


def is_uncounted(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Ops that may happen in the forward and not in its replay, or the other way round, without any meaning.

    `detach` and every other view: they make no bytes, and autograd calls some on its own (after an in-place op on a
    view of a tensor subclass it makes the view again). And autocast's cast of a weight: cached for the rest of the
    autocast context, so the second use of a weight does not cast it again. What autocast caches is what counts, since
    inside its own cast it is switched off and cannot be asked. And what `changes_nothing`.
    """
    if func.is_view or func.namespace in ("profiler", "prim"):  # marks of a span; a fake tensor asked for its device
        return True
    if func is _aten._to_copy.default:
        source, dtype = args[0], kwargs.get("dtype")
        return bool(
            source.is_leaf and source.requires_grad and dtype not in (None, source.dtype) and not source._is_view()
        )
    return changes_nothing(func, args)


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Scores, and their product with the values. Grouped keys and values serve all heads of the query."""
    batch, heads, queries, width = query.shape
    return 2 * int(batch * heads * queries * key.shape[2]) * int(width + value.shape[3])


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """The scores again, their gradient, and those of values, queries and keys (Dao et al., arXiv:2205.14135)."""
    batch, heads, queries, width = query.shape
    return 2 * int(batch * heads * queries * key.shape[2]) * int(3 * width + 2 * value.shape[3])


# torch's own counter misses the CPU kernel (4.3 % of a GPT-2 step), and that of torch 2.11 refuses grouped queries
_OWN_FLOPS = {
    packet: formula
    for kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    for packet, formula in (
        (getattr(_aten, f"_scaled_dot_product_{kind}"), _attention_flops),
        (getattr(_aten, f"_scaled_dot_product_{kind}_backward"), _attention_backward_flops),
    )
}


#: Ops of libraries that may not be there, by namespace and name.
_OTHERS_FLOPS: dict[str, dict[str, Callable[..., int]]] = {
    "bitsandbytes": {"gemm_4bit": lambda a, _, shape, *__, **___: 2 * int(a.numel()) * int(shape[0])}
}


@functools.cache
def _out_of_place(packet: Any) -> Any:
    """`aten.addmm` of `aten.addmm_`, for which torch has no formula of its own."""
    name = packet.__name__
    return getattr(_aten, name[:-1], None) if name.endswith("_") and not name.startswith("_") else None


def op_flops(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """FLOPs of one call by torch's own formulas (matrix products, convolutions, attention); 0 for the rest."""
    packet = func._overloadpacket
    own: Any = _OWN_FLOPS.get(packet) or _OTHERS_FLOPS.get(func.namespace, {}).get(packet.__name__)
    if own:
        return int(own(*args, **kwargs))
    formula: Any = flop_registry.get(packet) or flop_registry.get(_out_of_place(packet))
    if not formula:
        return 0
    # `addmm.dtype` takes the dtype of its result besides, and `out=` says where that goes
    shapes = [argument for argument in args if not isinstance(argument, torch.dtype)]
    named = {name: value for name, value in kwargs.items() if name not in ("out", "out_dtype")}
    return int(formula(*shapes, **named, out_val=out))


def costs_flops(name: str) -> bool:
    """Does torch, or we, have a formula for the FLOPs of the op of this name? All ops of other libraries count too."""
    namespace, _, rest = name.partition(".")
    packet = f"{namespace}.{rest.partition('.')[0]}"
    return namespace not in ("aten", "prims") or packet in _COSTLY


_COSTLY = frozenset(str(packet) for packet in (*flop_registry, *_OWN_FLOPS))
