"""The usual exercise done right: one training step without checkpointing, with every block checkpointed, and planned.

Each row is measured on the same model, batch and random state: the peak by the allocator's own count of a whole step
with its optimizer, seconds interleaved so that noise falls on all alike, FLOPs counted op by op, gradients compared
bit by bit. "Every block" is `torch.utils.checkpoint` around each block, as tutorials do it.

Invariant: the model is left as it was found. Refused: a budget that nothing fits (`BudgetInfeasible`).
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tightfit.core import (
    Lever,
    LeversAsked,
    Measurement,
    MicroBatches,
    Plan,
    Row,
    Trace,
    Unsupported,
    format_bytes,
    parse_host_budget,
)
from tightfit.engine import apply
from tightfit.engine.limits import planned_here
from tightfit.levers import changes_optimizer, of_units
from tightfit.plan import every_block, simulate
from tightfit.plan import plan as make_plan
from tightfit.report.text import how_it_fits
from tightfit.step.environment import environment
from tightfit.step.modules import UnitsAsked, find_units
from tightfit.step.ops import op_flops
from tightfit.step.patches import MethodPatch, compiled_entries, no_key_value_cache
from tightfit.step.run import LossFunction, compute_loss, device_of
from tightfit.step.snapshot import undisturbed
from tightfit.trace.recording import trace
from tightfit.verify.float64 import against_float64
from tightfit.verify.gradients import Outcome, differences
from tightfit.verify.peak import PeakMeter, run_step, static_bytes, untrained
from tightfit.verify.rounding import TOLERANCE
from tightfit.verify.seconds import timed
from tightfit.verify.stepped import check_of_optimizer

__all__ = ["BESIDE", "CutStep", "FlopCount", "every_block_checkpointed", "measure"]

NONE, EVERY_BLOCK, TIGHTFIT = "none", "every-block", "tightfit"

#: Beside the default levers: nothing in this loop reads gradients after backward, so the optimizer may step there, and
#: its state has host memory.
BESIDE = LeversAsked({Lever.STEP_IN_BACKWARD, Lever.STATE_IN_HOST}, ())


@dataclass(frozen=True, slots=True, kw_only=True)
class CutStep:
    """A batch that runs in micro-batches under `plan`, which is theirs."""

    chosen: MicroBatches  # its `check` compares all of the batch, cut and uncut
    trace: Trace  # of `plan`
    plan: Plan
    part: Any  # a micro-batch
    backward: Callable[[Any], None]  # forward and backward of all of the batch
    whole: Trace | None = None  # the step of the batch uncut; none: nobody has recorded it yet


def measure(
    model: nn.Module,
    batch: Any,
    *,
    budget: str | int = "60%",
    loss: LossFunction | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    units: UnitsAsked = None,
    levers: Collection[Lever] | None = None,
    repeats: int = 3,
    progress: Callable[[str], None] = lambda _: None,
    described: dict[str, Any] | None = None,
    traced: Callable[[Trace], None] = lambda _: None,
    cut: CutStep | None = None,
    host_budget: str | int | None = None,
) -> Measurement:
    """Rows for no checkpointing, every block, and the plan by `levers` for `budget` (a percentage is of the unplanned
    peak). By default the plan may use what `plan` uses, the optimizer's step in backward, and its state in
    host memory.

    Raises `Unsupported` for a compiled model, and what `trace` and `plan` do.

    `repeats`: interleaved timed steps per row; the row has their median. `described` fills the fields that say
    what was measured (`model`, `method`, `batch`, `seq`, `dtype`). `traced` is given the trace, for a report.
    `cut`: what runs in place of a plan of the whole batch. `host_budget`: as in `plan`.
    """
    if compiled_entries(model):
        raise Unsupported(
            "the model is compiled, and measure counts the ops of uncompiled steps; tightfit.verify compares "
            "the compiled step with and without a plan"
        )
    recorded = None if cut is None else cut.whole
    if recorded is None:
        progress("tracing one step")
        recorded = trace(model, batch, loss=loss, optimizer=optimizer, units=units)
    traced(recorded if cut is None else cut.trace)
    progress("planning")
    if cut is None:
        beside = BESIDE if levers is None else ()
        chosen = planned_here(
            recorded, budget, parse_host_budget(host_budget), device_of(model),
            lambda budget, limit: make_plan(recorded, budget, levers=levers, beside=beside, host_budget=limit),
        )  # fmt: skip
    else:
        chosen = cut.plan
    held = of_units(chosen)
    blocks = every_block(recorded)
    paths = [unit.path for unit in recorded.units]
    modes: dict[str, tuple[Callable[[], AbstractContextManager[Any]], int]] = {
        NONE: (nullcontext, simulate(recorded).peak_bytes),
        EVERY_BLOCK: (lambda: every_block_checkpointed(model, units or paths), blocks.peak_bytes),
        TIGHTFIT: (lambda: apply(model, chosen, optimizer=optimizer), chosen.peak_bytes),
    }
    backward: dict[str, Callable[[Any], None]] = dict.fromkeys(
        modes, lambda batch: compute_loss(model, batch, loss).backward()
    )
    if cut is not None:
        backward[TIGHTFIT] = cut.backward
    forward_flops = sum(op.flops for op in recorded.ops if op.phase.value == "forward")
    with undisturbed(model, batch) as restart, no_key_value_cache(model):
        outcomes, flops = {}, {}
        for mode, (context, _) in modes.items():
            progress(f"gradients: {mode}")
            restart()
            with (
                apply(model, of_units(chosen)) if mode == TIGHTFIT else context(),
                FlopCount() as count,
                restart.watching(),
            ):
                backward[mode](batch)
            outcomes[mode], flops[mode] = Outcome(model), count.flops
        steps = _steps(model, batch, loss, optimizer, modes, restart, repeats, progress, backward)
        stepped_alike = True
        if optimizer is not None and changes_optimizer(chosen):
            progress("parameters and optimizer state: tightfit")
            part = batch if cut is None else cut.part
            stepped_alike = check_of_optimizer(model, part, chosen, loss, optimizer, restart).passed
    same = {mode: "differs" if differences(outcomes[NONE], outcomes[mode]) else "identical" for mode in outcomes}
    differs = same[TIGHTFIT] == "differs"
    if not stepped_alike:
        same[TIGHTFIT] = "differs"
    held = of_units(chosen)
    if cut is not None and cut.chosen.check is not None:  # sums in another order
        same[TIGHTFIT] = "within tolerance" if stepped_alike and cut.chosen.check.passed else "differs"
    elif (
        differs
        and stepped_alike
        and not chosen.exact
        and all(c.passed for c in against_float64(model, batch, held, loss))
    ):
        same[TIGHTFIT] = "within tolerance"
    rows = [
        Row(
            mode=mode,
            peak_bytes=max(step.peak_bytes for step in steps[mode]),
            predicted_peak_bytes=predicted_bytes,
            activation_peak_bytes=max(step.rise_bytes for step in steps[mode]),
            step_seconds=statistics.median(step.seconds for step in steps[mode]),
            recompute_flops=flops[mode] - flops[NONE],
            forward_flops=forward_flops,
            gradients="reference" if mode == NONE else same[mode],
        )
        for mode, (_, predicted_bytes) in modes.items()
    ]
    said = {"model": type(model).__name__, "method": "full", "batch": 0, "seq": 0, "dtype": "", **(described or {})}
    return Measurement(
        **said,
        device=str(device_of(model)),
        environment=environment(),
        rows=tuple(rows),
        budget_bytes=chosen.budget_bytes,
        plan=chosen,
        note=_note(model, rows, chosen),
        micro_batches=None if cut is None else cut.chosen,
    )


@contextlib.contextmanager
def every_block_checkpointed(model: nn.Module, units: UnitsAsked = None) -> Iterator[None]:
    """`torch.utils.checkpoint` (non-reentrant, random state preserved) around each unit."""

    def checkpointed(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(original, *args, use_reentrant=False, **kwargs)

        return forward

    patches = [MethodPatch(module, checkpointed) for module in find_units(model, units).values()]
    try:
        yield
    finally:
        for patch in patches:
            patch.undo()


@dataclass(frozen=True, slots=True, kw_only=True)
class _MeasuredStep:
    seconds: float
    peak_bytes: int
    rise_bytes: int


def _steps(
    model: nn.Module,
    batch: Any,
    loss: LossFunction | None,
    optimizer: torch.optim.Optimizer | None,
    modes: dict[str, tuple[Callable[[], AbstractContextManager[Any]], int]],
    restart: Callable[[], None],
    repeats: int,
    progress: Callable[[str], None],
    backward: Mapping[str, Callable[[Any], None]],
) -> dict[str, list[_MeasuredStep]]:
    """Whole steps of each mode, the modes taking turns."""
    device = device_of(model)
    found: dict[str, list[_MeasuredStep]] = {mode: [] for mode in modes}

    def step(mode: str) -> None:
        backward[mode](batch)
        if optimizer is not None:
            optimizer.step()

    with untrained(optimizer):
        progress("a step to warm up")
        restart()
        run_step(model, batch, loss, optimizer)  # the optimizer makes its state in its first step
        for repeat in range(repeats):
            for mode, (context, _) in modes.items():
                progress(f"step {repeat + 1} of {repeats}: {mode}")
                restart()
                with context():
                    before_bytes = static_bytes(model, optimizer, batch)
                    with PeakMeter(device) as meter:
                        seconds = timed(device, functools.partial(step, mode))
                found[mode].append(
                    _MeasuredStep(
                        seconds=seconds, peak_bytes=before_bytes + meter.rise_bytes, rise_bytes=meter.rise_bytes
                    )
                )
    return found


class FlopCount(TorchDispatchMode):
    """FLOPs of every op that really runs, replays included."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.flops += op_flops(func, args, kwargs or {}, out)
        return out


# -------------------------------------------------------------------------------------------- the verdict

#: Less than this part of the peak saved counts as nothing.
_NOTHING = 0.01


def _note(model: nn.Module, rows: list[Row], plan: Plan) -> str:
    footprint = getattr(model, "get_memory_footprint", None)
    weights_bytes = (
        footprint() if callable(footprint) else sum(p.numel() * p.element_size() for p in model.parameters())
    )
    said = [
        f"get_memory_footprint() says {format_bytes(weights_bytes)} in every row: it adds up parameters and buffers, "
        "and checkpointing changes only what lives between forward and backward."
    ]
    none = rows[0]
    said += [verdict for row in rows[1:] if (verdict := _backfires(none, row))]
    if len(said) == 1:
        said.append("Checkpointing pays off here: the bytes saved outweigh the time lost.")
    if not plan.exact:
        said.append(f"The plan computes the head and the loss in tiles: {TOLERANCE}.")
    if not plan.replays:
        said.append(f"The budget holds the step {how_it_fits(plan)}, so the plan recomputes nothing.")
    return " ".join(said)


def _backfires(none: Row, row: Row) -> str:
    """Why `row` is a bad bargain against `none`; empty when it is not one."""
    if not row.recompute_flops and row.peak_bytes >= none.peak_bytes * (1 - _NOTHING):
        return ""  # it changed nothing, which costs nothing
    saved = 1 - row.peak_bytes / none.peak_bytes
    # FLOPs stand for time where the machine is noisy: a step is about three forwards
    lost = row.recompute_flops / (3 * none.forward_flops) if none.forward_flops else 0.0
    clock = row.step_seconds / none.step_seconds - 1
    what = f"{row.mode} backfires for this shape"
    if saved < _NOTHING:
        return (
            f"{what}: it saves {max(saved, 0):.1%} of the peak and recomputes {lost:.0%} of the step's FLOPs "
            f"({clock:+.0%} on the clock)."
        )
    if saved < lost:
        return f"{what}: it saves {saved:.0%} of the peak for {lost:.0%} more FLOPs ({clock:+.0%} on the clock)."
    return ""
