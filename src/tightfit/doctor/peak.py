"""Why no saving? The owner of a step's peak with every block checkpointed, and the fixes, each simulated.

Invariant: no fix is named with a number that was not simulated on the trace of the step as it would then be. Refused:
what `forecast.trace_setup` refuses.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tightfit.core import Category, Device, InvalidInput, Phase, Timeline, Trace, Unsupported, format_bytes
from tightfit.device.cost import NOMINAL_CPU, NOMINAL_CUDA, retimed
from tightfit.forecast import Progress, Setup, trace_setup
from tightfit.levers.loss_in_place import reaches, with_loss_in_place
from tightfit.plan import Effort, every_block, lowest, plan, simulate

__all__ = ["NOTHING", "Fix", "Rung", "Why", "explain_peak", "why_of_trace"]

#: Less than this part of a peak is nothing.
NOTHING = 0.02

# ------------------------------------------------------------------------------------- why no saving?


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One way to run the step, simulated: its peak and what is there at that moment."""

    peak_bytes: int
    owner: str
    phase: str  # forward, backward, replay, optimizer
    by_category: Mapping[str, int]
    recompute_flops: int
    forward_flops: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fix:
    """Something that would lower the peak, with the peak that its simulation gave."""

    name: str
    what: str
    costs: str
    before_bytes: int
    peak_bytes: int
    owner: str
    recompute_flops: int
    forward_flops: int
    helps: bool  # by at least 2 % of the peak


@dataclass(frozen=True, slots=True, kw_only=True)
class Why:
    """Who owns the peak of a step with every block checkpointed, and the cheapest fix. Bytes are simulated."""

    setup: Setup | None
    optimizer: str  # as in `Setup`; empty: the caller's own
    plain: Rung  # no checkpointing
    checkpointed: Rung  # every block
    same_peak_recompute_flops: int | None  # tightfit's recompute for the peak of every block; none: no plan
    fixed_bytes: int  # what no checkpointing can move: weights, gradients, optimizer state, buffers, batch
    tried: tuple[Fix, ...]  # each alone, on top of every block, cheapest first
    cheapest: Fix | None
    steps: tuple[Fix, ...]  # one after the other: each on top of those before
    notes: tuple[str, ...] = ()  # of the trace
    whole_logits: bool = True  # are the logits ever there at once?

    @property
    def answer(self) -> str:
        plain, now = self.plain, self.checkpointed
        saved = 1 - now.peak_bytes / plain.peak_bytes
        told = (
            f"checkpointing every block takes the peak from {format_bytes(plain.peak_bytes)} to "
            f"{format_bytes(now.peak_bytes)} ({saved:.0%} saved); its owner is then: {now.owner}, where "
            + ", ".join(_largest(now.by_category))
            + " are live"
        )
        if self.cheapest is None:
            return f"{told}. No fix that was tried lowers it by {NOTHING:.0%}"
        best = self.cheapest
        return f"{told}. Cheapest fix: {best.what} ({best.costs}): {format_bytes(best.peak_bytes)}"


def _largest(by_category: Mapping[str, int]) -> list[str]:
    ranked = sorted(by_category.items(), key=lambda item: -item[1])[:3]
    return [f"{format_bytes(size)} of {name.replace('_', ' ')}" for name, size in ranked if size]


#: Plans here only have to be possible and near the best.
_EFFORT = Effort(points=12, solver_seconds=0.3, proves=False, is_estimated=True)

_FIXED = (
    Category.PARAMETERS, Category.QUANTISED, Category.GRADIENTS, Category.OPTIMIZER_STATE, Category.BUFFERS,
    Category.INPUTS, Category.WORKSPACE,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """How the step is run: what it is, and by which plan."""

    setup: Setup | None
    loss_in_place: bool = False
    least: bool = False  # the plan of the lowest peak in place of every block


def _rung(line: Timeline, recorded: Trace) -> Rung:
    return Rung(
        peak_bytes=line.peak_bytes,
        owner=line.peak_owner,
        phase=line.peak_owner.split()[0],
        by_category={category: rows[line.peak_event] for category, rows in line.by_category.items()},
        recompute_flops=line.recompute_flops,
        forward_flops=sum(op.flops for op in recorded.ops if op.phase is Phase.FORWARD),
    )


def explain_peak(setup: Setup, *, device: Device | None = NOMINAL_CUDA, progress: Progress = lambda _: None) -> Why:
    """Why checkpointing does not save more in the step of `setup`, and what would.

    `device`: whose kernels are taken (`None`: this machine's CPU). Raises as `forecast.trace_setup` does.
    """

    @functools.lru_cache(maxsize=8)
    def traced(asked: Setup) -> Trace:
        return retimed(trace_setup(asked, device), NOMINAL_CPU if device is None else device)

    return _explained(traced, setup, progress, on_gpu=device is not None, optimizer=setup.optimizer)


def why_of_trace(recorded: Trace, optimizer: str) -> Why:
    """The same of a step that was traced already, so that only what a plan can do is tried."""
    return _explained(lambda _: recorded, None, lambda _: None, on_gpu=False, optimizer=optimizer)


def _explained(
    traced: Callable[[Any], Trace], setup: Setup | None, progress: Progress, *, on_gpu: bool, optimizer: str
) -> Why:
    @functools.lru_cache(maxsize=64)
    def of(state: _State) -> Rung:
        recorded = traced(state.setup)
        if state.loss_in_place and not state.least:
            lever = with_loss_in_place(recorded)
            return _rung(simulate(lever, every_block(lever, effort=_EFFORT)), recorded)
        made = lowest(recorded, effort=_EFFORT) if state.least else every_block(recorded, effort=_EFFORT)
        return _rung(simulate(recorded, made), recorded)

    progress("tracing the step on fake tensors")
    start = _State(setup=setup)
    recorded = traced(setup)
    plain, now = _rung(simulate(recorded), recorded), of(start)
    tried = []
    for name, what, costs, state in _candidates(start, recorded, on_gpu):
        progress(f"trying {what}")
        fix = _tried(name, what, costs, state, now, of)
        if fix is not None:
            tried.append(fix)
    cheapest = next((fix for fix in tried if fix.helps), None)
    same = None
    if now.peak_bytes < plain.peak_bytes:
        same = simulate(recorded, plan(recorded, now.peak_bytes, effort=_EFFORT)).recompute_flops
    return Why(
        setup=setup,
        optimizer=optimizer,
        plain=plain,
        checkpointed=now,
        same_peak_recompute_flops=same,
        fixed_bytes=sum(now.by_category[category.value] for category in _FIXED),
        tried=tuple(tried),
        cheapest=cheapest,
        steps=tuple(_steps(start, now, traced, of, on_gpu, progress)),
        notes=recorded.notes,
        whole_logits=setup is None or setup.trainer == "model" or bool(recorded.losses),
    )


def _tried(name: str, what: str, costs: str, state: _State, before: Rung, of: Callable[[_State], Rung]) -> Fix | None:
    try:
        after = of(state)
    except (InvalidInput, Unsupported):  # a model that LoRA or 4 bits cannot be put on
        return None
    return Fix(
        name=name,
        what=what,
        costs=costs,
        before_bytes=before.peak_bytes,
        peak_bytes=after.peak_bytes,
        owner=after.owner,
        recompute_flops=after.recompute_flops,
        forward_flops=after.forward_flops,
        helps=after.peak_bytes <= before.peak_bytes * (1 - NOTHING),
    )


def _candidates(state: _State, recorded: Trace, on_gpu: bool) -> Iterator[tuple[str, str, str, _State]]:
    """(name, what to do, what it costs, the step then), cheapest first: what changes nothing but bytes, then what
    costs recompute, then what changes the batch's shape, then what changes the training."""
    setup = state.setup
    if reaches(recorded) and not state.loss_in_place and not state.least:
        yield (
            "loss-in-place", "the loss makes its gradient in place (tightfit's plan does)",
            "nothing: no recompute, the same bits", dataclasses.replace(state, loss_in_place=True),
        )  # fmt: skip
    if setup is not None and setup.optimizer == "adamw" and on_gpu:
        yield (
            "fused-optimizer", "the fused AdamW in place of the foreach one", "nothing: the same update in one kernel",
            dataclasses.replace(state, setup=dataclasses.replace(setup, optimizer="adamw-fused")),
        )  # fmt: skip
    if not state.least:
        yield (
            "tightfit-plan", "tightfit's plan of the lowest peak in place of every block",
            "recompute; where it tiles the loss, sums in another order",
            dataclasses.replace(state, least=True),
        )  # fmt: skip
    if setup is None:
        return
    if setup.batch > 1:
        half = setup.batch // 2
        yield (
            "smaller-batch", f"micro-batches of {half} instead of {setup.batch}, gradients accumulated",
            "more, smaller steps; gradients stay live in between",
            dataclasses.replace(state, setup=dataclasses.replace(setup, batch=half, accumulate=True)),
        )  # fmt: skip
    if setup.seq >= 128:
        yield (
            "shorter-sequences", f"sequences of {setup.seq // 2} instead of {setup.seq} tokens", "other data",
            dataclasses.replace(state, setup=dataclasses.replace(setup, seq=setup.seq // 2)),
        )  # fmt: skip
    if setup.optimizer in ("adamw", "adamw-fused"):
        yield (
            "8bit-optimizer", "AdamW with 8-bit state", "another optimizer",
            dataclasses.replace(state, setup=dataclasses.replace(setup, optimizer="adamw8bit")),
        )  # fmt: skip
    if setup.method == "full":
        yield (
            "lora", "LoRA in place of full fine-tuning", "another training",
            dataclasses.replace(state, setup=dataclasses.replace(setup, method="lora")),
        )  # fmt: skip


#: Fixes that leave what is trained as it is; one after the other, as many.
_HARMLESS, _MOST_STEPS = ("loss-in-place", "fused-optimizer", "tightfit-plan", "smaller-batch"), 4


def _steps(
    state: _State,
    before: Rung,
    traced: Callable[[Any], Trace],
    of: Callable[[_State], Rung],
    on_gpu: bool,
    progress: Progress,
) -> Iterator[Fix]:
    """The cheapest fix that helps, then the cheapest for the next owner of the peak, and so on."""
    for _ in range(_MOST_STEPS):
        for name, what, costs, after in _candidates(state, traced(state.setup), on_gpu):
            if name not in _HARMLESS:
                continue
            progress(f"then {what}")
            fix = _tried(name, what, costs, after, before, of)
            if fix is not None and fix.helps:
                yield fix
                state, before = after, of(after)
                break
        else:
            return
