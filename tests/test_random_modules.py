"""Random modules under random keep sets; the same harness runs 50,000 cases as a benchmark."""

from __future__ import annotations

from types import ModuleType

import pytest


@pytest.mark.parametrize("part", range(4))
def test_no_gradient_differs(random_modules: ModuleType, part: int) -> None:
    tally = random_modules.run(500, seed=part * 100_000)
    assert tally.cases >= 500
    assert tally.failures == []
    assert tally.replays > 300, "the cases hardly replay anything"
    # unlike calls of one unit are replayed whole; nothing else is a reason to
    assert tally.fallbacks <= 0.1 * tally.replays
    # saved random states of fallen-back frames are all that the simulator does not know
    assert tally.worst_prediction_bytes <= 4 * 5056
