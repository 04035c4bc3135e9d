"""The schedule of nested recompute against the published counts and against a search through all schedules."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import random
from math import comb
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tightfit.core import Status, Trace
from tightfit.device.cost import NOMINAL_CPU, retimed
from tightfit.plan import nest
from tightfit.plan.nest import Sweep, _reversed, _Tables, cheapest, schedule, slot_counts
from tightfit.plan.planning import _best, _first, _lowest
from tightfit.plan.simulate import simulate_choices
from tightfit.plan.ways import Way, way_of


def revolve_count(steps: int, snapshots: int) -> int:
    """Forward steps that reversing `steps` takes with `snapshots`, the first state among them: Griewank and Walther,
    "Algorithm 799: revolve", proposition 1."""
    repeats = 0
    while comb(snapshots + repeats, snapshots) < steps:
        repeats += 1
    return repeats * steps - comb(snapshots + repeats, snapshots + 1) if repeats else 0


@pytest.mark.parametrize("slots", range(7))
@pytest.mark.parametrize("units", range(2, 26))
def test_equal_units_take_the_published_number_of_steps(units: int, slots: int) -> None:
    tables = _Tables((1.0,) * (units - 1))
    tables.reach(slots)
    assert tables.cost[slots][0, units] == revolve_count(units, slots + 1)


def test_ten_steps_with_three_snapshots() -> None:
    """The first state and two slots: 15 steps, and the targets fall."""
    tables = _Tables((1.0,) * 9)
    tables.reach(2)
    assert [(s.base, s.target, s.stores) for s in _reversed(tables, 0, 10, 2)] == [
        (0, 9, (4, 7)),
        (7, 8, ()),
        (4, 6, (5,)),
        (0, 3, (1, 2)),
    ]


def test_a_chain_of_twelve_with_three_slots() -> None:
    kept, sweeps = schedule((1.0,) * 11, 3)
    assert kept == {3, 7, 10}
    assert sweeps == (
        Sweep(base=10, target=11, stores=()),
        Sweep(base=7, target=9, stores=(8,)),
        Sweep(base=3, target=6, stores=(4, 5)),
        Sweep(base=0, target=2, stores=(1,)),
    )


def carried_out(units: int, slots: int, kept: frozenset[int], sweeps: tuple[Sweep, ...], seconds: list[float]) -> float:
    """Seconds of a schedule, every rule checked: what is needed is there, and no more is stored than there is room."""
    stored = {0, *kept}
    spent = 0.0
    waiting = list(sweeps)
    for unit in reversed(range(units)):
        if unit not in stored:
            sweep = waiting.pop(0)
            assert sweep.target == unit and sweep.base in stored
            assert sweep.base == max(place for place in stored if place < unit)
            stored |= set(sweep.stores)
            spent += sum(seconds[sweep.base : unit])
        stored.discard(unit)
        assert len(stored - {0}) <= slots
    assert not waiting
    return spent


def least_seconds(units: int, slots: int, seconds: list[float]) -> float:
    """By Dijkstra over (the unit whose turn it is, what is stored)."""
    places = range(1, units)
    starts = [frozenset(c) for k in range(slots + 1) for c in itertools.combinations(places, k)]
    heap = [(0.0, i, units - 1, stored) for i, stored in enumerate(starts)]
    seen: set[tuple[int, frozenset[int]]] = set()
    counter = itertools.count(len(heap))
    while heap:
        spent, _, unit, stored = heapq.heappop(heap)
        if unit < 0:
            return spent
        if (unit, stored) in seen:
            continue
        seen.add((unit, stored))
        if unit in stored or unit == 0:
            heapq.heappush(heap, (spent, next(counter), unit - 1, stored - {unit}))
            continue
        base = max((place for place in stored if place < unit), default=0)
        cost = spent + sum(seconds[base:unit])
        between = range(base + 1, unit)
        for k in range(slots - len(stored) + 1):
            for more in itertools.combinations(between, k):
                heapq.heappush(heap, (cost, next(counter), unit - 1, stored | set(more)))
    raise AssertionError


@pytest.mark.parametrize("seed", range(40))
def test_no_schedule_takes_less(seed: int) -> None:
    draw = random.Random(seed)
    units, slots = draw.randint(2, 7), draw.randint(0, 3)
    seconds = [draw.choice([1.0, 2.0, 5.0, draw.random()]) for _ in range(units - 1)]
    kept, sweeps = schedule(tuple(seconds), slots)
    found = carried_out(units, slots, kept, sweeps, seconds)
    assert found == pytest.approx(least_seconds(units, slots, seconds), rel=1e-12)


def test_tables_of_many_slots_say_all_of_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """All nestings of a chain look into the same tables, and each number of slots is worked out once."""
    seconds, made = tuple(1.0 + place / 100 for place in range(11)), []
    alone = {slots: schedule.__wrapped__(seconds, slots) for slots in (1, 3, 9)}
    nest._tables.cache_clear()
    reach = _Tables.reach
    monkeypatch.setattr(_Tables, "reach", lambda self, slots: (made.append(len(self.cost)), reach(self, slots)))
    assert {slots: schedule.__wrapped__(seconds, slots) for slots in (9, 3, 1)} == alone
    assert made == [1, 10, 10]


@pytest.mark.parametrize("units", [5, 17, 80])
def test_long_chains_obey_the_rules(units: int) -> None:
    for slots in (0, 1, 2, 5):
        carried_out(units, slots, *schedule((1.0,) * (units - 1), slots), [1.0] * (units - 1))


def chain_of_forty() -> tuple[nn.Module, torch.Tensor, Any, Trace]:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64)) for _ in range(40)]
    model, batch = nn.Sequential(*layers), torch.randn(512, 64)

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = model(batch).square().mean()
        return out

    multiplies_slowly = dataclasses.replace(NOMINAL_CPU, flops_per_second={"float32": 2e9}, launch_seconds=2e-7)
    return model, batch, loss, retimed(tightfit.trace(model, batch, loss=loss, tiles=False), multiplies_slowly)


@pytest.mark.slow
def test_more_sweeping_is_tried_as_long_as_it_costs_less() -> None:
    """What another sweep frees, units keep. No nesting that is planned with gives a cheaper plan than the plan, and
    nothing says that a plan with a nesting is the best of all."""
    model, batch, loss, trace = chain_of_forty()
    budget = sum(trace.static_bytes.values()) + 36 * trace.values[trace.frames[1].inputs[0]].size_bytes
    plan = tightfit.plan(trace, budget, levers=("recompute", "nest"))
    assert plan.advances and plan.status is Status.FEASIBLE
    way, unplanned = way_of(trace), simulate_choices(trace, ())
    found = [
        _best(trace, each, budget, unplanned, None)[0] for each in way.nested[::3] if each.floor.peak_bytes <= budget
    ]
    assert plan.recompute_seconds <= 1.01 * min(each.recompute_seconds for each in found if each is not None)
    assert tightfit.verify(model, batch, plan, loss=loss).passed


def test_few_nestings_are_walked_for_the_lowest_peak() -> None:
    """Each nesting holds no more than the one before, so the first that is low enough is halved for."""
    way = way_of(chain_of_forty()[3])
    floors = [nested.floor.peak_bytes for nested in way.nested]
    assert len(floors) == 38
    assert floors == sorted(floors, reverse=True)
    for limit in (*floors[::5], floors[-1], floors[-1] - 1):
        afresh = Way(way.step, way.effort, plain=way).nested
        assert _first(afresh, limit) == sum(floor > limit for floor in floors)
        assert len(afresh._made) <= 6


def test_slots_only_become_fewer() -> None:
    """The first nesting that is low enough is halved for."""
    assert slot_counts(31, few=False) == tuple(range(30, 0, -1))
    assert slot_counts(31, few=True) == (15, 7, 2)
    for links in range(12):
        few = slot_counts(links, few=True)
        assert list(few) == sorted(set(few), reverse=True) and bool(few) == (links > 1)


@pytest.mark.parametrize("first, best", [(0, 0), (0, 37), (0, 13), (5, 14), (36, 37), (37, 37)])
def test_the_cheapest_nesting_is_found_among_few(first: int, best: int) -> None:
    """More sweeping costs more, and units keep what it frees."""
    asked: list[int] = []

    def seconds(place: int) -> float:
        asked.append(place)
        return abs(place - best) + 0.01 * place

    assert cheapest(first, 38, seconds) == best
    assert len(asked) == len(set(asked)) <= 18


def test_a_kind_that_has_little_of_the_step_gets_fewer_points() -> None:
    way = way_of(chain_of_forty()[3])
    model = way.model
    shares = model._shares()
    program = model.programs[way.trace.units[0].path]
    assert max(shares.values()) == 1.0
    few, many = model._many(program, 1 / 40, 2), model._many(program, 1 / 8, 2)
    assert few == 24 and many == model._many(program, 1.0, 1)


class _Way:
    """As much of a way as the lowest peak is looked for by."""

    def __init__(self, name: str, peak_bytes: int, floors: tuple[int, ...] = ()) -> None:
        line = SimpleNamespace(peak_bytes=peak_bytes)
        self.named = self.in_one_step = name
        self.static_bytes = self.optimizer_bytes = 0
        self.lowest, self.floor, self.lowered = SimpleNamespace(line=line), line, name
        self.nested = [_Way(f"{name}, nested", floor) for floor in floors]


@pytest.mark.parametrize(
    "floors, found", [((95, 60), "other, nested"), ((110, 98), "one, nested"), ((), "one, nested")]
)
def test_the_lowest_of_all_ways_once_units_are_nested(floors: tuple[int, ...], found: str) -> None:
    """A way that holds more as it is may hold less with nested units."""
    ways: Any = [_Way("one", 100, (99, 90)), _Way("other", 105, floors)]
    assert _lowest(ways, None)[1] == found
