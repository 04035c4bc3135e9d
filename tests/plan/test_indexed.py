"""What the referee looks up once for a trace: it goes with the trace, and planning leaves Python's own state alone."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
from tests.plan.stacks import traced

from tightfit.core import BudgetInfeasible
from tightfit.plan import every_block, indexed, lowest, plan
from tightfit.plan.simulate import _WALKED, Walk, allocations, simulate


def test_an_index_goes_with_its_trace() -> None:
    trace = dataclasses.replace(traced(2, 16, 4, 64))
    line = simulate(trace)
    gone, index_gone = weakref.ref(trace), weakref.ref(indexed.indexed(trace))
    assert indexed.indexed(trace) is index_gone()
    assert simulate(dataclasses.replace(trace)) == line  # an index of its own
    del trace
    assert gone() is None and index_gone() is None


def test_a_walk_is_made_once_and_goes_with_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same question twice is one walk; another plan, and another trace that is equal, have walks of their own."""
    walks = []
    walk = Walk.timeline
    monkeypatch.setattr(Walk, "timeline", lambda self: walks.append(self.trace) or walk(self))
    trace = dataclasses.replace(traced(2, 16, 4, 64))
    made = every_block(trace)
    walks.clear()
    lines = [simulate(each, plan) for each in (trace, dataclasses.replace(trace)) for plan in (made, None, made)]
    assert len(walks) == 2 and walks[0] is walks[1] is not trace  # both plans of the first are known already
    assert lines[:3] == lines[3:] and lines[0] == lines[2] != lines[1]
    line_gone = weakref.ref(walks[0])
    allocations(trace, made)
    assert len(walks) == 2
    walks.clear()
    del trace
    assert line_gone() is None  # and nothing of it is kept
    assert not any(reference() is None for reference, _ in _WALKED._known.values())


def test_a_walk_writes_nothing_into_the_index() -> None:
    """A walk under a plan, and then one without: the second is the recorded step again."""
    trace = traced(3, 16, 4, 64)
    before = Walk(trace, ()).timeline()
    kept = {name: repr(value) for name, value in vars(indexed.indexed(trace)).items() if name != "_shared"}
    for made in (every_block(trace), lowest(trace)):
        simulate(trace, made)
        now = {name: repr(value) for name, value in vars(indexed.indexed(trace)).items() if name != "_shared"}
        assert now == kept
    assert Walk(trace, ()).timeline() == before


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
