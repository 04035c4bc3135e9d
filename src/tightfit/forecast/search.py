"""The largest batch and the longest sequence that fit, and the plans that show it.

Invariant: what is said to fit has been planned and laid out by the caching allocator's rules.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tightfit.core import (
    Device,
    Lever,
    Plan,
    PlanMismatch,
    Program,
    Trace,
    Unsupported,
)
from tightfit.forecast.recording import trace_for
from tightfit.forecast.setup import MOST_TOKENS, Progress, Setup, build_model, positions_in
from tightfit.levers import allowed, exact_only
from tightfit.plan import Effort, lowest
from tightfit.plan.account import bytes_reserved, has_caching_allocator, host_bytes, laid_out
from tightfit.plan.indexed import without_collecting
from tightfit.plan.planning import feasible
from tightfit.plan.program import shared
from tightfit.plan.simulate import allocations, simulate

SEQ_STEP = 64


#: For the plan that is shown, and for the many that only have to be possible.
SHOWN = Effort(points=48, solver_seconds=5.0, proves=False, is_estimated=True)


QUICK = Effort(points=12, solver_seconds=5.0, proves=False, is_estimated=True)


def can_hold_floor(levers: frozenset[Lever] | None) -> bool:
    """May `levers` run a step for which the device is smaller than what does not depend on the batch?"""
    return any(each.lowers_floor for each in allowed(levers))


@without_collecting()
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


@dataclass(frozen=True, kw_only=True)
class Least:
    """What is known of a step by its plan of the lowest peak."""

    runs: bool  # some plan is laid out in the room
    peak_bytes: int  # of the plan of the lowest peak
    reserved_bytes: int  # by it, where there is no limit
    fits_in: Callable[[int], bool] = bool  # is it laid out in so many bytes?
    made: Plan | None = None  # it
    is_settled: bool = True  # by plans that were looked for at this size; else by the one of another size

    @functools.cached_property
    def needed_bytes(self) -> int:
        """The least room in which it is laid out, or nearly so: under a limit free segments are given back."""
        low, needed = self.peak_bytes, self.reserved_bytes
        for _ in range(_HALVINGS):
            middle = (low + needed) // 2
            low, needed = (low, middle) if self.fits_in(middle) else (middle, needed)
        return needed


#: The room that a plan needs is found to one part in so many powers of two of what the allocator may add to its peak.
_HALVINGS = 3


@without_collecting()
def least(recorded: Trace, room: int, levers: frozenset[Lever] | None = None, host_budget: int | None = None) -> Least:
    """Whether some plan runs within `room`, and what the one of the lowest peak takes."""
    made = lowest(recorded, effort=QUICK, levers=levers, host_budget=host_budget)
    found = _laid_out(recorded, made, room)
    if not found.runs and made.peak_bytes <= room:
        # within the allocator's slack the lowest peak need not be the plan that is laid out best
        found = dataclasses.replace(found, runs=fitted(recorded, room, QUICK, levers, host_budget) is not None)
    return found


def _laid_out(recorded: Trace, made: Plan, room: int) -> Least:
    """What is known by `made` alone."""
    if not has_caching_allocator(recorded):
        peak = made.peak_bytes
        return Least(runs=peak <= room, peak_bytes=peak, reserved_bytes=peak, made=made)
    blocks = allocations(recorded, made)
    reserved = laid_out(recorded, *blocks)
    assert reserved is not None

    def fits_in(room: int) -> bool:
        return laid_out(recorded, *blocks, room) is not None

    runs = reserved <= room or (made.peak_bytes <= room and fits_in(room))
    return Least(runs=runs, peak_bytes=made.peak_bytes, reserved_bytes=reserved, fits_in=fits_in, made=made)


@without_collecting()
def _carried(made: Plan, recorded: Trace, host_budget: int | None) -> Plan | None:
    """`made`, the plan of a step of another size, for `recorded`; None where it does not go with it. Its seconds and
    its bound are those of the other step."""
    calls: dict[str, list[Program]] = {unit.path: [] for unit in recorded.units}
    for frame in recorded.frames:
        calls[frame.unit].append(recorded.programs[frame.id])
    digests = {unit.path: unit.digest for unit in recorded.units}
    if calls.keys() != {choice.unit for choice in made.choices} or (made.tiling is None) != (recorded.tiling is None):
        return None
    for choice in made.choices:
        if not choice.keeps_all and made.programs.get(choice.program) != shared(calls[choice.unit]):
            return None
    choices = tuple(dataclasses.replace(choice, program=digests[choice.unit]) for choice in made.choices)
    programs = {
        digests[choice.unit]: made.programs[choice.program]
        for choice in made.choices
        if choice.program in made.programs
    }
    found = dataclasses.replace(
        made, choices=choices, programs=programs, tiling=recorded.tiling, trace_digest=recorded.digest
    )
    try:
        found = dataclasses.replace(found, peak_bytes=simulate(recorded, found).peak_bytes)
    except (PlanMismatch, Unsupported):  # its levers have no such part there
        return None
    within = host_budget is None or sum(host_bytes(recorded, found).values()) <= host_budget
    return found if within else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Largest:
    """The end of a search."""

    size: int  # that fits; 0: none does
    tokens: float  # of a step that just fills the room, by the line between the two sizes at the end


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
    tokens: float | None = None,
) -> Largest:
    """The largest batch, or the longest sequence in steps of 64 tokens, whose step some plan fits into `room`.

    Bytes are nearly affine in both, so a line through the rooms that two sizes need says where to look next. On the way
    the plan of a size nearby is tried, which takes a tenth of the time of a plan. The ends are told by plans of their
    own: what is said to fit, and that the next size does not. These plans are found without the proving search of a
    run, which takes ten times as long and was seen to find peaks 1% lower: near the limit one more may fit in a
    run than is said here. `here`: the answer for the size that was asked for.
    `static_bytes`: what does not depend on the size. `tokens`: about so many were found to fit in another shape, so
    that size is looked at first. Size 0: not even the smallest fits.
    """
    step = 1 if what == "batch" else SEQ_STEP
    positions = positions_in(build_model(setup))
    most = max(1, MOST_TOKENS // setup.seq) if what == "batch" else (positions or MOST_TOKENS // setup.batch) // step
    asked = getattr(setup, what)
    sizes = _Sizes(setup, device, room, progress, what, step, levers, host_budget)
    tried = sizes.tried
    if asked % step == 0:
        tried[asked // step] = here
    low, high = 0, most + 1  # low fits (or is nothing), high does not
    guess = min(max(1, asked // step), most)
    first = None if tokens is None else int(tokens * asked / (setup.batch * setup.seq * step))
    near: int | None = None  # where `first` leads, next to the end: a plan of its own tells most there
    stride = 0  # once a plan of a size's own fits where one from nearby did not: how far the next is, each settled
    while True:
        if low < high - 1:
            if guess not in tried:
                tried[guess] = sizes.settled(guess) if stride or guess == near else sizes.looked_at(guess)
            low, high = (guess, high) if tried[guess].runs else (low, guess)
        elif high in tried and not tried[high].is_settled:
            tried[high] = sizes.settled(high)
            if tried[high].runs:
                stride, low = 1, high
                for size in [size for size, found in tried.items() if size > low and not found.is_settled]:
                    del tried[size]
                high = min((size for size in tried if size > low), default=most + 1)
        elif low in tried and not tried[low].is_settled:
            tried[low] = sizes.settled(low)
            if not tried[low].runs:
                low, high = max((size for size in tried if size < low and tried[size].runs), default=0), low
        else:
            found = max(low * step, asked if here.runs else 0)
            return Largest(size=found, tokens=_reached(tried, room, low, high) * setup.batch * setup.seq * step / asked)
        below = max((size for size in tried if size < low and tried[size].runs), default=low)
        sizes.keep(below, low, high)
        if first is not None and low < high - 1:
            guess = near = min(max(first, low + 1), high - 1)
            first = None
        elif stride:
            guess, stride = min(low + stride, max(low + 1, (low + high) // 2)), 2 * stride
        else:
            guess = _guess(tried, static_bytes, room, low, high)


class _Sizes:
    """What is known of the sizes that were tried, and the way to try one more.

    One thing because plans of one size are tried at others, and the traces of the ends are kept.
    """

    def __init__(
        self,
        setup: Setup,
        device: Device,
        room: int,
        progress: Progress,
        what: str,
        step: int,
        levers: frozenset[Lever] | None,
        host_budget: int | None,
    ) -> None:
        self.setup, self.device, self.room, self.progress = setup, device, room, progress
        self.what, self.step, self.levers, self.host_budget = what, step, levers, host_budget
        self.tried: dict[int, Least] = {}
        self._traces: dict[int, Trace] = {}

    def keep(self, *sizes: int) -> None:
        """Forget the traces of others."""
        self._traces = {size: recorded for size, recorded in self._traces.items() if size in sizes}

    @without_collecting()
    def looked_at(self, size: int) -> Least:
        """By the plan of a size nearby, if there is one; else settled."""
        if self._may_be_exact(size):
            return self.settled(size)
        settled = [each for each, known in self.tried.items() if known.is_settled]
        nearest = min(settled, key=lambda each: abs(each - size), default=0)
        if nearest and (made := self.tried[nearest].made) is not None:
            recorded = self._trace(size)
            carried = _carried(made, recorded, self.host_budget)
            if carried is not None:
                found = dataclasses.replace(_laid_out(recorded, carried, self.room), is_settled=False)
                if found.runs or (nearest <= size * _NEARBY and size <= nearest * _NEARBY):
                    return found
        return self.settled(size)

    @without_collecting()
    def settled(self, size: int) -> Least:
        """By plans of its own."""
        if self._may_be_exact(size):
            self._say(size)
            return _least_of(self._resized(size), self.device, self.room, self.host_budget)
        recorded = self._trace(size)
        levers = exact_only(None) if self.levers is None and recorded.tiling is not None else self.levers
        return least(recorded, self.room, levers, self.host_budget)

    def _trace(self, size: int) -> Trace:
        """Without `levers` in tiles: the size that was asked for, which is no larger, had to be."""
        if size not in self._traces:
            self._say(size)
            in_tiles = self.levers is None
            self._traces[size] = trace_for(self._resized(size), self.device, tiles=in_tiles, tiles_alone=in_tiles)
        return self._traces[size]

    def _may_be_exact(self, size: int) -> bool:
        """May it be that nothing has to be in tiles, though it may be?"""
        return self.levers is None and size * self.step < getattr(self.setup, self.what)

    def _say(self, size: int) -> None:
        noun = "largest batch" if self.what == "batch" else "longest sequence"
        self.progress(f"looking for the {noun}: {size * self.step}")

    def _resized(self, size: int) -> Setup:
        amount = size * self.step
        if self.what == "batch":
            return dataclasses.replace(self.setup, batch=amount)
        return dataclasses.replace(self.setup, seq=amount)


#: Within so many times its size the plan of a step tells what another step cannot do.
_NEARBY = 1.5

#: Tiles are not tried where a plan without them takes this many times the room.
_TILES_CAN = 3


def _least_of(setup: Setup, device: Device, room: int, host_budget: int | None) -> Least:
    """`least` for a step that may use all levers: tiles are tried where nothing exact fits."""
    found = least(trace_for(setup, device), room, exact_only(None), host_budget)
    if not found.runs and found.reserved_bytes <= _TILES_CAN * room:
        recorded = trace_for(setup, device, tiles=True, tiles_alone=True)
        if recorded.tiling is not None:  # what holds the least, with the levers that plans in tiles may use
            found = least(recorded, room, exact_only(None), host_budget)
    return found


#: From one answer to the next a size grows by so many times at most, where nothing is known to be too large.
_GROWTH = 16


def _reached(tried: Mapping[int, Least], room: int, low: int, high: int) -> float:
    """Where the line from `low`, which fits, to `high`, which does not, reaches the room."""
    if low not in tried or high not in tried:
        return low
    needed, more = tried[low].needed_bytes, tried[high].needed_bytes
    if not needed < room < more:
        return low
    return low + (room - needed) * (high - low) / (more - needed)


def _guess(tried: Mapping[int, Least], static_bytes: int, room: int, low: int, high: int) -> int:
    """Where to look next, strictly between `low` and `high` if anything is: where the line through the rooms that two
    sizes need reaches the room that there is.

    Near the end another plan than that of the line may be laid out better, so where the line leads no further it is
    left by strides, and behind many sizes for halves.
    """
    known = [0, *(size for size in sorted(tried) if size)]
    lower = [size for size in known if size <= low][-2:]
    first, second = (lower[-1], high) if high in tried else (lower[0], lower[-1])
    if first == second or (high in tried and len(known) > _LINES_HELP):
        return max(low + 1, min(high - 1, (low + high) // 2))
    needed, more = (tried[size].needed_bytes if size else static_bytes for size in (first, second))
    if more > needed:
        guess = int(first + (room - needed) * (second - first) / (more - needed))
    else:  # what does not grow with the size owns the peak of small ones
        guess = (low + high) // 2 if high in tried else low * 4
    if high not in tried:
        last = low - lower[0]
        stride = 2 * last if last <= low // _NEAR else 1 + low // _FIRST  # each twice the one before
        guess = min(max(guess, low + stride), low * _GROWTH)
    return min(max(guess, low + 1), max(high - 1, low + 1))


#: A stride is at most one part of a size in so many, and the first one part in so many.
_NEAR, _FIRST = 64, 256

#: Behind so many sizes halves are tried: layouts differ so much that lines do not help.
_LINES_HELP = 7
