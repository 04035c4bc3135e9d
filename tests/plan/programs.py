"""Small random programs of a unit, for brute force over every kept set."""

from __future__ import annotations

import random

from tightfit.core import Kind, Program, Step


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
