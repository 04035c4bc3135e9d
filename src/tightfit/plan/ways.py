"""One way to plan a trace, with everything of its planning that does not depend on the budget.

A way says which step is planned (the recorded one, or what levers of the step make of it), whether kept values may wait
off the device, whether long units are cut into segments, and whether the units are nested. It is kept, so that the next
budget for the same trace costs less.

Invariant: what a way says of a set of choices is what the referee says (`plan.simulate`). Refused: choices with more in
host memory than may wait there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, overload

from tightfit.core import (
    Choice,
    Lever,
    Phase,
    Tiling,
    Timeline,
    Trace,
)
from tightfit.device.cost import NOMINAL_CPU, retimed
from tightfit.levers import allowed, as_recorded, every, granted, inexact
from tightfit.levers.interface import Grant, LeverDefinition, Variant
from tightfit.plan.choose import Model, Solution
from tightfit.plan.effort import THOROUGH, Effort
from tightfit.plan.exact import WholeStep
from tightfit.plan.nest import Nesting, Nestings
from tightfit.plan.polish import lowered
from tightfit.plan.segments import LENGTHS, LONG, Segmented, segmented
from tightfit.plan.simulate import simulate_choices

#: So many choices near the model's own answer are tried for the lowest peak, by walks over so many events in all.
_NEAR_TRIES = 8
_NEAR_EVENTS = 300_000


#: Segments are small and many, so each gets fewer points, and each choice across them fewer seconds.
_SEGMENT_POINTS = 40


_SEGMENTS_SECONDS = 2.5


#: The program over the whole step is not made for steps of more events than this.
_WHOLE_EVENTS = 60_000


#: It ends when nothing can be better by more than this part of the step's seconds, or of the lowest peak.
WHOLE_GAP = 2e-3


class Refereed(NamedTuple):
    """Choices, what the referee says of them, and how they were found."""

    choices: tuple[Choice, ...]
    line: Timeline
    how: frozenset[str]


class _Name(NamedTuple):
    """What tells the ways of a trace apart, but for nestings."""

    levers: frozenset[Lever]
    settings: tuple[tuple[str, str], ...]
    tiling: Tiling | None
    moves: bool
    segments: int  # how many there are


_OPTIMIZER = Phase.OPTIMIZER.value


class Way:
    """What planning a trace in one way needs, apart from the budget. Each part is made when it is first asked for.

    One thing because every part is made of others, and all are kept for the next budget.
    """

    def __init__(
        self,
        step: Variant,
        effort: Effort,
        *,
        nesting: Nesting | None = None,
        plain: Way | None = None,
        moves: bool = False,
        segments: Segmented | None = None,
    ) -> None:
        self.step, self.effort = step, effort
        self.trace = step.trace
        self.moves = moves  # may kept values wait off the device?
        self.segments = segments  # of `trace`, planned in its place
        self.nesting, self.plain = nesting, plain  # the same without the nesting
        self.advances = () if nesting is None else nesting.advances
        self._varied: dict[Lever, list[Way]] = {}

    @property
    def is_exact(self) -> bool:
        return not inexact(self.step.levers)

    def ways(self, levers: Collection[Lever] | None) -> list[Way]:
        """All ways to plan this step with the levers: as it is (first), and as each lever of the step would have it; in
        segments where units are long; and with values off the device where a lever allows that."""
        found = [self]
        for lever in allowed(levers):
            found += [varied for way in found for varied in way._by(lever)]
        moving = [way.moving for way in found if way.has_host_room] if Grant.MOVE in granted(levers) else []
        return [each for way in found for each in way.cut] + moving

    def _by(self, lever: LeverDefinition) -> list[Way]:
        if lever.lever not in self._varied:
            variants = lever.variants(self.step)
            # levers look at the limit themselves, so that they offer what is within it; nobody has to trust them
            found = [step for step in variants if step.host_room_bytes is None or step.host_room_bytes >= 0]
            self._varied[lever.lever] = [Way(step, self.effort) for step in found]
        return self._varied[lever.lever]

    @functools.cached_property
    def named(self) -> _Name:
        return self._named(self.step.levers)

    @functools.cached_property
    def in_one_step(self) -> _Name:
        """The way that is this one without the levers that ease the optimizer's step alone."""
        return self._named(self.step.levers - {each.lever for each in every() if each.eases_step_alone})

    def _named(self, levers: frozenset[Lever]) -> _Name:
        names = {lever.value for lever in levers}
        return _Name(
            levers=levers,
            settings=tuple(sorted((n, s) for n, s in self.step.decided.get("settings", {}).items() if n in names)),
            tiling=self.step.decided.get("tiling"),
            moves=self.moves,
            segments=0 if self.segments is None else len(self.segments.trace.units),
        )

    @property
    def static_bytes(self) -> int:
        """What is there when the step begins, whatever the units' choices."""
        return sum(self.trace.static_bytes.values())

    @functools.cached_property
    def optimizer_bytes(self) -> int:
        """The most that is there while the optimizer steps, whatever the units' choices: what they keep is gone by
        then."""
        line = simulate_choices(self.trace, ())
        own = (size for label, size in zip(line.labels, line.live_bytes, strict=True) if label.startswith(_OPTIMIZER))
        return max(own, default=0)

    @property
    def has_host_room(self) -> bool:
        """May more wait in host memory than what the step's levers have there?"""
        return self.step.host_room_bytes is None or self.step.host_room_bytes > 0

    def is_in_host(self, line: Timeline) -> bool:
        """Is there room in host memory for what waits there in `line`?"""
        room_bytes = self.step.host_room_bytes
        return room_bytes is None or line.offloaded_bytes <= room_bytes

    def holds(self, line: Timeline, budget_bytes: int) -> bool:
        """Is `line`, the referee's word on choices of this way, within the budget and within that of host memory?"""
        return line.peak_bytes <= budget_bytes and self.is_in_host(line)

    @functools.cached_property
    def moving(self) -> Way:
        """The same way, with kept values that may wait off the device."""
        return Way(self.step, self.effort, moves=True)

    @functools.cached_property
    def cut(self) -> tuple[Way, ...]:
        """The same way with units whole, and with long ones cut, once more finely and once less.

        Segments keep what they read of each other: in a layer whose loop reads one wide value all along, that value. So
        several long units are planned whole as well. A single one is not, because its own backward is the whole step's
        and holds all that it makes again.
        """
        cuts = [segments for length in LENGTHS if (segments := segmented(self.trace, length)) is not None]
        ways = tuple(Way(self.step, self.effort, segments=segments) for segments in cuts)
        return ways if any(len(segments.segments) == 1 for segments in cuts) else (self, *ways)

    @property
    def planned(self) -> Trace:
        """The trace that the model plans: the step's own, or the segmented one."""
        return self.trace if self.segments is None else self.segments.trace

    @functools.cached_property
    def model(self) -> Model:
        return self._model(self.planned)

    @functools.cached_property
    def lean_model(self) -> Model:
        """The model with more options for units whose own backward is the fullest moment. It proves no bound. Where
        there are no more options, it is the model itself."""
        return self._leaner(self.model, self.planned)

    def _leaner(self, model: Model, trace: Trace) -> Model:
        lean = self._model(trace, lean=True)
        return model if lean.options == model.options else lean

    def _model(self, trace: Trace, *, lean: bool = False) -> Model:
        effort = self.effort
        if self.segments is not None:
            effort = dataclasses.replace(
                effort,
                points=min(_SEGMENT_POINTS, effort.points),
                solver_seconds=min(_SEGMENTS_SECONDS, effort.solver_seconds),
            )
        room_bytes = self.step.host_room_bytes if self.moves else None
        return Model(trace, effort, self.nesting, offload=self.moves, lean=lean, host_room_bytes=room_bytes)

    def choices(self, points: Mapping[str, int], model: Model | None = None) -> tuple[Choice, ...]:
        """`points` of the model's units as choices for the units of the trace."""
        chosen = (model or self.model).choices(points)
        return chosen if self.segments is None else self.segments.joined(chosen)

    def refereed(self, points: Mapping[str, int], model: Model) -> tuple[tuple[Choice, ...], Timeline]:
        """The choices that `points` of the model's options stand for, and what the referee says of them."""
        choices = self.choices(points, model)
        return choices, simulate_choices(self.trace, choices, self.advances)

    @property
    def proves(self) -> bool:
        """Is there a bound? For segments there is none, because a unit may keep sets of values that no choice for its
        segments stands for. Where values may wait off the device there is none either."""
        return self.effort.proves and self.segments is None and not self.moves

    def bound_seconds(self, budget_bytes: int) -> float:
        """No choices for the units take fewer seconds within the budget. Zero where no bound is known."""
        return self.model.bound_seconds(budget_bytes) if self.proves else 0.0

    @functools.cached_property
    def fewest(self) -> tuple[Choice, ...]:
        """Every unit keeps as little as it can."""
        points = {path: len(options) - 1 for path, options in self.model.options.items()}
        return self.choices(points)

    @functools.cached_property
    def tightest(self) -> tuple[Choice, ...]:
        """Every unit keeps what leaves the lowest peak in its own backward."""
        model = self._lowest.model
        return self.choices(model.tightest(), model)

    @functools.cached_property
    def floor(self) -> Timeline:
        """The referee's word when each unit keeps the fewest bytes, or its `tightest` choice, whichever is lower. It
        shows what a nesting can reach, at the cost of two walks."""
        assert self.nesting is not None and self.plain is not None
        both = (
            simulate_choices(self.trace, tuple(self.nesting.on(choice) for choice in choices), self.advances)
            for choices in (self.plain.fewest, self.plain.tightest)
        )
        return min(both, key=lambda line: line.peak_bytes)

    @functools.cached_property
    def reach(self) -> Timeline:
        """`floor`, or the referee's word on the choices by which the deepest nesting has its lowest peak. Those take
        that search, and hold less where the best choices of units that are alike differ."""
        assert self.nesting is not None and self.plain is not None
        low = self.plain.nested[-1]._lowest
        choices = low.model.choices(low.points, self.nesting)
        return min(self.floor, simulate_choices(self.trace, choices, self.advances), key=lambda line: line.peak_bytes)

    @functools.cached_property
    def nested(self) -> Sequence[Way]:
        """The same way with fewer and fewer inputs kept. With little effort only some of these are tried."""
        # a sweep through earlier units would need weights that are gone
        return () if self.trace.resharded or self.segments is not None else _Nested(self)

    @functools.cached_property
    def lowest(self) -> Refereed:
        """The lowest peak that is found, and how it was found. What is said to be feasible must be feasible again on
        the next run.

        The frontiers' points depend on the ops' seconds, and so does the lowest peak among them. Measured seconds vary
        from run to run, so estimated ones are used here. A quick search has more options for the units in `leanest`
        alone.
        """
        return self._lowest.found

    @property
    def _lowest(self) -> _Low:
        return self._low if self.effort.proves else self._of_frontiers[0]

    @functools.cached_property
    def whole(self) -> WholeStep | None:
        """The program over the whole step. There is none where a choice may be what that program does not know, and
        none in a quick search or for a step that is too large."""
        if not self.proves or self.advances or len(self.trace.events) > _WHOLE_EVENTS:
            return None
        if any(len(program.steps) >= LONG for program in self.trace.programs.values()):
            return None
        return WholeStep(self.trace)

    @functools.cached_property
    def leanest(self) -> Refereed:
        """The same with more options for the units, where the fullest moment is in a unit's own backward."""
        return self._low.found

    @functools.cached_property
    def lowered(self) -> Refereed:
        """`leanest`, taken further down by the referee alone: it is asked about the choices of the lowest peaks, in the
        model's eyes, that differ from the model's answer in one unit or in all that are alike."""
        low = self._low
        if not self.effort.proves:
            return low.found
        tries = min(_NEAR_TRIES, 1 + _NEAR_EVENTS // len(self.trace.events))
        tried = (self._asked(low.model, points, low.found.how) for points in low.model.near(low.points, tries))
        found = min((low.found, *tried), key=self._height)
        if self.moves or self.advances:
            return found
        found = Refereed(*lowered(self.trace, found.choices, found.line, self.fewest), found.how)
        if self.whole is None:
            return found
        lower = self.whole.lowest(found.choices, WHOLE_GAP)
        if lower.choices is None or lower.line is None:
            return found
        return Refereed(lower.choices, lower.line, found.how | lower.how)

    @functools.cached_property
    def _low(self) -> _Low:
        """What `leanest` says, and of which model it is."""
        low, is_own_moment = self._of_frontiers
        if self.moves or not is_own_moment:
            return low
        model = self._leaner(low.model, self._nominal)
        if model is low.model:
            return low
        solution = model.solve(None)
        assert solution is not None
        return min(low, self._lowest_by(model, solution), key=lambda each: self._height(each.found)[1:])

    @functools.cached_property
    def _nominal(self) -> Trace:
        """What the model plans, with estimated seconds: itself where it has those. The ways of other tiles have their
        own."""
        if self.effort.is_estimated:
            return self.planned
        if self.plain is not None:
            return self.plain._nominal
        nominal = retimed(dataclasses.replace(self.planned, tiled=()), NOMINAL_CPU)
        are_same = all(one.seconds == other.seconds for one, other in zip(nominal.ops, self.planned.ops, strict=True))
        return self.planned if are_same else nominal

    @functools.cached_property
    def _of_frontiers(self) -> tuple[_Low, bool]:
        """The lowest peak by the points of the units' frontiers, and whether a unit's own backward is the fullest
        moment there."""
        model = self.model if self._nominal is self.planned else self._model(self._nominal)
        solution = model.solve(None)
        assert solution is not None
        return self._lowest_by(model, solution), model.is_own_moment(solution.points)

    def _lowest_by(self, model: Model, solution: Solution) -> _Low:
        """The choices of the lowest peak by `solution`, the model's own answer, or the least of everything: the model's
        lowest peak is not always the referee's."""
        fewest = {path: len(options) - 1 for path, options in model.options.items()}  # nothing of it in host memory
        tried = [self._asked(model, points, solution.how) for points in (solution.points, fewest)]
        return _Low(model, solution.points, min(tried, key=self._height))

    def _asked(self, model: Model, points: Mapping[str, int], how: frozenset[str]) -> Refereed:
        return Refereed(*self.refereed(points, model), how)

    def _height(self, found: Refereed) -> tuple[bool, int, float]:
        """What makes one of several choices the lowest: that it has room in host memory, its peak, then its seconds."""
        return not self.is_in_host(found.line), found.line.peak_bytes, found.line.recompute_seconds


class _Nested(Sequence[Way]):
    """The nestings of a way, each made when it is first asked for."""

    def __init__(self, plain: Way) -> None:
        self._plain, self._made = plain, dict[int, Way]()
        self._nestings = Nestings(plain.trace, few=not plain.effort.proves)

    def __len__(self) -> int:
        return len(self._nestings.slots)

    @overload
    def __getitem__(self, place: int) -> Way: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Way]: ...
    def __getitem__(self, place: int | slice) -> Way | Sequence[Way]:
        if isinstance(place, slice):
            return [self[each] for each in range(len(self))[place]]
        place = range(len(self))[place]
        if place not in self._made:
            plain, nesting = self._plain, self._nestings.of(self._nestings.slots[place])
            self._made[place] = Way(plain.step, plain.effort, nesting=nesting, plain=plain, moves=plain.moves)
        return self._made[place]


class _Low(NamedTuple):
    """A model, its own answer for the lowest peak, and what the referee says near it."""

    model: Model
    points: Mapping[str, int]
    found: Refereed


#: The latest ways, of one trace, by effort and host budget: a plan may be looked for with the limit and without.
_latest: dict[tuple[Effort, int | None], Way] = {}

_MOST_KEPT = 2


def way_of(trace: Trace, effort: Effort = THOROUGH, host_budget_bytes: int | None = None) -> Way:
    """The way to plan `trace`. It is kept for the next budget of the same trace."""
    key = effort, host_budget_bytes
    found = _latest.pop(key, None)
    if found is None or found.trace is not trace:
        if any(way.trace is not trace for way in _latest.values()):
            _latest.clear()
        found = Way(as_recorded(trace, host_budget_bytes), effort)
    _latest[key] = found  # the last is the latest
    while len(_latest) > _MOST_KEPT:
        del _latest[next(iter(_latest))]
    return found
