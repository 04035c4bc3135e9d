"""What the referee looks up once for a trace: it goes with the trace, and planning leaves Python's own state alone."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
from tests.plan.stacks import traced

from tightfit.core import BudgetInfeasible
from tightfit.plan import every_block, indexed, lowest, plan
from tightfit.plan.simulate import simulate


def test_an_index_goes_with_its_trace() -> None:
    before = set(indexed._KNOWN)
    trace = dataclasses.replace(traced(2, 16, 4, 64))
    line = simulate(trace)
    key, gone = id(trace), weakref.ref(trace)
    assert key in indexed._KNOWN and key not in before
    assert indexed.indexed(trace) is indexed.indexed(trace)
    assert simulate(dataclasses.replace(trace)) == line  # an index of its own
    del trace
    assert gone() is None and key not in indexed._KNOWN


def test_a_walk_writes_nothing_into_the_index() -> None:
    """A walk under a plan, and then one without: the second is the recorded step again."""
    trace = traced(3, 16, 4, 64)
    before = simulate(trace)
    kept = {name: repr(value) for name, value in vars(indexed.indexed(trace)).items() if name != "_shared"}
    for made in (every_block(trace), lowest(trace)):
        simulate(trace, made)
        now = {name: repr(value) for name, value in vars(indexed.indexed(trace)).items() if name != "_shared"}
        assert now == kept
    assert simulate(trace) == before


@pytest.mark.parametrize("was_on", [True, False])
def test_planning_leaves_the_garbage_collector_as_it_was(was_on: bool) -> None:
    trace = traced(2, 16, 4, 64)
    try:
        if not was_on:
            gc.disable()
        every_block(trace)
        with pytest.raises(BudgetInfeasible):
            plan(trace, 1)
        assert gc.isenabled() is was_on
    finally:
        gc.enable()
