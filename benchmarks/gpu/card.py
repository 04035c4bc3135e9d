"""The device that the kit measures: a CUDA card, or in a dry run this machine's CPU by the same calls.

Invariant: a figure that the device does not have is None and never a guess. The CPU has no caching allocator, so
nothing is reserved there; its allocated bytes are counted by `tightfit.verify.peak`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tightfit import accelerator
from tightfit.step.environment import environment
from tightfit.verify.peak import PeakMeter


@dataclass(slots=True, kw_only=True)
class Peak:
    """Most bytes while it was watched, and what was allocated and reserved before."""

    held_bytes: int = 0
    held_reserved_bytes: int | None = None
    allocated_bytes: int = 0
    reserved_bytes: int | None = None


class Card:
    """`is_dry`: tiny shapes on the CPU, whatever this machine has. `folder`: where the results go."""

    def __init__(self, *, is_dry: bool, folder: Path) -> None:
        if not is_dry and not torch.cuda.is_available():
            raise SystemExit("torch finds no CUDA device here: run with --dry-run, or on a machine that has one")
        self.is_dry, self.folder = is_dry, folder
        self.device = torch.device("cpu") if is_dry else torch.device("cuda", 0)

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronise(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def empty(self) -> None:
        """Give back whatever nobody holds."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def cap(self, room_bytes: int) -> None:
        """From now on the allocator fails beyond `room_bytes`, as it would on a smaller card."""
        if self.is_cuda:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, room_bytes / total), self.device)

    def total_bytes(self) -> int | None:
        return torch.cuda.get_device_properties(self.device).total_memory if self.is_cuda else None

    @contextlib.contextmanager
    def peak(self, held_bytes: int) -> Iterator[Peak]:
        """Watch what runs inside. `held_bytes`: what lives throughout, by the tensors' own sizes."""
        found = Peak(held_bytes=held_bytes)
        if self.is_cuda:
            self.empty()
            torch.cuda.reset_peak_memory_stats(self.device)
            found.held_bytes = torch.cuda.memory_allocated(self.device)
            found.held_reserved_bytes = torch.cuda.memory_reserved(self.device)
            yield found
            torch.cuda.synchronize(self.device)
            found.allocated_bytes = torch.cuda.max_memory_allocated(self.device)
            found.reserved_bytes = torch.cuda.max_memory_reserved(self.device)
            return
        with PeakMeter(self.device) as meter:
            yield found
        found.allocated_bytes = held_bytes + meter.rise_bytes

    def seconds(self, run: Callable[[], Any]) -> float:
        """Seconds of `run` by the device's own clock, everything that it queued included."""
        if not self.is_cuda:
            started = time.perf_counter()
            run()
            return time.perf_counter() - started
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        before.record()
        run()
        after.record()
        torch.cuda.synchronize(self.device)
        return float(before.elapsed_time(after)) / 1e3

    def in_turn(
        self, ways: Mapping[str, tuple[Callable[[], AbstractContextManager[Any]], Callable[[], Any]]], repeats: int
    ) -> dict[str, dict[str, float]]:
        """Median and spread of the seconds of each way, which is a context and what runs in it; entering it is not
        timed. The ways take turns, so noise falls on all alike, and the first turn is not counted."""
        found: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(repeats + 1):
            for name, (context, run) in ways.items():
                with context():
                    seconds = self.seconds(run)
                if repeat:
                    found[name].append(seconds)
        return {
            name: {"median": statistics.median(each), "least": min(each), "most": max(each)}
            for name, each in found.items()
        }

    def facts(self) -> dict[str, Any]:
        """What a result depends on."""
        said: dict[str, Any] = {
            "environment": environment(), "is_dry": self.is_dry, "device": str(self.device),
            "allocator": accelerator.allocator_settings(self.device),
        }  # fmt: skip
        if self.is_cuda:
            properties = torch.cuda.get_device_properties(self.device)
            free_bytes, total_bytes = torch.cuda.mem_get_info(self.device)
            said |= {
                "name": properties.name, "total_bytes": properties.total_memory,
                "cudnn": torch.backends.cudnn.version(),
                "capability": list(torch.cuda.get_device_capability(self.device)),
                "processors": properties.multi_processor_count,
                "context_bytes": total_bytes - free_bytes - torch.cuda.memory_reserved(self.device),
            }  # fmt: skip
        return said


def as_row(peak: Peak) -> dict[str, Any]:
    return dataclasses.asdict(peak)
