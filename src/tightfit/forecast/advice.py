"""What would make a step fit, and what its forecast rests on."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from tightfit.catalog import gpu, gpu_names
from tightfit.core import (
    Category,
    Device,
    InvalidInput,
    Lever,
    Plan,
    Trace,
    Unsupported,
    format_bytes,
)
from tightfit.device.cost import NOMINAL_CUDA
from tightfit.forecast.recording import (
    HashableDevice,
    as_trained,
    optimizer_key,
    optimizer_record,
    sent_bytes,
    trace_setup,
)
from tightfit.forecast.room import CONTEXT_BYTES, MARGIN, usable_bytes
from tightfit.forecast.search import QUICK, can_hold_floor, fitted, least
from tightfit.forecast.setup import Progress, Setup, build_model
from tightfit.levers import allowed, exact_only, used
from tightfit.plan import lowest
from tightfit.plan.account import bytes_reserved, host_bytes
from tightfit.plan.indexed import rest
from tightfit.plan.planning import with_more_levers
from tightfit.report.text import how_it_fits
from tightfit.step.parallel import Strategy
from tightfit.step.run import static_bytes_by_category
from tightfit.trace.optimizer import OptimizerRecord


def floor(setup: Setup, device: Device) -> int:
    """Bytes that any step has at once, whatever its batch: weights, optimizer state, and gradients when it steps."""
    with as_trained(setup) as model:
        static = sum(static_bytes_by_category(model).values())
        gradients: int = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    if setup.optimizer == "none":
        return static // (setup.world_size if setup.strategy == Strategy.FSDP2.value else 1)
    record: OptimizerRecord = optimizer_record(*optimizer_key(setup), HashableDevice(device))
    if setup.strategy == Strategy.FSDP2.value:
        return (static + gradients) // setup.world_size + record.state_bytes
    return static + gradients * (2 if setup.strategy == Strategy.DDP.value else 1) + record.state_bytes


def advice_for(
    setup: Setup,
    device: Device,
    room: int,
    recorded: Trace,
    largest: int | None,
    longest: int | None,
    levers: frozenset[Lever] | None,
    progress: Progress,
    host_budget: int | None = None,
) -> Iterable[str]:
    """What would make it fit, cheapest first, each with its number."""
    static = recorded.static_bytes
    weights = static.get(Category.PARAMETERS.value, 0) + static.get(Category.QUANTISED.value, 0)
    if weights > room and not can_hold_floor(levers):
        yield (
            f"the weights alone take {format_bytes(weights)}, more than the {format_bytes(room)} that {device.name} "
            "leaves for tensors"
        )

    if levers is None:
        progress("trying other levers")
        yield from with_other_levers(recorded, room, host_budget)

    def tell(said: str, **changed: Any) -> Iterator[str]:
        progress(f"trying {said}")
        try:
            if floor(dataclasses.replace(setup, **changed), device) > room and not can_hold_floor(levers):
                return
            other = trace_setup(dataclasses.replace(setup, **changed), device)
            rest()
        except (InvalidInput, Unsupported):
            return
        found = least(other, room, levers, host_budget)
        if found.runs:
            yield f"{said} fits: from {format_bytes(found.peak_bytes)} on"

    if setup.optimizer == "adamw":
        yield from tell("the fused optimizer (--optimizer adamw-fused)", optimizer="adamw-fused")
    if largest and largest < setup.batch:
        yield f"a batch of {largest} instead of {setup.batch} fits at {setup.seq} tokens"
    if longest and longest < setup.seq:
        yield f"sequences of {longest} instead of {setup.seq} tokens fit at a batch of {setup.batch}"
    if setup.optimizer in ("adamw", "adamw-fused") and setup.method == "full":
        yield from tell("an 8-bit optimizer (--optimizer adamw8bit)", optimizer="adamw8bit")
        yield from tell("a paged 8-bit optimizer (--optimizer paged-adamw8bit)", optimizer="paged-adamw8bit")
    if setup.method == "full":
        yield from tell("LoRA (--method lora)", method="lora")
    if setup.method != "qlora":
        yield from tell("QLoRA in 4 bits (--method qlora)", method="qlora")
    low = lowest(recorded, effort=QUICK, levers=levers, host_budget=host_budget)
    cards = sorted((g for g in map(gpu, gpu_names()) if g.kind == device.kind), key=lambda g: g.memory_bytes)
    first = bisect.bisect_left(cards, True, key=lambda g: bytes_reserved(recorded, low, usable_bytes(g)) is not None)
    larger = cards[first:]
    if larger:
        yield (
            f"a card with {format_bytes(larger[0].memory_bytes)} is the smallest in the catalog that holds it "
            f"({', '.join(g.name for g in larger if g.memory_bytes == larger[0].memory_bytes)})"
        )


def with_other_levers(recorded: Trace, room: int, host_budget: int | None) -> Iterator[str]:
    """The fewest levers that are no default and make it fit, as they are asked for: without tiles, if that will do."""

    def fits(made: Plan) -> bool:
        return made.peak_bytes <= room and bytes_reserved(recorded, made, room) is not None

    for allowed_now in (exact_only(None), None) if recorded.tiled else (exact_only(None),):
        found = with_more_levers(recorded, effort=QUICK, levers=allowed_now, host_budget_bytes=host_budget, fits=fits)
        if found is None:
            continue
        enough, made = found
        asked = ",".join(each.lever.value for each in (*allowed(allowed_now), *enough.levers))
        waiting = sum(host_bytes(recorded, made).values())
        beside = f", and {format_bytes(waiting)} in host memory" if waiting else ""
        yield f"--levers {asked} fits: from {format_bytes(made.peak_bytes)} on{beside}, by {enough.nouns}"
        return


def more_in_host(recorded: Trace, room: int, levers: frozenset[Lever] | None, host_budget: int | None) -> Iterator[str]:
    """That the host budget is what binds, where it is."""
    if host_budget is None:
        return
    made = fitted(recorded, room, QUICK, levers)
    if made is not None:
        needed_bytes = sum(host_bytes(recorded, made).values())
        yield (
            f"the host budget of {format_bytes(host_budget)} is what binds: with {format_bytes(needed_bytes)} in host "
            "memory it fits"
        )


def essence(recorded: Trace, made: Plan) -> Iterable[str]:
    """The plan in at most four lines."""
    planned = [choice for choice in made.choices if not choice.keeps_all]
    if not made.replays:
        yield f"nothing is recomputed: the step fits {how_it_fits(made)}"
        if made.exact:
            return
    yield from (lever.said(made) for lever in used(made) if not lever.is_exact)
    yield f"{len(planned)} of {len(recorded.units)} units recompute part of what they make, {made.replays} replays"
    share = made.recompute_flops / made.forward_flops if made.forward_flops else 0.0
    yield f"recompute: {share:.1%} of the forward's FLOPs, plan {made.status.value}"
    yield f"peak {format_bytes(made.peak_bytes)} of {format_bytes(made.unplanned_peak_bytes)} without a plan" + (
        "".join(f", {lever.summary}" for lever in used(made) if lever.is_exact and lever.how(made))
    )


def error_bar(device: Device) -> str:
    live = (
        f"live bytes: within {WORST_ERROR:.3%} of the CPU allocator's count on {ERROR_CASES} measured steps "
        "(benchmarks/forecast.py); "
    )
    kernels = (
        "the kernels are this machine's" if device.is_host else "the kernels of this device were not measured on a GPU"
    )
    if device.calibration:
        return (
            f"{live}{kernels}; usable memory, workspaces and rates were {device.calibration}, and {MARGIN:.0%} is kept "
            "free; seconds are estimated from those rates"
        )
    return (
        f"{live}{kernels}, so {MARGIN:.0%} and {format_bytes(CONTEXT_BYTES)} for the driver are kept free; seconds are "
        "estimated from the maker's rates"
    )


#: From benchmarks/results/forecast.json; a test compares.
WORST_ERROR, ERROR_CASES = 0.00005, 72


def kept_whole(recorded: Trace) -> Iterable[str]:
    reasons = sorted({unit.pinned for unit in recorded.units if unit.pinned})
    if reasons:
        count = sum(bool(unit.pinned) for unit in recorded.units)
        yield f"tightfit keeps {count} of {len(recorded.units)} units whole: {'; '.join(reasons)}"


def notes(setup: Setup, device: Device) -> Iterable[str]:
    if not device.is_host and device.kind != NOMINAL_CUDA.kind:
        yield f"{device.name}: kernels are taken to be CUDA's, which {device.kind}'s resemble but are not"
    if device.compute_capability is not None and device.compute_capability < 8.0 and setup.dtype.startswith("bf16"):
        yield f"{device.name} has no bfloat16 units, so bf16 runs at float32 speed there: use fp16"
    config = build_model(setup).config
    if getattr(config, "quantization_config", None) is not None:
        yield "the config names a quantisation of its own, which is not forecast: weights count in their plain dtype"
    if setup.method == "qlora":
        left = sum(p.numel() * p.element_size() for p in _packed_not(setup))
        if left:
            yield f"{format_bytes(left)} of expert weights are no torch.nn.Linear: bitsandbytes leaves them as they are"
    if device.name[:1].isdigit():
        yield "for a size alone, seconds are those of an A100's rates"


def spread_notes(setup: Setup, recorded: Trace) -> Iterable[str]:
    if setup.strategy == Strategy.ONE.value:
        return
    gathered, reduced = sent_bytes(recorded, setup)
    yield (
        f"each of {setup.world_size} ranks by {setup.strategy}, with a batch of its own; the figures are rank 0's, "
        "which never holds less than another"
    )
    yield (
        f"a rank receives {format_bytes(gathered)} of weights and sends {format_bytes(reduced)} of gradients in a "
        "step; the time of that is not in the seconds, nor are buffers that a library keeps outside torch's allocator"
    )
    if setup.strategy == Strategy.DDP.value:
        yield "DDP without gradient_as_bucket_view; with it, the gradients' bytes are saved"


def _packed_not(setup: Setup) -> list[nn.Parameter]:
    """Stacked expert weights (three dimensions), which bitsandbytes' layers do not take."""
    model = build_model(setup)
    return [p for p in model.parameters() if p.dim() == 3 and not p.requires_grad]
