"""Will one step run, on each of many cards? The same question as `check`'s, with what cards have in common done once.

A trace depends on a card's attention kernel alone: workspaces are a constant beside it. So cards share traces, and with
them plans. A plan is made for a few of the memory sizes, and a card takes the one of least recompute that the caching
allocator lays out within its own room. Its seconds are those of the plan at the card's own rates.

Invariant: "fits" means that a plan, or the step without one, was laid out in that card's room, as for `check`; nothing
is interpolated. Bounds only ever say no: what any step holds at once, and what one op of attention holds alone.
Plans are made with little effort and for the rates of one card, so `check` may find a faster one. Where the least that
was found is only just too much, it may find one that fits. Refused: what `trace_setup` refuses.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

from tightfit.core import Category, Device, Lever, Phase, Plan, Timeline, Trace
from tightfit.core.recorded import Kind
from tightfit.device.cost import Work, retimed, work_of
from tightfit.forecast.advice import essence, floor, kept_whole, notes
from tightfit.forecast.recording import reached, trace_setup
from tightfit.forecast.room import usable_bytes
from tightfit.forecast.search import QUICK, fitted
from tightfit.forecast.setup import Progress, Setup
from tightfit.levers import exact_only, used
from tightfit.levers.tile import tile_seconds
from tightfit.plan import lowest, simulate
from tightfit.plan.account import has_caching_allocator, laid_out
from tightfit.plan.simulate import allocations
from tightfit.trace.fake import FakeStep

__all__ = ["CardAnswer", "How", "Survey", "Way", "survey"]


class How(enum.Enum):
    """What a way to run the step is."""

    PLAIN = "plain"  # as it is
    PLAN = "plan"  # bit for bit the same gradients
    TILES = "tiles"  # the same but for rounding
    FLOOR = "floor"  # no way: what does not depend on the batch
    ONE_OP = "one op"  # no way: that, and one op of a unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to run the step, or a bound on all of them."""

    how: How
    peak_bytes: int
    peak_owner: str
    by_category: Mapping[str, int]  # at the peak
    levers: tuple[str, ...] = ()
    essence: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CardAnswer:
    """The answer for one card. Where nothing fits, `way` is the leanest that was found, or the bound that says no."""

    card: str
    fits: bool
    way: int
    reserved_bytes: int  # by that way
    step_seconds: float | None  # estimated; none: it does not fit
    slowdown: float | None  # against the step as it is, on the same card


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """The answers for one model, method and length."""

    ways: tuple[Way, ...]
    answers: tuple[CardAnswer, ...]  # in the order of the cards asked about
    notes: tuple[str, ...]


#: Plans are made for so many memory sizes at most, beside the leanest.
_EXACT_RUNGS, _TILED_RUNGS = 2, 1

#: Within this many times the bound that says no, the leanest exact plan may well not fit, and tiles are needed.
_CLOSE = 2

_EXACT = exact_only(None)

_OWNERS = {
    How.FLOOR: "weights, gradients and the optimizer's state together",
    How.ONE_OP: "what lives throughout, and one op of a block with it,",
}


def survey(setup: Setup, cards: Sequence[Device], *, progress: Progress = lambda _: None) -> Survey:
    """Whether the step of `setup` runs on each of `cards`. Raises as `trace_setup` does."""
    setup.checked()
    groups: dict[object, list[Device]] = {}
    for card in cards:
        groups.setdefault(_kernels(card), []).append(card)
    ways: list[Way] = []
    found: dict[str, CardAnswer] = {}
    said: dict[str, None] = {}
    for members in groups.values():
        group = _Group(setup, members, progress)
        for answer in group.answers():
            found[answer.card] = dataclasses.replace(answer, way=answer.way + len(ways))
        ways += group.ways
        said |= dict.fromkeys(group.notes)
    of_cards = [set(notes(setup, card)) for card in cards]
    said |= dict.fromkeys(sorted(set.intersection(*of_cards)))  # the others are about a card, whatever the step
    return Survey(ways=tuple(ways), answers=tuple(found[card.name] for card in cards), notes=tuple(said))


def _kernels(card: Device) -> object:
    """What a trace depends on; the workspace is put in by `with_workspace`."""
    return card.is_host, FakeStep(card).flash, card.expandable_segments, card.calibration


def with_workspace(trace: Trace, size_bytes: int) -> Trace:
    """`trace` with kernels' workspaces of `size_bytes`."""
    return dataclasses.replace(
        trace,
        static_bytes={**trace.static_bytes, Category.WORKSPACE.value: size_bytes},
        tiled=tuple(with_workspace(variant, size_bytes) for variant in trace.tiled),
    )


def one_op_bytes(trace: Trace) -> int:
    """What every plan holds at some moment: what lives throughout, and one op of a unit's forward with what it reads
    and makes. A replay runs the op whole too; in tiles it is the variant's op."""
    size = [value.size_bytes if value.producer is not None else 0 for value in trace.values]
    largest = max(
        (
            sum(size[v] for v in {*op.inputs, *(v for v in op.outputs if v is not None)})
            for op in trace.ops
            if op.unit is not None and op.phase is Phase.FORWARD and op.kind is not Kind.VIEW
        ),
        default=0,
    )
    return min([sum(trace.static_bytes.values()) + largest, *map(one_op_bytes, trace.tiled)])


@dataclass
class _Run:
    """A way to run the step, as it is laid out."""

    index: int
    made: Plan | None
    trace: Trace
    peak_bytes: int  # with the trace's own workspace
    laid_out: dict[tuple[int, int | None], int | None] = field(default_factory=dict)  # by workspace and room

    def fits(self, room: int, workspace_bytes: int) -> bool:
        """Is it laid out in `room`, beside such a workspace?"""
        if self.peak(workspace_bytes) > room:
            return False
        reserved = self._reserved(workspace_bytes, None)
        assert reserved is not None
        # under a limit the allocator gives free segments back before it fails
        return reserved <= room or self._reserved(workspace_bytes, room) is not None

    def reserved(self, room: int, workspace_bytes: int) -> int:
        """What is reserved where it fits, else what would be on a card that is large enough."""
        reserved = self._reserved(workspace_bytes, None)
        assert reserved is not None
        if reserved > room >= self.peak(workspace_bytes):
            return self._reserved(workspace_bytes, room) or reserved
        return reserved

    def peak(self, workspace_bytes: int) -> int:
        return self.peak_bytes - self.trace.static_bytes.get(Category.WORKSPACE.value, 0) + workspace_bytes

    @functools.cached_property
    def _blocks(self) -> tuple[list[int], list[tuple[Hashable, int]]]:
        """What the allocator sees beside workspaces."""
        return allocations(with_workspace(self.trace, 0), self.made)

    def _reserved(self, workspace_bytes: int, room: int | None) -> int | None:
        if not has_caching_allocator(self.trace):
            return self.peak(workspace_bytes)
        if (workspace_bytes, room) not in self.laid_out:
            static, step = self._blocks
            half = workspace_bytes // 2  # as `allocations` has them
            static = [*static, *(size for size in (workspace_bytes - half, half) if size)]
            self.laid_out[workspace_bytes, room] = laid_out(self.trace, static, step, room)
        return self.laid_out[workspace_bytes, room]


class _Group:
    """Cards whose kernels are the same."""

    def __init__(self, setup: Setup, cards: Sequence[Device], progress: Progress) -> None:
        self.setup, self.cards, self.progress = setup, cards, progress
        self.rooms = {card.name: usable_bytes(card) for card in cards}
        self.workspaces = {card.name: FakeStep(card).workspace_bytes for card in cards}
        self.workspace_bytes = self.workspaces[cards[0].name]  # of the traces that plans are made for
        self.ways: list[Way] = []
        self.notes: list[str] = []

    def answers(self) -> Iterable[CardAnswer]:
        floor_bytes = floor(self.setup, self.cards[0])
        if floor_bytes > max(self.rooms.values()):
            return self._all_no(How.FLOOR, floor_bytes)
        self.progress("tracing")
        recorded = trace_setup(self.setup, self.cards[0])
        self.notes += [*recorded.notes, *kept_whole(recorded)]
        plain = self._run(recorded, None)
        runs = [plain]
        left = self._unfit(self.cards, runs)
        bound = max(floor_bytes, one_op_bytes(recorded) if left else 0)
        possible = [card for card in left if self._room(card) >= bound]
        # tiles are recorded at once where they are likely to be needed, so that one trace serves both searches
        likely = bool(possible) and min(map(self._room, possible)) < _CLOSE * bound
        if possible and not likely:
            runs += self._planned(recorded, possible, _EXACT, _EXACT_RUNGS)
            possible = [card for card in self._unfit(possible, runs) if self._room(card) >= bound]
        if possible:
            self.progress("tracing in tiles")
            recorded = trace_setup(self.setup, self.cards[0], tiles=True)
            bound = max(floor_bytes, one_op_bytes(recorded))
            if likely:
                runs += self._planned(recorded, possible, _EXACT, _EXACT_RUNGS)
            possible = [card for card in self._unfit(possible, runs) if self._room(card) >= bound]
            if possible and recorded.tiled:
                runs += self._planned(recorded, possible, None, _TILED_RUNGS)
        return self._answers(runs, floor_bytes, bound)

    def _planned(
        self, recorded: Trace, cards: Sequence[Device], levers: frozenset[Lever] | None, rungs: int
    ) -> list[_Run]:
        """Plans for some of the cards' rooms, from the least recompute on; the leanest comes last."""
        timed = retimed(recorded, reached(cards[len(cards) // 2]))
        self.progress(
            "planning for the lowest peak" if levers is not None else "planning for the lowest peak, in tiles"
        )
        leanest = self._run(timed, lowest(timed, effort=QUICK, levers=levers))
        rooms = sorted({self._room(card) for card in cards if leanest.peak_bytes <= self._room(card)}, reverse=True)
        chosen = {rooms[i * len(rooms) // rungs] for i in range(rungs)} if rooms else set()
        found: list[_Run] = []
        for room in sorted(chosen, reverse=True):
            self.progress(f"planning for {room / 2**30:.1f} GiB")
            made = fitted(timed, room, QUICK, levers)
            if made is not None:
                found.append(self._run(timed, made))
        for card in self._unfit(cards, [*found, leanest]):  # within the allocator's slack another plan may be laid out
            if leanest.peak_bytes <= self._room(card) and self._room(card) not in chosen:
                made = fitted(timed, self._room(card), QUICK, levers)
                if made is not None:
                    found.append(self._run(timed, made))
        return [*sorted(found, key=lambda run: -run.peak_bytes), leanest]

    def _room(self, card: Device) -> int:
        """What `card` leaves beside a workspace like the first card's."""
        return self.rooms[card.name] - self.workspaces[card.name] + self.workspace_bytes

    def _unfit(self, cards: Iterable[Device], runs: Sequence[_Run]) -> list[Device]:
        return [card for card in cards if not any(self._fits(run, card) for run in runs)]

    def _fits(self, run: _Run, card: Device) -> bool:
        return run.fits(self.rooms[card.name], self.workspaces[card.name])

    def _reserved(self, run: _Run, card: Device) -> int:
        return run.reserved(self.rooms[card.name], self.workspaces[card.name])

    # -- ways

    def _run(self, trace: Trace, made: Plan | None) -> _Run:
        line = simulate(trace, made)
        how = How.PLAIN if made is None else How.PLAN if made.exact else How.TILES
        self.ways.append(
            Way(
                how=how, peak_bytes=line.peak_bytes, peak_owner=line.peak_owner, by_category=_at_peak(line),
                levers=() if made is None else tuple(each.lever.value for each in used(made)),
                essence=() if made is None else tuple(essence(trace, made)),
            )
        )  # fmt: skip
        return _Run(len(self.ways) - 1, made, trace, line.peak_bytes)

    def _bound(self, how: How, size_bytes: int, owner: str) -> int:
        self.ways.append(Way(how=how, peak_bytes=size_bytes, peak_owner=owner, by_category={}))
        return len(self.ways) - 1

    # -- answers

    def _all_no(self, how: How, size_bytes: int) -> Iterable[CardAnswer]:
        index = self._bound(how, size_bytes, _OWNERS[how])
        for card in self.cards:
            yield _answer_no(card, index, size_bytes)

    def _answers(self, runs: Sequence[_Run], floor_bytes: int, bound: int) -> Iterable[CardAnswer]:
        by: dict[int, list[Device]] = {}  # cards that run the step, by the first of `runs` that fits
        no: dict[How, int] = {}
        for card in self.cards:
            turn = next((turn for turn, run in enumerate(runs) if self._fits(run, card)), None)
            if turn is not None:
                by.setdefault(turn, []).append(card)
            elif self._room(card) < bound:
                how, size = (How.FLOOR, floor_bytes) if self.rooms[card.name] < floor_bytes else (How.ONE_OP, bound)
                if how not in no:
                    no[how] = self._bound(how, size, _OWNERS[how])
                yield _answer_no(card, no[how], size)
            else:
                leanest = min(runs, key=lambda run: run.peak_bytes)
                yield _answer_no(card, leanest.index, self._reserved(leanest, card))
        for turn, cards in by.items():
            run = runs[turn]
            seconds = step_seconds(run.trace, run.made, cards)
            plain = seconds if run.made is None else step_seconds(run.trace, None, cards)
            for card, taken, base in zip(cards, seconds, plain, strict=True):
                yield CardAnswer(
                    card=card.name, fits=True, way=run.index, reserved_bytes=self._reserved(run, card),
                    step_seconds=taken, slowdown=taken / base,
                )  # fmt: skip


def _answer_no(card: Device, way: int, reserved_bytes: int) -> CardAnswer:
    return CardAnswer(
        card=card.name, fits=False, way=way, reserved_bytes=reserved_bytes, step_seconds=None, slowdown=None
    )


def _at_peak(line: Timeline) -> dict[str, int]:
    at_peak = {category: rows[line.peak_event] for category, rows in line.by_category.items()}
    return {category: size for category, size in at_peak.items() if size}


def step_seconds(trace: Trace, made: Plan | None, cards: Sequence[Device]) -> list[float]:
    """The seconds of the step, by card, at the rates that each reaches, whatever rates the plan was made for.

    What a plan costs beside recompute and tiles (the optimizer in chunks) stays as at the rates it was made for.
    """
    timed = _timed_for(trace, [reached(card) for card in cards])
    seconds: Any = sum((op.seconds for op in timed.ops), numpy.zeros(len(cards)))
    if made is not None:
        seconds = seconds + simulate(timed, made).recompute_seconds + made.offload_seconds + made.other_seconds
        if made.tiling is not None:
            tiled = next((each for each in timed.tiled if each.tiling == made.tiling), None)
            more: Any = made.tile_seconds if tiled is None else tile_seconds(timed, tiled)
            seconds = seconds + more
    return [float(each) for each in seconds]


class _OnEach(numpy.ndarray[Any, Any]):
    """Seconds on each card. The referee only ever adds them up, and puts their op into sets."""

    def __hash__(self) -> int:  # type: ignore[override]  # numpy's is None
        return id(self)


def _timed_for(trace: Trace, cards: Sequence[Device]) -> Trace:
    """`trace` with the seconds of every op on each of `cards` at once."""
    known: dict[Any, Any] = {None: numpy.zeros(len(cards)).view(_OnEach)}

    def seconds(work: Work | None) -> Any:
        if work is not None and work not in known:
            known[work] = numpy.array([work.seconds(card) for card in cards]).view(_OnEach)
        return known[work]

    return dataclasses.replace(
        trace,
        ops=tuple(
            dataclasses.replace(op, seconds=seconds(work)) for op, work in zip(trace.ops, work_of(trace), strict=True)
        ),
        tiled=tuple(_timed_for(variant, cards) for variant in trace.tiled),
    )
