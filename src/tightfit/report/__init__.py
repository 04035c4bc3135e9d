"""Results for people and for programs, from data alone.

Invariant: nothing here imports torch or runs a model; the same data always gives the same text.
"""

from tightfit.report.text import (
    explain,
    explanation,
    forecast_report,
    forecast_table,
    gpus_table,
    measurement_report,
    measurement_table,
    plan_report,
    proof_table,
)

__all__ = [
    "explain",
    "explanation",
    "forecast_report",
    "forecast_table",
    "gpus_table",
    "measurement_report",
    "measurement_table",
    "plan_report",
    "proof_table",
]
