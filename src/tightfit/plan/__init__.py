"""Decide which values each unit keeps, so that the step fits its budget with the least recompute.

`plan.frontier` solves one unit exactly, `plan.choose` chooses one point per unit, `plan.simulate` referees. A
plan is returned only after the referee has found it under the budget.

Refused: budgets under the least feasible peak (`BudgetInfeasible`, with that peak and what would help).
No torch here: a trace read from JSON is enough.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping
from importlib import metadata

from tightfit.core import (
    BudgetInfeasible,
    Category,
    Choice,
    Phase,
    Plan,
    Program,
    Status,
    Timeline,
    Trace,
    format_bytes,
    make_verb,
    parse_bytes,
)
from tightfit.cost import NOMINAL_CPU, retimed
from tightfit.plan.choose import THOROUGH, Effort, Model, Solution
from tightfit.plan.lever import with_loss_in_place
from tightfit.plan.nest import Nesting, nestings
from tightfit.plan.program import shared
from tightfit.plan.simulate import simulate, simulate_choices

__all__ = ["Effort", "every_block", "lowest", "plan", "simulate"]

_REFEREE_ROUNDS = 12

# How long the lowest peak is looked for, in what does not depend on the machine: plans tried, events walked.
_FEWEST_TRIES = 8
_EVENTS_TO_TRY = 200_000


def plan(trace: Trace, budget: str | int, *, effort: Effort = THOROUGH) -> Plan:
    """The plan of least recompute whose simulated peak is within `budget`.

    `budget`: bytes, a size, or a percentage of the unplanned step's peak. Raises `InvalidInput` for a budget
    that is no size, `BudgetInfeasible` when nothing fits.
    """
    unplanned = simulate_choices(trace, ())
    budget_bytes = parse_bytes(budget, whole_bytes=unplanned.peak_bytes)
    planner = _planner(trace, effort)
    best = _best(trace, planner, budget_bytes, unplanned)
    if trace.losses and (best is None or best.recompute_seconds > 0):
        best = _faster(best, _best(trace, planner.in_place_loss, budget_bytes, unplanned))
    if best is None or _is_dear(trace, best):
        possible = [nested for nested in planner.frugal.nested if nested.floor.peak_bytes <= budget_bytes]
        for nested in possible[: _NESTINGS if effort.proves else 1]:
            best = _faster(best, _best(trace, nested, budget_bytes, unplanned))
    if best is not None:
        return best
    least = _least(planner)
    choices, line = least.lowest
    if line.peak_bytes <= budget_bytes:
        return _plan(trace, least, budget_bytes, choices, line, unplanned, 0.0)
    raise BudgetInfeasible(budget_bytes, line.peak_bytes, _advice(trace, line, budget_bytes))


def _faster(one: Plan | None, other: Plan | None) -> Plan | None:
    found = [plan for plan in (one, other) if plan is not None]
    return min(found, key=lambda plan: plan.recompute_seconds, default=None)


def _best(trace: Trace, planner: _Planner, budget_bytes: int, unplanned: Timeline) -> Plan | None:
    """The best plan by `planner`, that of `trace` or of what a lever makes of it; None: it finds none."""
    model = planner.model
    if planner.nesting is None:
        line = simulate_choices(planner.trace, ())
        if line.peak_bytes <= budget_bytes:
            nothing = Solution(points={u.path: 0 for u in trace.units}, seconds=0.0, bound_seconds=0.0)
            return _plan(trace, planner, budget_bytes, model.choices(nothing), line, unplanned, 0.0)
    target = budget_bytes
    for _ in range(_REFEREE_ROUNDS):
        solution = model.solve(target)
        if solution is None:
            break
        choices, line = planner.refereed(solution.points)
        if line.peak_bytes <= budget_bytes:
            return _plan(trace, planner, budget_bytes, choices, line, unplanned, solution.bound_seconds)
        # the model was too hopeful by this much; ask it for that much less
        target -= max(1, line.peak_bytes - budget_bytes)
    solution = model.solve(None)
    assert solution is not None
    choices, line = planner.refereed(solution.points)
    if line.peak_bytes > budget_bytes:
        choices, line = planner.lowest
    if line.peak_bytes <= budget_bytes:
        return _plan(trace, planner, budget_bytes, choices, line, unplanned, 0.0)
    return None


#: Nothing is swept for less than this part of the peak.
_WORTH = 0.999

#: Of the nestings that can fit, in the order of what they sweep, so many are planned with.
_NESTINGS = 3

#: Nested recompute runs units a second time, so it is looked at when a plan without it reruns this part of the forward.
_DEAR = 0.75


def _is_dear(trace: Trace, found: Plan) -> bool:
    forward = sum(op.seconds for op in trace.ops if op.phase is Phase.FORWARD and op.unit is not None)
    return found.recompute_seconds > _DEAR * forward


def lowest(trace: Trace, *, effort: Effort = THOROUGH) -> Plan:
    """The plan of the lowest peak. Its budget is its own peak."""
    least = _least(_planner(trace, effort))
    choices, line = least.lowest
    return _plan(trace, least, line.peak_bytes, choices, line, simulate_choices(trace, ()), 0.0)


def _least(planner: _Planner) -> _Planner:
    """`planner` with the levers by which the lowest peak is found."""
    best = min(planner, planner.frugal, key=lambda lever: lever.lowest[1].peak_bytes)
    nestings = planner.frugal.nested
    least = min((nested.floor.peak_bytes for nested in nestings), default=best.lowest[1].peak_bytes)
    if least >= best.lowest[1].peak_bytes * _WORTH:
        return best
    nested = next(each for each in nestings if each.floor.peak_bytes * _WORTH <= least)
    return min(best, nested, key=lambda lever: lever.lowest[1].peak_bytes)


def every_block(trace: Trace, *, effort: Effort = THOROUGH) -> Plan:
    """The book recipe as a plan: every unit keeps only its inputs. Its budget is its own peak."""
    unplanned = simulate_choices(trace, ())
    planner = _planner(trace, effort)
    line = simulate_choices(trace, planner.fewest)
    return _plan(trace, planner, line.peak_bytes, planner.fewest, line, unplanned, 0.0)


class _Planner:
    """What of a trace does not depend on the budget, made when first asked for."""

    def __init__(
        self,
        trace: Trace,
        effort: Effort,
        *,
        in_place_loss: bool = False,
        nesting: Nesting | None = None,
        plain: _Planner | None = None,
    ) -> None:
        self.trace, self.effort = trace, effort
        self.has_loss_in_place = in_place_loss
        self.nesting, self.plain = nesting, plain  # the same without the nesting
        self.advances = () if nesting is None else nesting.advances

    @functools.cached_property
    def model(self) -> Model:
        return Model(self.trace, self.effort, self.nesting)

    def refereed(self, points: Mapping[str, int]) -> tuple[tuple[Choice, ...], Timeline]:
        """The choice of one point for each unit, and what the referee says of it."""
        choices = self.model.choices(Solution(points=points, seconds=0.0, bound_seconds=0.0))
        return choices, simulate_choices(self.trace, choices, self.advances)

    @functools.cached_property
    def floor(self) -> Timeline:
        """With the fewest bytes kept in each unit; what a nesting can do, at the cost of one walk."""
        assert self.nesting is not None and self.plain is not None
        choices = tuple(self.nesting.on(choice) for choice in self.plain.fewest)
        return simulate_choices(self.trace, choices, self.advances)

    @functools.cached_property
    def fewest(self) -> tuple[Choice, ...]:
        """Every unit keeps as little as it can."""
        points = {path: len(options) - 1 for path, options in self.model.options.items()}
        return self.model.choices(Solution(points=points, seconds=0.0, bound_seconds=0.0))

    @functools.cached_property
    def nested(self) -> tuple[_Planner, ...]:
        """The same with fewer and fewer inputs kept."""
        return tuple(
            _Planner(self.trace, self.effort, in_place_loss=self.has_loss_in_place, nesting=nesting, plain=self)
            for nesting in nestings(self.trace)
        )

    @functools.cached_property
    def lowest(self) -> tuple[tuple[Choice, ...], Timeline]:
        """The lowest peak that is found, and how: what is said to be feasible must be so again on the next run.

        Measured seconds move the points of the frontiers and so the lowest peak among them; estimated ones do not. The
        model's lowest is not always the referee's, so the referee is asked about the units one step this way or that.
        """
        model = Model(retimed(self.trace, NOMINAL_CPU), self.effort, self.nesting)
        solution = model.solve(None)
        assert solution is not None
        tries = max(_FEWEST_TRIES, _EVENTS_TO_TRY // max(1, len(self.trace.events))) if self.effort.proves else 2
        seen: dict[tuple[int, ...], Timeline] = {}

        def line(points: Mapping[str, int]) -> Timeline:
            key = tuple(points[path] for path in model.options)
            if key not in seen:
                choices = model.choices(Solution(points=points, seconds=0.0, bound_seconds=0.0))
                seen[key] = simulate_choices(self.trace, choices, self.advances)
            return seen[key]

        fewest = {path: len(options) - 1 for path, options in model.options.items()}
        best = min((dict(solution.points), fewest), key=lambda points: line(points).peak_bytes)
        alike: dict[str, list[str]] = defaultdict(list)
        for unit in self.trace.units:
            alike[unit.digest].append(unit.path)
        groups = [paths for paths in alike.values() if len(model.options[paths[0]]) > 1]
        alone = [[path] for paths in groups if len(paths) > 1 for path in paths]
        for paths in (*groups, *alone):
            for index in range(len(model.options[paths[0]]) - 1, -1, -1):
                if len(seen) >= tries:
                    break
                changed = best | {path: index for path in paths if index < len(model.options[path])}
                best = min((best, changed), key=lambda points: line(points).peak_bytes)
        return model.choices(Solution(points=best, seconds=0.0, bound_seconds=0.0)), line(best)

    @property
    def frugal(self) -> _Planner:
        """With the levers that cost no recompute."""
        return self.in_place_loss if self.trace.losses else self

    @functools.cached_property
    def in_place_loss(self) -> _Planner:
        return _Planner(with_loss_in_place(self.trace), self.effort, in_place_loss=True)


_latest: _Planner | None = None


def _planner(trace: Trace, effort: Effort = THOROUGH) -> _Planner:
    """Kept for the next budget of the same trace."""
    global _latest  # noqa: PLW0603 - one entry of a cache
    if _latest is None or _latest.trace is not trace or _latest.effort != effort:
        _latest = _Planner(trace, effort)
    return _latest


def _plan(
    trace: Trace,
    planner: _Planner,
    budget_bytes: int,
    choices: tuple[Choice, ...],
    line: Timeline,
    unplanned: Timeline,
    bound: float,
) -> Plan:
    step_seconds = sum(op.seconds for op in trace.ops)
    proven = line.recompute_seconds <= bound * (1 + 1e-6) + 1e-12
    used = {choice.program for choice in choices if not choice.keeps_all}
    calls: dict[str, list[Program]] = {unit.path: [] for unit in trace.units}
    for frame in trace.frames:
        calls[frame.unit].append(trace.programs[frame.id])
    programs = {
        unit.digest: program
        for unit in trace.units
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
        | {"highspy": metadata.version("highspy")},
        programs=programs,
        in_place_loss=planner.has_loss_in_place,
        advances=planner.advances,
    )


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
