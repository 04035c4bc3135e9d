"""Run a step and leave no mark on the model.

Invariant: `undisturbed` gives back gradients, buffers, attributes and every random state exactly as they were, also
when the step inside raises.
"""

from __future__ import annotations

import contextlib
import functools
import random
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tightfit import accelerator
from tightfit.step.modes import kept_in_force
from tightfit.step.ops import changes_nothing
from tightfit.step.parallel import (
    forget_step,
    local_of,
    require_no_step_under_way,
    resizes_told,
)
from tightfit.step.run import batch_tensors, is_elsewhere, tensors_in


@contextlib.contextmanager
def undisturbed(model: nn.Module, batch: Any = None) -> Iterator[Snapshot]:
    """Run steps inside; afterwards gradients (those of the batch's leaves too), buffers, plain attributes and random
    states are what they were, and so is whatever the ops of a step wrote that `Restart` was told of.

    Yields `restart`, which puts the model at the start of a step again, so that every pass inside sees the same
    step. A parameter that came with a gradient has a zero one inside, so that accumulation shows its true
    memory; one that came without starts without.
    """
    restart = Snapshot(model, batch)
    restart()
    try:
        with kept_in_force():
            yield restart
    finally:
        restart.give_back()


#: Methods that are called with each parameter that is given a gradient here. They keep nothing alive.
_placed: list[weakref.WeakMethod[Callable[[torch.Tensor], None]]] = []


@contextlib.contextmanager
def gradients_placed(told: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """`told`, a method, is called meanwhile with each parameter that is given another gradient for a pass: where
    gradients wait off the device, that one does too."""
    known = weakref.WeakMethod(told)
    _placed.append(known)
    try:
        yield
    finally:
        _placed.remove(known)


def _place(parameter: torch.Tensor, gradient: torch.Tensor | None) -> None:
    if gradient is not None and gradient.device != parameter.device:  # it waits elsewhere, and torch takes none so
        gradient.data = gradient.data.to(parameter.device)
    parameter.grad = gradient
    for known in _placed if gradient is not None else ():
        told = known()
        if told is not None:
            told(parameter)


_PLAIN = (bool, int, float, complex, str, type(None), torch.Tensor)


_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


#: The attributes by which a model's own checkpointing is on: those of transformers and diffusers, and of timm.
CHECKPOINTING_SWITCHES = ("gradient_checkpointing", "grad_checkpointing")


#: Whoever puts a plan or a trace in force changes these, and takes that back.
_OF_PLANS = ("forward", *CHECKPOINTING_SWITCHES)


#: Ops that write their running statistics without saying so in their schema.
_HIDDEN_WRITES = "running_"


class Snapshot:
    """What a model was like at the start; called, it puts that back.

    What is small or hidden is copied beforehand: buffers, scalar attributes, random states. Weights are not: whoever
    runs the first passes says of each op `before` and `after` it (`watching` does), and what an op is about to write
    that was there before the passes is copied then, as copy on write does. The same tells of generators and of leaves
    that only the loss function knows.
    """

    def __init__(self, model: nn.Module, batch: Any = None) -> None:
        require_no_step_under_way(model)
        self._forget = functools.partial(forget_step, model)
        self._forget()
        leaves = [t for t in batch_tensors(batch) if t.is_leaf and t.requires_grad]
        self._gradients: list[tuple[torch.Tensor, torch.Tensor | None]] = [
            (p, p.grad) for p in (*model.parameters(), *leaves)
        ]
        self._leaves = {id(p) for p, _ in self._gradients}
        self._buffers = [(b, b.detach().clone(), b._version) for b in model.buffers() if not b.is_meta]
        # weights that wait off the device are moved by whoever put them there
        self._data = [(p, p.data) for p in model.parameters() if _storage_of(p) is not None and not is_elsewhere(p)]
        modules = list(model.modules())
        tables: list[Any] = [table for module in modules for table in (module._parameters, module._buffers)]
        # a first forward may install hooks and note that it did (transformers, for outputs it is asked for): they go
        # with the note, or every pass would install them once more
        tables += [table for module in modules for name in _HOOKS if (table := vars(module).get(name)) is not None]
        # those of a TorchScript module are no dicts and cannot be assigned to
        self._tables = [(table, dict(table)) for table in tables if isinstance(table, dict)]
        self._attributes = [(m, {k: v for k, v in vars(m).items() if k not in _OF_PLANS}) for m in modules]
        self._states = random_states()
        self._generators: dict[int, tuple[torch.Generator, torch.Tensor]] = {}
        for _, attributes in self._attributes:
            self._note_generators(attributes.values())
        self._made: set[int] = set()
        self._written: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __call__(self) -> None:
        self._forget()
        for parameter, gradient in self._gradients:
            parameter.grad = None
            if gradient is not None:
                _place(parameter, torch.zeros_like(gradient, device=parameter.device))
        self._put_back()

    def give_back(self) -> None:
        """As it was before the first pass, gradients included."""
        self._forget()
        for parameter, gradient in self._gradients:
            _place(parameter, gradient)
        self._put_back()

    def _put_back(self) -> None:
        for module, before in self._attributes:
            now = vars(module)
            made = [n for n, v in now.items() if n not in before and n not in _OF_PLANS and isinstance(v, _PLAIN)]
            for name in made:
                del now[name]
            for name, value in before.items():
                if isinstance(value, _PLAIN) and now.get(name, _PLAIN) is not value:
                    now[name] = value
        for table, content in self._tables:
            if table.keys() != content.keys() or any(table[name] is not each for name, each in content.items()):
                table.clear()
                table.update(content)
        for parameter, data in self._data:
            if _storage_of(parameter) != _storage_of(data) and not is_elsewhere(parameter):
                parameter.data = data
        with torch.no_grad():
            for storage, bytes_before in self._written.values():
                storage.copy_(bytes_before)
            for buffer, saved, version in self._buffers:
                if buffer.layout is not torch.strided:  # torch does not compare sparse ones
                    if buffer._version != version:
                        buffer.copy_(saved)
                elif not torch.equal(buffer, saved):
                    buffer.copy_(saved)
        for generator, state in self._generators.values():
            generator.set_state(state)
        restore_random_states(self._states)

    # -- what the ops of a step tell

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Learn from the ops that run inside; not for a pass that is measured."""
        with resizes_told(lambda storage, _: self.filled(storage)), _Watching(self):
            yield

    def before(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        """`func` is about to run."""
        if changes_nothing(func, args):
            return
        self._note_generators((*args, *kwargs.values()))
        for tensor in tensors_in((args, kwargs)):
            if not (tensor.requires_grad and tensor.is_leaf) or id(tensor) in self._leaves:
                continue
            if _storage_of(tensor) not in self._made:
                self._leaves.add(id(tensor))
                self._gradients.append((tensor, tensor.grad))
                if tensor.grad is not None:  # this pass would add to it
                    with torch.no_grad():
                        tensor.grad = torch.zeros_like(tensor.grad)
        schema = func._schema
        for position, argument in enumerate(schema.arguments):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes or argument.name.startswith(_HIDDEN_WRITES):
                target = kwargs.get(argument.name, args[position] if position < len(args) else None)
                for tensor in tensors_in(target):
                    self._keep(tensor)

    def after(self, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        """The op has run and given `out`."""
        made = {_storage_of(tensor) for tensor in tensors_in(out)}
        if made:
            made -= {_storage_of(tensor) for tensor in tensors_in((args, kwargs))}
            self._made.update(address for address in made if address is not None)

    def filled(self, storage: torch.UntypedStorage) -> None:
        """What is in it was made in this pass, and goes before its end."""
        self._made.add(storage._cdata)

    def _keep(self, tensor: torch.Tensor) -> None:
        address = _storage_of(tensor)
        if address is None or address in self._made or address in self._written or tensor.is_meta:
            return
        if any(p.grad is not None and _storage_of(p.grad) == address for p, _ in self._gradients):
            return  # the zero gradients of a pass; the real ones are out of reach
        storage = local_of(tensor).untyped_storage()
        self._written[address] = storage, storage.clone()

    def _note_generators(self, items: Iterable[Any]) -> None:
        for item in items:
            if isinstance(item, torch.Generator) and id(item) not in self._generators:
                self._generators[id(item)] = item, item.get_state()


class _Watching(TorchDispatchMode):
    def __init__(self, restart: Snapshot) -> None:
        super().__init__()
        self.restart = restart

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.restart.before(func, args, kwargs or {})
        out = func(*args, **(kwargs or {}))
        self.restart.after(args, kwargs or {}, out)
        return out


def _storage_of(tensor: torch.Tensor) -> int | None:
    """The address of its storage; None for a tensor that has none of its own."""
    if tensor.layout is not torch.strided:
        return None
    try:
        return int(local_of(tensor).untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError, ValueError):
        return None


def random_states() -> dict[str, Any]:
    """Every generator's state: torch's on each device, Python's, NumPy's. The host's is kept outside of torch's memory,
    whose peak may be measured meanwhile."""
    states: dict[str, Any] = {
        "torch": torch.get_rng_state().numpy().copy(),
        "cards": accelerator.drawn_states(),
        "python": random.getstate(),
    }
    with contextlib.suppress(ImportError):
        import numpy

        states["numpy"] = numpy.random.get_state()
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(torch.from_numpy(states["torch"]))
    random.setstate(states["python"])
    accelerator.put_back_states(states["cards"])
    if "numpy" in states:
        import numpy

        numpy.random.set_state(states["numpy"])
