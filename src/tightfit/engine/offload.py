"""Tensors that wait off the device: a bounded pool of host memory, or a file, and copies both ways.

Idea: when a unit's forward is over, the storages that its plan offloads are copied to the pool. The device frees each
of them as soon as nobody else holds it. On a card that has streams the pool is pinned, and copies run on two streams of
their own beside the compute. When backward enters a unit, the parcels of the unit before it are already being copied
back. On other devices the copies run in turn with the compute. On the CPU the pool lies outside torch's allocator. A
budget counts what torch allocates and not the pool, so the pool stands for another device there.

What the host queues runs later on a card, so memory is given back by the order of the queues and not by the clock. What
a unit sends out stays until the next unit has sent out its own, or until backward wants the first of it. The compute
then waits for the copy, and the memory is free for it. `Tensor.record_stream` would give it back whenever the allocator
next looks and finds the copy done; the host runs far ahead of the card, so until then the step would grow as if nothing
were offloaded. The referee counts what is on its way out and back (`plan.simulate`).

Invariants:
- A parcel holds the bytes of a whole storage, so views of it come back as views of one storage.
- A buffer is written again only after the last copy out of it.
- A tensor that was changed in place after it was recorded stays on the device. Reading it raises the same error as in
  autograd.
- Where the pool is full a tensor stays too, counted in `Stats.held`.

Refused: a file system without room for what is to be spilled (`TightfitError`, before anything is overwritten). The
file has no name, so it is gone with the process, however the process ends.

docs/gpu.md says what a card has run of the streams. `tests/engine/test_pretend.py` runs them on a card that does not
exist, which copies as late as the rules of streams allow.
"""

from __future__ import annotations

import functools
import mmap
import os
import sys
import tempfile
import weakref
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from tightfit import accelerator
from tightfit.core import Backing, TightfitError, format_bytes, parse_spill

__all__ = ["Coming", "Leaving", "Offloaded", "Parcel", "Pool", "Shipment", "held_bytes"]

_GRANULE_BYTES = mmap.PAGESIZE
_ARENA_BYTES = 64 * 2**20  # the least that is pinned at once, where there is room
_ARENA_MOST_BYTES = 2**30  # unless one buffer needs more


#: Those that there are.
_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


def held_bytes() -> int:
    """Bytes that all pools have from the system, in use or not."""
    return sum(pool.taken_bytes for pool in _pools)


class Pool:
    """Room for parcels off the device: at most `capacity_bytes` of host memory, or of a file in the folder `spill`
    (None: no limit). A buffer is used again for a parcel of the same size."""

    def __init__(
        self, capacity_bytes: int | None = None, spill: str | Path | None = None, ahead: int | None = None
    ) -> None:
        self.capacity_bytes, self.spill = capacity_bytes, parse_spill(spill)
        self.ahead = ahead  # shipments fetched early; None: one where copies run beside the compute, else none
        self._mapped_bytes = 0
        self.stored_bytes = 0  # by parcels, now
        self.most_bytes = 0
        self.copied_bytes = 0  # off the device, ever
        self._free: dict[tuple[torch.device, int], list[tuple[torch.Tensor, Any]]] = defaultdict(list)
        self._pinned = _Arenas()
        self._rooms: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        _pools.add(self)
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
            made = self._buffer(size_bytes, device)
            if made is None:
                return None
            buffer, last_read = made, None
        self.stored_bytes += size_bytes
        self.most_bytes = max(self.most_bytes, self.stored_bytes)
        self.copied_bytes += storage.nbytes()
        source = _bytes_of(storage)
        lanes = self.lanes(device)
        if lanes is None:
            buffer[: source.numel()].copy_(source)
            return Parcel(self, buffer, source.numel(), device)
        leaving = lanes.out(source, buffer[: source.numel()], last_read)
        return Parcel(self, buffer, source.numel(), device, leaving)

    def room(self, size_bytes: int, device: torch.device) -> torch.Tensor | None:
        """A buffer of at least `size_bytes` for something of `device` that is not a parcel; `room_is_free` returns it.
        None: there is no room left."""
        size_bytes = -(-size_bytes // _GRANULE_BYTES) * _GRANULE_BYTES
        waiting = self._free[device, size_bytes]
        buffer, last_read = waiting.pop() if waiting else (self._buffer(size_bytes, device), None)
        if last_read is not None:
            accelerator.running_stream(device).wait_event(last_read)
        if buffer is not None:
            self.stored_bytes += size_bytes
            self.most_bytes = max(self.most_bytes, self.stored_bytes)
        return buffer

    def room_for(self, tensor: torch.Tensor, device: torch.device | None = None) -> torch.Tensor | None:
        """Room for what is in `tensor`, to be copied to `device` (None: the tensor's own). It is the same whenever it
        is asked for, since whoever has read the tensor may refer to it."""
        known: torch.Tensor | None = self._rooms.get(tensor)  # type: ignore[no-untyped-call]
        if known is None or known.numel() < tensor.untyped_storage().nbytes():
            known = self.room(tensor.untyped_storage().nbytes(), device or tensor.device)
            if known is not None:
                self._rooms[tensor] = known
        return known

    def room_is_free(self, buffer: torch.Tensor, device: torch.device) -> None:
        """What this thread's stream copies out of it already comes before whatever is written there next."""
        self.stored_bytes -= buffer.numel()
        last_read = accelerator.running_stream(device).record_event() if self.lanes(device) is not None else None
        self._free[device, buffer.numel()].append((buffer, last_read))

    def give_back(self, parcel: Parcel, last_read: Any) -> None:
        self.stored_bytes -= parcel.buffer.numel()
        self._free[parcel.device, parcel.buffer.numel()].append((parcel.buffer, last_read))

    def begin_out(self, source: torch.Tensor, room: torch.Tensor) -> Leaving:
        """Begin to copy `source` into `room`, which has its layout and which no other copy of this step reads."""
        lanes = self.lanes(source.device)
        if lanes is not None:
            return lanes.out(source, room, None)
        room.copy_(source)
        return Leaving(source)

    def finish_out(self, device: torch.device) -> None:
        """Return when the host can read all that was sent out of the device."""
        lanes = self.lanes(device)
        if lanes is not None:
            lanes.outward.synchronize()

    def begin_back(self, room: torch.Tensor, device: torch.device) -> Coming:
        """Begin to copy what is in `room`, which nobody writes any more, to the device."""
        lanes = self.lanes(device)
        return Coming(_fresh(room, device).copy_(room)) if lanes is None else lanes.back(room, None)

    def lanes(self, device: torch.device) -> _Lanes | None:
        """The streams that copy beside the compute. None: the device has none."""
        return _lanes_of(device) if accelerator.has_streams(device) else None

    def ship(self, shipment: Shipment) -> None:
        """The forward of one more unit is over."""
        self._shipments = [known for known in self._shipments if known() is not None]
        self._land_last()
        self._shipments.append(weakref.ref(shipment))

    def _land_last(self) -> None:
        last = self._shipments[-1]() if self._shipments else None
        if last is not None:
            last.land()

    def opened(self, shipment: Shipment) -> None:
        """Backward has come to the unit of `shipment`: begin to fetch the shipments before it."""
        self._land_last()
        alive = [each for known in self._shipments if (each := known()) is not None]
        if shipment not in alive:
            return
        place = alive.index(shipment)
        ahead = self.ahead if self.ahead is not None else int(shipment.device_copies_beside)
        for each in alive[max(0, place - ahead) : place]:
            each.prefetch()

    @property
    def taken_bytes(self) -> int:
        """By all buffers, in use or not."""
        return self._mapped_bytes + self._pinned.taken_bytes

    @property
    def taken(self) -> dict[Backing, int]:
        """The same by what lies behind it."""
        found = dict.fromkeys(Backing, 0)
        found[Backing.PINNED] = self._pinned.taken_bytes
        found[Backing.PAGEABLE if self.spill is None else Backing.FILE] = self._mapped_bytes
        return found

    def _buffer(self, size_bytes: int, device: torch.device) -> torch.Tensor | None:
        room_bytes = sys.maxsize if self.capacity_bytes is None else self.capacity_bytes - self.taken_bytes
        if self.spill is None and accelerator.has_streams(device):
            return self._pinned.buffer(size_bytes, room_bytes)
        if size_bytes > room_bytes:
            return None
        mapped = mmap.mmap(-1, size_bytes) if self.spill is None else _mapped_file(self.spill, size_bytes)
        self._mapped_bytes += size_bytes
        return torch.frombuffer(mapped, dtype=torch.uint8)


class _Arenas:
    """Pinned memory in few large blocks, from which buffers are cut.

    torch rounds each request for pinned memory up to a power of two, so a buffer of its own could take nearly twice its
    size; and pinning takes the driver long. So the blocks are powers of two, and each is as large as all before it.
    """

    def __init__(self) -> None:
        self.taken_bytes = 0
        self._rests: list[torch.Tensor] = []  # of each block, what is not cut off yet
        self._refused_bytes = sys.maxsize  # what the system would not pin

    def buffer(self, size_bytes: int, room_bytes: int) -> torch.Tensor | None:
        """None: it does not fit into `room_bytes`, or the system pins no more."""
        place = next((i for i, rest in enumerate(self._rests) if rest.numel() >= size_bytes), None)
        if place is None:
            block = self._block(size_bytes, room_bytes)
            if block is None:
                return None
            place = len(self._rests)
            self._rests.append(block)
        buffer, self._rests[place] = self._rests[place][:size_bytes], self._rests[place][size_bytes:]
        return buffer

    def _block(self, size_bytes: int, room_bytes: int) -> torch.Tensor | None:
        least_bytes = _power_of_two(size_bytes)
        wanted_bytes = max(least_bytes, _power_of_two(min(max(_ARENA_BYTES, self.taken_bytes), _ARENA_MOST_BYTES)))
        while wanted_bytes >= least_bytes:
            if wanted_bytes <= room_bytes and wanted_bytes < self._refused_bytes:
                block = accelerator.pinned_if_possible(wanted_bytes)
                if block is not None:
                    self.taken_bytes += wanted_bytes
                    return block
                self._refused_bytes = wanted_bytes
            wanted_bytes //= 2
        return None


def _power_of_two(size_bytes: int) -> int:
    """The least that is not less."""
    return 1 << (size_bytes - 1).bit_length()


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


class Leaving(NamedTuple):
    """What is being copied off the device: it stays there until it has landed."""

    source: torch.Tensor
    written: Any = None  # an event: the copy is done; None: it was done at once
    stream: Any = None  # on which the source was made

    def land(self) -> None:
        """Whoever gets the memory of the source comes after the copy, once the source is let go of."""
        if self.written is not None:
            self.stream.wait_event(self.written)


@functools.cache
def _lanes_of(device: torch.device) -> _Lanes:
    """The same for all pools: torch's allocator keeps memory apart by stream, so each new stream would reserve more."""
    return _Lanes(device)


class _Lanes:
    """One stream for each direction of one card."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.outward, self.inward = accelerator.new_stream(device), accelerator.new_stream(device)

    def out(self, source: torch.Tensor, buffer: torch.Tensor, last_read: Any) -> Leaving:
        """Copy off the device: after the op that computes `source`, and after the last copy out of `buffer`."""
        current = accelerator.running_stream(self.device)
        self.outward.wait_stream(current)
        if last_read is not None:
            self.outward.wait_event(last_read)
        with accelerator.on_stream(self.outward):
            buffer.copy_(source, non_blocking=True)
            written = self.outward.record_event()
        return Leaving(source, written, current)

    def back(self, buffer: torch.Tensor, written: Any) -> Coming:
        """Begin to copy to the device. `written`: the event after which `buffer` can be read; None: it can."""
        current = accelerator.running_stream(self.device)
        fresh = _fresh(buffer, self.device)
        self.inward.wait_stream(current)  # whoever had this memory before may be at work on it still
        if written is not None:
            self.inward.wait_event(written)
        with accelerator.on_stream(self.inward):
            fresh.copy_(buffer, non_blocking=True)
            arrived = self.inward.record_event()
        return Coming(fresh, arrived, current)


def _fresh(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)


class Coming(NamedTuple):
    """What is being copied to the device: it may be used, or let go of, once it was taken."""

    fresh: torch.Tensor
    arrived: Any = None  # an event; None: it is there
    stream: Any = None  # whose memory it lies in

    def finish(self) -> None:
        """Return when it is there, so that the host may write over what is copied."""
        if self.arrived is not None:
            self.arrived.synchronize()

    def taken(self) -> torch.Tensor:
        """The copy, for the stream that runs now."""
        if self.arrived is not None:
            current = accelerator.running_stream(self.fresh.device)
            current.wait_event(self.arrived)
            if current != self.stream:  # it was on its way for another one, which gets the memory back
                self.fresh.record_stream(current)
        return self.fresh


class Parcel:
    """The bytes of one storage, in the pool."""

    def __init__(
        self, pool: Pool, buffer: torch.Tensor, size_bytes: int, device: torch.device, leaving: Leaving | None = None
    ) -> None:
        self.pool, self.buffer, self.size_bytes, self.device = pool, buffer, size_bytes, device
        self.written = None if leaving is None else leaving.written
        self._leaving = leaving
        self._coming: Coming | None = None
        self._is_given_back = False
        self._last_read: Any = None

    def land(self) -> None:
        """Let go of what was copied: whoever gets its memory comes after the copy."""
        if self._leaving is not None:
            self._leaving.land()
            self._leaving = None

    def prefetch(self) -> None:
        """Begin to copy back, if that has not begun."""
        if self._coming is not None or self._is_given_back:
            return
        lanes = self.pool.lanes(self.device)
        content = self.buffer[: self.size_bytes]
        if lanes is None:
            fresh = torch.empty(self.size_bytes, dtype=torch.uint8, device=self.device)
            self._coming = Coming(fresh.copy_(content))
        else:
            self._coming = lanes.back(content, self.written)
            self._last_read = self._coming.arrived

    def fetch(self) -> torch.Tensor:
        """The bytes, on the device."""
        self.prefetch()
        assert self._coming is not None
        coming, self._coming = self._coming, None
        return coming.taken()

    def give_back(self) -> None:
        """Return the buffer to the pool: the parcel will not be fetched again."""
        if self._is_given_back:
            return
        self._is_given_back = True
        self.land()
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

    def land(self) -> None:
        """Let go of what was sent out."""
        for each in self.parked:
            if each.parcel is not None:
                each.parcel.land()

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
