"""A plan among its neighbours: what a page shows, computed once from a trace.

For a row of budgets between the lowest peak and the unplanned one: the plan, its cost, its timeline and what it does
with every tensor of every unit. Timelines are thinned to a few hundred points that keep every interval's highest
moment, so that no peak is lost and the whole stays small enough for a mail attachment.

Invariant: figures are the planner's and the referee's own; equal traces give equal studies but for the solver's time.
Refused: nothing; where no plan lies below the unplanned peak the row has one point.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tightfit.core import Action, BudgetInfeasible, Category, Choice, Plan, Timeline, Trace
from tightfit.device.cost import unplanned_seconds
from tightfit.plan import Effort, every_block, lowest, plan, simulate
from tightfit.plan.shares import shares

__all__ = ["LeverSaid", "Moment", "Study", "StudyPoint", "Tensor", "UnitMap", "study"]

POINTS = 16
MOMENTS = 320
QUICK = Effort(points=40, solver_seconds=0.3, proves=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The highest moment of an interval of the step."""

    at: float  # place in the step, 0 to 1
    label: int  # into `Study.labels`
    by_category: tuple[int, ...]  # bytes, in the order of `Study.categories`


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One value of a unit that backward reads or a plan holds."""

    ordinal: int
    size_bytes: int
    shape: tuple[int, ...]
    dtype: str
    op: str  # that makes it
    seconds: float  # of that op: what keeping it saves at least


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitMap:
    """One unit; `kind` is that of the first unit that is alike, whose tensors stand for all."""

    path: str
    kind: int
    pinned: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyPoint:
    """One plan. `kept[u]` has a letter for each tensor of unit u's kind: k kept, r recomputed, o offloaded, t gone,
    since the unit is computed in tiles; `inputs[u]` one for what the unit is given: k, o, or s made again by a sweep.
    """

    name: str  # none, every-block, lowest, chosen, or the budget's part of the unplanned peak
    budget_bytes: int
    peak_bytes: int
    slowdown: float
    recompute_share: float  # of the forward's FLOPs
    replays: int
    peak_owner: str
    moments: tuple[Moment, ...]
    kept: tuple[str, ...]
    inputs: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LeverSaid:
    """What one lever buys in the plan in question."""

    lever: str
    bought_bytes: int
    slowdown: float  # that it costs, as a part of the step
    how: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    categories: tuple[str, ...]
    labels: tuple[str, ...]
    kinds: tuple[tuple[Tensor, ...], ...]
    units: tuple[UnitMap, ...]
    points: tuple[StudyPoint, ...]  # by falling peak; the first is the unplanned step
    chosen: int  # the point that is the plan in question
    levers: tuple[LeverSaid, ...] = ()


_LETTERS = {Action.KEEP: "k", Action.RECOMPUTE: "r", Action.OFFLOAD: "o"}


def study(trace: Trace, chosen: Plan | None = None, points: int = POINTS, effort: Effort = QUICK) -> Study:
    """`points` plans of `trace` between its lowest peak and the unplanned one, and `chosen` among them."""
    labels: dict[str, int] = {}
    kinds, units = _kinds(trace)
    values = {frame.unit or "the model": trace.programs[frame.id].values for frame in trace.frames}
    unplanned = simulate(trace)
    step_seconds = unplanned_seconds(trace, unplanned.peak_bytes)
    forward_flops = sum(op.flops for op in trace.ops if op.phase.value == "forward")

    def point(name: str, made: Plan | None) -> StudyPoint:
        line = simulate(trace, made)
        waits = 0.0 if made is None else made.added_seconds - made.recompute_seconds
        extra_seconds = line.recompute_seconds + waits
        return StudyPoint(
            name=name,
            budget_bytes=line.peak_bytes if made is None else made.budget_bytes,
            peak_bytes=line.peak_bytes,
            slowdown=1 + extra_seconds / step_seconds if step_seconds else 1.0,
            recompute_share=line.recompute_flops / forward_flops if forward_flops else 0.0,
            replays=line.replays,
            peak_owner=line.peak_owner,
            moments=tuple(_thinned(line, labels)),
            kept=tuple(_kept(kinds, units, () if made is None else made.choices, values)),
            inputs=_inputs(units, () if made is None else made.choices),
        )

    limit = None if chosen is None else chosen.host_budget_bytes
    least = lowest(trace, effort=effort, host_budget=limit)
    found = [point("none", None), point("every-block", every_block(trace, effort=effort)), point("lowest", least)]
    low, high = least.peak_bytes, unplanned.peak_bytes
    for i in range(1, points - 1):
        budget = high - (high - low) * i // (points - 1)
        try:
            found.append(point(f"{budget / high:.0%}", plan(trace, budget, effort=effort, host_budget=limit)))
        except BudgetInfeasible:
            continue
    if chosen is not None:
        found.append(point("chosen", chosen))
    found.sort(key=lambda p: (-p.peak_bytes, p.slowdown))
    names = [p.name for p in found]
    return Study(
        categories=tuple(c.value for c in Category),
        labels=tuple(labels),
        kinds=kinds,
        units=units,
        points=tuple(found),
        chosen=names.index("chosen") if chosen is not None else names.index("none"),
        levers=() if chosen is None else tuple(_levers(trace, chosen, step_seconds)),
    )


def _levers(trace: Trace, chosen: Plan, step_seconds: float) -> Iterator[LeverSaid]:
    for share in shares(trace, chosen):
        cost = share.seconds / step_seconds if step_seconds else 0.0
        yield LeverSaid(lever=share.lever.value, bought_bytes=share.bought_bytes, slowdown=cost, how=share.what)


def _thinned(line: Timeline, labels: dict[str, int]) -> list[Moment]:
    count = len(line.live_bytes)
    step = max(1, -(-count // MOMENTS))
    rows = [line.by_category[c.value] for c in Category]
    moments = []
    for start in range(0, count, step):
        at = max(range(start, min(start + step, count)), key=line.live_bytes.__getitem__)
        label = labels.setdefault(line.labels[at], len(labels))
        moments.append(
            Moment(at=round(at / max(1, count - 1), 4), label=label, by_category=tuple(row[at] for row in rows))
        )
    return moments


def _kinds(trace: Trace) -> tuple[tuple[tuple[Tensor, ...], ...], tuple[UnitMap, ...]]:
    kinds: list[tuple[Tensor, ...]] = []
    known: dict[str, int] = {}
    units = []
    first_frame: dict[str, int] = {}
    for frame in trace.frames:
        first_frame.setdefault(frame.unit, frame.id)
    for unit in trace.units:
        if unit.digest not in known:
            known[unit.digest] = len(kinds)
            kinds.append(tuple(_tensors(trace, first_frame[unit.path])))
        units.append(UnitMap(path=unit.path or "the model", kind=known[unit.digest], pinned=unit.pinned))
    return tuple(kinds), tuple(units)


def _tensors(trace: Trace, frame: int) -> Sequence[Tensor]:
    needed = set(trace.programs[frame].needed)
    found = []
    for value in trace.values:
        if value.producer is None or value.ordinal is None:
            continue
        op = trace.ops[value.producer]
        if op.frame == frame and (value.ordinal in needed or value.size_bytes >= 1 << 12):
            found.append(
                Tensor(
                    ordinal=value.ordinal, size_bytes=value.size_bytes, shape=value.shape, dtype=value.dtype,
                    op=op.name.removeprefix("aten.").removesuffix(".default"), seconds=op.seconds,
                )
            )  # fmt: skip
    return [tensor for tensor in found if tensor.size_bytes and tensor.ordinal in needed] or found[:1]


def _kept(
    kinds: Sequence[Sequence[Tensor]],
    units: Sequence[UnitMap],
    choices: Sequence[Choice],
    values: Mapping[str, int],
) -> list[str]:
    actions = {choice.unit or "the model": choice.actions for choice in choices}
    rows = []
    for unit in units:
        mine, tensors = actions.get(unit.path), kinds[unit.kind]
        if mine is not None and len(mine) != values[unit.path]:  # another program: tiles are in force in it
            rows.append("t" * len(tensors))
        else:
            rows.append("".join("k" if mine is None else _LETTERS[mine[t.ordinal]] for t in tensors))
    return rows


def _inputs(units: Sequence[UnitMap], choices: Sequence[Choice]) -> str:
    given = {choice.unit or "the model": choice.inputs for choice in choices}
    letters = []
    for unit in units:
        actions = given.get(unit.path, ())
        letters.append("s" if Action.RECOMPUTE in actions else "o" if Action.OFFLOAD in actions else "k")
    return "".join(letters)
