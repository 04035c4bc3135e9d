"""What a tighter budget than a plan's would cost.

Invariant: the figure is a plan's that the referee found under that budget. Refused: a guess from the plan at
hand, since the seconds are no line in the bytes.
"""

from __future__ import annotations

from tightfit.core import BudgetInfeasible, Lever, Plan, Trace, format_bytes
from tightfit.levers import allowed, exact_only, used
from tightfit.plan.effort import Effort
from tightfit.plan.planning import plan

#: A tighter budget is this part of what the step takes now.
PART = 0.9
#: A sentence is not worth the seconds of a thorough search. A plan that is made for the budget may be faster.
_EFFORT = Effort(points=40, solver_seconds=0.3, proves=False)


def tighter(trace: Trace, made: Plan) -> str:
    """The slowdown of a tenth less than what `made` takes, or that no plan was found.

    Looked for among the default levers and those that `made` uses, but without nested recompute: to find that none of
    those plans fits takes longer than all the rest.
    """
    budget_bytes = int(min(made.budget_bytes, made.peak_bytes) * PART)
    levers = {each.lever for each in (*allowed(None), *used(made))} - {Lever.NEST}
    if made.exact:
        levers &= exact_only(levers)
    try:
        found = plan(trace, budget_bytes, effort=_EFFORT, levers=levers, host_budget=made.host_budget_bytes)
    except BudgetInfeasible:
        # where `made` is exact, tiles were left out, which may hold it
        kind = "exact plan" if made.exact else "plan"
        return f"no {kind} without nested recompute holds {format_bytes(budget_bytes)}"
    return f"{format_bytes(budget_bytes)} would take {found.slowdown:.2f} x"
