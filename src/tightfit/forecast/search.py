"""The largest batch and the longest sequence that fit, and the plans that show it.

Invariant: what is said to fit has been planned and laid out by the caching allocator's rules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from tightfit.core import (
    Device,
    Lever,
    Plan,
    Trace,
)
from tightfit.forecast.recording import trace_for
from tightfit.forecast.setup import MOST_TOKENS, Progress, Setup, build_model, positions_in
from tightfit.levers import allowed, exact_only
from tightfit.plan import Effort, lowest
from tightfit.plan.account import bytes_reserved
from tightfit.plan.planning import feasible

SEQ_STEP = 64


#: For the plan that is shown, and for the many that only have to be possible.
SHOWN = Effort(points=48, solver_seconds=0.4, proves=False, is_estimated=True)


QUICK = Effort(points=12, solver_seconds=0.3, proves=False, is_estimated=True)


def can_hold_floor(levers: frozenset[Lever] | None) -> bool:
    """May `levers` run a step for which the device is smaller than what does not depend on the batch?"""
    return any(each.lowers_floor for each in allowed(levers))


def fitted(
    recorded: Trace,
    room: int,
    effort: Effort,
    levers: frozenset[Lever] | None = None,
    host_budget: int | None = None,
    kinds: Collection[bool | None] = (True, False),
) -> Plan | None:
    """The plan of least recompute with which the allocator stays within `room`; `None` when there is none. `kinds`: as
    in `plan.planning.feasible`."""
    asked: dict[str, Any] = {"effort": effort, "levers": levers, "host_budget_bytes": host_budget, "kinds": kinds}
    budget = room
    for _ in range(4 if effort.points > QUICK.points else 3):
        made = feasible(recorded, budget, **asked)
        if made is None:
            break
        if bytes_reserved(recorded, made, room) is not None:
            return made
        reserved = bytes_reserved(recorded, made) or room
        # fragmentation: leave the allocator as much more as it took beyond what was live
        budget = int(min(budget * 0.97, room * made.peak_bytes / max(reserved, made.peak_bytes)))
    made = lowest(recorded, effort=effort, levers=levers, host_budget=host_budget)
    for part in (0.75, 0.5, 0.25) if effort is SHOWN and 0 < made.peak_bytes < budget else ():
        between = feasible(recorded, made.peak_bytes + int(part * (budget - made.peak_bytes)), **asked)
        if between is not None and bytes_reserved(recorded, between, room) is not None:
            return between
    fits = made.peak_bytes <= room and bytes_reserved(recorded, made, room) is not None
    return dataclasses.replace(made, budget_bytes=room) if fits else None


def least(
    recorded: Trace, room: int, levers: frozenset[Lever] | None = None, host_budget: int | None = None
) -> tuple[bool, int]:
    """Whether some plan runs within `room`, and what the one of the lowest peak makes the allocator reserve."""
    made = lowest(recorded, effort=QUICK, levers=levers, host_budget=host_budget)
    reserved = bytes_reserved(recorded, made)
    assert reserved is not None
    if reserved <= room:
        return True, reserved
    if made.peak_bytes > room:
        return False, reserved
    # within the allocator's slack the lowest peak need not be the plan that is laid out best
    runs = bytes_reserved(recorded, made, room) is not None
    return runs or fitted(recorded, room, QUICK, levers, host_budget) is not None, reserved


def least_peak_bytes(recorded: Trace, levers: frozenset[Lever] | None = None, host_budget: int | None = None) -> int:
    """The lowest peak of any plan, in allocated bytes."""
    return lowest(recorded, effort=QUICK, levers=levers, host_budget=host_budget).peak_bytes


def largest_fitting(
    setup: Setup,
    device: Device,
    room: int,
    progress: Progress,
    what: str,
    here: tuple[bool, int],
    levers: frozenset[Lever] | None,
    host_budget: int | None = None,
) -> int:
    """The largest batch, or the longest sequence in steps of 64 tokens, whose step some plan fits into `room`.

    Bytes are nearly affine in both, so the line through two answers says where to look next; every answer is a step,
    traced, planned and laid out. `here`: whether the size that was asked for fits, and the least that it reserves.
    0: not even the smallest fits.
    """
    step = 1 if what == "batch" else SEQ_STEP
    positions = positions_in(build_model(setup))
    most = max(1, MOST_TOKENS // setup.seq) if what == "batch" else (positions or MOST_TOKENS // setup.batch) // step
    asked = getattr(setup, what)
    tried: dict[int, tuple[bool, int]] = {}
    if asked % step == 0:
        tried[asked // step] = here
    low, high = 0, most + 1  # low fits (or is nothing), high does not
    guess = min(max(1, asked // step), most)
    while low < high - 1:
        if guess not in tried:
            amount = guess * step
            progress(f"looking for the {'largest batch' if what == 'batch' else 'longest sequence'}: {amount}")
            tried[guess] = _least_of(_resized(setup, what, amount), device, room, levers, host_budget, amount >= asked)
        low, high = (guess, high) if tried[guess][0] else (low, guess)
        guess = _guess({count: reserved for count, (_, reserved) in tried.items()}, room, low, high)
    return max(low * step, asked if here[0] else 0)


#: Tiles are not tried where a plan without them takes this many times the room.
_TILES_CAN = 3


def _least_of(
    setup: Setup,
    device: Device,
    room: int,
    levers: frozenset[Lever] | None,
    host_budget: int | None,
    is_in_tiles: bool,
) -> tuple[bool, int]:
    """`least` for a step that is not traced yet. Without `levers` tiles are tried where nothing exact fits, and nothing
    exact is tried where `is_in_tiles`: a smaller step had to be in tiles already."""
    if levers is not None:
        return least(trace_for(setup, device), room, levers, host_budget)
    found = False, room
    if not is_in_tiles:
        found = least(trace_for(setup, device), room, exact_only(None), host_budget)
    if not found[0] and found[1] <= _TILES_CAN * room:
        recorded = trace_for(setup, device, tiles=True)
        found = least(recorded, room, None, host_budget) if recorded.tiled or is_in_tiles else found
    return found


def _resized(setup: Setup, what: str, amount: int) -> Setup:
    return dataclasses.replace(setup, batch=amount) if what == "batch" else dataclasses.replace(setup, seq=amount)


def _guess(reserved: dict[int, int], room: int, low: int, high: int) -> int:
    """Where to look next, strictly between `low` and `high` if anything is."""
    below, above = low in reserved, high in reserved
    if len(reserved) > 3 and below and above:  # the line does not help: halve
        guess = (low + high) // 2
    elif below and above:
        slope = (reserved[high] - reserved[low]) / (high - low)
        guess = int(low + (room - reserved[low]) / slope) if slope > 0 else (low + high) // 2
    elif below:
        # what does not grow with the size (the optimizer's step) may still own the peak at small ones
        before = max((count for count in reserved if count < low), default=None)
        slope = 0.0 if before is None else (reserved[low] - reserved[before]) / (low - before)
        guess = int(low + (room - reserved[low]) / slope) if slope > 0 else low * 4 if low > 1 else 2
        if before is not None:  # under a limit the allocator wastes less than the line says
            guess = max(guess, low + min(low - before, max(1, low // 8)))
        guess = min(guess, low * 16)
    else:
        guess = high // 2
    return min(max(guess, low + 1), max(high - 1, low + 1))
