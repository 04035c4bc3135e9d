"""Checkpointing as a switch: `enable(model)`, `active(model)`, `disable(model)`.

With a batch and a budget, `enable` is `fit`. Without, every unit holds only its inputs and runs again, as the usual
`model.gradient_checkpointing_enable()` has it, for any `nn.Module`. A transformers model is switched through its own
flags, so that `model.is_activation_checkpointing`, TRL and PEFT see what is on; while it is served so, its own switches
(`activation_checkpointing_enable()`, the older `gradient_checkpointing_enable()`) turn ours on and off too.

transformers hands a layer to its checkpoint function in one of two forms: as `partial(bound __call__, **kwargs)` (up to
5.17) and as `partial(forward, layer, **kwargs)` (since 5.2x); both are taken, and so are a bare module and a bound
method.

Invariant: `disable` puts back what was there. Refused: a budget without a batch, a model that is switched on already.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tightfit.core import InvalidInput, Plan, format_bytes
from tightfit.engine import Applied, applied_to
from tightfit.engine.ambient import is_active
from tightfit.engine.compiled import run_again
from tightfit.engine.frame import Frame
from tightfit.engine.frame_plan import Stats
from tightfit.fitting.fit import fit
from tightfit.levers import used
from tightfit.plan import every_block
from tightfit.step.modules import UnitsAsked, find_units
from tightfit.step.patches import MethodPatch, no_key_value_cache, own_checkpointing, own_checkpointing_off
from tightfit.step.run import LossFunction, compute_loss, device_of
from tightfit.step.snapshot import undisturbed
from tightfit.trace.recording import trace
from tightfit.verify.peak import PeakMeter

__all__ = ["Activity", "active", "disable", "enable", "layer_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """What is on. False as a condition when nothing is."""

    by: str  # "plan", "whole units", "torch" (transformers' own checkpointing), or "nothing"
    units: tuple[str, ...]  # paths of the modules that run again, wholly or in part
    saves_bytes: int | None  # of the step's peak; None: nobody has measured it yet
    basis: str  # "predicted", "measured" or "unknown"
    note: str = ""  # what keeps it from working
    plan: Plan | None = None

    def __bool__(self) -> bool:
        return self.by != "nothing"

    def __str__(self) -> str:
        if not self:
            return "no checkpointing is on" + (f": {self.note}" if self.note else "")
        saved = "a saving not known yet" if self.saves_bytes is None else f"{format_bytes(self.saves_bytes)} less"
        note = f"; {self.note}" if self.note else ""
        return f"on by {self.by} in {len(self.units)} units, {saved} ({self.basis}){note}"


class _Switched:
    """Whole units of one model that run again. Its patches, or the flags of the transformers model inside it."""

    def __init__(self, model: nn.Module, units: UnitsAsked) -> None:
        self.stats = Stats()
        self.patches: list[MethodPatch] = []
        self.owner: Any = None if units is not None else _owner_of_flags(model)
        self.found = find_units(model, units)
        if self.owner is not None:
            self.owner._set_gradient_checkpointing = self._set_flags

    def _set_flags(self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any) -> None:
        """transformers' own `_set_gradient_checkpointing`, with our function in place of torch's."""
        own = functools.partial(type(self.owner)._set_gradient_checkpointing, self.owner)
        own(enable=enable, gradient_checkpointing_func=self.checkpoint, **kwargs)

    def checkpoint(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `torch.utils.checkpoint` does, by our engine; in compiled code, by the compiler."""
        if torch.compiler.is_compiling():
            return run_again(function, args, kwargs)
        if not torch.is_grad_enabled() or is_active():
            return function(*args, **kwargs)
        layer = layer_of(function, args)
        name = getattr(function, "__qualname__", "") if layer is None else type(layer).__name__
        return Frame(name, function, args, kwargs, None, self.stats, layer).run()

    def on(self) -> None:
        if self.owner is not None:
            self.owner._set_gradient_checkpointing(enable=True)
            return
        for module in self.found.values():
            self.patches.append(MethodPatch(module, lambda original: functools.partial(self.checkpoint, original)))

    def off(self) -> None:
        if self.owner is not None:
            self.owner._set_gradient_checkpointing(enable=False)
        while self.patches:
            self.patches.pop().undo()

    def remove(self) -> None:
        self.off()
        if self.owner is not None:
            del self.owner._set_gradient_checkpointing
            self.owner = None

    def units(self, model: nn.Module) -> tuple[str, ...]:
        if self.owner is not None:
            return _flagged(model)
        patched = {id(patch.module) for patch in self.patches}
        return tuple(path for path, module in model.named_modules() if id(module) in patched)


class _Handle:
    """What `enable` put on a model, kept in the model itself: a copy or a pickle of the model has None there."""

    def __init__(self, what: _Switched | Applied) -> None:
        self.what = what

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def _handle(model: nn.Module) -> _Switched | Applied | None:
    handle = vars(model).get("_tightfit")
    return None if handle is None else handle.what


def _states(model: nn.Module) -> tuple[Applied | None, _Switched | None]:
    """The plan in force on the model and its switched units, as far as there are any."""
    held = _handle(model)
    return applied_to(model) or (held if isinstance(held, Applied) else None), (
        held if isinstance(held, _Switched) else None
    )


def enable(
    model: nn.Module,
    batch: Any = None,
    budget: str | int | None = None,
    loss: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    units: UnitsAsked = None,
) -> Activity:
    """Switch checkpointing on: a plan for `budget` if there is one, else every unit runs again.

    With a `batch` the saving is predicted; without, `active(model, batch)` measures it. Raises `InvalidInput` for a
    budget without a batch and for a model that something is on for already, and what `fit` does.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"expected a torch.nn.Module, found {type(model).__name__}")
    if (before := active(model)) or _handle(model) is not None:
        raise InvalidInput(
            f"checkpointing is {before}; switch it off first: tightfit.disable(model), or what put it on"
        )
    if budget is not None and batch is None:
        raise InvalidInput(f"a budget of {budget} needs a batch to plan for: enable(model, batch, budget={budget!r})")
    if budget is not None:
        put: _Switched | Applied = fit(model, batch, budget, loss=loss, optimizer=optimizer, units=units)
    elif batch is not None:
        recorded = trace(model, batch, loss=loss, optimizer=optimizer, units=units)
        put = Applied(model, every_block(recorded), recorded)
    else:
        put = _Switched(model, units)
        put.on()
    vars(model)["_tightfit"] = _Handle(put)
    return active(model)


def disable(model: nn.Module) -> None:
    """Switch off what `enable` switched on, or any plan in force on `model`. Nothing on: nothing done."""
    applied, switched = _states(model)
    for put in (applied, switched):
        if put is not None:
            put.remove()
    vars(model).pop("_tightfit", None)


def active(model: nn.Module, batch: Any = None, loss: LossFunction | None = None, repeats: int = 1) -> Activity:
    """What checkpointing is on in `model`, whoever put it there. With a `batch` its saving is measured: the peak of
    forward and backward with and without it, by the allocator's own count; nothing is left changed."""
    applied, switched = _states(model)
    saves_bytes, basis, note, plan = None, "unknown", "", None
    if applied is not None and (applied.active_units or used(applied.plan)):
        by, units, plan = "plan", applied.active_units, applied.plan
        saves_bytes, basis = plan.unplanned_peak_bytes - plan.peak_bytes, "predicted"
    elif switched is not None and (units := switched.units(model)):
        by = "whole units"
    else:
        by, units = "torch", _flagged(model)
        if units and not model.training:
            note = "the model is in eval(), where transformers' own checkpointing does nothing"
        if not units:
            by = "nothing"
            note = "the plan in force keeps everything" if applied is not None else ""
    if by != "nothing" and batch is not None:
        saves_bytes, basis = _measured(model, batch, loss), "measured"
    return Activity(by=by, units=units, saves_bytes=saves_bytes, basis=basis, note=note, plan=plan)


def _measured(model: nn.Module, batch: Any, loss: LossFunction | None) -> int:
    peaks = []
    for context in (contextlib.nullcontext, lambda: _paused(model)):
        # paused first: the flags are among what `undisturbed` puts back before each pass
        with context(), undisturbed(model, batch) as restart, no_key_value_cache(model):
            with restart.watching():
                compute_loss(model, batch, loss).backward()
            restart()
            with PeakMeter(device_of(model)) as meter:
                compute_loss(model, batch, loss).backward()
            peaks.append(meter.rise_bytes)
    return peaks[1] - peaks[0]


@contextlib.contextmanager
def _paused(model: nn.Module) -> Iterator[None]:
    """Whatever is on is off inside."""
    applied, switched = _states(model)
    plan, recorded = (applied.plan, applied.trace) if applied is not None else (None, None)
    if applied is not None:
        applied.suspend()
    if switched is not None:
        switched.off()
    try:
        with own_checkpointing_off(model) if switched is None else contextlib.nullcontext():
            yield
    finally:
        if switched is not None:
            switched.on()
        if applied is not None and plan is not None:
            applied.resume(plan, recorded)


# --------------------------------------------------------------------------------- the seam to transformers


def layer_of(function: Callable[..., Any], args: tuple[Any, ...]) -> nn.Module | None:
    """The layer that transformers passes to its checkpoint function, in either of its forms."""
    while isinstance(function, functools.partial):
        args = (*function.args, *args)
        function = function.func
    if isinstance(function, nn.Module):
        return function
    bound = getattr(function, "__self__", None)
    if isinstance(bound, nn.Module):
        return bound
    return args[0] if args and isinstance(args[0], nn.Module) else None


def _owner_of_flags(model: nn.Module) -> Any:
    """The outermost transformers model in `model` that has checkpointing of its own; None: there is none."""
    for module in model.modules():
        # asked of the class: PEFT's models pass on what they do not have
        has_switch = hasattr(type(module), "_set_gradient_checkpointing")
        if has_switch and getattr(module, "supports_gradient_checkpointing", False):  # which diffusers' lack
            return module
    return None


def _flagged(model: nn.Module) -> tuple[str, ...]:
    """Paths of the layers whose own checkpointing flag is on; of a model without layers of that kind, what has it."""
    on = {id(module) for module, *_ in own_checkpointing(model)}
    found = [path for path, module in model.named_modules() if id(module) in on]
    layers = tuple(path for path in found if not any(other.startswith(f"{path}.") for other in found if path != other))
    return tuple(path for path in layers if path) or layers
