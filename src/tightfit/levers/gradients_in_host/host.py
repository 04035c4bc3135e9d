"""Gradients that wait in host memory, and are on the device while something is added to them or they are stepped with.

Idea: `p.grad` stays the tensor that it is, and its data lies on room in host memory. So whoever reads gradients between
backward and step (a log, a hook before the step) reads the right numbers, there. Before autograd adds to a gradient it
is brought back, and autograd itself adds, as ever; when a gradient is whole it is sent. For the step of its parameter
it is brought once more.

torch's own clipping would compute with the host's arithmetic, in another order. So meanwhile its functions bring one
gradient at a time, and add up the norms in the order in which torch does on the device.

On the CPU the room lies outside torch's allocator, as what is offloaded does: it stands for another device. Copies are
waited for when they leave; on the way back the device's own queue has them in order.

A view of a gradient cannot follow its data. A gradient that is a view itself (a flat buffer for all of them), or of
which somebody holds one, stays on the device. Whoever takes a view of one that waits is told when it is needed again.

Invariant: on leaving, gradients are on the device (where it has no room for one, a warning says so). Room is only
written again when nobody else holds what lay on it. What cannot be moved stays: sparse gradients, those with gaps,
views or a history, and what finds no room. Refused: `GradScaler`, which looks at all gradients at once, and several
processes (`Unsupported`).
"""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._foreach_utils import _device_has_foreach_support, _has_foreach_support
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype as _by_kind

from tightfit import accelerator
from tightfit.core import Unsupported
from tightfit.step.geometry import is_dense, laid_out_like
from tightfit.step.modes import quietly
from tightfit.step.optimizers import Part, around_parts, bytes_of
from tightfit.step.parallel import Strategy, strategy_of
from tightfit.step.run import comes_back, is_elsewhere, reachable, stays_elsewhere
from tightfit.step.snapshot import gradients_placed

__all__ = ["HostGradients"]


class HostGradients:
    """While it is open, gradients of parameters of at least `least_bytes` wait in room of `pool`."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, least_bytes: int, pool: Any) -> None:
        self.model, self.optimizer, self.least_bytes, self.pool = model, optimizer, least_bytes, pool
        self._rooms: dict[torch.Tensor, _Room] = {}
        self.hooked: dict[torch.Tensor, Callable[[], bool]] = {}  # can anybody else reach the parameter?
        self._left: list[tuple[torch.Tensor, _Room]] = []  # with a gradient that a loop has kept for itself
        self._brought: set[torch.Tensor] = set()  # for an addition that is not done
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> HostGradients:
        if strategy_of(self.model) is not Strategy.ONE:
            raise Unsupported(
                "gradients are reduced over several processes, and those cannot wait in host memory: leave "
                "gradients_in_host out of the levers"
            )
        with contextlib.ExitStack() as undo:
            for parameter in self.model.parameters():
                self._hook(parameter)
            undo.push(self._undo)
            undo.enter_context(around_parts(self.optimizer, self))
            undo.enter_context(gradients_placed(self._place))
            undo.enter_context(_functions.for_(self))
            self._undo = undo.pop_all()
        for each in self.hooked:
            self._send(each)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._undo.close()
        left = viewed = 0
        for parameter, is_reachable in self.hooked.items():
            if not is_reachable():  # nobody will read its gradient, and Python's collector may run at any time
                continue
            viewed += self._is_viewed(parameter)
            try:
                self._bring(parameter, waits=True)  # the room may be gone before the device has read it
            except torch.OutOfMemoryError:
                left += 1
        self._left += self._rooms.items()
        self._rooms.clear()
        self._give_back()
        self._left.clear()
        if viewed:
            warnings.warn(
                f"somebody holds views of the gradients of {viewed} parameters that waited in host memory: the views "
                "do not follow the gradients back to the device",
                stacklevel=2,
            )
        if left:
            warnings.warn(
                f"the device has no room for the gradients of {left} parameters: they stay in host memory, where "
                "nothing can be added to them; let them go (zero_grad) before the next backward",
                stacklevel=2,
            )

    def _hook(self, parameter: torch.Tensor) -> None:
        if parameter in self.hooked or not parameter.requires_grad or not parameter.is_leaf:
            return
        if bytes_of(parameter) < self.least_bytes:
            return
        self.hooked[parameter] = reachable(parameter)
        before, after = (
            _weakly(self, parameter, each) for each in (HostGradients._before_adding, HostGradients._is_whole)
        )
        self._undo.callback(parameter.register_hook(before).remove)
        self._undo.callback(parameter.register_post_accumulate_grad_hook(after).remove)

    # -- in backward

    def _before_adding(self, parameter: torch.Tensor) -> None:
        """Autograd is about to add to the gradient. `torch.autograd.grad` asks too, and adds nothing."""
        for other in self._brought - {parameter}:
            self._send(other)
        self._refuse_views(parameter)
        self._brought = {parameter}
        self._bring(parameter)

    def _is_whole(self, parameter: torch.Tensor) -> None:
        self._brought.discard(parameter)
        self._send(parameter)

    def _place(self, parameter: torch.Tensor) -> None:
        """`parameter` was given another gradient."""
        if parameter in self.hooked:
            self._send(parameter)

    # -- in the step, and where gradients are clipped

    @contextlib.contextmanager
    def there(self, part: Part, following: Part | None) -> Iterator[None]:
        """The gradients of `part` are on the device."""
        for parameter in part.parameters:
            self._hook(parameter)  # one that came later, or is trained only now
        with self.on_device(part.parameters):
            yield

    def over(self) -> None:
        """Nothing is under way."""

    @contextlib.contextmanager
    def on_device(self, parameters: Iterable[torch.Tensor]) -> Iterator[None]:
        """Those gradients of `parameters` that wait are there meanwhile, and what is changed in them is kept."""
        moved = []
        for parameter in parameters:
            if self.has(parameter):
                self._refuse_views(parameter)
                gradient = parameter.grad
                assert gradient is not None
                home = gradient.data
                self._bring(parameter)
                moved.append((parameter, gradient, home, gradient._version))
        devices = {parameter.device for parameter, *_ in moved}
        read = [accelerator.running_stream(each).record_event() for each in devices if accelerator.has_streams(each)]
        try:
            yield
        finally:
            for event in read:  # what waits at home may be written by anyone now, and the device may be far behind
                event.synchronize()
            while moved:
                parameter, gradient, home, version = moved.pop()
                if parameter.grad is gradient and gradient._version == version:
                    with quietly():
                        gradient.data = home  # as it was: nothing to copy
                else:
                    del home  # or its room would seem to be held by somebody
                    self._send(parameter)

    def has(self, parameter: torch.Tensor) -> bool:
        """Does the gradient of `parameter` wait here?"""
        return parameter in self.hooked and parameter.grad is not None and is_elsewhere(parameter.grad)

    # -- views

    def _is_viewed(self, parameter: torch.Tensor) -> bool:
        """Does anyone hold a view of the gradient of `parameter`, which waits in its room?"""
        room, gradient = self._rooms.get(parameter), parameter.grad
        return room is not None and gradient is not None and room.has(gradient) and room.further_holders() > 1

    def _refuse_views(self, parameter: torch.Tensor) -> None:
        if self._is_viewed(parameter):
            name = next((name for name, each in self.model.named_parameters() if each is parameter), "a parameter")
            raise Unsupported(
                f"somebody holds a view of the gradient of {name}, which waits in host memory and is now needed on the "
                "device, where the view cannot follow: take a copy (.clone()) instead of a view (.detach(), a slice), "
                "or leave gradients_in_host out of the levers"
            )

    # -- there and back

    def _bring(self, parameter: torch.Tensor, *, waits: bool = False) -> None:
        gradient = parameter.grad
        if gradient is None or not is_elsewhere(gradient):
            return
        with quietly():
            fresh = torch.empty_strided(
                gradient.shape, gradient.stride(), dtype=gradient.dtype, device=parameter.device
            )
            gradient.data = fresh.copy_(gradient.detach(), non_blocking=not waits)

    def _send(self, parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        if gradient is None or is_elsewhere(gradient) or not _can_wait(gradient):
            return
        room = self._room(parameter, gradient)
        if room is None:
            return
        with quietly():
            room.tensor.copy_(gradient.detach())  # done when it returns: anyone may read the host's numbers at once
            gradient.data = room.tensor

    def _room(self, parameter: torch.Tensor, gradient: torch.Tensor) -> _Room | None:
        self._give_back()
        room = self._rooms.get(parameter)
        if room is not None and room.suits(gradient) and not room.further_holders():
            return room
        buffer = self.pool.room(gradient.numel() * gradient.element_size(), parameter.device)
        if buffer is None:
            return None
        if room is not None:
            self._left.append((parameter, room))
        self._rooms[parameter] = _Room(buffer, laid_out_like(gradient, buffer))
        return self._rooms[parameter]

    def _give_back(self) -> None:
        """Give rooms that were left back to the pool, as soon as nobody holds what lies there."""
        held = []
        for parameter, room in self._left:
            if room.further_holders():
                held.append((parameter, room))
            else:
                comes_back(room.tensor)
                self.pool.room_is_free(room.buffer, parameter.device)
        self._left = held


def _weakly(
    gradients: HostGradients, parameter: torch.Tensor, told: Callable[[HostGradients, torch.Tensor], None]
) -> Callable[[torch.Tensor], None]:
    """A hook of the parameter that calls `told`. Python's collector does not see all that holds such a hook, so one
    that held the parameter would keep it and its model for good."""
    holder, hooked = weakref.ref(gradients), weakref.ref(parameter)

    def hook(_: torch.Tensor) -> None:
        known, to = holder(), hooked()
        if known is not None and to is not None:
            told(known, to)

    return hook


def _holders(tensor: torch.Tensor) -> int:
    """How many hold the bytes of `tensor`, itself among them."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


#: The count for a tensor without a view.
_ALONE = _holders(torch.empty(1))


class _Room:
    """Room in host memory for one gradient."""

    def __init__(self, buffer: torch.Tensor, tensor: torch.Tensor) -> None:
        self.buffer, self.tensor = buffer, tensor
        stays_elsewhere(tensor)
        self._own_holders = _holders(tensor)

    def further_holders(self) -> int:
        """How many others hold what lies here: a gradient that waits, one that a loop has kept for itself, a view."""
        return _holders(self.tensor) - self._own_holders

    def has(self, gradient: torch.Tensor) -> bool:
        """Does `gradient` lie here?"""
        return self.tensor.data_ptr() == gradient.data_ptr()

    def suits(self, gradient: torch.Tensor) -> bool:
        known = self.tensor
        same = known.shape == gradient.shape and known.stride() == gradient.stride()
        return same and known.dtype == gradient.dtype


def _can_wait(gradient: torch.Tensor) -> bool:
    if gradient.layout is not torch.strided or gradient.requires_grad or not gradient.numel() or not is_dense(gradient):
        return False
    # a part of something larger, or what others have views of, is changed by them and for them
    return not gradient._is_view() and _holders(gradient) == _ALONE


# ------------------------------------------------------------------------------ functions that look at all gradients


class _Functions:
    """torch's functions that clip gradients, and the one that scales losses, while gradients wait somewhere.

    A function is put back by the last who needs it, unless somebody has replaced it since: then it stays, and does what
    torch's does.
    """

    def __init__(self) -> None:
        self.waiting: weakref.WeakSet[HostGradients] = weakref.WeakSet()  # or a model would never go
        self._replaced: list[tuple[Any, str, Any, Any]] = []

    @contextlib.contextmanager
    def for_(self, gradients: HostGradients) -> Iterator[None]:
        if not self.waiting:
            clip = torch.nn.utils.clip_grad
            for module, names in ((clip, ("_get_total_norm",)), (torch.nn.utils, ("get_total_norm",))):
                self._replace(module, names, self._total_norm)
            each = ("_clip_grads_with_norm_", "clip_grads_with_norm_", "clip_grad_value_")
            for module in (clip, torch.nn.utils):
                self._replace(module, each, self._one_at_a_time)
            self._replace(torch.amp.GradScaler, ("scale",), self._scaling)
        self.waiting.add(gradients)
        try:
            yield
        finally:
            self.waiting.discard(gradients)
            while not self.waiting and self._replaced:
                owner, name, ours, original = self._replaced.pop()
                if vars(owner).get(name) is ours:
                    setattr(owner, name, original)

    def _replace(self, owner: Any, names: Sequence[str], make: Callable[[Any], Any]) -> None:
        for name in names:
            original = vars(owner).get(name)
            if original is not None:
                self._replaced.append((owner, name, make(original), original))
                setattr(owner, *self._replaced[-1][1:3])

    def _holder(self, parameter: torch.Tensor) -> HostGradients | None:
        return next((each for each in self.waiting if each.has(parameter)), None)

    def _total_norm(self, original: Any) -> Any:
        @functools.wraps(original)
        def total_norm(
            tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
        ) -> torch.Tensor:
            given = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
            owners = {id(p.grad): (p, each) for each in self.waiting for p in each.hooked if each.has(p)}
            if not any(id(tensor) in owners for tensor in given):
                return original(given, norm_type, error_if_nonfinite, foreach)  # type: ignore[no-any-return]
            with torch.no_grad():
                total = _added_up(given, owners, float(norm_type), foreach)
            if error_if_nonfinite and not total.isfinite():
                raise RuntimeError(
                    f"The total norm of order {float(norm_type)} for gradients from `parameters` is non-finite, so it "
                    "cannot be clipped. To disable this error and scale the gradients by the non-finite norm anyway, "
                    "set `error_if_nonfinite=False`"
                )
            return total

        return total_norm

    def _one_at_a_time(self, original: Any) -> Any:
        @functools.wraps(original)
        def clip(parameters: Any, *args: Any, **kwargs: Any) -> None:
            given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
            here = []
            for parameter in given:
                holder = self._holder(parameter)
                if holder is None:
                    here.append(parameter)
                    continue
                with holder.on_device([parameter]):
                    original([parameter], *args, **kwargs)
            if here:
                original(here, *args, **kwargs)

        return clip

    def _scaling(self, original: Any) -> Any:
        waiting = self.waiting

        @functools.wraps(original)
        def scale(self: Any, *args: Any, **kwargs: Any) -> Any:
            if waiting and self.is_enabled():
                raise Unsupported(
                    "GradScaler looks at all gradients at once, and they wait in host memory: leave gradients_in_host "
                    "out of the levers"
                )
            return original(self, *args, **kwargs)

        return scale


def _added_up(
    given: Sequence[torch.Tensor],
    owners: dict[int, tuple[torch.Tensor, HostGradients]],
    norm_type: float,
    foreach: bool | None,
) -> torch.Tensor:
    """The norm that torch finds of these gradients on the device, with one of them there at a time."""
    devices = [owners[id(t)][0].device if id(t) in owners else t.device for t in given]
    stand_ins = [torch.empty(0, dtype=t.dtype, device=d) for t, d in zip(given, devices, strict=True)]
    norms: list[torch.Tensor] = []
    groups = _by_kind([stand_ins], with_indices=True)  # type: ignore[list-item]
    for (device, _), (_, places) in groups.items():
        supported = _has_foreach_support(stand_ins, device) if foreach is None else _device_has_foreach_support(device)
        if foreach and not supported:
            raise RuntimeError(f"foreach=True was passed, but can't use the foreach API on {device.type} tensors")
        for place in places:
            tensor = given[place]
            parameter, holder = owners.get(id(tensor), (None, None))
            with contextlib.nullcontext() if holder is None else holder.on_device([parameter]):  # type: ignore[list-item]
                if supported and foreach is not False:
                    norms += torch._foreach_norm([tensor], norm_type)
                else:
                    norms.append(torch.linalg.vector_norm(tensor, norm_type))
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack([each.to(devices[0]) for each in norms]), norm_type)
    return total


_functions = _Functions()
