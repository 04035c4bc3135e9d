"""Loss, gradients and buffers of two runs of a step, compared bit by bit.

Invariant: a gradient that is missing, of another shape, stride or dtype, is a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from tightfit.accelerator import HOST
from tightfit.core import Check, Plan
from tightfit.engine import Applied, apply
from tightfit.step.parallel import local_of
from tightfit.step.ranks import anywhere


class Switch:
    """A plan that goes in and out of force by one handle, so that what the compiler made under it stays valid."""

    def __init__(self, model: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.plan = plan
        self.applied = apply(model, plan, optimizer=optimizer)
        self.applied.suspend()

    def __enter__(self) -> Applied:
        self.applied.resume(self.plan)
        return self.applied

    def __exit__(self, *_: object) -> None:
        self.applied.suspend()

    def close(self) -> None:
        self.applied.remove()


class Outcome:
    """Copies, on the CPU, of what a step leaves behind. `told`: gradients that were let go in backward."""

    def __init__(self, model: nn.Module, told: Mapping[torch.Tensor, torch.Tensor] | None = None) -> None:
        self.gradients: dict[str, torch.Tensor | None] = {
            name: (told or {}).get(p) if p.grad is None else copy_of(p.grad)
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        self.buffers: dict[str, torch.Tensor | None] = {
            name: copy_of(b) for name, b in model.named_buffers() if not b.is_meta
        }

    def spread(self, model: nn.Module, step: Callable[[], None]) -> dict[str, float]:
        """Repeat the step and take the copies anew. Returns what is not the same twice, and how far it is apart.

        A first step may set things up, so that it differs from all later ones and says nothing of how these vary. Where
        it differs, the later two are compared.
        """
        step()
        apart = self._taken_again(model)
        if anywhere(model, bool(apart))[0]:
            step()
            apart = self._taken_again(model)
        return apart

    def _taken_again(self, model: nn.Module) -> dict[str, float]:
        """The copies anew, one by one in the place of the old, so that there are never two of all."""
        apart: dict[str, float] = {}
        now: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor | None]] = [
            (self.gradients, name, p.grad) for name, p in model.named_parameters() if name in self.gradients
        ]
        now += [(self.buffers, name, b) for name, b in model.named_buffers() if name in self.buffers]
        for held, name, tensor in now:
            copied = None if tensor is None else copy_of(tensor)
            apart |= spread_of({name: held[name]}, {name: copied})
            held[name] = copied
        return apart


def copy_of(tensor: torch.Tensor) -> torch.Tensor:
    tensor = local_of(tensor)
    if not tensor.is_sparse:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor.detach())
    return tensor.detach().to(HOST, copy=True)


def difference(expected: torch.Tensor | None, found: torch.Tensor | None) -> str:
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
    return {key: how for one, other in pairs for key in one if (how := difference(one[key], other.get(key)))}


#: How often the step without a plan is run again, at most, where its gradients or buffers are not the plan's.
_REPEATS = 5
#: A plan may be so much farther from one run without it than that run's repeats are. With five repeats, a gradient of
#: one number that is drawn from a normal distribution each time passes that by chance once in a thousand. One of ten
#: numbers did not in 200,000 simulated proofs.
_SLACK = 4.0
_NAMED = 3


def compared(
    model: nn.Module,
    reference: Outcome,
    planned: Outcome,
    observe: Callable[[], Outcome],
    spread: Mapping[str, float] | None = None,
) -> list[Check]:
    """The checks `gradients` and `buffers`. `spread`: what varied between repeats of the step without the plan that ran
    already, and by how much.

    A kernel that adds in any order gives other bits each time, and the plan can only be held to the same: what varies
    without the plan is named, and may be so far off as `_SLACK` times what its repeats are from one another. Where one
    rank has to run the step once more, all do; a check passes where it passes on every rank.
    """
    expected, found = _values_of(reference), _values_of(planned)
    wrong = {key: how for key in expected if (how := difference(expected[key], found[key]))}
    bounds = dict(spread or {})
    for _ in range(_REPEATS):
        if not anywhere(model, any(not _within(expected[k], found[k], bounds.get(k)) for k in wrong))[0]:
            break
        for key, apart in spread_of(expected, _values_of(observe())).items():
            bounds[key] = max(apart, bounds.get(key, 0.0))
        if not anywhere(model, any(key in bounds for key in wrong))[0]:
            break  # what differs does not vary
    checks = []
    for name, keys in (("gradients", reference.gradients), ("buffers", reference.buffers)):
        if name == "buffers" and not keys:
            continue
        varying = [key for key in keys if key in bounds]
        excused = [key for key in keys if key in wrong and _within(expected[key], found[key], bounds.get(key))]
        left = [key for key in keys if key in wrong and key not in excused]
        tolerance = "none: bit for bit"
        if varying:
            named = ", ".join(varying[:_NAMED]) + (", ..." if len(varying) > _NAMED else "")
            tolerance = (
                f"bit for bit, but for {len(varying)} that vary without the plan too ({named}): {_SLACK:g} times what "
                f"its repeats differ by, at most {_SLACK * max(bounds[key] for key in varying):.3g}"
            )
        here = f"{len(keys)} identical"
        if left:
            here = f"{len(left)} of {len(keys)} wrong: {left[0]} {wrong[left[0]]}"
        elif excused:
            here = f"{len(keys) - len(excused)} identical, {len(excused)} no farther off than without the plan"
        elsewhere = anywhere(model, bool(left))[0] and not left
        checks.append(
            Check(
                name=name,
                expected=f"{len(keys)} identical",
                measured=f"{here}; not so on another rank" if elsewhere else here,
                tolerance=tolerance,
                passed=not left and not elsewhere,
            )
        )
    return checks


def _values_of(outcome: Outcome) -> dict[str, torch.Tensor | None]:
    return {**outcome.gradients, **outcome.buffers}


def spread_of(one: Mapping[str, torch.Tensor | None], other: Mapping[str, torch.Tensor | None]) -> dict[str, float]:
    """What two runs of one step do not have the same bits of, and how far they are apart. What differs in more than its
    values is left out: that is no rounding."""
    return {
        key: _largest_difference(first, second)
        for key, first in one.items()
        if difference(first, second := other.get(key)).startswith("differs by")
        and first is not None
        and second is not None
    }


def _within(expected: torch.Tensor | None, found: torch.Tensor | None, bound: float | None) -> bool:
    if bound is None or expected is None or found is None or expected.shape != found.shape:
        return False
    return _largest_difference(expected, found) <= _SLACK * bound
