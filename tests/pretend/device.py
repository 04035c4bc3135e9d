"""Build the pretend card (`device.cpp`) and make it known to torch, as the device `pretend`.

A process has one such card or none, and torch starts its backward threads with the first backward: so `load` belongs at
the start of a process of its own.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sysconfig
import tempfile
import types
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("device.cpp")


def why_not() -> str:
    """Why it cannot be built here; empty where it can."""
    for program in (os.environ.get("CXX", "c++"), "ninja"):
        if shutil.which(program) is None:
            return f"the pretend card has to be compiled, and there is no {program} here"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "the pretend card has to be compiled, and Python's headers are not here"
    return ""


def build() -> Path:
    """The library; compiled once for each torch and each state of the source."""
    from torch.utils import cpp_extension

    mark = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"tightfit-pretend-{os.getuid()}" / mark
    library = folder / "pretend_card.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        cpp_extension.load(
            "pretend_card", [str(SOURCE)], extra_cflags=["-O0", "-g0"], build_directory=str(folder),
            is_python_module=False,
        )  # fmt: skip
    return library


class Card(types.ModuleType):
    """`torch.pretend`: the little that torch asks a backend's module. Everything else is `torch.accelerator`'s."""

    default_generators: tuple[torch.Generator, ...] = ()

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _lazy_init(self) -> None:
        """Nothing has to be started; but torch 2.11 does not wait for the queues of a card that was not."""

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return len(self.default_generators)

    def current_device(self) -> int:
        return int(torch._C._accelerator_getDeviceIndex())

    def manual_seed_all(self, seed: int) -> None:
        for generator in self.default_generators:
            generator.manual_seed(seed)

    def get_rng_state(self, device: Any = 0) -> torch.Tensor:
        return self.default_generators[torch.device("pretend", device or 0).index].get_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = 0) -> None:
        self.default_generators[torch.device("pretend", device or 0).index].set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def load() -> Any:
    """Make `pretend` a device of this process, and return the ops that control it (`torch.ops.pretend`)."""
    torch.ops.load_library(str(build()))
    torch.utils.rename_privateuse1_backend("pretend")
    card = Card("torch.pretend")
    card.default_generators = tuple(torch.ops.pretend.generator(index) for index in range(2))
    torch._register_device_module("pretend", card)
    torch.utils.generate_methods_for_privateuse1_backend()
    return torch.ops.pretend
