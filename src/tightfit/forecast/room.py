"""The memory of a card: what a step may take of it.

Invariant: "fits" means that the reserved bytes, the driver's context and the margin are within the card together.
"""

from __future__ import annotations

import dataclasses

from tightfit import accelerator
from tightfit.catalog import driver_name, gpu, gpu_names
from tightfit.core import (
    Device,
    InvalidInput,
    format_bytes,
    parse_bytes,
    require_part,
)
from tightfit.device.calibration import calibrated, named
from tightfit.device.cost import NOMINAL_CUDA
from tightfit.step.environment import calibration_here

#: What the driver and the loaded kernels take before the first tensor; 0.3 to 0.6 GiB are reported.
CONTEXT_BYTES = 600 * 2**20


#: What Metal lets one process wire of the unified memory (`recommendedMaxWorkingSetSize`).
UNIFIED_SHARE = 0.75


#: Kept free beside the forecast: the CUDA side of it (kernels' scratch, libraries' workspaces) was not measured here.
MARGIN = 0.02


def device_asked(text: str) -> Device:
    """A GPU of the catalog, with the figures that were measured on it where they were; `here`: the device that was
    calibrated and is meant; or a card of the size that `text` gives (`24GiB`), with an A100's rates."""
    try:
        size_bytes = parse_bytes(text)
    except InvalidInput:
        if text.strip()[:1].isdigit():
            raise
        if text.strip().lower() == HERE and HERE not in gpu_names():
            return _here()
        return card_named(text)
    return dataclasses.replace(NOMINAL_CUDA, name=text, memory_bytes=size_bytes)


#: What `--gpu` calls the device that a device file is of.
HERE = "here"


def _here() -> Device:
    """The device of the file that is named, else this machine's, if it was calibrated."""
    device = accelerator.current()
    made = named() or calibration_here(device)
    if made is None:
        raise InvalidInput(
            f"nothing was measured on this machine's {device.type} ({accelerator.model_of(device)}): run tightfit "
            "calibrate, or name a GPU of the catalog or a size"
        )
    return made.device


def card_named(name: str, *, one_of_many: bool = False) -> Device:
    """The GPU of the catalog called `name`, with the figures that were measured on it, if they were."""
    return calibrated(gpu(name), driver_name=driver_name(name), one_of_many=one_of_many)


def usable_bytes(device: Device) -> int:
    """What the allocator may reserve: the memory without the driver's context and the margin."""
    if device.usable_bytes is not None:
        return int(device.usable_bytes / (1 + MARGIN))
    if device.kind == "mps":
        return int(device.memory_bytes * UNIFIED_SHARE / (1 + MARGIN))
    return max(0, int((device.memory_bytes - CONTEXT_BYTES) / (1 + MARGIN)))


def room_bytes(device: Device, budget: str | int | None) -> int:
    """What the allocator may reserve of `device`."""
    room = usable_bytes(device)
    if budget is not None:
        require_part(budget, f"the device's {format_bytes(device.memory_bytes)}")
    return room if budget is None else min(room, parse_bytes(budget, whole_bytes=device.memory_bytes))


def leave_room(device: Device, room: int) -> None:
    if room <= 0:
        raise InvalidInput(
            f"a device of {format_bytes(device.memory_bytes)} leaves nothing for tensors beside the driver's "
            f"{format_bytes(CONTEXT_BYTES)}"
        )
