"""The frontier of one unit against brute force over every kept set of small random programs."""

from __future__ import annotations

import itertools
import random

import pytest
from tests.plan.programs import random_program

from tightfit.core import Program
from tightfit.plan import solver
from tightfit.plan.frontier import Input, frontier
from tightfit.plan.program import recipe


def rerun_ops(program: Program, kept: frozenset[int]) -> set[int] | None:
    """Ops that must run again so that backward has all it reads; None when one of them must not. Written from the
    definition: a value in its final state needs every op that wrote it, an op needs what it read."""
    have_early: set[int] = set()
    ops: set[int] = set()
    wanted = [v for v, want in zip(program.slots, program.wanted, strict=True) if want and v >= 0 and v not in kept]
    pending: list[tuple[int, bool]] = [(v, False) for v in wanted]
    while pending:
        value, early = pending.pop()
        if early:
            have_early.add(value)
        for index, step in enumerate(program.steps):
            if value in step.writes and index not in ops:
                if not step.rerunnable:
                    return None
                ops.add(index)
                pending += [(v, False) for v in step.reads if v not in kept]
                pending += [(v, True) for v in step.reads_early]
                pending += [(v, True) for v in step.writes]  # an op that makes two values makes both again
    return ops


def brute_force(
    program: Program, sizes: list[int], seconds: list[float], inputs: list[Input] | None = None
) -> list[tuple[int, float]]:
    """(kept bytes, seconds) of every kept set that is possible. Held values are always kept, and free. An input is held
    if an op that reads it runs again."""
    free = set(program.held)
    others = [v for v in range(program.values) if v not in free]
    found = []
    for count in range(len(others) + 1):
        for chosen in itertools.combinations(others, count):
            ops = rerun_ops(program, frozenset(chosen) | free)
            if ops is not None:
                held = sum(each.size_bytes for each in inputs or () if not each.read_by.isdisjoint(ops))
                found.append((sum(sizes[v] for v in chosen) + held, sum(seconds[op] for op in ops)))
    return found


@pytest.mark.parametrize("seed", range(150))
def test_no_kept_set_beats_the_frontier(seed: int) -> None:
    program, sizes, seconds = random_program(random.Random(seed))
    points = frontier(program, sizes, seconds).points
    every = brute_force(program, sizes, seconds)
    if not every:
        assert not points
        return
    assert points
    for point, after in itertools.zip_longest(points, points[1:]):
        ops = rerun_ops(program, point.kept)
        assert ops is not None
        assert point.kept_bytes == sum(sizes[v] for v in point.kept if v not in program.held)
        assert point.seconds == pytest.approx(sum(seconds[op] for op in ops))
        # whoever is faster than the next point holds nearly as much as this one
        limit = after.seconds if after is not None else float("inf")
        least = min((size for size, spent in every if spent < limit - 1e-9), default=None)
        assert least is None or least >= point.kept_bytes - point.passed_bytes
    fastest = min(spent for _, spent in every)
    assert points[0].seconds == pytest.approx(fastest)
    assert points[-1].kept_bytes <= min(size for size, _ in every) + max(1, sum(sizes)) * 1e-3


def drawn_inputs(draw: random.Random, program: Program, sizes: list[int]) -> list[Input]:
    ops = range(len(program.steps))
    return [
        Input(
            size_bytes=draw.randint(1, max(sizes)),
            read_by=frozenset(draw.sample(ops, draw.randint(1, min(3, len(ops))))),
        )
        for _ in range(draw.randint(1, 2))
    ]


@pytest.mark.parametrize("by_cuts", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_inputs_that_replays_hold_count_as_kept(seed: int, by_cuts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(500 + seed)
    program, sizes, seconds = random_program(draw)
    inputs = drawn_inputs(draw, program, sizes)
    if by_cuts:

        def broken(*_: object) -> solver.Claim:
            raise RuntimeError("no solver")

        monkeypatch.setattr(solver, "engine", broken)
    found = frontier(program, sizes, seconds, inputs=inputs)
    every = brute_force(program, sizes, seconds, inputs)
    if not every:
        assert not found.points and found.barest is None
        return
    for point, after in itertools.zip_longest(found.points, found.points[1:]):
        ops = rerun_ops(program, point.kept)
        assert ops is not None
        held = sum(each.size_bytes for each in inputs if not each.read_by.isdisjoint(ops))
        assert point.kept_bytes == held + sum(sizes[v] for v in point.kept if v not in program.held)
        limit = after.seconds if after is not None else float("inf")
        assert all(size > point.kept_bytes - point.passed_bytes for size, spent in every if spent < limit - 1e-9)
    assert found.points[-1].kept_bytes == min(size for size, _ in every)
    assert found.barest is not None
    kept_bytes = sum(sizes[v] for v in found.barest.kept if v not in program.held)
    assert kept_bytes == min(size for size, _ in brute_force(program, sizes, seconds))


@pytest.mark.parametrize("seed", range(150))
def test_the_recipe_reruns_exactly_the_closure(seed: int) -> None:
    draw = random.Random(seed)
    program, _, _ = random_program(draw)
    kept = frozenset(v for v in range(program.values) if draw.random() < 0.4) | frozenset(program.held)
    ops = rerun_ops(program, kept)
    if ops is None:
        with pytest.raises(Exception, match="must not run twice"):
            recipe(program, kept)
        return
    assert recipe(program, kept).runs == ops


def test_points_fall_in_bytes_and_rise_in_seconds() -> None:
    for seed in range(60):
        program, sizes, seconds = random_program(random.Random(1000 + seed))
        points = frontier(program, sizes, seconds).points
        for one, other in itertools.pairwise(points):
            assert one.kept_bytes >= other.kept_bytes
            assert one.seconds < other.seconds
