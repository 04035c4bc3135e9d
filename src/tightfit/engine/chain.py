"""Unit inputs that are not kept: where the tape of a unit finds them again in backward.

Idea: to a tape, a tensor that may be gone is a value with a *source* (`engine.source`). Here the source is the unit
before. A `Chained` input is what that unit handed on, and that unit's tape makes it again. To do so, the tape may have
to ask the unit before it in turn. This gives a sweep over units, from the last input that is there. The plan decides
which inputs on the way stay for their own backward (`core.Advance`).

Invariant: a tensor counts as what a unit handed on only if it is the same storage in the same version. In any other
case it is held as without a plan. That costs bytes, but never a gradient. Refused: nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tightfit.engine.frame_plan import Stats
    from tightfit.engine.tape import Tape


class Chain:
    """What the units of one plan have handed on, for as long as it is alive; and which inputs each sweep stores."""

    def __init__(self, stores: Mapping[tuple[str, str], frozenset[str]], stats: Stats) -> None:
        self.stats = stats  # counts the ops that sweeps run
        self._stores = stores  # by (base, target): the units on the way whose inputs stay
        self.sweeping = False
        self._lent: dict[int, tuple[weakref.ref[torch.UntypedStorage], int, weakref.ref[Tape], int, str]] = {}

    def lend(self, tensor: torch.Tensor, unit: str, tape: Tape, value: int) -> None:
        """`unit` hands on `tensor`. Its tape can make it again, as its value `value`."""
        storage = tensor.untyped_storage()
        address = int(storage._cdata)
        known = weakref.ref(storage, lambda _: self._lent.pop(address, None))
        self._lent[address] = (known, tensor._version, weakref.ref(tape), value, unit)

    def borrowed(self, tensor: torch.Tensor, unit: str) -> Chained | None:
        """A source for an input of `unit`. None: no unit handed on this tensor as it is now."""
        storage = tensor.untyped_storage()
        found = self._lent.get(int(storage._cdata))
        if found is None:
            return None
        known, version, tape, value, producer = found
        alive = tape()
        if known() is not storage or tensor._version != version or alive is None:
            return None
        return Chained(self, unit, producer, alive, value)

    def stored(self, base: str, target: str, way: tuple[str, ...]) -> frozenset[str]:
        """The units on the `way` whose inputs the sweep stores. Where the plan says nothing, these are all of them."""
        return self._stores.get((base, target), frozenset(way))


class Chained:
    """A source for an input that the unit before makes again."""

    __slots__ = ("chain", "producer", "stays", "stored", "tape", "unit", "value")

    def __init__(self, chain: Chain, unit: str, producer: str, tape: Tape, value: int) -> None:
        self.chain, self.unit, self.producer, self.tape, self.value = chain, unit, producer, tape, value
        self.stored: torch.Tensor | None = None
        self.stays = False

    def seal(self) -> None:
        """Nothing to do: the tape of the unit before has all that is needed."""

    def take(self, keep: bool) -> torch.Tensor:
        tensor = self.stored
        if tensor is None and self.chain.sweeping:  # on the way to another unit
            tensor = self._produced()
            self.stored = tensor if self.stays else None
        elif tensor is None:
            self._decide()
            self.chain.sweeping = True
            try:
                tensor = self._produced()
            finally:
                self.chain.sweeping = False
        elif not keep:
            self.stored = None
        return tensor

    def forget(self) -> None:
        self.stored = None

    def _produced(self) -> torch.Tensor:
        before = self.tape.ran
        tensor = self.tape.produce(self.value)
        self.chain.stats.rerun_ops += self.tape.ran - before
        return tensor

    def _previous(self) -> Chained | None:
        return next((s for s in self.tape.sources.values() if isinstance(s, Chained)), None)

    def _decide(self) -> None:
        """Mark the inputs on the way that the sweep will store."""
        way = []
        base = self.producer
        link = self._previous()
        while link is not None and link.stored is None:
            way.append(link)
            base = link.producer
            link = link._previous()
        stays = self.chain.stored(base, self.unit, tuple(each.unit for each in way))
        for each in way:
            each.stays = each.unit in stays
