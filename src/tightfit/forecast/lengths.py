"""The longest sequence of a data set."""

from __future__ import annotations

import json
import stat
from collections import Counter
from pathlib import Path

from tightfit.core import (
    InvalidInput,
    format_bytes,
)

#: No more of a file of lengths is read.
MOST_LENGTHS_BYTES = 1 << 30


def longest_length(path: str | Path) -> tuple[int, str]:
    """The longest example in a file of lengths, and one line that says what was looked at.

    A histogram `{"length": count}`, a list of lengths, one length a line, or JSON lines with `input_ids`, at most
    `MOST_LENGTHS_BYTES` in all. Raises `InvalidInput` for anything else.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # a pipe or a device may never end
            raise InvalidInput(f"cannot read the lengths in {str(path)!r}: it is not a regular file")
        with open(path, "rb") as file:
            content = file.read(MOST_LENGTHS_BYTES + 1)
        if len(content) > MOST_LENGTHS_BYTES:
            raise InvalidInput(
                f"{str(path)!r} holds more than {format_bytes(MOST_LENGTHS_BYTES)}, which is as much as is read: "
                "give a histogram of the lengths"
            )
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read the lengths in {str(path)!r}: {error}") from None
    try:
        lengths = _lengths_in(text)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise InvalidInput(
            f"{str(path)!r} holds no lengths: expected a JSON object of length and count, a list, a number a line, "
            'or JSON lines with "input_ids"'
        ) from None
    if not lengths or max(lengths) < 1:
        raise InvalidInput(f"{str(path)!r} holds no lengths")
    if min(lengths) < 0:
        raise InvalidInput(f"{str(path)!r} holds a length of {min(lengths)}: a length is a number of tokens")
    total = sum(lengths.values())
    mean = sum(length * count for length, count in lengths.items()) / total
    longest = max(lengths)
    return longest, f"planned for the longest of {total:,} examples: {longest} tokens (the mean is {mean:.0f})"


def _lengths_in(text: str) -> dict[int, int]:
    try:
        data = json.loads(text)
    except ValueError:
        data = None
    if isinstance(data, dict) and "input_ids" not in data:
        return {int(length): int(count) for length, count in data.items() if int(count) > 0}
    if isinstance(data, list) and all(isinstance(item, int) for item in data):
        return dict(Counter(data))
    lines = [line for line in text.splitlines() if line.strip()]
    return dict(
        Counter(len(json.loads(line)["input_ids"]) if line.lstrip().startswith("{") else int(line) for line in lines)
    )
