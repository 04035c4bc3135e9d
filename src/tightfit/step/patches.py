"""Change how a model runs, and put it back.

Invariant: what is taken off again is exactly what was there. Refused: TorchScript modules, and functions inside a graph
that is compiled already (`Unsupported`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import nn

from tightfit.core import Unsupported
from tightfit.step.modules import plain_path, unwrapped
from tightfit.step.snapshot import CHECKPOINTING_SWITCHES

_F = TypeVar("_F", bound=Callable[..., Any])


@contextlib.contextmanager
def no_key_value_cache(model: nn.Module) -> Iterator[None]:
    """Switch a transformers model's generation cache off: in training it is never read, and a unit that appends
    to it cannot be run twice. Every `config.use_cache` is put back afterwards."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    switched = [c for c in configs.values() if getattr(c, "use_cache", False) is True]
    for config in switched:
        config.use_cache = False
    try:
        yield
    finally:
        for config in switched:
            config.use_cache = True


def compiled_entries(model: nn.Module) -> dict[str, nn.Module]:
    """Path to module of what runs compiled when it is called: `torch.compile(module)`, `module.compile()`."""
    return {
        plain_path(path): module
        for path, module in model.named_modules()
        if unwrapped(module) is not module or vars(module).get("_compiled_call_impl") is not None
    }


#: Where a module has its own call.
_ITS_CALL = ("forward", "_compiled_call_impl")


def compiled_functions(model: nn.Module) -> list[str]:
    """Names of compiled functions (`torch.compile(function)`) that modules of `model` hold, or that their forward finds
    in its own module. What runs in them cannot be seen op by op."""
    found = []
    for path, module in model.named_modules():
        if unwrapped(module) is not module:  # a compiled module, which is planned as one
            continue
        forward: Any = type(module).forward
        code, names = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
        held = {**vars(type(module)), **vars(module)}
        if code is not None:
            held |= {name: names[name] for name in code.co_names if name in names}
        for name, value in held.items():
            is_function = callable(value) and not isinstance(value, (nn.Module, type)) and name not in _ITS_CALL
            if is_function and getattr(value, "_torchdynamo_orig_callable", None) is not None:
                found.append(f"{plain_path(path)}.{name}".lstrip("."))
    return found


def refuse_compiled(what: str) -> None:
    """Raise `Unsupported`. The compiler leaves its own code for this, so that the error reaches the user as it is."""
    raise Unsupported(f"{what}; compiled code cannot do that: leave it out of what is compiled")


# as torch.compiler.disable does, which takes a second to load
refuse_compiled._torchdynamo_disable = True  # type: ignore[attr-defined]


def own_checkpointing(model: nn.Module) -> list[tuple[Any, str, int]]:
    """The modules of `model` whose own checkpointing is switched on, each with the attribute that says so and its
    value. timm leaves a number there, if it was given one."""
    return [
        (module, name, value)
        for module in model.modules()
        for name in CHECKPOINTING_SWITCHES
        if isinstance(value := getattr(module, name, False), int) and value
    ]


@contextlib.contextmanager
def own_checkpointing_off(model: nn.Module) -> Iterator[None]:
    """The model's own checkpointing makes way inside, and is on again afterwards where it was."""
    switched = own_checkpointing(model)
    for module, name, _ in switched:
        setattr(module, name, False)
    try:
        yield
    finally:
        for module, name, value in switched:
            setattr(module, name, value)


def hidden_from_compiler(function: _F) -> _F:
    """`function`, and what it calls, never compiled: torch's compiler looks at every Python frame that runs inside a
    compiled call, hooks and dispatch modes too.

    A strategy on the code object costs nothing at a call; torch's own wrapper costs as much as a dispatch mode's work.
    """
    eval_frame: Any = torch._C._dynamo.eval_frame  # type: ignore[attr-defined]
    try:
        skip = eval_frame._FrameAction.SKIP
        eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))  # type: ignore[attr-defined]
    except AttributeError:  # another release of torch
        disabled: Any = torch._disable_dynamo(function, recursive=True)  # type: ignore[attr-defined]
        return cast(_F, disabled)
    return function


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run what is compiled in `model` op by op inside."""
    if not compiled_entries(model):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


class _Replacement:
    """What stands for a module's method. In a copy of the module, a pickled one too, it is the plain method."""

    def __init__(self, patch: MethodPatch, run: Callable[..., Any]) -> None:
        functools.update_wrapper(self, patch.original)
        self.__dict__.update(vars(run))
        self._module, self._name, self._original, self._had_own = (
            patch.module, patch.name, patch.original, patch.had_own,
        )  # fmt: skip
        self._run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._had_own:
            return functools.partial, (self._original,)
        return getattr, (self._module, self._name)  # asked of the copy while that has no attributes yet: its class's


class MethodPatch:
    """A module whose `forward`, or another method, is replaced; `undo` puts back exactly what was there."""

    def __init__(
        self, module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]], name: str = "forward"
    ) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            raise Unsupported(f"{type(module).__name__} is a TorchScript module: its forward cannot be planned")
        self.module, self.name = module, name
        self.had_own = name in module.__dict__
        self.original: Any = getattr(module, name)
        self.replacement: Any = _Replacement(self, make(self.original))
        setattr(module, name, self.replacement)

    def redo(self) -> bool:
        """Replace it again, by the same object; False, and nothing done, where another method is there by now."""
        if getattr(self.module, self.name) != self.original or (self.name in self.module.__dict__) != self.had_own:
            return False
        setattr(self.module, self.name, self.replacement)
        return True

    def undo(self) -> None:
        if self.had_own:
            setattr(self.module, self.name, self.original)
        else:
            del self.module.__dict__[self.name]
