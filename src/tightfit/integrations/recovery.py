"""Going on after the memory ran out: a smaller plan, and the same step again.

A step is a forward and a backward for each of its batches, and one step of the optimizer. When one of them runs out of
memory, what the step has changed so far (gradients, buffers, random states, a trainer's statistics) is put back to
where the step began, the trace that is there already is planned for a smaller budget, and the same batches run again.
The optimizer's step is done again only when it had not changed anything yet.

Invariant: a step that was retried leaves what it would have left at the first attempt, bit for bit (a plan with tiles
may be followed by one with other tiles, whose last bits are others); no batch is lost and none counts twice.
Refused: an optimizer's step, or a backward that takes it, that ran out of memory half way (`TornStep`: only an earlier
checkpoint knows what the parameters were), and more retries than were allowed (`OutOfMemory`).
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import TrainerCallback
from transformers.utils import logging

from tightfit import accelerator
from tightfit.core import BudgetInfeasible, Lever, Plan, TightfitError, Trace, format_bytes
from tightfit.integrations.own_step import running_trainer
from tightfit.integrations.trainer import TightfitCallback
from tightfit.levers import exact_only, used
from tightfit.levers.step_in_backward.hooks import is_half_taken
from tightfit.plan import plan
from tightfit.step.optimizers import MARK, bare, close_door
from tightfit.step.snapshot import random_states, restore_random_states

__all__ = ["OutOfMemory", "Recovery", "Retry", "TornStep", "is_out_of_memory"]

logger = logging.get_logger(__name__)

SHRINK = 0.9  # the next budget, of the plan's peak
RETRIES = 3
_STATISTICS = ("_metrics", "_total_train_tokens")  # what TRL's trainers add up inside `compute_loss`


class OutOfMemory(TightfitError):
    """The memory ran out more often than retries were allowed."""


class TornStep(OutOfMemory):
    """The optimizer ran out of memory after it had changed some parameters: the step can be neither kept nor undone.

    Attributes: `step`, counted from 1, and `cause`, the first line of the allocator's error.
    """

    def __init__(self, step: int, cause: str) -> None:
        self.step, self.cause = step, cause
        super().__init__(
            f"out of memory in the optimizer's step {step}, after it had changed parameters ({cause}): go back to the "
            "last checkpoint"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """One out-of-memory error that training survived."""

    step: int  # the optimizer step, counted from 1, that was being computed
    phase: str  # forward, backward or optimizer
    error: str
    budget_bytes_before: int
    budget_bytes_after: int
    peak_bytes_after: int  # of the plan that the retry ran under
    went_back_to: int | None = None  # the step whose checkpoint was loaded; None: the step itself was done again


def is_out_of_memory(error: BaseException) -> bool:
    """Does `error` say that a device's or the host's memory ran out?"""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, Exception) and should_reduce_batch_size(error)


#: What plans use unless told otherwise, but for tiles: nothing in the middle of a training changes its bits.


def lower(trace: Trace, old: Plan, levers: Collection[Lever] | None = None) -> Plan:
    """A plan of `trace` with a lower peak than `old`; `old` when there is none. Where `old` is exact, so is it.

    `levers`: as in `plan`.
    """
    if old.exact:
        levers = exact_only(levers) | {lever.lever for lever in used(old)}
    try:
        return plan(trace, int(old.peak_bytes * SHRINK), levers=levers, host_budget=old.host_budget_bytes)
    except BudgetInfeasible as error:
        least_bytes = error.least_bytes
    if least_bytes >= old.peak_bytes:
        return old
    try:
        return plan(trace, least_bytes, levers=levers, host_budget=old.host_budget_bytes)
    except BudgetInfeasible:
        return old


class Recovery(TrainerCallback):
    """Makes the Trainer that `callback` fits survive running out of memory, at most `retries` times in all.

        fit = TightfitCallback("22GiB")
        trainer = Trainer(..., callbacks=[fit, Recovery(fit)])

    Attributes: `survived`, one `Retry` per error. Raises inside `trainer.train()`: `OutOfMemory`, `TornStep`.
    After an exception call `close()`: the Trainer does not say when it fails.
    """

    def __init__(
        self, callback: TightfitCallback, retries: int = RETRIES, say: Callable[[str], None] = logger.warning
    ) -> None:
        self.callback = callback
        self.retries = retries
        self.say = say
        self.survived: list[Retry] = []
        self._trainer: Any = None
        self._optimizer: Any = None
        self._undo: list[Callable[[], None]] = []
        self._done: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._start: _Start | None = None
        self._buffers: _Buffers | None = None

    # -- put in place and taken off

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
        self._trainer = running_trainer()
        self._optimizer = bare(kwargs["optimizer"])
        self._buffers = _Buffers(kwargs["model"])
        self._wrap(self._trainer, "training_step", self._training_step)
        self._wrap(self._optimizer, "step", self._optimizer_step)

    def _wrap(self, owner: Any, name: str, wrapped: Callable[..., Any]) -> None:
        inside, mine = getattr(owner, name), vars(owner).get(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            return wrapped(inside, *args, **kwargs)

        # schedulers mark the method that they count the calls of, and look for the mark
        vars(call).update(getattr(inside, "__dict__", {}))
        setattr(call, MARK, True)
        setattr(owner, name, call)

        def undo() -> None:
            if vars(owner).get(name) is call:
                if mine is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, mine)

        self._undo.append(undo)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._buffers is not None
        self._done = []
        self._buffers.note()
        self._start = _Start(self._trainer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._done, self._start = [], None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the guards off. Twice is once."""
        while self._undo:
            self._undo.pop()()
        if self._optimizer is not None:
            close_door(self._optimizer)
        self._done, self._start, self._buffers = [], None, None
        self._trainer = self._optimizer = None

    # -- forward and backward

    def _training_step(self, inside: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._start is None:
            return inside(*args, **kwargs)
        loss = self._attempt(inside, [(args, kwargs)])
        while isinstance(loss, _Failure):
            if is_half_taken(self._optimizer):
                raise TornStep(self._step, loss.message)
            self._give_way(loss)
            # the gradients of this step's earlier batches may have been added to in part: all of them run again
            self._put_back()
            loss = self._attempt(inside, [*self._done, (args, kwargs)])
        self._done.append((args, kwargs))
        return loss

    def _attempt(self, inside: Callable[..., Any], calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]]) -> Any:
        try:
            for args, kwargs in calls:
                loss = inside(*args, **kwargs)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return _Failure(phase=_phase(error.__traceback__), message=_first_line(error))
        return loss

    def _put_back(self) -> None:
        assert self._start is not None and self._buffers is not None
        self._trainer.model.zero_grad(set_to_none=True)
        self._buffers.put_back()
        self._start.put_back()

    # -- the optimizer

    def _optimizer_step(self, inside: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._start is None:
            return inside(*args, **kwargs)
        while True:
            before = _OptimizerVersions(self._optimizer)
            try:
                return inside(*args, **kwargs)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = _Failure(phase="optimizer", message=_first_line(error))
            if before.changed():
                raise TornStep(self._step, failure.message)
            before.forget_new_state()
            self._give_way(failure)

    # -- both

    @property
    def _step(self) -> int:
        return int(self._trainer.state.global_step) + 1

    def _give_way(self, failure: _Failure) -> None:
        """Free what can be freed and plan for less, or raise `OutOfMemory`."""
        old = self.callback.plan
        assert old is not None
        if len(self.survived) >= self.retries:
            raise OutOfMemory(
                f"out of memory in the {failure.phase} of step {self._step}, after {len(self.survived)} retries with "
                f"smaller plans, the last for {format_bytes(old.budget_bytes)} ({failure.message}): "
                "use a smaller batch or shorter sequences, or free memory that others hold"
            )
        if failure.phase != "optimizer":
            self._trainer.model.zero_grad(set_to_none=True)
            self.callback.count_again()
        free_memory()
        new = self._replan()
        retry = Retry(
            step=self._step,
            phase=failure.phase,
            error=failure.message,
            budget_bytes_before=old.budget_bytes,
            budget_bytes_after=new.budget_bytes,
            peak_bytes_after=new.peak_bytes,
        )
        self.survived.append(retry)
        self.say(
            f"tightfit: out of memory in the {retry.phase} of step {retry.step}; it is done again with a plan for "
            f"{format_bytes(retry.budget_bytes_after)} instead of {format_bytes(retry.budget_bytes_before)} "
            f"(retry {len(self.survived)} of {self.retries})"
        )

    def _replan(self) -> Plan:
        """Put a plan with a lower peak in force, if there is one."""
        callback = self.callback
        assert callback.plan is not None and callback.trace is not None
        new = lower(callback.trace, callback.plan, callback.levers)
        if new is not callback.plan:
            callback.change_to(new)
        return new


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """Without the error itself, whose traceback holds the tensors that the memory ran out for."""

    phase: str
    message: str


def free_memory() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    accelerator.empty_cache()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _phase(where: TracebackType | None) -> str:
    while where is not None:
        code = where.tb_frame.f_code
        if code.co_name == "backward" and code.co_filename.endswith("accelerator.py"):
            return "backward"
        where = where.tb_next
    return "forward"


class _Start:
    """Where a step began: the random states, and what the trainer had counted."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.random = random_states()
        self.statistics = {n: copy.deepcopy(vars(trainer)[n]) for n in _STATISTICS if n in vars(trainer)}

    def put_back(self) -> None:
        restore_random_states(self.random)
        vars(self.trainer).update(copy.deepcopy(self.statistics))


class _Buffers:
    """The model's buffers (running averages and the like) as they were when a step began.

    Copied once before the first step; after that only those that have changed are copied again, into the same memory.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self._saved: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}
        self._named: list[tuple[torch.nn.Module, str, torch.Tensor]] = []
        self.note()

    def note(self) -> None:
        self._named = [
            (module, name, buffer)
            for module in self.model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and not buffer.is_meta
        ]
        known, self._saved = self._saved, {}
        with torch.no_grad():
            for _, _, buffer in self._named:
                if id(buffer) in known and known[id(buffer)][0] is buffer:
                    _, copied, version = known[id(buffer)]
                    if version != buffer._version:
                        copied.copy_(buffer)
                else:
                    copied = buffer.detach().clone()
                self._saved[id(buffer)] = (buffer, copied, buffer._version)

    def put_back(self) -> None:
        with torch.no_grad():
            for module, name, buffer in self._named:
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer
            for key, (buffer, copied, version) in self._saved.items():
                if buffer._version != version:
                    buffer.copy_(copied)
                    self._saved[key] = (buffer, copied, buffer._version)


class _OptimizerVersions:
    """What an optimizer may write, as torch counts writes: parameters and their state."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._versions = [(tensor, tensor._version) for tensor in self._tensors()]
        self._had = set(optimizer.state)
        # torch counts the writes of its own ops; those of other packages' kernels may go past it, and its fused kernels
        # do, but for the step count that all of them but SGD keep
        fused = any(group.get("fused") for group in optimizer.param_groups)
        self._counted = type(optimizer).__module__.startswith("torch.optim") and not (
            fused and isinstance(optimizer, torch.optim.SGD)
        )

    def _tensors(self) -> Iterable[torch.Tensor]:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    yield parameter
                    state = self.optimizer.state.get(parameter, {})
                    yield from (value for value in state.values() if isinstance(value, torch.Tensor))

    def changed(self) -> bool:
        if not self._counted or any(tensor._version != version for tensor, version in self._versions):
            return True
        new = [self.optimizer.state[parameter] for parameter in self.optimizer.state if parameter not in self._had]
        return any(v._version for state in new for v in state.values() if isinstance(v, torch.Tensor))

    def forget_new_state(self) -> None:
        """State that the failed attempt began to make: made anew by the next one."""
        for parameter in [p for p in self.optimizer.state if p not in self._had]:
            del self.optimizer.state[parameter]
