"""Is the loss of a batch a weighted sum of the losses of its parts? Found out by comparing.

Idea: if it is, loss and gradients of a batch and of its parts, added up, are the same numbers but for rounding. In
float64 that rounding is so small that nothing else can pass for it. How small is derived, not chosen: to first order
the error of a computation is proportional to the unit roundoff u. So what a step in its own dtype is off from float64,
times the ratio of the two u, is what a float64 step is off from the exact one. Two steps that are each that near are at
most the sum apart; the same factor as for tiles (`rounding.TILE_FACTOR`) allows for sums in another order.

The step's own errors are reported beside it: cut and uncut, each against float64.

Distances and errors are parts of what was added, and not of the sum: a sum may cancel to nothing, and beside that any
error is infinite, and any limit that follows from it.

Dropout draws nothing meanwhile, since parts draw other masks than the whole. Statistics of the batch stay on.

Invariant: the model is left as it was found. Where no float64 step is possible (a large model, an op without a kernel
for it), own dtype is compared with own dtype, against what the uncut step differs by when its rows stand in another
order. That shows less, and the check says so.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tightfit.accelerator import HOST
from tightfit.core import Check, InvalidInput, Unsupported
from tightfit.step.patches import no_key_value_cache, uncompiled
from tightfit.step.rows import Divisor, row_count, rows_taken, weights_of
from tightfit.step.run import LossFunction, compute_loss, loss_value, tensors_in
from tightfit.step.snapshot import Snapshot, random_states, undisturbed
from tightfit.verify.float64 import FLOAT64_BYTES, float64_arithmetic, in_double
from tightfit.verify.rounding import TILE_FACTOR

__all__ = ["compared_cut", "loss_apart"]

_NAME = "micro-batches"
_EXPECTED = "loss and gradients of the parts add up to those of the whole (relative norm)"
Gradients = dict[str, torch.Tensor]


def compared_cut(
    model: nn.Module,
    whole: Any,
    parts: Sequence[Any],
    rows: Sequence[int],
    loss: LossFunction | None = None,
    divisors: Sequence[Divisor] = tuple(Divisor),
    beside: Sequence[nn.Module] = (),
    *,
    in_float64: bool = True,
) -> tuple[tuple[Divisor, ...], Check]:
    """Those of `divisors` by which the parts add up to the whole, and the check that says so.

    `rows`: of each part. `beside`: other modules that the loss runs. The nearest comes first; more than one is left
    where they weigh these parts alike. `in_float64`: in float64 too, where that can be.
    """
    weights = {each: found for each in divisors if (found := weights_of(each, parts, rows)) is not None}
    with contextlib.ExitStack() as stack:
        restart = stack.enter_context(undisturbed(model, (whole, *parts)))
        stack.enter_context(no_key_value_cache(model))
        stack.enter_context(uncompiled(model))
        stack.enter_context(_no_masks(model, lambda: _step(model, whole, loss, restart)))
        try:
            own = [_step(model, batch, loss, restart) for batch in (whole, *parts)]
        except InvalidInput as refused:  # batch normalisation of one row
            return (), Check(
                name=_NAME, expected=_EXPECTED, measured=f"not alike: {refused}", tolerance="", passed=False
            )
        exact = _steps_in_float64((model, *beside), (whole, *parts), loss, restart) if in_float64 else None
        again = _reordered(model, whole, sum(rows), loss, restart) if exact is None else None
    unit = max(_unit(tensor.dtype) for tensor in own[0].values())
    # an own dtype with fewer digits than float32 adds up in float32: its error says nothing of long sums
    shrunk = 1.0 if exact is None else _unit(torch.float64) / min(unit, 2.0**-24)
    compared = own if exact is None else exact

    def measures(factors: Sequence[float]) -> tuple[float, float]:
        """How far the parts are from the whole, and what the step's own error is, each as a part of the largest of the
        sums. A sum may cancel to nothing, and its rounding is that of what was added."""
        used = [(one, other, w) for one, other, w in zip(own[1:], compared[1:], factors, strict=True) if w]
        scale = _larger(_norms(own[0]), _norms(compared[0]))
        for sums in ([(one, w) for one, _, w in used], [(other, w) for _, other, w in used]):
            scale = _larger(scale, _weighed(((_norms(each), w) for each, w in sums)))
        errors = _norms(_minus(own[0], again if exact is None else exact[0]))
        if exact is not None:
            errors = _larger(errors, _weighed((_norms(_minus(one, other)), w) for one, other, w in used))
        distance = _norms(_minus(compared[0], _added(compared[1:], factors)))
        return _relative(distance, scale), max(_relative(errors, scale), unit)

    seen = {each: measures(factors) for each, factors in weights.items()}
    apart = {each: distance for each, (distance, _) in seen.items()}
    limits = {each: 2 * TILE_FACTOR * error * shrunk for each, (_, error) in seen.items()}
    # a limit as large as what is compared would let anything pass
    held = tuple(each for each in sorted(apart, key=lambda each: apart[each]) if apart[each] <= limits[each] < 1)
    nearest = min(apart, key=lambda each: apart[each])
    limit, error = limits[nearest], seen[nearest][1]
    if exact is None:
        said = (
            f"no step in float64 is possible here, so 2 x {TILE_FACTOR} x what the uncut step is off from itself with "
            f"its rows in another order ({error:.2g})"
        )
    else:
        said = (
            f"2 x {TILE_FACTOR} x what steps in their own dtype are off from float64 ({error:.2g}) x the ratio of the "
            f"roundings ({shrunk:.2g})"
        )
    measured = f"{apart[nearest]:.2g} apart, taken as divided by {nearest.value}"
    if exact is not None and held:
        cut, uncut = _apart(_added(own[1:], weights[nearest]), exact[0]), _apart(own[0], exact[0])
        measured += f"; in the step's own dtype {cut:.2g} from float64 cut, {uncut:.2g} uncut"
    check = Check(
        name=_NAME,
        expected=_EXPECTED + ("" if exact is None else ", in float64"),
        measured=measured,
        tolerance=f"{limit:.2g}: {said}",
        passed=bool(held),
    )
    return held, check


def loss_apart(
    model: nn.Module, whole: Any, parts: Sequence[Any], weights: Sequence[float], loss: LossFunction | None = None
) -> tuple[float, float]:
    """How far the loss of `whole` is from the weighted losses of its parts, as a part of them, and how far rounding may
    take it. No gradients are made, so that it costs little beside a step.

    The limit is coarse (a hundred roundings of the loss's dtype): what it is to find is a row or a label that is not
    counted, which moves the loss by far more.
    """
    with contextlib.ExitStack() as stack:
        restart = stack.enter_context(undisturbed(model, (whole, *parts)))
        stack.enter_context(no_key_value_cache(model))
        stack.enter_context(uncompiled(model))
        stack.enter_context(torch.no_grad())

        def value_of(batch: Any) -> torch.Tensor:
            restart()
            return loss_value(model, batch, loss)

        stack.enter_context(_no_masks(model, lambda: value_of(whole)))
        uncut = value_of(whole)
        values = [(value_of(part), weight) for part, weight in zip(parts, weights, strict=True) if weight]
    sizes = sum(abs(weight * float(value)) for value, weight in values)
    cut = sum(weight * float(value) for value, weight in values)
    distance = abs(float(uncut) - cut) / max(sizes, abs(float(uncut)), 1e-300)
    return distance, 100 * max(_unit(uncut.dtype), 2.0**-24)


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _step(model: nn.Module, batch: Any, loss: LossFunction | None, restart: Snapshot) -> Gradients:
    """Loss and gradients, on the CPU."""
    restart()
    with restart.watching():
        value = compute_loss(model, batch, loss)
        value.backward()
    found = {n: p.grad.detach().to(HOST, copy=True) for n, p in model.named_parameters() if p.grad is not None}
    return {n: t.to_dense() if t.is_sparse else t for n, t in found.items()} | {"": value.detach().to(HOST)}


def _steps_in_float64(
    models: Sequence[nn.Module], batches: Sequence[Any], loss: LossFunction | None, restart: Snapshot
) -> list[Gradients] | None:
    model = models[0]
    if any(p.dtype is torch.float64 for p in model.parameters()):
        return None  # it is its own dtype, so nothing more exact is there to hold it against
    if 8 * sum(p.numel() for each in models for p in each.parameters()) > FLOAT64_BYTES:
        return None
    doubled = [
        pytree.tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, batch)
        for batch in batches
    ]
    restart()
    try:
        with contextlib.ExitStack() as stack:
            for each in models:
                stack.enter_context(in_double(each))
            stack.enter_context(float64_arithmetic())
            narrow = stack.enter_context(_Narrow())
            found = []
            for batch in doubled:
                for parameter in model.parameters():
                    parameter.grad = None
                value = compute_loss(model, batch, loss)
                _backward(value)
                gradients = {n: p.grad.detach().to(HOST) for n, p in model.named_parameters() if p.grad is not None}
                found.append(gradients | {"": value.detach().to(HOST)})
    except Exception:  # whatever a kernel that has no float64 raises; the comparison in the step's own dtype is left
        return None
    finally:
        restart()
    return None if narrow.met or any(t.dtype is not torch.float64 for t in found[0].values()) else found


def _backward(value: torch.Tensor) -> None:
    """`value.backward()`, which takes function modes off: functions with a backward of their own would round there."""
    run: Any = torch.autograd.Variable._execution_engine.run_backward  # type: ignore[attr-defined]  # of C++
    run((value,), (torch.ones_like(value),), False, False, (), allow_unreachable=True, accumulate_grad=True)


class _Narrow(TorchDispatchMode):
    """Notes whether any number was rounded to fewer digits than float64 has."""

    met = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.met = self.met or any(t.is_floating_point() and t.dtype is not torch.float64 for t in tensors_in(out))
        return out


def _reordered(model: nn.Module, whole: Any, rows: int, loss: LossFunction | None, restart: Snapshot) -> Gradients:
    """The step with its rows in the reverse order, where they can be told, and its loss scaled in backward: all sums
    and products round in other ways."""
    with contextlib.suppress(Unsupported):
        if row_count(whole) == rows:  # the examples, and not the halves of pairs
            whole = rows_taken(whole, range(rows - 1, -1, -1))
    scale = 0.7

    def scaled(model: nn.Module, batch: Any) -> torch.Tensor:
        return compute_loss(model, batch, loss) * scale

    return {name: tensor / scale for name, tensor in _step(model, whole, scaled, restart).items()}


def _added(parts: Sequence[Gradients], weights: Sequence[float]) -> Gradients:
    total: Gradients = {}
    for part, weight in zip(parts, weights, strict=True):
        if weight == 0:
            continue  # the mean of nothing is no number
        for name, tensor in part.items():
            total[name] = total[name] + weight * tensor if name in total else weight * tensor
    return total


#: Of the loss, and of all gradients as one vector.
_Norms = tuple[float, float]


def _norms(of: Gradients) -> _Norms:
    squares = [0.0, 0.0]
    for name, tensor in of.items():
        squares[0 if name == "" else 1] += float(tensor.double().norm()) ** 2
    return math.sqrt(squares[0]), math.sqrt(squares[1])


def _minus(one: Gradients, other: Gradients | None) -> Gradients:
    """A gradient that only one of them has is nothing in the other."""
    assert other is not None
    left = {name: tensor.double() for name, tensor in one.items()}
    for name, tensor in other.items():
        left[name] = left[name] - tensor.double() if name in left else -tensor.double()
    return left


def _weighed(norms: Iterable[tuple[_Norms, float]]) -> _Norms:
    weighed = [(abs(w) * loss, abs(w) * gradients) for (loss, gradients), w in norms]
    return sum(loss for loss, _ in weighed), sum(gradients for _, gradients in weighed)


def _larger(one: _Norms, other: _Norms) -> _Norms:
    loss, gradients = (max(pair, key=lambda x: (math.isnan(x), x)) for pair in zip(one, other, strict=True))
    return loss, gradients


def _relative(norms: _Norms, scale: _Norms) -> float:
    """The larger of the two, each as a part of its scale. What is no number is infinitely far."""
    found = [n / w if w else (0.0 if n == 0 else math.inf) for n, w in zip(norms, scale, strict=True)]
    return math.inf if any(math.isnan(x) for x in (*found, *scale)) else max(found)


def _apart(one: Gradients, other: Gradients) -> float:
    """The larger of the relative distances of the losses, and of all gradients as one vector."""
    return _relative(_norms(_minus(one, other)), _larger(_norms(one), _norms(other)))


class _NoDropout(TorchFunctionMode):
    """Dropout lets everything through; all else is as in training."""

    _MASKS = frozenset(
        getattr(F, name) for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
                                      "feature_alpha_dropout")
    ) | frozenset(
        getattr(torch, name) for name in ("dropout", "dropout_", "feature_dropout", "alpha_dropout")
    )  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._MASKS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs["dropout_p"] = 0.0
        if func in _GROUPED and args[0].dtype is torch.float64 and args[0].dim() == 2 and args[1].dim() == 3:
            return _products_of_groups(args[0], args[1], kwargs["offs"])
        return func(*args, **kwargs)


#: Products of groups of rows, each with a matrix of its own (experts). torch has them for 32 and 16 bits only.
_GROUPED = [each for each in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if each is not None]


def _products_of_groups(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    starts = [0, *ends.tolist()[:-1]]
    spans = zip(starts, ends.tolist(), matrices.unbind(), strict=True)
    return torch.cat([rows[start:end] @ matrix for start, end, matrix in spans])


@contextlib.contextmanager
def _no_masks(model: nn.Module, step: Callable[[], object]) -> Iterator[None]:
    """Steps inside draw no masks. Where something else draws, the model is in evaluation mode but for its batch
    statistics."""
    with _NoDropout():
        before = random_states()
        step()
        draws = not (before["torch"] == random_states()["torch"]).all()
        if not draws:
            yield
            return
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        for module, training in modes:
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.training = training
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
