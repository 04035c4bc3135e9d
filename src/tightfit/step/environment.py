"""What a result depends on: versions, processor, memory."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib import metadata

import torch

from tightfit import accelerator

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
