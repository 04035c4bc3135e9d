"""One training step of any model: call it, find its loss, know what it holds throughout.

Refused: a batch that the model does not take, a loss that is not one number, a model with nothing to train
(`InvalidInput`).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Mapping
from types import MemberDescriptorType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree  # the one tree walk that also knows transformers' ModelOutput
from torch.utils.weak import WeakTensorKeyDictionary

from tightfit.accelerator import HOST, is_card
from tightfit.core import Category, InvalidInput
from tightfit.step.optimizers import bare
from tightfit.step.parallel import (
    bucket_bytes,
    gradients_are_views,
    local_of,
)

LossFunction = Callable[[nn.Module, Any], torch.Tensor]

#: Tensors that hold optimizer state off the device: they take none of the bytes that a budget counts.
elsewhere: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

_rooms: dict[int, weakref.ref[Any]] = {}  # storages off the device, by address


def stays_elsewhere(room: torch.Tensor) -> None:
    """What lies on the storage of `room` takes none of the bytes that a budget counts."""
    storage = room.untyped_storage()
    _rooms[storage._cdata] = weakref.ref(storage)


def comes_back(room: torch.Tensor) -> None:
    """`stays_elsewhere` holds for `room` no longer."""
    _rooms.pop(room.untyped_storage()._cdata, None)


def is_elsewhere(tensor: torch.Tensor) -> bool:
    """Does it lie on a storage of which `stays_elsewhere` was said?"""
    if not _rooms or tensor.layout is not torch.strided:
        return False
    storage = local_of(tensor).untyped_storage()
    known = _rooms.get(storage._cdata)
    return known is not None and known() is storage


#: A weak reference to each thing that `reachable` was asked about, by its id, as long as the thing is there.
_watched: dict[int, weakref.ref[Any]] = {}


def reachable(thing: Any) -> Callable[[], bool]:
    """Can anybody still reach `thing`? To be asked when what holds it closes: where Python's collector closes that, it
    may take `thing` as well.

    Before it closes anything, the collector clears the weak references to what it takes, if they have a callback. It
    also clears those that it takes themselves, whatever they lead to. So the reference is held here.
    """
    key = id(thing)

    def gone(reference: weakref.ref[Any]) -> None:
        if _watched.get(key) is reference:
            del _watched[key]

    reference = _watched.setdefault(key, weakref.ref(thing, gone))
    return lambda: reference() is not None


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for `batch`: a mapping (keyword arguments), a tuple or list (positional) or a tensor."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def run_forward(model: nn.Module, batch: Any, loss: LossFunction | None = None) -> Any:
    """The model's output, or what `loss` makes of it."""
    return call(model, batch) if loss is None else loss(model, batch)


def compute_loss(model: nn.Module, batch: Any, loss: LossFunction | None = None) -> torch.Tensor:
    """The scalar to call `backward` on. Raises `InvalidInput` if it is not a scalar that depends on a parameter."""
    value = loss_value(model, batch, loss)
    if not value.requires_grad:
        raise InvalidInput("the loss depends on no trainable parameter, so there is no backward pass to plan")
    return value


def loss_value(model: nn.Module, batch: Any, loss: LossFunction | None = None) -> torch.Tensor:
    """The scalar, whether or not it has a history. Raises `InvalidInput` if it is no scalar."""
    try:
        output = run_forward(model, batch, loss)
    except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise InvalidInput(
            f"the model refuses this batch ({type(error).__name__}: {first_line}); batch is {describe(batch)}"
        ) from error
    value = output
    if not isinstance(output, torch.Tensor) and loss is None:
        value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else describe(output)
        raise InvalidInput(f"expected a scalar loss, found {found}; pass loss=callable(model, batch) -> scalar tensor")
    return value.reshape(()) if value.dim() else value


def describe(thing: Any) -> str:
    """`thing`'s type and, for containers of tensors, what they hold; for messages."""
    if isinstance(thing, Mapping):
        return f"{type(thing).__name__} with " + (", ".join(str(key) for key in thing) or "nothing")
    if isinstance(thing, torch.Tensor):
        return f"a {str(thing.dtype).removeprefix('torch.')} tensor of shape {tuple(thing.shape)}"
    if isinstance(thing, (tuple, list)):
        return f"{type(thing).__name__} of {len(thing)}"
    return f"{type(thing).__name__}"


def check_trainable(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"expected a torch.nn.Module, found {type(model).__name__}")
    if not any(p.requires_grad for p in model.parameters()):
        raise InvalidInput("no parameter of the model requires a gradient: there is nothing to train")


def tensors_in(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


#: How many attributes deep a batch's tensors are looked for: a graph's lie in its store's mapping.
_ATTRIBUTES_DEEP = 3


#: Of what a batch holds, what can hold no tensor of it. A batch may have a million numbers.
_NO_HOLDERS = (torch.Tensor, nn.Module, ModuleType, type, type(None), str, bytes, int, float, complex)


def batch_tensors(batch: Any) -> list[torch.Tensor]:
    """The tensors of a batch, which may be an object too: a mapping of its own kind, a dataclass, a graph."""
    found: list[torch.Tensor] = []
    seen: set[int] = set()
    level = [batch]
    for _ in range(_ATTRIBUTES_DEEP + 1):
        leaves = pytree.tree_leaves(level)
        found += [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        holders = [leaf for leaf in leaves if not isinstance(leaf, _NO_HOLDERS)]
        level = [_held(each) for each in holders if id(each) not in seen]
        seen.update(map(id, holders))
    return found


def _held(holder: Any) -> list[Any]:
    if isinstance(holder, Mapping):
        return list(holder.values())
    held = list(getattr(holder, "__dict__", {}).values())
    for kind in type(holder).__mro__:
        for slot in vars(kind).values() if "__slots__" in vars(kind) else ():
            if isinstance(slot, MemberDescriptorType):
                with contextlib.suppress(AttributeError):  # not set
                    held.append(slot.__get__(holder))
    return held


def leading_sizes(batch: Any) -> tuple[int, ...]:
    """The first extent of each tensor of a batch."""
    return tuple(tensor.shape[0] for tensor in batch_tensors(batch) if tensor.dim())


def unique_bytes(tensors: Iterable[torch.Tensor], granule_bytes: int = 1) -> int:
    """Bytes of the distinct storages behind `tensors`, each rounded up to a multiple of `granule_bytes`."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        if tensor.layout is torch.strided:
            storage = local_of(tensor).untyped_storage()
            sizes[storage._cdata] = -(-storage.nbytes() // granule_bytes) * granule_bytes
    return sum(sizes.values())


def static_bytes_by_category(
    model: nn.Module, batch: Any = None, optimizer: torch.optim.Optimizer | None = None, granule_bytes: int = 1
) -> dict[str, int]:
    """Bytes that live through a whole step, each storage counted once; gradients only where they exist already."""
    optimizer = None if optimizer is None else bare(optimizer)
    kept = [] if optimizer is None else tensors_in([list(s.values()) for s in optimizer.state.values()])
    state = [tensor for tensor in kept if tensor not in elsewhere]
    seen: set[int] = set()

    def new_bytes(tensors: list[torch.Tensor]) -> int:
        strided = [local_of(t) for t in tensors if t.layout is torch.strided and not is_elsewhere(t)]
        fresh = [t for t in strided if t.untyped_storage()._cdata not in seen]
        seen.update(t.untyped_storage()._cdata for t in fresh)
        return unique_bytes(fresh, granule_bytes)

    quantised = [p for p in model.parameters() if getattr(p, "quant_state", None) is not None]
    return {
        Category.QUANTISED.value: new_bytes([t for p in quantised for t in parameter_tensors(p)]),
        Category.PARAMETERS.value: new_bytes([t for p in model.parameters() for t in parameter_tensors(p)]),
        Category.GRADIENTS.value: new_bytes([p.grad for p in model.parameters() if p.grad is not None]),
        Category.BUFFERS.value: new_bytes(list(model.buffers())),
        Category.INPUTS.value: new_bytes(batch_tensors(batch)),
        Category.OPTIMIZER_STATE.value: new_bytes(state),
        **_of_buckets(model),
    }


def _of_buckets(model: nn.Module) -> dict[str, int]:
    size_bytes = bucket_bytes(model)
    if gradients_are_views(model):
        grown = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
        size_bytes = max(0, size_bytes - grown)
    return {Category.COLLECTIVES.value: size_bytes} if size_bytes else {}


def trained_names(model: nn.Module) -> frozenset[str]:
    """The parameters that get gradients. A plan is for one set of them: a frozen layer saves other tensors."""
    return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def parameter_tensors(parameter: nn.Parameter) -> list[torch.Tensor]:
    """The parameter and what belongs to it: a 4-bit weight carries its scales in `quant_state`."""
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise InvalidInput("the model has a lazy module that has not seen a batch yet; call the model once first")
    found: list[torch.Tensor] = [parameter.data]
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        for attribute in ("absmax", "code", "offset"):
            tensor = getattr(state, attribute, None)
            if isinstance(tensor, torch.Tensor):
                found.append(tensor)
        state = getattr(state, "state2", None)
    return found


def device_of(model: nn.Module) -> torch.device:
    """The device that a step's peak is counted on: that of the first accelerator parameter, else the CPU."""
    devices = [p.device for p in model.parameters()]
    return next((d for d in devices if is_card(d)), devices[0] if devices else HOST)


class _Profile(torch.profiler.profile):
    """A profile whose events are read as they were written (`kineto_results`). torch would make objects of its own of
    all of them at the end, which takes longer than the step."""

    def __enter__(self) -> _Profile:
        super().__enter__()
        assert self.profiler is not None
        self.profiler.acc_events = False
        return self


def cpu_profile(*, memory: bool = True) -> torch.profiler.profile:
    """What the profiler tells of the CPU's ops, and with `memory` of each block that comes and goes."""
    return _Profile(
        activities=[torch.profiler.ProfilerActivity.CPU],
        profile_memory=memory,
        acc_events=True,  # changes nothing for one cycle, but that torch 2.11 does not warn of others
    )
