"""Results for people and for programs, from data alone.

Invariant: nothing here imports torch or runs a model; the same data always gives the same text.
"""

from tightfit.report.exports import chrome_trace, memory_snapshot
from tightfit.report.exports import markdown as markdown_of
from tightfit.report.html import forecast_document, measurement_document, page, plan_document, run_document
from tightfit.report.picture import draw
from tightfit.report.site import site_page, site_summary
from tightfit.report.study import Study, study
from tightfit.report.text import (
    MODES,
    calibration_table,
    doctor_table,
    explain,
    explanation,
    forecast_report,
    forecast_table,
    gpus_table,
    measurement_report,
    measurement_table,
    plan_report,
    proof_table,
    run_table,
    sparkline,
)

__all__ = [
    "MODES",
    "Study",
    "calibration_table",
    "chrome_trace",
    "doctor_table",
    "draw",
    "explain",
    "explanation",
    "forecast_document",
    "forecast_report",
    "forecast_table",
    "gpus_table",
    "markdown_of",
    "measurement_document",
    "measurement_report",
    "measurement_table",
    "memory_snapshot",
    "page",
    "plan_document",
    "plan_report",
    "proof_table",
    "run_document",
    "run_table",
    "site_page",
    "site_summary",
    "sparkline",
    "study",
]
