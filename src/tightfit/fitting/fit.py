"""One call that fits a model's step into a budget and keeps it there: `fit`.

Idea: a plan says which values are kept, not how large they are, so it serves every batch whose ops are the same. A
batch no longer than the planned one needs no more bytes; a longer one is noticed before its forward runs, and so are
gradients that the planned step did not start with.

A compiled step has other temporaries than the step that is traced (fused kernels need fewer, or hold several results at
once), so there a plan is measured: planned, compiled, run, and planned again for as many bytes more or fewer, a few
times; the plan that recomputes least among those that kept the budget is the one.

Invariant: the budget in bytes is that of the first plan, whatever comes later. Refused: a longer batch, if the user
wants that (`InvalidInput`), or if no plan fits it (`BudgetInfeasible`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tightfit import accelerator
from tightfit.core import (
    BudgetInfeasible,
    InvalidInput,
    Lever,
    Plan,
    Trace,
    Unsupported,
    levers_named,
    parse_bytes,
    parse_host_budget,
    require_norm,
)
from tightfit.engine.compiled import doors
from tightfit.engine.limits import lacking_in_host, within_device
from tightfit.engine.offload import Pool
from tightfit.fitting import micro_batches
from tightfit.fitting.micro_batches import Fitted
from tightfit.fitting.planning import asked_in_vain, caveats_of, planned, what_is_given
from tightfit.levers import every, inexact, used
from tightfit.plan import plan as make_plan
from tightfit.plan import simulate
from tightfit.step.modules import UnitsAsked
from tightfit.step.optimizers import bare
from tightfit.step.parallel import Strategy, gradients_wait, steps_together, strategy_of
from tightfit.step.patches import compiled_entries, own_checkpointing
from tightfit.step.placement import destination, in_host_bytes
from tightfit.step.ranks import anywhere, are_several, highest
from tightfit.step.rows import row_count, rows_taken
from tightfit.step.run import LossFunction, device_of, tensors_in, trained_names
from tightfit.trace.recording import trace
from tightfit.verify.peak import measured_peak_bytes

__all__ = ["Fitted", "Longer", "fit"]


class Longer(enum.Enum):
    """What to do about a batch that is longer than the one that was planned for."""

    REPLAN = "replan"  # trace and plan that batch, for the same budget
    REFUSE = "refuse"  # InvalidInput, before anything of it has run
    ALLOW = "allow"  # run it under the plan there is: right gradients, and whatever peak it has


class _Extent(NamedTuple):
    """What makes a batch long: its elements, and its longest dimension but the first."""

    elements: int
    length: int

    @classmethod
    def of(cls, tree: Any) -> _Extent:
        tensors = [t for t in tensors_in(tree) if t.dim()]
        return cls(
            max((t.numel() for t in tensors), default=0), max((max(t.shape[1:], default=0) for t in tensors), default=0)
        )

    def exceeds(self, other: _Extent) -> bool:
        return self.elements > other.elements or self.length > other.length


def fit(
    model: nn.Module,
    batch: Any,
    budget: str | int | None = None,
    loss: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    units: UnitsAsked = None,
    longer: str = "replan",
    levers: Collection[Lever | str] | str | None = None,
    exact: bool = False,
    beside: Collection[Lever | str] | str = (),
    micro_batch: str | int | None = None,
    host_budget: str | int | None = None,
    plan: Plan | str | Path | None = None,
    device: str | torch.device | None = None,
    max_norm: float | None = None,
    spill: str | Path | None = None,
) -> Fitted:
    """Trace one step, plan it for `budget` bytes, apply the plan. `applied.remove()` undoes it.

    `budget` is the peak of the whole step: bytes, a size (`"22GiB"`), or a percentage of the unplanned step's
    peak. Pass the `optimizer` so that its state and its step count too.

    `plan`, in place of a budget: a plan, or its file, that was made of this step, in whatever framework. The step is
    traced, and the plan is taken if its units are those of this model and its peak here is within its budget; nothing
    is searched. A size as `budget` beside it takes the place of the plan's own. What is planned later (longer batches)
    is planned for that budget.

    Give the longest batch there will be: shorter ones run under the same plan and stay under the budget. `longer`
    says what happens to a longer one: `"replan"` (traced and planned anew for the same bytes, before it runs),
    `"refuse"` (`InvalidInput`) or `"allow"` (run as it is, the budget no longer promised). With a `loss` function
    the model alone does not show the whole batch, so replanning is not possible there: a warning is given instead.

    `levers`: what the plan may use, as in `plan`; by default what gives the same bits, and tiles where nothing else
    fits. A plan in tiles is not exact, which a warning says; `exact=True` forbids it. `beside`: levers that it may use
    with the default ones. `"step_in_backward"` steps each parameter when its gradient is there and lets the gradient
    go; the training loop must not clip, accumulate or read gradients then, and is told so where it does. A lever that
    was named and that this step does not allow is told in a warning, or where nothing fits in the error.

    The model's own checkpointing (`gradient_checkpointing_enable`) makes way while the plan is in force, which a
    warning says, and is on again after `remove()`.

    Accumulated gradients take their bytes through the whole step, and a step that trains other parameters (another
    adapter of PEFT's, layers that are freed one by one) saves other tensors. Such a step is treated as `longer` says,
    too: planned anew once, and from then on each kind of step has its own plan; refused; or run with a warning.

    A model that is compiled, or whose units are (`torch.compile`, `module.compile()`), is planned as it runs uncompiled
    and measured compiled: up to four plans are compiled and run, and `applied.plan.peak_bytes` is what was measured.
    `levers` is then recompute alone, with the loss in place where only units are compiled.

    `micro_batch="auto"`: `batch` is a global batch, which is cut by rows. Micro-batch, accumulation and plan are solved
    together for the fewest seconds of a global batch. The loop calls `applied.backward(batch)` in place of the loss and
    its `backward()`, and steps the optimizer as before; loss and gradients are those of the whole batch to rounding.
    A number instead of `"auto"` is the most rows of a micro-batch. A percentage of a budget is of the whole batch's
    peak. `applied.micro_batches` says what was chosen and why.

    `host_budget`: the most bytes that plans may have wait in host memory, as in `plan`, whenever one is made. `spill`:
    what waits does so in a file in that folder, which is what `host_budget` limits then.

    `device`: the model is in host memory and is to run there. Its step is recorded on fake tensors of that device, so
    that nothing need fit before there is a plan. Then the model is put there, but for the frozen weights that the plan
    streams (`beside="stream_weights"`), which never are on the device all at once. Give it batches that are on the
    device. After `remove()` those weights are in host memory still, and the rest is on the device. With `micro_batch`
    the few rows that show what the loss divides by run under the plan.

    `max_norm`: the loop clips gradients to this total norm, and leaves that to `applied.backward(batch)`, as above. A
    plan may then step parameters in backward all the same, which runs forward and backward twice, at that price;
    losses, weights and state are those of `torch.nn.utils.clip_grad_norm_`.

    Raises what `trace`, `plan` and `apply` do, `InvalidInput` for another `longer`, and `Unsupported` for a batch that
    cannot be cut: its loss is not a sum or a mean over its rows or labels, which a few rows, cut and uncut, show.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"expected a torch.nn.Module, found {type(model).__name__}")
    asked = what_is_given(budget, plan, micro_batch)
    try:
        policy = Longer(longer)
    except ValueError:
        raise InvalidInput(f"longer={longer!r} is none of {', '.join(repr(each.value) for each in Longer)}") from None
    allowed = levers_named(levers), exact, levers_named(beside), parse_host_budget(host_budget)
    require_norm(max_norm)
    there = destination(model, device)
    pool = Pool(spill=spill)
    guard = _Guard(model, batch, policy, loss, optimizer, units, *allowed, there, pool)
    guard.clips = max_norm is not None
    if own_checkpointing(model):
        warnings.warn(
            "the model's own checkpointing is off while tightfit's plan is in force; remove() switches it on again",
            stacklevel=2,
        )
    try:
        if micro_batch is not None:
            assert not isinstance(asked, Plan)
            applied = _fitted_in_parts(guard, batch, asked, micro_batch)
        else:
            recorded, made, handle = guard.planned(batch, asked)
            if handle is None:
                applied = Fitted(model, made, trace=recorded, pool=pool, optimizer=optimizer, device=there)
            else:
                applied = handle
                applied.resume(made, recorded)
            guard.in_force(applied, recorded)
    except BaseException:
        guard.remove()
        raise
    applied.on_remove(guard.remove)
    for line in asked_in_vain(model, applied.trace, asked, allowed[0], allowed[2]):
        warnings.warn(line, stacklevel=2)
    applied.loss = loss
    applied.clip_to(max_norm)
    return applied


def _fitted_in_parts(guard: _Guard, batch: Any, budget: str | int, asked: str | int) -> Fitted:
    """The best micro-batches of `batch`, their plan in force."""
    model, loss, there = guard.model, guard.loss, guard.there
    micro_batches.refuse_exact(guard.exact)
    micro_batches.refuse(model)
    asked = micro_batches.micro_batch_asked(asked)
    rows = row_count(batch)
    levers, beside, several = levers_named(guard.levers), levers_named(guard.beside) or frozenset(), rows > 1
    extents: dict[int, _Extent | None] = {}
    device, held_bytes = there or device_of(model), 0 if there is None else in_host_bytes(model)
    lacking = functools.partial(
        lacking_in_host, device=device, held_bytes=held_bytes, spilled=guard.pool.spill is not None
    )
    uncut: Trace | None = None

    def plan_for(size: int, budget: str | int, exact: bool) -> micro_batches.Planned:
        nonlocal uncut
        cut = size < rows
        guard.levers, guard.beside = allowed = micro_batches.cut_levers(levers, beside, cut)
        guard.extent = None
        part = rows_taken(batch, slice(0, size)) if several else batch
        with micro_batches.gradients_in_place(model, cut):
            if not exact:
                recorded, made, _ = guard.planned(part, budget)
                found: micro_batches.Planned = recorded, made, made.budget_bytes
            else:
                recorded = _record(
                    model, part, loss, guard.optimizer, guard.units, tiles=micro_batches.needs_tiles(levers),
                    there=there,
                )  # fmt: skip
                found = micro_batches.exactly(recorded, budget, *allowed, guard.host_budget, lacking)
        extents[size] = guard.extent
        uncut = uncut if cut else found[0]
        return found

    found = micro_batches.solve(
        rows, budget, plan_for, levers, beside, asked, micro_batches.launch_seconds(device),
        host_budget=guard.host_budget, within=functools.partial(within_device, device=device), lacking=lacking,
    )  # fmt: skip
    chosen = found.chosen
    cut = micro_batches.Cut(model, loss, chosen.size, guard.aside, in_float64=there is None)
    applied = None
    if there is not None:  # it runs nowhere else, and may have room there only under the plan
        batch = pytree.tree_map(lambda t: t.to(there) if isinstance(t, torch.Tensor) else t, batch)
        applied = Fitted(model, found.plan, trace=found.trace, pool=guard.pool, optimizer=guard.optimizer, device=there)
    if chosen.accumulation > 1:
        try:
            cut.weigher.divisors, check = cut.compared(batch)
        except BaseException:
            if applied is not None:
                applied.put_back()
            raise
        chosen = micro_batches.weighed(chosen, cut.weigher.divisors[0], check)
        # later parts find gradients, which the plan is for; none of them is a reason to plan anew
        guard.started = {id(p) for p in model.parameters()}
        guard.accumulates = True
    guard.levers, guard.beside = micro_batches.cut_levers(levers, beside, chosen.accumulation > 1)
    guard.extent = extents[chosen.size]
    if applied is None:
        applied = Fitted(model, found.plan, trace=found.trace, pool=guard.pool, optimizer=guard.optimizer)
    # what waits in host memory has the dtype that it was planned with
    cut.in_float64 = cut.in_float64 and not any(lever.left_in_host(found.plan) for lever in used(found.plan))
    applied.cut_by(cut, loss, chosen)
    applied.uncut = uncut
    guard.in_force(applied, found.trace)
    return applied


def _record(
    model: nn.Module,
    batch: Any,
    loss: LossFunction | None,
    optimizer: torch.optim.Optimizer | None,
    units: UnitsAsked,
    tiles: bool,
    *,
    there: torch.device | None = None,
    clips: bool = False,
) -> Trace:
    if clips:
        found = _record(model, batch, loss, optimizer, units, tiles, there=there)
        step = found.optimizer
        return found if step is None else dataclasses.replace(found, optimizer=dataclasses.replace(step, clipped=True))
    if there is not None:  # some of the model is in host memory, and the device may have no room for it
        return trace(model, batch, loss, optimizer, units, fake=True, device=there, tiles=tiles)
    device = device_of(model)
    if are_several(model) and not accelerator.is_host(device):
        # a rank whose unplanned step does not fit would leave the others waiting in the middle of theirs
        return trace(model, batch, loss, optimizer, units, fake=True, device=device, tiles=tiles)
    return trace(model, batch, loss=loss, optimizer=optimizer, units=units, tiles=tiles)


#: Plans of a compiled step that are compiled and measured.
_PROBES = 4
#: A measured peak this near the budget is near enough.
_NEAR = 0.97


def _planned_compiled(
    model: nn.Module,
    batch: Any,
    loss: LossFunction | None,
    optimizer: torch.optim.Optimizer | None,
    record: Callable[[bool], Trace],
    budget: str | int | Plan,
    levers: Collection[Lever] | None,
    applied: Fitted | None,
    host_budget: int | None,
) -> tuple[Trace, Plan, Fitted]:
    """The step and its plan, the plan's peak measured in compiled steps; `applied`, or a handle, to put it in force."""
    if isinstance(budget, Plan):
        raise Unsupported(
            "plan= was given for a compiled model, whose plans are made by measuring compiled steps: give the budget, "
            f"{budget.budget_bytes} bytes, in its place"
        )
    if levers is None:
        whole = "" in compiled_entries(model)
        levers = {each.lever for each in every() if each.is_compiled or (each.is_compiled_around and not whole)}
    recorded = record(False)
    unplanned_bytes = simulate(recorded).peak_bytes
    budget_bytes = parse_bytes(budget, unplanned_bytes)
    measured: dict[int, tuple[int, Plan]] = {}  # by the bytes that the uncompiled step is planned for
    asked_bytes: int = budget_bytes
    for _ in range(_PROBES):
        try:
            made = make_plan(recorded, asked_bytes, levers=levers, host_budget=host_budget)
        except BudgetInfeasible as error:
            if error.least_bytes in measured:
                break
            asked_bytes = error.least_bytes
            made = make_plan(recorded, asked_bytes, levers=levers, host_budget=host_budget)
        if applied is None:
            applied = Fitted(model, made, recorded, optimizer=optimizer)
            applied.suspend()
        peak_bytes = measured_peak_bytes(model, batch, _in_force(applied, made, recorded), loss, optimizer)
        measured[asked_bytes] = peak_bytes, made
        fits = peak_bytes <= budget_bytes
        if fits and (not made.replays or peak_bytes >= _NEAR * budget_bytes):
            break
        low = max((a for a, (peak, _) in measured.items() if peak <= budget_bytes), default=0)
        high = min((a for a, (peak, _) in measured.items() if peak > budget_bytes), default=unplanned_bytes)
        asked_bytes = made.peak_bytes + budget_bytes - peak_bytes
        if not low < asked_bytes < high:
            asked_bytes = high if low and high == unplanned_bytes else (low + high) // 2
        if asked_bytes in measured or asked_bytes <= 0:
            break
    fitting = [(plan, peak) for peak, plan in measured.values() if peak <= budget_bytes]
    if not fitting:
        least_bytes = min(peak for peak, _ in measured.values())
        raise BudgetInfeasible(budget_bytes, least_bytes, ("this is the compiled step's peak as it was measured",))
    made, peak_bytes = min(fitting, key=lambda each: (each[0].recompute_seconds, each[1]))
    assert applied is not None
    return recorded, dataclasses.replace(made, budget_bytes=budget_bytes, peak_bytes=peak_bytes), applied


@contextlib.contextmanager
def _in_force(applied: Fitted, plan: Plan, recorded: Trace) -> Iterator[None]:
    applied.resume(plan, recorded)
    try:
        yield
    finally:
        applied.suspend()


class _Kind(NamedTuple):
    """What a step's plan depends on beside its batch."""

    accumulates: bool  # are there gradients beyond those that were there when the model was fitted?
    trained: frozenset[str]  # the parameters that get gradients: adapters are switched, layers are freed one by one


class _InForce(NamedTuple):
    """A plan, and what it was made for."""

    plan: Plan
    trace: Trace
    extent: _Extent


class _Guard:
    """A forward pre-hook of the whole model: learns the planned batch's extent, then looks at every other batch, and at
    the gradients that are there already: the later micro-batches of accumulated ones need more bytes than the first."""

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        policy: Longer,
        loss: LossFunction | None,
        optimizer: torch.optim.Optimizer | None,
        units: UnitsAsked,
        levers: Collection[Lever] | None,
        exact: bool,
        beside: Collection[Lever] | None,
        host_budget: int | None,
        there: torch.device | None,
        pool: Pool,
    ) -> None:
        self.clips = False  # are gradients clipped by their total norm?
        self.pool, self.there = pool, there  # where what waits is, and where the model is put; None: it lies there
        self.levers, self.exact, self.beside, self.host_budget = levers, exact, beside, host_budget
        self.told = levers is not None and bool(inexact(levers))  # that the plan is not exact
        self.model, self.policy, self.loss, self.optimizer, self.units = model, policy, loss, optimizer, units
        self.applied: Fitted | None = None
        self.first = _Kind(False, frozenset())  # of the step that was planned first
        self.extent: _Extent | None = None  # of the planned batch
        self.started = {id(p) for p in model.parameters() if p.grad is not None}  # gradients that are planned for
        self.accumulates = bool(self.started)  # steps may find gradients, whether or not one does that is planned anew
        self.plans: dict[_Kind, _InForce] = {}
        self.looks = True
        # the model is not shown the whole of a loss function's batch; it is planned anew while the user has it still
        leaves, self.structure = pytree.tree_flatten(batch)
        self.leaves = [weakref.ref(x) if isinstance(x, torch.Tensor) else functools.partial(_same, x) for x in leaves]
        self.warned: set[str] = set()
        # before FSDP2's own, which gathers the weights that a trace would gather again
        sharded = strategy_of(model) is Strategy.FSDP2
        self.handle = model.register_forward_pre_hook(self, with_kwargs=True, prepend=sharded)
        # a hook of a compiled model is compiled with it, and sees nothing
        self.switches = contextlib.ExitStack()
        self.switches.enter_context(doors(model, before=self))

    def planned(
        self, batch: Any, budget: str | int | Plan, applied: Fitted | None = None
    ) -> tuple[Trace, Plan, Fitted | None]:
        model, loss, optimizer = self.model, self.loss, self.optimizer
        record = functools.partial(
            _record, model, batch, loss, optimizer, self.units, there=self.there, clips=self.clips
        )
        if compiled_entries(model):
            if are_several(model):
                raise Unsupported("a compiled model on several ranks is not planned: leave out torch.compile")
            return _planned_compiled(
                model, batch, loss, optimizer, record, budget, self.levers, applied, self.host_budget
            )
        recorded, made = planned(
            record, budget, self.levers, model, self.exact, self.beside, self.host_budget, self.there,
            self.pool.spill is not None,
        )  # fmt: skip
        if not made.exact and not self.told:
            self.told = True
            who = (
                "the plan that was given" if isinstance(budget, Plan) else "nothing exact fits this budget, so the plan"
            )
            warnings.warn(f"{who} {caveats_of(made)}; exact=True forbids it", stacklevel=4)
        return recorded, made, applied

    def in_force(self, applied: Fitted, recorded: Trace) -> None:
        """The first plan is made."""
        if self.extent is not None:
            self.first = self._kind()._replace(accumulates=False)
            self.plans[self.first] = _InForce(applied.plan, recorded, _Extent(*highest(self.model, *self.extent)))
        self.applied = applied

    def _kind(self) -> _Kind:
        """Of the step that is about to run."""
        accumulates = any(p.grad is not None and id(p) not in self.started for p in self.model.parameters())
        return _Kind(accumulates, trained_names(self.model))

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Batches are not looked at meanwhile: they are none of the training's."""
        self.looks = False
        try:
            yield
        finally:
            self.looks = True

    def remove(self) -> None:
        self.handle.remove()
        self.switches.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """In a copy of the model, a pickled one too: a hook that does nothing, and needs no tightfit to be loaded."""
        return getattr, (contextlib.nullcontext(), "__exit__")

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        if self.applied is None:  # the trace is running
            if self.extent is None:
                self.extent = _Extent.of((args, kwargs))
            return
        if not self.plans or not (self.looks and torch.is_grad_enabled() and module.training):
            return
        extent = _Extent.of((args, kwargs))
        kind = self._kind()
        if not kind.trained:  # adapters are off, say: nothing is saved
            return
        waiting = gradients_wait(module)
        known = self.plans.get(kind)
        planned = known or self.plans.get(kind._replace(accumulates=False)) or self.plans[self.first]
        together = steps_together(module)
        if self.policy is not Longer.ALLOW and together:  # what one rank plans anew, all have to
            extent = _Extent(*highest(module, *extent))
            lacks, waiting = anywhere(module, known is None, waiting)
        else:
            lacks = known is None
        exceeds = extent.exceeds(planned.extent)
        if waiting:  # neither can they be put aside, nor does the planned step know them
            self._warn_once(
                "whole gradients wait to be reduced (set_requires_gradient_sync(False)), which the planned step does "
                "not have",
                "reduce in every micro-batch",
            )
            return
        if exceeds:
            if self.policy is Longer.ALLOW:
                return
            said = (
                f"a batch of {extent.elements:,} elements and length {extent.length:,} came"
                f"{' on some rank' if are_several(module) else ''}, but the plan in force is "
                f"for at most {planned.extent.elements:,} and {planned.extent.length:,}"
            )
            advice = "fit the model with the longest batch"
            batch = None if self.loss is not None else _seen(args, kwargs)
        elif lacks:
            if kind.trained != self.first.trained:
                said = "the plan in force is for a step that trains other parameters (another adapter, say)"
                advice = "fit the model anew when what it trains has changed"
            else:
                said = "the parameters have gradients already, but the plan in force is for a step that starts without"
                advice = "fit the model while it has gradients, as the second micro-batch finds it"
            batch = _seen(args, kwargs) if self.loss is None else self._planned_batch()
            extent = planned.extent if self.loss is not None else extent
        else:
            assert known is not None
            if self.applied.plan is not known.plan:
                self.applied.exchange(known.plan, known.trace)
            return
        if are_several(module) and not together:
            self._warn_once(f"{said}; under no_sync or join the ranks cannot plan anew together", advice)
            return
        if kind.trained != self.first.trained:
            self._require_optimizer()
        if self.policy is Longer.REFUSE:
            raise InvalidInput(f"{said}: {advice}, or with longer='replan'")
        if batch is None or self.policy is Longer.ALLOW:
            self._warn_once(said, advice)
            return
        self._replan(batch, extent, kind)

    def _require_optimizer(self) -> None:
        """Its state belongs to the planned step, so it has to be the one of what is trained now."""
        if self.optimizer is None:
            return
        held = {id(p) for group in bare(self.optimizer).param_groups for p in group["params"]}
        if not any(p.requires_grad and id(p) in held for p in self.model.parameters()):
            raise InvalidInput(
                "the optimizer that the model was fitted with holds none of the parameters that are trained now: "
                "remove the plan, and fit the model anew with their optimizer"
            )

    def _warn_once(self, said: str, advice: str) -> None:
        if advice not in self.warned:
            warnings.warn(f"tightfit: {said}, so the budget is not promised; {advice}", stacklevel=5)
            self.warned.add(advice)

    def _planned_batch(self) -> Any:
        leaves = [leaf() for leaf in self.leaves]
        gone = any(x is None and isinstance(leaf, weakref.ref) for x, leaf in zip(leaves, self.leaves, strict=True))
        return None if gone else pytree.tree_unflatten(leaves, self.structure)

    def _replan(self, batch: Any, extent: _Extent, kind: _Kind) -> None:
        applied = self.applied
        assert applied is not None
        budget_bytes = applied.plan.budget_bytes
        self.applied = None
        applied.suspend()
        # for the most gradients that there can be: routing gives other ones in each micro-batch
        try:
            with micro_batches.gradients_in_place(self.model, kind.accumulates or self.accumulates):
                recorded, made, _ = self.planned(batch, budget_bytes, applied)
            applied.resume(made, recorded, agreed=True)
            self.plans[kind] = _InForce(applied.plan, recorded, extent)
        except BaseException:
            applied.resume(applied.plan, applied.trace, agreed=True)
            raise
        finally:
            self.applied = applied


def _same(item: Any) -> Any:
    return item


def _seen(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The batch that the model is called with; None if it cannot be told as one."""
    return None if args and kwargs else dict(kwargs) if kwargs else args
