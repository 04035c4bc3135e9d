"""Gradients in host memory: those that wait for their step, or to be added to, are on the device meanwhile no longer.

Needs from the trace: when each gradient is there (`EventKind.READY`), which gradients there are before the step
(accumulation), and the step in chunks (`Trace.optimizer`), which there is where a trial has shown the same bits.
Offers the planner: all gradients elsewhere, for the seconds of copying them; a plan that has room left then keeps the
small ones (`eased`). Walked by the referee: a gradient that was there is brought for the addition and sent when that is
done, one that backward makes is sent, and each is there once more for its own step. Carried out by `host`, by hooks on
the parameters and around the step of each part. The arithmetic stays on the device, so it is proven bit by bit:
gradients, parameters and state after a step.

It is no default: it needs room elsewhere, and it has not been measured on a GPU. Where nothing clips, adds to or reads
gradients, `step_in_backward` has none to move.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from tightfit.core import EventKind, InvalidInput, Lever, Plan, PlanMismatch, Trace, format_bytes
from tightfit.device.cost import copy_lanes
from tightfit.levers.interface import Given, LeverDefinition, Share, Variant, Walked
from tightfit.levers.optimizer_step import (
    cut_of,
    cut_text,
    eased_to,
    gradients_in_host,
    gradients_stay,
    waiting_gradients,
    with_advice,
    with_setting,
)

__all__ = ["DEFINITION"]


class GradientsInHost(LeverDefinition):
    lever = Lever.GRADIENTS_IN_HOST
    noun = "gradients in host memory"
    summary = "gradients wait in host memory until they are added to or stepped with"
    waits = "gradients"
    is_default = False
    lowers_floor = True
    steps_optimizer = True

    def ruled_out(self, trace: Trace) -> str:
        return with_advice(trace, gradients_stay(trace))

    def variants(self, step: Variant) -> Iterator[Variant]:
        if gradients_stay(step.trace):
            return
        room_bytes = step.host_room_bytes
        fitting = [
            least_bytes
            for least_bytes in _divisions(step.trace)
            if room_bytes is None or waiting_gradients(step.trace, least_bytes)[0] <= room_bytes
        ]
        if not fitting:
            return
        seconds = _seconds(step.trace, fitting[-1])
        made = step.with_setting(
            self, gradients_in_host(step.trace, fitting[-1]), self._text(step.trace, fitting[-1]), seconds=seconds,
            host_bytes=waiting_gradients(step.trace, fitting[-1])[0],
        )  # fmt: skip
        yield dataclasses.replace(made, eases_seconds=made.eases_seconds + seconds)

    def eased(self, trace: Trace, plan: Plan, peak_bytes: Callable[[Plan], int]) -> Plan:
        if not self.is_used(plan):
            return plan
        asked = self._least_bytes(plan)
        larger = [each for each in _divisions(trace) if each > asked]
        return eased_to(plan, larger, functools.partial(self._with, trace, plan), peak_bytes)

    def _with(self, trace: Trace, plan: Plan, least_bytes: int) -> Plan:
        """`plan` with the gradients of at least so many bytes elsewhere and no others."""
        more = _seconds(trace, least_bytes) - _seconds(trace, self._least_bytes(plan))
        return with_setting(plan, self.lever, self._text(trace, least_bytes), more)

    def under(self, trace: Trace, plan: Plan) -> Trace:
        if not self.is_used(plan):
            return trace
        if reason := gradients_stay(trace):
            raise PlanMismatch(f"the plan keeps gradients in host memory, which this step cannot: {reason}")
        return gradients_in_host(trace, self._least_bytes(plan))

    @contextlib.contextmanager
    def in_force(self, model: Any, plan: Plan, given: Given) -> Iterator[None]:
        from tightfit.levers.gradients_in_host.host import HostGradients
        from tightfit.step.optimizers import Cut, stepping_in_chunks

        if given.optimizer is None:
            raise InvalidInput("the plan keeps gradients in host memory, and no optimizer was given: pass optimizer=")
        cut = Cut(*cut_of(plan.settings[self.lever.value].partition(" ")[2]))
        waiting = HostGradients(model, given.optimizer, self._least_bytes(plan), given.pool)
        with waiting, stepping_in_chunks(given.optimizer, cut):
            yield

    def not_compiled(self, plan: Plan, whole: bool) -> str:
        return "keeps gradients in host memory" if self.is_used(plan) else ""

    def share(self, walked: Walked) -> Share | None:
        if not self.is_used(walked.plan):
            return None
        waiting = self.host_bytes(walked.planned, walked.plan)
        return Share(
            lever=self.lever,
            bought_bytes=walked.bought_by_setting(self.lever),
            seconds=_seconds(walked.planned, self._least_bytes(walked.plan)),
            flops=0,
            what=f"{waiting:,} bytes of gradients wait in host memory",
        )

    def host_bytes(self, planned: Trace, plan: Plan) -> int:
        return 0 if planned.optimizer is None else waiting_gradients(planned, self._least_bytes(plan))[0]

    def how(self, plan: Plan) -> str:
        return "with gradients in host memory"

    def said(self, plan: Plan) -> str:
        return f"gradients from {format_bytes(self._least_bytes(plan))} wait in host memory: the same bits"

    def fact(self, plan: Plan) -> tuple[str, str | None]:
        return "waiting gradients", self.said(plan) if self.is_used(plan) else None

    def _text(self, trace: Trace, least_bytes: int) -> str:
        assert trace.optimizer is not None
        return f"{least_bytes} {cut_text(trace.optimizer)}"

    def _least_bytes(self, plan: Plan) -> int:
        return int(plan.settings[self.lever.value].partition(" ")[0])


def _divisions(trace: Trace) -> list[int]:
    """From how many bytes on gradients may wait, the most first: each tells one size from the smaller ones, whatever
    the device rounds sizes to; the last are all."""
    at = trace.optimizer
    assert at is not None
    ready = {event.subject for event in trace.events[: at.events] if event.what is EventKind.READY}
    sizes = sorted({trace.values[v].size_bytes for v in ready}, reverse=True)
    return [smaller + 1 for smaller in sizes[1:]] + [1]


def _seconds(trace: Trace, least_bytes: int) -> float:
    """What the copies of these gradients take: off the device once, and back for their step and for what backward adds
    to them."""
    waiting_bytes, added_bytes = waiting_gradients(trace, least_bytes)
    out, back = copy_lanes(trace)
    return waiting_bytes / out.bytes_per_second + (waiting_bytes + added_bytes) / back.bytes_per_second


DEFINITION = GradientsInHost()
