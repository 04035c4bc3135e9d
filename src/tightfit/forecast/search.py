"""The largest batch and the longest sequence that fit, and the plans that show it.

Invariant: what is said to fit has been planned and laid out by the caching allocator's rules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

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


class Least(NamedTuple):
    """What is known of a step by its plan of the lowest peak."""

    runs: bool  # some plan is laid out in the room
    reserved_bytes: int  # by the plan of the lowest peak, where there is no limit
    peak_bytes: int  # of that plan


def least(recorded: Trace, room: int, levers: frozenset[Lever] | None = None, host_budget: int | None = None) -> Least:
    """Whether some plan runs within `room`, and what the one of the lowest peak takes."""
    made = lowest(recorded, effort=QUICK, levers=levers, host_budget=host_budget)
    reserved = bytes_reserved(recorded, made)
    assert reserved is not None
    runs = reserved <= room
    if not runs and made.peak_bytes <= room:
        # within the allocator's slack the lowest peak need not be the plan that is laid out best
        runs = bytes_reserved(recorded, made, room) is not None
        runs = runs or fitted(recorded, room, QUICK, levers, host_budget) is not None
    return Least(runs, reserved, made.peak_bytes)


def largest_fitting(
    setup: Setup,
    device: Device,
    room: int,
    progress: Progress,
    what: str,
    here: Least,
    static_bytes: int,
    levers: frozenset[Lever] | None,
    host_budget: int | None = None,
) -> int:
    """The largest batch, or the longest sequence in steps of 64 tokens, whose step some plan fits into `room`.

    Bytes are nearly affine in both, so the lines through two answers say where to look next; every answer is a step,
    traced, planned and laid out. `here`: the answer for the size that was asked for. `static_bytes`: what does not
    depend on the size. 0: not even the smallest fits.
    """
    step = 1 if what == "batch" else SEQ_STEP
    positions = positions_in(build_model(setup))
    most = max(1, MOST_TOKENS // setup.seq) if what == "batch" else (positions or MOST_TOKENS // setup.batch) // step
    asked = getattr(setup, what)
    tried: dict[int, Least] = {}
    if asked % step == 0:
        tried[asked // step] = here
    low, high = 0, most + 1  # low fits (or is nothing), high does not
    guess = min(max(1, asked // step), most)
    while low < high - 1:
        if guess not in tried:
            amount = guess * step
            progress(f"looking for the {'largest batch' if what == 'batch' else 'longest sequence'}: {amount}")
            tried[guess] = _least_of(_resized(setup, what, amount), device, room, levers, host_budget, amount >= asked)
        low, high = (guess, high) if tried[guess].runs else (low, guess)
        guess = _guess(tried, static_bytes, room, low, high)
    return max(low * step, asked if here.runs else 0)


#: Tiles are not tried where a plan without them takes this many times the room.
_TILES_CAN = 3


def _least_of(
    setup: Setup,
    device: Device,
    room: int,
    levers: frozenset[Lever] | None,
    host_budget: int | None,
    is_in_tiles: bool,
) -> Least:
    """`least` for a step that is not traced yet. Without `levers` tiles are tried where nothing exact fits, and nothing
    exact is tried where `is_in_tiles`: a smaller step had to be in tiles already."""
    if levers is not None:
        return least(trace_for(setup, device), room, levers, host_budget)
    found = Least(False, room, room)
    if not is_in_tiles:
        found = least(trace_for(setup, device), room, exact_only(None), host_budget)
    if not found.runs and found.reserved_bytes <= _TILES_CAN * room:
        recorded = trace_for(setup, device, tiles=True, all_tilings=False)
        if recorded.tiled:  # what holds the least: of all tiles, and with the levers that plans in tiles may use
            found = least(recorded.tiled[-1], room, exact_only(None), host_budget)
        elif is_in_tiles:
            found = least(recorded, room, None, host_budget)
    return found


def _resized(setup: Setup, what: str, amount: int) -> Setup:
    return dataclasses.replace(setup, batch=amount) if what == "batch" else dataclasses.replace(setup, seq=amount)


#: From one answer to the next a size grows by so many times at most, where nothing is known to be too large.
_GROWTH = 16


def _guess(tried: Mapping[int, Least], static_bytes: int, room: int, low: int, high: int) -> int:
    """Where to look next, strictly between `low` and `high` if anything is.

    The largest size lies between two others, by lines through what is known: where the allocator would have reserved
    all of the room, and where the lowest peak is that high. Between them it depends on the layout.
    """
    known = sorted(tried)
    if high in tried:
        pair = (low if low in tried else 0, high)
    else:
        pair = (max((count for count in known if count < low), default=0), low)
    if high in tried and len(known) > _LINES_HELP and len(known) % 2:
        guess = (low + high) / 2
    else:
        nothing = Least(True, static_bytes, static_bytes)
        first, second = (tried.get(count, nothing) for count in pair)
        by_layout = _where(pair, first.reserved_bytes, second.reserved_bytes, room)
        by_peak = _where(pair, first.peak_bytes, second.peak_bytes, room)
        if by_layout is None or by_peak is None:  # what does not grow with the size owns the peak of small ones
            guess = (low + high) / 2 if high in tried else low * 4
        else:
            guess = (max(low, by_layout) + min(high, max(low, by_peak))) / 2
        guess = guess if high in tried else min(guess, low * _GROWTH)
    return min(max(int(guess), low + 1), max(high - 1, low + 1))


def _where(sizes: tuple[int, int], first_bytes: int, second_bytes: int, room: int) -> float | None:
    """Where the line through the bytes of two sizes reaches the room; none: they do not grow."""
    slope = (second_bytes - first_bytes) / (sizes[1] - sizes[0])
    return sizes[0] + (room - first_bytes) / slope if slope > 0 else None


#: After so many answers every other question halves what is left: where layouts differ much, lines are of little help.
_LINES_HELP = 4
