"""One call that fits a model's step into a budget and keeps it there: `fit`.

Idea: a plan says which values are kept, not how large they are, so it serves every batch whose ops are the same. A
batch no longer than the planned one needs no more bytes; a longer one is noticed before its forward runs.

Invariant: the budget in bytes is that of the first plan, whatever comes later. Refused: a longer batch, if the user
wants that (`InvalidInput`), or if no plan fits it (`BudgetInfeasible`).
"""

from __future__ import annotations

import contextlib
import enum
import warnings
from typing import Any, NamedTuple

import torch
from torch import nn

from tightfit.core import InvalidInput
from tightfit.engine import Applied
from tightfit.plan import plan as make_plan
from tightfit.step import LossFunction, UnitsAsked, tensors_in
from tightfit.trace import trace

__all__ = ["Longer", "fit"]


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
    budget: str | int,
    loss: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    units: UnitsAsked = None,
    longer: str = "replan",
) -> Applied:
    """Trace one step, plan it for `budget` bytes, apply the plan. `applied.remove()` undoes it.

    `budget` is the peak of the whole step: bytes, a size (`"22GiB"`), or a percentage of the unplanned step's
    peak. Pass the `optimizer` so that its state and its step count too.

    Give the longest batch there will be: shorter ones run under the same plan and stay under the budget. `longer`
    says what happens to a longer one: `"replan"` (traced and planned anew for the same bytes, before it runs),
    `"refuse"` (`InvalidInput`) or `"allow"` (run as it is, the budget no longer promised). With a `loss` function
    the model alone does not show the whole batch, so replanning is not possible there: a warning is given instead.

    Raises what `trace`, `plan` and `apply` do, and `InvalidInput` for another `longer`.
    """
    try:
        policy = Longer(longer)
    except ValueError:
        raise InvalidInput(f"longer={longer!r} is none of {', '.join(repr(each.value) for each in Longer)}") from None
    guard = _Guard(model, policy, loss, optimizer, units)
    try:
        recorded = trace(model, batch, loss=loss, optimizer=optimizer, units=units)
        guard.applied = applied = Applied(model, make_plan(recorded, budget), trace=recorded)
    except BaseException:
        guard.remove()
        raise
    applied.on_remove(guard.remove)
    return applied


class _Guard:
    """A forward pre-hook of the whole model: learns the planned batch's extent, then looks at every other batch."""

    def __init__(
        self,
        model: nn.Module,
        policy: Longer,
        loss: LossFunction | None,
        optimizer: torch.optim.Optimizer | None,
        units: UnitsAsked,
    ) -> None:
        self.model, self.policy, self.loss, self.optimizer, self.units = model, policy, loss, optimizer, units
        self.applied: Applied | None = None
        self.planned: _Extent | None = None
        self.warned = False
        self.handle = model.register_forward_pre_hook(self, with_kwargs=True)

    def remove(self) -> None:
        self.handle.remove()

    def __reduce__(self) -> tuple[Any, ...]:
        """In a copy of the model, a pickled one too: a hook that does nothing, and needs no tightfit to be loaded."""
        return getattr, (contextlib.nullcontext(), "__exit__")

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.applied is None:  # the trace is running
            if self.planned is None:
                self.planned = _Extent.of((args, kwargs))
            return
        if self.policy is Longer.ALLOW or self.planned is None or not (torch.is_grad_enabled() and module.training):
            return
        extent = _Extent.of((args, kwargs))
        if not extent.exceeds(self.planned):
            return
        said = (
            f"a batch of {extent.elements:,} elements and length {extent.length:,} came, but the plan in force is for "
            f"at most {self.planned.elements:,} and {self.planned.length:,}"
        )
        if self.policy is Longer.REFUSE:
            raise InvalidInput(f"{said}: fit the model with the longest batch, or with longer='replan'")
        if self.loss is not None or (args and kwargs):
            if not self.warned:
                warnings.warn(
                    f"tightfit: {said}, so the budget is not promised; fit the model with the longest batch",
                    stacklevel=4,
                )
                self.warned = True
            return
        self._replan(dict(kwargs) if kwargs else args, extent)

    def _replan(self, batch: Any, extent: _Extent) -> None:
        applied = self.applied
        assert applied is not None
        budget_bytes = applied.plan.budget_bytes
        self.applied = None
        applied.suspend()
        try:
            recorded = trace(self.model, batch, loss=None, optimizer=self.optimizer, units=self.units)
            applied.resume(make_plan(recorded, budget_bytes), recorded)
            self.planned = extent
        except BaseException:
            applied.resume(applied.plan, applied.trace)
            raise
        finally:
            self.applied = applied
