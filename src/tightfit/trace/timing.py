"""Seconds of each op of a step that was run, from a few timings on a machine that may do other things too.

Idea: four things keep what else the machine does out of the figures.

1. On the host an op is timed by the processor time of the thread that called it. Time in which another process had the
   core is not in it. On a card an op is timed alone, from an empty queue to an empty queue.
2. Memory that a process touches for the first time costs a page fault for each page. Whether a page is new depends on
   what ran before, so the faults are counted and their time is taken out. An op that met new pages every time it ran,
   as with blocks that the system's allocator always maps anew, meets them again, and gets that time back.
3. Ops that do equal work are timings of one thing, and a lower quartile of them counts: what disturbs a timing makes it
   longer. Where they scatter, the step is run again for more of them (`in_doubt`).
4. What is left of the noise is weighed against what is known of ops in general. A roofline (seconds of a launch, of a
   FLOP, of a byte) is fitted through all ops by weighted medians. How far an op lies off it is believed as far as its
   own timings agree with each other: these are best linear unbiased predictions of two nested random effects, of the
   op's name and of the op, in the logarithm of its seconds.

Source: Robinson, "That BLUP is a good thing: the estimation of random effects", Statistical Science 6(1), 1991; for
the roofline: Williams, Waterman, Patterson, CACM 52(4), 2009.

Invariant: ops that are timings of one thing get the same seconds, above zero where any timing was. An op that was timed
without scatter gets what was timed.
Refused: nothing. An op without a timing is given none: zero seconds, as before it was asked.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from tightfit import accelerator
from tightfit.device.cost import LAUNCH_SECONDS

try:
    import resource
except ImportError:  # Windows has no such count; there all pages are taken to be used ones
    resource = None  # type: ignore[assignment]

__all__ = [
    "Equal",
    "Pace",
    "Sample",
    "Stopwatch",
    "fitted",
    "fresh_seconds_per_byte",
    "in_doubt",
    "is_disturbed",
    "is_short",
    "on_one_thread",
    "spread",
]


@dataclass(frozen=True, slots=True)
class Sample:
    """One timing of one op."""

    seconds: float
    faulted_bytes: int = 0  # of memory that the process touched for the first time meanwhile
    waited_seconds: float = 0.0  # that the thread had no processor, beside `seconds`

    def log_without_faults(self, fault_seconds_per_byte: float) -> float:
        """The logarithm of the seconds that it would have taken on memory that had been touched."""
        own = self.seconds - fault_seconds_per_byte * self.faulted_bytes
        return math.log(max(own, _OWN * self.seconds, _LEAST_SECONDS))


@dataclass(frozen=True, slots=True)
class Equal:
    """Ops of equal work, and how long they took."""

    name: str
    flops: int
    moved_bytes: int  # that each reads and makes
    calls: tuple[int, ...]
    samples: tuple[Sample, ...]  # of all of them

    @property
    def always_faulted_bytes(self) -> int:
        """New memory that one of them met each time it ran."""
        return min((sample.faulted_bytes for sample in self.samples), default=0)


#: A clock that is coarser than this cannot time an op.
_FINE_SECONDS = 1e-6
_thread_clock = (
    time.thread_time if time.get_clock_info("thread_time").resolution <= _FINE_SECONDS else time.perf_counter
)
_PAGE_BYTES = mmap.PAGESIZE


class Stopwatch:
    """Times one op after another on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.has_queue = accelerator.is_card(device)
        self._faults = 0
        self._started = self._started_on_thread = 0.0

    def start(self) -> None:
        if self.has_queue:
            accelerator.synchronize(self.device)
        else:
            self._faults = _faults()
            self._started_on_thread = _thread_clock()
        self._started = time.perf_counter()

    def stop(self) -> Sample:
        if self.has_queue:
            accelerator.synchronize(self.device)
            return Sample(time.perf_counter() - self._started)
        passed_seconds = time.perf_counter() - self._started
        seconds = _thread_clock() - self._started_on_thread
        return Sample(seconds, (_faults() - self._faults) * _PAGE_BYTES, passed_seconds - seconds)


def _faults() -> int:
    """Pages that all threads of this process have touched for the first time, so far."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_minflt


#: What is touched to see what new memory costs: far more than a processor's caches would hide, and a few milliseconds.
_TOUCHED_BYTES = 16 * 2**20
_TOUCHES = 3


@functools.cache
def _fault_seconds_per_byte(threads: int) -> float:
    """What the first write to a byte of memory takes longer than the second, with `threads` threads."""
    found = []
    for _ in range(_TOUCHES):
        memory = mmap.mmap(-1, _TOUCHED_BYTES)
        tensor = torch.frombuffer(memory, dtype=torch.float32)
        seconds = []
        for _ in range(2):
            started = _thread_clock()
            tensor.fill_(1.0)
            seconds.append(_thread_clock() - started)
        found.append((seconds[0] - seconds[1]) / _TOUCHED_BYTES)
        del tensor
        memory.close()
    return max(0.0, statistics.median(found))


#: Faults below this in all do not change a figure that matters.
_FEW_BYTES = 32 * 2**20


def _rate_of(faulted_bytes: int) -> float:
    """Seconds of a byte of them; none where they are so few that it is not worth finding out."""
    return _fault_seconds_per_byte(torch.get_num_threads()) if faulted_bytes > _FEW_BYTES else 0.0


#: No op takes less.
_LEAST_SECONDS = 1e-9

#: Of a timing, at least this part is the op's own: what faults take was measured with some other op.
_OWN = 0.2

#: By how much, in logarithms, ops of one name differ from ops in general, and ops of one name among themselves.
_NAMES_SPREAD = 1.0
_OPS_SPREAD = 0.3

#: How many timings the scatter of all ops together counts for, where an op has few of its own.
_PRIOR_SAMPLES = 3

#: Below this an op does next to nothing, and takes what a launch takes.
_SMALL_BYTES = 4096
_SMALL_FLOPS = 4096

#: Where the standard errors of the ops' seconds, added up, are more than this part of the step, it is timed once more.
_DOUBT = 0.1

#: A step below this is timed in the passes that are needed anyway, and once as a whole.
_SHORT_SECONDS = 0.02

#: What calling an op takes the host at most, beside the op: Python, and autograd's node.
_CALL_SECONDS = 2e-5

#: Where threads waited for this part of what they took, other processes took the processors.
_DISTURBED = 0.15

#: Timing on one thread takes as many times longer as there are threads, so with more than these it is not done.
_MOST_THREADS = 8

#: An op that takes less on one thread is run on one.
_ONE_THREAD_SECONDS = 5e-5


def fitted(groups: Iterable[Equal]) -> dict[int, float]:
    """Seconds of each op that was timed, by its number."""
    fit = _Fit.of(groups)
    found: dict[int, float] = {}
    for group, seconds in zip(fit.groups, fit.seconds(), strict=True):
        found.update((call, seconds) for call in group.calls)
    return found


@dataclass(frozen=True, slots=True)
class Pace:
    """What a step takes between its ops, as a part of each op: an op that runs again has it too."""

    call_seconds: float
    factor: float

    @classmethod
    def of(cls, seconds: Mapping[int, float], whole: Sample) -> Pace:
        """`whole`: the step of the ops that take `seconds`, in one timing.

        A call takes the host some time, so each op gets an equal part up to `_CALL_SECONDS`. The rest goes with the
        ops' own seconds: it is memory given back, and what a cache no longer has.
        """
        rate = _rate_of(whole.faulted_bytes)
        own_seconds = math.fsum(seconds.values())
        between = max(0.0, math.exp(whole.log_without_faults(rate)) - own_seconds)
        if not own_seconds:
            return cls(0.0, 1.0)
        each = min(_CALL_SECONDS, between / len(seconds))
        return cls(each, 1 + (between - each * len(seconds)) / own_seconds)

    def paced(self, seconds: Mapping[int, float]) -> dict[int, float]:
        return {call: self.factor * own + self.call_seconds for call, own in seconds.items()}


def fresh_seconds_per_byte(groups: Iterable[Equal], whole: Sample, risen_bytes: int) -> float:
    """What a step whose live bytes rise by a byte less takes less, since it touches less new memory.

    `risen_bytes`: by how much those of the step in `whole` rose. What ops meet each time they run is in their seconds.
    The rest is taken to be in proportion to the rise: the system's allocator gives back what is free at the top of its
    heap, and that is most when a step has ended.
    """
    always_bytes = sum(len(group.calls) * group.always_faulted_bytes for group in groups)
    by_chance_bytes = whole.faulted_bytes - always_bytes
    if by_chance_bytes < _FEW_BYTES or risen_bytes <= 0:
        return 0.0
    return _fault_seconds_per_byte(torch.get_num_threads()) * min(1.0, by_chance_bytes / risen_bytes)


def is_short(groups: Iterable[Equal]) -> bool:
    """Does the step take so little that what it is planned by is not worth more runs?"""
    total = math.fsum(
        len(group.calls) * min(sample.seconds for sample in group.samples) for group in groups if group.samples
    )
    return total < _SHORT_SECONDS


def is_disturbed(groups: Iterable[Equal]) -> bool:
    """Had other processes the processors for much of the time that ops on several threads took?

    Then one thread of an op waits for another that has no processor, which takes processor time too, and makes short
    ops many times as long.
    """
    samples = [sample for group in groups for sample in group.samples]
    waited_seconds = math.fsum(sample.waited_seconds for sample in samples)
    own_seconds = math.fsum(sample.seconds for sample in samples)
    return 1 < torch.get_num_threads() <= _MOST_THREADS and waited_seconds > _DISTURBED * own_seconds


@contextlib.contextmanager
def on_one_thread() -> Iterator[None]:
    """Ops inside run on the calling thread alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def spread(sample: Sample) -> Sample:
    """What an op that was timed on one thread would take on as many as there are, if it divides its work well."""
    own_seconds = sample.seconds - _fault_seconds_per_byte(1) * sample.faulted_bytes
    if own_seconds < _ONE_THREAD_SECONDS:
        return sample
    return Sample(own_seconds / torch.get_num_threads() + (sample.seconds - own_seconds), sample.faulted_bytes)


def in_doubt(groups: Iterable[Equal]) -> bool:
    """Do the timings scatter so much that more of them are worth another run of the step?"""
    fit = _Fit.of(groups)
    seconds = [math.exp(log) * len(group.calls) for group, log in zip(fit.groups, fit.logs, strict=True)]
    errors = [each * math.sqrt(variance) for each, variance in zip(seconds, fit.variances, strict=True)]
    return not seconds or math.fsum(errors) > _DOUBT * math.fsum(seconds)


@dataclass(frozen=True)
class _Fit:
    """What the timings of each group say, and how sure they are."""

    groups: tuple[Equal, ...]  # those with a timing
    fault_seconds_per_byte: float
    logs: tuple[float, ...]  # of the seconds of an op, without faults
    variances: tuple[float, ...]  # of those logarithms

    @classmethod
    def of(cls, groups: Iterable[Equal]) -> _Fit:
        timed = tuple(group for group in groups if group.samples)
        faulted_bytes = sum(sample.faulted_bytes for group in timed for sample in group.samples)
        rate = _rate_of(faulted_bytes)
        logs = [sorted(sample.log_without_faults(rate) for sample in group.samples) for group in timed]
        return cls(timed, rate, tuple(each[_quarter(each)] for each in logs), tuple(_variances(logs)))

    def seconds(self) -> list[float]:
        """Of an op of each group."""
        line = _Roofline.through(self.groups, [math.exp(log) for log in self.logs])
        off = [log - math.log(line.seconds(group)) for group, log in zip(self.groups, self.logs, strict=True)]
        weights = [1 / (_OPS_SPREAD**2 + variance) for variance in self.variances]
        named: dict[str, list[int]] = defaultdict(list)
        for i, group in enumerate(self.groups):
            named[group.name].append(i)
        found = [0.0] * len(self.groups)
        for ops in named.values():
            weight = math.fsum(weights[i] for i in ops) + 1 / _NAMES_SPREAD**2
            of_name = math.fsum(weights[i] * off[i] for i in ops) / weight
            for i in ops:
                of_op = _OPS_SPREAD**2 * weights[i] * (off[i] - of_name)
                new = self.fault_seconds_per_byte * self.groups[i].always_faulted_bytes
                found[i] = line.seconds(self.groups[i]) * math.exp(of_name + of_op) + new
        return found


def _quarter(ordered: Sequence[float]) -> int:
    """The place of the lower quartile."""
    return (len(ordered) - 1) // 4


def _variances(logs: Sequence[Sequence[float]]) -> list[float]:
    """Of the lower quartile of each op's sorted timings: from their own scatter, and from all ops' where these are few.

    The scatter is what lies between the lower quartile and the median, as disturbances reach far above.
    """
    scatters = [((each[len(each) // 2] - each[_quarter(each)]) / _QUARTILE) ** 2 for each in logs]
    several = [scatter for scatter, each in zip(scatters, logs, strict=True) if len(each) > 1]
    usual = statistics.median(several) if several else _OPS_SPREAD**2
    found = []
    for scatter, each in zip(scatters, logs, strict=True):
        further = len(each) - 1  # one timing has no scatter
        of_one = (_PRIOR_SAMPLES * usual + further * scatter) / (_PRIOR_SAMPLES + further)
        found.append(of_one * _OF_QUARTILE / len(each))
    return found


#: Between the lower quartile and the median of a normal distribution, in standard deviations.
_QUARTILE = 0.6745

#: The variance of the lower quartile of many over that of their mean, for a normal distribution.
_OF_QUARTILE = 1.857


@dataclass(frozen=True, slots=True)
class _Roofline:
    """Seconds of any op, roughly."""

    launch_seconds: float
    seconds_per_flop: float
    seconds_per_byte: float

    def seconds(self, group: Equal) -> float:
        work = self.seconds_per_flop * group.flops + self.seconds_per_byte * group.moved_bytes
        return self.launch_seconds + work

    @classmethod
    def through(cls, groups: Sequence[Equal], seconds: Sequence[float]) -> _Roofline:
        pairs = list(zip(groups, seconds, strict=True))
        small = [each for group, each in pairs if group.moved_bytes <= _SMALL_BYTES and group.flops <= _SMALL_FLOPS]
        launch = statistics.median_low(small) if small else min([LAUNCH_SECONDS, *seconds])
        per_byte = _weighted_median(
            (max(0.0, each - launch) / group.moved_bytes, group.moved_bytes * len(group.calls))
            for group, each in pairs
            if group.moved_bytes and not group.flops
        )
        per_flop = _weighted_median(
            (max(0.0, each - launch - per_byte * group.moved_bytes) / group.flops, group.flops * len(group.calls))
            for group, each in pairs
            if group.flops
        )
        return cls(launch_seconds=launch, seconds_per_flop=per_flop, seconds_per_byte=per_byte)


def _weighted_median(pairs: Iterable[tuple[float, float]]) -> float:
    """Of (value, weight); 0 where there are none."""
    ordered = sorted(pairs)
    half = sum(weight for _, weight in ordered) / 2
    for value, weight in ordered:
        half -= weight
        if half <= 0:
            return value
    return 0.0
