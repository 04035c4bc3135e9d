"""Which modules to plan as units, by the bytes that autograd saves in them.

Idea: containers (`ModuleList`, `Sequential`) show the blocks of most models, and `step.modules.find_units` takes those.
In some models other modules make most of what is saved: blocks in a `ModuleDict`, in attributes, or in a loop. The
first pass over the step sees whose calls made each saved value. From the root of the module tree, a module is divided
into its parts for as long as the parts together make what the whole makes.

Invariant: no unit lies inside another, and blocks that containers show stay units.
Refused: to divide a module whose parts are called more often than itself, since one plan would have to serve all of
their calls. Such a module is one unit, which the planner cuts into segments of ops (`plan.segments`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from tightfit.step.modules import children_of, modules_of, repeated_blocks

#: A module that holds less than this part of the saved bytes is not divided; it is like one block of a dozen.
_GRAIN = 1 / 12
#: A module is divided if its parts hold this much of what it holds; for the model itself less, as the loss is no part.
_WHOLE, _WHOLE_MODEL = 0.85, 0.5
#: A module that holds less than this is not worth planning.
_LEAST = 1 / 500
#: Other units must hold so much more of the saved bytes than the containers' blocks, and may hold so much less than
#: other modules that the tree suggests.
_BETTER = 0.05

_Call = tuple[str, int]


class Census:
    """Notes which modules were running when values were made and saved. A context manager around a forward."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls: dict[str, int] = defaultdict(int)
        self._paths = {id(module): path for path, module in modules_of(model).items()}
        self._open: tuple[_Call, ...] = ()
        self._hooks: list[Any] = []
        self._makers: dict[int, tuple[_Call, ...]] = {}
        self._holders: dict[int, tuple[_Call, ...]] = {}  # by saved value: the calls that were open all the while

    def __enter__(self) -> Census:
        self._hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _enter(self, module: nn.Module, *_: Any) -> None:
        path = self._paths.get(id(module))
        if path is not None:
            self.calls[path] += 1
            self._open += ((path, self.calls[path]),)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if self._open and self._paths.get(id(module)) == self._open[-1][0]:
            self._open = self._open[:-1]

    def made(self, value: int) -> None:
        self._makers[value] = self._open

    def saved(self, value: int) -> None:
        before = self._holders.get(value, self._makers.get(value))
        if before is None:  # it was there before the step
            return
        shared = 0
        while shared < min(len(before), len(self._open)) and before[shared] == self._open[shared]:
            shared += 1
        self._holders[value] = before[:shared]

    def divided(self, units: Mapping[str, nn.Module], sizes_bytes: Mapping[int, int]) -> dict[str, nn.Module]:
        """`units`, or other units if these hold clearly more of what is saved. `sizes_bytes` is by value."""
        held: dict[str, int] = defaultdict(int)
        total = 0
        for value, calls in self._holders.items():
            total += sizes_bytes[value]
            for path in {path for path, _ in calls}:
                held[path] += sizes_bytes[value]
        blocks = repeated_blocks(self.model)
        found = set(self._parts(self.model, "", held, total, blocks))
        now = sum(held[path] for path in units)
        # a unit that is no block of a container was only guessed from the module tree
        ahead = _BETTER if units.keys() == blocks.keys() else -_BETTER
        if not total or sum(held[path] for path in found) < now + ahead * total:
            return dict(units)
        return {path: module for path, module in modules_of(self.model).items() if path in found}

    def _parts(
        self, module: nn.Module, path: str, held: Mapping[str, int], total: int, blocks: Mapping[str, nn.Module]
    ) -> Iterator[str]:
        children = dict(self._called(module, path)) if path not in blocks else {}
        inside = sum(held[child] for child in children)
        often = any(self.calls[c] > self.calls[path] and held[c] > _BETTER * held[path] for c in children)
        is_whole = inside >= (_WHOLE if path else _WHOLE_MODEL) * held[path]
        is_around = any(not path or block.startswith(path + ".") for block in blocks if block != path)
        if not is_around and (not children or often or not is_whole or held[path] < _GRAIN * total):
            yield path
            return
        for child, part in children.items():
            if held[child] >= _LEAST * total:
                yield from self._parts(part, child, held, total, blocks)

    def _called(self, module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        """The outermost modules in `module` that were called. A container counts as its parts."""
        for name, child in children_of(module):
            child_path = f"{path}.{name}" if path else name
            if self.calls.get(child_path):
                yield child_path, child
            else:
                yield from self._called(child, child_path)
