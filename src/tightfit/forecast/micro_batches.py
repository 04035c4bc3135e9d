"""Into how many micro-batches a global batch is cut on a card that is not there.

Idea: `plan.micro_batches` looks for the size by which a global batch takes the fewest seconds. Here a size is tried by
tracing its step on fake tensors, planning it and laying it out by the allocator's rules, as `check` does with a batch.
All micro-batches but the first find gradients in place, so a step that is cut is traced with them.

Invariant: what is said to fit is the plan of the answer. Refused: ranks, each of which has a batch of its own, and
global batches that are no number of sequences (`InvalidInput`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tightfit.core import Device, Forecast, InvalidInput, Lever, MicroBatch, MicroBatches, Trace, parse_host_budget
from tightfit.forecast.advice import floor
from tightfit.forecast.answer import check
from tightfit.forecast.recording import trace_for
from tightfit.forecast.room import leave_room, room_bytes
from tightfit.forecast.search import QUICK, can_hold_floor, fitted
from tightfit.forecast.setup import MOST_TOKENS, Progress, Setup
from tightfit.plan.micro_batches import as_asked, attempted, shares, solved

#: What a forecast cannot know of a loss.
UNCHECKED = (
    "a cut batch has the gradients of the whole one where the loss is a sum or a mean over rows or labels; check does "
    "not look at that, fit, measure and train do"
)


def check_micro_batches(
    setup: Setup,
    device: Device,
    global_batch: int,
    *,
    budget: str | int | None = None,
    search: bool = True,
    levers: frozenset[Lever] | None = None,
    progress: Progress = lambda _: None,
    traced: Callable[[Trace], None] = lambda _: None,
    host_budget: str | int | None = None,
) -> Forecast:
    """`check` of the micro-batches by which `global_batch` sequences take the fewest seconds on `device`.

    `Forecast.micro_batches` says which were looked at; none: not even single sequences fit, and the forecast is of
    these. Raises as `check` does, and `InvalidInput` for several ranks.
    """
    _require_meant(setup, global_batch)
    one = dataclasses.replace(setup, batch=1).checked()
    room, limit = room_bytes(device, budget), parse_host_budget(host_budget)
    leave_room(device, room)

    def cut(size: int) -> Setup:
        return dataclasses.replace(one, batch=size, accumulate=size < global_batch).checked()

    def attempt(size: int) -> MicroBatch:
        progress(f"micro-batches of {size}")
        asked = cut(size)
        least_bytes = 0 if can_hold_floor(levers) else floor(asked, device)
        if least_bytes > room:  # whatever the size
            return MicroBatch(
                size=size, accumulation=len(shares(global_batch, size)), fits=False, unplanned_peak_bytes=least_bytes,
                least_peak_bytes=least_bytes,
            )  # fmt: skip
        recorded = trace_for(asked, device)
        made = fitted(recorded, room, QUICK, levers, limit)
        return attempted(size, global_batch, recorded, made, levers, host_budget=limit)

    chosen = solved(global_batch, attempt, room)
    answer = check(
        cut(1 if chosen is None else chosen.size), device, budget=budget, search=search, levers=levers,
        progress=progress, traced=traced, host_budget=limit,
    )  # fmt: skip
    if chosen is None and answer.plan is not None and answer.fits:  # by tiles, which are only tried where nothing fits
        chosen = _by_whatever_fits(global_batch, answer)
    said = (UNCHECKED,) if chosen is not None and chosen.accumulation > 1 else ()
    return dataclasses.replace(answer, micro_batches=chosen, notes=(*answer.notes, *said))


def _by_whatever_fits(global_batch: int, answer: Forecast) -> MicroBatches:
    """Single sequences, by the plan of `answer`."""
    assert answer.plan is not None
    mode = answer.modes[-1]
    only = MicroBatch(
        size=1, accumulation=global_batch, fits=True, unplanned_peak_bytes=answer.plan.unplanned_peak_bytes,
        least_peak_bytes=mode.peak_bytes, seconds=global_batch * mode.step_seconds, slowdown=mode.slowdown,
    )  # fmt: skip
    return as_asked(global_batch, only, answer.usable_bytes)


def _require_meant(setup: Setup, global_batch: int) -> None:
    if not 1 <= global_batch <= MOST_TOKENS:
        raise InvalidInput(f"expected --global-batch of 1 to {MOST_TOKENS} sequences, not {global_batch}")
    if setup.world_size > 1:
        raise InvalidInput(
            f"--batch auto is for one device, and {setup.world_size} ranks were asked for, each with a batch of its "
            "own: give --batch a number"
        )
    if setup.accumulate:
        raise InvalidInput("--batch auto decides whether gradients are accumulated: leave --accumulate out")
