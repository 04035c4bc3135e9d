"""Sizes and percentages as users write them, parsed once, at the edge.

Invariant: inside the library a size is an integer of bytes. Refused: text that is no size (`InvalidInput`).
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction

from tightfit.core.errors import InvalidInput
from tightfit.core.results import AUTO

_UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


_SIZE = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)")


_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*%")


def parse_bytes(text: str | int, whole_bytes: int | None = None) -> int:
    """Bytes meant by `text`: `"22GiB"`, `"22GB"`, `"1500000"`, an int, or `"80%"` of `whole_bytes`.

    Raises `InvalidInput` for anything else, for zero and negative sizes, and for a percentage when there
    is no whole to take it of.
    """
    if isinstance(text, str) and (percent := percentage(text)) is not None:
        if whole_bytes is None:
            raise InvalidInput(f"{text!r} is a percentage, but there is nothing known to take it of; give bytes")
        size_bytes = math.floor(percent / 100 * whole_bytes)
    else:
        size_bytes = _size_bytes(text, "a size such as 22GiB, 800MB or 60%")
    if size_bytes <= 0:
        raise InvalidInput(f"expected more than zero bytes, not {text!r}")
    return size_bytes


def parse_host_budget(asked: str | int | None) -> int | None:
    """The most bytes that may wait in host memory: a size, or 0 for none. `None` stays: there is no limit.

    Raises `InvalidInput` for anything else. A percentage is none: a plan is made for one step and may run on any
    machine, so there is no one whole to take it of.
    """
    if asked is None:
        return None
    if percentage(asked) is not None:
        raise InvalidInput(f"a host budget is a size such as 64GiB, or 0 for none, and no percentage such as {asked!r}")
    size_bytes = _size_bytes(asked, "a host budget as a size such as 64GiB, or 0 for none")
    if size_bytes < 0:
        raise InvalidInput(f"expected a host budget of at least 0 bytes, not {asked!r}")
    return size_bytes


def _size_bytes(text: object, expected: str) -> int:
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise InvalidInput(f"expected {expected}, not {text!r}")
    if isinstance(text, int):
        return text
    size = _SIZE.fullmatch(text.strip())
    if size is None:
        raise InvalidInput(f"expected {expected}, not {text!r}")
    unit = size[2].upper()
    if unit not in _UNITS:
        raise InvalidInput(f"unknown unit {size[2]!r} in {text!r}: use B, KB, MB, GB, TB, KiB, MiB, GiB or TiB")
    return math.floor(Fraction(Decimal(size[1])) * _UNITS[unit])


def require_norm(max_norm: object) -> None:
    """Raise `InvalidInput` for what gradients cannot be clipped to; `None` stays: they are not clipped."""
    is_number = isinstance(max_norm, (int, float)) and not isinstance(max_norm, bool)
    if max_norm is not None and not (is_number and 0 < max_norm < math.inf):  # type: ignore[operator]  # a number
        raise InvalidInput(f"max_norm={max_norm!r} is no norm to clip to: give a number above 0")


def percentage(text: str | int) -> Fraction | None:
    """The percentage that `text` asks for (`"60%"`); `None` when it asks for something else."""
    found = _PERCENT.fullmatch(text.strip()) if isinstance(text, str) else None
    return Fraction(Decimal(found[1])) if found else None


def require_part(budget: str | int, whole: str) -> None:
    """Raise `InvalidInput` when `budget` is a percentage above 100 of `whole`, which has no more than all of it."""
    percent = percentage(budget)
    if percent is not None and percent > 100:
        raise InvalidInput(f"a budget of {budget!r} is more than all of {whole}: give 100% or less, or a size")


def parse_batch(text: str, asked: str = "--batch") -> int | str:
    """`"auto"`, or a number of sequences. Raises `InvalidInput` for anything else. `asked`: by which option."""
    if text.strip().lower() == AUTO:
        return AUTO
    try:
        return int(text)
    except ValueError:
        raise InvalidInput(f"expected {asked} with a number of sequences or auto, not {text!r}") from None
