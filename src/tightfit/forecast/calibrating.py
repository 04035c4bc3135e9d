"""Measure what the catalog estimates of the device that is here: usable memory, workspaces, rates, the allocator.

Each rate is the slope of a line through the times of several sizes, and each time is the median of several batches of
runs. The line is Theil's and Sen's, the median of the slopes between all pairs, so that a few disturbed times do not
move it. The spread that goes with a figure says how far the times lie from the line.

Invariant: what is taken of the device is given back, and random states are as before. Each figure is a part of its own:
one that could not be measured, or that no device can have, is named in `Calibration.estimated` and a note says why, and
the others stay. Refused (`Unsupported`): a device whose memory torch does not tell, and one of which no rate could be
measured.

Workspaces are measured first, because they are what the first products leave behind. Usable memory is read last: what
the driver takes for kernels and libraries comes with their first use, and a training step has used them too.
Source of the line: Sen, "Estimates of the regression coefficient based on Kendall's tau", JASA 63(324), 1968.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import itertools
import math
import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tightfit import accelerator
from tightfit.core import Device, Unsupported, format_bytes
from tightfit.device.calibration import Calibration, require_possible
from tightfit.device.cost import NOMINAL_CPU, NOMINAL_CUDA
from tightfit.forecast.setup import Progress
from tightfit.step.environment import environment
from tightfit.step.snapshot import random_states, restore_random_states

__all__ = ["Effort", "calibrate", "catalog_entry", "fitted_line"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long to look. `batch_seconds`: of one timing, for which a short op runs many times."""

    batches: int = 7
    batch_seconds: float = 0.02
    longest_seconds: float = 0.06  # sizes grow until one run takes as long
    sizes: int = 5  # that a line is laid through: the largest that were reached
    largest_bytes: int = 2**30  # of one tensor
    whole_seconds: float = 45.0  # after which one size of each thing has to do

    def __post_init__(self) -> None:
        assert self.batches >= 1 and self.sizes >= 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timed:
    amount: float  # FLOPs or bytes
    seconds: float  # median of the batches
    spread: float  # median distance of a batch from it, relative


#: Of one tensor on the host: beyond its caches, and moved in less than a second.
_HOST_BYTES = 2**28

#: Sizes that a line is laid through at least, and by how much a run may be too long for that.
_LEAST_SIZES, _FAR_TOO_LONG = 3, 8.0


class _Bench:
    """Times on one device, and how many there were."""

    def __init__(self, device: torch.device, effort: Effort) -> None:
        self.device, self.effort = device, effort
        self.samples, self.deadline = 0, time.perf_counter() + effort.whole_seconds
        self.spread: dict[str, float] = {}
        self.notes: list[str] = []
        free = accelerator.free_bytes(device)
        largest_bytes = effort.largest_bytes if accelerator.is_card(device) else min(effort.largest_bytes, _HOST_BYTES)
        # three tensors of the largest size, and room to spare
        self.largest_bytes = largest_bytes if free is None else min(largest_bytes, free // 12)

    def timed(self, amount: float, run: Callable[[], Any]) -> _Timed:
        """One call of `run`: the median over batches, the queue drained around each."""
        once = self._batch(run, 1)  # what is made in a first call is not timed: it is thrown away
        once = self._batch(run, 1)
        times = max(1, math.ceil(self.effort.batch_seconds / max(once, 1e-9)))
        batches = [self._batch(run, min(times, 10_000)) for _ in range(self.effort.batches)]
        self.samples += len(batches)
        middle = statistics.median(batches)
        off = statistics.median(abs(each - middle) for each in batches)
        return _Timed(amount=amount, seconds=middle, spread=off / middle)

    def _batch(self, run: Callable[[], Any], times: int) -> float:
        accelerator.synchronize(self.device)
        started = time.perf_counter()
        for _ in range(times):
            run()
        accelerator.synchronize(self.device)
        return (time.perf_counter() - started) / times

    def rate(self, name: str, sizes: Iterator[tuple[float, Callable[[], Any]]]) -> float:
        """What is done in a second, by a line through the times of the largest sizes. `sizes`: (amount, run), rising.

        Stops at the first that takes `longest_seconds`.
        """
        found: list[_Timed] = []
        for amount, run in sizes:
            found.append(self.timed(amount, run))
            seconds = found[-1].seconds
            if seconds > _FAR_TOO_LONG * self.effort.longest_seconds or time.perf_counter() > self.deadline:
                break
            if seconds > self.effort.longest_seconds and len(found) >= _LEAST_SIZES:
                break
        found = found[-self.effort.sizes :]
        start, slope = fitted_line([(each.amount, each.seconds) for each in found])
        if slope <= 0:  # too few sizes, or all of them disturbed: what the largest took, its launch included
            start, slope = 0.0, statistics.median(each.seconds / each.amount for each in found)
        off = [abs(start + slope * each.amount - each.seconds) / each.seconds for each in found]
        self.spread[name] = max(statistics.median(off), statistics.median(each.spread for each in found))
        return 1 / slope


def fitted_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(intercept, slope) of Theil's and Sen's line; the slope is 0 for a single point."""
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in itertools.combinations(points, 2) if x1 != x2]
    slope = statistics.median(slopes) if slopes else 0.0
    return statistics.median(y - slope * x for x, y in points), slope


def calibrate(
    device: torch.device, *, effort: Effort | None = None, progress: Progress = lambda _: None
) -> Calibration:
    """Measure `device`; less than a minute. Do it in a process of its own, before anything else has used the device."""
    states = random_states()
    try:
        return _calibrated(device, effort or Effort(), progress)
    finally:
        restore_random_states(states)


def _calibrated(device: torch.device, effort: Effort, progress: Progress) -> Calibration:
    began = time.perf_counter()
    memory_bytes = accelerator.memory_bytes(device)
    if memory_bytes is None:
        raise Unsupported(f"torch does not tell how much memory {device} has, so it cannot be calibrated")
    nominal = NOMINAL_CUDA if accelerator.is_card(device) else NOMINAL_CPU
    with torch.no_grad():
        torch.empty(1, device=device)  # what a first use makes is there now: the driver's context
    bench = _Bench(device, effort)
    parts = _Parts(bench, nominal, progress)
    workspace_bytes = parts.measured(
        "workspace_bytes", "what libraries keep for matrix products", lambda: _workspace_bytes(device)
    )
    with torch.no_grad():
        launch = parts.measured("launch_seconds", "the launch of an op", lambda: _launch_seconds(bench))
        flops_per_second = parts.measured(
            "flops_per_second", "matrix products", lambda: _product_rates(bench, progress)
        )
        moved = parts.measured("memory_bytes_per_second", "ops that only move bytes", lambda: _move_rate(bench))
        out = parts.measured(
            "d2h_bytes_per_second", "copies to the host",
            lambda: bench.rate("d2h_bytes_per_second", _copies(bench, outward=True)),
        )  # fmt: skip
        back = parts.measured(
            "h2d_bytes_per_second", "copies from the host",
            lambda: bench.rate("h2d_bytes_per_second", _copies(bench, outward=False)),
        )  # fmt: skip
    if parts.estimated.issuperset(_RATES):
        raise Unsupported(f"nothing could be measured on {device}: {bench.notes[0]}")
    if not accelerator.is_card(device) and (busy := _others_at_work()):
        bench.notes.append(busy)
    if workspace_bytes is None and accelerator.is_card(device) and (unknown := accelerator.peak_unknown(device)):
        bench.notes.append(f"workspaces were not measured: {unknown}")
    settings = {**accelerator.allocator_settings(device), **parts.settings(lambda: _rounding(device))}
    gc.collect()
    with contextlib.suppress(RuntimeError):
        accelerator.empty_cache()
    said: dict[str, str] = {}
    usable_bytes = parts.measured(
        "usable_bytes", "the memory that can be used", lambda: _usable_bytes(device, memory_bytes, said)
    )
    settings |= {**said, "float32_matmul_precision": torch.get_float32_matmul_precision()}
    today = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Calibration(
        device=Device(
            name=accelerator.model_of(device),
            memory_bytes=memory_bytes,
            flops_per_second=flops_per_second,
            memory_bytes_per_second=moved,
            h2d_bytes_per_second=back,
            d2h_bytes_per_second=out,
            source=f"measured by tightfit calibrate on {today[:10]}, torch {torch.__version__}",
            kind=accelerator.catalog_kind(device),
            compute_capability=accelerator.capability_of(device),
            usable_bytes=usable_bytes,
            workspace_bytes=workspace_bytes if accelerator.is_card(device) else 0,
            launch_seconds=launch,
            expandable_segments=_is_expandable(settings),
        ),
        date=today,
        seconds=time.perf_counter() - began,
        samples=bench.samples,
        spread=bench.spread,
        settings={name: _in_one_line(value) for name, value in settings.items()},
        environment=environment(),
        notes=tuple(map(_in_one_line, bench.notes)),
        estimated=tuple(sorted(parts.estimated)),
    )


#: Without any of these a file would say nothing.
_RATES = frozenset({
    "launch_seconds", "flops_per_second", "memory_bytes_per_second", "d2h_bytes_per_second", "h2d_bytes_per_second",
})  # fmt: skip


class _Parts:
    """The parts of a calibration, each of which may fail by itself."""

    def __init__(self, bench: _Bench, nominal: Device, progress: Progress) -> None:
        self.bench, self.nominal, self.progress = bench, nominal, progress
        self.estimated: set[str] = set()

    def measured(self, name: str, what: str, measure: Callable[[], Any]) -> Any:
        """The figure of `Device` that is called `name`; the estimate, with a note, where it could not be had."""
        self.progress(what)
        try:
            value = measure()
            if value is not None:
                require_possible(name, value)
            return value
        except Exception as error:  # of whatever kind: kernels, drivers and systems fail in their own ways
            self.bench.notes.append(f"{what}: could not be measured, so the estimate stays ({_first_line(error)})")
        self.estimated.add(name)
        with contextlib.suppress(RuntimeError):
            accelerator.empty_cache()
        return getattr(self.nominal, name)

    def settings(self, read: Callable[[], dict[str, str]]) -> dict[str, str]:
        try:
            return read()
        except Exception as error:
            self.bench.notes.append(f"the allocator's rounding could not be seen ({_first_line(error)})")
            return {}


def catalog_entry(made: Calibration, name: str) -> str:
    """The rates as TOML for TIGHTFIT_CATALOG, under `name`."""
    device, half = made.device, made.device.flops_per_second
    rates = {"fp32": half.get("float32", min(half.values())), "half": half.get("bfloat16", min(half.values()))}
    lines = [
        f"[gpus.{name}]", f"memory_gib = {device.memory_bytes / 2**30:.3f}",
        f"memory_gb_per_second = {device.memory_bytes_per_second / 1e9:.1f}",
        f"fp32_tflops = {rates['fp32'] / 1e12:.4f}", f"half_tflops = {rates['half'] / 1e12:.4f}", "bf16 = true",
        f"pcie_gb_per_second = {min(device.h2d_bytes_per_second, device.d2h_bytes_per_second) / 1e9:.1f}",
        f'kind = "{device.kind}"',
        *([] if device.compute_capability is None else [f"compute_capability = {device.compute_capability}"]),
        f'source = "measured here: {made.environment["platform"]}, torch {torch.__version__}"',
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------------------------------- what runs


def _launch_seconds(bench: _Bench) -> float:
    one = torch.zeros(1, device=bench.device)
    launch = bench.timed(1.0, lambda: one.add_(1.0))
    bench.spread["launch_seconds"] = launch.spread
    return launch.seconds


def _product_rates(bench: _Bench, progress: Progress) -> dict[str, float]:
    """By dtype; one that fails is left out, with a note. Raises the last error where all of them fail."""
    rates, failed = {}, None
    for dtype in _DTYPES:
        name = str(dtype).removeprefix("torch.")
        progress(f"matrix products in {name}")
        try:
            rates[name] = bench.rate(f"flops_per_second of {name}", _products(bench, dtype))
        except RuntimeError as error:
            failed = error
            bench.notes.append(f"matrix products in {name} were not measured: {_first_line(error)}")
    if failed is not None and not rates:
        raise failed
    return rates


def _move_rate(bench: _Bench) -> float:
    return statistics.median(
        bench.rate(f"memory_bytes_per_second of {name}", _moves(bench, name)) for name in ("add", "scale", "copy")
    )


def _products(bench: _Bench, dtype: torch.dtype) -> Iterator[tuple[float, Callable[[], Any]]]:
    """Square matrix products, each of about twice the FLOPs of the one before."""
    for step in itertools.count():
        width = round(128 * 2 ** (step / 3) / 32) * 32
        if width * width * dtype.itemsize > bench.largest_bytes:
            return
        left = torch.randn(width, width, device=bench.device).to(dtype)
        right, out = left.clone(), torch.empty_like(left)
        yield 2.0 * width**3, functools.partial(torch.mm, left, right, out=out)


def _moves(bench: _Bench, name: str) -> Iterator[tuple[float, Callable[[], Any]]]:
    """An op that reads and writes float32 and computes next to nothing, on sizes beyond any cache."""
    for size_bytes in _doubling(bench.largest_bytes // 16, bench.largest_bytes):
        left = torch.randn(size_bytes // 4, device=bench.device)
        right, out = left.clone(), torch.empty_like(left)
        if name == "add":
            yield 3.0 * left.nbytes, functools.partial(torch.add, left, right, out=out)
        elif name == "scale":
            yield 2.0 * left.nbytes, functools.partial(torch.mul, left, 2.0, out=out)
        else:
            yield 2.0 * left.nbytes, functools.partial(out.copy_, left)


def _copies(bench: _Bench, *, outward: bool) -> Iterator[tuple[float, Callable[[], Any]]]:
    """Copies as offload makes them: by way of pinned memory, or of the pool that stands outside torch's allocator."""
    for size_bytes in _doubling(bench.largest_bytes // 16, bench.largest_bytes // 2):
        here = torch.ones(size_bytes, dtype=torch.uint8, device=bench.device)
        if accelerator.has_streams(bench.device):
            away = accelerator.pinned(size_bytes)
        else:
            away = torch.frombuffer(mmap.mmap(-1, size_bytes), dtype=torch.uint8)
        away.fill_(1)
        source, target = (here, away) if outward else (away, here)
        yield float(size_bytes), functools.partial(target.copy_, source, non_blocking=True)


def _doubling(first: int, last: int) -> Iterator[int]:
    size = max(4096, first)
    while size <= max(4096, last):
        yield size
        size *= 2


# -------------------------------------------------------------------------------------------- memory


def _usable_bytes(device: torch.device, memory_bytes: int, said: dict[str, str]) -> int:
    """What the allocator can have now. What was subtracted goes into `said`; other processes' share is not told
    apart."""
    free = accelerator.free_bytes(device)
    if free is None:
        said["usable_bytes"] = "the driver does not tell what is free, so all of the memory is"
        return memory_bytes
    usable = free + (accelerator.reserved_bytes(device) or 0)
    cap = accelerator.allocator_settings(device).get("per_process_memory_fraction")
    if cap is not None:
        usable = min(usable, int(float(cap) * memory_bytes))
    usable = max(1, min(usable, memory_bytes))
    said["not_usable"] = format_bytes(memory_bytes - usable)
    return usable


def _workspace_bytes(device: torch.device) -> int | None:
    """What stays allocated after a forward and a backward of matrix products, when their tensors are gone.

    Autograd's thread has a handle of its own, and with it another workspace. None: nothing counts.
    """
    before = accelerator.allocated_bytes(device)
    if before is None:
        return None
    for dtype in _DTYPES:
        with contextlib.suppress(RuntimeError):  # measured, and said, with the rates
            _product_and_back(device, dtype)
    after = accelerator.allocated_bytes(device)
    return None if after is None else max(0, after - before)


def _product_and_back(device: torch.device, dtype: torch.dtype) -> None:
    weight = torch.randn(256, 256, device=device).to(dtype).requires_grad_()
    (weight @ weight).sum().backward()


def _rounding(device: torch.device) -> dict[str, str]:
    """By how much one byte raises what is allocated and, on an empty cache, what is reserved."""
    accelerator.empty_cache()
    before = accelerator.allocated_bytes(device), accelerator.reserved_bytes(device)
    one = torch.empty(1, dtype=torch.uint8, device=device)
    after = accelerator.allocated_bytes(device), accelerator.reserved_bytes(device)
    del one
    found = {}
    for name, old, new in zip(("granule_bytes", "segment_bytes"), before, after, strict=True):
        if old is not None and new is not None:
            found[name] = str(new - old)
    return found


def _is_expandable(settings: dict[str, str]) -> bool:
    in_force = settings.get("expandable_segments")
    if in_force is not None:
        return in_force == "True"
    return any("expandable_segments:true" in value.lower().replace(" ", "") for value in settings.values())


def _others_at_work() -> str:
    """A line where more is running than the processors can do at once: then every rate is too low."""
    processors = os.cpu_count() or 1
    try:
        load = os.getloadavg()[0]
    except (OSError, AttributeError):
        return ""
    if load <= processors + 0.5:
        return ""
    return (
        f"{load:.1f} processes were at work on {processors} processors, so rates are too low: measure again when "
        "nothing else runs"
    )


def _first_line(error: BaseException) -> str:
    return _in_one_line((str(error).splitlines() or [type(error).__name__])[0])


def _in_one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)
