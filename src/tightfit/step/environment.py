"""What a result depends on: versions, processor, memory, and what was measured on the device."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib import metadata

import torch

from tightfit import accelerator
from tightfit.core import Device
from tightfit.device.calibration import Calibration, found

_PACKAGES = (
    "tightfit", "torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "safetensors", "highspy", "numpy",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Installed versions of the packages that a result can depend on."""
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def environment() -> dict[str, str]:
    """What a measurement depends on besides the model: versions, runtime, machine, threads."""
    record = {
        **versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_count": str(os.cpu_count()),
        "torch_threads": str(torch.get_num_threads()),
        "deterministic_algorithms": str(torch.are_deterministic_algorithms_enabled()),
    }
    if (host := accelerator.host_memory_bytes()) is not None:
        record["memory_bytes"] = str(host)
    return {**record, **accelerator.runtime()}


def calibration_here(device: torch.device) -> Calibration | None:
    """What was measured on `device`, if this machine has it. Raises as `device.calibration.found` does."""
    memory_bytes = accelerator.memory_bytes(device) if _is_here(device) else None
    if memory_bytes is None:
        return None
    return found(accelerator.model_of(device), kind=accelerator.catalog_kind(device), memory_bytes=memory_bytes)


def calibrated_here(device: torch.device, nominal: Device) -> Device:
    """`nominal` with the figures that were measured on `device`, if this machine has it and they were."""
    made = calibration_here(device)
    return nominal if made is None else made.over(nominal)


def calibration_said() -> str:
    """One line: where the figures of this machine's card, or of its processor, were measured; empty where not."""
    made = calibration_here(accelerator.current())
    return "" if made is None else made.device.calibration


def _is_here(device: torch.device) -> bool:
    return accelerator.is_host(device) or (accelerator.any_card() and accelerator.current().type == device.type)
