"""Tensors that wait off the device: a bounded pool of host memory, or a file, and copies both ways.

Idea: when a unit's forward is over, the storages that its plan offloads are copied to the pool. The device frees each
of them as soon as nobody else holds it. On a card that has streams the pool is pinned, and copies run on two streams of
their own beside the compute. When backward enters a unit, the parcels of the unit before it are already being copied
back. On other devices the copies run in turn with the compute. On the CPU the pool lies outside torch's allocator. A
budget counts what torch allocates and not the pool, so the pool stands for another device there.

Invariants:
- A parcel holds the bytes of a whole storage, so views of it come back as views of one storage.
- A buffer is written again only after the last copy out of it.
- A tensor that was changed in place after it was recorded stays on the device. Reading it raises the same error as in
  autograd.
- Where the pool is full a tensor stays too, counted in `Stats.held`.

Refused: a file system without room for what is to be spilled (`TightfitError`, before anything is overwritten). The
file has no name, so it is gone with the process, however the process ends.

The streams follow torch's rules for memory that is used on several streams (`Tensor.record_stream`). No GPU has
run them yet.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from tightfit import accelerator
from tightfit.core import InvalidInput, TightfitError, format_bytes

__all__ = ["Offloaded", "Parcel", "Pool", "Shipment"]

_GRANULE_BYTES = mmap.PAGESIZE


class Pool:
    """Room for parcels off the device: at most `capacity_bytes` of host memory, or of a file in the folder `spill`
    (None: no limit). A buffer is used again for a parcel of the same size."""

    def __init__(self, capacity_bytes: int | None = None, spill: Path | None = None, ahead: int | None = None) -> None:
        if spill is not None and not spill.is_dir():
            raise InvalidInput(f"cannot spill to {str(spill)!r}: it is no folder")
        self.capacity_bytes, self.spill = capacity_bytes, spill
        self.ahead = ahead  # shipments fetched early; None: one where copies run beside the compute, else none
        self.taken_bytes = 0  # by all buffers, in use or not
        self.stored_bytes = 0  # by parcels, now
        self.most_bytes = 0
        self.copied_bytes = 0  # off the device, ever
        self._free: dict[tuple[torch.device, int], list[tuple[torch.Tensor, Any]]] = defaultdict(list)
        self._lanes: dict[torch.device, _Lanes] = {}
        self._shipments: list[weakref.ref[Shipment]] = []

    def store(self, tensor: torch.Tensor) -> Parcel | None:
        """Copy the tensor's storage into a parcel. None: there is no room left."""
        storage = tensor.untyped_storage()
        device = storage.device
        size_bytes = -(-storage.nbytes() // _GRANULE_BYTES) * _GRANULE_BYTES
        waiting = self._free[device, size_bytes]
        if waiting:
            buffer, last_read = waiting.pop()
        else:
            if self.capacity_bytes is not None and self.taken_bytes + size_bytes > self.capacity_bytes:
                return None
            buffer, last_read = self._buffer(size_bytes, device), None
            self.taken_bytes += size_bytes
        self.stored_bytes += size_bytes
        self.most_bytes = max(self.most_bytes, self.stored_bytes)
        self.copied_bytes += storage.nbytes()
        source = _bytes_of(storage)
        lanes = self.lanes(device)
        written = None
        if lanes is None:
            buffer[: source.numel()].copy_(source)
        else:
            written = lanes.out(source, buffer[: source.numel()], last_read)
        return Parcel(self, buffer, source.numel(), device, written)

    def room(self, size_bytes: int, device: torch.device) -> torch.Tensor | None:
        """A buffer of at least `size_bytes` for something of `device` that is not a parcel; `room_is_free` returns it.
        None: there is no room left."""
        size_bytes = -(-size_bytes // _GRANULE_BYTES) * _GRANULE_BYTES
        if self.capacity_bytes is not None and self.taken_bytes + size_bytes > self.capacity_bytes:
            return None
        self.taken_bytes += size_bytes
        self.stored_bytes += size_bytes
        self.most_bytes = max(self.most_bytes, self.stored_bytes)
        return self._buffer(size_bytes, device)

    def room_is_free(self, buffer: torch.Tensor, device: torch.device) -> None:
        self.stored_bytes -= buffer.numel()
        self._free[device, buffer.numel()].append((buffer, None))

    def give_back(self, parcel: Parcel, last_read: Any) -> None:
        self.stored_bytes -= parcel.buffer.numel()
        self._free[parcel.device, parcel.buffer.numel()].append((parcel.buffer, last_read))

    def lanes(self, device: torch.device) -> _Lanes | None:
        """The streams that copy beside the compute. None: the device has none."""
        if not accelerator.has_streams(device):
            return None
        if device not in self._lanes:
            self._lanes[device] = _Lanes(device)
        return self._lanes[device]

    def ship(self, shipment: Shipment) -> None:
        """The forward of one more unit is over."""
        self._shipments = [known for known in self._shipments if known() is not None]
        self._shipments.append(weakref.ref(shipment))

    def opened(self, shipment: Shipment) -> None:
        """Backward has come to the unit of `shipment`: begin to fetch the shipments before it."""
        alive = [each for known in self._shipments if (each := known()) is not None]
        if shipment not in alive:
            return
        place = alive.index(shipment)
        ahead = self.ahead if self.ahead is not None else int(shipment.device_copies_beside)
        for each in alive[max(0, place - ahead) : place]:
            each.prefetch()

    def _buffer(self, size_bytes: int, device: torch.device) -> torch.Tensor:
        if self.spill is not None:
            return torch.frombuffer(_mapped_file(self.spill, size_bytes), dtype=torch.uint8)
        if accelerator.has_streams(device):
            return accelerator.pinned(size_bytes)
        return torch.frombuffer(mmap.mmap(-1, size_bytes), dtype=torch.uint8)


def _mapped_file(folder: Path, size_bytes: int) -> mmap.mmap:
    """A file without a name, whose blocks are allocated, so that writing to the map cannot fail later."""
    handle = -1
    try:
        handle, name = tempfile.mkstemp(dir=folder, prefix=".tightfit-")
        os.unlink(name)
        os.posix_fallocate(handle, 0, size_bytes)
        return mmap.mmap(handle, size_bytes)
    except OSError as error:
        raise TightfitError(
            f"cannot spill {format_bytes(size_bytes)} to {str(folder)!r}: {error.strerror}; choose another folder, "
            "make room, or plan without offload"
        ) from None
    finally:
        if handle >= 0:
            os.close(handle)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class _Lanes:
    """One stream for each direction of one card."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.outward, self.inward = accelerator.new_stream(device), accelerator.new_stream(device)

    def out(self, source: torch.Tensor, buffer: torch.Tensor, last_read: Any) -> Any:
        """Copy off the device: after the op that computes `source`, and after the last copy out of `buffer`."""
        self.outward.wait_stream(accelerator.running_stream(self.device))
        if last_read is not None:
            self.outward.wait_event(last_read)
        with accelerator.on_stream(self.outward):
            buffer.copy_(source, non_blocking=True)
            written = self.outward.record_event()
        source.record_stream(self.outward)  # so that its memory is not given away before the copy is done
        return written

    def back(self, buffer: torch.Tensor, written: Any) -> tuple[torch.Tensor, Any]:
        """Begin to copy to the device; the tensor may be used once its event has been waited for."""
        current = accelerator.running_stream(self.device)
        fresh = torch.empty(buffer.numel(), dtype=torch.uint8, device=self.device)
        self.inward.wait_stream(current)  # whoever had this memory before may be at work on it still
        self.inward.wait_event(written)
        with accelerator.on_stream(self.inward):
            fresh.copy_(buffer, non_blocking=True)
            arrived = self.inward.record_event()
        return fresh, arrived


class Parcel:
    """The bytes of one storage, in the pool."""

    def __init__(self, pool: Pool, buffer: torch.Tensor, size_bytes: int, device: torch.device, written: Any) -> None:
        self.pool, self.buffer, self.size_bytes, self.device, self.written = pool, buffer, size_bytes, device, written
        self._coming: tuple[torch.Tensor, Any] | None = None
        self._is_given_back = False
        self._last_read: Any = None

    def prefetch(self) -> None:
        """Begin to copy back, if that has not begun."""
        if self._coming is not None or self._is_given_back:
            return
        lanes = self.pool.lanes(self.device)
        content = self.buffer[: self.size_bytes]
        if lanes is None:
            fresh = torch.empty(self.size_bytes, dtype=torch.uint8, device=self.device)
            self._coming = (fresh.copy_(content), None)
        else:
            self._coming = lanes.back(content, self.written)
            self._last_read = self._coming[1]

    def fetch(self) -> torch.Tensor:
        """The bytes, on the device."""
        self.prefetch()
        assert self._coming is not None
        fresh, arrived = self._coming
        self._coming = None
        if arrived is not None:
            accelerator.running_stream(self.device).wait_event(arrived)
        return fresh

    def give_back(self) -> None:
        """Return the buffer to the pool: the parcel will not be fetched again."""
        if self._is_given_back:
            return
        self._is_given_back = True
        if self._coming is not None:  # on its way for nothing: its memory must not be used before it is there
            self.fetch()
        self.pool.give_back(self, self._last_read)

    def __del__(self) -> None:
        self.give_back()


class Shipment:
    """All that one frame offloads."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._parked: list[weakref.ref[Offloaded]] = []  # they hold their shipment
        self.is_open = False
        self.device_copies_beside = False
        self.held = 0  # tensors that stayed on the device after all

    def park(self, tensor: torch.Tensor, *, being_written: bool = False) -> Offloaded:
        """A source for `tensor`, which is to leave the device. `being_written`: an op is changing it in place, and
        autograd will count that change only when the op is over."""
        found = Offloaded(self, tensor, None if being_written else tensor._version)
        self._parked.append(weakref.ref(found))
        return found

    @property
    def parked(self) -> list[Offloaded]:
        return [alive for each in self._parked if (alive := each()) is not None]

    def sealed(self) -> None:
        """The frame's forward is over and every parcel is packed."""
        self.held = sum(each.parcel is None for each in self.parked)
        self.device_copies_beside = any(
            each.parcel is not None and each.parcel.written is not None for each in self.parked
        )
        self.pool.ship(self)

    def open(self) -> None:
        """Backward is about to take something out of it."""
        if not self.is_open:
            self.is_open = True
            self.pool.opened(self)

    def prefetch(self) -> None:
        for each in self.parked:
            if each.parcel is not None:
                each.parcel.prefetch()


class Offloaded:
    """Brings back a tensor that the plan offloads; a source (`engine.source.Source`)."""

    __slots__ = ("__weakref__", "parcel", "shipment", "tensor", "version")

    def __init__(self, shipment: Shipment, tensor: torch.Tensor, version: int | None) -> None:
        self.shipment = shipment
        self.tensor: torch.Tensor | None = tensor.detach()  # its history is not for the pool
        self.version = version
        self.parcel: Parcel | None = None

    def settle(self) -> None:
        """Autograd saves the tensor as it is now."""
        if self.version is None and self.tensor is not None:
            self.version = self.tensor._version

    def seal(self) -> None:
        assert self.tensor is not None
        if self.version in (None, self.tensor._version):
            self.parcel = self.shipment.pool.store(self.tensor)
            if self.parcel is not None:
                self.tensor = None

    def take(self, keep: bool) -> torch.Tensor:
        tensor = self.tensor
        if tensor is not None:
            if self.version not in (None, tensor._version):
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                    f"tensor of shape {list(tensor.shape)} is at version {tensor._version}; expected version "
                    f"{self.version}"
                )
            self.tensor = tensor if keep else None
            return tensor
        if self.parcel is None:
            raise RuntimeError(
                "trying to backward through the graph a second time after what it offloaded was freed; use "
                "retain_graph=True for the first backward"
            )
        self.shipment.open()
        fresh = self.parcel.fetch()
        if not keep:
            self.parcel.give_back()
            self.parcel = None
        return fresh

    def forget(self) -> None:
        """Nothing to forget, because what was fetched was handed over."""
