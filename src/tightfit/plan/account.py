"""What a plan asks of a machine: bytes of the device, and bytes that wait elsewhere.

Idea: a plan's peak is what its tensors take of the device. The caching allocator reserves more for it, by rules that
are walked here. Each lever that moves bytes says how many wait elsewhere at once. They wait in one pool, and
whoever makes the pool knows what lies behind it: a file where one was asked for, else pinned memory for a card that
copies beside its compute, else pageable memory. Weights that are read from a mapped file need no room in the pool, and
are in the file. All together is the one account of the process.

Invariant: a lever's bytes are those that its buffers hold together, without rounding by the system that gives them out.
Not in the account: what tightfit neither allocates nor moves (Python and its libraries, the driver's context, data
loaders, memory that bitsandbytes pages by itself). Refused: nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from tightfit.core import Account, Backing, Plan, Trace, format_bytes
from tightfit.device.allocator import OutOfMemory, reserved_peak_bytes
from tightfit.levers import every, used
from tightfit.plan.indexed import without_collecting
from tightfit.plan.simulate import allocations, simulate, under

__all__ = [
    "account",
    "account_lines",
    "account_rows",
    "bytes_reserved",
    "has_caching_allocator",
    "host_bytes",
    "host_said",
    "laid_out",
]


def host_bytes(trace: Trace, plan: Plan) -> dict[str, int]:
    """By lever, the bytes that `plan` has wait in host memory, or in a file where one was named for them."""
    planned = under(trace, plan)
    found = {lever.lever.value: lever.host_bytes(planned, plan) for lever in used(plan)}
    return {name: size_bytes for name, size_bytes in found.items() if size_bytes}


def account(
    trace: Trace,
    plan: Plan,
    *,
    reserved_bytes: int | None = None,
    spilled: bool = False,
    mapped_bytes: Mapping[str, int] | None = None,
) -> Account:
    """What the step of `trace` takes of a machine under `plan`. `spilled`: what waits does so in a file.
    `mapped_bytes`: by lever, what was loaded by mapping a file and waits there, which only whoever applies the plan
    knows. `reserved_bytes`: where it is known already; by default that of a device with enough room."""
    if reserved_bytes is None:
        reserved_bytes = bytes_reserved(trace, plan)
        assert reserved_bytes is not None  # without a limit everything is laid out
    by_lever = host_bytes(trace, plan)
    # as the engine's pool decides
    backing = Backing.FILE if spilled else Backing.PINNED if trace.copies_beside else Backing.PAGEABLE
    in_files = {} if mapped_bytes is None else {n: min(s, mapped_bytes.get(n, 0)) for n, s in by_lever.items()}
    elsewhere = {name: size_bytes - in_files.get(name, 0) for name, size_bytes in by_lever.items()}
    waiting = {each: elsewhere if each is backing else {} for each in Backing}
    if any(in_files.values()):
        waiting[Backing.FILE] = by_lever if spilled else in_files
    waiting = {each: {name: size for name, size in sizes.items() if size} for each, sizes in waiting.items()}
    return Account(
        allocated_bytes=plan.peak_bytes,
        reserved_bytes=reserved_bytes,
        pinned_bytes=sum(waiting[Backing.PINNED].values()),
        pageable_bytes=sum(waiting[Backing.PAGEABLE].values()),
        file_bytes=sum(waiting[Backing.FILE].values()),
        waiting={each.value: sizes for each, sizes in waiting.items()},
    )


# ---------------------------------------------------------------------------------------- the device


def has_caching_allocator(trace: Trace) -> bool:
    """Does the device of `trace` reserve more than what lives? A card does; the CPU frees what is freed."""
    return trace.copies_beside


def bytes_reserved(trace: Trace, plan: Plan | None, room_bytes: int | None = None) -> int | None:
    """Most bytes reserved in a step, `None` when that fails; under `room_bytes` free segments are given back first."""
    if not has_caching_allocator(trace):
        return simulate(trace, plan).peak_bytes
    return laid_out(trace, *allocations(trace, plan), room_bytes)


@without_collecting()
def laid_out(
    trace: Trace, static: list[int], step: list[tuple[Hashable, int]], room_bytes: int | None = None
) -> int | None:
    """The same of blocks as `allocations` tells them, by the rules of the device's caching allocator."""
    try:
        return reserved_peak_bytes(static, step, limit_bytes=room_bytes, expandable=trace.expandable_segments)
    except OutOfMemory:
        return None


# ----------------------------------------------------------------------------------------- in words

_PLACES = {Backing.PINNED: "pinned host memory", Backing.PAGEABLE: "pageable host memory", Backing.FILE: "a file"}


def host_said(sizes_bytes: Mapping[str, int], limit_bytes: int | None = None) -> str:
    """`host_bytes` as a line, with the most that was to wait there; empty where nothing does."""
    nouns = {lever.lever.value: lever.waits for lever in every()}
    parts = ", ".join(f"{nouns[name]} {format_bytes(size_bytes)}" for name, size_bytes in sizes_bytes.items())
    of = "" if limit_bytes is None else f" of at most {format_bytes(limit_bytes)}"
    return f"{format_bytes(sum(sizes_bytes.values()))}{of}: {parts}" if sizes_bytes else ""


def account_rows(found: Account, limit_bytes: int | None = None) -> dict[str, str]:
    """`found` in words, by what it is about: the process, then what waits off the device, if anything does."""
    parts = [f"{format_bytes(found.allocated_bytes)} allocated"]
    if found.reserved_bytes != found.allocated_bytes:
        parts.append(f"{format_bytes(found.reserved_bytes)} reserved")
    device = f"{' and '.join(parts)} on the device"
    waiting = [(_PLACES[Backing(name)], sizes) for name, sizes in found.waiting.items() if sizes]
    elsewhere = [f"{format_bytes(sum(sizes.values()))} in {place}" for place, sizes in waiting]
    rows = {"the process": ", ".join([device, *(elsewhere or ["nothing waits elsewhere"])])}
    for name, sizes in found.waiting.items():
        if sizes:
            rows["in a file" if name == Backing.FILE.value else "in host memory"] = host_said(sizes, limit_bytes)
    return rows


def account_lines(found: Account, limit_bytes: int | None = None) -> list[str]:
    """The same for a terminal."""
    return [f"{name}: {said}" for name, said in account_rows(found, limit_bytes).items()]
