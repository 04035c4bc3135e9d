"""A global batch in the micro-batches that `fit` chooses, measured beside the uncut step.

Invariant: the model is left as it was found, and what runs is the choice: its parts, its weights, its plan. Gradients
of all parts are held against the uncut batch in float64, as `fit` holds a few rows. Refused: what `fit` refuses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from tightfit.core import AUTO, Lever, Measurement, Trace
from tightfit.fitting.fit import fit
from tightfit.plan.micro_batches import shares, slices
from tightfit.step.rows import Divisor, row_count, rows_taken
from tightfit.step.run import LossFunction, compute_loss
from tightfit.verify.additive import compared_cut
from tightfit.verify.measure import BESIDE, CutStep, measure

__all__ = ["measure_micro_batches"]


def measure_micro_batches(
    model: nn.Module,
    batch: Any,
    *,
    budget: str | int = "60%",
    loss: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    levers: Collection[Lever] | None = None,
    repeats: int = 3,
    progress: Callable[[str], None] = lambda _: None,
    described: dict[str, Any] | None = None,
    traced: Callable[[Trace], None] = lambda _: None,
    host_budget: str | int | None = None,
) -> Measurement:
    """`measure` of `batch`, a global batch, where tightfit's row runs the fastest micro-batches within `budget`.

    Its gradients are "within tolerance" where they are those of the uncut batch to rounding, by the limit that
    `Measurement.micro_batches.check` has. Raises as `fit` does.
    """
    progress("choosing micro-batches")
    beside = BESIDE if levers is None else ()
    applied = fit(
        model, batch, budget, loss=loss, optimizer=optimizer, levers=levers, beside=beside, micro_batch=AUTO,
        host_budget=host_budget,
    )  # fmt: skip
    applied.remove()
    chosen = applied.micro_batches
    assert chosen is not None and applied.trace is not None
    parts = list(applied.parts(batch))  # drawn once: what `parts` compares now and then is no part of a step
    if chosen.accumulation > 1:
        progress("gradients in float64: cut and uncut")
        rows = shares(row_count(batch), chosen.size)
        whole = [rows_taken(batch, part) for part in slices(rows)]
        _, check = compared_cut(model, batch, whole, rows, loss, (Divisor(chosen.weighed),))
        chosen = dataclasses.replace(chosen, check=check)

    def backward(_: Any) -> None:
        for part, weight in parts:
            value = compute_loss(model, part, loss)
            (value if weight == 1 else value * weight).backward()

    return measure(
        model, batch, budget=budget, loss=loss, optimizer=optimizer, repeats=repeats, progress=progress,
        described=described, traced=traced,
        cut=CutStep(chosen=chosen, trace=applied.trace, plan=applied.plan, part=parts[0][0], backward=backward,
                    whole=applied.uncut),
    )  # fmt: skip
