"""Sizes as people read them.

Refused: nothing; reading sizes is `core.sizes`.
"""

from __future__ import annotations


def format_bytes(size_bytes: float, more_digits: int = 0) -> str:
    """`size_bytes` for people: `1.50 GiB`, `12.0 MiB`, `512 B`."""
    for unit, step in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size_bytes) >= step:
            amount = size_bytes / step
            return f"{amount:.{(2 if amount < 10 else 1) + more_digits}f} {unit}"
    return f"{int(size_bytes)} B"


def format_apart(one_bytes: int, other_bytes: int) -> tuple[str, str]:
    """Two sizes for people, with as many digits as it takes to tell them apart: `11.08 MiB`, `11.11 MiB`."""
    texts = (format_bytes(one_bytes), format_bytes(other_bytes))
    for digits in range(1, 13):
        if texts[0] != texts[1] or one_bytes == other_bytes:
            break
        texts = (format_bytes(one_bytes, digits), format_bytes(other_bytes, digits))
    return texts
