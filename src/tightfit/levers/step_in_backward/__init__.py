"""The optimizer's step in backward: each parameter is stepped when its gradient is there, and the gradient goes.

Needs from the trace: when each gradient is there (`EventKind.READY`), and the step of one parameter of each shape alone
(`Trace.optimizer`), which there is where a trial has shown the same bits.
Offers the planner: the step without the gradients' bytes. Walked by the referee like any step. Carried out by hooks on
the parameters (`hooks`). Proven bit by bit: gradients as they are used, parameters and state after a step.

It is no default of a plan, since it forbids what a training loop may do: after backward there are no gradients to clip,
to add to, or to read. `hooks` says so in one line where it sees that. A loop that clips by the total norm can leave
that to `Fitted.backward`: forward and backward run twice there, the first time for the norms alone. Loops of tightfit's
own, and the Trainer where nothing of that is on, use the lever by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from tightfit.core import InvalidInput, Lever, Phase, Plan, PlanMismatch, Trace
from tightfit.levers.interface import Given, LeverDefinition, Share, Variant, Walked
from tightfit.levers.optimizer_step import (
    added_seconds,
    cut_of,
    cut_text,
    in_backward,
    not_in_backward,
    with_advice,
)

__all__ = ["DEFINITION"]


class StepInBackward(LeverDefinition):
    lever = Lever.STEP_IN_BACKWARD
    noun = "the optimizer's step in backward"
    summary = "each parameter is stepped when its gradient is there, and the gradient goes at once"
    is_default = False
    lowers_floor = True
    steps_optimizer = True

    def ruled_out(self, trace: Trace) -> str:
        return with_advice(trace, not_in_backward(trace))

    def variants(self, step: Variant) -> Iterator[Variant]:
        otherwise = {Lever.OPTIMIZER_CHUNKS, Lever.GRADIENTS_IN_HOST}  # they step when all gradients are there
        if not_in_backward(step.trace) or otherwise & step.levers:
            return
        trace = in_backward(step.trace)
        assert trace.optimizer is not None
        seconds = added_seconds(trace, step.trace)
        if trace.optimizer.clipped:  # forward and backward run once more, for the norms
            seconds += sum(op.seconds for op in trace.ops if op.phase is not Phase.OPTIMIZER)
        yield step.with_setting(self, trace, cut_text(trace.optimizer), seconds=seconds)

    def again_seconds(self, trace: Trace, seconds: float) -> float:
        return seconds if trace.optimizer is not None and trace.optimizer.clipped else 0.0

    def under(self, trace: Trace, plan: Plan) -> Trace:
        if not self.is_used(plan):
            return trace
        if reason := not_in_backward(trace):
            raise PlanMismatch(f"the plan steps the optimizer in backward, which this step cannot: {reason}")
        return in_backward(trace)

    def in_force(self, model: Any, plan: Plan, given: Given) -> AbstractContextManager[None]:
        from tightfit.levers.step_in_backward.hooks import stepping_in_backward

        if given.optimizer is None:
            raise InvalidInput("the plan steps the optimizer in backward, and none was given: pass optimizer=")
        return stepping_in_backward(model, given.optimizer, cut_of(plan.settings[self.lever.value]))

    def not_compiled(self, plan: Plan, whole: bool) -> str:
        return "steps the optimizer in backward" if self.is_used(plan) else ""

    def share(self, walked: Walked) -> Share | None:
        if not self.is_used(walked.plan):
            return None
        return Share(
            lever=self.lever, bought_bytes=walked.bought_by_setting(self.lever), seconds=0.0, flops=0, what=self.summary
        )

    def how(self, plan: Plan) -> str:
        return "with the optimizer's step in backward"

    def said(self, plan: Plan) -> str:
        return f"{self.summary}: the same bits"

    def fact(self, plan: Plan) -> tuple[str, str | None]:
        return "optimizer", "steps in backward" if self.is_used(plan) else None


DEFINITION = StepInBackward()
