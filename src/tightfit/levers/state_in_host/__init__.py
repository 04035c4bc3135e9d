"""Optimizer state in host memory: what the optimizer keeps of a large parameter is on the device for its own step only.

Needs from the trace: the step in chunks and of each parameter alone, with the bytes of state of each parameter
(`Trace.optimizer`).
Offers the planner: the state of the largest parameters elsewhere, for the seconds of copying it there and back, in a
few sizes. Walked by the referee like any step. Carried out by `host`, around the step of each part. The arithmetic
stays on the device, so it is proven bit by bit: parameters and state after a step.

It is no default: it needs room elsewhere, and it has not been measured on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tightfit.core import InvalidInput, Lever, Plan, PlanMismatch, Trace, format_bytes
from tightfit.levers.interface import Given, LeverDefinition, Share, Variant, Walked
from tightfit.levers.optimizer_step import cut_of, cut_text, state_in_host, waiting_bytes

__all__ = ["DEFINITION"]

#: In how many ways the parameters are divided into those whose state stays and those whose state waits elsewhere.
_DIVISIONS = 4


class StateInHost(LeverDefinition):
    lever = Lever.STATE_IN_HOST
    noun = "optimizer state in host memory"
    summary = "what the optimizer keeps of large parameters waits in host memory"
    waits = "optimizer state"
    is_default = False
    lowers_floor = True
    steps_optimizer = True

    def variants(self, step: Variant) -> Iterator[Variant]:
        at = step.trace.optimizer
        if at is None or not at.in_chunks:
            return
        sizes = sorted({p.size_bytes for part in at.in_chunks for p in part.parameters if p.state_bytes}, reverse=True)
        # the least that tells these from smaller ones, whatever the device rounds sizes to; the last are all
        divisions = [smaller + 1 for smaller in sizes[1:]] + [1] * bool(sizes)
        room_bytes = step.host_room_bytes
        if room_bytes is not None:
            divisions = [least for least in divisions if waiting_bytes(at, least) <= room_bytes]
        told = set()
        for least_bytes in [*divisions[:-1][: _DIVISIONS - 1], *divisions[-1:]]:
            bytes_moved = waiting_bytes(at, least_bytes)
            if bytes_moved in told:
                continue
            told.add(bytes_moved)
            trace = step.trace
            rates = (trace.out_bytes_per_second, trace.back_bytes_per_second)
            seconds = sum(bytes_moved / rate for rate in rates if rate)
            setting = f"{least_bytes} {cut_text(at)}"
            told_trace = state_in_host(trace, least_bytes)
            yield step.with_setting(self, told_trace, setting, seconds=seconds, host_bytes=bytes_moved)

    def under(self, trace: Trace, plan: Plan) -> Trace:
        if not self.is_used(plan):
            return trace
        if trace.optimizer is None or not trace.optimizer.in_chunks:
            raise PlanMismatch(
                "the plan keeps optimizer state in host memory, and this trace has no such step: trace with the "
                "optimizer"
            )
        return state_in_host(trace, self._least_bytes(plan))

    @contextlib.contextmanager
    def in_force(self, model: Any, plan: Plan, given: Given) -> Iterator[None]:
        from tightfit.levers.state_in_host.host import HostState
        from tightfit.step.optimizers import Cut, stepping_in_chunks

        if given.optimizer is None:
            raise InvalidInput(
                "the plan keeps optimizer state in host memory, and no optimizer was given: pass optimizer="
            )
        cut = Cut(*cut_of(plan.settings[self.lever.value].partition(" ")[2]))
        waiting = HostState(given.optimizer, self._least_bytes(plan), given.pool)
        with waiting, stepping_in_chunks(given.optimizer, cut):
            yield

    def share(self, walked: Walked) -> Share | None:
        if not self.is_used(walked.plan):
            return None
        waiting = self.host_bytes(walked.planned, walked.plan)
        return Share(
            lever=self.lever,
            bought_bytes=walked.bought_by_setting(self.lever),
            seconds=0.0,
            flops=0,
            what=f"{waiting:,} bytes of optimizer state wait in host memory",
        )

    def host_bytes(self, planned: Trace, plan: Plan) -> int:
        return 0 if planned.optimizer is None else waiting_bytes(planned.optimizer, self._least_bytes(plan))

    def how(self, plan: Plan) -> str:
        return "with optimizer state in host memory"

    def said(self, plan: Plan) -> str:
        least = format_bytes(self._least_bytes(plan))
        return f"optimizer state of parameters from {least} waits in host memory: the same bits"

    def fact(self, plan: Plan) -> tuple[str, str | None]:
        return "optimizer state", self.said(plan) if self.is_used(plan) else None

    def _least_bytes(self, plan: Plan) -> int:
        return int(plan.settings[self.lever.value].partition(" ")[0])


DEFINITION = StateInHost()
