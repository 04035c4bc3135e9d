"""A callback for Lightning's `Trainer` that fits the LightningModule's training step into a byte budget.

Idea: `_Step` is the step as a module: called with a batch, it runs the strategy's own `training_step` (precision's
autocast included) and has the loss that Lightning would call `backward` on. So `tightfit.fit` plans it like any model,
and looks at each later batch. While the plan is in force the strategy runs this module in place of its own step.

Lightning lets go of the last step's gradients between forward and backward, so a step is planned with gradients there
from its start, which is the most that it can hold.

Invariant: what a step run for planning does to the module, the metrics, the log and the random states is undone, so
weights, losses and checkpoints are those of a run without the callback. Refused: see `refuse`; a gradient that differs
(`ReplayDiverged`).
"""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tightfit import accelerator
from tightfit.core import (
    BudgetInfeasible,
    Check,
    Lever,
    Plan,
    Proof,
    ReplayDiverged,
    Trace,
    Unsupported,
    format_bytes,
    levers_named,
    parse_host_budget,
    parse_spill,
)
from tightfit.fitting.fit import Fitted, fit
from tightfit.fitting.micro_batches import gradients_in_place
from tightfit.fitting.planning import what_is_given
from tightfit.integrations.python_state import python_state_kept
from tightfit.integrations.tracking import figures
from tightfit.levers import inexact
from tightfit.step.environment import environment
from tightfit.step.optimizers import bare
from tightfit.step.patches import compiled_entries, no_key_value_cache
from tightfit.step.run import device_of, is_elsewhere, tensors_in, unique_bytes
from tightfit.verify.peak import PEAK_TOLERANCE, PeakMeter, peak_checks, require_counted, static_bytes
from tightfit.verify.proving import gradient_checks

__all__ = ["TightfitCallback", "refuse"]

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _bases() -> tuple[type, ...]:
    """`Callback` of the framework, which goes by two names: each has classes of its own, and takes no others. That of
    the one that is loaded already; else those of all that are installed."""
    loaded = [name for name in _PACKAGES if name in sys.modules]
    found = []
    for name in loaded or _PACKAGES:
        try:
            found.append(importlib.import_module(name).Callback)
        except ModuleNotFoundError as error:
            missing = error
    if not found:
        raise missing
    return tuple(found)


_Callback: Any = type("_Callback", _bases(), {})


#: Precision plugins that the tests run.
_PRECISIONS = ("Precision", "MixedPrecision", "HalfPrecision", "DoublePrecision")


class TightfitCallback(_Callback):
    """Fits the training step into `budget`: bytes (`"22GiB"`, an int) or a percentage of the unplanned step's peak.

        trainer = Trainer(callbacks=[TightfitCallback("60%")])

    It plans for the first batch; a longer one is planned for anew, for the same bytes, before it runs. `batch` is
    planned for in place of the first one: give the longest. `verify=True` measures the planned peak, and compares the
    gradients of the first batch with and without the plan. `levers`: what the plan may use, as in `tightfit.plan`; by
    default what gives the same bits, and tiles, whose gradients are proven against float64, only where nothing else
    fits; `exact=True` forbids those. `beside`: levers with the default ones. `host_budget`: the most bytes that plans
    may have wait in host memory, a size or 0. `spill`: what waits does so in a file in that folder. `plan`: a plan of
    this step or its file, taken as it is. Its budget holds, unless another is given beside it.

    Attributes, readable after training too: `trace`, `plan`, `proof` (none before the first step, none without
    `verify`), `peaks` (bytes per batch), `plans` (how many were made), `said` (its lines).

    Raises inside `trainer.fit()`: `BudgetInfeasible`; `Unsupported` for a run whose step cannot be planned;
    `ReplayDiverged` when the proof finds another gradient. After any exception the module is as it was.

    One thing because the Trainer calls one object at every point of a run.
    """

    def __init__(
        self,
        budget: str | int | None = None,
        *,
        verify: bool = True,
        batch: Any = None,
        levers: Collection[Lever | str] | str | None = None,
        exact: bool = False,
        beside: Collection[Lever | str] | str = (),
        host_budget: str | int | None = None,
        plan: Plan | str | Path | None = None,
        spill: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.spill = parse_spill(spill)
        self.budget, self.verify, self.batch = what_is_given(budget, plan), verify, batch
        self.host_budget = parse_host_budget(host_budget)
        self.levers, self.exact, self.beside = levers_named(levers), exact, levers_named(beside) or frozenset()
        self.proof: Proof | None = None
        self.plans = 0
        self.peaks: list[int] = []
        self.said: list[str] = []
        self._last: tuple[Plan | None, Trace | None] = (None, None)
        self._step: _Step | None = None
        self._fitted: Fitted | None = None
        self._planned_for: tuple[int, ...] = ()
        self._meter: PeakMeter | None = None
        self._base_bytes = self._gradient_bytes = self._logged = 0
        self._warned = False
        self._cache, self._patches = ExitStack(), ExitStack()

    @property
    def plan(self) -> Plan | None:
        return self._last[0] if self._fitted is None else self._fitted.plan

    @property
    def trace(self) -> Trace | None:
        return self._last[1] if self._fitted is None else self._fitted.trace

    # -- the Trainer's hooks

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.close()
        refuse(trainer, pl_module, self.levers, self.beside)
        self._last, self.proof, self.plans = (None, None), None, 0
        self.peaks, self.said, self._logged, self._warned, self._planned_for = [], [], 0, False, ()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._stop_meter()  # of a batch that the module skipped
        # on only while a batch runs: a config that is saved in between says what the user's says
        self._cache.enter_context(no_key_value_cache(pl_module))
        given = _given(trainer, batch, batch_idx)
        if self._fitted is None or self._planned_for != _trained(trainer, pl_module):
            self._fit(trainer, pl_module, given, batch_idx)
        self._look(trainer, given)
        assert self._step is not None
        self._base_bytes = static_bytes(self._step, bare(trainer.optimizers[0]), given)
        self._meter = PeakMeter(device_of(self._step)).__enter__()

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._gradient_bytes = _gradient_bytes(pl_module)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        if self._meter is not None and self._gradient_bytes:
            self._meter.released(self._gradient_bytes - _gradient_bytes(pl_module))
        self._gradient_bytes = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        rise_bytes = self._stop_meter()
        self._cache.close()
        plan = self.plan
        if rise_bytes is None or plan is None:
            return
        self.peaks.append(self._base_bytes + rise_bytes)
        if self.peaks[-1] > plan.budget_bytes * (1 + PEAK_TOLERANCE) and not self._warned:
            self._warned = True
            self._say(
                trainer,
                f"batch {batch_idx} reached {format_bytes(self.peaks[-1])}, more than the budget of "
                f"{format_bytes(plan.budget_bytes)}: something beside the planned step takes memory",
            )
        connector = trainer._logger_connector
        if not trainer.fit_loop._should_accumulate() and (connector.should_update_logs or trainer.fast_dev_run):
            self._log(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._log(trainer)
        self.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.close()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.close()

    # -- planning

    def _fit(self, trainer: Any, module: Any, given: dict[str, Any], batch_idx: int) -> None:
        """Plan the step for the first time, or again because other parameters are trained: then for the same bytes."""
        first = self.plan is None
        budget = self.budget if self.plan is None else self.plan.budget_bytes
        self.close(keep_cache=True)
        if first and self.batch is not None:
            moved = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(self.batch))
            longest = _given(trainer, moved, batch_idx)
        else:
            longest = given
        self._step = _Step(trainer, module)
        if first:
            self._fit_step(trainer, longest, budget)
        else:
            self._refit(trainer, longest, budget)
        self._planned_for = _trained(trainer, module)
        if self.verify:
            self._prove(trainer, given, longest)
        self._patches.enter_context(_rerouted(trainer.strategy, self._step))

    def _fit_step(self, trainer: Any, given: dict[str, Any], budget: str | int | Plan) -> None:
        try:
            self._fit_here(trainer, given, budget)
        except torch.OutOfMemoryError as error:
            raise Unsupported(
                f"the plain step does not fit this device ({error}), and a LightningModule's step is run once to plan "
                "it: begin with a smaller batch or shorter sequences, or fit the network itself with tightfit.fit"
            ) from error

    def _fit_here(self, trainer: Any, given: dict[str, Any], budget: str | int | Plan) -> None:
        step, optimizer = self._step, bare(trainer.optimizers[0])
        assert step is not None
        options: dict[str, Any] = {
            "optimizer": optimizer, "levers": self.levers, "beside": self.beside, "host_budget": self.host_budget,
            "spill": self.spill,
        }  # fmt: skip
        with warnings.catch_warnings(record=True) as caught, gradients_in_place(step, True):
            warnings.simplefilter("always")
            if isinstance(budget, Plan):
                self._fitted = fit(step, given, plan=budget, exact=self.exact, **options)
            elif self.exact or (self.levers is not None and inexact(self.levers)):
                self._fitted = fit(step, given, budget, exact=self.exact, **options)
            else:
                try:  # what is planned later is not proven anew, so only what gives the same bits by design
                    self._fitted = fit(step, given, budget, exact=True, **options)
                except BudgetInfeasible:
                    self._fitted = fit(step, given, budget, **options)
        for each in caught:
            if str(each.message).startswith("the model's own checkpointing"):
                self._say(trainer, "the module's own checkpointing is off while the plan is in force")
            elif not str(each.message).startswith(
                ("nothing exact fits", "the plan that was given")
            ):  # which a line of its own says
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        self.plans += 1

    def _refit(self, trainer: Any, given: dict[str, Any], budget: str | int | Plan) -> None:
        """In the middle of a training: the leanest plan there is, and a word about it, rather than an end."""
        try:
            self._fit_step(trainer, given, budget)
        except BudgetInfeasible as error:
            self._fit_leanest(trainer, given, error)

    def _fit_leanest(self, trainer: Any, given: dict[str, Any], error: BudgetInfeasible) -> None:
        self._say(trainer, f"{error}; this batch runs under the leanest plan")
        self._fit_step(trainer, given, error.least_bytes)

    def _look(self, trainer: Any, given: dict[str, Any]) -> None:
        """Show `fit`'s guard the batch before Lightning begins the step, in which the optimizer is busy already."""
        step, fitted = self._step, self._fitted
        assert step is not None and fitted is not None
        before = fitted.plan
        try:
            for look in tuple(step._forward_pre_hooks.values()):
                look(step, (), given)
        except BudgetInfeasible as error:
            fitted.remove()
            self._fit_leanest(trainer, given, error)
            return
        if fitted.plan is not before:
            self.plans += 1
            self._say(
                trainer,
                f"a longer batch than any before comes; planned anew for {format_bytes(fitted.plan.budget_bytes)}: "
                f"predicted peak {format_bytes(fitted.plan.peak_bytes)}",
            )

    def _prove(self, trainer: Any, given: dict[str, Any], longest: dict[str, Any]) -> None:
        step, fitted = self._step, self._fitted
        assert step is not None and fitted is not None
        plan, optimizer = fitted.plan, bare(trainer.optimizers[0])
        fitted.suspend()
        with gradients_in_place(step, True):
            of_peak: tuple[Check, ...] = peak_checks(step, longest, plan, optimizer=optimizer)
        self.proof = Proof(checks=(*gradient_checks(step, given, plan), *of_peak), environment=environment())
        check = self.proof["gradients"]
        if not check.passed:
            raise ReplayDiverged(
                f"the plan changes the gradients of this module (expected {check.expected}, found {check.measured}), "
                "so it was not applied"
            )
        fitted.resume(plan, fitted.trace)
        self._say(
            trainer,
            f"budget {format_bytes(plan.budget_bytes)}, predicted peak {format_bytes(plan.peak_bytes)}, measured "
            f"{self.proof['prediction'].measured}; gradients of the first batch: {check.measured} to the plain step's"
            + ("" if plan.exact else "; not bit for bit, since only tiles fit this budget"),
        )

    # -- telling

    def _log(self, trainer: Any) -> None:
        since, self._logged = self.peaks[self._logged :], len(self.peaks)
        if not since:
            return
        told = figures(self.plan, self.proof, since)
        for logger in trainer.loggers:
            logger.log_metrics(told, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _say(self, trainer: Any, line: str) -> None:
        """One line where Lightning says its own, so that what silences those silences this."""
        self.said.append(line)
        logging.getLogger(f"{_package(trainer)}.utilities.rank_zero").info(f"tightfit: {line}")

    def _stop_meter(self) -> int | None:
        meter, self._meter = self._meter, None
        if meter is None:
            return None
        meter.__exit__(None, None, None)
        return meter.rise_bytes

    def close(self, *, keep_cache: bool = False) -> None:
        """Take the plan off the module and the strategy. Twice is once."""
        self._stop_meter()
        self._patches.close()
        if self._fitted is not None:
            self._last = self._fitted.plan, self._fitted.trace
            self._fitted.remove()
        self._fitted = self._step = None
        if not keep_cache:
            self._cache.close()


# ------------------------------------------------------------------------------------------------ the step


class _Output(NamedTuple):
    """What `training_step` gave, with the loss that Lightning makes of it. A tuple, so that torch finds the tensors."""

    output: Any
    made: Callable[[Any], torch.Tensor]

    @property
    def loss(self) -> torch.Tensor:
        return self.made(self.output)


class _Step(nn.Module):
    """The training step as a module of the same children and parameters, under the same paths."""

    def __init__(self, trainer: Any, module: Any) -> None:
        super().__init__()
        vars(self).update({name: vars(module)[name] for name in ("_modules", "_parameters", "_buffers")})
        self._of: Callable[[], tuple[Any, Any]] = lambda: (trainer, module)  # not a child of this module
        self._run = trainer.strategy.training_step
        self._live: list[bool] = []  # of the calls that are under way: is it the Trainer's own?
        self._asked = False

    def step(self, given: dict[str, Any]) -> Any:
        """The Trainer's own call: what `training_step` returns."""
        self._asked = True
        try:
            return self(**given).output
        finally:
            self._asked = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        live, self._asked = self._asked, False
        self._live.append(live)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self._live.pop()

    def forward(self, args: tuple[Any, ...], shown: list[torch.Tensor]) -> _Output:
        if self._live and self._live[-1]:
            return _Output(self._run(*args), self._loss)
        with _apart(*self._of(), args):  # to plan, or run again by the engine: nothing may come of it but tensors
            return _Output(self._run(*args), self._loss)

    def _loss(self, output: Any) -> torch.Tensor:
        trainer, _ = self._of()
        loop = trainer.fit_loop.epoch_loop.automatic_optimization
        found = loop.output_result_cls.from_training_step_output(output, trainer.accumulate_grad_batches).closure_loss
        if found is None:
            raise Unsupported(
                "training_step returned no loss for the batch that is planned for: give one that has a loss as "
                "TightfitCallback(batch=...)"
            )
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        loss: torch.Tensor = found if scaler is None else scaler.scale(found)
        return loss


@contextmanager
def _rerouted(strategy: Any, step: _Step) -> Iterator[None]:
    """The strategy runs `step` in place of its own, on this object alone."""

    def training_step(*args: Any) -> Any:
        return step.step(_shown(args))

    strategy.training_step = training_step
    try:
        yield
    finally:
        del strategy.training_step


@contextmanager
def _apart(trainer: Any, module: Any, args: Any) -> Iterator[None]:
    """A training step that trains nothing: what it logs, and what it leaves in Python's objects, is gone afterwards."""
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    package, loggers, results = _package(trainer), trainer.loggers, loop._results
    dummy = importlib.import_module(f"{package}.loggers.logger").DummyLogger
    fresh = type(results)(training=True)
    fresh.batch = results.batch
    groups = [optimizer.param_groups for optimizer in trainer.optimizers]
    with python_state_kept(module, args, groups, vars(connector), plain=(trainer,), foreign=_foreign):
        name = module._current_fx_name
        module._current_fx_name = "training_step"
        loop._results, trainer.loggers = fresh, [dummy() for _ in loggers]
        try:
            yield
        finally:
            loop._results, trainer.loggers = results, loggers
            module._current_fx_name = name


def _foreign(kind: type) -> bool:
    """The framework's own objects but modules, subclasses too: a training step is not expected to change those."""
    roots = {base.__module__.partition(".")[0] for base in kind.__mro__}
    own = {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}
    return not issubclass(kind, nn.Module) and bool(roots & own)


def _given(trainer: Any, batch: Any, batch_idx: int) -> dict[str, Any]:
    return _shown(tuple(trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, batch_idx).values()))


def _shown(args: tuple[Any, ...]) -> dict[str, Any]:
    """`_Step`'s arguments: those of `training_step`, and their tensors, which torch does not find in each container."""
    found: list[torch.Tensor] = []
    _collect(args, found, 6)
    return {"args": args, "shown": found}


def _collect(thing: Any, found: list[torch.Tensor], depth: int) -> None:
    if isinstance(thing, torch.Tensor):
        found.append(thing)
    elif depth and isinstance(thing, (list, tuple, set)):
        for each in thing:
            _collect(each, found, depth - 1)
    elif depth and isinstance(thing, Mapping):
        for each in thing.values():
            _collect(each, found, depth - 1)
    elif depth and not isinstance(thing, (type, nn.Module)) and hasattr(thing, "__dict__"):
        _collect(list(vars(thing).values()), found, depth - 1)


def _trained(trainer: Any, module: Any) -> tuple[int, ...]:
    """What a plan is for: the parameters that are trained, and the optimizer. Callbacks that unfreeze change it."""
    return (id(trainer.optimizers[0]), *(id(p) for p in module.parameters() if p.requires_grad))


def _gradient_bytes(module: Any) -> int:
    """What gradients take of the device."""
    there = [p.grad for p in module.parameters() if p.grad is not None and not is_elsewhere(p.grad)]
    return unique_bytes(tensors_in(there))


def _package(trainer: Any) -> str:
    """`lightning.pytorch` or `pytorch_lightning`, whichever the Trainer is of: both can be installed."""
    return type(trainer.fit_loop).__module__.partition(".loops")[0]


# ------------------------------------------------------------------------------------------------ what is refused


def refuse(
    trainer: Any, module: Any, levers: Collection[Lever] | None = None, beside: Collection[Lever] | None = None
) -> None:
    """Raise `Unsupported`, in one line that says what to do, for a run whose step cannot be planned."""
    strategy, precision = type(trainer.strategy).__name__, type(trainer.precision_plugin).__name__
    if strategy != "SingleDeviceStrategy":
        raise Unsupported(
            f"TightfitCallback serves one device, and this Trainer has {strategy}: set strategy='auto' and devices=1, "
            "or leave the callback out"
        )
    if precision not in _PRECISIONS:
        raise Unsupported(
            f"TightfitCallback is not tried with the precision plugin {precision}: use 32, 64, bf16 or 16, mixed or "
            "true, or leave the callback out"
        )
    if not module.automatic_optimization:
        raise Unsupported(
            f"{type(module).__name__} optimizes by hand (automatic_optimization=False), so its training_step runs "
            "backward itself, as often as it likes, and is no single step to plan: fit the networks that it trains "
            "with tightfit.fit, or leave the callback out"
        )
    compiled = "it" if getattr(module, "_compiler_ctx", None) is not None else next(iter(compiled_entries(module)), "")
    if compiled:
        raise Unsupported(
            f"{type(module).__name__} is compiled ({compiled}), which TightfitCallback is not tried with: leave "
            "torch.compile out, or leave the callback out"
        )
    names = inspect.signature(module.training_step).parameters
    if "dataloader_iter" in names:
        raise Unsupported(
            "training_step takes dataloader_iter and fetches its batches itself, so the step to plan is not known "
            "before it runs: let it take batch, or leave the callback out"
        )
    for optimizer in trainer.optimizers:
        closure = inspect.signature(type(bare(optimizer)).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise Unsupported(
                f"{type(bare(optimizer)).__name__} runs the training step as often as it likes inside its own, so the "
                "peak of a step is not known before it runs: use an optimizer that steps without a closure, or leave "
                "the callback out"
            )
    if Lever.STEP_IN_BACKWARD in {*(levers or ()), *(beside or ())}:
        raise Unsupported(
            "step_in_backward was asked for, but Lightning runs backward inside the optimizer's step and looks at the "
            "gradients after it: leave it out of the levers"
        )
    device = trainer.strategy.root_device
    if accelerator.is_host(device) and type(trainer.profiler).__name__ == "PyTorchProfiler":
        raise Unsupported(
            "on the CPU the peak of a step is counted by torch's profiler, which profiler='pytorch' has in use: leave "
            "one of the two out"
        )
    require_counted(device)
