"""A model that is put on a device while some of its frozen weights stay in host memory, and never are there whole.

Invariant: parameters and buffers stay the objects that they were, so an optimizer that was made before still holds
them. Refused: 4-bit weights that are made when they come to a device, and models that lie on several devices
(`InvalidInput`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import nn

from tightfit.accelerator import device_named, is_host
from tightfit.core import InvalidInput, Unsupported
from tightfit.step.parallel import Strategy, strategy_of
from tightfit.step.patches import compiled_entries
from tightfit.step.run import is_elsewhere, parameter_tensors, tensors_in
from tightfit.step.weights import frozen_modules

__all__ = ["destination", "in_host_bytes", "place"]


def destination(model: nn.Module, device: str | torch.device | None) -> torch.device | None:
    """The card that `model` is to be put on. None: it lies where it is to run already.

    Raises `InvalidInput` for a device that is not here and for a model that lies on another one, and `Unsupported` for
    a model that cannot be put there a weight at a time.
    """
    if device is None:
        return None
    there = torch.empty(0, device=device_named(str(device))).device  # with its number
    found = {t.device for t in [*model.parameters(), *model.buffers()]}
    others = sorted(str(each) for each in found if each != there and not is_host(each))
    if others or (is_host(there) and found - {there}):
        lies = ", ".join(others or sorted(map(str, found)))
        raise InvalidInput(f"device {str(there)!r} was asked for, and the model lies on {lies}: load it on the host")
    if is_host(there) or found <= {there}:
        return None
    if strategy_of(model) is not Strategy.ONE:
        raise Unsupported("several processes cannot put a model on their devices a weight at a time: leave out device=")
    if compiled_entries(model):
        raise Unsupported("a compiled model cannot be put on a device a weight at a time: leave out device=")
    raw = next((n for n, p in model.named_parameters() if getattr(p, "bnb_quantized", True) is False), None)
    if raw is not None:
        raise InvalidInput(
            f"{raw} becomes 4 bits when it comes to a device: load the model in 4 bits on the host "
            "(device_map={'': 'cpu'}), so that what waits there is what the step reads"
        )
    return there


def place(
    model: nn.Module, device: torch.device, left: Collection[str], optimizer: torch.optim.Optimizer | None = None
) -> Callable[[], None]:
    """Put all of `model` on `device`, but for the frozen weights of the modules at the paths `left` that lie in host
    memory, and the optimizer's state where torch keeps it for such parameters. Returns how to undo it; where it fails
    half way, that is done."""
    stay = {id(t) for each in frozen_modules(model) if each.path in left for t in each.tensors() if is_host(t.device)}
    before: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []

    def undo() -> None:
        with torch.no_grad():
            for tensor, data, grad in reversed(before):
                tensor.grad = None
                tensor.data = data
                tensor.grad = grad

    try:
        for tensor in _held_by(model):
            if tensor.device != device and id(tensor) not in stay and not is_elsewhere(tensor):
                with torch.no_grad():
                    data, grad = tensor.data, tensor.grad
                    there = tensor.detach().to(device), None if grad is None else grad.to(device)
                    before.append((tensor, data, grad))
                    tensor.grad = None
                    tensor.data, tensor.grad = there
        if optimizer is not None and optimizer.state:
            optimizer.load_state_dict(optimizer.state_dict())  # state goes where torch has it for its parameter
    except BaseException:
        undo()
        raise
    return undo


def _held_by(model: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and what belongs to them, buffers, and tensors that are neither: rotary tables."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                yield parameter
                yield from parameter_tensors(parameter)[1:]
        yield from (buffer for buffer in module._buffers.values() if buffer is not None)
        for name, value in vars(module).items():
            if name not in _TABLES:
                yield from (t for t in tensors_in(value) if not isinstance(t, nn.Parameter))


#: What torch itself keeps in a module.
_TABLES = frozenset(vars(nn.Module()))


def in_host_bytes(model: nn.Module) -> int:
    """Of the model's parameters, what lies in host memory, each storage once."""
    found = {
        storage._cdata: storage.nbytes()
        for parameter in model.parameters()
        for tensor in parameter_tensors(parameter)
        if is_host((storage := tensor.untyped_storage()).device)
    }
    return sum(found.values())
