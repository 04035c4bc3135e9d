"""The frontier of one unit against brute force over every kept set of small random programs."""

from __future__ import annotations

import itertools
import random

import pytest

from tightfit.core import Kind, Program, Step
from tightfit.plan.frontier import frontier
from tightfit.plan.program import recipe


def random_program(draw: random.Random) -> tuple[Program, list[int], list[float]]:
    """Up to 8 ops over values that they make, some written in place, some from outside, some held anyway."""
    steps: list[Step] = []
    versions: list[int] = []  # writes so far, per value
    reads_at: list[list[tuple[int, int]]] = []
    for _ in range(draw.randint(2, 8)):
        known = list(range(len(versions)))
        reads = draw.sample(known, min(len(known), draw.randint(0, 2)))
        reads_at.append([(v, versions[v]) for v in reads])
        kind = draw.choice((Kind.PURE, Kind.PURE, Kind.PURE, Kind.RANDOM, Kind.INPLACE, Kind.OPAQUE))
        rerunnable = kind is not Kind.OPAQUE
        if kind is Kind.INPLACE and known:
            target = draw.choice(known)
            reads_at[-1].append((target, versions[target]))
            versions[target] += 1
            steps.append(Step(name=f"op{len(steps)}", kind=kind, outputs=(target,), writes=(target,)))
            continue
        fresh = list(range(len(versions), len(versions) + draw.choice((1, 1, 1, 2))))
        versions += [0] * len(fresh)
        kind = Kind.PURE if kind is Kind.INPLACE else kind
        steps.append(
            Step(
                name=f"op{len(steps)}",
                kind=kind,
                outputs=(*fresh, *((-1,) if draw.random() < 0.1 else ())),
                writes=tuple(fresh),
                rerunnable=rerunnable,
            )
        )
    final = [
        Step(
            name=step.name,
            kind=step.kind,
            reads=tuple(dict.fromkeys(v for v, version in reads if version == versions[v])),
            reads_early=tuple(dict.fromkeys(v for v, version in reads if version != versions[v])),
            outputs=step.outputs,
            writes=step.writes,
            rerunnable=step.rerunnable,
        )
        for step, reads in zip(steps, reads_at, strict=True)
    ]
    values = len(versions)
    slots = tuple(draw.choice([-1, *range(values)]) for _ in range(draw.randint(1, 6)))
    program = Program(
        steps=tuple(final),
        slots=slots,
        wanted=tuple(draw.random() < 0.85 for _ in slots),
        values=values,
        held=tuple(v for v in range(values) if draw.random() < 0.1),
    )
    sizes = [draw.choice((1, 3, 10, 40, 100, 1000)) for _ in range(values)]
    seconds = [draw.choice((0.001, 0.01, 0.02, 0.1, 1.0)) for _ in steps]
    return program, sizes, seconds


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


def brute_force(program: Program, sizes: list[int], seconds: list[float]) -> list[tuple[int, float]]:
    """(kept bytes, seconds) of every kept set that is possible. Held values are always kept, and free."""
    free = set(program.held)
    others = [v for v in range(program.values) if v not in free]
    found = []
    for count in range(len(others) + 1):
        for chosen in itertools.combinations(others, count):
            ops = rerun_ops(program, frozenset(chosen) | free)
            if ops is not None:
                found.append((sum(sizes[v] for v in chosen), sum(seconds[op] for op in ops)))
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
