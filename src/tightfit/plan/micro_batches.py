"""Into how many micro-batches a global batch is cut: the fewest seconds among those that fit.

Idea: what a step takes grows with its batch, so there is a largest micro-batch that some plan fits into the budget. It
is looked for along the line through the least peaks of two sizes, and found when it fits and the next larger size does
not. It need not be the fastest: near the limit a plan recomputes much, and half the batch may recompute nothing. So
smaller sizes are planned too, until a plan adds nothing to its step and yet is not faster.

Only sizes are looked at that equal parts of the global batch have (10 rows: 10, 5, 4, 3, 2, 1): with the same number of
parts, smaller ones are better.

Invariant: every size that is said to fit, and every one that is said not to, was planned. No torch here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from tightfit.core import Lever, MicroBatch, MicroBatches, Phase, Plan, Trace
from tightfit.plan.effort import Effort
from tightfit.plan.planning import lowest
from tightfit.plan.simulate import simulate

__all__ = ["QUICK", "Attempt", "as_asked", "attempted", "largest_fitting", "shares", "sizes_of", "slices", "solved"]

#: Plans and measures one size.
Attempt = Callable[[int], MicroBatch]

#: Seconds of ops are measured once, so a prediction that is better by less decides nothing, and fewer parts win.
_ALIKE = 0.02
#: The next size that is looked at for its time is at most this part of the last.
_NEXT = 0.75
#: A plan that adds less than this to its step adds nothing.
_NOTHING = 0.005

QUICK = Effort(points=12, solver_seconds=0.3, proves=False)


def sizes_of(global_batch: int) -> tuple[int, ...]:
    """The sizes of the largest part, ascending, when `global_batch` rows are cut into 1, 2, 3, ... parts."""
    return tuple(sorted({-(-global_batch // parts) for parts in range(1, global_batch + 1)}))


def shares(rows: int, size: int) -> tuple[int, ...]:
    """`rows` cut into the fewest parts of at most `size`, as equal as can be, the larger ones first."""
    parts = -(-rows // size)
    least, more = divmod(rows, parts)
    return tuple(least + 1 if part < more else least for part in range(parts))


def slices(counts: Sequence[int]) -> tuple[slice, ...]:
    """Where parts of so many rows lie, one after the other."""
    return tuple(slice(end - count, end) for count, end in zip(counts, itertools.accumulate(counts), strict=True))


def attempted(
    size: int,
    global_batch: int,
    trace: Trace,
    plan: Plan | None,
    levers: frozenset[Lever] | None,
    launch_seconds: float = 0.0,
    host_budget: int | None = None,
) -> MicroBatch:
    """What is known of micro-batches of `size` from the step of one, recorded, and its plan (none: nothing fits).

    `launch_seconds`: what an op takes beside its own seconds.
    """
    accumulation = len(shares(global_batch, size))
    unplanned = simulate(trace).peak_bytes
    least = min(unplanned, lowest(trace, effort=QUICK, levers=levers, host_budget=host_budget).peak_bytes)
    if plan is None:
        return MicroBatch(
            size=size, accumulation=accumulation, fits=False, unplanned_peak_bytes=unplanned, least_peak_bytes=least
        )
    at_its_end = sum(op.seconds for op in trace.ops if op.phase is Phase.OPTIMIZER) + plan.other_seconds
    launches = sum(op.phase is not Phase.OPTIMIZER for op in trace.ops) * launch_seconds
    return MicroBatch(
        size=size,
        accumulation=accumulation,
        fits=True,
        unplanned_peak_bytes=unplanned,
        least_peak_bytes=min(least, plan.peak_bytes),
        seconds=accumulation * (plan.step_seconds - at_its_end + launches) + at_its_end,
        slowdown=plan.slowdown,
    )


def largest_fitting(
    sizes: tuple[int, ...], attempt: Attempt, budget_bytes: int, tried: dict[int, MicroBatch]
) -> int | None:
    """The largest of `sizes` (ascending) that fits; none: not even the first. `tried`: what is known already, and what
    becomes known here."""
    low, high = -1, len(sizes)  # the place of one that fits, and of one that does not
    place = 0
    while high - low > 1:
        size = sizes[place]
        if size not in tried:
            tried[size] = attempt(size)
        low, high = (place, high) if tried[size].fits else (low, place)
        # a size beyond one that does not fit, or below one that does, may have been tried before
        for known, each in enumerate(sizes):
            if each in tried and low < known < high:
                low, high = (known, high) if tried[each].fits else (low, known)
        place = _guess(sizes, budget_bytes, tried, low, high)
    return sizes[low] if low >= 0 else None


def _guess(sizes: tuple[int, ...], budget_bytes: int, tried: dict[int, MicroBatch], low: int, high: int) -> int:
    """The place to look at next, strictly between `low` and `high`: where the line through the two nearest least peaks
    meets the budget."""
    first, last = low + 1, high - 1
    known = sorted(tried.values(), key=lambda each: abs(each.least_peak_bytes - budget_bytes))[:2]
    if len(known) < 2 or known[0].least_peak_bytes == known[1].least_peak_bytes:
        return min(first + 1, last) if len(known) < 2 and low >= 0 else (first + last) // 2
    one, other = known
    slope = (other.least_peak_bytes - one.least_peak_bytes) / (other.size - one.size)
    if slope <= 0:
        return (first + last) // 2
    size = one.size + (budget_bytes - one.least_peak_bytes) / slope
    place = max((place for place, each in enumerate(sizes) if each <= size), default=first)
    return min(max(place, first), last)


def solved(
    global_batch: int, attempt: Attempt, budget_bytes: int, tried: dict[int, MicroBatch] | None = None
) -> MicroBatches | None:
    """The size by which a global batch takes the fewest seconds within the budget; none: nothing fits."""
    sizes = sizes_of(global_batch)
    tried = {} if tried is None else tried
    largest = largest_fitting(sizes, attempt, budget_bytes, tried)
    if largest is None:
        return None
    best = last = tried[largest]
    while last.slowdown > 1 + _NOTHING or last is best:
        smaller = [size for size in sizes if size <= last.size * _NEXT]
        if not smaller:
            break
        size = smaller[-1]
        if size not in tried:
            tried[size] = attempt(size)
        before, last = last, tried[size]
        best = min(best, last, key=lambda each: each.seconds)
        if last is not best and before is not best:
            break  # it gets slower and slower
    alike = [each for each in tried.values() if each.fits and each.seconds <= best.seconds * (1 + _ALIKE)]
    chosen = min(alike, key=lambda each: each.accumulation)
    return MicroBatches(
        global_batch=global_batch,
        size=chosen.size,
        accumulation=chosen.accumulation,
        largest=largest,
        budget_bytes=budget_bytes,
        seconds=chosen.seconds,
        tried=tuple(sorted(tried.values(), key=lambda each: each.size)),
    )


def as_asked(global_batch: int, only: MicroBatch, budget_bytes: int) -> MicroBatches:
    """The micro-batches of a size that was not chosen among others."""
    return MicroBatches(
        global_batch=global_batch, size=only.size, accumulation=only.accumulation, largest=only.size,
        budget_bytes=budget_bytes, seconds=only.seconds, tried=(only,),
    )  # fmt: skip
