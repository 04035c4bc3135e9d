"""Which tensors lie in files that are mapped into memory, as safetensors are loaded.

Such memory is the system's cache of the file: it is filled when it is read, and given back when something else needs
it. Invariant: nothing is read. Where the system does not say what is mapped, no tensor is.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from pathlib import Path

import torch

from tightfit.accelerator import is_host

__all__ = ["Mapped"]

_MAPS = Path("/proc/self/maps")
_IN_MEMORY = ("/dev/shm/", "/memfd:", "/SYSV", "/dev/zero")  # files in name only


class Mapped:
    """Ranges of addresses, in order. `tensor in mapped`: does its storage lie in one?"""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._ranges = sorted(ranges)

    @classmethod
    def now(cls) -> Mapped:
        """The files that this process has mapped. Source: proc_pid_maps(5)."""
        try:
            lines = _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return cls(())
        found = []
        for line in lines:
            addresses, _, _, _, inode, *path = line.split(maxsplit=5)
            if inode != "0" and path and not path[0].startswith(_IN_MEMORY):
                start, end = addresses.split("-")
                found.append((int(start, 16), int(end, 16)))
        return cls(found)

    def __contains__(self, tensor: torch.Tensor) -> bool:
        if not is_host(tensor.device) or tensor.layout is not torch.strided:
            return False
        address = tensor.untyped_storage().data_ptr()
        place = bisect.bisect_right(self._ranges, (address, float("inf"))) - 1
        return place >= 0 and self._ranges[place][0] <= address < self._ranges[place][1]
