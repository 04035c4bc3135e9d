"""How long to look for a plan.

Invariant: what is found with less effort is as right, but recomputes more than it might. Refused: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from tightfit.plan.frontier import MANY

#: A choice across the units normally ends by itself in less than one second, or by its nodes; on a busy machine too.
SOLVER_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long to look for a plan. What is found with less is as right, but recomputes more than it might."""

    points: int = MANY  # of a unit's frontier, or not many more
    solver_seconds: float = SOLVER_SECONDS  # for each choice across the units
    proves: bool = True  # also look for the bound
    is_estimated: bool = False  # the trace's seconds are no measurements, so they are the same on the next run


THOROUGH = Effort()
