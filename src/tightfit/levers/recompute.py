"""Recompute: a unit drops values in forward and makes them again in backward.

Needs from the trace: the program of each unit, and which of its values backward reads.
Offers the planner: every value of a unit may be dropped (`Grant.DROP`), at the seconds of the ops that make it again.
Walked by the referee as the units' choices say. Carried out by the engine's frames and tapes, or by tags for the
compiler. Proven bit by bit.
"""

from __future__ import annotations

from tightfit.core import Action, Lever, Plan, Trace
from tightfit.levers.interface import Grant, LeverDefinition, Share, Walked
from tightfit.levers.without import keeping, without_sweeps


class Recompute(LeverDefinition):
    lever = Lever.RECOMPUTE
    noun = "recompute"
    summary = "units drop values and make them again"
    grants = Grant.DROP
    is_compiled = is_compiled_around = True

    def is_used(self, plan: Plan) -> bool:
        return plan.replays > 0

    def share(self, walked: Walked) -> Share | None:
        if not walked.line.replays:
            return None
        without = walked.walk(keeping(walked.plan, Action.RECOMPUTE))
        unswept = walked.walk(without_sweeps(walked.plan))  # what sweeps run is another lever's
        return Share(
            lever=self.lever,
            bought_bytes=without.peak_bytes - walked.line.peak_bytes,
            seconds=unswept.recompute_seconds,
            flops=unswept.recompute_flops,
            what=f"{unswept.replays} units make {_made_again(walked.planned, walked.plan)} values again",
        )


def _made_again(trace: Trace, plan: Plan) -> int:
    """Values that backward reads and that the plan does not keep."""
    needed = {(frame.unit, value) for frame in trace.frames for value in trace.programs[frame.id].needed}
    recomputed = (
        (choice.unit, value)
        for choice in plan.choices
        for value, action in enumerate(choice.actions)
        if action is Action.RECOMPUTE
    )
    return len(needed.intersection(recomputed))


DEFINITION = Recompute()
