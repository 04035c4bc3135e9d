"""The verbs of planning: `plan` for a budget, `lowest` for the lowest peak, `every_block` for the book recipe.

`plan.ways` lists the ways to plan a trace. In each way `plan.frontier` solves every unit exactly, `plan.choose` chooses
one point for each unit, and `plan.simulate` referees. The best plan of all ways is returned.

Invariant: a plan is returned only after the referee has found it under the budget, and its levers no more in host
memory than may wait there.
Refused: a budget below the least feasible peak (`BudgetInfeasible`, which says that peak and what would lower it).
No torch here: a trace that was read from JSON is enough.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from importlib import metadata

from tightfit.core import (
    BudgetInfeasible,
    Choice,
    InvalidInput,
    Lever,
    Phase,
    Plan,
    Program,
    Status,
    Timeline,
    Trace,
    format_bytes,
    levers_named,
    parse_bytes,
    parse_host_budget,
)
from tightfit.device.cost import copy_lanes, fresh_seconds, unplanned_seconds
from tightfit.levers import allowed, every, granted, inexact, ruled_out, used
from tightfit.levers.interface import Grant, LeverDefinition, Variant
from tightfit.plan.account import host_bytes
from tightfit.plan.advice import advice_for
from tightfit.plan.choose import Model
from tightfit.plan.effort import THOROUGH, Effort
from tightfit.plan.fewest_more import Enough, fewest_more
from tightfit.plan.indexed import without_collecting
from tightfit.plan.nest import cheapest
from tightfit.plan.polish import polished
from tightfit.plan.program import shared
from tightfit.plan.simulate import simulate, simulate_choices
from tightfit.plan.ways import WHOLE_GAP, Refereed, Way, way_of

_REFEREE_ROUNDS = 12

#: How often the bytes are halved between a host budget that is too small and one that is known to be enough.
_HALVINGS = 2

#: For what is only said, and never put in force.
_GLANCE = Effort(points=12, solver_seconds=0.3, proves=False)


@without_collecting()
def plan(
    trace: Trace,
    budget: str | int,
    *,
    effort: Effort = THOROUGH,
    levers: Collection[Lever | str] | str | None = None,
    exact: bool = False,
    beside: Collection[Lever | str] | str = (),
    host_budget: str | int | None = None,
) -> Plan:
    """The plan of least recompute whose simulated peak is within `budget`.

    `budget` is a number of bytes, a size such as `"22GiB"`, or a percentage of the unplanned step's peak. `levers` are
    those that the plan may use, as `Lever`s or by their names. By default a plan may use every lever but
    `Lever.OFFLOAD`, which needs room elsewhere and has not been measured on a GPU, and `Lever.STEP_IN_BACKWARD`, which
    not every training loop allows; `beside` names such levers to use with the default ones. By default it uses tiles
    only where nothing exact fits, because tiles do not give the same bits (`Plan.exact` says so). If `levers` names
    `Lever.TILE`, tiles compete with the other levers on seconds. `exact=True` forbids them.

    `host_budget`: the most bytes that the plan may have wait in host memory, by all its levers together: a size, or 0.
    Without it there is no limit. Which levers may move anything there is for `levers` and `beside` to say.

    A lever that was named and that no plan for this step can use is told among the advice of `BudgetInfeasible`. Where
    there is a plan, `tightfit.levers.ruled_out` says so.

    Raises `InvalidInput` for a budget that is no size, `BudgetInfeasible` when nothing fits.
    """
    host_budget_bytes = parse_host_budget(host_budget)
    levers, others = levers_named(levers), levers_named(beside) or frozenset()
    asked = levers, others
    if levers is not None and others:
        raise InvalidInput("levers names all that a plan may use, and beside some more: give one of the two")
    chosen = levers is not None
    if others:
        levers = frozenset(each.lever for each in allowed(None)) | others
    if exact and levers is not None and chosen and (forbidden := inexact(levers)):
        raise InvalidInput(f"exact=True forbids {forbidden[0].noun}, and levers names them: leave one of the two out")
    unplanned = simulate_choices(trace, ())
    budget_bytes = parse_bytes(budget, whole_bytes=unplanned.peak_bytes)
    kinds = (None,) if chosen else (True,) if exact else (True, False)
    search = _Search(trace, budget_bytes, effort, levers, kinds, host_budget_bytes, unplanned)
    if search.made is not None:
        return search.made
    least, advice = search.least, (*ruled_out(trace, *asked), *advice_for(trace, search.least, budget_bytes))
    if search.least_way is not None and not chosen:
        enough = fewest_more(search.ways, search.least_way, levers, lambda _, line: line.peak_bytes <= budget_bytes)
        advice = (*([] if enough is None else [enough.said]), *advice)
    if exact and (inexact_ways := [way for way in search.ways if not way.is_exact]):
        peak_bytes = _lowest(inexact_ways, None)[1].line.peak_bytes
        if peak_bytes <= budget_bytes:
            nouns = " and ".join(each.noun for each in inexact(None))
            said = f"without exact=True {nouns} would take {format_bytes(peak_bytes)}, to rounding but not bit for bit"
            advice = (said, *advice)
    if host_budget_bytes is None:
        raise BudgetInfeasible(budget_bytes, least.peak_bytes, advice)
    enough_bytes = search.enough_bytes
    if enough_bytes is not None:
        small_bytes = host_budget_bytes
        for _ in range(_HALVINGS):
            middle_bytes = (small_bytes + enough_bytes) // 2
            ways = way_of(trace, _GLANCE, middle_bytes).ways(levers)
            if _searched(trace, budget_bytes, ways, kinds, unplanned, levers)[0] is None:
                small_bytes = middle_bytes
            else:
                enough_bytes = middle_bytes
    elif search.without.peak_bytes < least.peak_bytes:
        limit, lower = format_bytes(host_budget_bytes), format_bytes(search.without.peak_bytes)
        advice = (f"without the host budget of {limit} it would be {lower}, which is too much as well", *advice)
    raise BudgetInfeasible(
        budget_bytes, least.peak_bytes, advice, host_budget_bytes=host_budget_bytes, host_bytes=enough_bytes
    )


@without_collecting()
def feasible(
    trace: Trace,
    budget_bytes: int,
    *,
    effort: Effort,
    levers: frozenset[Lever] | None = None,
    kinds: Collection[bool | None] = (True, False),
    host_budget_bytes: int | None = None,
) -> Plan | None:
    """The plan that `plan` makes, or None where nothing fits. What would make it fit takes as long to find as a plan,
    so a caller who asks about many steps asks this.

    `kinds`: where no levers are named, whether plans of the same bits (True) or of others (False) are looked for, in
    this order.
    """
    wanted = kinds if levers is None else (None,)
    return _Search(trace, budget_bytes, effort, levers, wanted, host_budget_bytes, simulate_choices(trace, ())).made


class _Search:
    """The best plan within a budget, or what is known where there is none."""

    def __init__(
        self,
        trace: Trace,
        budget_bytes: int,
        effort: Effort,
        levers: Collection[Lever] | None,
        kinds: Collection[bool | None],
        host_budget_bytes: int | None,
        unplanned: Timeline,
    ) -> None:
        self.ways = way_of(trace, effort).ways(levers)
        made, self.least, self.least_way = _searched(trace, budget_bytes, self.ways, kinds, unplanned, levers)
        #: Of the lowest peak, and in host memory by a plan that fits (none: no plan does), without a host budget.
        self.without, self.enough_bytes = self.least, None if made is None else sum(host_bytes(trace, made).values())
        if host_budget_bytes is not None and (self.enough_bytes is None or self.enough_bytes > host_budget_bytes):
            self.ways = way_of(trace, effort, host_budget_bytes).ways(levers)
            made, self.least, self.least_way = _searched(trace, budget_bytes, self.ways, kinds, unplanned, levers)
        if made is not None:  # a limit that is not reached changes nothing
            made = dataclasses.replace(made, host_budget_bytes=host_budget_bytes)
        self.made = made


def _searched(
    trace: Trace,
    budget_bytes: int,
    every_way: Collection[Way],
    kinds: Collection[bool | None],
    unplanned: Timeline,
    levers: Collection[Lever] | None,
) -> tuple[Plan | None, Timeline, Way | None]:
    """The best plan of the first of `kinds` that has one (exact, inexact, None: both), the lowest peak otherwise, and
    the way that leads there."""
    least, least_way = unplanned, None
    for bits in kinds:
        alike = [way for way in every_way if bits in (None, way.is_exact)]
        if not alike:
            continue
        ways = _that_matter(alike, lambda plain: plain.optimizer_bytes > budget_bytes)
        best: Plan | None = None
        at_first = math.inf
        for way in ways:
            if best is None or best.added_seconds > way.step.seconds - way.step.eases_seconds:
                made, found_seconds = _best(trace, way, budget_bytes, unplanned, levers, at_first)
                best, at_first = _cheaper(best, made), min(at_first, found_seconds)
        if (nested := _nested(ways, best, budget_bytes, levers)) is not None:
            best = _cheaper(best, _best(trace, nested, budget_bytes, unplanned, levers)[0])
        if best is not None:
            return best, least, least_way
        lowest_way, found = _lowest(alike, levers)
        line = found.line
        if lowest_way.holds(line, budget_bytes):
            found = _polished(lowest_way, found, budget_bytes, 0.0)
            bound = lowest_way.bound_seconds(budget_bytes)
            made = _plan(trace, lowest_way, budget_bytes, found.choices, found.line, unplanned, bound, found.how)
            if (kept := _in_host(trace, _eased(trace, made))) is not None:
                return kept, least, least_way
        elif line.peak_bytes < least.peak_bytes and lowest_way.is_in_host(line):
            least, least_way = line, lowest_way
    return None, least, least_way


def _that_matter(ways: Sequence[Way], is_full: Callable[[Way], bool]) -> list[Way]:
    """Those of `ways` that reach what no other does. A lever that eases the optimizer's step alone does nothing for a
    plan unless that step is the fullest moment without it (`is_full`)."""
    named = {way.named: way for way in ways}
    return [way for way in ways if (plain := named.get(way.in_one_step, way)) is way or is_full(plain)]


def _in_host(trace: Trace, made: Plan) -> Plan | None:
    """`made`, if no more waits in host memory than may; None otherwise."""
    limit_bytes = made.host_budget_bytes
    return made if limit_bytes is None or sum(host_bytes(trace, made).values()) <= limit_bytes else None


def _cheaper(one: Plan | None, other: Plan | None) -> Plan | None:
    return min((made for made in (one, other) if made is not None), key=lambda made: made.added_seconds, default=None)


def _again_seconds(trace: Trace, levers: Collection[LeverDefinition], seconds: float) -> float:
    """What of `seconds` of replays and waiting in one backward is spent once more by `levers`."""
    return sum((each.again_seconds(trace, seconds) for each in levers), 0.0)


def _eased(trace: Trace, made: Plan) -> Plan:
    """`made` with as little of each lever as the budget has room for, or with copies ahead and as little as it then has
    room for, whichever adds fewer seconds."""
    plain, ahead = _with_less(trace, made), _with_copies_ahead(trace, made)
    return plain if ahead is made else min(plain, _with_less(trace, ahead), key=lambda plan: plan.added_seconds)


def _with_copies_ahead(trace: Trace, made: Plan) -> Plan:
    """`made` with the copies of each lever begun before they are needed, where copies run beside the compute and the
    budget has room for what then is there at once."""
    for lever in every() if trace.copies_beside else ():
        ahead = lever.ahead(trace, made)
        if ahead is not made and (line := simulate(trace, ahead)).peak_bytes <= made.budget_bytes:
            made = _told_anew(trace, ahead, line)
    return made


def _with_less(trace: Trace, made: Plan) -> Plan:
    for lever in every():
        eased = lever.eased(trace, made, lambda plan: simulate(trace, plan).peak_bytes)
        if eased is not made:
            made = _told_anew(trace, eased, simulate(trace, eased))
    return made


def _told_anew(trace: Trace, changed: Plan, line: Timeline) -> Plan:
    """`changed`, of which the referee says `line`, with what follows from that."""
    less_fresh = fresh_seconds(trace, changed.unplanned_peak_bytes, line.peak_bytes)
    more_replays = line.recompute_seconds - changed.recompute_seconds
    more_again = _again_seconds(trace, used(changed), more_replays)
    return dataclasses.replace(
        changed,
        peak_bytes=line.peak_bytes,
        step_seconds=changed.step_seconds + more_replays + more_again + (less_fresh - changed.fresh_seconds),
        other_seconds=max(0.0, changed.other_seconds + more_again),
        recompute_seconds=line.recompute_seconds,
        fresh_seconds=less_fresh,
        bound_seconds=min(changed.bound_seconds, line.recompute_seconds),
    )


def _best(
    trace: Trace,
    way: Way,
    budget_bytes: int,
    unplanned: Timeline,
    levers: Collection[Lever] | None,
    elsewhere_seconds: float = math.inf,
) -> tuple[Plan | None, float]:
    """The best plan for `trace` by `way`, whose step is the trace's own or a variant of it, and the seconds that
    the choice across the units alone reruns. None, and infinite seconds: this way finds no plan.

    `elsewhere_seconds` is what that choice found in another way, in which more was looked for. Where it finds no less
    here, this way leaves the units no more room, and looking for more would find the same once again.
    """
    if way.static_bytes > budget_bytes:
        return None, math.inf
    model = way.model
    if way.nesting is None:
        line = simulate_choices(way.trace, ())
        if line.peak_bytes <= budget_bytes:
            nothing = way.choices(dict.fromkeys(model.options, 0))
            made = _plan(trace, way, budget_bytes, nothing, line, unplanned, 0.0)
            return _in_host(trace, _eased(trace, made)), 0.0
    if Grant.DROP not in granted(levers):
        return None, math.inf
    if way.proves and model.is_ruled_out(budget_bytes):
        return None, math.inf
    found = _fitting(way, model, budget_bytes)
    at_first = math.inf if found is None else found.line.recompute_seconds
    is_settled = found is not None and at_first >= elsewhere_seconds * (1 - _SAME)
    bound, near = 0.0, math.inf if is_settled else _NEAR * sum(op.seconds for op in trace.ops)
    # of a nesting nothing would be claimed by the bound
    if way.proves and way.nesting is None and (found is None or found.line.recompute_seconds > 0):
        bound = way.bound_seconds(budget_bytes)

    def is_far() -> bool:
        return way.proves and (found is None or found.line.recompute_seconds - bound > near)

    if found is None and way.whole is not None:  # it would be asked for what there hardly is, and takes longest then
        found = way.lowered
        if not way.holds(found.line, budget_bytes):
            return None, math.inf
    if is_far():
        found, bound = _whole(way, found, budget_bytes, bound)
    if is_far() and way.lean_model is not model:
        both = (found, _fitting(way, way.lean_model, budget_bytes))
        found = min((each for each in both if each), key=lambda each: each.line.recompute_seconds, default=None)
    if found is None:
        if not way.holds(way.lowest.line, budget_bytes):
            return None, math.inf
        found = _unhurried(way, model, budget_bytes, budget_bytes, way.lowest)
    found = _polished(way, found, budget_bytes, bound + near)
    made = _plan(trace, way, budget_bytes, found.choices, found.line, unplanned, bound, found.how)
    return _in_host(trace, _eased(trace, made)), at_first


def _whole(way: Way, found: Refereed | None, budget_bytes: int, bound: float) -> tuple[Refereed | None, float]:
    """`found` and its `bound`, or better ones by the program over the whole step."""
    if way.whole is None or found is None:
        return found, bound
    better = way.whole.cheapest(found.choices, budget_bytes, WHOLE_GAP)
    if better.choices is not None and better.line is not None:
        found = Refereed(better.choices, better.line, found.how | better.how)
    return found, max(bound, better.bound)


def _polished(way: Way, found: Refereed, budget_bytes: int, near_seconds: float) -> Refereed:
    """`found`, or choices near it that take fewer seconds, where it takes more than `near_seconds`."""
    if not way.effort.proves or found.line.recompute_seconds <= near_seconds:
        return found
    return Refereed(*polished(way.trace, found.choices, found.line, budget_bytes, way.advances), found.how)


def _fitting(way: Way, model: Model, budget_bytes: int) -> Refereed | None:
    """The cheapest of the model's choices that the referee finds within the budget; None: there are none."""
    target = budget_bytes
    for _ in range(_REFEREE_ROUNDS):
        solution = model.solve(target)
        if solution is None:
            break
        choices, line = way.refereed(solution.points, model)
        if way.holds(line, budget_bytes):
            return _unhurried(way, model, budget_bytes, target, Refereed(choices, line, solution.how))
        # the model's peak was too low by this many bytes: ask it for as many less, and not for these options again
        target = min(target - (line.peak_bytes - budget_bytes), model.peak_bytes(solution.points) - 1)
    solution = model.solve(None)
    assert solution is not None
    choices, line = way.refereed(solution.points, model)
    if not way.holds(line, budget_bytes):
        return None
    found = Refereed(choices, line, solution.how)
    return _unhurried(way, model, budget_bytes, model.peak_bytes(solution.points), found)


def _unhurried(way: Way, model: Model, budget_bytes: int, target_bytes: int, found: Refereed) -> Refereed:
    """`found`, or choices of fewer seconds. The model gave `found` for `target_bytes`, and it may have been too
    careful.

    Where several units read one value in backward, the model counts the value as held for each of them. So the
    referee's peak may lie well below the model's. The model is then asked again, with as many bytes more.
    """
    too_high = None
    for _ in range(_CAREFUL_ROUNDS if way.effort.proves else 1):
        slack_bytes = budget_bytes - found.line.peak_bytes
        if slack_bytes <= _SLACK * budget_bytes or not found.line.recompute_seconds:
            break
        raised = target_bytes + slack_bytes if too_high is None else (target_bytes + too_high) // 2
        solution = model.solve(raised)
        if solution is None:
            break
        choices, line = way.refereed(solution.points, model)
        if not way.holds(line, budget_bytes):
            too_high = raised
            continue
        target_bytes = raised
        if line.recompute_seconds >= found.line.recompute_seconds:
            break
        found = Refereed(choices, line, solution.how)
    return found


#: Seconds that differ by less than this part of them are the same.
_SAME = 1e-3

#: A plan within this part of the step's seconds of its bound is near enough. Otherwise options are added and tried.
_NEAR = 0.01

#: Nesting runs units once more. It is tried when a plan without it reruns at least this part of the forward.
_DEAR = 0.75

#: Where a plan stays this part of its budget below it, a plan that comes nearer is looked for, so many times.
_SLACK = 0.01
_CAREFUL_ROUNDS = 4

#: A nesting is only tried for the lowest peak if it takes the peak to less than this part of it.
_WORTH = 0.999


def _nested(ways: list[Way], found: Plan | None, budget_bytes: int, levers: Collection[Lever] | None) -> Way | None:
    """The nesting that is worth planning with, when `found` is the best plan without one: that with which the units'
    own points cost the fewest seconds."""
    if not (ways and Grant.SWEEP | Grant.DROP in granted(levers)):
        return None
    frugal = ways[-1]
    forward = sum(op.seconds for op in frugal.trace.ops if op.phase is Phase.FORWARD and op.unit is not None)
    if found is not None and found.recompute_seconds <= _DEAR * forward:
        return None
    nested, thorough = frugal.nested, frugal.effort.proves

    def seconds(place: int) -> float:
        found = _fitting(nested[place], nested[place].model, budget_bytes)
        return math.inf if found is None else found.line.recompute_seconds

    first = _first(nested, budget_bytes, searching=thorough)
    if first == len(nested):
        return None
    return nested[cheapest(first, len(nested), seconds) if thorough else first]


@without_collecting()
def lowest(
    trace: Trace,
    *,
    effort: Effort = THOROUGH,
    levers: Collection[Lever | str] | str | None = None,
    host_budget: str | int | None = None,
) -> Plan:
    """The plan of the lowest peak that any of `levers` reaches (by default all but offload) with at most `host_budget`
    in host memory. Its budget is its own peak."""
    levers = levers_named(levers)
    if Grant.DROP not in granted(levers):
        needed = next(each for each in every() if Grant.DROP in each.grants)
        raise InvalidInput(f"the lowest peak is looked for by {needed.noun}: add {needed.lever.value} to the levers")
    limit_bytes = parse_host_budget(host_budget)
    unplanned = simulate_choices(trace, ())

    def found(within_bytes: int | None) -> Plan:
        way, chosen = _lowest(way_of(trace, effort, within_bytes).ways(levers), levers)
        return _plan(trace, way, chosen.line.peak_bytes, chosen.choices, chosen.line, unplanned, 0.0, chosen.how)

    made = dataclasses.replace(found(None), host_budget_bytes=limit_bytes)
    return made if _in_host(trace, made) is not None else found(limit_bytes)


def _lowest(ways: list[Way], levers: Collection[Lever] | None) -> tuple[Way, Refereed]:
    """The way by which the lowest peak is found, one of `ways` or a nesting of it, and that peak's choices."""
    if Grant.DROP not in granted(levers):
        kept = [(way, Refereed((), simulate_choices(way.trace, ()), frozenset())) for way in ways]
        return min(kept, key=lambda each: each[1].line.peak_bytes)
    # a step holds what is there when it begins, so a way with as much of that as another way's peak is not the lowest
    leanest = min((way for way in ways if way.named == way.in_one_step), key=lambda way: way.static_bytes)
    ways = [way for way in ways if way is leanest or way.static_bytes < leanest.lowest.line.peak_bytes]
    ways = _that_matter(ways, lambda plain: plain.lowest.line.peak_bytes <= plain.optimizer_bytes)
    best = min(ways, key=lambda way: way.lowest.line.peak_bytes)
    nestable = [way for way in ways if way.nested] if Grant.SWEEP in granted(levers) else []
    # another way may be the lower one once units are nested
    flattest = min(nestable, key=lambda way: (way.nested[-1].floor.peak_bytes, way is not best), default=best)
    tried = [best]
    for way in dict.fromkeys(way for way in (best, flattest) if way in nestable):
        least_bytes = way.nested[-1].floor.peak_bytes
        if least_bytes < best.lowest.line.peak_bytes * _WORTH:
            tried.append(way.nested[_first(way.nested, int(least_bytes / _WORTH))])
    best = min(tried, key=lambda way: way.lowest.line.peak_bytes)
    return best, best.lowered


def _first(nested: Sequence[Way], peak_bytes: int, *, searching: bool = False) -> int:
    """The place of the first nesting whose floor is no higher than this, or what it reaches where `searching`; their
    number: there is none. Each holds fewer inputs than the one before, so it is halved for, and few of them are walked.
    """

    def is_low(way: Way) -> bool:
        return way.floor.peak_bytes <= peak_bytes or (searching and way.reach.peak_bytes <= peak_bytes)

    return bisect.bisect_left(nested, True, key=is_low)


@without_collecting()
def with_more_levers(
    trace: Trace,
    *,
    effort: Effort,
    levers: frozenset[Lever] | None,
    host_budget_bytes: int | None,
    fits: Callable[[Plan], bool],
) -> tuple[Enough, Plan] | None:
    """The fewest levers beside `levers` with which the choices of the lowest peak make a plan that `fits`, and that
    plan; None: no levers are enough for them. It takes a walk for each set of levers that is tried, and no search."""
    unplanned = simulate_choices(trace, ())
    ways = way_of(trace, effort, host_budget_bytes).ways(levers)
    way, _ = _lowest(ways, levers)

    def made(step: Variant, line: Timeline) -> Plan:
        varied = Way(step, effort, nesting=way.nesting, plain=way.plain, moves=way.moves, segments=way.segments)
        return _plan(trace, varied, line.peak_bytes, way.lowest.choices, line, unplanned, 0.0, way.lowest.how)

    enough = fewest_more(ways, way, levers, lambda step, line: fits(made(step, line)))
    return None if enough is None else (enough, made(enough.step, enough.line))


@without_collecting()
def every_block(trace: Trace, *, effort: Effort = THOROUGH) -> Plan:
    """The book recipe as a plan: every unit keeps only its inputs. Its budget is its own peak."""
    unplanned = simulate_choices(trace, ())
    planner = way_of(trace, effort)
    line = simulate_choices(trace, planner.fewest)
    return _plan(trace, planner, line.peak_bytes, planner.fewest, line, unplanned, 0.0)


def _plan(
    trace: Trace,
    way: Way,
    budget_bytes: int,
    choices: tuple[Choice, ...],
    line: Timeline,
    unplanned: Timeline,
    bound: float,
    how: Collection[str] = (),
) -> Plan:
    """`choices`, found by `way`, as a plan of `trace`."""
    step = way.trace
    out, back = copy_lanes(step)
    offload_seconds = out.waiting_seconds(line.offloaded_bytes) + back.waiting_seconds(line.fetched_bytes)
    step_seconds = unplanned_seconds(trace, unplanned.peak_bytes) + way.step.seconds + offload_seconds
    less_fresh = fresh_seconds(trace, unplanned.peak_bytes, line.peak_bytes)
    if way.nesting is not None:  # it holds for this nesting, and another may take fewer seconds
        bound = 0.0
    proven = line.recompute_seconds + offload_seconds <= bound * (1 + 1e-6) + 1e-12
    dropping = {choice.program for choice in choices if not choice.keeps_all}
    again_seconds = _again_seconds(trace, allowed(way.step.levers), line.recompute_seconds + offload_seconds)
    decided = way.step.decided
    if again_seconds:
        decided = {**decided, "other_seconds": decided.get("other_seconds", 0.0) + again_seconds}
    calls: dict[str, list[Program]] = {unit.path: [] for unit in step.units}
    for frame in step.frames:
        calls[frame.unit].append(step.programs[frame.id])
    programs = {
        unit.digest: program
        for unit in step.units
        if unit.digest in dropping and (program := shared(calls[unit.path])) is not None
    }
    return Plan(
        budget_bytes=budget_bytes,
        choices=choices,
        status=Status.OPTIMAL if proven else Status.FEASIBLE,
        peak_bytes=line.peak_bytes,
        step_seconds=step_seconds + line.recompute_seconds + again_seconds + less_fresh,
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
        advances=way.advances,
        offloaded_bytes=line.offloaded_bytes,
        offload_seconds=offload_seconds,
        fresh_seconds=less_fresh,
        solved_by=tuple(sorted(how)),
        inexact=tuple(each.lever.value for each in inexact(way.step.levers)),
        host_budget_bytes=way.step.host_budget_bytes,
        **decided,
    )


def _solver_version() -> dict[str, str]:
    try:
        return {"highspy": metadata.version("highspy")}
    except metadata.PackageNotFoundError:  # plans are made without it, too
        return {}
