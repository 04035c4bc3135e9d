"""The loss in place: cross entropy turns its saved log-probabilities into its gradient, a few rows at a time.

Needs from the trace: the cross entropies outside the units (`Trace.losses`), which the recorder notes while
`loss.watched` is open, and the ops of losses that work row by row (`Trace.rowwise`), while `by_rows.folds_told` is.
Offers the planner: the same step with one tensor of the logits' size instead of three, or with nothing but the tile
instead of up to eight tensors of its size, at no recompute. Walked by the referee as the rewritten trace. Carried out
by `loss.in_place`, which replaces `torch.nn.functional.cross_entropy`, and by `by_rows.by_rows`, which replaces the
functions that TRL's loss calls where there is no Triton. Proven bit by bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from tightfit.core import Event, EventKind, Lever, Plan, Trace
from tightfit.core.by_trace import once_for_a_trace
from tightfit.levers.interface import Given, LeverDefinition, Share, Variant, Walked

__all__ = ["DEFINITION", "with_loss_in_place"]


class LossInPlace(LeverDefinition):
    lever = Lever.LOSS_IN_PLACE
    noun = "the loss in place"
    summary = "the loss makes its gradient in place of what it saved"
    is_compiled_around = True

    def ruled_out(self, trace: Trace) -> str:
        return "" if reaches(trace) else "it has no cross entropy outside its units; leave it out"

    def variants(self, step: Variant) -> Iterator[Variant]:
        if reaches(step.trace):
            yield step.by(self, with_loss_in_place(step.trace), in_place_loss=True)

    def under(self, trace: Trace, plan: Plan) -> Trace:
        return with_loss_in_place(trace) if plan.in_place_loss else trace

    def is_used(self, plan: Plan) -> bool:
        return plan.in_place_loss

    def in_force(self, model: Any, plan: Plan, given: Given) -> AbstractContextManager[None]:
        from tightfit.levers.loss_in_place.by_rows import by_rows
        from tightfit.levers.loss_in_place.loss import in_place

        @contextlib.contextmanager
        def both() -> Iterator[None]:
            with in_place(), by_rows():
                yield

        return both()

    def not_compiled(self, plan: Plan, whole: bool) -> str:
        return "makes the loss's gradient in place of what the loss saved" if plan.in_place_loss and whole else ""

    def share(self, walked: Walked) -> Share | None:
        if not walked.plan.in_place_loss:
            return None
        without = walked.walk(dataclasses.replace(walked.plan, in_place_loss=False))
        return Share(
            lever=self.lever,
            bought_bytes=without.peak_bytes - walked.line.peak_bytes,
            seconds=0.0,
            flops=0,
            what=self.summary,
        )

    def how(self, plan: Plan) -> str:
        return "with the loss in place"

    def said(self, plan: Plan) -> str:
        return f"{self.summary}: no recompute, the same bits"

    def fact(self, plan: Plan) -> tuple[str, str]:
        return "loss in place", "yes" if plan.in_place_loss else "no"


def reaches(trace: Trace) -> bool:
    """Has the step a loss that the lever makes smaller?"""
    return bool(trace.losses or trace.rowwise)


@once_for_a_trace
def with_loss_in_place(trace: Trace) -> Trace:
    """`trace` as it would be with the loss in place: one tensor of the logits' size instead of three."""
    values, ops, events = list(trace.values), list(trace.ops), list(trace.events)
    freed = {e.subject: i for i, e in enumerate(events) if e.what is EventKind.FREE}
    position = {e.subject: i for i, e in enumerate(events) if e.what is EventKind.OP}
    for loss in trace.losses:
        (of_likelihood,) = (v for v in ops[loss.nll_backward].outputs if v is not None)
        (of_softmax,) = (v for v in ops[loss.softmax_backward].outputs if v is not None)
        (saved,) = (v for v in ops[loss.log_softmax].outputs if v is not None)
        for value in (of_likelihood, of_softmax):
            values[value] = dataclasses.replace(values[value], size_bytes=0)
        # the saved bytes live on as the gradient
        events[freed[saved]] = Event(what=EventKind.FREE, subject=of_softmax)
        events[freed[of_softmax]] = Event(what=EventKind.FREE, subject=saved)
        # both are one backward, and what the first of them reads (the targets) goes when it is over
        between = events[position[loss.nll_backward] : position[loss.softmax_backward]]
        held_bytes = sum(values[e.subject].size_bytes for e in between if e.what is EventKind.FREE)
        ops[loss.nll_backward] = dataclasses.replace(ops[loss.nll_backward], scratch_bytes=0)
        ops[loss.softmax_backward] = dataclasses.replace(
            ops[loss.softmax_backward], scratch_bytes=loss.rows_bytes * 2 + held_bytes
        )
    buffers: dict[int, int] = {}
    for stretch in trace.rowwise:
        buffers[stretch.buffer] = max(buffers.get(stretch.buffer, 0), stretch.buffer_bytes)
        end = position.get(stretch.last + 1, len(events))
        for op in ops[stretch.first : stretch.last + 1]:
            for out in op.outputs:
                if out is None or freed.get(out, end) >= end or values[out].producer != op.id:
                    continue  # not made by these ops, or what comes after them has it still
                if values[out].shape[:1] == (stretch.rows,):
                    size_bytes = values[out].size_bytes * stretch.rows_at_once // stretch.rows
                    values[out] = dataclasses.replace(values[out], size_bytes=size_bytes)
    for buffer, size_bytes in buffers.items():
        values[buffer] = dataclasses.replace(values[buffer], size_bytes=min(size_bytes, values[buffer].size_bytes))
    return dataclasses.replace(trace, values=tuple(values), ops=tuple(ops), events=tuple(events))


DEFINITION = LossInPlace()
