"""The traps of this stack: which are in the installed versions, which bite the model or run at hand, and the mend.

`findings` runs every trap's probe on the installed versions and inspects what is given: a run's YAML (`doctor.run`), a
live model, the peak of its step (`doctor.peak`). What is given is never run or changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tightfit import accelerator
from tightfit.core import Device, Unsupported, to_json
from tightfit.device.cost import NOMINAL_CUDA
from tightfit.doctor.peak import Fix, Rung, Why, explain_peak, why_of_trace
from tightfit.doctor.run import Case, Run, case_of, is_true, read_run, setup_of
from tightfit.doctor.traps.known import TRAPS, probed
from tightfit.doctor.traps.trap import Seen, Trap, Verdict, cannot_tell
from tightfit.forecast import Progress, Setup
from tightfit.step.environment import calibrated_here, calibration_here, versions
from tightfit.step.run import LossFunction
from tightfit.trace.recording import trace

__all__ = [
    "TRAPS", "Case", "Finding", "Fix", "Run", "Rung", "Seen", "Trap", "Verdict", "Why", "case_of", "document",
    "examine", "explain_peak", "findings", "peak_of", "probed", "read_run", "setup_of",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A trap, with what the probe saw in the installed versions and what was seen in what was given."""

    name: str
    sentence: str
    verdict: Verdict
    why: str
    mend: str
    stack: Seen
    here: Seen | None
    versions: Mapping[str, str]


def findings(
    *,
    run: Run | None = None,
    model: nn.Module | None = None,
    peak: Why | None = None,
    setup: Setup | None = None,
    deep: bool = False,
    progress: Progress = lambda _: None,
) -> tuple[Finding, ...]:
    """One finding per trap. Of a trap that the installed versions do not have it is said that it does not bite.

    Without a run, a model, a peak or a setup a trap bites when the installed versions have it.
    """
    given = any(each is not None for each in (run, model, peak, setup))
    found = []
    for trap in TRAPS:
        progress(f"probing {trap.name}")
        stack = probed(trap, deep=deep)
        here = _here(trap, run, model, peak, setup) if given else None
        shown = stack
        if given:
            here = here or cannot_tell(f"nothing that was given says so: give {trap.asks}")
            shown = stack if stack.verdict is Verdict.NOT_HERE else here
        installed = versions()
        found.append(
            Finding(
                name=trap.name,
                sentence=trap.sentence,
                verdict=shown.verdict,
                why=shown.why,
                mend=trap.mend,
                stack=stack,
                here=here,
                versions={package: installed[package] for package in trap.packages if package in installed},
            )
        )
    return tuple(found)


def peak_of(case: Case, *, kernels: str | None = None, progress: Progress = lambda _: None) -> tuple[Case, Why | None]:
    """Why the case's step does not save more, and the case with a note where its step cannot be traced.

    `kernels`: cuda or cpu; by default cuda, unless the run says `use_cpu`.
    """
    assert case.setup is not None
    if kernels is None:
        kernels = "cpu" if case.run is not None and is_true(case.run.get("use_cpu")) else "cuda"
    try:
        return case, explain_peak(
            case.setup,
            device=_device_of(kernels),
            progress=progress,
        )
    except Unsupported as error:
        return dataclasses.replace(case, notes=(*case.notes, f"the step's peak is not known: {error}")), None


def _device_of(kernels: str) -> Device | None:
    """Whose kernels and rates: those that were measured on this machine's device where it is of that kind."""
    device = torch.device(kernels)
    if accelerator.is_host(device):
        made = calibration_here(device)
        return None if made is None else made.device
    return calibrated_here(device, NOMINAL_CUDA)


def document(case: Case | None, found: Sequence[Finding], peak: Why | None, *, deep: bool) -> dict[str, Any]:
    """What `doctor --json` adds to the environment record; the text is made from it too."""
    notes = list(case.notes) if case is not None else []
    if not deep:
        notes += [f"{trap.name}: probed the quick way; --deep also compiles" for trap in TRAPS if trap.deep is not None]
    why = None
    if peak is not None:
        notes += peak.notes
        why = {
            **to_json(peak),
            "answer": peak.answer,
            "saved": 1 - peak.checkpointed.peak_bytes / peak.plain.peak_bytes,
        }
    return {
        "asked": None if case is None else case.asked,
        "trainer": None if case is None or case.run is None else case.run.trainer,
        "bites": [finding.name for finding in found if finding.verdict is Verdict.BITES],
        "traps": to_json(tuple(found)),
        "why_no_saving": why,
        "notes": notes,
    }


def _here(trap: Trap, run: Run | None, model: nn.Module | None, peak: Why | None, setup: Setup | None) -> Seen | None:
    seen: Seen | None = None
    if model is not None:
        seen = trap.of_model(model)
    if seen is None and run is not None:
        seen = trap.of_run(run)
    if seen is None and peak is not None:
        seen = trap.of_peak(peak)
    if seen is None and setup is not None and run is None:
        seen = trap.of_setup(setup)
    return seen


def examine(
    model: nn.Module,
    batch: Any = None,
    *,
    loss: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    progress: Progress = lambda _: None,
) -> tuple[Finding, ...]:
    """The findings for a live model, before its training: its switches, hooks and layers as they are now.

    With `batch` its step is traced on fake tensors too (`loss` and `optimizer` as for `trace`), for the traps about
    the owner of the peak. Nothing of the model is run or changed.
    """
    peak = None
    if batch is not None:
        recorded = trace(model, batch, loss=loss, optimizer=optimizer, fake=True)
        peak = why_of_trace(recorded, optimizer="")
    return findings(model=model, peak=peak, progress=progress)
