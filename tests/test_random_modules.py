"""Random modules under random keep sets; the same harness runs 50,000 cases as a benchmark."""

from __future__ import annotations

from types import ModuleType

import pytest


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2, 3))])
def test_no_gradient_differs(random_modules: ModuleType, part: int) -> None:
    tally = random_modules.run(300, seed=part * 100_000)
    assert tally.cases >= 300
    assert tally.failures == []
    assert tally.replays > 180, "the cases hardly replay anything"
    assert tally.fallbacks == 0, "calls of one unit share a plan, also those that save different tensors"
    assert tally.worst_prediction_bytes <= 5056


@pytest.mark.slow
def test_no_gradient_differs_in_many_more(random_modules: ModuleType) -> None:
    tally = random_modules.run(5_000, seed=10_000_000)
    assert tally.cases >= 5_000 and tally.failures == [] and tally.fallbacks == 0
