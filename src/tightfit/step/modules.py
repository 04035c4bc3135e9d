"""The module tree: which modules are the units of a model, and what they are called.

Invariant: a path is the same with and without wrappers (DDP, compiled modules). Refused: units that the model does not
have, or that lie inside one another (`InvalidInput`).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence

from torch import nn

from tightfit.core import InvalidInput

UnitsAsked = Sequence[str | nn.Module] | str | None


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself: what `torch.compile(module)` returns is a wrapper around it."""
    while type(module).__name__ == "OptimizedModule":
        module = module._orig_mod  # type: ignore[assignment]
    return module


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """As `named_modules`, without the wrappers of `torch.compile`: a plan has the same paths with and without them."""
    return {plain_path(path): module for path, module in model.named_modules() if unwrapped(module) is module}


def plain_path(path: str) -> str:
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def find_units(model: nn.Module, asked: UnitsAsked = None) -> dict[str, nn.Module]:
    """Path to module of each unit, in the order of `named_modules`.

    `asked=None` takes the outermost repeated blocks of `ModuleList`s and `Sequential`s; without any, the
    composite children of the first module that has several; without those, the model itself. Otherwise
    `asked` holds paths, shell patterns (`"layers.*"`) or modules.

    Raises `InvalidInput` when nothing matches or one unit lies inside another.
    """
    model = unwrapped(model)
    modules = modules_of(model)
    if asked is None:
        found = repeated_blocks(model) or _composite_children(model)
    else:
        wanted = [asked] if isinstance(asked, (str, nn.Module)) else list(asked)
        found = {}
        for item in wanted:
            if isinstance(item, nn.Module):
                item = unwrapped(item)
                matches = [path for path, module in modules.items() if module is item]
            else:
                matches = [path for path in modules if path == item] or fnmatch.filter(modules, item)
                # `layers.*` means the layers, not everything below them: a shell star does not cross a dot
                matches = [path for path in matches if path.count(".") == item.count(".")]
            if not matches:
                name = item if isinstance(item, str) else type(item).__name__
                raise InvalidInput(f"no module of the model matches the unit {name!r}")
            found.update({path: modules[path] for path in matches})
    paths = sorted(found)
    for outer in paths:
        for inner in paths:
            if inner != outer and (outer == "" or inner.startswith(outer + ".")):
                raise InvalidInput(f"unit {inner!r} lies inside unit {outer!r}: choose one of them")
    return {path: module for path, module in modules.items() if path in found}


def children_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As `named_children`, without the wrappers of `torch.compile`."""
    return ((name, unwrapped(child)) for name, child in module.named_children())


def _is_block(module: nn.Module) -> bool:
    """A module worth planning as a whole: one with parts, or a custom one; not a bare `nn.Linear`."""
    return any(True for _ in module.children()) or not type(module).__module__.startswith("torch.nn.")


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Path to module of the outermost blocks of `ModuleList`s and `Sequential`s; none where there is but one."""
    return _repeated_blocks(unwrapped(model), "")


def _repeated_blocks(module: nn.Module, path: str) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, child in children_of(module):
        child_path = f"{path}.{name}" if path else name
        inside_list = isinstance(module, (nn.ModuleList, nn.Sequential))
        if inside_list and _is_block(child) and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            # a Sequential of blocks inside a list (a ResNet's stages) is opened, one of bare layers is a block
            inner = _repeated_blocks(child, child_path) if isinstance(child, nn.Sequential) else {}
            found.update(inner or {child_path: child})
        else:
            found.update(_repeated_blocks(child, child_path))
    return found if len(found) > 1 or path else {}


def _composite_children(model: nn.Module) -> dict[str, nn.Module]:
    path, module = "", model
    while True:
        parts = {name: child for name, child in children_of(module) if _is_block(child)}
        if len(parts) > 1:
            return {f"{path}.{name}" if path else name: child for name, child in parts.items()}
        if not parts:
            return {"": model}
        ((name, module),) = parts.items()
        path = f"{path}.{name}" if path else name
