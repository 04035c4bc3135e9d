"""The nouns: errors, sizes, levers, recorded steps, plans, results, and how they are written down.

Invariant: no torch here, and nothing of the rest of tightfit. Types are frozen dataclasses, quantities end in their
unit, and every type survives a round trip through JSON.
"""

from __future__ import annotations

from tightfit.core.decided import Action, Advance, Choice, Plan, Status, Timeline
from tightfit.core.documents import SCHEMA_VERSION, dumps, from_json, loads, to_json
from tightfit.core.errors import (
    BudgetInfeasible,
    InvalidInput,
    PlanMismatch,
    ReplayDiverged,
    TightfitError,
    Unsupported,
    reason_of,
    refused_bytes,
)
from tightfit.core.files import output_file, write_bytes, write_text
from tightfit.core.formats import format_apart, format_bytes
from tightfit.core.levers import Lever, levers_named, parse_levers
from tightfit.core.recorded import (
    HOST_KIND,
    Category,
    Device,
    Event,
    EventKind,
    Frame,
    FrozenWeights,
    Kind,
    Loss,
    Op,
    OptimizerPart,
    OptimizerStep,
    ParameterBytes,
    Phase,
    Program,
    Saved,
    Step,
    Stretch,
    TiledModule,
    Tiling,
    Trace,
    Unit,
    Value,
)
from tightfit.core.results import AUTO, Check, Forecast, Measurement, MicroBatch, MicroBatches, Mode, Proof, Row
from tightfit.core.sizes import parse_batch, parse_bytes, parse_host_budget, percentage, require_part
from tightfit.core.verbs import make_verb

__all__ = [
    "AUTO",
    "HOST_KIND",
    "SCHEMA_VERSION",
    "Action",
    "Advance",
    "BudgetInfeasible",
    "Category",
    "Check",
    "Choice",
    "Device",
    "Event",
    "EventKind",
    "Forecast",
    "Frame",
    "FrozenWeights",
    "InvalidInput",
    "Kind",
    "Lever",
    "Loss",
    "Measurement",
    "MicroBatch",
    "MicroBatches",
    "Mode",
    "Op",
    "OptimizerPart",
    "OptimizerStep",
    "ParameterBytes",
    "Phase",
    "Plan",
    "PlanMismatch",
    "Program",
    "Proof",
    "ReplayDiverged",
    "Row",
    "Saved",
    "Status",
    "Step",
    "Stretch",
    "TightfitError",
    "TiledModule",
    "Tiling",
    "Timeline",
    "Trace",
    "Unit",
    "Unsupported",
    "Value",
    "dumps",
    "format_apart",
    "format_bytes",
    "from_json",
    "levers_named",
    "loads",
    "make_verb",
    "output_file",
    "parse_batch",
    "parse_bytes",
    "parse_host_budget",
    "parse_levers",
    "percentage",
    "reason_of",
    "refused_bytes",
    "require_part",
    "to_json",
    "write_bytes",
    "write_text",
]
