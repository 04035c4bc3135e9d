"""Keep what user code changes in Python's objects while a step runs that trains nothing.

`step.snapshot` gives back tensors, buffers and random states. A LightningModule's `training_step` also appends losses
to a list, counts in a dict, updates a metric. This module walks what is reachable from given objects and notes the
content of containers, the attributes of objects, and the states of generators that Python or NumPy made.

Invariant: afterwards each container and each object holds what it held, the same objects in the same order.
Refused: an iterator on the way (`Unsupported`): what is taken from it cannot be given back.
"""

from __future__ import annotations

import io
import random
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tightfit.core import Unsupported

__all__ = ["python_state_kept"]

_LEAVES = (
    torch.Tensor, torch.Generator, str, bytes, int, float, complex, bool, type(None), type, types.ModuleType,
    types.FunctionType, types.BuiltinFunctionType, io.IOBase, torch.device, torch.dtype,
)  # fmt: skip
#: torch's own objects but modules: optimizers, schedulers, data loaders.
_OF_TORCH = "torch."


@contextmanager
def python_state_kept(*roots: Any, plain: tuple[Any, ...] = (), foreign: Callable[[type], bool]) -> Iterator[None]:
    """Put back what lies below `roots`, and the attributes of the objects `plain`, without what lies below those.

    `foreign`: is an object of this class none of the user's, and not to be walked?
    """
    notes = _Notes(foreign)
    for root in roots:
        notes.walk(root, type(root).__name__)
    for each in plain:
        notes.attributes(each)
    try:
        yield
    finally:
        notes.put_back()


class _Notes:
    def __init__(self, foreign: Callable[[type], bool]) -> None:
        self._foreign = foreign
        self._seen: dict[int, Any] = {}  # the objects too, so that no address is used again
        self._sequences: list[tuple[Any, list[Any]]] = []
        self._sets: list[tuple[set[Any], set[Any]]] = []
        self._tables: list[tuple[Any, dict[Any, Any]]] = []
        self._generators: list[Callable[[], None]] = []

    def walk(self, root: Any, name: str) -> None:
        open_things = [(root, name)]
        while open_things:
            thing, path = open_things.pop()
            if isinstance(thing, _LEAVES) or id(thing) in self._seen:
                continue
            self._seen[id(thing)] = thing
            open_things += self._noted(thing, path)

    def _noted(self, thing: Any, path: str) -> list[tuple[Any, str]]:
        """Note what `thing` holds; what is to be walked next."""
        if isinstance(thing, (list, deque)):
            self._sequences.append((thing, list(thing)))
            return [(each, f"{path}[{index}]") for index, each in enumerate(thing)]
        if isinstance(thing, (tuple, frozenset)):
            return [(each, path) for each in thing]
        if isinstance(thing, set):
            self._sets.append((thing, set(thing)))
            return []
        if isinstance(thing, dict):
            self._tables.append((thing, dict(thing)))
            return [(each, f"{path}[{key!r}]") for key, each in thing.items()]
        if isinstance(thing, random.Random):
            state = thing.getstate()
            self._generators.append(lambda: thing.setstate(state))
            return []
        if type(thing).__module__.startswith("numpy.random"):
            self._note_numpy(thing)
            return []
        if isinstance(thing, Iterator):
            raise Unsupported(
                f"{path} is an iterator ({type(thing).__name__}), and a step that is run to plan it would take from it "
                "what the training is to have: make it when the training step needs it, or leave the callback out"
            )
        return self.attributes(thing, path)

    def attributes(self, thing: Any, path: str = "") -> list[tuple[Any, str]]:
        kind = type(thing)
        held = getattr(thing, "__dict__", None)
        of_torch = f"{kind.__module__}.".startswith(_OF_TORCH) and not isinstance(thing, torch.nn.Module)
        if not isinstance(held, dict) or (path and (of_torch or self._foreign(kind))):
            return []
        self._tables.append((held, dict(held)))
        return [(each, f"{path}.{name}") for name, each in held.items()]

    def _note_numpy(self, thing: Any) -> None:
        if hasattr(thing, "bit_generator"):
            bits = thing.bit_generator
            state = bits.state
            self._generators.append(lambda: setattr(bits, "state", state))
        elif hasattr(thing, "get_state"):
            before = thing.get_state()
            self._generators.append(lambda: thing.set_state(before))

    def put_back(self) -> None:
        for sequence, before in self._sequences:
            if len(sequence) != len(before) or any(one is not other for one, other in zip(sequence, before)):
                sequence.clear()
                sequence.extend(before)
        for elements, held in self._sets:
            if elements != held:
                elements.clear()
                elements.update(held)
        for table, content in self._tables:
            if list(table) != list(content) or any(table[key] is not each for key, each in content.items()):
                table.clear()
                table.update(content)
        for restore in self._generators:
            restore()
