"""Nesting: only some units keep what they are given; sweeps through the units before make the rest again.

Needs from the trace: which value each unit hands on to the next.
Offers the planner: what a unit is given may be dropped (`Grant.SWEEP`), at the seconds of running the units before it
once more. Walked by the referee as the plan's `advances` say. Carried out by the engine's chain of tapes. Proven bit by
bit.
"""

from __future__ import annotations

from tightfit.core import Action, Lever, Plan, Trace
from tightfit.levers.interface import Grant, LeverDefinition, Share, Walked
from tightfit.levers.without import without_sweeps


class Nest(LeverDefinition):
    lever = Lever.NEST
    noun = "nesting"
    summary = "units grouped, so that only some unit inputs are kept"
    grants = Grant.SWEEP

    def ruled_out(self, trace: Trace) -> str:
        if trace.resharded:
            return "a sweep would read weights that FSDP2 has given back by then; leave it out"
        return super().ruled_out(trace)

    def is_used(self, plan: Plan) -> bool:
        return bool(plan.advances)

    def not_compiled(self, plan: Plan, whole: bool) -> str:
        swept = plan.advances or any(choice.lends for choice in plan.choices)
        return "nests units, so that one unit's values are made again for another" if swept else ""

    def share(self, walked: Walked) -> Share | None:
        plan, line = walked.plan, walked.line
        if not plan.advances:
            return None
        unswept = walked.walk(without_sweeps(plan))
        return Share(
            lever=self.lever,
            bought_bytes=unswept.peak_bytes - line.peak_bytes,
            seconds=line.recompute_seconds - unswept.recompute_seconds,
            flops=line.recompute_flops - unswept.recompute_flops,
            what=f"{_swept(plan)} unit inputs are made again by {len(plan.advances)} sweeps",
        )

    def fact(self, plan: Plan) -> tuple[str, str | int | None]:
        return "inputs made again by sweeps", sum(Action.RECOMPUTE in choice.inputs for choice in plan.choices) or None


def _swept(plan: Plan) -> int:
    return sum(action is Action.RECOMPUTE for choice in plan.choices for action in choice.inputs)


DEFINITION = Nest()
