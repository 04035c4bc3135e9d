"""Frozen weights that wait in host memory, each on the device only while something reads it.

Idea: a weight's tensor lies on room in host memory, so whoever reads it outside of a step (`state_dict()`, a check)
reads the right numbers. While its module's forward runs, the tensor lies on a copy on the device. What outlives the
forward must not hold the copy:

- What autograd saves of a weight is packed as the weight's name and is copied anew when backward asks.
- The tape does the same with what its ops read (`step.weights.lender_of`).
- A `torch.autograd.Function` that keeps a weight on its `ctx` (bitsandbytes' 4-bit product) has that tensor put on the
  host's room, and on a copy again while its backward runs.

Each copy is a tensor of its own, which goes when nobody holds it: nothing is ever written over it, so no reader can
meet another weight in its place. In the first steps copies are compared with the weight by checksum all the same, when
they come and when their reader is done.

Copies are waited for; where the plan copies ahead, they are made while the weights before are read (`fetching`). On
the CPU the room lies outside torch's allocator, as what is offloaded does. What was loaded
into host memory by mapping a file (safetensors) is read from there where a copy of all of it would take too much of the
machine's memory: the system keeps as much of it in memory as there is room for.

Noticed: a parameter that was replaced, given other data, or is to be trained. Refused, by `RuntimeError` as in
autograd: a weight that was changed between forward and backward.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tightfit import accelerator
from tightfit.core import InvalidInput, Phase, PlanMismatch, ReplayDiverged, Unsupported
from tightfit.levers.stream_weights.fetching import Fetching
from tightfit.step.checksum import checksum
from tightfit.step.geometry import Geometry, alone
from tightfit.step.mapped import Mapped
from tightfit.step.modes import quietly
from tightfit.step.parallel import Strategy, strategy_of
from tightfit.step.patches import MethodPatch
from tightfit.step.run import comes_back, is_elsewhere, reachable, stays_elsewhere
from tightfit.step.saved import without_history
from tightfit.step.weights import FrozenModule, frozen_modules, lend, lender_of, nodes_of_its_own

__all__ = ["Streamed", "streaming"]

#: So many copies of each weight are compared with it.
_COMPARED = 4

#: Of the host memory that is free, so much may be taken for copies of weights that lie in mapped files.
_MOST = 0.5


@dataclass
class Streamed:
    """What is counted while weights are streamed."""

    copies: int = 0
    copied_bytes: int = 0
    ahead: int = 0  # copies that had begun one request early
    dropped: int = 0  # that had begun, for a request that did not come
    resident: int = 0  # weights that stay on the device after all
    mapped_bytes: int = 0  # of weights that wait in the file that they were loaded from

    def __sub__(self, other: Streamed) -> Streamed:
        return Streamed(
            copies=self.copies - other.copies,
            copied_bytes=self.copied_bytes - other.copied_bytes,
            ahead=self.ahead - other.ahead,
            dropped=self.dropped - other.dropped,
            resident=self.resident - other.resident,
            mapped_bytes=self.mapped_bytes - other.mapped_bytes,
        )


class _Weight:
    """One weight in host memory: a parameter, or what belongs to one in 4 bits. A `Lender`."""

    def __init__(
        self, module: _Module, tensor: torch.Tensor, buffer: torch.Tensor | None, device: torch.device
    ) -> None:
        """`buffer`: the room in host memory; none: the tensor lies there and stays."""
        self.name, self.tensor, self.device = module.frozen.path or "a weight", tensor, device
        self.pool, self.stats, self.fetching = module.pool, module.stats, module.fetching
        self.was_on_device = tensor.device == device
        self.geometry = Geometry.of(tensor)
        self.size_bytes = tensor.untyped_storage().nbytes()
        self.buffer = _as_bytes(tensor) if buffer is None else alone(buffer[: self.size_bytes])
        self.room = self._on(self.buffer)
        stays_elsewhere(self.room)
        self._is_reachable = reachable(tensor)
        self.changes = 0  # that its version does not count
        self.to_compare = _COMPARED
        self.send()

    def _on(self, buffer: torch.Tensor) -> torch.Tensor:
        return self.geometry.on_storage(buffer.untyped_storage())

    @property
    def version(self) -> tuple[int, int]:
        return self.tensor._version, self.changes

    def send(self) -> None:
        """Copy what the tensor has to the room, and put the tensor there."""
        if not self.is_home():
            with quietly():
                self.room.copy_(self.tensor.detach())
                self.tensor.data = self.room
        self.changes += 1

    def is_home(self) -> bool:
        return self.tensor.data_ptr() == self.room.data_ptr()

    def bring_back(self) -> None:
        """Put the tensor on the device for good."""
        if self.is_home():
            with quietly():
                self.tensor.data = self._on(_copied(self.buffer, self.device))

    def leave(self) -> None:
        """Nobody has it wait any more. What never was on the device stays where it is, since the device need not have
        room for it. So does what Python's collector takes with its model, whenever that is: nobody will read it."""
        if self.was_on_device and self._is_reachable():
            self.bring_back()
        else:
            comes_back(self.room)

    def only_moves(self, function: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        """Does `function` give a tensor of this kind, on the weight's device or in host memory?"""
        with quietly():
            given = torch.empty(0, dtype=self.tensor.dtype)
            found = function(given)
        return found.dtype is given.dtype and found.device in (self.device, given.device)

    def fits(self) -> bool:
        """Can what the tensor has now go to the room?"""
        return self.is_home() or (Geometry.of(self.tensor) == self.geometry and self.geometry.storage_offset == 0)

    def wanted(self) -> list[_Weight]:
        """Itself, where backward asks for it alone."""
        return [self]

    def begin(self) -> Any:
        with quietly():
            return self.pool.begin_back(self.buffer, self.device)

    def drop(self, coming: Any) -> None:
        """Let go of a copy that was begun for nothing: neither its memory nor what it reads is written before."""
        coming.finish()
        coming.taken()
        self.stats.dropped += 1

    def fresh(self, coming: Any = None) -> torch.Tensor:
        """A copy on the device; `coming`: it was begun before."""
        with quietly():
            if coming is None:
                copy = self._on(_copied(self.buffer, self.device))
            else:
                coming.finish()
                copy = self._on(coming.taken())
                self.stats.ahead += 1
            if self.to_compare > 0:
                self.compare(copy)
                self.to_compare -= 1
        lend(copy, self)
        self.stats.copies += 1
        self.stats.copied_bytes += self.size_bytes
        return copy

    def copy(self, version: Any) -> torch.Tensor:
        self.require(version)
        return self.fresh()

    def saved(self, version: Any) -> torch.Tensor:
        """A copy for backward, which saved the weight."""
        self.require(version)
        return self.fetching.copies((Phase.BACKWARD, self), [self])[self]

    def require(self, version: Any) -> None:
        if version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{self.name}, which waits in host memory, was changed between forward and backward"
            )

    def compare(self, copy: torch.Tensor) -> None:
        """Raise `ReplayDiverged` for a copy that is not the weight any more."""
        if not _are_alike(self.room, copy):
            raise ReplayDiverged(
                f"{self.name} waits in host memory, and its copy on the device is not what it was while the step reads "
                "it: something writes it that torch does not see, or the copy went wrong; leave stream_weights out of "
                "the levers"
            )


def _are_alike(room: torch.Tensor, copy: torch.Tensor) -> bool:
    """Bit by bit; across devices by checksum, so that nothing large is copied."""
    with quietly():
        if room.device == copy.device:
            return torch.equal(_as_bytes(room), _as_bytes(copy))
        one, other = checksum(room), checksum(copy)
        return one is None or other is None or int(one) == int(other)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _copied(room: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The bytes of `room` on `device`: there when this returns."""
    return torch.empty(room.numel(), dtype=torch.uint8, device=device).copy_(room)


@dataclass
class _Away:
    """What autograd holds instead of a weight that it saves."""

    lender: _Weight
    geometry: Geometry
    version: Any

    def tensor(self) -> torch.Tensor:
        copy = self.lender.saved(self.version)
        with quietly():
            return self.geometry.on_storage(copy.untyped_storage())


class _Passed:
    """What somebody else's hook made of a saved tensor."""

    __slots__ = ("packed", "unpack")

    def __init__(self, packed: Any, unpack: Callable[[Any], Any]) -> None:
        self.packed, self.unpack = packed, unpack


def _pack(outer: Any, tensor: torch.Tensor) -> Any:
    lender = lender_of(tensor)
    # whoever else listens counts what is saved, whether or not it holds it
    packed: Any = without_history(tensor) if outer is None else _Passed(outer[0](tensor), outer[1])
    return _Away(lender, Geometry.of(tensor), lender.version) if isinstance(lender, _Weight) else packed


def _unpack(packed: Any) -> Any:
    if isinstance(packed, _Away):
        return packed.tensor()
    return packed.unpack(packed.packed) if isinstance(packed, _Passed) else packed


class _Module:
    """A module whose weights wait in host memory."""

    def __init__(
        self,
        frozen: FrozenModule,
        pool: Any,
        stats: Streamed,
        device: torch.device | None,
        mapped: Mapped,
        fetching: Fetching,
    ) -> None:
        self.frozen, self.pool, self.stats, self.device, self.mapped = frozen, pool, stats, device, mapped
        self.fetching = fetching
        self.weights: list[_Weight] = []
        self.changed: _Weight | None = None  # one that has another dtype or shape now
        self.look()

    def look(self) -> None:
        """The module's weights as they are now: what was replaced, or has other data, goes to host memory too. What has
        another dtype or shape is left where it is."""
        known = {id(weight.tensor): weight for weight in self.weights}
        now = self.frozen.tensors()
        if len(now) == len(known) and all(id(t) in known and known[id(t)].is_home() for t in now):
            return
        self.weights = []
        for tensor in now:
            weight = known.get(id(tensor))
            if lender_of(tensor) is not None:  # on a copy: the module is being called within its own call
                self.weights += [] if weight is None else [weight]
            elif weight is not None and weight.fits():
                if not weight.is_home():
                    weight.send()
                self.weights.append(weight)
            elif weight is None:
                self._take(tensor)
        for weight in known.values():  # trained from now on, or no longer the module's: back where it was
            if weight not in self.weights:
                weight.bring_back()
        self.changed = next((weight for weight in known.values() if not weight.fits()), self.changed)

    def _take(self, tensor: torch.Tensor) -> None:
        if is_elsewhere(tensor):
            raise InvalidInput("the model's weights are streamed by a plan that is in force already; remove it first")
        with quietly():  # a frame around this module compares its ops with those of the replay
            device = self.device or tensor.device
            in_file = tensor in self.mapped
            buffer = None if in_file else self.pool.room_for(tensor, device)
            if in_file:
                self.stats.mapped_bytes += tensor.untyped_storage().nbytes()
            elif buffer is None:
                self.stats.resident += 1
                tensor.data = tensor.detach().to(device)
                return
            self.weights.append(_Weight(self, tensor, buffer, device))

    def wanted(self) -> list[_Weight]:
        """The weights that its next call, or its backward, asks for."""
        return [weight for weight in self.weights if weight.is_home()]

    @contextlib.contextmanager
    def there(self) -> Iterator[dict[_Weight, torch.Tensor]]:
        """The weights are on the device."""
        copies = self.fetching.copies((Phase.FORWARD, self), self.wanted())
        with quietly():
            for weight, copy in copies.items():
                weight.tensor.data = copy
        try:
            yield copies
        except BaseException:
            self.fetching.forget()  # what was to come next need not come
            raise
        finally:
            with quietly():
                for weight, copy in copies.items():
                    if weight.tensor.untyped_storage()._cdata == copy.untyped_storage()._cdata:  # else replaced
                        weight.tensor.data = weight.room

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.look()
        if self.changed is not None:
            raise PlanMismatch(
                f"a weight of {self.changed.name} waits in host memory under the plan and has another dtype or shape "
                "now: remove the plan, change the model, and plan again"
            )
        with self.there() as copies:
            if not torch.is_grad_enabled():
                out = original(*args, **kwargs)
            else:
                outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
                with torch.autograd.graph.saved_tensors_hooks(functools.partial(_pack, outer), _unpack):
                    out = original(*args, **kwargs)
                for node in nodes_of_its_own(out, (args, kwargs)):
                    self._follow(node)
            _compared(copies)
        return out

    def apply(
        self, original: Callable[..., Any], function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> Any:
        """`nn.Module._apply`, which `to`, `cuda` and `cpu` call. What waits in host memory is not sent to the device
        that it is used on, where there need not be room for all of it. Whatever else is done to it is done."""
        own = self.frozen.module._parameters
        waiting = {id(weight.tensor) for weight in self.weights if weight.is_home() and weight.only_moves(function)}
        hidden = {name: p for name, p in own.items() if p is not None and id(p) in waiting}
        own.update(dict.fromkeys(hidden))
        try:
            return original(function, recurse)
        finally:
            own.update(hidden)

    def _follow(self, node: Any) -> None:
        """`node` holds, or may reach, weights of this module: they are on the device while its backward runs."""
        held = [(t, weight, Geometry.of(t)) for t in _tensors_on(node) if isinstance(weight := lender_of(t), _Weight)]
        versions = {weight: weight.version for weight in self.weights}
        with quietly():
            for tensor, weight, geometry in held:
                tensor.data = geometry.on_storage(weight.room.untyped_storage())
        opened: list[contextlib.ExitStack] = []

        def before(*_: Any) -> None:
            for weight, version in versions.items():
                weight.require(version)
            copies = self.fetching.copies((Phase.BACKWARD, self), versions)
            undo = contextlib.ExitStack()
            with quietly():
                targets = [(t, geometry, weight) for t, weight, geometry in held if weight in copies]
                # a parameter's own tensor is read by nobody in backward; the others are what quantised ones carry
                targets += [(w.tensor, w.geometry, w) for w in copies if not isinstance(w.tensor, nn.Parameter)]
                for tensor, geometry, weight in targets:
                    undo.callback(_put, tensor, tensor.data)
                    tensor.data = geometry.on_storage(copies[weight].untyped_storage())
            undo.callback(_compared, copies)
            opened.append(undo)

        def after(*_: Any) -> None:
            opened.pop().close()

        node.register_prehook(before)
        node.register_hook(after)


def _put(tensor: torch.Tensor, data: torch.Tensor) -> None:
    with quietly():
        tensor.data = data


def _compared(copies: dict[_Weight, torch.Tensor]) -> None:
    """The readers of the copies are done: they are as they came."""
    for weight, copy in copies.items():
        if weight.to_compare > 0:
            weight.compare(copy)


def _tensors_on(node: Any) -> list[torch.Tensor]:
    """The tensors that a `ctx` holds as its attributes, alone or in a list."""
    found = []
    for value in vars(node).values():
        for each in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(each, torch.Tensor) and not isinstance(each, nn.Parameter):
                found.append(each)
    return found


def _left_in_files(weights: Sequence[torch.Tensor], device: torch.device | None) -> Mapped:
    """The mapped files whose weights are not copied into memory of their own: those of a model that is being put on
    `device`, if copies would take more than `_MOST` of the memory that is free."""
    mapped = Mapped.now() if device is not None else Mapped(())
    copied_bytes = sum(w.untyped_storage().nbytes() for w in weights if w in mapped)
    free_bytes = accelerator.free_bytes(accelerator.HOST)
    return mapped if free_bytes is not None and copied_bytes > _MOST * free_bytes else Mapped(())


@contextlib.contextmanager
def streaming(
    model: nn.Module,
    paths: Sequence[str],
    pool: Any,
    stats: Streamed,
    device: torch.device | None = None,
    *,
    ahead: bool = False,
) -> Iterator[None]:
    """The frozen weights of the modules at `paths` wait in room of `pool`. What finds no room there stays on the
    device. `device`: the weights are to be used there, wherever they lie now. `ahead`: copies begin one request early.
    """
    if strategy_of(model) is not Strategy.ONE:
        raise Unsupported("the plan streams weights, which several processes cannot yet: plan without stream_weights")
    known = {each.path: each for each in frozen_modules(model)}
    lacking = next((path for path in paths if path not in known), None)
    if lacking is not None:
        raise PlanMismatch(
            f"the plan streams the frozen weights of {lacking!r}, which this model does not have, trains, or ties to "
            "others: the plan was made for another model; make it anew"
        )
    mapped = _left_in_files([t for path in paths for t in known[path].tensors()], device)
    opened: list[_Module] = []
    patches: list[MethodPatch] = []
    stats.mapped_bytes = 0  # by what is in force now
    fetching = Fetching(ahead=ahead)
    try:
        for path in paths:
            module = _Module(known[path], pool, stats, device, mapped, fetching)
            opened.append(module)
            patches.append(MethodPatch(known[path].module, functools.partial(_patched, module)))
            patches.append(MethodPatch(known[path].module, functools.partial(_sent, module), "_apply"))
        yield
    finally:
        fetching.close()
        for patch in reversed(patches):
            patch.undo()
        for module in opened:
            module.look()
            for weight in module.weights:
                weight.leave()


def _patched(module: _Module, original: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(module.forward, original)


def _sent(module: _Module, original: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(module.apply, original)
