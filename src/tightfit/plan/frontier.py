"""The exact trade-off of one unit: kept bytes against the seconds of recompute.

Idea: a unit keeps some of its values and reruns some of its ops. Ops that write the same value run together, as a
cluster (`plan.program.clusters`). An integer program finds one point of the trade-off. It says that every needed value
is kept or its cluster reruns, and that every value that a rerun cluster reads is kept or made by a rerun cluster too. A
value from outside the unit that a rerun cluster reads, and that nobody else would hold, counts as kept. The points are
found from the most kept bytes down. Each is solved twice: first for the least seconds within the bytes, then for the
fewest bytes at those seconds.

Where the solver has no answer (`plan.solver`), `plan.mincut` gives the next corner of the convex hull of bytes against
seconds instead. Whatever price is put on memory, no kept set beats all corners. Between two corners there may be a kept
set with fewer seconds within the same bytes, and that one is then missed.

Invariant: the points are in order of falling bytes and rising seconds. Each says what is proven of the kept sets
between it and the next (`Point.passed_bytes`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tightfit.core import Program
from tightfit.plan import solver
from tightfit.plan.mincut import fewest, hull
from tightfit.plan.program import cluster_of, clusters, demands, live_clusters, rerunnable
from tightfit.plan.solver import MixedProgram, Verdict

#: Points nearer together than this part of the unit's bytes count as one. A LoRA block has hundreds of such points.
FINENESS = 1e-3
#: A step between points is not looked into if its bytes times its seconds are this part of the unit's.
_NEGLIGIBLE = 1e-5
#: About so many points are looked for, where those that are not known could matter most.
MANY = 120
#: A point normally takes hundredths of a second. After this many seconds a corner of the hull is taken instead.
POINT_SECONDS = 5.0
#: The name of the way in which a point is found where the solver has no answer.
MINIMUM_CUTS = "minimum cuts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One way to run a unit. `kept_bytes` counts the kept values that live longer because they are kept, and the inputs
    that live longer because ops that read them run again.

    Every kept set that takes less time than the next point holds more than `kept_bytes - passed_bytes`.
    """

    kept: frozenset[int]
    kept_bytes: int
    seconds: float
    passed_bytes: int
    away: frozenset[int] = frozenset()  # of the kept values those that wait off the device
    inputs_away: frozenset[int] = frozenset()  # places of the unit's inputs that do


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """A value from outside the unit that is only held until backward if one of the ops `read_by` runs again."""

    size_bytes: int
    read_by: frozenset[int]  # ordinals


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontier:
    points: tuple[Point, ...]
    how: frozenset[str] = frozenset()  # by which ways they were found
    barest: Point | None = None  # keeps the fewest bytes of values, whatever inputs it needs; None: no point


def frontier(
    program: Program,
    sizes_bytes: Sequence[int],
    seconds: Sequence[float],
    many: int = MANY,
    inputs: Sequence[Input] = (),
) -> Frontier:
    """The Pareto frontier of a unit, with `many` points or a few more.

    `sizes_bytes[v]` is the size of the value with ordinal v, `seconds[i]` the time of the op with ordinal i. Values in
    `program.held` cost nothing to keep. With or without a solver, the first point is the fastest and the last one holds
    the fewest bytes, `inputs` included.
    """
    model = _Model(program, sizes_bytes, seconds, inputs)
    total = sum(sizes_bytes[v] for v in model.candidates) + sum(each.size_bytes for each in inputs)
    points = _thinned(_enumerated(model, total, many))
    return Frontier(points=tuple(points), how=frozenset(model.how), barest=model.barest(points))


def _thinned(points: list[Point]) -> list[Point]:
    """The points without those that a later point equals or beats in seconds. Floating-point ties can leave such
    points."""
    best: list[Point] = []
    for point in points:
        while best and best[-1].seconds >= point.seconds:
            beaten = best.pop()
            if best:
                passed_bytes = best[-1].kept_bytes - beaten.kept_bytes + beaten.passed_bytes
                best[-1] = dataclasses.replace(best[-1], passed_bytes=max(best[-1].passed_bytes, passed_bytes))
        best.append(point)
    return best


@dataclass(slots=True)
class _Found:
    """A kept set. Whatever takes fewer seconds holds more than `limit_bytes`."""

    kept: frozenset[int]
    kept_bytes: int
    seconds: float
    limit_bytes: int


def _enumerated(model: _Model, total: int, many: int) -> list[Point]:
    """Points from the most bytes down to the fewest that are possible.

    Between two points there may be kept sets that were not looked for. The next search is always where they could
    matter most: the bytes times the seconds of the step between the points.
    """
    found: list[_Found] = []
    fastest = model.solve(total)
    if fastest is None:
        return []
    _note(model, found, total, fastest)
    smallest = fewest(model.program, model.sizes, model.seconds, model.inputs)
    least_bytes = model.bytes_of(model.used(smallest | model.free))
    if least_bytes < found[0].kept_bytes and (kept := model.solve(least_bytes)) is not None:
        _note(model, found, least_bytes, kept)
    narrow_bytes = max(1, math.ceil(total * FINENESS))
    closed: set[tuple[frozenset[int], frozenset[int]]] = set()
    halve = False
    for _ in range(many):
        gaps = [
            ((one.kept_bytes - other.limit_bytes) * (other.seconds - one.seconds), one, other)
            for one, other in itertools.pairwise(found)
            if one.kept_bytes - other.limit_bytes > narrow_bytes and (one.kept, other.kept) not in closed
        ]
        if not gaps:
            break
        area, one, other = max(gaps, key=lambda gap: gap[0])
        if area <= _NEGLIGIBLE * total * found[-1].seconds:
            break
        # near the upper point, one search may show that there is nothing in between; halving never wastes much
        width_bytes = one.kept_bytes - other.limit_bytes
        limit_bytes = one.kept_bytes - (max(1, width_bytes // 2) if halve else narrow_bytes)
        kept = model.solve(limit_bytes, other.kept)
        if kept is None or not _note(model, found, limit_bytes, kept):
            closed.add((one.kept, other.kept))
        halve = not halve
    points = []
    for each, after in itertools.zip_longest(found, found[1:]):
        # nothing takes fewer bytes than the last
        limit_bytes = least_bytes - 1 if after is None else after.limit_bytes
        points.append(
            Point(
                kept=each.kept,
                kept_bytes=each.kept_bytes,
                seconds=each.seconds,
                passed_bytes=max(1, each.kept_bytes - limit_bytes),
            )
        )
    return points


def _note(model: _Model, found: list[_Found], limit_bytes: int, kept: frozenset[int]) -> bool:
    """Put `kept`, the answer for `limit_bytes`, among the sets that are known; whether anything was learnt."""
    kept_bytes, seconds = model.bytes_of(kept), model.seconds_of(kept)
    if MINIMUM_CUTS in model.how:  # what is faster than a corner holds no less than it
        limit_bytes = kept_bytes - 1
    same = next((each for each in found if each.kept_bytes == kept_bytes), None)
    if same is not None:
        learnt = limit_bytes > same.limit_bytes
        same.limit_bytes = max(same.limit_bytes, limit_bytes)
        return learnt
    found.append(_Found(kept, kept_bytes, seconds, limit_bytes))
    found.sort(key=lambda each: -each.kept_bytes)
    return True


class _Model:
    """The integer program of one unit, built once and solved for many byte limits."""

    def __init__(
        self, program: Program, sizes_bytes: Sequence[int], seconds: Sequence[float], inputs: Sequence[Input] = ()
    ) -> None:
        self.program, self.sizes, self.seconds = program, sizes_bytes, seconds
        self.how: set[str] = set()
        groups = clusters(program)
        self.cluster_seconds = [sum(seconds[op] for op in ops) for ops in groups]
        owner = cluster_of(program)
        self.free = frozenset(program.held)
        # a value is worth keeping if backward reads it or some rerunnable cluster may read it
        demanded_by, may_run = demands(program), rerunnable(program)
        read = set(program.needed).union(*(final for final, _ in demanded_by))
        self.candidates = sorted(v for v in read if owner[v] is not None and v not in self.free)
        self.column = {v: i for i, v in enumerate(self.candidates)}
        self.offset = len(self.candidates)
        leader = {op: cluster for cluster, ops in enumerate(groups) for op in ops}
        #: (bytes, clusters that read it) of each input
        self.inputs = [
            (each.size_bytes, frozenset(leader[op] for op in each.read_by if op in leader)) for each in inputs
        ]
        first_input = self.offset + len(groups)
        count = first_input + len(inputs)
        rows: list[tuple[float, dict[int, float]]] = []  # lower bound, coefficients

        def have(value: int, early: bool = False) -> dict[int, float] | None:
            """Columns whose sum says that the value is there; None: it always is."""
            cluster = owner[value]
            if cluster is None or (value in self.free and not early):
                return None
            columns = {self.offset + cluster: 1.0}
            if not early and value in self.column:
                columns[self.column[value]] = 1.0
            return columns

        for value in program.needed:
            if (columns := have(value)) is not None:
                rows.append((1.0, columns))
        for cluster in range(len(groups)):
            final, early = demanded_by[cluster]
            for values, is_early in ((final, False), (early, True)):
                for value in values:
                    columns = have(value, is_early)
                    if columns is not None and self.offset + cluster not in columns:
                        rows.append((0.0, {**columns, self.offset + cluster: -1.0}))
        for place, (_, readers) in enumerate(self.inputs):
            rows += [(0.0, {first_input + place: 1.0, self.offset + cluster: -1.0}) for cluster in sorted(readers)]
        sizes = [*(sizes_bytes[v] for v in self.candidates), *(size for size, _ in self.inputs)]
        self.scale = solver.scale_of(max(sizes, default=1))
        self.bytes_row = len(rows)
        weights = {self.column[v]: sizes_bytes[v] / self.scale for v in self.candidates if sizes_bytes[v]}
        weights |= {first_input + place: size / self.scale for place, (size, _) in enumerate(self.inputs)}
        upper = np.ones(count)
        for cluster in range(len(groups)):
            if not may_run[cluster]:
                upper[self.offset + cluster] = 0.0
        self.second_scale = (
            max(max(self.cluster_seconds, default=0.0), 1e-12) / 1000
        )  # as of bytes: see `solver.scale_of`
        self.costs = np.zeros(count)
        self.costs[self.offset : first_input] = [s / self.second_scale for s in self.cluster_seconds]
        # every rerun cluster costs a tiny amount more, so that none reruns for nothing
        self.costs[self.offset : first_input] += 1e-6
        self.weights = np.zeros(count)
        for index, weight in weights.items():
            self.weights[index] = weight
        infinity = np.inf
        second_row = {i: float(c) for i, c in enumerate(self.costs) if c}
        self.mixed = MixedProgram.of(
            [(list(columns), list(columns.values())) for columns in (*(c for _, c in rows), weights, second_row)],
            row_low=[*(low for low, _ in rows), -infinity, -infinity],
            row_high=[infinity] * (len(rows) + 2),
            costs=self.costs,
            lower=np.zeros(count),
            upper=upper,
            integer=np.ones(count, dtype=bool),
        )

    @functools.cached_property
    def corners(self) -> list[frozenset[int]]:
        """The kept sets at the corners of the hull, from the most bytes down. The last keeps the fewest bytes that are
        possible."""
        corners = hull(self.program, self.sizes, self.seconds, MANY, self.inputs)
        return [self.used(kept | self.free) for kept in corners]

    def barest(self, points: Sequence[Point]) -> Point | None:
        """The point that keeps the fewest bytes of values. Where no input counts, it is the last of `points`."""
        if not (points and self.inputs):
            return points[-1] if points else None
        last = points[-1]
        kept = self.used(fewest(self.program, self.sizes, self.seconds) | self.free)
        if kept == last.kept:
            return last
        kept_bytes = self.bytes_of(kept)
        return Point(
            kept=kept,
            kept_bytes=kept_bytes,
            seconds=self.seconds_of(kept),
            passed_bytes=kept_bytes - last.kept_bytes + last.passed_bytes,
        )

    def solve(self, limit_bytes: int, known: frozenset[int] | None = None) -> frozenset[int] | None:
        """The kept set of the fewest seconds within `limit_bytes`, and of the fewest bytes among those. None: no kept
        set is within the limit. `known`: an answer for a lower limit, which is the answer where nothing is faster."""
        program = self._within(self.bytes_row, limit_bytes / self.scale, self.mixed)
        fastest = solver.solve(program, seconds=POINT_SECONDS)
        if fastest.verdict is Verdict.OPTIMAL:
            assert fastest.values is not None
            self.how.add(fastest.how)
            least = program.cost(fastest.values) * (1 + 1e-7) + 1e-9
            if known is not None and self._cost_of(known) <= least:
                return known
            fewer = dataclasses.replace(self._within(self.bytes_row + 1, least, program), costs=self.weights)
            smallest = solver.solve(fewer, seconds=POINT_SECONDS)
            return self._kept(fastest.values if smallest.values is None else smallest.values)
        smallest_kept = fewest(self.program, self.sizes, self.seconds, self.inputs)
        if self.bytes_of(self.used(smallest_kept | self.free)) > limit_bytes:
            return None
        corner = next((kept for kept in self.corners if self.bytes_of(kept) <= limit_bytes), None)
        self.how.add(MINIMUM_CUTS)
        return corner

    def _cost_of(self, kept: frozenset[int]) -> float:
        return float(sum(self.costs[self.offset + cluster] for cluster in live_clusters(self.program, kept)))

    def _within(self, row: int, high: float, program: MixedProgram) -> MixedProgram:
        row_high = program.row_high.copy()
        row_high[row] = high
        return dataclasses.replace(program, row_high=row_high)

    def _kept(self, solution: np.ndarray) -> frozenset[int]:
        chosen = frozenset(v for v in self.candidates if solution[self.column[v]] > 0.5)
        return self.used(chosen | self.free)

    def used(self, kept: frozenset[int]) -> frozenset[int]:
        """`kept` without the values that neither backward nor the replay would read."""
        groups, program = clusters(self.program), self.program
        read = set(program.needed)
        for cluster in live_clusters(program, kept):
            read |= {v for op in groups[cluster] for v in (*program.steps[op].reads,)}
        return frozenset(v for v in kept if v in read or v in self.free)

    def bytes_of(self, kept: frozenset[int]) -> int:
        own = sum(int(self.sizes[v]) for v in kept if v not in self.free)
        live = live_clusters(self.program, kept) if self.inputs else frozenset()
        return own + sum(size for size, readers in self.inputs if not readers.isdisjoint(live))

    def seconds_of(self, kept: frozenset[int]) -> float:
        return float(sum(self.cluster_seconds[c] for c in live_clusters(self.program, kept)))
