"""When what units send off the device is gone from it, and when it comes back: the referee's side of `engine.offload`.

On the CPU a parcel is gone with the end of its unit's forward, and comes back when it is asked for. Where copies run
beside the compute, it stays until the next unit has sent out its own, or until backward wants the first parcel. And
with the first parcel that backward takes of a unit, all those of the unit before it are fetched as well.

Invariant: the same moments as in the engine, which a card that does not exist shows (`tests/engine/test_pretend.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

__all__ = ["Shipments"]


class Shipments:
    """Of one step. `exits`: by frame that sends something out, the event at which its forward is over. `openings`: the
    events before which backward takes a parcel. `end`: the last event of the step."""

    def __init__(self, exits: Mapping[int, int], openings: Iterable[int], end: int, *, copies_beside: bool) -> None:
        order = sorted(exits, key=exits.__getitem__)
        self.landed = dict(exits)  # by frame: the event after which the device holds its parcels no more
        self._before: dict[int, int] = {}
        self._opened: set[int] = set()
        if copies_beside and order:
            for frame, following in itertools.pairwise(order):
                self.landed[frame] = exits[following]
                self._before[following] = frame
            last = order[-1]
            self.landed[last] = min((event - 1 for event in openings if event > exits[last]), default=end)

    def fetched_with(self, frame: int) -> tuple[int, ...]:
        """Backward takes a parcel of `frame`: the frame whose parcels it fetches as well, if there is one, the first
        time."""
        if frame in self._opened or frame not in self._before:
            return ()
        self._opened.add(frame)
        return (self._before[frame],)
