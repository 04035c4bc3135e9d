"""Step each parameter in backward, when its gradient is there, and let the gradient go.

Invariant: `optimizer.step()` takes the same step as ever; most of it was taken before. The learning rate and the other
settings are those that backward found, and `step()` raises if they are others by then.
Refused, when it happens: a second backward before `step()`, clipping, scaled gradients (`Unsupported`).
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer

from tightfit.core import Unsupported
from tightfit.step.optimizers import Cut, replaced_step, step_parts

__all__ = ["gradient_norms_kept", "gradients_told", "is_half_taken", "stepping_in_backward"]

_AWAY = "leave step_in_backward out of the levers"

#: Called with each parameter before its gradient goes.
_listeners: list[Callable[[torch.Tensor], None]] = []


@contextlib.contextmanager
def gradients_told(listener: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """`listener` is called with each parameter whose gradient is there, before the gradient goes."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


_norms_kept = 0


@contextlib.contextmanager
def gradient_norms_kept() -> Iterator[None]:
    """The norm of each gradient is kept until the optimizer's step, so that a loop which only logs their total norm
    (`clip_grad_norm_` with no limit, as transformers' Trainer does without clipping) still gets it."""
    global _norms_kept  # noqa: PLW0603 - a count of those who want it
    _norms_kept += 1
    try:
        yield
    finally:
        _norms_kept -= 1


#: What reads the gradients of all parameters at once, and would find none.
_CLIPS = ("clip_grad_norm_", "clip_grad_value_", "get_total_norm")


class _Step:
    """What of a step was taken in backward."""

    def __init__(self, optimizer: Optimizer, cut: Cut) -> None:
        self.optimizer = optimizer
        self.parts = {p: cut.of(group, p) for group in optimizer.param_groups for p in group["params"]}
        self.taken: set[torch.Tensor] = set()
        self.norms: dict[torch.Tensor, torch.Tensor] = {}
        self.settings: list[dict[str, Any]] = []
        self.known_states = len(optimizer.state)

    def ready(self, parameter: torch.Tensor) -> None:
        """The gradient of `parameter` is there."""
        if parameter in self.taken:
            raise Unsupported(
                "a second backward came before optimizer.step(), for a parameter that was stepped in the first: "
                "gradients cannot be accumulated where the optimizer steps in backward; call optimizer.step() after "
                f"each backward, or {_AWAY}"
            )
        if not self.taken:
            self.settings = self._settings()
        for listener in _listeners:
            listener(parameter)
        if _norms_kept and parameter.grad is not None:
            self.norms[parameter] = torch.linalg.vector_norm(parameter.grad.detach())
        self.taken.add(parameter)  # before the step: one that fails half way was begun
        with torch.no_grad():
            step_parts(self.optimizer, [self.parts[parameter]])
        parameter.grad = None

    def _settings(self) -> list[dict[str, Any]]:
        """What the groups say, as far as it is plain numbers."""
        plain = (bool, int, float, str, tuple, type(None))
        return [
            {
                name: value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
                for name, value in group.items()
                if name != "params" and isinstance(value, (*plain, torch.Tensor))
            }
            for group in self.optimizer.param_groups
        ]

    def rest(self) -> None:
        """`optimizer.step()`: what was not stepped in backward, and that nothing has changed since."""
        if self.taken:
            for before, now in zip(self.settings, self._settings(), strict=True):
                changed = next((name for name in before if before[name] != now.get(name)), None)
                if changed is not None:
                    raise Unsupported(
                        f"{changed!r} of the optimizer is {now.get(changed)} at its step, and was {before[changed]} in "
                        f"backward, where the parameters were stepped: change it before backward, or {_AWAY}"
                    )
        others = [part for p, part in self.parts.items() if p not in self.taken and p.grad is not None]
        self.taken.clear()
        self.norms.clear()
        step_parts(self.optimizer, others)
        if len(self.optimizer.state) != self.known_states:
            self._put_in_order()

    def total_norm(self, parameters: list[torch.Tensor]) -> torch.Tensor | None:
        """The norm of the gradients that were there; None: they were not kept."""
        norms = [self.norms[p] if p in self.norms else torch.linalg.vector_norm(p.grad)
                 for p in parameters if p in self.norms or p.grad is not None]  # fmt: skip
        kept = all(p in self.norms for p in parameters if p in self.taken)
        return torch.linalg.vector_norm(torch.stack(norms)) if kept and norms else None

    def _put_in_order(self) -> None:
        """Backward made the state of the last parameters first. Put it in the order in which a whole step makes it."""
        state = self.optimizer.state
        self.known_states = len(state)
        for parameter in [p for p in self.parts if p in state]:
            state[parameter] = state.pop(parameter)


_steps: weakref.WeakKeyDictionary[Optimizer, _Step] = weakref.WeakKeyDictionary()


def is_half_taken(optimizer: Optimizer) -> bool:
    """Has a backward stepped parameters of `optimizer` since its last whole step?"""
    return optimizer in _steps and bool(_steps[optimizer].taken)


@contextlib.contextmanager
def stepping_in_backward(optimizer: Optimizer, cut: tuple[int, bool]) -> Iterator[None]:
    """Each parameter of `optimizer` is stepped in backward meanwhile. `cut`: as in `Cut`."""
    step = _Step(optimizer, Cut(*cut))
    with contextlib.ExitStack() as undo:
        _steps[optimizer] = step
        undo.callback(_steps.pop, optimizer, None)
        for parameter in step.parts:
            if parameter.requires_grad:
                undo.callback(parameter.register_post_accumulate_grad_hook(step.ready).remove)
        undo.enter_context(replaced_step(optimizer, step.rest))
        undo.enter_context(_no_clipping(step))
        yield


@contextlib.contextmanager
def _no_clipping(step: _Step) -> Iterator[None]:
    """Functions that clip gradients raise for parameters whose gradients are gone: they would clip nothing."""

    def refusing(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def clip(parameters: Any, *args: Any, **kwargs: Any) -> Any:
            given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
            if any(each in step.taken for each in given if isinstance(each, torch.nn.Parameter)):
                asked = dict(zip(("max_norm", "norm_type"), args, strict=False)) | kwargs
                only_asks = asked.get("max_norm") == math.inf and asked.get("norm_type", 2) == 2
                total = step.total_norm(given) if only_asks and name == "clip_grad_norm_" else None
                if total is not None:
                    return total
                raise Unsupported(
                    f"{name} finds no gradients: each parameter was stepped in backward and its gradient is gone; "
                    f"do without clipping, or {_AWAY}"
                )
            return original(given, *args, **kwargs)

        return clip

    modules = (torch.nn.utils, torch.nn.utils.clip_grad)
    before = [(module, name, getattr(module, name)) for module in modules for name in _CLIPS if hasattr(module, name)]
    for module, name, original in before:
        setattr(module, name, refusing(name, original))
    try:
        yield
    finally:
        for module, name, original in before:
            setattr(module, name, original)
