"""Fit a PyTorch training step into a byte budget.

The verbs are `trace`, `plan`, `simulate`, `apply`, `verify`, and `fit`, which is the first, second and fourth in
one call; `checkpoint` marks one region by hand; `enable`, `active` and `disable` are switches. The nouns are in
`tightfit.core`. Names that need torch are loaded when they are first used, so plans and traces can be read where torch
is not installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import tightfit.plan as plan  # a module that can be called: see core.make_verb
from tightfit.core import (
    BudgetInfeasible,
    InvalidInput,
    Plan,
    PlanMismatch,
    Proof,
    ReplayDiverged,
    Status,
    TightfitError,
    Timeline,
    Trace,
    Unsupported,
)
from tightfit.plan.simulate import simulate

if TYPE_CHECKING:
    from tightfit.engine import Applied, apply, checkpoint
    from tightfit.fitting.fit import fit
    from tightfit.fitting.switches import Activity, active, disable, enable
    from tightfit.trace.recording import trace
    from tightfit.verify.proving import verify

__version__ = "0.1.0"

__all__ = [
    "Activity",
    "Applied",
    "BudgetInfeasible",
    "InvalidInput",
    "Plan",
    "PlanMismatch",
    "Proof",
    "ReplayDiverged",
    "Status",
    "TightfitError",
    "Timeline",
    "Trace",
    "Unsupported",
    "active",
    "apply",
    "checkpoint",
    "disable",
    "enable",
    "fit",
    "plan",
    "simulate",
    "trace",
    "verify",
]

_LAZY = {
    "Activity": "tightfit.fitting.switches",
    "active": "tightfit.fitting.switches",
    "disable": "tightfit.fitting.switches",
    "enable": "tightfit.fitting.switches",
    "Applied": "tightfit.engine",
    "apply": "tightfit.engine",
    "checkpoint": "tightfit.engine",
    "fit": "tightfit.fitting.fit",
    "trace": "tightfit.trace",
    "verify": "tightfit.verify",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
