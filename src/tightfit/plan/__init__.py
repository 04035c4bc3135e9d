"""Decide which values each unit keeps, so that the step fits its budget with the least recompute.

`tightfit.plan` is this package, called.

| module | what it decides or says |
|---|---|
| `planning` | the verb `plan`, the lowest peak, the book recipe |
| `ways` | one way to plan a trace: with which levers, nested or not, in segments or not |
| `frontier`, `mincut` | one unit, exactly: the least recompute for each number of kept bytes |
| `table` | what each option of each unit does to the live bytes of each moment |
| `choose`, `solver`, `lagrange` | one option for each unit, under the budget |
| `exact`, `moments` | the best choices for a whole step, value by value, and what is proven of them |
| `leaner`, `polish` | options with a lower moment of their own; more kept by the referee's word |
| `segments`, `nest` | long units cut into segments; unit inputs that are made again |
| `program` | what a choice makes a unit's program do |
| `simulate` | the referee: live bytes through the step under a plan |
| `casts` | autocast's copies of weights, which go and are made again |
| `shares` | which lever of a plan buys which bytes |
| `account` | what a plan takes of a machine: device, host memory, file |
| `advice` | what would make a step fit, where no plan does |
| `tighter` | what a tenth less would cost, where a plan does |
| `rebase` | a plan that was made of another recording, as a plan of this one |

Invariant: a plan is returned only after the referee has found it under the budget. No module here imports torch: a
trace that was read from JSON is enough. Refused: a budget below the least feasible peak (`BudgetInfeasible`, which says
that peak and what would lower it).
"""

from __future__ import annotations

from tightfit.core import make_verb
from tightfit.plan.effort import Effort
from tightfit.plan.planning import every_block, lowest, plan
from tightfit.plan.simulate import simulate

__all__ = ["Effort", "every_block", "lowest", "plan", "simulate"]

make_verb(__name__, "tightfit.plan.planning")
