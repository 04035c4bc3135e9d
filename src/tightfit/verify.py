"""Prove a plan on the real model: the same gradients, a peak within budget, a prediction that held.

The reference is the same step without the plan, from the same parameters, buffers and random state. Gradients and
buffers are compared bit by bit; the peak is the allocator's own count of a whole step, the optimizer's included. A plan
with tiles adds sums in another order: its loss and gradients may be as far from the same step in float64 as 1.5 times
the step without the plan is. So may those of a compiled step, whose kernels are fused otherwise under another plan: the
step without the plan is the compiled one there, random masks are those of the uncompiled step (so that float64 can
have them too), and steps with the compiler's own random numbers are compared with each other.

Invariant: the model, its gradients, the optimizer's state and every random state are left as they were found.
Refused: nothing is passed on trust; a gradient that is missing, of another shape, stride or dtype, is a failure.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tightfit.core import Check, Plan, Proof, format_bytes, make_verb
from tightfit.engine import Applied, apply
from tightfit.parallel import local_of
from tightfit.ranks import anywhere, are_several
from tightfit.step import (
    LossFunction,
    compiled_entries,
    compute_loss,
    cpu_profile,
    device_of,
    environment,
    no_key_value_cache,
    static_bytes_by_category,
    uncompiled,
    undisturbed,
)
from tightfit.tiles import HeadCall, TileStats, in_force
from tightfit.trace import is_random, memory_events

__all__ = [
    "TOLERANCE",
    "Outcome",
    "PeakMeter",
    "against_float64",
    "differences",
    "gradient_checks",
    "measured_peak_bytes",
    "peak_checks",
    "run_step",
    "static_bytes",
    "timed",
    "untrained",
    "verify",
]

PEAK_TOLERANCE = 0.005
TIMED_STEPS = 3


class PeakMeter:
    """How far the allocator's count of live bytes rises inside the block.

    CUDA: `torch.cuda.max_memory_allocated`. CPU: the profiler's memory events, which need no other profiler to be
    running. Read `rise_bytes` after the block.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.rise_bytes = 0
        self._profiler: Any = None
        self._before_bytes = 0

    def __enter__(self) -> PeakMeter:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before_bytes = torch.cuda.memory_allocated(self.device)
        else:
            self._profiler = cpu_profile()
            self._profiler.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.rise_bytes = torch.cuda.max_memory_allocated(self.device) - self._before_bytes
            return
        self._profiler.__exit__(kind, error, where)
        level = 0
        for _, changed_bytes in memory_events(self._profiler):
            level += changed_bytes
            self.rise_bytes = max(self.rise_bytes, level)
        self._profiler = None


def static_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, batch: Any = None) -> int:
    """Bytes that live through a whole step: parameters, gradients that exist now, buffers, batch, optimizer state."""
    return sum(static_bytes_by_category(model, batch, optimizer).values())


def verify(
    model: nn.Module,
    batch: Any,
    plan: Plan,
    loss: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Proof:
    """Run the step with and without `plan` and compare.

    Checks: `gradients` (every parameter, bit by bit; with tiles, each parameter's error against float64, and `loss`
    too), `buffers` (only where there are any), `peak` (measured
    against the budget, 0.5 %), `prediction` (measured against predicted, 0.5 %), `time` (ratio of interleaved steps;
    reported, cannot fail). Pass the same `loss` and `optimizer` that the plan was traced with.

    Raises `PlanMismatch`, `InvalidInput`. A check that fails is not raised: see `Proof.passed`.
    """
    with undisturbed(model, batch) as restart, no_key_value_cache(model):

        def observe() -> Outcome:
            restart()
            compute_loss(model, batch, loss).backward()
            return Outcome(model)

        with uncompiled(model), restart.watching():
            observe()
        reference = observe()
        switch = _Switch(model, plan)
        with switch as applied:
            planned = observe()
            stats = applied.stats()
        if compiled_entries(model):
            checks = _compiled_checks(model, batch, switch, loss, restart)
            checks += [c for c in _compared(model, reference, planned, observe) if c.name == "buffers"]
        elif plan.exact:
            checks = _compared(model, reference, planned, observe)
        else:
            checks = _against_float64(model, batch, switch, loss, restart)
            checks += [c for c in _compared(model, reference, planned, observe) if c.name == "buffers"]
        del planned, reference
        with switch:
            measured_bytes = _peak_bytes(model, batch, loss, optimizer, restart)
        checks += _peak_checks(plan, measured_bytes, compiled=bool(compiled_entries(model)))
        checks.append(_time_check(model, batch, switch, loss, restart, fallbacks=stats.fallbacks))
        switch.close()
    return Proof(checks=tuple(checks), environment=environment())


def gradient_checks(
    model: nn.Module,
    batch: Any,
    plan: Plan,
    loss: LossFunction | None = None,
    reference: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> tuple[Check, ...]:
    """The checks `gradients` and `buffers` of `verify` alone: three steps, no optimizer. The compared step runs inside
    `reference()`: torch's own checkpointing, where the plain step does not fit."""
    with undisturbed(model, batch) as restart, no_key_value_cache(model):

        def observe() -> Outcome:
            with reference():
                restart()
                compute_loss(model, batch, loss).backward()
            return Outcome(model)

        with uncompiled(model), restart.watching():
            observe()
        expected = observe()
        switch = _Switch(model, plan)
        with switch:
            restart()
            compute_loss(model, batch, loss).backward()
            planned = Outcome(model)
        checks = _compared(model, expected, planned, observe)
        if compiled_entries(model):
            checks = [check for check in checks if check.name == "buffers"]
            checks += _compiled_checks(model, batch, switch, loss, restart)
        elif not plan.exact:
            checks = [check for check in checks if check.name == "buffers"]
            checks += _against_float64(model, batch, switch, loss, restart)
        switch.close()
        return tuple(checks)


def peak_checks(
    model: nn.Module,
    batch: Any,
    plan: Plan,
    loss: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> tuple[Check, ...]:
    """The checks `peak` and `prediction` of `verify` alone: one planned step, and one before it that makes the
    optimizer's state."""
    with undisturbed(model, batch) as restart, no_key_value_cache(model), apply(model, plan):
        with uncompiled(model), restart.watching():
            compute_loss(model, batch, loss).backward()
        measured_bytes = _peak_bytes(model, batch, loss, optimizer, restart)
        return tuple(_peak_checks(plan, measured_bytes, compiled=bool(compiled_entries(model))))


class _Switch:
    """A plan that goes in and out of force by one handle, so that what the compiler made under it stays valid."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.plan = plan
        self.applied = apply(model, plan)
        self.applied.suspend()

    def __enter__(self) -> Applied:
        self.applied.resume(self.plan)
        return self.applied

    def __exit__(self, *_: object) -> None:
        self.applied.suspend()

    def close(self) -> None:
        self.applied.remove()


# ------------------------------------------------------------------------------------------- gradients


class Outcome:
    """Copies, on the CPU, of what a step leaves behind."""

    def __init__(self, model: nn.Module) -> None:
        self.gradients = {
            name: None if p.grad is None else _copy(p.grad) for name, p in model.named_parameters() if p.requires_grad
        }
        self.buffers: dict[str, torch.Tensor | None] = {
            name: _copy(b) for name, b in model.named_buffers() if not b.is_meta
        }


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    tensor = local_of(tensor)
    if not tensor.is_sparse:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor.detach())
    return tensor.detach().to("cpu", copy=True)


def _differs(expected: torch.Tensor | None, found: torch.Tensor | None) -> str:
    """How `found` is another tensor than `expected`; empty when they are the same bit for bit."""
    if expected is None or found is None:
        return "" if expected is found else "is missing" if found is None else "is there, though it should not be"
    if expected.layout is not found.layout:
        return f"has the layout {found.layout}, not {expected.layout}"
    if expected.is_sparse:
        expected, found = expected.coalesce().to_dense(), found.coalesce().to_dense()
    for what in ("shape", "dtype"):
        if getattr(expected, what) != getattr(found, what):
            return f"has the {what} {getattr(found, what)}, not {getattr(expected, what)}"
    if expected.stride() != found.stride():
        return f"has the strides {found.stride()}, not {expected.stride()}"
    if _bits(expected).equal(_bits(found)):
        return ""
    return f"differs by up to {_largest_difference(expected, found):.3g}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes as integers, so that NaN equals NaN and zero does not equal minus zero."""
    return tensor.flatten().view(torch.uint8)


def _largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    wide = torch.complex128 if one.is_complex() else torch.float64
    return float((one.to(wide) - other.to(wide)).abs().max())


def differences(expected: Outcome, found: Outcome) -> dict[str, str]:
    """Parameters and buffers that are not the same bit for bit, and how."""
    pairs = [(expected.gradients, found.gradients), (expected.buffers, found.buffers)]
    return {key: how for one, other in pairs for key in one if (how := _differs(one[key], other.get(key)))}


def _compared(model: nn.Module, reference: Outcome, planned: Outcome, observe: Callable[[], Outcome]) -> list[Check]:
    """Where one rank has to run the step once more, all do; a check passes where it passes on every rank."""
    checks = []
    again: Outcome | None = None
    pairs: list[tuple[str, Mapping[str, torch.Tensor | None], Mapping[str, torch.Tensor | None]]] = [
        ("gradients", reference.gradients, planned.gradients),
        ("buffers", reference.buffers, planned.buffers),
    ]
    for name, expected, found in pairs:
        if name == "buffers" and not expected:
            continue
        wrong = {key: how for key in expected if (how := _differs(expected[key], found[key]))}
        tolerance = "none: bit for bit"
        if anywhere(model, bool(wrong))[0]:
            again = again or observe()
            repeated = again.gradients if name == "gradients" else again.buffers
            # a kernel that adds in any order gives other bits each time; the plan can only be held to the same
            unstable = {key for key in wrong if _differs(expected[key], repeated[key]).startswith("differs by")}
            excused = {key for key in unstable if _within(expected[key], found[key], repeated[key])}
            wrong = {key: how for key, how in wrong.items() if key not in excused}
            if excused:
                tolerance = f"bit for bit, but for {len(excused)} that vary without the plan too: twice that"
        first = next(iter(wrong.items()), None)
        here = f"{len(expected)} identical"
        if first is not None:
            here = f"{len(wrong)} of {len(expected)} wrong: {first[0]} {first[1]}"
        elsewhere = anywhere(model, bool(wrong))[0] and first is None
        checks.append(
            Check(
                name=name,
                expected=f"{len(expected)} identical",
                measured=f"{here}; not so on another rank" if elsewhere else here,
                tolerance=tolerance,
                passed=first is None and not elsewhere,
            )
        )
    return checks


def _within(expected: torch.Tensor | None, found: torch.Tensor | None, repeated: torch.Tensor | None) -> bool:
    if expected is None or found is None or repeated is None or expected.shape != found.shape:
        return False
    return _largest_difference(expected, found) <= 2 * _largest_difference(expected, repeated)


# ------------------------------------------------------------------------------------------- float64

#: How much further from float64 than the step without the plan a plan with tiles may be.
TILE_FACTOR = 1.5
TOLERANCE = (
    f"loss and gradients are not bit for bit, but no further from float64 than {TILE_FACTOR} x the step without it"
)
#: Of a model in float64; a larger one has only its head and loss compared, where all that tiles change happens.
_FLOAT64_BYTES = 4 * 2**30
_HEAD_ROWS = 64


class _InFloat64(TorchFunctionMode):
    """Models cast to float32 where they want precision; in a float64 model that would lose it."""

    _CASTS = frozenset({torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16})
    _LOWER = frozenset({torch.float32, torch.float16, torch.bfloat16})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._CASTS:
            return args[0].double()
        args, kwargs = pytree.tree_map(
            lambda item: torch.float64 if isinstance(item, torch.dtype) and item in self._LOWER else item,
            (tuple(args), dict(kwargs or {})),
        )
        return func(*args, **kwargs)


def _double(module: nn.Module) -> nn.Module:
    """A copy of `module` in float64; layers with packed 4-bit weights as linear ones of the numbers they stand for."""
    twin = copy.deepcopy(module)
    holder = nn.ModuleList([twin])
    for parent in list(holder.modules()):
        for name, child in list(parent.named_children()):
            if getattr(getattr(child, "weight", None), "quant_state", None) is not None:
                setattr(parent, name, _unpacked(child))
    return holder[0].double()


@contextlib.contextmanager
def _in_double(model: nn.Module) -> Iterator[None]:
    """`model` itself in float64, with no gradients; outside, the very tensors that it had.

    Not a copy: a loss function may hold the model, and so may a `forward` that somebody replaced (TRL's trainers do).
    """
    undo: list[Callable[[], object]] = []
    made: dict[torch.Tensor, torch.Tensor] = {}  # what is shared stays shared

    def doubled(tensor: torch.Tensor) -> torch.Tensor:
        if tensor not in made:
            twin = tensor.detach().double()
            trained = isinstance(tensor, nn.Parameter)
            made[tensor] = nn.Parameter(twin, requires_grad=tensor.requires_grad) if trained else twin
        return made[tensor]

    try:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if getattr(getattr(child, "weight", None), "quant_state", None) is not None:
                    undo.append(functools.partial(setattr, parent, name, child))
                    setattr(parent, name, _unpacked(child))
        for module in list(model.modules()):
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None and tensor.is_floating_point():
                    undo.append(functools.partial(setattr, module, name, tensor))
                    setattr(module, name, doubled(tensor))
        yield
    finally:
        for put_back in reversed(undo):
            put_back()


def _unpacked(layer: Any) -> nn.Linear:
    """The linear layer that a 4-bit one is, by what it makes of the unit vectors."""
    bias, layer.bias = layer.bias, None
    device = layer.weight.device
    with torch.no_grad():
        weight = layer(torch.eye(layer.in_features, dtype=layer.compute_dtype or torch.float32, device=device)).t()
    linear = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return linear.train(layer.training)


@contextlib.contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Random masks are drawn differently in another dtype, so what is compared across dtypes draws none."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _InFloat64():
            yield
    finally:
        torch.set_default_dtype(before)


def against_float64(model: nn.Module, batch: Any, plan: Plan, loss: LossFunction | None = None) -> list[Check]:
    """Checks `loss` and `gradients` of a plan with tiles, as `verify` makes them."""
    with undisturbed(model, batch) as restart, no_key_value_cache(model):
        return _against_float64(model, batch, _Switch(model, plan), loss, restart)


def _against_float64(
    model: nn.Module, batch: Any, switch: _Switch, loss: LossFunction | None, restart: Callable[[], None]
) -> list[Check]:
    """Loss and gradients with and without the plan, each against the same in float64."""
    with _without_dropout(model):
        whole = 8 * sum(p.numel() for p in model.parameters()) <= _FLOAT64_BYTES
        if whole:
            what = "of the step"
            untiled, tiled, exact = _whole_steps(model, batch, switch, loss, restart)
        else:
            what = "of the head and its loss, from the step's own hidden states"
            untiled, tiled, exact = _heads(model, batch, switch.plan, loss, restart)
        errors = {name: _errors(untiled.get(name), tiled.get(name), exact[name]) for name in exact}
        if whole:
            errors = _more_draws(errors, exact, model, batch, switch, loss, restart)
    return [
        _float64_check("loss", {"loss": errors.pop("loss")}, what),
        _float64_check("gradients", errors, what),
    ]


#: By what else the loss is scaled where one step does not show whether an error is larger.
_SCALES = (0.7, 1.3, 0.9)


def _more_draws(
    errors: dict[str, Errors],
    exact: Named,
    model: nn.Module,
    batch: Any,
    switch: _Switch,
    loss: LossFunction | None,
    restart: Callable[[], None],
) -> dict[str, Errors]:
    """`errors`, or where one step does not decide, those of four: the error of a small gradient is a few roundings, and
    another scale of the loss has other ones."""
    if all(_ratio(each) <= limit(each) for each in errors.values()):
        return errors
    found = [errors]
    for scale in _SCALES:
        one, other = _two_steps(model, batch, switch, loss, restart, scale)
        found.append(
            {
                name: _errors(one.get(name), other.get(name), true if name == "loss" else true * scale)
                for name, true in exact.items()
            }
        )
    return {name: _mean([each[name] for each in found]) for name in exact}


Named = dict[str, torch.Tensor]


def _step(model: nn.Module, batch: Any, loss: LossFunction | None, scale: float = 1.0) -> Named:
    value = compute_loss(model, batch, loss)
    (value * scale).backward()
    found = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": value.detach()}


def _two_steps(
    model: nn.Module,
    batch: Any,
    switch: _Switch,
    loss: LossFunction | None,
    restart: Callable[[], None],
    scale: float = 1.0,
) -> tuple[Named, Named]:
    restart()
    untiled = _step(model, batch, loss, scale)
    with switch:
        restart()
        tiled = _step(model, batch, loss, scale)
    return untiled, tiled


def _whole_steps(
    model: nn.Module, batch: Any, switch: _Switch, loss: LossFunction | None, restart: Callable[[], None]
) -> tuple[Named, Named, Named]:
    untiled, tiled = _two_steps(model, batch, switch, loss, restart)
    restart()
    doubled = pytree.tree_map(
        lambda item: item.double() if isinstance(item, torch.Tensor) and item.is_floating_point() else item, batch
    )
    with uncompiled(model), _in_double(model), _float64(), _DrawsInFloat32():
        exact = _step(model, doubled, loss)
    restart()
    return untiled, tiled, exact


def _heads(
    model: nn.Module, batch: Any, plan: Plan, loss: LossFunction | None, restart: Callable[[], None]
) -> tuple[Named, Named, Named]:
    assert plan.tiling is not None
    calls: list[HeadCall] = []
    restart()
    with in_force(model, plan.tiling, TileStats(witness=calls.append)):
        compute_loss(model, batch, loss)
    found: tuple[Named, Named, Named] = ({}, {}, {})
    for number, call in enumerate(calls):
        twin = _double(call.job.head.module)
        with _float64():
            exact = call.in_float64(twin, _HEAD_ROWS)
        for into, each in zip(found, (call.untiled(), call.tiled(), exact), strict=True):
            into.update({f"{name} of loss {number + 1}" if number else name: t for name, t in each.items()})
    restart()
    return found


@dataclass(frozen=True, slots=True)
class Errors:
    """Of one tensor, against float64: the norms of the errors without and with the plan, over one or more steps."""

    untiled: float
    tiled: float
    rounding: float  # what rounding every number to the dtype may cost
    size: int  # numbers
    draws: int  # steps


def _errors(untiled: torch.Tensor | None, tiled: torch.Tensor | None, exact: torch.Tensor) -> Errors:
    size = exact.numel()
    if untiled is None or tiled is None or tiled.shape != untiled.shape or tiled.dtype is not untiled.dtype:
        return Errors(untiled=0.0, tiled=math.inf, rounding=0.0, size=size, draws=1)
    one, other = (float((t.double() - exact).norm()) for t in (untiled, tiled))
    return Errors(
        untiled=one,
        tiled=other,
        rounding=float(exact.norm()) * torch.finfo(untiled.dtype).eps / 2,
        size=size,
        draws=1,
    )


def _mean(each: list[Errors]) -> Errors:
    def mean(sizes: list[float]) -> float:
        return math.sqrt(sum(x * x for x in sizes) / len(sizes))

    return Errors(
        untiled=mean([e.untiled for e in each]),
        tiled=mean([e.tiled for e in each]),
        rounding=mean([e.rounding for e in each]),
        size=each[0].size,
        draws=len(each),
    )


def _ratio(errors: Errors) -> float:
    """The error with tiles against that without, or against one rounding where that is more: nothing is nearer than
    that but by luck."""
    ratio = errors.tiled / max(errors.untiled, errors.rounding, 1e-300) if errors.tiled else 0.0
    return ratio if ratio == ratio else math.inf  # no number is beyond any limit


#: Of the normal distribution, what one in a hundred million lies above.
_ONE_IN_1E8 = 5.612
#: Of the square root of a tensor's numbers, as many errors count as independent.
_INDEPENDENT = 2 / 3


def limit(errors: Errors) -> float:
    """How many times the untiled error the tiled one may be.

    Two sums of the same terms in another order have errors of the same size, not the same errors. For one step the
    limit is `TILE_FACTOR`, or the distance of two neighbours in the dtype. Where that does not decide, the mean squares
    of the errors over several steps are compared, as two variances are. Half the logarithm of their ratio is near a
    normal distribution with variance 1 / (d - 1), where d is the number of independent errors in each (Fisher's z;
    Snedecor and Cochran, Statistical Methods). The numbers of one tensor share roundings. Of n numbers two thirds of
    the square root of n count as independent: `benchmarks/rounding.py` finds on each processor's kernels that this is
    few enough.

    So the limit is passed by chance once in 10^8 tensors whose error is truly `TILE_FACTOR` times as large, and less
    often where it is not (of fewer than 16 numbers, once in 10^5).
    """
    if errors.draws == 1:
        one_rounding = 2 * errors.rounding / max(errors.untiled, errors.rounding, 1e-300)
        return max(TILE_FACTOR, one_rounding)
    return TILE_FACTOR * math.exp(_ONE_IN_1E8 / math.sqrt(errors.draws * _INDEPENDENT * math.sqrt(errors.size) - 1))


_HOW = (
    "own error against float64 (at least one rounding); where one step does not decide, over four, by as much more as "
    "chance needs (one false alarm in 10^8 tensors)"
)
_TILED = ("tiles", f"{TILE_FACTOR} x the untiled run's {_HOW}; dropout off")
_COMPILED = ("the plan", f"{TILE_FACTOR} x the compiled run's {_HOW}; dropout as it is")


def _float64_check(name: str, errors: dict[str, Errors], what: str, said: tuple[str, str] = _TILED) -> Check:
    wrong = [key for key in errors if _ratio(errors[key]) > limit(errors[key])]
    worst = max(errors, key=lambda key: _ratio(errors[key]) / limit(errors[key]), default=None)
    without, tolerance = said
    measured = f"{len(errors)} within" if not wrong else f"{len(wrong)} of {len(errors)} beyond, first {wrong[0]}"
    if worst is not None:
        each = errors[worst]
        size = f", norm of error {each.tiled:.3g} against {each.untiled:.3g}" if each.rounding else ""
        allowed = "" if each.draws == 1 else f" of {limit(each):.2f} x allowed for {each.size} numbers"
        measured += f"; worst {_ratio(each):.2f} x{allowed} at {worst}{size}"
    return Check(
        name=name,
        expected=f"the error {what} against float64 is at most {TILE_FACTOR} x that without {without}",
        measured=measured,
        tolerance=tolerance,
        passed=not wrong,
    )


# ---------------------------------------------------------------------------------------------- compiled


class _DrawsInFloat32(TorchDispatchMode):
    """Random numbers of a float64 step as the float32 step has them: kernels draw others in another dtype."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_random(func, args, kwargs):
            return func(*args, **kwargs)
        if func._schema.is_mutable and args[0].dtype is torch.float64:
            return args[0].copy_(func(torch.empty_like(args[0], dtype=torch.float32), *args[1:], **kwargs))
        if func is torch.ops.aten.native_dropout.default or kwargs.get("dtype", args[0].dtype) is not torch.float64:
            return func(*args, **kwargs)
        return func(*args, **(kwargs | {"dtype": torch.float32})).double()


@contextlib.contextmanager
def _eagers_random_numbers() -> Iterator[None]:
    """Compile anew, with the random numbers of the uncompiled step; compiled anew once more outside."""
    import torch._inductor.config as inductor_config

    torch.compiler.reset()
    try:
        with inductor_config.patch(fallback_random=True):
            yield
    finally:
        torch.compiler.reset()


def _compiled_checks(
    model: nn.Module, batch: Any, switch: _Switch, loss: LossFunction | None, restart: Callable[[], None]
) -> list[Check]:
    """Loss and gradients of the compiled step with and without the plan, each against float64; and where the step draws
    random numbers, with the compiler's own ones, against each other."""
    restart()
    state = torch.get_rng_state()
    own = _two_steps(model, batch, switch, loss, restart)
    draws = not torch.equal(state, torch.get_rng_state())
    with _eagers_random_numbers() if draws else contextlib.nullcontext():
        unplanned, planned, exact = _whole_steps(model, batch, switch, loss, restart)
        errors = {name: _errors(unplanned.get(name), planned.get(name), exact[name]) for name in exact}
        errors = _more_draws(errors, exact, model, batch, switch, loss, restart)
    checks = [_float64_check("loss", {"loss": errors["loss"]}, "of the compiled step", _COMPILED)]
    gradients = {name: each for name, each in errors.items() if name != "loss"}
    checks.append(_float64_check("gradients", gradients, "of the compiled step", _COMPILED))
    if draws:
        checks.append(_random_check(own, errors))
    return checks


def _random_check(own: tuple[Named, Named], errors: dict[str, Errors]) -> Check:
    """Two that are each so near the exact one are at most the sum apart; another mask is orders of magnitude off."""
    one, other = own
    wrong, worst = [], 0.0
    for name, each in errors.items():
        if name not in one or name not in other:
            wrong.append(name)
            continue
        apart = (1 + limit(each)) * max(each.untiled, each.rounding, 1e-300)
        ratio = float((one[name].double() - other[name].double()).norm()) / apart
        worst = max(worst, ratio)
        if not ratio <= 1:
            wrong.append(name)
    return Check(
        name="random numbers",
        expected="with the compiler's own random numbers, the same loss and gradients as without the plan",
        measured=f"{len(errors) - len(wrong)} of {len(errors)} the same, worst {worst:.2g} of the tolerance"
        + (f", first {wrong[0]}" if wrong else ""),
        tolerance=f"1 + what the plan may be ({TILE_FACTOR} or more) x the compiled run's own error against float64",
        passed=not wrong,
    )


def measured_peak_bytes(
    model: nn.Module,
    batch: Any,
    in_force: contextlib.AbstractContextManager[Any],
    loss: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> int:
    """The peak of a whole step within `in_force`, by the allocator's count, compiled where the model is."""
    with undisturbed(model, batch) as restart, no_key_value_cache(model):
        with uncompiled(model), restart.watching():
            compute_loss(model, batch, loss).backward()
        with in_force:
            return _peak_bytes(model, batch, loss, optimizer, restart)


# ------------------------------------------------------------------------------------------------ peak


def run_step(model: nn.Module, batch: Any, loss: LossFunction | None, optimizer: torch.optim.Optimizer | None) -> None:
    """Forward, backward, optimizer step; the gradients stay."""
    compute_loss(model, batch, loss).backward()
    if optimizer is not None:
        optimizer.step()


def _peak_bytes(
    model: nn.Module,
    batch: Any,
    loss: LossFunction | None,
    optimizer: torch.optim.Optimizer | None,
    restart: Callable[[], None],
) -> int:
    """The highest count of live bytes in one whole step, once the optimizer has its state."""
    with untrained(optimizer):
        if optimizer is not None or compiled_entries(model):  # state is made, and code compiled, in the first step
            restart()
            run_step(model, batch, loss, optimizer)
        found = []
        # gloo's threads hold a buffer a little longer now and then, so there the steps that they did not count
        for _ in range(_GLOO_STEPS if are_several(model) and device_of(model).type == "cpu" else 1):
            restart()
            before_bytes = static_bytes(model, optimizer, batch)
            with PeakMeter(device_of(model)) as meter:
                run_step(model, batch, loss, optimizer)
            found.append(before_bytes + meter.rise_bytes)
    return min(found)


_GLOO_STEPS = 6


@contextlib.contextmanager
def untrained(optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Let the optimizer step inside; afterwards the parameters and its state are what they were."""
    if optimizer is None:
        yield
        return
    optimizer = getattr(optimizer, "optimizer", optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    values = [_copy(p) for p in parameters]
    states = {
        p: {k: (v, _copy(v)) if isinstance(v, torch.Tensor) else (v, v) for k, v in optimizer.state[p].items()}
        for p in parameters
        if p in optimizer.state
    }
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                local_of(parameter).copy_(value)
            for parameter in parameters:
                if parameter not in states:
                    optimizer.state.pop(parameter, None)
                    continue
                restored = {}
                for key, (original, value) in states[parameter].items():
                    if isinstance(original, torch.Tensor):
                        local_of(original).copy_(value)
                    restored[key] = original
                optimizer.state[parameter] = restored


def _peak_checks(plan: Plan, measured_bytes: int, compiled: bool = False) -> list[Check]:
    over = measured_bytes / plan.budget_bytes - 1
    off = measured_bytes / plan.peak_bytes - 1
    measured = f"{format_bytes(measured_bytes)} ({measured_bytes} B)"
    return [
        Check(
            name="peak",
            expected=f"at most {format_bytes(plan.budget_bytes)} ({plan.budget_bytes} B)",
            measured=measured,
            tolerance=f"{PEAK_TOLERANCE:.1%} over",
            passed=over <= PEAK_TOLERANCE,
        ),
        Check(
            name="prediction",
            expected=f"{format_bytes(plan.peak_bytes)} ({plan.peak_bytes} B)",
            measured=f"{measured}, off by {off:+.3%}",
            tolerance="reported only: a compiled step has other temporaries than the one that was traced"
            if compiled
            else f"{PEAK_TOLERANCE:.1%} either way",
            passed=compiled or abs(off) <= PEAK_TOLERANCE,
        ),
    ]


# ------------------------------------------------------------------------------------------------ time


def timed(device: torch.device, run: Callable[[], None]) -> float:
    """Seconds of `run`, the device's queue drained before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _time_check(
    model: nn.Module,
    batch: Any,
    switch: _Switch,
    loss: LossFunction | None,
    restart: Callable[[], None],
    fallbacks: int,
) -> Check:
    device, plan = device_of(model), switch.plan

    def step() -> None:
        compute_loss(model, batch, loss).backward()

    if compiled_entries(model):  # both ways, so that no compilation is timed
        restart()
        step()
        with switch:
            restart()
            step()
    ratios = []
    for _ in range(TIMED_STEPS):
        restart()
        without = timed(device, step)
        with switch:
            restart()
            ratios.append(timed(device, step) / without)
    unplanned_seconds = plan.step_seconds - plan.recompute_seconds
    expected = plan.step_seconds / unplanned_seconds if unplanned_seconds else 1.0
    found = f"{statistics.median(ratios):.2f} x, median of {TIMED_STEPS} interleaved pairs"
    return Check(
        name="time",
        expected=f"{expected:.2f} x the step without the plan",
        measured=found + (f"; {fallbacks} units were replayed whole" if fallbacks else ""),
        tolerance="reported only: seconds are noisy",
        passed=True,
    )


make_verb(__name__, verify)
