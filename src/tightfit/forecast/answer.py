"""Will it run? `check` answers for one card, `which_gpus` for all of the catalog."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from tightfit.catalog import gpu_names
from tightfit.core import (
    Device,
    Forecast,
    Lever,
    Mode,
    Plan,
    Timeline,
    Trace,
    parse_host_budget,
    require_part,
)
from tightfit.device.cost import retimed
from tightfit.forecast.advice import (
    advice_for,
    error_bar,
    essence,
    floor,
    kept_whole,
    more_in_host,
    notes,
    spread_notes,
)
from tightfit.forecast.recording import reached, trace_for, trace_setup
from tightfit.forecast.room import card_named, leave_room, room_bytes
from tightfit.forecast.search import QUICK, SHOWN, can_hold_floor, fitted, largest_fitting, least
from tightfit.forecast.setup import Progress, Setup, build_model
from tightfit.levers import exact_only, inexact, ruled_out
from tightfit.plan import every_block, lowest, plan, simulate
from tightfit.plan.account import account, bytes_reserved, host_bytes
from tightfit.plan.indexed import collecting_at_rests
from tightfit.step.environment import environment
from tightfit.trace.fake import FakeStep
from tightfit.verify.measure import every_block_checkpointed

#: Where the lowest peak is below this many times the room, the layout may decide, and a coarser search may find what a
#: finer one does not.
_NEAR = 1.1


@collecting_at_rests()
def check(
    setup: Setup,
    device: Device,
    *,
    budget: str | int | None = None,
    search: bool = True,
    levers: frozenset[Lever] | None = None,
    progress: Progress = lambda _: None,
    traced: Callable[[Trace], None] = lambda _: None,
    host_budget: str | int | None = None,
) -> Forecast:
    """Whether the step of `setup` runs on `device`, and how.

    `budget`: what the allocator may take of the device, bytes or a percentage of its memory; all that is usable by
    default. `search` also looks for the largest batch and the longest sequence. `levers`: what the plan may use; by
    default what gives the same bits, and tiles where nothing else fits. `host_budget`: the most bytes that it may have
    wait in host memory. `traced` is given the trace that the plan is of, for a report. Raises as `trace_setup` does,
    and `InvalidInput` for a budget that is no size.
    """
    setup.checked()
    limit = parse_host_budget(host_budget)
    room = room_bytes(device, budget)
    leave_room(device, room)
    progress("tracing the step on fake tensors")
    recorded = trace_for(setup, device, tiles=levers is not None and bool(inexact(levers)))
    progress("planning")
    modes = [
        _mode("none", recorded, simulate(recorded), None, room),
        _blocks_mode(setup, device, recorded, room),
    ]
    # what does not depend on the batch is too much already
    hopeless = not can_hold_floor(levers) and floor(setup, device) > room
    made = None
    if not hopeless and _may_fit(recorded, room, modes[1], levers, limit):
        made = fitted(recorded, room, SHOWN, levers, limit, (True,))
        if made is None and lowest(recorded, effort=SHOWN, levers=levers, host_budget=limit).peak_bytes <= _NEAR * room:
            made = fitted(recorded, room, QUICK, levers, limit, (True,))
    if made is None and not hopeless and levers is None:
        progress("nothing exact fits: tracing the step in tiles")
        recorded = trace_for(setup, device, tiles=True)
        made = fitted(recorded, room, QUICK, None, limit, (False,)) if recorded.tiled else None
    traced(recorded)
    shown = made or lowest(recorded, effort=QUICK, levers=levers, host_budget=limit)
    modes.append(_mode("tightfit", recorded, simulate(recorded, shown), shown, room))
    modes = _compared(modes, setup)
    fits = made is not None
    largest = longest = None
    if search and hopeless:
        largest = longest = 0
    elif search:
        may_use = _levers_of(made) if levers is None else levers
        if may_use is None and recorded.tiled:  # as for the sizes that are looked at
            here = least(recorded.tiled[-1], room, exact_only(None), limit)
        else:
            here = least(recorded, room, may_use, limit)
        here = dataclasses.replace(here, runs=fits)
        static_bytes = sum(recorded.static_bytes.values())
        asked = (here, static_bytes, may_use, limit)
        by_batch = largest_fitting(setup, device, room, progress, "batch", *asked)
        by_length = largest_fitting(setup, device, room, progress, "seq", *asked, by_batch.tokens)
        largest, longest = by_batch.size, by_length.size
    waiting = {} if made is None else host_bytes(recorded, made)
    advice: tuple[str, ...] = ()
    if not fits:
        said = advice_for(setup, device, room, recorded, largest, longest, levers, progress, limit)
        advice = tuple(said) if hopeless else (*more_in_host(recorded, room, levers, limit), *said)
        advice = (*ruled_out(recorded, levers), *advice)
    return Forecast(
        model=setup.model,
        method=setup.method,
        batch=setup.batch,
        seq=setup.seq,
        dtype=setup.dtype,
        optimizer=setup.optimizer,
        gpu=device.name,
        gpu_bytes=device.memory_bytes,
        usable_bytes=room,
        fits=fits,
        modes=tuple(modes),
        plan=made,
        essence=tuple(essence(recorded, made)) if made is not None else (),
        largest_batch=largest,
        longest_seq=longest,
        advice=advice,
        error_bar=error_bar(device),
        notes=(
            *(ruled_out(recorded, levers) if fits else ()),
            *recorded.notes,
            *kept_whole(recorded),
            *notes(setup, device),
            *spread_notes(setup, recorded),
        ),
        environment=environment(),
        calibration=device.calibration,
        streamed_bytes=waiting.get(Lever.STREAM_WEIGHTS.value, 0),
        host_bytes=waiting,
        host_budget_bytes=limit,
        account=None if made is None else account(recorded, made, reserved_bytes=modes[-1].reserved_bytes),
    )


def _may_fit(
    recorded: Trace, room: int, blocks: Mode, levers: frozenset[Lever] | None, host_budget: int | None
) -> bool:
    """May a plan that is looked for with more effort be laid out in `room`? `blocks`: every block recomputed."""
    if levers is not None or blocks.peak_bytes <= room:
        return True
    found = lowest(recorded, effort=QUICK, levers=exact_only(None), host_budget=host_budget)
    return found.peak_bytes <= _NEAR * room


def _levers_of(made: Plan | None) -> frozenset[Lever] | None:
    """What the searches may use: all that is exact where the plan for the size that was asked for is, else everything.

    Inexact levers make every trace three times as long, so nobody gets them who did not need them.
    """
    if made is None or not made.exact:
        return None
    return exact_only(None)


def _mode(name: str, recorded: Trace, line: Timeline, made: Plan | None, room: int) -> Mode:
    reserved = bytes_reserved(recorded, made)
    assert reserved is not None
    within = bytes_reserved(recorded, made, room)
    fits = line.peak_bytes <= room and within is not None
    if fits and within is not None:
        reserved = min(reserved, within)  # on this card the allocator gives free segments back before it fails
    at_peak = {category: rows[line.peak_event] for category, rows in line.by_category.items()}
    step_seconds = sum(op.seconds for op in recorded.ops) + line.recompute_seconds
    step_seconds += 0.0 if made is None else made.added_seconds - made.recompute_seconds
    phase = line.peak_owner.split()[0]
    return Mode(
        mode=name,
        fits=fits,
        peak_bytes=line.peak_bytes,
        reserved_bytes=reserved,
        by_category={**at_peak, "allocator_slack": reserved - line.peak_bytes},
        peak_owner=line.peak_owner,
        peak_phase="backward" if phase == "replay" else phase,
        step_seconds=step_seconds,
        slowdown=1.0,
        recompute_flops=line.recompute_flops,
    )


def _compared(modes: Sequence[Mode], setup: Setup) -> list[Mode]:
    """`modes` with their slowdown against the first, and the tokens of a batch by their seconds."""
    tokens = setup.batch * setup.seq * (2 if setup.trainer == "dpo" else 1)  # of a pair, both
    return [
        dataclasses.replace(
            mode, slowdown=mode.step_seconds / modes[0].step_seconds, tokens_per_second=tokens / mode.step_seconds
        )
        for mode in modes
    ]


def _blocks_mode(setup: Setup, device: Device, recorded: Trace, room: int) -> Mode:
    """Every block recomputed. Where a unit cannot be planned, the step with torch.utils.checkpoint itself is traced."""
    if any(unit.pinned for unit in recorded.units):
        model = build_model(setup)
        with every_block_checkpointed(model):
            whole = retimed(trace_setup(setup, device, units=[""]), reached(device))
        mode = _mode("every-block", whole, simulate(whole), None, room)
        return dataclasses.replace(mode, recompute_flops=_flops(whole) - _flops(recorded))
    blocks = every_block(recorded, effort=QUICK)
    return _mode("every-block", recorded, simulate(recorded, blocks), blocks, room)


def _flops(recorded: Trace) -> int:
    return sum(op.flops for op in recorded.ops)


def which_gpus(
    setup: Setup,
    *,
    budget: str | int | None = None,
    levers: frozenset[Lever] | None = None,
    progress: Progress = lambda _: None,
    host_budget: str | int | None = None,
) -> list[Forecast]:
    """A forecast, without searches, for every GPU of the catalog: those that run it first, fastest first. `levers` and
    `host_budget`: as in `check`, for each of them."""
    setup.checked()
    limit = parse_host_budget(host_budget)
    tiles = levers is not None and bool(inexact(levers))
    if budget is not None:
        require_part(budget, "a device")
    traces: dict[tuple[str, bool, int, str], Trace] = {}
    found = []
    for name in gpu_names():
        device = card_named(name, one_of_many=True)
        progress(f"planning for {name}")
        step = FakeStep(device)
        kernels = (
            device.kind,
            step.flash,
            step.workspace_bytes,
            device.calibration,
        )  # devices that take the same share a trace
        if kernels not in traces:
            traces[kernels] = trace_setup(setup, device, tiles=tiles)
        recorded = retimed(traces[kernels], reached(device))
        room = room_bytes(device, budget)
        base = simulate(recorded)
        modes = [_mode("none", recorded, base, None, room)]
        made = (
            plan(recorded, base.peak_bytes, levers=levers, host_budget=limit)
            if modes[0].fits
            else fitted(recorded, room, QUICK, levers, limit)
        )
        if made is not None:
            modes.append(_mode("tightfit", recorded, simulate(recorded, made), made, room))
        modes = _compared(modes, setup)
        waiting = {} if made is None else host_bytes(recorded, made)
        found.append(
            Forecast(
                model=setup.model, method=setup.method, batch=setup.batch, seq=setup.seq, dtype=setup.dtype,
                optimizer=setup.optimizer, gpu=name, gpu_bytes=device.memory_bytes, usable_bytes=room,
                fits=made is not None, modes=tuple(modes), plan=made, essence=(), largest_batch=None, longest_seq=None,
                advice=(), error_bar=error_bar(device),
                notes=(*ruled_out(recorded, levers), *kept_whole(recorded), *notes(setup, device)),
                environment=environment(), calibration=device.calibration,
                streamed_bytes=waiting.get(Lever.STREAM_WEIGHTS.value, 0), host_bytes=waiting, host_budget_bytes=limit,
                account=None if made is None else account(recorded, made, reserved_bytes=modes[-1].reserved_bytes),
            )
        )  # fmt: skip
    return sorted(found, key=lambda f: (not f.fits, f.modes[-1].step_seconds if f.fits else f.gpu_bytes))
