"""The names of the levers. What a lever is and does stands in its own module, `tightfit.levers.<name>`.

Invariant: one line of `Lever` for each lever. Refused: names that are none (`InvalidInput`, with the nearest).
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable
from typing import Any

from tightfit.core.errors import InvalidInput, did_you_mean


class Lever(enum.Enum):
    """What a plan may do to take bytes down; `plan(..., levers=)` names those that it may use."""

    RECOMPUTE = "recompute"  # units drop values and make them again
    LOSS_IN_PLACE = "loss_in_place"  # the loss makes its gradient in place of what it saved
    TILE = "tile"  # head and loss, and token-wise modules, a tile of rows at a time; not bit for bit
    NEST = "nest"  # units grouped, so that only some unit inputs are kept
    OFFLOAD = "offload"  # kept values moved to host memory
    STATE_IN_HOST = "state_in_host"  # what the optimizer keeps of large parameters waits in host memory
    GRADIENTS_IN_HOST = "gradients_in_host"  # gradients wait in host memory until they are added to, or stepped with
    OPTIMIZER_CHUNKS = "optimizer_chunks"  # the optimizer steps a few parameters at a time
    STEP_IN_BACKWARD = "step_in_backward"  # each parameter is stepped when its gradient is there, which goes at once
    STREAM_WEIGHTS = "stream_weights"  # frozen weights wait in host memory, and are on the device while they are read

    __hash__ = object.__hash__  # Enum's own is written in Python, and planning looks members up by the million


class LeversAsked(frozenset[Lever]):
    """Levers that a user asked for. `by_name`: those that were named each by itself, and not by "all"."""

    by_name: frozenset[Lever]

    def __new__(cls, levers: Iterable[Lever], by_name: Iterable[Lever]) -> LeversAsked:
        found = super().__new__(cls, levers)
        found.by_name = frozenset(by_name) & found
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return LeversAsked, (frozenset(self), self.by_name)


def by_name(levers: Collection[Lever] | None) -> frozenset[Lever]:
    """Those of `levers` that a user named each by itself. Of levers that code has put together, none."""
    return levers.by_name if isinstance(levers, LeversAsked) else frozenset()


def levers_named(asked: Collection[Lever | str] | str | None) -> frozenset[Lever] | None:
    """Levers and names of levers as levers; text as `parse_levers` reads it; `None`, the default, stays. So do
    `LeversAsked`, which know already what was named. Raises `InvalidInput` for what is none."""
    if asked is None or isinstance(asked, str):
        return None if asked is None else parse_levers(asked)
    if isinstance(asked, LeversAsked):
        return asked
    if not isinstance(asked, Iterable):
        raise InvalidInput(
            f"levers are names or Lever's, several in a tuple or with commas between them, not {asked!r}"
        )
    names = [each.value if isinstance(each, Lever) else each for each in asked]
    for each in names:
        if not isinstance(each, str) or not each.strip():
            raise InvalidInput(_no_lever(each))
    return parse_levers(",".join(names)) or frozenset()


def _no_lever(name: object) -> str:
    known = [lever.value for lever in Lever]
    return f"unknown lever {name!r}{did_you_mean(str(name).replace('-', '_'), known)}: use {', '.join(known)}"


def parse_levers(text: str) -> LeversAsked | None:
    """Levers named in `text`: `"recompute,nest"`, `"all"`, and `"all,-tile"` for all but one. Empty: the default.

    Raises `InvalidInput` for a name that is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        return None
    known = {lever.value: lever for lever in Lever}
    chosen: set[Lever] = set()
    named: set[Lever] = set()
    left_out: set[Lever] = set()
    for name in names:
        key = name.removeprefix("-").replace("-", "_")
        if key not in known and name != "all":
            raise InvalidInput(f"{_no_lever(name)}, all, or a minus before one, as in all,-tile")
        if name == "all":
            chosen |= set(Lever)
        elif name.startswith("-"):
            chosen -= {known[key]}
            left_out.add(known[key])
        else:
            chosen.add(known[key])
            named.add(known[key])
    if both := sorted(each.value for each in named & left_out):
        raise InvalidInput(f"{both[0]} is asked for and left out in {text!r}: give one of the two")
    return LeversAsked(chosen, named)
