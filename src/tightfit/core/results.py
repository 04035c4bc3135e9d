"""The nouns of proofs, measurements and forecasts.

Invariant: the field names are the keys of the JSON documents.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from tightfit.core.decided import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    name: str
    expected: str
    measured: str
    tolerance: str
    passed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    checks: tuple[Check, ...]
    environment: Mapping[str, str]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def __str__(self) -> str:
        """A line for each check."""
        return "\n".join(
            f"{'passed' if each.passed else 'FAILED'} {each.name}: {each.measured} (expected {each.expected}; "
            f"tolerance: {each.tolerance})"
            for each in self.checks
        )


#: What asks for the best size of micro-batches, where a number would ask for that size.
AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One way to cut a global batch that was looked at."""

    size: int  # rows of the largest micro-batch
    accumulation: int  # micro-batches in a step
    fits: bool
    unplanned_peak_bytes: int
    least_peak_bytes: int  # of any plan; 0: nothing was planned for
    seconds: float = 0.0  # of the whole global batch, predicted; 0: it does not fit
    slowdown: float = 1.0  # of a micro-batch by its plan


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatches:
    """How a global batch is cut so that each step fits its budget, and why so."""

    global_batch: int
    size: int  # rows of the largest micro-batch
    accumulation: int
    largest: int  # of the sizes that fit
    budget_bytes: int
    seconds: float  # of the whole global batch, predicted
    tried: tuple[MicroBatch, ...]
    weighed: str = ""  # what the loss is a sum or a mean of; empty: the batch is not cut
    check: Check | None = None  # cut against uncut; none: the batch is not cut

    @property
    def said(self) -> str:
        """The choice and its reason, in one line."""
        shown = f"micro-batches of {self.size}, {self.accumulation} for each global batch of {self.global_batch}"
        if self.accumulation == 1:
            shown = f"the global batch of {self.global_batch} runs in one piece"
        fitting = [each for each in self.tried if each.fits]
        too_large = [each.size for each in self.tried if not each.fits]
        why = f"{self.largest} is the largest that fits" if too_large else "all of it fits"
        if len(fitting) > 1:
            others = ", ".join(
                f"{each.size}: {each.seconds:.3g} s" for each in sorted(fitting, key=lambda each: -each.size)
            )
            fastest = "and the fastest" if self.size == self.largest else f"but {self.size} is faster"
            why += f" {fastest} (a global batch is predicted to take, by size, {others})"
        return f"{shown}: {why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to run a step, measured."""

    mode: str  # none, every-block, tightfit
    peak_bytes: int  # of the whole step, by the allocator's own count
    predicted_peak_bytes: int
    activation_peak_bytes: int  # peak minus what was live before the step
    step_seconds: float  # median
    recompute_flops: int
    forward_flops: int
    gradients: str  # reference, identical, differs; within tolerance: a plan with tiles, held against float64


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """The same step with and without checkpointing, side by side."""

    model: str
    method: str
    batch: int
    seq: int
    dtype: str
    device: str
    environment: Mapping[str, str]
    rows: tuple[Row, ...]
    budget_bytes: int
    plan: Plan
    note: str
    micro_batches: MicroBatches | None = None  # of tightfit's row; none: the batch was not to be cut


class Backing(enum.Enum):
    """What lies behind the bytes that wait off the device."""

    PINNED = "pinned"  # host memory that the system may not move, which a card copies from and to by itself
    PAGEABLE = "pageable"  # other host memory
    FILE = "file"


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What a step takes of a machine at most, by one plan (forecast)."""

    allocated_bytes: int  # of the device, by what lives at the peak
    reserved_bytes: int  # of the device, by its caching allocator; as allocated where it has none (the CPU)
    pinned_bytes: int
    pageable_bytes: int
    file_bytes: int
    waiting: Mapping[str, Mapping[str, int]]  # what the last three are: by backing, then by lever


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """One way to run a step on a device that is not there. Bytes are forecast, seconds estimated."""

    mode: str  # none, every-block, tightfit
    fits: bool
    peak_bytes: int  # allocated
    reserved_bytes: int  # what the caching allocator takes from the driver for it
    by_category: Mapping[str, int]  # at the peak; allocator_slack is reserved minus allocated
    peak_owner: str
    peak_phase: str  # forward, backward, optimizer
    step_seconds: float  # estimated
    slowdown: float  # step seconds against mode none's
    recompute_flops: int
    tokens_per_second: float = 0.0  # estimated


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The answer to "will it run?" for one model, method, batch and device."""

    model: str
    method: str
    batch: int
    seq: int
    dtype: str
    optimizer: str
    gpu: str
    gpu_bytes: int
    usable_bytes: int  # for the allocator: without the driver's context and the margin
    fits: bool
    modes: tuple[Mode, ...]
    plan: Plan | None  # none when nothing fits
    essence: tuple[str, ...]  # the plan in a few lines
    # with tiles only if the asked size needs them; none: not looked for; a plan of a longer search may fit more
    largest_batch: int | None  # found with tightfit, at this sequence
    longest_seq: int | None  # with tightfit, at this batch, in steps of 64 tokens
    advice: tuple[str, ...]  # what would make it fit, each with its number
    error_bar: str
    notes: tuple[str, ...]
    environment: Mapping[str, str]
    calibration: str = ""  # one line: where figures that were measured on the device come from
    streamed_bytes: int = 0  # of frozen weights that wait in host memory, by the plan
    host_bytes: Mapping[str, int] = field(default_factory=dict)  # all that waits there, by lever
    micro_batches: MicroBatches | None = None  # of a global batch; none: the batch was not to be cut, or nothing fits
    host_budget_bytes: int | None = None  # the most that was to wait in host memory; none: no limit was set
    account: Account | None = None  # of the plan; none: nothing fits
