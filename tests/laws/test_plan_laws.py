"""Laws that hold for every trace and budget, tried by Hypothesis on traces of random modules."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tightfit
from tightfit.core import BudgetInfeasible, EventKind, Plan, Trace, dumps, loads

LAW = settings(
    derandomize=True, deadline=None, max_examples=16, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
seeds = st.integers(0, 39)
shares = st.floats(0.05, 1.0)


@pytest.fixture(autouse=True)
def _loaded(random_modules: Any) -> None:
    """The harness is found by name in `recorded`, which must be cached across examples."""


@functools.cache
def recorded(seed: int) -> Trace:
    harness = sys.modules["benchmarks_random_modules"]
    model = harness.RandomModel(seed)
    trace = tightfit.trace(model, torch.randn(harness.ROWS, harness.WIDTH), units="blocks.*")
    sizes = {v.id: v.size_bytes for v in trace.values}
    ops = tuple(
        dataclasses.replace(op, seconds=1e-3 + 1e-6 * sum(sizes[v] for v in op.outputs if v is not None))
        for op in trace.ops
    )
    # tiny tensors beside a 5 kB generator state would make every plan a loss
    values = tuple(dataclasses.replace(v, size_bytes=v.size_bytes * 256) for v in trace.values)
    return dataclasses.replace(trace, ops=ops, values=values)


#: By the digest of a trace: its least feasible peak and the unplanned one.
ENDS: dict[str, tuple[int, int]] = {}


def planned(trace: Trace, share: float) -> Plan | None:
    """The plan `share` of the way from the least feasible peak to the unplanned one."""
    if trace.digest not in ENDS:
        try:
            tightfit.plan(trace, 1)
            least = 1
        except BudgetInfeasible as error:
            least = error.least_bytes
        ENDS[trace.digest] = least, tightfit.simulate(trace).peak_bytes
    least, unplanned = ENDS[trace.digest]
    try:
        return tightfit.plan(trace, least + int(share * (unplanned - least)))
    except BudgetInfeasible:
        return None


@LAW
@given(seeds, shares)
def test_every_plan_is_within_its_budget(seed: int, share: float) -> None:
    trace = recorded(seed)
    plan = planned(trace, share)
    assert plan is not None
    line = tightfit.simulate(trace, plan)
    assert line.peak_bytes == plan.peak_bytes <= plan.budget_bytes
    assert line.recompute_seconds == plan.recompute_seconds
    assert line.replays == plan.replays
    assert plan.bound_seconds <= plan.recompute_seconds


several = st.lists(shares, min_size=2, max_size=5)


@settings(LAW, max_examples=6)
@given(seeds, several)
def test_time_never_rises_with_the_budget(seed: int, wanted: list[float]) -> None:
    time_never_rises(seed, wanted)


@pytest.mark.slow
@LAW
@given(seeds, several)
def test_time_never_rises_in_more_steps(seed: int, wanted: list[float]) -> None:
    time_never_rises(seed, wanted)


def time_never_rises(seed: int, wanted: list[float]) -> None:
    trace = recorded(seed)
    seconds = [plan.recompute_seconds for share in sorted(wanted) if (plan := planned(trace, share))]
    assert all(later <= earlier * 1.02 + 1e-9 for earlier, later in itertools.pairwise(seconds))


@pytest.mark.slow
@LAW
@given(seeds, shares, st.integers(2, 5))
def test_other_units_of_bytes_change_nothing(seed: int, share: float, factor: int) -> None:
    trace = recorded(seed)
    scaled = dataclasses.replace(
        trace,
        values=tuple(dataclasses.replace(v, size_bytes=v.size_bytes * factor) for v in trace.values),
        ops=tuple(dataclasses.replace(op, scratch_bytes=op.scratch_bytes * factor) for op in trace.ops),
        static_bytes={key: size * factor for key, size in trace.static_bytes.items()},
        random_state_bytes=trace.random_state_bytes * factor,
        digest=f"{trace.digest} x {factor}",
    )
    plan = planned(trace, share)
    assert plan is not None
    again = tightfit.plan(scaled, plan.budget_bytes * factor)
    assert again.peak_bytes == tightfit.simulate(scaled, again).peak_bytes <= plan.budget_bytes * factor
    assert again.recompute_seconds == pytest.approx(plan.recompute_seconds, rel=0.02)


@pytest.mark.slow
@LAW
@given(seeds, shares)
def test_other_names_change_nothing(seed: int, share: float) -> None:
    trace = recorded(seed)
    renamed = dataclasses.replace(
        trace,
        units=tuple(dataclasses.replace(u, path=f"other.{u.path}") for u in trace.units),
        frames=tuple(dataclasses.replace(f, unit=f"other.{f.unit}") for f in trace.frames),
        ops=tuple(dataclasses.replace(op, unit=op.unit and f"other.{op.unit}") for op in trace.ops),
        values=tuple(dataclasses.replace(v, unit=v.unit and f"other.{v.unit}") for v in trace.values),
        digest=f"other {trace.digest}",
    )
    plan, other = planned(trace, share), planned(renamed, share)
    assert plan is not None and other is not None
    assert [c.actions for c in plan.choices] == [c.actions for c in other.choices]
    assert plan.peak_bytes == other.peak_bytes


@LAW
@given(seeds)
def test_without_a_plan_the_simulation_is_the_record(seed: int) -> None:
    trace = recorded(seed)
    live = top = sum(trace.static_bytes.values())
    for event in trace.events:
        if event.what is EventKind.ALLOC:
            live += trace.values[event.subject].size_bytes
        elif event.what is EventKind.FREE:
            live -= trace.values[event.subject].size_bytes
        elif event.what is EventKind.OP:
            top = max(top, live + trace.ops[event.subject].scratch_bytes)
    assert tightfit.simulate(trace).peak_bytes == top


@LAW
@given(seeds, shares)
def test_plans_and_traces_survive_json(seed: int, share: float) -> None:
    trace = recorded(seed)
    plan = planned(trace, share)
    assert loads(Trace, dumps(trace)) == trace
    assert loads(Plan, dumps(plan)) == plan
