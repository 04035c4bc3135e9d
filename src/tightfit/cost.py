"""Seconds of an op that was not run: a roofline over its FLOPs and the bytes that it moves.

Invariant: seconds are never negative and never less than the launch floor, so no op is free to rerun by
accident. Refused: nothing; an unknown dtype is charged at the slowest rate that the device states. Such
seconds are estimates and are only ever compared with each other.
Source of the model: Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009.
"""

from __future__ import annotations

from tightfit.core import Device

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


def op_seconds(flops: int, moved_bytes: int, dtype: str, device: Device = NOMINAL_CPU) -> float:
    """Estimated seconds of an op of `flops` FLOPs in `dtype` that reads and writes `moved_bytes` bytes."""
    rate = device.flops_per_second.get(dtype, min(device.flops_per_second.values()))
    return max(LAUNCH_SECONDS, flops / rate, moved_bytes / device.memory_bytes_per_second)
