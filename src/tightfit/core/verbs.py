"""Modules that can be called: `tightfit.trace` is both a package and a verb of the public API.

Importing a submodule binds its name in the package, so a function of that name would come and go with the order of
imports. A module that can be called is always both.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from typing import Any


def make_verb(module_name: str, home: str) -> None:
    """Let the module `module_name` be called as the function of its name in the module `home`.

    `home` is imported when the function is first needed, so a verb that needs torch costs nothing before.
    """
    module = sys.modules[module_name]
    name = module_name.rpartition(".")[2]

    class Verb(types.ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(home), name)(*args, **kwargs)

        def __getattr__(self, asked: str) -> Any:
            if asked == name:
                return getattr(importlib.import_module(home), name)
            if asked == "__signature__":
                return inspect.signature(getattr(importlib.import_module(home), name))
            raise AttributeError(f"module {module_name!r} has no attribute {asked!r}")

    module.__class__ = Verb
