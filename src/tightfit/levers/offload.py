"""Offload: what a unit keeps, or is given, waits in host memory or in a file.

Needs from the trace: the rates of copies from the device and back, and whether they run beside the compute.
Offers the planner: whatever is kept may wait off the device (`Grant.MOVE`), at the seconds that the step waits for
copies. Walked by the referee as the units' choices say. Carried out by the engine's pool. Proven bit by bit.

It is no default: it needs room elsewhere, and it has not been measured on a GPU.
"""

from __future__ import annotations

from tightfit.core import Action, Choice, Lever, Plan, Trace, format_bytes
from tightfit.device.cost import copy_lanes
from tightfit.levers.interface import Grant, LeverDefinition, Share, Walked
from tightfit.levers.without import keeping


class Offload(LeverDefinition):
    lever = Lever.OFFLOAD
    noun = "offload"
    summary = "kept values moved to host memory"
    waits = "kept values"
    is_default = False
    grants = Grant.MOVE

    def is_used(self, plan: Plan) -> bool:
        return plan.offloaded_bytes > 0 or any(_moves(choice) for choice in plan.choices)

    def not_compiled(self, plan: Plan, whole: bool) -> str:
        return "offloads values to the host" if self.is_used(plan) else ""

    def share(self, walked: Walked) -> Share | None:
        line = walked.line
        if not line.offloaded_bytes:
            return None
        without = walked.walk(keeping(walked.plan, Action.OFFLOAD))
        out, back = copy_lanes(walked.planned)
        return Share(
            lever=self.lever,
            bought_bytes=without.peak_bytes - line.peak_bytes,
            seconds=out.waiting_seconds(line.offloaded_bytes) + back.waiting_seconds(line.fetched_bytes),
            flops=0,
            what=f"{line.offloaded_bytes:,} bytes wait off the device",
        )

    def host_bytes(self, planned: Trace, plan: Plan) -> int:
        return plan.offloaded_bytes

    def fact(self, plan: Plan) -> tuple[str, str | None]:
        return "offloaded", format_bytes(plan.offloaded_bytes) if plan.offloaded_bytes else None


def _moves(choice: Choice) -> bool:
    return Action.OFFLOAD in choice.actions or Action.OFFLOAD in choice.inputs


DEFINITION = Offload()
