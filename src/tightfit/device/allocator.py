"""The CUDA caching allocator's rules, so that *reserved* bytes can be forecast beside allocated ones.

What a card runs out of is not what tensors hold but what the allocator has taken from the driver: blocks are rounded,
come out of larger segments, and what is freed stays reserved. The rules, from `c10/cuda/CUDACachingAllocator.cpp`
(torch 2.11 to 2.13; names are the constants there):

* sizes are multiples of 512 bytes (`kMinBlockSize`);
* up to 1 MiB (`kSmallSize`) a block comes from the small pool, whose segments are 2 MiB (`kSmallBuffer`); above, from
  the large pool, whose segments are 20 MiB (`kLargeBuffer`) for blocks under 10 MiB (`kMinLargeAlloc`) and else the
  size rounded up to 2 MiB (`kRoundLarge`);
* the smallest free block that is large enough is taken, at the lowest address among equals, and split when 512 bytes
  (small pool) or more than 1 MiB (large pool) would be left;
* a freed block joins its free neighbours in its segment;
* when the driver has no more, segments that are wholly free are given back and the request is tried once more;
* with expandable segments each pool has one segment, which grows by pages of 2 MiB (small) or 20 MiB (large).

Invariant: no two live blocks overlap, and reserved is never less than allocated. Refused: nothing; a request beyond
`limit_bytes` is answered by `OutOfMemory`. Streams, garbage-collection thresholds and rounding options are left out.
"""

from __future__ import annotations

import bisect
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

__all__ = ["CachingAllocator", "OutOfMemory", "peaks", "reserved_peak_bytes"]

MIN_BLOCK_BYTES = 512
SMALL_BYTES = 1 << 20
SMALL_SEGMENT_BYTES = 2 << 20
LARGE_SEGMENT_BYTES = 20 << 20
MIN_LARGE_BYTES = 10 << 20
ROUND_LARGE_BYTES = 2 << 20


class OutOfMemory(Exception):
    """The request does not fit under the limit, even with every free segment given back."""


@dataclass(slots=True, eq=False)
class _Block:
    start: int
    size: int
    small: bool
    free: bool
    before: _Block | None = None
    after: _Block | None = None


class CachingAllocator:
    """Blocks by the rules above. Attributes: `allocated_bytes`, `reserved_bytes` and the peaks of both."""

    def __init__(self, limit_bytes: int | None = None, *, expandable: bool = False) -> None:
        self.limit_bytes, self.expandable = limit_bytes, expandable
        self.allocated_bytes = self.reserved_bytes = 0
        self.allocated_peak_bytes = self.reserved_peak_bytes = 0
        self._live: dict[Hashable, _Block] = {}
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # (size, start), by pool
        self._at: dict[int, _Block] = {}  # free blocks by start
        self._tail: dict[bool, _Block | None] = {True: None, False: None}
        self._next_start = 0

    def allocate(self, key: Hashable, size_bytes: int) -> None:
        """Take a block called `key`. Raises `OutOfMemory`."""
        if size_bytes <= 0:
            return
        size = -(-size_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES
        small = size <= SMALL_BYTES
        block = self._best_fit(size, small) or self._grow(size, small)
        rest = block.size - size
        if rest >= MIN_BLOCK_BYTES if small else rest > SMALL_BYTES:
            remainder = _Block(block.start + size, rest, small, True, block, block.after)
            if block.after is not None:
                block.after.before = remainder
            if self._tail[small] is block:
                self._tail[small] = remainder
            block.after, block.size = remainder, size
            self._put(remainder)
        block.free = False
        self._live[key] = block
        self.allocated_bytes += block.size
        self.allocated_peak_bytes = max(self.allocated_peak_bytes, self.allocated_bytes)

    def free(self, key: Hashable) -> None:
        """Give back the block called `key`; an unknown key is one of zero bytes."""
        block = self._live.pop(key, None)
        if block is None:
            return
        self.allocated_bytes -= block.size
        block.free = True
        for other in (block.before, block.after):
            if other is not None and other.free:
                self._take(other)
                block = self._joined(block, other)
        self._put(block)

    def live(self) -> list[Hashable]:
        return list(self._live)

    def _joined(self, one: _Block, other: _Block) -> _Block:
        first, second = (one, other) if one.start < other.start else (other, one)
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        if self._tail[one.small] is second:
            self._tail[one.small] = first
        return first

    def _put(self, block: _Block) -> None:
        bisect.insort(self._free[block.small], (block.size, block.start))
        self._at[block.start] = block

    def _take(self, block: _Block) -> None:
        pool = self._free[block.small]
        del pool[bisect.bisect_left(pool, (block.size, block.start))]
        del self._at[block.start]

    def _best_fit(self, size: int, small: bool) -> _Block | None:
        pool = self._free[small]
        i = bisect.bisect_left(pool, (size, -1))
        if i == len(pool):
            return None
        block = self._at[pool[i][1]]
        self._take(block)
        return block

    def _grow(self, size: int, small: bool) -> _Block:
        return self._extend(size, small) if self.expandable else self._segment(size, small)

    def _segment(self, size: int, small: bool) -> _Block:
        if small:
            segment = SMALL_SEGMENT_BYTES
        elif size < MIN_LARGE_BYTES:
            segment = LARGE_SEGMENT_BYTES
        else:
            segment = -(-size // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES
        self._reserve(segment)
        block = _Block(self._next_start, segment, small, False)
        self._next_start += segment + MIN_BLOCK_BYTES  # segments are no neighbours
        return block

    def _extend(self, size: int, small: bool) -> _Block:
        page = SMALL_SEGMENT_BYTES if small else LARGE_SEGMENT_BYTES
        tail = self._tail[small]
        start_of_pool = 0 if small else 1 << 60
        have = tail.size if tail is not None and tail.free else 0
        more = -(-(size - have) // page) * page
        self._reserve(more)
        if tail is not None and tail.free:
            self._take(tail)
            tail.size += more
            return tail
        start = start_of_pool if tail is None else tail.start + tail.size
        block = _Block(start, more, small, False, tail)
        if tail is not None:
            tail.after = block
        self._tail[small] = block
        return block

    def _reserve(self, size: int) -> None:
        if self.limit_bytes is not None and self.reserved_bytes + size > self.limit_bytes:
            self.release_free_segments()
            if self.reserved_bytes + size > self.limit_bytes:
                raise OutOfMemory(
                    f"{size} bytes more, with {self.reserved_bytes} reserved and {self.allocated_bytes} allocated"
                )
        self.reserved_bytes += size
        self.reserved_peak_bytes = max(self.reserved_peak_bytes, self.reserved_bytes)

    def release_free_segments(self) -> None:
        """What `torch.cuda.empty_cache` does: segments without a live block go back to the driver."""
        if self.expandable:
            return  # pages are unmapped one by one, which the growing tail stands for
        for block in [b for b in self._at.values() if b.before is None and b.after is None]:
            self._take(block)
            self.reserved_bytes -= block.size


def reserved_peak_bytes(
    static: Iterable[int],
    step: Iterable[tuple[Hashable, int]],
    *,
    steps: int = 2,
    limit_bytes: int | None = None,
    expandable: bool = False,
) -> int:
    """The second of `peaks`."""
    return peaks(static, step, steps=steps, limit_bytes=limit_bytes, expandable=expandable)[1]


def peaks(
    static: Iterable[int],
    step: Iterable[tuple[Hashable, int]],
    *,
    steps: int = 2,
    limit_bytes: int | None = None,
    expandable: bool = False,
) -> tuple[int, int]:
    """Most bytes allocated (blocks as they were split) and reserved in `steps` equal steps over `static` blocks, which
    live throughout.

    `step`: (key, bytes) takes a block and (key, minus anything) gives it back, in order; what is left at the end of a
    step (gradients) goes before the next. Raises `OutOfMemory` beyond `limit_bytes`.
    """
    allocator = CachingAllocator(limit_bytes, expandable=expandable)
    for i, size in enumerate(static):
        allocator.allocate(("static", i), size)
    kept = set(allocator.live())
    events = list(step)
    for _ in range(steps):
        for key, size in events:
            if size > 0:
                allocator.allocate(key, size)
            else:
                allocator.free(key)
        for key in allocator.live():
            if key not in kept:
                allocator.free(key)
    return allocator.allocated_peak_bytes, allocator.reserved_peak_bytes
