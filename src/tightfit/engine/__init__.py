"""Carry out a plan on a real model, and take it off again.

`apply` replaces the `forward` of each planned unit. A unit that keeps everything is not touched, so a plan that keeps
everything costs nothing. `checkpoint` uses the same engine for one region that the user marks by hand.

Invariant: `remove` puts back exactly what was there. Refused: a plan for another model (`PlanMismatch`).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import html
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tightfit.core import (
    Action,
    Choice,
    InvalidInput,
    Plan,
    PlanMismatch,
    Trace,
    Unsupported,
    format_bytes,
    parse_host_budget,
)
from tightfit.engine.ambient import is_active
from tightfit.engine.chain import Chain
from tightfit.engine.compiled import Decision, Tagged, doors, require_expressible
from tightfit.engine.frame import Frame
from tightfit.engine.frame_plan import Comparison, FramePlan, Stats
from tightfit.engine.offload import Pool
from tightfit.engine.region import checkpoint
from tightfit.levers import every, require_known, used
from tightfit.levers.interface import Given
from tightfit.plan import simulate
from tightfit.plan.account import account, account_rows, host_bytes
from tightfit.plan.program import kept_values, offloaded_values, recipe
from tightfit.plan.tighter import tighter
from tightfit.step.modules import modules_of
from tightfit.step.optimizers import bare
from tightfit.step.parallel import inside
from tightfit.step.patches import MethodPatch, compiled_entries, no_key_value_cache, own_checkpointing_off
from tightfit.step.placement import destination, place
from tightfit.step.ranks import Meeting, are_several
from tightfit.step.signature import signature_of

__all__ = ["Applied", "Stats", "applied_to", "apply", "checkpoint"]


#: What has been compared with its forward already: by module, and by a hash of its ops and of those that run again.
_checked: weakref.WeakKeyDictionary[nn.Module, dict[int, Comparison]] = weakref.WeakKeyDictionary()


def applied_to(model: nn.Module) -> Applied | None:
    """The plan that is in force in `model`'s units, whoever applied it. None: no plan is."""
    found = (getattr(module.forward, "__tightfit__", None) for module in model.modules())
    return next((applied for applied in found if applied is not None), None)


class Applied:
    """A plan in force. `remove()`, or leaving it as a context manager, restores the model exactly."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        trace: Trace | None = None,
        *,
        pool: Pool | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.model, self.device = model, device
        self.optimizer = None if optimizer is None else bare(optimizer)
        self.pool = Pool() if pool is None else pool  # where what is offloaded waits
        counts = {lever.lever.value: lever.new_stats() for lever in every()}
        self._stats = Stats(levers={name: each for name, each in counts.items() if each is not None})
        self._patches: list[MethodPatch] = []
        self._decisions: dict[str, Decision] = {}
        self._known: dict[tuple[Choice, str], MethodPatch] = {}  # of plans that were in force before, too
        self._switches, self._optimizer_switches = contextlib.ExitStack(), contextlib.ExitStack()
        self._optimizer_is_open = False
        self._on_remove: list[Callable[[], None]] = []
        self._placed: Callable[[], None] | None = None  # puts the model where it was before it came to `device`
        self._tighter: tuple[Plan, str] | None = None  # looked for when it is first shown
        self.resume(plan, trace)

    def resume(self, plan: Plan, trace: Trace | None = None, *, agreed: bool = False) -> None:
        """Put `plan` in force. A suspended handle goes on counting.

        Several ranks compare their plans first, unless they have `agreed` on this one before. One that was in force
        before is not held against what is trained now: where that differs, whole units are replayed.
        """
        self.plan, self.trace = plan, trace
        require_known(plan)
        self._decisions.clear()
        if are_several(self.model) and not agreed:
            _agree(plan)
        matched = _matched(inside(self.model), plan, known=agreed)
        stores = {(sweep.base, sweep.target): frozenset(sweep.stores) for sweep in plan.advances}
        self._chain = Chain(stores, self._stats)
        _check_compiled(self.model, plan)
        placed: Callable[[], None] = lambda: None  # noqa: E731 - what to undo
        try:
            self._switches.enter_context(own_checkpointing_off(self.model))
            self._switches.enter_context(no_key_value_cache(self.model))
            self._switches.enter_context(doors(self.model))
            kept = self._optimizer_is_open
            if self.device is not None:
                left = {path for lever in used(plan) for path in lever.left_in_host(plan)}
                placed = place(self.model, self.device, left, None if kept else self.optimizer)
                self._placed = self._placed or placed
            for lever in used(plan):
                if lever.steps_optimizer and kept:
                    continue
                counts = self._stats.levers.get(lever.lever.value)
                given = Given(stats=counts, optimizer=self.optimizer, pool=self.pool, device=self.device)
                stack = self._optimizer_switches if lever.steps_optimizer else self._switches
                stack.enter_context(lever.in_force(self.model, plan, given))
            self._optimizer_is_open = True
            for choice, module in matched:
                frame_plan = _frame_plan(plan, choice)
                if frame_plan is not None:
                    self._patches.append(self._patched(choice, module, frame_plan))
        except BaseException:
            self.suspend()
            placed()
            raise

    def suspend(self, *, keep_optimizer: bool = False) -> None:
        """Restore the model until `resume`. Graphs that were made before stay valid. `keep_optimizer`: what the plan
        does to the optimizer stays."""
        while self._patches:
            self._patches.pop().undo()
        self._switches.close()
        if not keep_optimizer:
            self._optimizer_switches.close()
            self._optimizer_is_open = False

    def exchange(self, plan: Plan, trace: Trace | None) -> None:
        """Go on under another plan that was in force before. In the middle of accumulated gradients there is no room
        for what the optimizer keeps elsewhere, so where both plans do the same to the optimizer it stays as it is."""
        same = _of_optimizer(plan) == _of_optimizer(self.plan)
        self.suspend(keep_optimizer=same)
        self.resume(plan, trace, agreed=True)

    def on_remove(self, run: Callable[[], None]) -> None:
        """Make `remove` call `run` too."""
        self._on_remove.append(run)

    def _patched(self, choice: Choice, module: nn.Module, frame_plan: FramePlan) -> MethodPatch:
        """The patch that did this before, if there is one. The same one is used again because the compiler looks at its
        identity."""
        decision = self._decisions[choice.unit] = Decision.of(module, self.plan, choice)
        known = self._known.get((choice, decision.key))
        if known is None or known.module is not module or not known.redo():
            known = MethodPatch(module, self._planned(choice, module, frame_plan, decision))
            self._known[choice, decision.key] = known
        return known

    def _planned(
        self, choice: Choice, module: nn.Module, plan: FramePlan, decision: Decision
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            key = hash((plan.names, plan.live, plan.slots_dropped, plan.inputs, plan.offload))
            scrutiny = _checked.setdefault(module, {}).setdefault(key, Comparison())
            shown = choice.unit or "the model"
            tagged = decision.region(original)

            def forward(*args: Any, **kwargs: Any) -> Any:
                if torch.compiler.is_compiling():
                    return tagged(*args, **kwargs) if torch.is_grad_enabled() else original(*args, **kwargs)
                if not torch.is_grad_enabled() or is_active():
                    return original(*args, **kwargs)
                chain, pool = self._chain, self.pool  # of the plan in force now
                return Frame(shown, original, args, kwargs, plan, self._stats, module, scrutiny, chain, pool).run()

            forward.__tightfit__ = self  # type: ignore[attr-defined]  # how a second plan, or a trace, sees this one
            return forward

        return make

    def __str__(self) -> str:
        """What is in force, for a terminal."""
        return "\n".join(f"{name}: {value}" for name, value in self._facts())

    def _repr_html_(self) -> str:
        """The same, for a notebook."""
        rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in self._facts())
        return f"<table>{rows}</table>"

    def _facts(self) -> list[tuple[str, str]]:
        plan = self.plan
        said = [
            ("plan", f"in force on {len(self._patches)} of {len(plan.choices)} units"),
            ("budget", format_bytes(plan.budget_bytes)),
            (
                "peak",
                f"{format_bytes(plan.peak_bytes)} predicted, {format_bytes(plan.unplanned_peak_bytes)} without it",
            ),
            ("slowdown", f"{plan.slowdown:.2f} x the time of the step without it, predicted"),
            ("gradients", self._promised()),
        ]
        names = [lever.lever.value.replace("_", " ") for lever in used(plan)]
        said.append(("levers", ", ".join(names) or "none: the step fits as it is"))
        if self.trace is not None:
            said.append(("the peak is at", simulate(self.trace, plan).peak_owner))
            if host_bytes(self.trace, plan):
                counts = self._stats.levers.items()
                mapped_bytes = {name: getattr(each, "mapped_bytes", 0) for name, each in counts}
                spilled = self.pool.spill is not None
                found = account(self.trace, plan, spilled=spilled, mapped_bytes=mapped_bytes)
                said += account_rows(found, plan.host_budget_bytes).items()
            if self._tighter is None or self._tighter[0] is not plan:
                self._tighter = plan, tighter(self.trace, plan)
            said.append(("a tenth less", self._tighter[1]))
        return said

    def _promised(self) -> str:
        if not self.plan.exact:
            return "to rounding: verify holds them to float64"
        if compiled_entries(self.model):
            return "to the compiled step's own rounding, since it may fuse other ops: verify holds them to float64"
        return "bit for bit those without it"

    def stats(self) -> Stats:
        """Counts since the plan was applied: frames, replays, fallbacks, ops run again."""
        return dataclasses.replace(self._stats, levers={name: copy.copy(c) for name, c in self._stats.levers.items()})

    @property
    def tagged(self) -> dict[str, Tagged]:
        """What the compiler was told about each unit, when it last compiled one like it. Units are missing of which
        none was compiled."""
        return {path: known.tagged for path, known in self._decisions.items() if known.tagged is not None}

    @property
    def active_units(self) -> tuple[str, ...]:
        """Paths of the units in which the engine runs. Units that keep everything are not among them."""
        paths = {id(m): p for p, m in modules_of(inside(self.model)).items()}
        return tuple(paths.get(id(patch.module), "") for patch in self._patches)

    def remove(self) -> None:
        """Restore every `forward`. A second call does nothing. Graphs that were made before stay valid."""
        self.suspend()
        self._known.clear()  # they know this handle, and nobody should have to look for the cycle
        while self._on_remove:
            self._on_remove.pop()()

    def put_back(self) -> None:
        """`remove`, and have the model where it was before `device` was asked for."""
        self.remove()
        if self._placed is not None:
            self._placed()

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _of_optimizer(plan: Plan) -> dict[str, str]:
    return {lever.lever.value: plan.settings[lever.lever.value] for lever in used(plan) if lever.steps_optimizer}


def _agree(plan: Plan) -> None:
    """Raises `PlanMismatch` on every rank when they are about to put different plans in force."""
    digests = Meeting("apply").gathered(plan.decisions)
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is not None:
        raise PlanMismatch(
            f"rank {other} is about to run another plan ({digests[other]}) than rank 0 ({digests[0]}): give every rank "
            "the same file, or have tightfit.fit plan for all"
        )


def apply(
    model: nn.Module,
    plan: Plan,
    *,
    spill: str | Path | None = None,
    host_bytes: str | int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    device: str | torch.device | None = None,
) -> Applied:
    """Put `plan` in force on `model`. Raises `PlanMismatch`, which names the first unit that differs, for a plan of
    another model.

    What the plan offloads goes to host memory, of which it takes at most `host_bytes`, a size or 0 as `host_budget` of
    `plan` is; what finds no room stays on the device. With `spill` it goes to a file in that folder. A plan that
    changes how the optimizer steps needs the `optimizer`, which steps as before after `remove()`.

    `device`: the model is put there from host memory, all but the frozen weights that the plan streams, which need not
    find room on the device. After `remove()` they are in host memory still, and the rest is on the device.
    """
    capacity = parse_host_budget(host_bytes)
    pool = Pool(capacity, spill)
    return Applied(model, plan, pool=pool, optimizer=optimizer, device=destination(model, device))


def _frame_plan(plan: Plan, choice: Choice) -> FramePlan | None:
    """What the plan says of a frame of this unit. None: nothing is made again in it."""
    if choice.keeps_all:
        return None
    program = plan.programs.get(choice.program)
    if program is None or len(choice.actions) != program.values:
        raise InvalidInput(f"the plan is damaged: it has no program for the unit {choice.unit!r}")
    chosen = recipe(program, kept_values(choice.actions), frozenset(choice.lends))
    offload = offloaded_values(choice.actions)
    moves = bool(offload) or any(action is not Action.KEEP for action in choice.inputs)
    return FramePlan.of(program, chosen, choice.inputs, choice.lends, offload) if chosen.replays or moves else None


def _matched(model: nn.Module, plan: Plan, known: bool) -> list[tuple[Choice, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"expected a torch.nn.Module, found {type(model).__name__}")
    modules = modules_of(model)
    found = []
    for choice in plan.choices:
        module = modules.get(choice.unit)
        if module is None:
            raise PlanMismatch(
                f"the plan has the unit {choice.unit!r}, which this {type(model).__name__} does not have: "
                "the plan was made for another model; make it anew"
            )
        signature = signature_of(module)
        if signature != choice.signature and not known:
            raise PlanMismatch(
                f"the unit {choice.unit!r} differs: planned for {choice.signature}, found {signature}; "
                "the plan was made for another model, dtype or set of trainable parameters; make it anew"
            )
        if getattr(module.forward, "__tightfit__", False):
            raise InvalidInput(f"a plan is already in force on {choice.unit!r}; remove it first")
        found.append((choice, module))
    return found


def _check_compiled(model: nn.Module, plan: Plan) -> None:
    """Raise `Unsupported` for what is compiled in `model` already and cannot be planned. It is found here, so that no
    training step fails."""
    entries = compiled_entries(model)
    if not entries:
        return
    for choice in plan.choices:
        if choice.keeps_all or any(_is_within(choice.unit, path) for path in entries):
            continue
        inner = next((path for path in entries if _is_within(path, choice.unit)), None)
        if inner is not None:
            raise Unsupported(
                f"{inner!r} is compiled, but the unit {choice.unit!r} around it is not, and a plan is for all of it: "
                f"compile {choice.unit!r}, or name its parts as units"
            )
    require_expressible(plan, whole="" in entries)


def _is_within(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(outer + ".")
