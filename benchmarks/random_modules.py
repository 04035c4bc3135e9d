"""Random modules under random keep sets: is any gradient different, is any peak mispredicted?

    python benchmarks/random_modules.py            # 50,000 cases; writes benchmarks/results/random_modules.json
    python benchmarks/random_modules.py 2000 7     # cases, first seed; printed only

A module is a random graph of linear layers (some frozen), norms, dropout, views, in-place ops, loops over a shared
recurrent cell, narrow places that one tensor passes, branches and several outputs. A case is one such module with one
random choice of what its units keep. In every third case its units are cut into segments, as the planner cuts long
ones, and the choices are for the segments.
Gradients, buffers and the random state afterwards are compared bit by bit with the plain step; once per module the
allocator's count is compared with `simulate`.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import drawn

os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch
from torch import nn
from torch.nn import functional as F

import tightfit
from tightfit.core import Action, Choice, Plan, Program, Status, Trace, Unit, Unsupported
from tightfit.plan import segments
from tightfit.plan.program import kept_values, recipe, shared
from tightfit.plan.segments import Segmented
from tightfit.plan.simulate import simulate_choices
from tightfit.step.environment import environment
from tightfit.step.snapshot import undisturbed
from tightfit.verify.gradients import Outcome, differences
from tightfit.verify.peak import PeakMeter, static_bytes

RESULTS = Path(__file__).parent / "results" / "random_modules.json"
ROWS, WIDTH = 6, 8
KEEP_SETS = 10


class RandomUnit(nn.Module):
    """`ops` random ops over a pool of tensors of shape (ROWS, WIDTH); returns one or two of them."""

    def __init__(self, seed: int, ops: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.program: list[tuple[str, int, int, Any]] = []
        self.layers = nn.ModuleList()
        self.norm = nn.LayerNorm(WIDTH)
        self.batch_norm = nn.BatchNorm1d(WIDTH)
        self.cell = nn.GRUCell(WIDTH, WIDTH)
        for _ in range(ops):
            kind = draw.choice(list(KINDS))
            layer: Any = None
            if kind == "linear":
                layer = len(self.layers)
                self.layers.append(nn.Linear(WIDTH, WIDTH, bias=draw.random() < 0.5))
                self.layers[-1].requires_grad_(draw.random() < 0.7)
            self.program.append((kind, draw.randrange(10**6), draw.randrange(10**6), layer))
        self.pair = draw.random() < 0.3

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None, *, scale: float = 1.0) -> Any:
        # what autograd may still read or a caller owns must not be written in place; `own` marks the rest
        pool = [x if y is None else x + y * scale]
        own = [y is not None]
        for kind, first, second, layer in self.program:
            a, b = first % len(pool), second % len(pool)
            if kind == "linear":
                out, mine = self.layers[layer](pool[a]), True
            else:
                out, mine = KINDS[kind](self, pool, own, a, b)
            if out is not None:
                pool.append(out)
                own.append(mine)
        return (pool[-1], pool[len(pool) // 2]) if self.pair else pool[-1]


def _in_place(op: Any) -> Any:
    """Apply `op` in place to a fresh sum, whose storage nobody else needs, so that any in-place op is legal."""

    def run(_: RandomUnit, pool: list[torch.Tensor], __: list[bool], a: int, b: int) -> tuple[torch.Tensor, bool]:
        fresh = pool[a] + pool[b]
        op(fresh)
        return fresh, True

    return run


def _pure(op: Any) -> Any:
    return lambda unit, pool, own, a, b: (op(unit, pool[a], pool[b]), True)


def _written_slice(fresh: torch.Tensor) -> None:
    fresh[:, : WIDTH // 2].mul_(2.0)


def _mask_in_place(unit: RandomUnit, a: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    mask = torch.empty_like(a).bernoulli_(0.7).div_(0.7)
    return a * mask


def _narrow(_: RandomUnit, pool: list[torch.Tensor], own: list[bool], a: int, __: int) -> tuple[torch.Tensor, bool]:
    """One tensor passes; nothing after reads what was before."""
    passed = torch.tanh(pool[a])
    pool.clear()
    own.clear()
    return passed, True


def _copied_halves(unit: RandomUnit, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    whole = a.new_empty(a.shape)
    whole[:, : WIDTH // 2].copy_(a[:, : WIDTH // 2])
    whole[:, WIDTH // 2 :].copy_(b[:, WIDTH // 2 :])
    return whole


def _loop(unit: RandomUnit, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Turns of a shared cell, which changes one storage several times and saves what it was in between."""
    for _ in range(3):
        b = unit.cell(a, b)
    return b


KINDS: dict[str, Any] = {
    "linear": None,
    "add": _pure(lambda u, a, b: a + b),
    "mul": _pure(lambda u, a, b: a * b * 0.5),
    "tanh": _pure(lambda u, a, b: torch.tanh(a)),
    "silu": _pure(lambda u, a, b: F.silu(a)),
    "gelu": _pure(lambda u, a, b: F.gelu(a)),
    "softmax": _pure(lambda u, a, b: torch.softmax(a, -1)),
    "layer_norm": _pure(lambda u, a, b: u.norm(a)),
    "batch_norm": _pure(lambda u, a, b: u.batch_norm(a)),
    "dropout": _pure(lambda u, a, b: F.dropout(a, 0.3)),
    "mask": _pure(_mask_in_place),
    "rows": _pure(lambda u, a, b: a.chunk(2)[1].repeat(2, 1)),
    "transposed": _pure(lambda u, a, b: (a.t() @ b).sum(0, keepdim=True).expand(ROWS, WIDTH) * a),
    "narrow": _narrow,
    "cell": _pure(lambda u, a, b: u.cell(a, b)),
    "loop": _pure(_loop),
    "heads": _pure(lambda u, a, b: a.view(ROWS, 2, -1).transpose(0, 1).transpose(0, 1).reshape(ROWS, WIDTH)),
    "cat": _pure(lambda u, a, b: torch.cat([a[:, ::2], b[:, 1::2]], 1)),
    "gather": _pure(lambda u, a, b: a.index_select(0, torch.arange(ROWS).flip(0))),
    "where": _pure(lambda u, a, b: torch.where(a > 0, a, b)),
    "detached": _pure(lambda u, a, b: a * b.detach()),
    "halves": _pure(_copied_halves),
    "cast": _pure(lambda u, a, b: a.to(torch.bfloat16).float()),
    "relu_": _in_place(torch.relu_),
    "mul_": _in_place(lambda t: t.mul_(0.7)),
    "tanh_": _in_place(torch.tanh_),
    "slice_": _in_place(_written_slice),
    "masked_fill_": _in_place(lambda t: t.masked_fill_(t.detach() > 1, 0.1)),
    "dropout_": _in_place(lambda t: F.dropout(t, 0.4, inplace=True)),
    "view": lambda u, pool, own, a, b: (pool[a].view(-1).view(ROWS, WIDTH) if pool[a].is_contiguous() else None, False),
    "expand": lambda u, pool, own, a, b: (pool[a][:1].expand(ROWS, WIDTH), False),
}  # fmt: skip


class RandomModel(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.embed.requires_grad_(draw.random() < 0.6)
        self.blocks = nn.ModuleList(
            RandomUnit(draw.randrange(10**9), draw.randrange(2, 14)) for _ in range(draw.choice((2, 2, 3)))
        )
        self.twice = draw.random() < 0.15
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        side = None
        for block in [*self.blocks, *([self.blocks[0]] if self.twice else [])]:
            out = block(x, side, scale=0.5)
            x, side = out if isinstance(out, tuple) else (out, None)
        loss = self.head(x).square().mean()
        return loss if side is None else loss + side.mean()


@dataclass
class Tally:
    modules: int = 0
    cases: int = 0
    replays: int = 0
    fallbacks: int = 0
    in_segments: int = 0  # cases
    impossible: int = 0  # keep sets whose values cannot be made again
    refused: int = 0  # modules that `trace` refuses
    untrained: int = 0  # modules whose loss reaches no parameter
    worst_prediction_bytes: int = 0
    failures: list[str] = field(default_factory=list)


def run(cases: int, seed: int = 0, progress: Any = None) -> Tally:
    """Try `cases` keep sets on as many random modules as it takes."""
    tally = Tally()
    while tally.cases < cases:
        one_module(seed + tally.modules + tally.refused + tally.untrained, tally)
        if progress is not None:
            progress(tally)
    return tally


def one_module(seed: int, tally: Tally) -> None:
    model = RandomModel(seed)
    batch = torch.randn(ROWS, WIDTH)
    if not model(batch).requires_grad:
        tally.untrained += 1
        return
    try:
        trace = tightfit.trace(model, batch, units="blocks.*")
    except Unsupported:
        tally.refused += 1
        return
    tally.modules += 1
    reference = _observe(model, batch)
    draw = random.Random(seed)
    measured = False
    for case in range(KEEP_SETS):
        cut = _cut(trace, draw) if case % 3 == 2 else None
        choices = _random_choices(trace if cut is None else cut.trace, draw, tally)
        if choices is not None and cut is not None:
            choices = cut.joined(choices)
            tally.in_segments += 1
        if choices is None:
            continue
        tally.cases += 1
        with tightfit.apply(model, _plan_of(trace, choices)) as applied:
            try:
                found = _observe(model, batch)
            except Exception as error:
                tally.failures.append(f"seed {seed}: {type(error).__name__}: {error}")
                return
            stats = applied.stats()
            if not measured and stats.replays:
                measured = True
                off = abs(_peak_bytes(model, batch) - simulate_choices(trace, choices).peak_bytes)
                tally.worst_prediction_bytes = max(tally.worst_prediction_bytes, off)
        tally.replays += stats.replays
        tally.fallbacks += stats.fallbacks
        if wrong := differences(reference[0], found[0]):
            tally.failures.append(f"seed {seed}: {next(iter(wrong.items()))}")
        if not torch.equal(reference[1], found[1]):
            tally.failures.append(f"seed {seed}: the random state after the step differs")


def _observe(model: nn.Module, batch: Any) -> tuple[Outcome, torch.Tensor]:
    with undisturbed(model):
        torch.manual_seed(3)
        model(batch).backward()
        return Outcome(model), torch.get_rng_state()


def _peak_bytes(model: nn.Module, batch: Any) -> int:
    with undisturbed(model):
        before = static_bytes(model, None, batch)
        with PeakMeter("cpu") as meter:
            model(batch).backward()
    return before + meter.rise_bytes


def _random_choices(trace: Trace, draw: random.Random, tally: Tally) -> tuple[Choice, ...] | None:
    choices = []
    for unit in trace.units:
        program = _program(trace, unit)
        share = draw.choice((0.0, 0.2, 0.5, 0.8, 0.95))
        actions = tuple(Action.KEEP if draw.random() < share else Action.RECOMPUTE for _ in range(program.values))
        if unit.pinned:
            actions = (Action.KEEP,) * program.values
        try:
            recipe(program, kept_values(actions))
        except Unsupported:
            tally.impossible += 1
            return None
        choices.append(Choice(unit=unit.path, actions=actions, signature=unit.signature, program=unit.digest))
    return tuple(choices)


def _cut(trace: Trace, draw: random.Random) -> Segmented | None:
    """The trace in segments of a few ops; None: none of its units can be cut."""
    with mock.patch.object(segments, "LONG", 4), mock.patch.object(segments, "_PART", 0.0):
        return segments.segmented(trace, draw.choice((3, 4, 6)))


def _program(trace: Trace, unit: Unit) -> Program:
    programs = [trace.programs[frame.id] for frame in trace.frames if frame.unit == unit.path]
    return shared(programs) or programs[0]  # calls that differ are pinned, so any of them will do


def _plan_of(trace: Trace, choices: tuple[Choice, ...]) -> Plan:
    programs = {unit.digest: _program(trace, unit) for unit in trace.units}
    line = simulate_choices(trace, choices)
    return Plan(
        budget_bytes=line.peak_bytes, choices=choices, status=Status.FEASIBLE, peak_bytes=line.peak_bytes,
        step_seconds=1.0, recompute_seconds=0.0, bound_seconds=0.0, recompute_flops=0, forward_flops=1,
        unplanned_peak_bytes=line.peak_bytes, replays=line.replays, trace_digest=trace.digest, versions={},
        programs=programs,
    )  # fmt: skip


def main(arguments: list[str]) -> int:
    cases = int(arguments[0]) if arguments else 50_000
    seed = int(arguments[1]) if len(arguments) > 1 else 1_000_000
    started = time.perf_counter()

    def progress(tally: Tally) -> None:
        if tally.modules % 200 == 0:
            print(tally.cases, len(tally.failures), file=sys.stderr, flush=True)

    tally = run(cases, seed, progress)
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "seconds": round(time.perf_counter() - started),
        "first_seed": seed,
        **vars(tally),
    }
    print(json.dumps({k: v for k, v in record.items() if k != "environment"}, indent=1))
    if not arguments:
        drawn.write(RESULTS, record)
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
