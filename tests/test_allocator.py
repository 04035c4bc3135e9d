"""The caching allocator's rules on cases worked by hand, and laws that hold for any sequence."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightfit.device.allocator import CachingAllocator, OutOfMemory, reserved_peak_bytes

KIB, MIB = 1 << 10, 1 << 20


def test_small_blocks_share_a_segment_of_two_mebibytes() -> None:
    allocator = CachingAllocator()
    for i in range(4):
        allocator.allocate(i, 512 * KIB)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (2 * MIB, 2 * MIB)
    allocator.allocate("one more", 1)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (2 * MIB + 512, 4 * MIB)


def test_middle_blocks_come_out_of_twenty_mebibytes() -> None:
    allocator = CachingAllocator()
    allocator.allocate("a", 8 * MIB)
    allocator.allocate("b", 8 * MIB)
    assert allocator.reserved_bytes == 20 * MIB
    allocator.allocate("c", 8 * MIB)  # four are left, which is too few
    assert allocator.reserved_bytes == 40 * MIB


def test_large_blocks_have_their_own_segment_rounded_to_two_mebibytes() -> None:
    allocator = CachingAllocator()
    allocator.allocate("a", 13 * MIB)
    assert allocator.reserved_bytes == 14 * MIB
    allocator.allocate("b", 30 * MIB)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (44 * MIB, 44 * MIB)  # 14: see the next


def test_a_large_block_is_not_split_for_the_sake_of_a_mebibyte() -> None:
    allocator = CachingAllocator()
    allocator.allocate("a", 12 * MIB)
    allocator.free("a")
    allocator.allocate("b", 11 * MIB)  # one is left over: the whole block is taken
    assert allocator.allocated_bytes == 12 * MIB
    allocator.free("b")
    allocator.allocate("c", 11 * MIB - 512)  # now more than one is left, so it is split
    assert allocator.allocated_bytes == 11 * MIB - 512


def test_freed_neighbours_join() -> None:
    allocator = CachingAllocator()
    for name in "abc":
        allocator.allocate(name, 6 * MIB)
    for name in "acb":
        allocator.free(name)
    allocator.allocate("whole", 19 * MIB)
    assert allocator.reserved_bytes == 20 * MIB


def test_the_smallest_block_that_is_large_enough_is_taken() -> None:
    allocator = CachingAllocator()
    for name, size in (("large", 40), ("small", 20)):
        allocator.allocate(name, size * MIB)
    allocator.free("large")
    allocator.free("small")
    allocator.allocate("a", 18 * MIB)
    allocator.allocate("b", 40 * MIB)
    assert allocator.reserved_bytes == 60 * MIB


def test_fragments_cannot_be_used_and_free_segments_are_given_back_before_it_fails() -> None:
    allocator = CachingAllocator(limit_bytes=100 * MIB)
    for i in range(4):
        allocator.allocate(i, 24 * MIB)
    allocator.free(0)
    allocator.free(2)
    allocator.allocate("larger than each", 48 * MIB)  # two segments of 24 go back to the driver
    assert allocator.reserved_bytes == 96 * MIB
    with pytest.raises(OutOfMemory):
        allocator.allocate("too much", 24 * MIB)


def test_expandable_segments_grow_where_they_end() -> None:
    rigid, elastic = CachingAllocator(), CachingAllocator(expandable=True)
    for allocator in (rigid, elastic):
        allocator.allocate("a", 30 * MIB)
        allocator.free("a")
        allocator.allocate("b", 50 * MIB)
    assert rigid.reserved_bytes == 80 * MIB
    assert elastic.reserved_bytes == 60 * MIB  # pages of twenty


def test_gradients_of_the_last_step_are_gone_in_the_next() -> None:
    step = [("activation", 30 * MIB), ("gradient", 30 * MIB), ("activation", -1)]
    assert reserved_peak_bytes([100 * MIB], step, steps=3) == 160 * MIB


Requests = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 64 * MIB)), max_size=60)


@given(Requests, st.booleans())
def test_reserved_is_never_less_than_allocated_and_nothing_overlaps(
    requests: list[tuple[int, int]], expandable: bool
) -> None:
    allocator = CachingAllocator(expandable=expandable)
    live: dict[int, int] = {}
    for key, size in requests:
        if key in live:
            allocator.free(key)
            del live[key]
        else:
            allocator.allocate(key, size)
            live[key] = size
        spans = sorted((b.start, b.start + b.size) for b in allocator._live.values())
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert allocator.reserved_bytes >= allocator.allocated_bytes >= sum(live.values())
    for key in list(live):
        allocator.free(key)
    assert allocator.allocated_bytes == 0
    free = sum(size for pool in allocator._free.values() for size, _ in pool)
    assert free == allocator.reserved_bytes
