"""Step each parameter in backward, when its gradient is there, and let the gradient go.

Invariant: `optimizer.step()` takes the same step as ever; most of it was taken before. The learning rate and the other
settings are those that backward found, and `step()` raises if they are others by then. Where gradients are clipped by
their total norm, a first pass measures the norms and lets each gradient go; the second clips and steps, by torch's own
functions.
Refused, when it happens: a second backward before `step()`, torch's clipping functions, scaled losses, hooks before the
step (`Unsupported`). Not seen: a loop that looks at gradients by itself, skips a step after a backward, or expects a
step for parameters whose gradients are zero because nothing reached them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype as _by_kind

from tightfit.core import Unsupported
from tightfit.step.optimizers import Cut, Part, replaced_step, step_parts
from tightfit.step.snapshot import Snapshot, undisturbed
from tightfit.step.tied import tied_gradients, without_base

_Result = TypeVar("_Result")

__all__ = [
    "clipped_backward", "gradient_norms_kept", "gradients_told", "in_two_passes", "is_half_taken", "nothing_stepped",
    "of_optimizer", "only_clipped", "stepping_in_backward",
]  # fmt: skip

_AWAY = "leave step_in_backward out of the levers"

#: Called with each parameter before its gradient goes, which is as it is used: clipped, where it is clipped.
_listeners: list[Callable[[torch.Tensor], None]] = []


@contextlib.contextmanager
def gradients_told(listener: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """`listener` is called with each parameter whose gradient is there, before the gradient goes."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class _Wanted:
    """Something for the whole process that several may want at once."""

    def __init__(self) -> None:
        self.times = 0

    @contextlib.contextmanager
    def meanwhile(self) -> Iterator[None]:
        self.times += 1
        try:
            yield
        finally:
            self.times -= 1


_norms, _rest = _Wanted(), _Wanted()


def gradient_norms_kept() -> contextlib.AbstractContextManager[None]:
    """The norm of each gradient is kept until the optimizer's step, so that a loop which only logs their total norm
    (`clip_grad_norm_` with no limit, as transformers' Trainer does without clipping) still gets it."""
    return _norms.meanwhile()


def nothing_stepped() -> contextlib.AbstractContextManager[None]:
    """While open, no backward steps anything: a step is recorded whose optimizer is under a plan."""
    return _rest.meanwhile()


class _Step:
    """What of a step was taken in backward.

    The groups are looked at anew for each step, since loading a state, or adding a group, puts others in their place.
    """

    def __init__(self, optimizer: Optimizer, cut: Cut) -> None:
        self.optimizer, self.cut = optimizer, cut
        self.parts: dict[torch.Tensor, Part] = {}
        self.taken: set[torch.Tensor] = set()
        self.norms: dict[torch.Tensor, torch.Tensor] = {}
        self.measured: dict[torch.Tensor, torch.Tensor] | None = None  # norms, while `measuring` is open
        self.limit: tuple[float, torch.Tensor] | None = None  # the greatest norm and the one that was measured
        self.clipped: tuple[float, torch.Tensor] | None = None  # the same, of the gradients that were used last
        self.settings: list[dict[str, Any]] = []
        self.known_states = len(optimizer.state)
        self.undo = contextlib.ExitStack()
        self.hooked: set[torch.Tensor] = set()
        self.look()

    def look(self) -> None:
        """The optimizer's parameters as they are now, each with its hook."""
        self.parts = {p: self.cut.of(group, p) for group in self.optimizer.param_groups for p in group["params"]}
        for parameter in self.parts:
            if parameter.requires_grad and parameter not in self.hooked:
                self.hooked.add(parameter)
                self.undo.callback(parameter.register_post_accumulate_grad_hook(self.ready).remove)

    def ready(self, parameter: torch.Tensor) -> None:
        """The gradient of `parameter` is there."""
        if _rest.times:
            return
        if self.measured is not None:
            assert parameter.grad is not None
            (self.measured[parameter],) = torch._foreach_norm([parameter.grad.detach()])
            parameter.grad = None
            return
        if _CLIPS in vars(self.optimizer) and self.limit is None:
            raise Unsupported(
                "gradients are to be clipped by their total norm, and the plan steps each parameter in backward: call "
                "applied.backward(batch) in place of loss.backward(), which measures the norms first"
            )
        if parameter in self.taken:
            raise Unsupported(
                "a second backward came before optimizer.step(), for a parameter that was stepped in the first: "
                "gradients cannot be accumulated where the optimizer steps in backward; call optimizer.step() after "
                f"each backward, or {_AWAY}"
            )
        if not self.taken:
            if self.optimizer._optimizer_step_pre_hooks:
                raise Unsupported(
                    "the optimizer has a hook before its step (register_step_pre_hook), which would come after the "
                    f"parameters were stepped in backward: remove it, or {_AWAY}"
                )
            self.look()
            self.settings = self._settings()
        if parameter not in self.parts:  # it has left the optimizer
            return
        if _norms.times and parameter.grad is not None:
            self.norms[parameter] = torch.linalg.vector_norm(parameter.grad.detach())
        if self.limit is not None:
            torch.nn.utils.clip_grads_with_norm_([parameter], *self.limit)
        for listener in _listeners:
            listener(parameter)
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
        self.look()
        others = [part for p, part in self.parts.items() if p not in self.taken and p.grad is not None]
        self.taken.clear()
        self.norms.clear()
        self.clipped = None
        step_parts(self.optimizer, others)
        if len(self.optimizer.state) != self.known_states:
            self._put_in_order()

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Backward measures the norm of each gradient and lets it go; `measured_norm` has their total."""
        self.measured = {}
        self.look()
        try:
            yield
        finally:
            self.measured = None

    def measured_norm(self, parameters: list[torch.Tensor]) -> torch.Tensor:
        """What `torch.nn.utils.clip_grad_norm_` would have found, in its own order of additions."""
        assert self.measured is not None
        norms = {p: self.measured[p] for p in parameters if p in self.measured}
        norms |= {p: torch._foreach_norm([p.grad])[0] for p in parameters if p.grad is not None}
        there = [p for p in parameters if p in norms]
        if not there:
            return torch.tensor(0.0)
        kinds = [torch.empty(0, dtype=p.dtype, device=p.device) for p in there]
        groups = _by_kind([kinds], with_indices=True)  # type: ignore[list-item]
        order = [place for _, places in groups.values() for place in places]
        device = there[0].device
        total: torch.Tensor = torch.linalg.vector_norm(torch.stack([norms[there[p]].to(device) for p in order]))
        return total

    @contextlib.contextmanager
    def clipping(self, max_norm: float, total_norm: torch.Tensor) -> Iterator[None]:
        """Backward clips each gradient as torch does, and steps. What it does not step is clipped at the end."""
        self.limit = self.clipped = max_norm, total_norm
        try:
            yield
            left = [p for p in self.parts if p.grad is not None]
            torch.nn.utils.clip_grads_with_norm_(left, *self.limit)
        finally:
            self.limit = None

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


#: Attribute of an optimizer: its step in backward. An attribute, so that it goes with the optimizer.
_STEP = "_tightfit_step"


def of_optimizer(optimizer: Optimizer | None) -> _Step | None:
    """The step of `optimizer` in backward; None: it steps as ever."""
    return None if optimizer is None else vars(optimizer).get(_STEP)


#: Attribute of an optimizer whose gradients are to be clipped: nothing is stepped in backward that was not.
_CLIPS = "_tightfit_clips"


def only_clipped(optimizer: Optimizer | None, only: bool) -> None:
    """From now on, gradients of `optimizer` are stepped in backward only where `in_two_passes` has clipped them."""
    if optimizer is not None and only:
        setattr(optimizer, _CLIPS, True)
    elif optimizer is not None:
        vars(optimizer).pop(_CLIPS, None)


#: A plan may be made anew in the forward of a pass, for a longer batch say: then the passes begin anew, so often.
_TRIES = 4


def in_two_passes(
    model: torch.nn.Module, batch: Any, optimizer: Optimizer | None, max_norm: float, run: Callable[[bool], _Result]
) -> tuple[_Result, torch.Tensor | None]:
    """What `run` gives, which is forward and backward, and the total norm. Where the plan steps in backward, `run` is
    called twice, the first time with True and for the norms alone, from the same state; gradients are clipped as they
    are used. Where it does not, `run` is called once, nothing is clipped, and the norm is None."""
    for attempt in range(_TRIES):
        step = of_optimizer(optimizer)
        before = Snapshot(model, batch) if step is None else None  # the first of two passes is put back anyway
        try:
            if step is None:
                return run(False), None
            # what ops write, and the generators that they draw from, are put back too
            with undisturbed(model, batch) as restart, restart.watching(), step.measuring():
                run(True)
                total_norm = step.measured_norm(list(model.parameters()))
        except Unsupported:
            if of_optimizer(optimizer) is step or attempt == _TRIES - 1:
                raise
            if before is not None:
                before.give_back()
            continue
        if of_optimizer(optimizer) is step:
            with step.clipping(max_norm, total_norm):
                return run(False), total_norm
    raise Unsupported("plans were made anew in each forward of this batch; remove the plan")


def clipped_backward(
    model: torch.nn.Module, batch: Any, optimizer: Optimizer | None, max_norm: float, run: Callable[[], _Result]
) -> tuple[_Result, torch.Tensor]:
    """What `run` gives, which is forward and backward, and the total norm to which the gradients were clipped: in two
    passes where the plan steps in backward, and by torch's own call where it does not."""
    found, norm = in_two_passes(model, batch, optimizer, max_norm, lambda _: run())
    return found, torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm) if norm is None else norm


def is_half_taken(optimizer: Optimizer) -> bool:
    """Has a backward stepped parameters of `optimizer` since its last whole step?"""
    step = of_optimizer(optimizer)
    return step is not None and bool(step.taken)


@contextlib.contextmanager
def stepping_in_backward(model: torch.nn.Module, optimizer: Optimizer, cut: tuple[int, bool]) -> Iterator[None]:
    """Each parameter of `optimizer` is stepped in backward meanwhile, and the gradients of a weight that modules of
    `model` share are summed in place. `cut`: as in `Cut`."""
    step = _Step(optimizer, Cut(*cut))
    with step.undo, tied_gradients(model, without_base), replaced_step(optimizer, step.rest):
        setattr(optimizer, _STEP, step)
        _guard.add(step)
        try:
            yield
        finally:
            _guard.discard(step)
            delattr(optimizer, _STEP)


class _Guard:
    """While any optimizer steps in backward: functions that clip gradients raise where the gradients are gone, since
    they would clip nothing, and scaling the loss raises before backward.

    What is replaced is what torch's clipping functions themselves call, so that it does not matter by which name a
    training loop imported them.
    """

    def __init__(self) -> None:
        self.steps: list[_Step] = []
        self.replaced: list[tuple[Any, str, Any, Any]] = []

    def add(self, step: _Step) -> None:
        if not self.steps:
            for name in ("_get_total_norm", "_group_tensors_by_device_and_dtype"):
                self._replace(torch.nn.utils.clip_grad, name, self._of_gradients)
            for name in ("clip_grad_norm_", "clip_grad_value_"):
                for module in (torch.nn.utils, torch.nn.utils.clip_grad):
                    self._replace(module, name, self._of_parameters)
            self._replace(torch.amp.GradScaler, "scale", self._scaling)
        self.steps.append(step)

    def discard(self, step: _Step) -> None:
        self.steps.remove(step)
        while not self.steps and self.replaced:
            owner, name, ours, original = self.replaced.pop()
            if vars(owner).get(name) is ours:  # else somebody has replaced it since; without a step it does as torch's
                setattr(owner, name, original)

    def _replace(self, owner: Any, name: str, make: Callable[[str, Any], Any]) -> None:
        original = getattr(owner, name, None)
        if original is not None:
            ours = make(name, original)
            self.replaced.append((owner, name, ours, original))
            setattr(owner, name, ours)

    def _of_parameters(self, name: str, original: Any) -> Any:
        def clip(parameters: Any, *args: Any, **kwargs: Any) -> Any:
            given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
            gone = next((s for s in self.steps if any(each in s.taken for each in given)), None)
            if gone is not None:
                asked = dict(zip(("max_norm", "norm_type"), args, strict=False)) | kwargs
                if name == "clip_grad_norm_" and asked.get("norm_type", 2) == 2:
                    all_used = gone.taken <= set(given) and all(p in gone.taken or p.grad is None for p in given)
                    same = gone.clipped is not None and gone.clipped[0] == asked.get("max_norm")
                    if same and all_used and not asked.get("error_if_nonfinite"):
                        assert gone.clipped is not None
                        return gone.clipped[1]  # as was asked, when they were used
                    total = gone.total_norm(given) if asked.get("max_norm") == math.inf else None
                    if total is not None:
                        return total
                raise _no_gradients(name)
            return original(given, *args, **kwargs)

        return clip

    def _of_gradients(self, name: str, original: Any) -> Any:
        def called(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            given = list(tensors) if isinstance(tensors, (list, tuple)) else tensors
            if (not given or given == [[]]) and any(step.taken for step in self.steps):
                raise _no_gradients("clipping")
            return original(given, *args, **kwargs)

        return called

    def _scaling(self, name: str, original: Any) -> Any:
        steps = self.steps

        def scale(self: Any, *args: Any, **kwargs: Any) -> Any:
            if steps and self.is_enabled():
                raise Unsupported(
                    f"GradScaler scales the loss, and parameters would be stepped with scaled gradients: {_AWAY}"
                )
            return original(self, *args, **kwargs)

        return scale


def _no_gradients(name: str) -> Unsupported:
    return Unsupported(
        f"{name} finds no gradients: each parameter was stepped in backward and its gradient is gone; "
        f"do without clipping, leave it to fit(max_norm=...) and applied.backward(batch), or {_AWAY}"
    )


_guard = _Guard()
