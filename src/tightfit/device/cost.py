"""Seconds of an op that was not run: a roofline over its FLOPs and the bytes that it moves.

Invariant: seconds are never negative and never less than the launch floor, so no op is free to rerun by
accident. Refused: nothing; an unknown dtype is charged at the slowest rate that the device states. Such
seconds are estimates and are only ever compared with each other.
Source of the model: Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from tightfit.core import Device, Kind, Phase, Trace
from tightfit.core.changed import changed

#: Of an op on a device where it was not measured.
LAUNCH_SECONDS = 4e-6

NOMINAL_CPU = Device(
    name="nominal two-core CPU",
    memory_bytes=16 * 2**30,
    flops_per_second={"float32": 1e11, "bfloat16": 1e11, "float16": 5e10},
    memory_bytes_per_second=2e10,
    h2d_bytes_per_second=2e10,
    d2h_bytes_per_second=2e10,
    source="order of magnitude of the two-core machine that the project is developed on; not a measurement",
)

NOMINAL_CUDA = Device(
    name="cuda",
    memory_bytes=80 * 2**30,
    flops_per_second={"float32": 1.95e13, "bfloat16": 3.12e14, "float16": 3.12e14},
    memory_bytes_per_second=2.039e12,
    h2d_bytes_per_second=2.5e10,
    d2h_bytes_per_second=2.5e10,
    source="the shape of an A100 80 GB; stands for CUDA where no GPU is named",
    kind="cuda",
    compute_capability=8.0,
)


def op_seconds(flops: int, moved_bytes: int, dtype: str, device: Device = NOMINAL_CPU) -> float:
    """Estimated seconds of an op of `flops` FLOPs in `dtype` that reads and writes `moved_bytes` bytes.

    The launch is added, not a floor: a planner told that a hundred ops take exactly the same has a hundred factorial
    equal plans to tell apart.
    """
    rate = device.flops_per_second.get(dtype, min(device.flops_per_second.values()))
    launch_seconds = LAUNCH_SECONDS if device.launch_seconds is None else device.launch_seconds
    return launch_seconds + max(flops / rate, moved_bytes / device.memory_bytes_per_second)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """Copies in one direction: the step waits for what they take longer than the compute that they run beside."""

    bytes_per_second: float
    beside_seconds: float

    def waiting_seconds(self, size_bytes: int) -> float:
        return max(0.0, size_bytes / self.bytes_per_second - self.beside_seconds)


def copy_lanes(trace: Trace) -> tuple[Lane, ...]:
    """From the device in forward and back to it in backward."""
    beside = {phase: 0.0 for phase in Phase}
    for op in trace.ops if trace.copies_beside else ():
        beside[op.phase] += op.seconds
    return (
        Lane(
            bytes_per_second=trace.out_bytes_per_second or NOMINAL_CPU.d2h_bytes_per_second,
            beside_seconds=beside[Phase.FORWARD],
        ),
        Lane(
            bytes_per_second=trace.back_bytes_per_second or NOMINAL_CPU.h2d_bytes_per_second,
            beside_seconds=beside[Phase.BACKWARD],
        ),
    )


def _new_memory_seconds(trace: Trace, peak_bytes: int) -> float:
    """What touching new memory takes, for what rises above that which is always there."""
    return trace.fresh_seconds_per_byte * max(0, peak_bytes - sum(trace.static_bytes.values()))


def unplanned_seconds(trace: Trace, unplanned_peak_bytes: int) -> float:
    """What the step takes without a plan: its ops, and new memory."""
    return sum(op.seconds for op in trace.ops) + _new_memory_seconds(trace, unplanned_peak_bytes)


def fresh_seconds(trace: Trace, unplanned_peak_bytes: int, peak_bytes: int) -> float:
    """What a step with a lower peak takes longer, for new memory that it touches: below zero, as it touches less."""
    return min(0.0, _new_memory_seconds(trace, peak_bytes) - _new_memory_seconds(trace, unplanned_peak_bytes))


@dataclass(frozen=True, slots=True)
class Work:
    """What an op does, whatever it runs on."""

    flops: int
    moved_bytes: int
    dtype: str

    def seconds(self, device: Device) -> float:
        return op_seconds(self.flops, self.moved_bytes, self.dtype, device)


def work_of(trace: Trace) -> list[Work | None]:
    """The work of each op of `trace`; `None` for one that takes no time."""
    sizes = [value.size_bytes for value in trace.values]
    dtypes = [value.dtype for value in trace.values]

    def work(op_inputs: tuple[int, ...], op_outputs: tuple[int | None, ...], flops: int, kind: Kind) -> Work | None:
        if kind is Kind.VIEW or (kind is Kind.OPAQUE and not op_inputs):  # the latter is memory taken, nothing written
            return None
        outputs = {v for v in op_outputs if v is not None}
        moved = sum(sizes[v] for v in outputs - set(op_inputs)) + sum(sizes[v] for v in set(op_inputs))
        return Work(flops, moved, next((dtypes[v] for v in op_outputs if v is not None), "float32"))

    return [work(op.inputs, op.outputs, op.flops, op.kind) for op in trace.ops]


def retimed(trace: Trace, device: Device) -> Trace:
    """`trace` with the seconds of every op that it has estimated for `device`."""
    seconds = functools.cache(lambda work: 0.0 if work is None else work.seconds(device))  # blocks are alike
    return dataclasses.replace(
        trace,
        ops=tuple(changed(op, seconds=seconds(work)) for op, work in zip(trace.ops, work_of(trace), strict=True)),
        tiled=tuple(retimed(variant, device) for variant in trace.tiled),
    )
