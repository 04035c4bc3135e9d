"""The optimizer's step in chunks: a few parameters at a time, so that only their temporaries are there at once.

Needs from the trace: the step recorded in chunks (`Trace.optimizer`), which there is where a trial has shown the same
bits. Where a trial has shown it of slices of a parameter too, large parameters are stepped by slices.
Offers the planner: the step with that in place of the whole one. Walked by the referee like any step. Carried out by
`optimizer.step()` itself, replaced on the one optimizer. Proven bit by bit: parameters and state after a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from tightfit.core import InvalidInput, Lever, Plan, PlanMismatch, Trace, format_bytes
from tightfit.levers.interface import Given, LeverDefinition, Share, Variant, Walked
from tightfit.levers.optimizer_step import (
    added_seconds,
    cut_of,
    cut_text,
    highest_bytes,
    in_chunks,
    not_by_parts,
    whole_step,
    with_advice,
)

__all__ = ["DEFINITION"]


class OptimizerChunks(LeverDefinition):
    lever = Lever.OPTIMIZER_CHUNKS
    noun = "the optimizer's step in chunks"
    summary = "the optimizer steps a few parameters at a time"
    is_compiled = True
    steps_optimizer = True
    eases_step_alone = True

    def ruled_out(self, trace: Trace) -> str:
        return with_advice(trace, not_by_parts(trace))

    def variants(self, step: Variant) -> Iterator[Variant]:
        at = step.trace.optimizer
        in_chunks_anyway = {Lever.STATE_IN_HOST, Lever.GRADIENTS_IN_HOST}
        if at is None or not at.in_chunks or in_chunks_anyway & step.levers:
            return
        whole = whole_step(step.trace, at)
        if highest_bytes(part.stretch for part in at.in_chunks) < highest_bytes([whole]):
            trace = in_chunks(step.trace)
            seconds = added_seconds(trace, step.trace)
            yield step.with_setting(self, trace, cut_text(at), seconds=seconds)

    def under(self, trace: Trace, plan: Plan) -> Trace:
        if not self.is_used(plan):
            return trace
        at = trace.optimizer
        if at is None or not at.in_chunks:
            raise PlanMismatch(
                "the plan steps the optimizer in chunks, and this trace has no such step: trace with the optimizer"
            )
        return in_chunks(trace)

    def in_force(self, model: Any, plan: Plan, given: Given) -> AbstractContextManager[None]:
        from tightfit.step.optimizers import Cut, stepping_in_chunks

        if given.optimizer is None:
            raise InvalidInput("the plan steps the optimizer in chunks, and none was given: pass optimizer=")
        cut = Cut(*cut_of(plan.settings[self.lever.value]))
        return stepping_in_chunks(given.optimizer, cut)

    def share(self, walked: Walked) -> Share | None:
        if not self.is_used(walked.plan):
            return None
        return Share(
            lever=self.lever,
            bought_bytes=walked.bought_by_setting(self.lever),
            seconds=0.0,
            flops=0,
            what=self.said(walked.plan),
        )

    def how(self, plan: Plan) -> str:
        return "with the optimizer's step in chunks"

    def said(self, plan: Plan) -> str:
        limit = format_bytes(cut_of(plan.settings[self.lever.value])[0])
        return f"the optimizer steps at most {limit} of parameters at a time: the same bits"

    def fact(self, plan: Plan) -> tuple[str, str | None]:
        return "optimizer", self.said(plan) if self.is_used(plan) else None


DEFINITION = OptimizerChunks()
