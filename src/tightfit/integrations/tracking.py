"""What the callbacks tell a run's own loggers about its plan: numbers, under names that begin with `tightfit/`."""

from __future__ import annotations

from tightfit.core import Plan, Proof

__all__ = ["figures"]


def figures(plan: Plan | None, proof: Proof | None, peaks: list[int]) -> dict[str, float]:
    """`peaks`: bytes of the steps since the last log. What is not known is left out."""
    found: dict[str, float] = {"tightfit/peak_bytes": max(peaks)} if peaks else {}
    if plan is not None:
        found["tightfit/predicted_peak_bytes"] = plan.peak_bytes
        found["tightfit/unplanned_peak_bytes"] = plan.unplanned_peak_bytes
        found["tightfit/budget_bytes"] = plan.budget_bytes
        found["tightfit/predicted_slowdown"] = plan.slowdown
        found["tightfit/recompute_share"] = plan.recompute_seconds / plan.step_seconds if plan.step_seconds else 0.0
        found["tightfit/exact"] = float(plan.exact)
    if plan is not None and proof is not None:
        held = "identical" if plan.exact else "within_tolerance"
        found[f"tightfit/gradients_{held}"] = float(proof["gradients"].passed)
    return found
