"""Which lever of a plan buys which bytes, and at which cost.

Idea: take one lever out of the plan, leave the others as they are, and have the referee walk through the step again.
The peak rises by the bytes that the lever buys. The shares need not add up to the whole, because the same bytes may
need two levers at once.

Invariant: the figures are the referee's. Refused: nothing.
"""

from __future__ import annotations

from tightfit.core import Plan, Trace
from tightfit.levers import every
from tightfit.levers.interface import Share, Walked
from tightfit.plan.simulate import simulate, under

__all__ = ["Share", "shares"]


def shares(trace: Trace, plan: Plan) -> tuple[Share, ...]:
    """What each lever that `plan` uses buys and costs, in the order of `Lever`."""
    walked = Walked(
        planned=under(trace, plan),
        plan=plan,
        line=simulate(trace, plan),
        walk=lambda other: simulate(trace, other),
    )
    found = (each.share(walked) for each in every())
    return tuple(share for share in found if share is not None)
