"""Modules that can be called."""

from __future__ import annotations

import inspect
import sys
import types
import typing
from typing import Any


def make_verb(module_name: str, function: typing.Callable[..., Any]) -> None:
    """Let the module `module_name` be called as `function`.

    `tightfit.trace` is both a module and a verb of the public API. Importing a submodule binds its name in the
    package, so a function of that name would come and go with the order of imports; a module that can be called
    is always both.
    """
    module = sys.modules[module_name]

    class Verb(types.ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    module.__class__ = Verb
    module.__dict__["__signature__"] = inspect.signature(function)
