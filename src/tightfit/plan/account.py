"""Where the bytes of a step wait that are not on the device.

Idea: each lever that moves bytes says how many wait elsewhere at once. With the peak of the device they are the one
account of what a plan asks of a machine.

Invariant: a lever's bytes are those that its buffers hold together, without rounding by the system that gives them out.
Refused: nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from tightfit.core import Plan, Trace, format_bytes
from tightfit.levers import every, used
from tightfit.plan.simulate import under

__all__ = ["host_bytes", "host_said"]


def host_bytes(trace: Trace, plan: Plan) -> dict[str, int]:
    """By lever, the bytes that `plan` has wait in host memory, or in a file where one was named for them."""
    planned = under(trace, plan)
    found = {lever.lever.value: lever.host_bytes(planned, plan) for lever in used(plan)}
    return {name: size_bytes for name, size_bytes in found.items() if size_bytes}


def host_said(sizes_bytes: Mapping[str, int], limit_bytes: int | None = None) -> str:
    """`host_bytes` as a line, with the most that was to wait there; empty where nothing does."""
    nouns = {lever.lever.value: lever.waits for lever in every()}
    parts = ", ".join(f"{nouns[name]} {format_bytes(size_bytes)}" for name, size_bytes in sizes_bytes.items())
    of = "" if limit_bytes is None else f" of at most {format_bytes(limit_bytes)}"
    return f"{format_bytes(sum(sizes_bytes.values()))}{of}: {parts}" if sizes_bytes else ""
