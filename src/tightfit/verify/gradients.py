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
        self.gradients = {
            name: (told or {}).get(p) if p.grad is None else copy_of(p.grad)
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        self.buffers: dict[str, torch.Tensor | None] = {
            name: copy_of(b) for name, b in model.named_buffers() if not b.is_meta
        }


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


def compared(model: nn.Module, reference: Outcome, planned: Outcome, observe: Callable[[], Outcome]) -> list[Check]:
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
        wrong = {key: how for key in expected if (how := difference(expected[key], found[key]))}
        tolerance = "none: bit for bit"
        if anywhere(model, bool(wrong))[0]:
            again = again or observe()
            repeated = again.gradients if name == "gradients" else again.buffers
            # a kernel that adds in any order gives other bits each time; the plan can only be held to the same
            unstable = {key for key in wrong if difference(expected[key], repeated[key]).startswith("differs by")}
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
