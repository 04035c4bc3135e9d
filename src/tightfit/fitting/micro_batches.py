"""A step whose global batch runs in micro-batches: how many there are, and their exact accumulation.

Idea: micro-batch, accumulation and plan are one choice (`plan.micro_batches`). Each size that is looked at is recorded
with rows of the user's own batch, and with gradients in place where there is more than one part, as all parts but the
first find them. What the loss divides by is found out by comparing a few rows, cut and uncut (`verify.additive`), and
again with the first batch for which the answers that are left differ. The losses alone of all rows of the first batch,
and of a few rows of the 1st, 2nd, 4th, 8th and so on, are compared as well.

Invariant: losses and gradients are those of the uncut batch, to rounding. Dropout draws other masks. Refused
(`Unsupported`): a loss that is no weighted sum of the losses of the parts (batch statistics, contrastive losses,
load-balancing losses of experts), a batch that cannot be cut by rows, a compiled model, several processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tightfit import accelerator
from tightfit.core import (
    AUTO,
    BudgetInfeasible,
    Check,
    InvalidInput,
    Lever,
    LeversAsked,
    MicroBatch,
    MicroBatches,
    Plan,
    Trace,
    Unsupported,
    by_name,
    parse_bytes,
)
from tightfit.engine import Applied
from tightfit.engine.limits import tell_of_host
from tightfit.levers import inexact
from tightfit.levers.step_in_backward.hooks import clipped_backward, only_clipped
from tightfit.plan import plan as make_plan
from tightfit.plan.effort import THOROUGH, Effort
from tightfit.plan.micro_batches import QUICK, as_asked, attempted, shares, slices, solved
from tightfit.step.patches import compiled_entries
from tightfit.step.ranks import are_several
from tightfit.step.rows import Divisor, row_count, rows_taken, weights_of
from tightfit.step.run import LossFunction, compute_loss
from tightfit.verify.additive import compared_cut, loss_apart

__all__ = [
    "Cut",
    "Fitted",
    "Found",
    "Weigher",
    "cut_levers",
    "exactly",
    "gradients_in_place",
    "launch_seconds",
    "micro_batch_asked",
    "needs_tiles",
    "solve",
    "weighed",
]

#: Rows of the batch that are compared cut and uncut: one beside two, so that rows and parts are told apart.
_COMPARED = 3

#: How many bytes there are for what a plan has wait in host memory, where they are too few.
Lacking = Callable[[Trace, Plan], int | None]

#: What was recorded, its plan if anything fits, and the budget in bytes.
Planned = tuple[Trace, Plan | None, int]

#: A budget that is missed by less than this is planned for once more, thoroughly.
_NEARLY = 1.05


class Fitted(Applied):
    """What `fit` returns: the plan in force, and the loop's backward where the batch is cut.

    Attributes: `micro_batches`, what was chosen and why; None: the batch was to stay whole. `max_norm`, to which
    `backward` clips; None: it does not. `total_norm`, of the gradients of the last `backward` that clipped.
    """

    micro_batches: MicroBatches | None = None
    max_norm: float | None = None
    total_norm: torch.Tensor | None = None
    uncut: Trace | None = None  # the step of the whole batch, where it was recorded to choose micro-batches
    _cut: Cut | None = None
    loss: LossFunction | None = None

    def clip_to(self, max_norm: float | None) -> None:
        """From now on, `backward` clips gradients to this total norm, and nothing else may step in backward."""
        self.max_norm = max_norm
        only_clipped(self.optimizer, max_norm is not None)

    def remove(self) -> None:
        only_clipped(self.optimizer, False)
        super().remove()

    def backward(self, batch: Any) -> torch.Tensor:
        """Forward and backward of all of `batch`, a micro-batch at a time. Returns its loss.

        The gradients that it adds to the parameters are those of `loss.backward()` on the whole batch, to rounding, and
        bit for bit where the batch is not cut.

        With `max_norm` they are clipped as `torch.nn.utils.clip_grad_norm_` does. Where the plan steps each parameter
        in backward, forward and backward run twice, from the same random state: the first time for the norms alone.
        """
        if self.max_norm is None:
            return self._forward_and_backward(batch)
        loss, self.total_norm = clipped_backward(
            self.model, batch, self.optimizer, self.max_norm, lambda: self._forward_and_backward(batch)
        )
        return loss

    def _forward_and_backward(self, batch: Any) -> torch.Tensor:
        total: torch.Tensor | None = None
        for part, weight in self.parts(batch):
            loss = compute_loss(self.model, part, self.loss)
            loss = loss if weight == 1 else loss * weight
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total

    def parts(self, batch: Any) -> Iterator[tuple[Any, float]]:
        """The micro-batches of `batch`, each with what its loss is to be multiplied by before `backward()`."""
        if self._cut is None:
            yield batch, 1.0
        else:
            yield from self._cut.parts(batch)

    def cut_by(self, cut: Cut, loss: LossFunction | None, chosen: MicroBatches) -> None:
        """From now on, `backward` cuts."""
        self._cut, self.loss, self.micro_batches = cut, loss, chosen

    def _facts(self) -> list[tuple[str, str]]:
        said = super()._facts()
        chosen = self.micro_batches
        if chosen is not None:
            said.insert(1, ("micro-batches", chosen.said))
            if chosen.accumulation > 1:
                said.insert(2, ("their loss", f"divided by {chosen.weighed}; {rounding_said(self.model, chosen)}"))
        return said


def rounding_said(model: nn.Module, chosen: MicroBatches) -> str:
    """What accumulation may change, in words: sums in another order, and in the gradients' own dtype."""
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    unit = max((torch.finfo(dtype).eps / 2 for dtype in dtypes if dtype.is_floating_point), default=0.0)
    return (
        f"gradients are those of the whole batch to rounding: {chosen.accumulation - 1} more additions, each of at "
        f"most {unit:.1g} of its sum"
    )


class Weigher:
    """What the losses of parts are multiplied by. It knows what the loss divides by, as far as batches have shown."""

    def __init__(self, compare: Callable[[Any], tuple[tuple[Divisor, ...], str]] | None = None) -> None:
        self.divisors: tuple[Divisor, ...] = tuple(Divisor)
        self.compare = compare

    def weights(self, batch: Any, parts: Sequence[Any], rows: Sequence[int]) -> tuple[float, ...]:
        """Of `parts`, which are `batch`. Raises `Unsupported` where it cannot be told."""
        found = self._candidates(parts, rows)
        if len(set(found.values())) > 1 and self.compare is not None:
            self.divisors = self.compare(batch)[0]
            found = self._candidates(parts, rows)
        if len(set(found.values())) != 1:
            raise Unsupported(
                "what this loss divides by cannot be told: the batches that were compared weigh their parts alike, or "
                "have neither loss nor gradient, and this one's parts may weigh differently"
                if found
                else "no label of this batch counts, so its loss is the mean of nothing"
            )
        return next(iter(found.values()))

    def _candidates(self, parts: Sequence[Any], rows: Sequence[int]) -> dict[Divisor, tuple[float, ...]]:
        found = {each: weights_of(each, parts, rows) for each in self.divisors}
        return {each: weights for each, weights in found.items() if weights is not None}


class Cut:
    """How batches are cut into micro-batches of at most `size` rows, and their losses weighed."""

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction | None,
        size: int,
        aside: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        *,
        in_float64: bool = True,
    ) -> None:
        """`aside`: rows are compared within it, which are no batch to plan for. `in_float64`: there too, which takes
        eight bytes for each parameter."""
        self.model, self.loss, self.size, self.aside, self.in_float64 = model, loss, size, aside, in_float64
        self.weigher = Weigher(self.compared)
        self._batches = 0  # that were cut

    def parts(self, batch: Any) -> Iterator[tuple[Any, float]]:
        rows = shares(row_count(batch), self.size)
        if len(rows) == 1:
            yield batch, 1.0
            return
        parts = [rows_taken(batch, part) for part in slices(rows)]
        weights = self.weigher.weights(batch, parts, rows)
        self._batches += 1
        if self._batches & (self._batches - 1) == 0:  # now and then, and more often at first
            few = random.Random(self._batches).sample(
                range(sum(rows)), min(sum(rows), max(2, min(self.size, _COMPARED)))
            )
            self._look_at(batch, sorted(few))
        for part, weight in zip(parts, weights, strict=True):
            if weight:  # the mean of no labels is no number
                yield part, weight

    def compared(self, batch: Any) -> tuple[tuple[Divisor, ...], Any]:
        """What the loss may divide by, from a few rows of `batch`, and the check. Raises `Unsupported` if nothing."""
        one, others = _telling_rows(batch)
        parts = [rows_taken(batch, [one]), rows_taken(batch, others)]
        whole = rows_taken(batch, [one, *others])
        divisors = self.weigher.divisors
        with self.aside():
            held, check = compared_cut(
                self.model, whole, parts, (1, len(others)), self.loss, divisors, in_float64=self.in_float64
            )
        if not held:
            raise Unsupported(not_additive(batch, check.measured, check.tolerance))
        rows = range(row_count(batch))
        for begin in rows[::_COMPARED]:
            self._look_at(batch, rows[begin : begin + _COMPARED], held)
        return held, check

    def _look_at(self, batch: Any, rows: Sequence[int], divisors: Sequence[Divisor] | None = None) -> None:
        """Raise `Unsupported` if the loss of these rows is not made of the losses of each by any of `divisors`.

        A loss may leave out rows or labels in a way of its own, which the rows that were compared first did not show.
        """
        parts = [rows_taken(batch, [row]) for row in rows]
        with self.aside():
            apart = [
                loss_apart(self.model, rows_taken(batch, list(rows)), parts, weights, self.loss)
                for each in divisors or self.weigher.divisors
                if len(rows) > 1 and (weights := weights_of(each, parts, (1,) * len(rows))) is not None
            ]
        if apart and not any(distance <= limit for distance, limit in apart):  # the mean of nothing is no number
            distance, limit = apart[0]
            measured = f"{distance:.2g} apart in rows {', '.join(map(str, rows))} of a batch"
            raise Unsupported(not_additive(batch, measured, f"{limit:.2g}"))


def not_additive(batch: Any, measured: str, tolerance: str) -> str:
    """Why `batch` cannot be cut."""
    has_labels = isinstance(batch, Mapping) and "labels" in batch
    most = f", of at most {tolerance.partition(':')[0]}" if tolerance else ""
    return (
        "the batch cannot be cut into micro-batches: the loss of a batch is not a sum or a mean of the losses of its "
        f"rows (cut and uncut are {measured}{most}). Batch normalisation, contrastive "
        "losses and load-balancing losses of experts are like that: leave micro-batches out"
        + ("" if has_labels else "; a mean over labels is known where the batch has them as 'labels'")
    )


def weighed(chosen: MicroBatches, divisor: Divisor, check: Check) -> MicroBatches:
    """`chosen`, with what the comparison of cut and uncut has shown."""
    return dataclasses.replace(chosen, weighed=divisor.value, check=check)


def _telling_rows(batch: Any) -> tuple[int, list[int]]:
    """The row of the fewest labels that count but at least one, and the rows of the most."""
    count = row_count(batch)
    labels = [weights_of(Divisor.LABELS, [rows_taken(batch, [row]), batch], (1, 1)) for row in range(count)]
    sizes = [0.0 if weights is None else weights[0] / max(weights[1], 1e-300) for weights in labels]
    order = sorted(range(count), key=lambda row: (sizes[row] == 0, sizes[row]))
    counted = [row for row in order if sizes[row]] or order
    others = [row for row in reversed(counted) if row != counted[0]][: _COMPARED - 1]
    return counted[0], others or [row for row in order if row != counted[0]][:1]


def micro_batch_asked(asked: object) -> str | int:
    """`asked`, if it is `"auto"` or a number of rows; raises `InvalidInput` for anything else."""
    if asked == AUTO or (isinstance(asked, int) and not isinstance(asked, bool) and asked >= 1):
        return asked  # type: ignore[return-value]  # one of the two
    raise InvalidInput(f'micro_batch={asked!r}: expected "auto", or a number of rows of at least 1')


def refuse_exact(exact: bool) -> None:
    if exact:
        raise InvalidInput(
            "exact=True asks for the bits of the whole batch, and micro-batches add in another order: leave one out"
        )


def refuse(model: nn.Module) -> None:
    """Raise for models that do not go together with micro-batches."""
    if compiled_entries(model):
        raise Unsupported(
            "the model is compiled, and micro-batches of a compiled step are not planned: give their size"
        )
    if are_several(model):
        raise Unsupported("several processes train this model, and each would choose for itself: give the batch size")


@contextlib.contextmanager
def gradients_in_place(model: nn.Module, accumulates: bool) -> Iterator[None]:
    """Zero gradients inside, as every micro-batch but the first finds them."""
    made = [p for p in model.parameters() if accumulates and p.requires_grad and p.grad is None]
    for parameter in made:
        parameter.grad = torch.zeros_like(parameter)
    try:
        yield
    finally:
        for parameter in made:
            parameter.grad = None


def launch_seconds(device: torch.device) -> float:
    """What an op takes that does next to nothing, with autograd and its backward: each micro-batch launches all ops of
    a step once more, which the seconds of the ops themselves do not tell. Measured. On the host a recording's seconds
    have it already (`trace.timing.Pace`)."""
    if accelerator.is_host(device):
        return 0.0
    leaf = torch.ones(4, device=device, requires_grad=True)
    taken = []
    for _ in range(_LAUNCHES):
        begun = time.perf_counter()
        value = leaf
        for _ in range(_OPS):
            value = value * 1.0
        torch.autograd.grad(value.sum(), leaf)
        accelerator.synchronize(device)
        taken.append(time.perf_counter() - begun)
    return min(taken) / (2 * _OPS)


_LAUNCHES, _OPS = 5, 100


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The choice, and what was recorded and planned for it."""

    chosen: MicroBatches
    trace: Trace
    plan: Plan


def solve(
    global_batch: int,
    budget: str | int,
    plan_for: Callable[[int, str | int, bool], Planned],
    levers: frozenset[Lever] | None,
    beside: frozenset[Lever],
    asked: str | int = AUTO,
    launch_seconds: float = 0.0,
    progress: Callable[[str], None] = lambda _: None,
    host_budget: int | None = None,
    within: Callable[[int], int] = int,
    lacking: Lacking = lambda *_: None,
) -> Found:
    """The micro-batches of `global_batch` rows by which a step takes the fewest seconds within `budget`.

    `plan_for`: records and plans micro-batches of so many rows, for a budget, by what gives the same bits (True) or by
    whatever fits (raises `BudgetInfeasible` if nothing does), within `host_budget` too. A percentage is of the uncut
    step. `within`: what may be taken of the device, where that is less than a number of bytes. `lacking`:
    a plan that the given `host_budget` allows, and this machine does not, is told in a warning.

    Raises `BudgetInfeasible` where not even single rows fit.
    """
    found: dict[int, tuple[Trace, Plan]] = {}
    tried: dict[int, MicroBatch] = {}

    def tried_with(size: int, recorded: Trace, made: Plan | None) -> MicroBatch:
        return attempted(size, global_batch, recorded, made, levers, launch_seconds, host_budget)

    def attempt(size: int, budget: str | int) -> tuple[MicroBatch, int]:
        progress(f"micro-batches of {size}")
        recorded, made, budget_bytes = plan_for(size, budget, True)
        if made is not None:
            found[size] = recorded, made
        return tried_with(size, recorded, made), budget_bytes

    if "%" in str(budget):
        tried[global_batch], sized = attempt(global_batch, budget)
    else:
        sized = parse_bytes(budget)
    if (allowed_bytes := within(sized)) < sized:
        sized = allowed_bytes
        tried.clear()
    if asked == AUTO:
        chosen = solved(global_batch, lambda size: attempt(size, sized)[0], sized, tried)
        last = 1
    else:
        last = min(int(asked), global_batch)
        if last not in tried:
            tried[last] = attempt(last, sized)[0]
        chosen = as_asked(global_batch, tried[last], sized) if tried[last].fits else None
    if chosen is None:  # nothing exact fits, so the smallest pieces by whatever fits, or what that says
        recorded, made, _ = plan_for(last, sized, False)
        assert made is not None
        chosen = as_asked(global_batch, tried_with(last, recorded, made), sized)
        return Found(chosen=chosen, trace=recorded, plan=made)
    recorded, made = found[chosen.size]
    levers, beside = cut_levers(levers, beside, chosen.accumulation > 1)
    made = _best(recorded, made, levers, beside, lacking)
    if host_budget is not None and (left := lacking(recorded, made)) is not None:
        tell_of_host(recorded, made, left, stacklevel=5)
    return Found(chosen=chosen, trace=recorded, plan=made)


def exactly(
    recorded: Trace,
    budget: str | int,
    levers: frozenset[Lever] | None,
    beside: frozenset[Lever],
    host_budget: int | None = None,
    lacking: Lacking = lambda *_: None,
) -> Planned:
    """The plan of `recorded` by what gives the same bits, or by the levers that are named, if one fits.

    It is made quickly, since many are made, and thoroughly where it nearly fits. Where no host budget was given, it is
    `lacking` that limits what may wait.
    """

    def made_with(effort: Effort, host_budget: int | None) -> Plan:
        return make_plan(
            recorded, budget, effort=effort, levers=levers, exact=levers is None, beside=beside, host_budget=host_budget
        )

    for effort in (QUICK, THOROUGH):
        try:
            made = made_with(effort, host_budget)
            if host_budget is None and (left := lacking(recorded, made)) is not None:
                made = made_with(effort, left)
        except BudgetInfeasible as error:
            budget_bytes = error.budget_bytes
            if error.least_bytes > budget_bytes * _NEARLY:
                break
            continue
        return recorded, made, made.budget_bytes
    return recorded, None, budget_bytes


def needs_tiles(levers: frozenset[Lever] | None) -> bool:
    """Do the levers that were named need what only a recording in tiles knows?"""
    return levers is not None and bool(inexact(levers))


def _best(
    recorded: Trace, quick: Plan, levers: frozenset[Lever] | None, beside: frozenset[Lever], lacking: Lacking
) -> Plan:
    """The plan that is put in force: of as much effort as any, and never a slower one."""
    if not quick.added_seconds or not quick.exact:
        return quick
    with contextlib.suppress(BudgetInfeasible):
        made = make_plan(
            recorded, quick.budget_bytes, levers=levers, exact=levers is None, beside=beside,
            host_budget=quick.host_budget_bytes,
        )  # fmt: skip
        has_room = quick.host_budget_bytes is not None or lacking(recorded, made) is None
        return min(made, quick, key=lambda plan: plan.added_seconds) if has_room else quick
    return quick


def cut_levers(
    levers: frozenset[Lever] | None, beside: frozenset[Lever], accumulates: bool
) -> tuple[frozenset[Lever] | None, frozenset[Lever]]:
    """The levers that a micro-batch may use: parameters are not stepped in a backward that others follow."""
    barred = {Lever.STEP_IN_BACKWARD} if accumulates else set()
    left = None if levers is None else LeversAsked(levers - barred, by_name(levers))
    return left, LeversAsked(beside - barred, by_name(beside))
