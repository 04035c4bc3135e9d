"""Optimizer state in host memory: what the optimizer keeps of a large parameter is on the device for its own step only.

Needs from the trace: the step in chunks and of each parameter alone, with the bytes of state of each parameter
(`Trace.optimizer`).
Offers the planner: the state of the largest parameters elsewhere, for the seconds of copying it there and back, in a
few sizes; a plan that has room left then moves that of fewer (`eased`). Of equal parameters the first are moved. Walked
by the referee like any step. Carried out by `host`, around the step of each part. The arithmetic stays on the device,
so it is proven bit by bit: parameters and state after a step.

It is no default: it needs room elsewhere, and it has not been measured on a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from tightfit.core import InvalidInput, Lever, OptimizerStep, Plan, PlanMismatch, Trace, format_bytes
from tightfit.levers.interface import Given, LeverDefinition, Share, Variant, Walked, gone_ahead
from tightfit.levers.optimizer_step import (
    Waiting,
    by_size,
    copying_seconds,
    cut_of,
    cut_text,
    eased_to,
    not_by_parts,
    state_in_host,
    waiting_bytes,
    with_advice,
    with_setting,
)

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

    def ruled_out(self, trace: Trace) -> str:
        reason = not_by_parts(trace)
        if not reason and trace.optimizer is not None and not any(size for _, size in by_size(trace.optimizer)):
            reason = "the optimizer keeps no state of its parameters"
        return with_advice(trace, reason)

    def variants(self, step: Variant) -> Iterator[Variant]:
        at = step.trace.optimizer
        if at is None or not at.in_chunks:
            return
        room_bytes = step.host_room_bytes
        fitting = [each for each in by_size(at) if room_bytes is None or each[1] <= room_bytes]
        divisions = [each for each in fitting[:-1] if not each[0].some]
        told, before = {0}, 0.0
        for waiting, bytes_moved in [*divisions[: _DIVISIONS - 1], *fitting[-1:]]:
            if bytes_moved in told:
                continue
            told.add(bytes_moved)
            seconds = _seconds(step.trace, bytes_moved)
            made = step.with_setting(
                self, state_in_host(step.trace, waiting), f"{waiting} {cut_text(at)}", seconds=seconds,
                host_bytes=bytes_moved,
            )  # fmt: skip
            yield dataclasses.replace(made, eases_seconds=made.eases_seconds + seconds - before)
            before = _seconds(step.trace, bytes_moved, ahead=step.trace.copies_beside)

    def eased(self, trace: Trace, plan: Plan, peak_bytes: Callable[[Plan], int]) -> Plan:
        at = trace.optimizer
        if not self.is_used(plan) or at is None:
            return plan
        asked_bytes = waiting_bytes(at, self._waiting(plan))
        fewer = [each for each, moved_bytes in by_size(at) if 0 < moved_bytes < asked_bytes]
        if Lever.STEP_IN_BACKWARD.value in plan.settings:  # equal parameters are not told apart there
            fewer = [each for each in fewer if not each.some]
        return eased_to(plan, fewer, functools.partial(self._with, at, trace, plan), peak_bytes)

    def _with(self, at: OptimizerStep, trace: Trace, plan: Plan, waiting: Waiting) -> Plan:
        """`plan` with this state elsewhere and no other."""
        sizes = (waiting_bytes(at, each) for each in (self._waiting(plan), waiting))
        before, now = (_seconds(trace, size_bytes, ahead=self.is_ahead(plan)) for size_bytes in sizes)
        return with_setting(plan, self.lever, f"{waiting} {cut_text(at)}", now - before)

    def ahead(self, trace: Trace, plan: Plan) -> Plan:
        at = trace.optimizer
        # where each parameter is stepped in backward, none is known to come next
        if not self.is_used(plan) or at is None or Lever.STEP_IN_BACKWARD.value in plan.settings:
            return plan
        size_bytes = waiting_bytes(at, self._waiting(plan))
        in_turn, ahead = (_seconds(trace, size_bytes, ahead=each) for each in (False, True))
        return gone_ahead(plan, self.lever, in_turn - ahead)

    def under(self, trace: Trace, plan: Plan) -> Trace:
        if not self.is_used(plan):
            return trace
        if trace.optimizer is None or not trace.optimizer.in_chunks:
            raise PlanMismatch(
                "the plan keeps optimizer state in host memory, and this trace has no such step: trace with the "
                "optimizer"
            )
        return state_in_host(trace, self._waiting(plan), ahead=self.is_ahead(plan))

    @contextlib.contextmanager
    def in_force(self, model: Any, plan: Plan, given: Given) -> Iterator[None]:
        from tightfit.levers.state_in_host.host import HostState
        from tightfit.step.optimizers import Cut, stepping_in_chunks

        if given.optimizer is None:
            raise InvalidInput(
                "the plan keeps optimizer state in host memory, and no optimizer was given: pass optimizer="
            )
        cut = Cut(*cut_of(plan.settings[self.lever.value].partition(" ")[2]))
        waiting = HostState(given.optimizer, self._waiting(plan), given.pool, ahead=self.is_ahead(plan))
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
        return 0 if planned.optimizer is None else waiting_bytes(planned.optimizer, self._waiting(plan))

    def how(self, plan: Plan) -> str:
        return "with optimizer state in host memory"

    def said(self, plan: Plan) -> str:
        waiting = self._waiting(plan)
        more = f", and of {waiting.some} from {format_bytes(waiting.some_from_bytes)}," if waiting.some else ""
        least = format_bytes(waiting.from_bytes)
        ahead = ", copied beside the steps of others" if self.is_ahead(plan) else ""
        return f"optimizer state of parameters from {least}{more} waits in host memory{ahead}: the same bits"

    def fact(self, plan: Plan) -> tuple[str, str | None]:
        return "optimizer state", self.said(plan) if self.is_used(plan) else None

    def _waiting(self, plan: Plan) -> Waiting:
        return Waiting.of(plan.settings[self.lever.value].partition(" ")[0])


def _seconds(trace: Trace, size_bytes: int, *, ahead: bool = False) -> float:
    """What it takes to copy so many bytes there and back."""
    return copying_seconds(trace, size_bytes, size_bytes, ahead=ahead)


DEFINITION = StateInHost()
