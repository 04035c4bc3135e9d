"""What a lever that is not a unit's does to a trace: the same step with other bytes.

Idea: a lever that changes neither the ops of the units nor their order can be told as a rewritten trace, and planner
and referee need not know of it.

Invariant: events keep their places, so whatever counts in events stays true.
"""

from __future__ import annotations

import dataclasses

from tightfit.core import Event, EventKind, Plan, PlanMismatch, Trace


def under(trace: Trace, plan: Plan | None) -> Trace:
    """What the levers of `plan` that are not a unit's make of `trace`. Raises `PlanMismatch` for unknown tiles."""
    if plan is not None and plan.tiling != trace.tiling:
        variant = next((each for each in trace.tiled if each.tiling == plan.tiling), None)
        if variant is None:
            raise PlanMismatch("the plan computes the step in tiles that this trace does not know; make the plan anew")
        trace = variant
    return with_loss_in_place(trace) if plan is not None and plan.in_place_loss else trace


def with_loss_in_place(trace: Trace) -> Trace:
    """`trace` as it would be with the loss in place: one tensor of the logits' size instead of three."""
    values, ops, events = list(trace.values), list(trace.ops), list(trace.events)
    freed = {e.subject: i for i, e in enumerate(events) if e.what is EventKind.FREE}
    for loss in trace.losses:
        (of_likelihood,) = (v for v in ops[loss.nll_backward].outputs if v is not None)
        (of_softmax,) = (v for v in ops[loss.softmax_backward].outputs if v is not None)
        (saved,) = (v for v in ops[loss.log_softmax].outputs if v is not None)
        for value in (of_likelihood, of_softmax):
            values[value] = dataclasses.replace(values[value], size_bytes=0)
        # the saved bytes live on as the gradient
        events[freed[saved]] = Event(what=EventKind.FREE, subject=of_softmax)
        events[freed[of_softmax]] = Event(what=EventKind.FREE, subject=saved)
        ops[loss.nll_backward] = dataclasses.replace(ops[loss.nll_backward], scratch_bytes=0)
        ops[loss.softmax_backward] = dataclasses.replace(ops[loss.softmax_backward], scratch_bytes=loss.rows_bytes * 2)
    return dataclasses.replace(trace, values=tuple(values), ops=tuple(ops), events=tuple(events))
