"""Decide which values each unit keeps, so that the step fits its budget with the least recompute.

`plan.frontier` solves one unit exactly, `plan.choose` chooses one point per unit, `plan.simulate` referees. A
plan is returned only after the referee has found it under the budget.

Refused: budgets under the least feasible peak (`BudgetInfeasible`, with that peak and what would help).
No torch here: a trace read from JSON is enough.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Collection, Mapping
from importlib import metadata
from typing import NamedTuple

from tightfit.core import (
    BudgetInfeasible,
    Category,
    Choice,
    InvalidInput,
    Lever,
    Phase,
    Plan,
    Program,
    Status,
    Tiling,
    Timeline,
    Trace,
    format_bytes,
    levers_named,
    make_verb,
    parse_bytes,
)
from tightfit.device.cost import NOMINAL_CPU, copy_lanes, retimed
from tightfit.plan.choose import THOROUGH, Effort, Model, Solution
from tightfit.plan.lever import with_loss_in_place
from tightfit.plan.nest import Nesting, nestings
from tightfit.plan.program import shared
from tightfit.plan.segments import LENGTHS, Segmented, segmented
from tightfit.plan.simulate import simulate, simulate_choices

__all__ = ["Effort", "every_block", "lowest", "plan", "simulate"]

_REFEREE_ROUNDS = 12

# How long the lowest peak is looked for, in what does not depend on the machine: plans tried, events walked.
_FEWEST_TRIES = 8
_EVENTS_TO_TRY = 200_000


def plan(
    trace: Trace,
    budget: str | int,
    *,
    effort: Effort = THOROUGH,
    levers: Collection[Lever | str] | str | None = None,
    exact: bool = False,
) -> Plan:
    """The plan of least recompute whose simulated peak is within `budget`.

    `budget`: bytes, a size, or a percentage of the unplanned step's peak. `levers`: those that the plan may use. By
    default all but `Lever.OFFLOAD`, which needs room elsewhere and has not been measured on a GPU; and tiles, which do
    not give the same bits, only where nothing exact fits (`Plan.exact` says so). A collection that names `Lever.TILE`
    has them compete on seconds. `exact=True` forbids them. Levers are given as `Lever`s or by their names.

    Raises `InvalidInput` for a budget that is no size, `BudgetInfeasible` when nothing fits.
    """
    levers = levers_named(levers)
    if exact and _allows(levers, Lever.TILE) and levers is not None:
        raise InvalidInput("exact=True forbids tiles, and levers names them: leave one of the two out")
    unplanned = simulate_choices(trace, ())
    budget_bytes = parse_bytes(budget, whole_bytes=unplanned.peak_bytes)
    every_way = _planner(trace, effort).ways(levers)
    least = unplanned
    for bits in (None,) if levers is not None else (True,) if exact else (True, False):
        ways = [way for way in every_way if bits in (None, way.exact)]
        if not ways:
            continue
        best: Plan | None = None
        for way in ways:
            if best is None or _cost(best) > way.extra_seconds:
                best = _cheaper(best, _best(trace, way, budget_bytes, unplanned, levers))
        for way in _nested(ways, best, budget_bytes, levers):
            best = _cheaper(best, _best(trace, way, budget_bytes, unplanned, levers))
        if best is not None:
            return best
        lowest_way, line = _lowest(ways, levers)
        if line.peak_bytes <= budget_bytes:
            return _plan(
                trace, lowest_way, budget_bytes, lowest_way.lowest.choices, line, unplanned, 0.0, lowest_way.lowest.how
            )
        least = min(least, line, key=lambda each: each.peak_bytes)
    advice = _advice(trace, least, budget_bytes)
    if exact and (tiled := [way for way in every_way if not way.exact]):
        peak_bytes = _lowest(tiled, None)[1].peak_bytes
        if peak_bytes <= budget_bytes:
            said = f"without exact=True tiles would take {format_bytes(peak_bytes)}, to rounding but not bit for bit"
            advice = (said, *advice)
    raise BudgetInfeasible(budget_bytes, least.peak_bytes, advice)


def _cost(made: Plan) -> float:
    """What the plan takes beyond the step itself."""
    return made.recompute_seconds + made.tile_seconds + made.offload_seconds


def _cheaper(one: Plan | None, other: Plan | None) -> Plan | None:
    return min((made for made in (one, other) if made is not None), key=_cost, default=None)


def _allows(levers: Collection[Lever] | None, lever: Lever) -> bool:
    return levers is None or lever in levers


def _best(
    trace: Trace, way: _Planner, budget_bytes: int, unplanned: Timeline, levers: Collection[Lever] | None
) -> Plan | None:
    """The best plan by `way`, that of `trace` or of what a lever makes of it; None: it finds none."""
    model = way.model
    if way.nesting is None:
        line = simulate_choices(way.trace, ())
        if line.peak_bytes <= budget_bytes:
            nothing = way.choices(dict.fromkeys(model.options, 0))
            return _plan(trace, way, budget_bytes, nothing, line, unplanned, 0.0)
    if not _allows(levers, Lever.RECOMPUTE):
        return None
    target = budget_bytes
    bound = 0.0
    for attempt in range(_REFEREE_ROUNDS):
        solution = model.solve(target, proves=attempt == 0)
        if solution is None:
            break
        bound = way.proven(solution) if attempt == 0 else bound  # of a lower target it would be too high
        choices, line = way.refereed(solution.points)
        if line.peak_bytes <= budget_bytes:
            found = _Found(choices, line, solution.how)
            choices, line, how = _unhurried(way, budget_bytes, target, found)
            return _plan(trace, way, budget_bytes, choices, line, unplanned, bound, how)
        # the model was too hopeful by this much; ask it for that much less
        target -= max(1, line.peak_bytes - budget_bytes)
    solution = model.solve(None)
    assert solution is not None
    choices, line = way.refereed(solution.points)
    found = _Found(choices, line, solution.how)
    target = model.peak_bytes(solution.points)
    if line.peak_bytes > budget_bytes:
        if way.lowest.line.peak_bytes > budget_bytes:
            return None
        found, target = way.lowest, budget_bytes
    choices, line, how = _unhurried(way, budget_bytes, target, found)
    return _plan(trace, way, budget_bytes, choices, line, unplanned, 0.0, how)


def _unhurried(way: _Planner, budget_bytes: int, target_bytes: int, found: _Found) -> _Found:
    """`found`, which the model gave for `target_bytes`, or what has fewer seconds where the model was too careful.

    Units that read one value in backward each count it as held for them. So the referee's peak may lie well below the
    model's, and then the model is asked for as much more.
    """
    too_high = None
    for _ in range(_CAREFUL_ROUNDS if way.effort.proves else 1):
        slack_bytes = budget_bytes - found.line.peak_bytes
        if slack_bytes <= _SLACK * budget_bytes or not found.line.recompute_seconds:
            break
        raised = target_bytes + slack_bytes if too_high is None else (target_bytes + too_high) // 2
        solution = way.model.solve(raised, proves=False)
        if solution is None:
            break
        choices, line = way.refereed(solution.points)
        if line.peak_bytes > budget_bytes:
            too_high = raised
            continue
        target_bytes = raised
        if line.recompute_seconds >= found.line.recompute_seconds:
            break
        found = _Found(choices, line, solution.how)
    return found


#: Nested recompute runs units a second time, so it is looked at when a plan without it reruns this part of the forward.
_DEAR = 0.75

#: Of the nestings that can fit, in the order of what they sweep, so many are planned with.
_NESTINGS = 3

#: Where a plan stays this part below its budget, others are looked for that come nearer, so many times.
_SLACK = 0.01
_CAREFUL_ROUNDS = 4

#: Segments are small and many: points of each, and seconds for each choice across them.
_SEGMENT_POINTS = 40
_SEGMENTS_SECONDS = 0.5

#: In a quick search every third number of slots is looked at.
_COARSE = 3

#: Nothing is swept for less than this part of the peak.
_WORTH = 0.999


def _nested(
    ways: list[_Planner], found: Plan | None, budget_bytes: int, levers: Collection[Lever] | None
) -> list[_Planner]:
    """The nestings worth planning with when `found` is the best plan without."""
    if not (ways and _allows(levers, Lever.NEST) and _allows(levers, Lever.RECOMPUTE)):
        return []
    frugal = ways[-1]
    forward = sum(op.seconds for op in frugal.trace.ops if op.phase is Phase.FORWARD and op.unit is not None)
    if found is not None and found.recompute_seconds <= _DEAR * forward:
        return []
    possible = (way for way in frugal.nested if way.floor.peak_bytes <= budget_bytes)
    return list(itertools.islice(possible, _NESTINGS if frugal.effort.proves else 1))


def lowest(trace: Trace, *, effort: Effort = THOROUGH, levers: Collection[Lever | str] | str | None = None) -> Plan:
    """The plan of the lowest peak by any of `levers` (by default all but offload). Its budget is its own peak."""
    levers = levers_named(levers)
    if not _allows(levers, Lever.RECOMPUTE):
        raise InvalidInput("the lowest peak is looked for by recompute: add Lever.RECOMPUTE to the levers")
    way, line = _lowest(_planner(trace, effort).ways(levers), levers)
    return _plan(
        trace, way, line.peak_bytes, way.lowest.choices, line, simulate_choices(trace, ()), 0.0, way.lowest.how
    )


def _lowest(ways: list[_Planner], levers: Collection[Lever] | None) -> tuple[_Planner, Timeline]:
    """By which of `ways`, or a nesting of it, the lowest peak is found."""
    if not _allows(levers, Lever.RECOMPUTE):
        lines = [(way, simulate_choices(way.trace, ())) for way in ways]
        return min(lines, key=lambda found: found[1].peak_bytes)
    best = min(ways, key=lambda way: way.lowest.line.peak_bytes)
    if _allows(levers, Lever.NEST):
        floors = [nested.floor.peak_bytes for nested in best.nested]
        if floors and min(floors) < best.lowest.line.peak_bytes * _WORTH:
            nested = next(way for way in best.nested if way.floor.peak_bytes * _WORTH <= min(floors))
            best = min(best, nested, key=lambda way: way.lowest.line.peak_bytes)
    return best, best.lowest.line


def every_block(trace: Trace, *, effort: Effort = THOROUGH) -> Plan:
    """The book recipe as a plan: every unit keeps only its inputs. Its budget is its own peak."""
    unplanned = simulate_choices(trace, ())
    planner = _planner(trace, effort)
    line = simulate_choices(trace, planner.fewest)
    return _plan(trace, planner, line.peak_bytes, planner.fewest, line, unplanned, 0.0)


class _Found(NamedTuple):
    """Choices, what the referee says of them, and by which ways they were found."""

    choices: tuple[Choice, ...]
    line: Timeline
    how: frozenset[str]


class _Planner:
    """What of a trace does not depend on the budget, made when first asked for."""

    def __init__(
        self,
        trace: Trace,
        effort: Effort,
        *,
        in_place_loss: bool = False,
        extra_seconds: float = 0.0,
        nesting: Nesting | None = None,
        plain: _Planner | None = None,
        offload: bool = False,
        segments: Segmented | None = None,
    ) -> None:
        self.offload = offload
        self.segments = segments  # of `trace`, planned in its place
        self.trace, self.effort = trace, effort
        self.in_place_loss = in_place_loss
        self.extra_seconds = extra_seconds  # what its tiles cost
        self.nesting, self.plain = nesting, plain  # the same without the nesting
        self.advances = () if nesting is None else nesting.advances

    @property
    def exact(self) -> bool:
        return self.trace.tiling is None

    def ways(self, levers: Collection[Lever] | None) -> list[_Planner]:
        """This trace's step as each of the allowed levers that are no unit's would have it, itself first."""
        found = [self]
        if self.trace.losses and _allows(levers, Lever.LOSS_IN_PLACE):
            found.append(self.with_loss_in_place)
        if _allows(levers, Lever.TILE):
            found += self.tiled
        moving = [way.with_offload for way in found] if levers is not None and Lever.OFFLOAD in levers else []
        return [each for way in found for each in way.in_segments or (way,)] + moving

    @functools.cached_property
    def with_offload(self) -> _Planner:
        return _Planner(
            self.trace, self.effort, in_place_loss=self.in_place_loss, extra_seconds=self.extra_seconds, offload=True
        )

    @functools.cached_property
    def in_segments(self) -> tuple[_Planner, ...]:
        """The same with long units cut, more and less finely; none where no unit is long."""
        return tuple(
            _Planner(
                self.trace, self.effort, in_place_loss=self.in_place_loss, extra_seconds=self.extra_seconds,
                segments=segments,
            )
            for length in LENGTHS
            if (segments := segmented(self.trace, length)) is not None
        )  # fmt: skip

    @property
    def planned(self) -> Trace:
        """The trace as the model sees it."""
        return self.trace if self.segments is None else self.segments.trace

    @functools.cached_property
    def model(self) -> Model:
        return self._model(self.planned)

    def _model(self, trace: Trace) -> Model:
        # of segments no bound is looked for: see `proven`
        effort = self.effort
        if self.segments is not None:
            effort = Effort(
                points=min(_SEGMENT_POINTS, effort.points),
                solver_seconds=min(_SEGMENTS_SECONDS, effort.solver_seconds),
                proves=False,
            )
        return Model(trace, effort, self.nesting, offload=self.offload)

    def choices(self, points: Mapping[str, int], model: Model | None = None) -> tuple[Choice, ...]:
        """`points` of the model's units as choices for the units of the trace."""
        chosen = (model or self.model).choices(points)
        return chosen if self.segments is None else self.segments.joined(chosen)

    def refereed(self, points: Mapping[str, int]) -> tuple[tuple[Choice, ...], Timeline]:
        """The choice of one point for each unit, and what the referee says of it."""
        choices = self.choices(points)
        return choices, simulate_choices(self.trace, choices, self.advances)

    def proven(self, solution: Solution) -> float:
        """The bound of `solution`. What holds for segments says nothing of kept sets that are no choice of theirs."""
        return solution.bound_seconds if self.segments is None else 0.0

    @functools.cached_property
    def fewest(self) -> tuple[Choice, ...]:
        """Every unit keeps as little as it can."""
        points = {path: len(options) - 1 for path, options in self.model.options.items()}
        return self.choices(points)

    @functools.cached_property
    def floor(self) -> Timeline:
        """With the fewest bytes kept in each unit; what a nesting can do, at the cost of one walk."""
        assert self.nesting is not None and self.plain is not None
        choices = tuple(self.nesting.on(choice) for choice in self.plain.fewest)
        return simulate_choices(self.trace, choices, self.advances)

    @functools.cached_property
    def nested(self) -> tuple[_Planner, ...]:
        """The same with fewer and fewer inputs kept; without much effort only some of them."""
        step = 1 if self.effort.proves else _COARSE
        if self.trace.resharded:  # a sweep through earlier units would need weights that are gone
            return ()
        if self.segments is not None:
            return ()
        return tuple(
            _Planner(
                self.trace, self.effort, in_place_loss=self.in_place_loss, extra_seconds=self.extra_seconds,
                nesting=nesting, plain=self, offload=self.offload,
            )
            for nesting in itertools.islice(nestings(self.trace), step - 1, None, step)
        )  # fmt: skip

    @functools.cached_property
    def lowest(self) -> _Found:
        """The lowest peak that is found, and how: what is said to be feasible must be so again on the next run.

        Measured seconds move the points of the frontiers and so the lowest peak among them; estimated ones do not. The
        model's lowest is not always the referee's, so the referee is asked about the units one step this way or that.
        """
        model = self._model(retimed(self.planned, NOMINAL_CPU))
        solution = model.solve(None)
        assert solution is not None
        tries = max(_FEWEST_TRIES, _EVENTS_TO_TRY // max(1, len(self.trace.events))) if self.effort.proves else 2
        seen: dict[tuple[int, ...], Timeline] = {}

        def line(points: Mapping[str, int]) -> Timeline:
            key = tuple(points[path] for path in model.options)
            if key not in seen:
                choices = self.choices(points, model)
                seen[key] = simulate_choices(self.trace, choices, self.advances)
            return seen[key]

        fewest = {path: len(options) - 1 for path, options in model.options.items()}
        best = min((dict(solution.points), fewest), key=lambda points: line(points).peak_bytes)
        alike: dict[str, list[str]] = defaultdict(list)
        for unit in self.planned.units:
            alike[unit.digest].append(unit.path)
        groups = [paths for paths in alike.values() if len(model.options[paths[0]]) > 1]
        alone = [[path] for paths in groups if len(paths) > 1 for path in paths]
        for paths in (*groups, *alone):
            for index in range(len(model.options[paths[0]]) - 1, -1, -1):
                if len(seen) >= tries:
                    break
                changed = best | {path: index for path in paths if index < len(model.options[path])}
                best = min((best, changed), key=lambda points: line(points).peak_bytes)
        return _Found(choices=self.choices(best, model), line=line(best), how=solution.how)

    @functools.cached_property
    def with_loss_in_place(self) -> _Planner:
        return _Planner(with_loss_in_place(self.trace), self.effort, in_place_loss=True)

    @functools.cached_property
    def tiled(self) -> list[_Planner]:
        def seconds(trace: Trace, tiling: Tiling) -> float:
            # where only the head is tiled the units' seconds are the same, but for noise
            return sum(op.seconds for op in trace.ops if op.unit is None or tiling.modules)

        return [
            _Planner(
                variant, self.effort, extra_seconds=max(0.0, seconds(variant, tiling) - seconds(self.trace, tiling))
            )
            for variant in self.trace.tiled
            if (tiling := variant.tiling) is not None
        ]


_latest: _Planner | None = None


def _planner(trace: Trace, effort: Effort = THOROUGH) -> _Planner:
    """Kept for the next budget of the same trace."""
    global _latest  # noqa: PLW0603 - one entry of a cache
    if _latest is None or _latest.trace is not trace or _latest.effort != effort:
        _latest = _Planner(trace, effort)
    return _latest


def _plan(
    trace: Trace,
    way: _Planner,
    budget_bytes: int,
    choices: tuple[Choice, ...],
    line: Timeline,
    unplanned: Timeline,
    bound: float,
    how: Collection[str] = (),
) -> Plan:
    """`way` with `choices`, as a plan of `trace`."""
    lever = way.trace
    out, back = copy_lanes(lever)
    offload_seconds = out.waiting_seconds(line.offloaded_bytes) + back.waiting_seconds(line.fetched_bytes)
    step_seconds = sum(op.seconds for op in trace.ops) + way.extra_seconds + offload_seconds
    proven = line.recompute_seconds + offload_seconds <= bound * (1 + 1e-6) + 1e-12
    used = {choice.program for choice in choices if not choice.keeps_all}
    calls: dict[str, list[Program]] = {unit.path: [] for unit in lever.units}
    for frame in lever.frames:
        calls[frame.unit].append(lever.programs[frame.id])
    programs = {
        unit.digest: program
        for unit in lever.units
        if unit.digest in used and (program := shared(calls[unit.path])) is not None
    }
    return Plan(
        budget_bytes=budget_bytes,
        choices=choices,
        status=Status.OPTIMAL if proven else Status.FEASIBLE,
        peak_bytes=line.peak_bytes,
        step_seconds=step_seconds + line.recompute_seconds,
        recompute_seconds=line.recompute_seconds,
        bound_seconds=min(bound, line.recompute_seconds),
        recompute_flops=line.recompute_flops,
        forward_flops=sum(op.flops for op in trace.ops if op.phase is Phase.FORWARD),
        unplanned_peak_bytes=unplanned.peak_bytes,
        replays=line.replays,
        trace_digest=trace.digest,
        versions={
            name: version
            for name, version in trace.environment.items()
            if name in ("tightfit", "torch", "transformers")
        }
        | _solver_version(),
        programs=programs,
        in_place_loss=way.in_place_loss,
        tiling=lever.tiling,
        tile_seconds=way.extra_seconds,
        advances=way.advances,
        offloaded_bytes=line.offloaded_bytes,
        offload_seconds=offload_seconds,
        solved_by=tuple(sorted(how)),
    )


def _solver_version() -> dict[str, str]:
    try:
        return {"highspy": metadata.version("highspy")}
    except metadata.PackageNotFoundError:  # plans are made without it, too
        return {}


def _advice(trace: Trace, line: Timeline, budget_bytes: int) -> tuple[str, ...]:
    """What would make it fit, each with its number. Activations and logits grow with the batch and the sequence."""
    fixed = sum(trace.static_bytes.values())
    at_peak = {c: rows[line.peak_event] for c, rows in line.by_category.items()}
    gradients = at_peak[Category.GRADIENTS.value] - trace.static_bytes.get(Category.GRADIENTS.value, 0)
    moving = line.peak_bytes - fixed - gradients
    said = []
    if budget_bytes <= fixed:
        said.append(f"parameters, optimizer state and inputs alone take {format_bytes(fixed)}")
    else:
        share = (budget_bytes - fixed - gradients) / max(1, moving)
        batch = max(trace.batch_sizes, default=1)
        if batch > 1 and share * batch >= 1:
            fewer = int(share * batch)
            needed = fixed + gradients + moving * fewer / batch
            said.append(f"a batch of {fewer} instead of {batch} would need about {format_bytes(needed)}")
        if share > 0.05:
            said.append(f"sequences of {share:.0%} of this length would fit, about")
    state = trace.static_bytes.get(Category.OPTIMIZER_STATE.value, 0)
    if state:
        said.append(f"an optimizer without state (sgd) would save {format_bytes(state)}")
    said.append(f"the peak is at: {line.peak_owner}")
    return tuple(said)


make_verb(__name__, plan)
