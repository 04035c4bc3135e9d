"""The same step in float64, which steps that add in another order are held against.

Invariant: dropout is off or its masks are those of the step in its own dtype.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tightfit.core import Check, Plan
from tightfit.levers import used
from tightfit.step.ops import is_random
from tightfit.step.patches import no_key_value_cache, uncompiled
from tightfit.step.run import LossFunction, compute_loss
from tightfit.step.snapshot import undisturbed
from tightfit.verify.gradients import Switch
from tightfit.verify.rounding import (
    COMPILED,
    Errors,
    Named,
    errors_of,
    float64_check,
    limit,
    mean_of,
    random_check,
    ratio_of,
)

#: Of a model in float64; a larger one has only its head and loss compared, where all that tiles change happens.
FLOAT64_BYTES = 4 * 2**30


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
def in_double(model: nn.Module) -> Iterator[None]:
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
def float64_arithmetic() -> Iterator[None]:
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
        return float64_checks(model, batch, Switch(model, plan), loss, restart)


def float64_checks(
    model: nn.Module, batch: Any, switch: Switch, loss: LossFunction | None, restart: Callable[[], None]
) -> list[Check]:
    """Loss and gradients with and without the plan, each against the same in float64."""
    with _without_dropout(model):
        whole = 8 * sum(p.numel() for p in model.parameters()) <= FLOAT64_BYTES
        if whole:
            what = "of the step"
            untiled, tiled, exact = _whole_steps(model, batch, switch, loss, restart)
        else:
            what = "of the head and its loss, from the step's own hidden states"
            untiled, tiled, exact = _pieces(model, batch, switch.plan, loss, restart)
        errors = {name: errors_of(untiled.get(name), tiled.get(name), exact[name]) for name in exact}
        if whole:
            errors = _more_draws(errors, exact, model, batch, switch, loss, restart)
    return [
        float64_check("loss", {"loss": errors.pop("loss")}, what),
        float64_check("gradients", errors, what),
    ]


#: By what else the loss is scaled where one step does not show whether an error is larger.
_SCALES = (0.7, 1.3, 0.9)


def _more_draws(
    errors: dict[str, Errors],
    exact: Named,
    model: nn.Module,
    batch: Any,
    switch: Switch,
    loss: LossFunction | None,
    restart: Callable[[], None],
) -> dict[str, Errors]:
    """`errors`, or where one step does not decide, those of four: the error of a small gradient is a few roundings, and
    another scale of the loss has other ones."""
    if all(ratio_of(each) <= limit(each) for each in errors.values()):
        return errors
    found = [errors]
    for scale in _SCALES:
        one, other = _two_steps(model, batch, switch, loss, restart, scale)
        found.append(
            {
                name: errors_of(one.get(name), other.get(name), true if name == "loss" else true * scale)
                for name, true in exact.items()
            }
        )
    return {name: mean_of([each[name] for each in found]) for name in exact}


def _step(model: nn.Module, batch: Any, loss: LossFunction | None, scale: float = 1.0) -> Named:
    value = compute_loss(model, batch, loss)
    (value * scale).backward()
    found = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": value.detach()}


def _two_steps(
    model: nn.Module,
    batch: Any,
    switch: Switch,
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
    model: nn.Module, batch: Any, switch: Switch, loss: LossFunction | None, restart: Callable[[], None]
) -> tuple[Named, Named, Named]:
    untiled, tiled = _two_steps(model, batch, switch, loss, restart)
    restart()
    doubled = pytree.tree_map(
        lambda item: item.double() if isinstance(item, torch.Tensor) and item.is_floating_point() else item, batch
    )
    with uncompiled(model), in_double(model), float64_arithmetic(), _DrawsInFloat32():
        exact = _step(model, doubled, loss)
    restart()
    return untiled, tiled, exact


def _pieces(
    model: nn.Module, batch: Any, plan: Plan, loss: LossFunction | None, restart: Callable[[], None]
) -> tuple[Named, Named, Named]:
    """What each inexact lever of `plan` says of its own results."""

    def step() -> None:
        restart()
        compute_loss(model, batch, loss)

    found: tuple[Named, Named, Named] = ({}, {}, {})
    for lever in used(plan):
        if not lever.is_exact:
            for into, each in zip(
                found, lever.pieces_in_float64(step, model, plan, _double, float64_arithmetic), strict=True
            ):
                into.update(each)
    restart()
    return found


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


def compiled_checks(
    model: nn.Module, batch: Any, switch: Switch, loss: LossFunction | None, restart: Callable[[], None]
) -> list[Check]:
    """Loss and gradients of the compiled step with and without the plan, each against float64; and where the step draws
    random numbers, with the compiler's own ones, against each other."""
    restart()
    state = torch.get_rng_state()
    own = _two_steps(model, batch, switch, loss, restart)
    draws = not torch.equal(state, torch.get_rng_state())
    with _eagers_random_numbers() if draws else contextlib.nullcontext():
        unplanned, planned, exact = _whole_steps(model, batch, switch, loss, restart)
        errors = {name: errors_of(unplanned.get(name), planned.get(name), exact[name]) for name in exact}
        errors = _more_draws(errors, exact, model, batch, switch, loss, restart)
    checks = [float64_check("loss", {"loss": errors["loss"]}, "of the compiled step", COMPILED)]
    gradients = {name: each for name, each in errors.items() if name != "loss"}
    checks.append(float64_check("gradients", gradients, "of the compiled step", COMPILED))
    if draws:
        checks.append(random_check(own, errors))
    return checks
