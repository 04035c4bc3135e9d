"""One call of a unit: run it once holding less, run it again when backward asks.

Idea: autograd's own graph stays as it is. Saved-tensor hooks hand it either the tensor (held) or an empty
slot; the first empty slot that backward asks for makes the frame *replay*, which runs the unit's Python again
and fills the slots in the order in which they were made. A dispatch mode watches both runs: in forward it
stores the kept values that the replay will read, in replay it runs the live ops, hands out stored values for
kept ones and ghosts for dead ones, and stops as soon as the last slot is filled.

Invariants:
- A slot is only ever filled with what the same op sequence made; another sequence is `ReplayDiverged`.
- Anything unexpected in a planned replay is answered by replaying the whole unit, counted in `Stats`.
- Tensors that were held or read again are checked for in-place changes in between, as autograd itself does.

Refused: a unit that changes what it is given (`Unsupported`), a replay after the graph was freed (torch's own
`RuntimeError`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tightfit.core import Program, ReplayDiverged, Unsupported
from tightfit.engine.ghost import Ghost, Shape
from tightfit.plan.program import Recipe, Rerun
from tightfit.step import tensors_in
from tightfit.trace import BATCH_NORMS, is_random, is_uncounted, op_name

_CAST = torch.ops.aten._to_copy.default


@dataclass(slots=True)
class Stats:
    """What the engine did since `apply`. Counts, never estimates."""

    frames: int = 0  # forwards of planned units
    replays: int = 0  # frames that backward ran again
    fallbacks: int = 0  # frames that had to be replayed whole although the plan kept something
    rerun_ops: int = 0  # ops that replays really ran

    def __sub__(self, other: Stats) -> Stats:
        return Stats(*(a - b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class FramePlan:
    """A unit's program with its recipe, in the form that the modes read."""

    names: tuple[str, ...]
    recipe: Recipe
    wanted: tuple[bool, ...]

    @classmethod
    def of(cls, program: Program, recipe: Recipe) -> FramePlan:
        return cls(names=tuple(step.name for step in program.steps), recipe=recipe, wanted=program.wanted)


class _Stop(BaseException):
    """Ends a replay whose work is done. No `Exception`, so that the model's own handlers do not catch it."""


class _Differs(Exception):
    """The replay called another op than the forward did."""


class _Active(threading.local):
    depth = 0


_active = _Active()


def is_active() -> bool:
    """Is this thread inside a frame's forward or replay? Then inner units run as they are."""
    return _active.depth > 0


@contextlib.contextmanager
def _activated() -> Iterator[None]:
    _active.depth += 1
    try:
        yield
    finally:
        _active.depth -= 1


# --------------------------------------------------------------------------------------------- surroundings


class _Surroundings:
    """The thread-wide settings that decide which ops a forward calls; restored for its replay."""

    __slots__ = ("attention", "autocast", "default_dtype")

    _ATTENTION = (
        (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
        (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
        (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
        (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    )

    def __init__(self, device_types: Sequence[str]) -> None:
        cache = torch.is_autocast_cache_enabled()
        self.autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), cache) for kind in device_types
        ]
        self.attention = [enabled() for enabled, _ in self._ATTENTION]
        self.default_dtype = torch.get_default_dtype()

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        now = [enabled() for enabled, _ in self._ATTENTION]
        dtype = torch.get_default_dtype()
        with contextlib.ExitStack() as stack:
            for kind, enabled, cast_dtype, cache in self.autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=cast_dtype, cache_enabled=cache))
            try:
                self._attention(self.attention, now)
                if dtype != self.default_dtype:
                    torch.set_default_dtype(self.default_dtype)
                yield
            finally:
                self._attention(now, self.attention)
                if dtype != self.default_dtype:
                    torch.set_default_dtype(dtype)

    def _attention(self, wanted: list[bool], present: list[bool]) -> None:
        for want, have, (_, switch) in zip(wanted, present, self._ATTENTION, strict=True):
            if want != have:
                switch(want)


def _generator_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Generator:
    """The generator that a random op draws from: the one it was given, else its device's own."""
    for item in (*args, *kwargs.values()):
        if isinstance(item, torch.Generator):
            return item
    device = kwargs.get("device")
    if device is None:
        tensors = tensors_in((args, kwargs))
        device = tensors[0].device if tensors else torch.device("cpu")
    device = torch.device(device)
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    if device.type == "meta":
        return torch.default_generator
    raise Unsupported(f"random numbers on {device.type} cannot be drawn again: its generator is not known")


# ----------------------------------------------------------------------------------------- saved tensors


class _Held:
    """A saved tensor that the plan keeps, with the version that it had."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.version = _version(tensor)

    def get(self) -> torch.Tensor:
        if _version(self.tensor) != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a {self.tensor.dtype} tensor of shape {list(self.tensor.shape)} is at version "
                f"{_version(self.tensor)}; expected version {self.version}"
            )
        return self.tensor


class _Slot:
    """A saved tensor that will be made again."""

    __slots__ = ("__weakref__", "dtype", "frame", "index", "shape", "tensor")

    def __init__(self, frame: Frame, index: int, tensor: torch.Tensor) -> None:
        self.frame = frame
        self.index = index
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.tensor: torch.Tensor | None = None

    def get(self) -> torch.Tensor:
        if self.tensor is None:
            self.frame.replay(self.index)
        tensor = self.tensor
        if tensor is None:
            raise ReplayDiverged(f"{self.frame.name}: the replay did not make saved tensor {self.index} again")
        if _graph_is_kept():
            self.tensor = None  # the next backward through this graph makes it once more
        return tensor


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _graph_is_kept() -> bool:
    """Will there be another backward through the graph that is asking? Outside backward: it may be."""
    if torch._C._current_graph_task_id() == -1:
        return True
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def _unpack(packed: _Held | _Slot) -> torch.Tensor:
    return packed.get()


def _never_read(_: Any) -> torch.Tensor:
    raise RuntimeError("a replay's own graph is never run backward")


# ------------------------------------------------------------------------------------------------- frame


class Frame:
    """One call of a unit. `plan=None` means: hold nothing but the inputs, replay everything."""

    def __init__(
        self,
        name: str,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        plan: FramePlan | None,
        stats: Stats,
        module: nn.Module | None = None,
    ) -> None:
        self.name, self.forward, self.plan, self.stats = name, forward, plan, stats
        self.args, self.kwargs = args, kwargs
        self.on_plan = plan is not None
        self.released = False
        self.funcs: list[Any] = []  # the forward's ops, as they came
        self.outlines: dict[int, Any] = {}
        self.stored: dict[int, tuple[torch.Tensor, int]] = {}  # value -> tensor, version at the frame's end
        self.states: dict[int, torch.Tensor] = {}
        self.first_states: list[tuple[torch.Generator, torch.Tensor]] = []
        # autocast's copies of weights: whoever saved one for backward has it still, so replay need not cast again
        self.casts: dict[int, weakref.ref[torch.Tensor]] = {}
        self.foreign: dict[str, Any] = {}  # Python's and NumPy's random states at the start
        self.slots: dict[int, weakref.ref[_Slot]] = {}
        self.packed_at: list[int] = []  # per saved tensor: how many ops had run when it was saved
        # Some ops write a tensor that autograd has saved already (rrelu its noise): a replay must not stop before that.
        # Addresses can be used again, so this may be later than need be.
        self.saved_addresses: set[int] = set()
        self.complete_at = 0  # ops to run until every saved tensor has its final content
        self.observe: Callable[[torch.Tensor], None] | None = None  # told of every tensor that is saved
        inputs = tensors_in((args, kwargs))
        kinds = dict.fromkeys(["cpu", *(t.device.type for t in inputs if t.device.type != "meta")])
        self.surroundings = _Surroundings(list(kinds))
        own = [] if module is None else list(module.parameters())
        self.versions = [(t, _version(t)) for t in (*inputs, *own)]

    # -- forward

    def run(self) -> Any:
        """The unit's output, with autograd holding slots instead of what the plan drops."""
        self.stats.frames += 1
        if self.plan is None:  # planned units that draw from Python or NumPy are pinned, so only regions need this
            self.foreign = _foreign_random_states()
        with _activated(), torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack), _Watch(self):
            out = self.forward(*self.args, **self.kwargs)
        if self.plan is not None and self.on_plan:
            same_length = len(self.funcs) == len(self.plan.names) and len(self.packed_at) == len(self.plan.wanted)
            if not same_length:
                self.leave_plan()
        for tensor, version in self.versions:
            if _version(tensor) != version:
                raise Unsupported(
                    f"{self.name} changes a tensor that it is given in place, so it cannot be run again; "
                    "leave it out of the units or clone the tensor first"
                )
        self.stored = {value: (tensor, _version(tensor)) for value, (tensor, _) in self.stored.items()}
        return out

    def leave_plan(self) -> None:
        """This forward is not the one that was planned: hold what is held, replay the whole unit later."""
        self.on_plan = False
        self.outlines.clear()
        self.stored.clear()
        self.states.clear()

    def _pack(self, tensor: torch.Tensor) -> _Held | _Slot:
        index = len(self.packed_at)
        self.packed_at.append(len(self.funcs))
        self.saved_addresses.add(_address(tensor))
        if self.observe is not None:
            self.observe(tensor)
        if self.on_plan:
            assert self.plan is not None
            drop = self.plan.recipe.drop
            if index >= len(drop) or not drop[index]:
                return _Held(tensor)
        slot = _Slot(self, index, tensor)
        self.slots[index] = weakref.ref(slot)
        return slot

    # -- replay

    def replay(self, asked: int) -> None:
        """Fill every slot that autograd still holds."""
        if self.released:
            raise RuntimeError(
                f"{self.name}: trying to backward through the graph a second time, or to read a saved tensor that "
                "the planned step never read, after its inputs were freed; use retain_graph=True for the first "
                "backward, or make the plan with the loss that is trained"
            )
        for tensor, version in self.versions:
            if _version(tensor) != version:
                raise RuntimeError(
                    f"{self.name}: one of the variables needed for gradient computation has been modified by an "
                    f"inplace operation between forward and backward: shape {list(tensor.shape)} is at version "
                    f"{_version(tensor)}; expected version {version}"
                )
        self.stats.replays += 1
        if self.on_plan:
            assert self.plan is not None
            if any(_version(tensor) != version for tensor, version in self.stored.values()):
                self.leave_plan()  # somebody wrote over a kept value; its making can still be run again
                self.stats.fallbacks += 1
            elif not self.plan.wanted[asked]:
                self.leave_plan()  # backward reads more than it did when the plan was made
                self.stats.fallbacks += 1
        elif self.plan is not None:
            self.stats.fallbacks += 1
        if self.on_plan:
            try:
                self._replay(planned=True)
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception:
                # Whatever went wrong with ghosts in the way (one was read, code looked at a tensor's type),
                # the same Python without ghosts is the forward itself. Nothing that was filled is trusted.
                self._empty_slots()
                self.stats.fallbacks += 1
                self._replay(planned=False)
        else:
            self._replay(planned=False)
        if not _graph_is_kept() and not self._has_empty_slots():
            self.release()

    def release(self) -> None:
        """Let go of everything but the filled slots."""
        self.released = True
        self.args, self.kwargs = (), {}
        self.versions, self.funcs, self.first_states = [], [], []
        self.outlines, self.stored, self.states = {}, {}, {}
        self.saved_addresses = set()

    def _has_empty_slots(self) -> bool:
        """Does autograd still hold a slot that this replay left out, because the planned step never read it?"""
        return any((slot := reference()) is not None and slot.tensor is None for reference in self.slots.values())

    def _empty_slots(self) -> None:
        for reference in self.slots.values():
            if (slot := reference()) is not None:
                slot.tensor = None

    def _replay(self, planned: bool) -> None:
        waiting: dict[int, _Slot] = {}
        for index, reference in self.slots.items():
            slot = reference()
            if slot is not None and slot.tensor is None and not (planned and not self._is_wanted(index)):
                waiting[index] = slot
        mode = _Replay(self, planned)
        refilled = 0

        def refill(tensor: torch.Tensor) -> int:
            nonlocal refilled
            index = refilled
            refilled += 1
            slot = waiting.pop(index, None)
            if index >= len(self.packed_at) or mode.count != self.packed_at[index]:
                raise _Differs(f"saved tensor {index} is not saved by the same op")
            if slot is not None:
                if tensor.shape != slot.shape or tensor.dtype != slot.dtype:
                    raise ReplayDiverged(
                        f"{self.name}: saved tensor {index} was {tuple(slot.shape)} {slot.dtype} in forward and is "
                        f"{tuple(tensor.shape)} {tensor.dtype} in replay"
                    )
                if isinstance(tensor, Ghost):
                    raise ReplayDiverged(f"{self.name}: saved tensor {index} is needed, but the plan left it out")
                slot.tensor = tensor.detach()
                mode.filled = not waiting
                mode.stop_if_done()
            return 0

        args, kwargs = pytree.tree_map_only(torch.Tensor, _cut_off, (self.args, self.kwargs))
        generators = list(dict.fromkeys(generator for generator, _ in self.first_states))
        saved_states = [generator.get_state() for generator in generators]
        foreign = _foreign_random_states() if self.foreign else {}
        hooks = torch.autograd.graph.saved_tensors_hooks(refill, _never_read)
        try:
            with _activated(), torch.enable_grad(), self.surroundings.restored(), hooks, mode:
                _restore_foreign_random_states(self.foreign)
                self.forward(*args, **kwargs)
        except _Stop:
            pass
        except _Differs as error:
            raise ReplayDiverged(
                f"{self.name} does not do the same twice: {error}; its gradients would be wrong, so backward stops here"
            ) from None
        finally:
            for generator, state in zip(generators, saved_states, strict=True):
                generator.set_state(state)
            _restore_foreign_random_states(foreign)
            self.stats.rerun_ops += mode.ran
        if waiting:
            raise ReplayDiverged(
                f"{self.name}: {len(waiting)} of {len(self.packed_at)} saved tensors of the forward were not made again"
            )

    def _is_wanted(self, index: int) -> bool:
        assert self.plan is not None
        return self.plan.wanted[index]


def _foreign_random_states() -> dict[str, Any]:
    states: dict[str, Any] = {"python": random.getstate()}
    if "numpy" in sys.modules:
        states["numpy"] = sys.modules["numpy"].random.get_state()
    return states


def _restore_foreign_random_states(states: Mapping[str, Any]) -> None:
    if "python" in states:
        random.setstate(states["python"])
    if "numpy" in states:
        sys.modules["numpy"].random.set_state(states["numpy"])


def _cut_off(tensor: torch.Tensor) -> torch.Tensor:
    """The same data without its history, so that the replay's graph ends at the unit's inputs."""
    if tensor.is_leaf and not tensor.requires_grad:
        return tensor
    return tensor.detach().requires_grad_(tensor.requires_grad)


# ------------------------------------------------------------------------------------------------- modes


class _Watch(TorchDispatchMode):
    """A frame's forward: note the ops, compare them with the plan, store what replay will read."""

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self.frame = frame

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        frame, plan = self.frame, self.frame.plan
        if is_uncounted(func, args):
            out = func(*args, **kwargs)
            if func is _CAST:
                frame.casts[id(args[0])] = weakref.ref(out)
            return out
        index = len(frame.funcs)
        frame.funcs.append(func)
        expected = plan.names[index] if plan is not None and index < len(plan.names) else ""
        if frame.on_plan and expected != op_name(func):
            frame.leave_plan()
        if is_random(func, args, kwargs):
            generator = _generator_of(args, kwargs)
            first = all(known is not generator for known, _ in frame.first_states)
            again = plan is not None and frame.on_plan and index in plan.recipe.states
            if first or again:
                state = generator.get_state()
                if first:
                    frame.first_states.append((generator, state))
                if again:
                    frame.states[index] = state
        out = func(*args, **kwargs)
        if func._schema.is_mutable and any(
            _address(t) in frame.saved_addresses for t in tensors_in(_written_arguments(func, args, kwargs))
        ):
            frame.complete_at = index + 1
        if plan is not None and frame.on_plan and plan.recipe.rerun[index] is Rerun.SKIP:
            frame.outlines[index] = _outline(out, _written_arguments(func, args, kwargs))
            for position, value in plan.recipe.store[index]:
                frame.stored[value] = (_tensor_at(out, position).detach(), 0)
        return out


class _Replay(TorchDispatchMode):
    """The replay of a frame: run live ops, stand in for the rest, refuse another op sequence."""

    def __init__(self, frame: Frame, planned: bool) -> None:
        super().__init__()
        self.frame, self.planned = frame, planned
        self.count = self.ran = 0
        self.filled = False  # has every slot that waits its tensor?
        self.drawn: set[int] = set()
        # what a whole replay, which has no program to go by, learns about storages as it runs
        self.made: set[int] = set()
        self.read: set[int] = set()
        self.changed: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        frame = self.frame
        if is_uncounted(func, args):
            if func is _CAST and (known := frame.casts.get(id(args[0]))) is not None and (cast := known()) is not None:
                return cast.detach()
            return func(*args, **kwargs)
        index = self.count
        self.count += 1
        if index >= len(frame.funcs) or frame.funcs[index] is not func:
            expected = op_name(frame.funcs[index]) if index < len(frame.funcs) else "the end"
            raise _Differs(f"op {index} was {expected} in forward and is {op_name(func)} in replay")
        out = self._result(index, func, args, kwargs)
        self.stop_if_done()
        return out

    def stop_if_done(self) -> None:
        """End the replay once every slot is filled and nothing more is written to what fills them."""
        if self.filled and self.count >= self.frame.complete_at:
            raise _Stop

    def _result(self, index: int, func: Any, args: Any, kwargs: Any) -> Any:
        frame = self.frame
        if self.planned:
            assert frame.plan is not None
            if frame.plan.recipe.rerun[index] is Rerun.SKIP:
                return self._stand_in(index, func, args, kwargs)
            if index in frame.states:
                _generator_of(args, kwargs).set_state(frame.states[index])
        elif is_random(func, args, kwargs):
            self._rewind(_generator_of(args, kwargs))
        self.ran += 1
        if op_name(func) in BATCH_NORMS:
            args, kwargs = _spare_running_statistics(func, args, kwargs)
        elif not self.planned and (skipped := self._outside_effect(func, args, kwargs)) is not None:
            return skipped
        out = func(*args, **kwargs)
        if not self.planned:
            self.made.update(_address(t) for t in tensors_in(out))
        return out

    def _rewind(self, generator: torch.Generator) -> None:
        for known, state in self.frame.first_states:
            if known is generator and id(generator) not in self.drawn:
                self.drawn.add(id(generator))
                generator.set_state(state)

    def _stand_in(self, index: int, func: Any, args: Any, kwargs: Any) -> Any:
        frame = self.frame
        assert frame.plan is not None
        stored = {position: frame.stored[value][0] for position, value in frame.plan.recipe.store[index]}
        return _filled(frame.outlines[index], stored, _written_arguments(func, args, kwargs))

    def _outside_effect(self, func: Any, args: Any, kwargs: Any) -> Any:
        """In a whole replay: what an op that writes outside storage returns, without writing it again.

        None when the op writes nothing from outside. Raises `ReplayDiverged` when the unit also reads what it
        writes there, since the value that it read is gone.
        """
        addresses = {_address(t) for t in tensors_in((args, kwargs))}
        written: set[int] = set()
        if func._schema.is_mutable:
            written = {_address(t) for t in tensors_in(_written_arguments(func, args, kwargs))} - self.made
        outside = addresses - self.made
        if written & self.read or (self.changed & outside) - written:
            raise ReplayDiverged(
                f"{self.frame.name} reads a tensor from outside that it also changes in place ({op_name(func)}): "
                "what it read is gone, so it cannot be run again"
            )
        if written:
            self.changed |= written
            arguments = _written_arguments(func, args, kwargs)
            if len(func._schema.returns) > len(arguments):
                raise ReplayDiverged(
                    f"{self.frame.name} calls {op_name(func)}, which makes a result and changes a tensor from outside "
                    "at once, so it cannot be run again"
                )
            return arguments[0] if len(func._schema.returns) == 1 else tuple(arguments)
        self.read |= outside
        return None


def _address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else id(tensor)


def _spare_running_statistics(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A batch norm's arguments with copies of its running statistics: they were updated in forward."""

    def spare(name: str, value: Any) -> Any:
        return value.clone() if name.startswith("running_") and isinstance(value, torch.Tensor) else value

    names = [argument.name for argument in func._schema.arguments]
    return (
        tuple(spare(name, value) for name, value in zip(names, args, strict=False)),
        {name: spare(name, value) for name, value in kwargs.items()},
    )


def _written_arguments(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an in-place or out= op writes, in the order of its schema."""
    if not func._schema.is_mutable:
        return []
    return [
        kwargs.get(argument.name, args[position] if position < len(args) else None)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _tensor_at(out: Any, position: int) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else tensors_in(out)[position]


@dataclass(frozen=True, slots=True)
class _Written:
    """In an outline: the result is the argument that the op wrote, by its position among those."""

    position: int


def _outline(out: Any, written: Sequence[Any]) -> Any:
    """The result without its data; a result that is no tensor (a number read) stays what it is."""
    if isinstance(out, torch.Tensor):
        found = next((i for i, argument in enumerate(written) if argument is out), None)
        return Shape.of(out) if found is None else _Written(found)
    if isinstance(out, (tuple, list)):
        return [type(out), *(_outline(item, written) for item in out)]
    return out


def _filled(outline: Any, stored: Mapping[int, torch.Tensor], written: Sequence[Any]) -> Any:
    """A result of the outlined form: written arguments, stored tensors where there are some, ghosts for the rest."""
    return _fill(outline, stored, written, itertools.count())


def _fill(part: Any, stored: Mapping[int, torch.Tensor], written: Sequence[Any], positions: Iterator[int]) -> Any:
    # no closure: one that calls itself is a cycle, and would hold the stored tensors until the next collection
    if isinstance(part, _Written):
        next(positions)
        return written[part.position]
    if isinstance(part, Shape):
        position = next(positions)
        return stored[position].detach() if position in stored else Ghost(part)
    if isinstance(part, list):
        return part[0](_fill(item, stored, written, positions) for item in part[1:])
    return part
