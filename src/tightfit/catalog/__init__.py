"""Named model shapes: the fields of a transformers config, each with the place where they were published.

A name such as `llama-2-7b` stands for the shape alone; whoever builds it gets random weights, which is all that
memory and time depend on. Invariant: reading the catalog imports no torch, opens no connection and runs no code;
every entry has a source. Refused: an unknown name, as `InvalidInput` with the nearest names that exist.
"""

from __future__ import annotations

import difflib
import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Any

from tightfit.core import InvalidInput

__all__ = ["ModelShape", "model_names", "model_shape"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What is needed to build a model with random weights: `config` holds fields of the `model_type`'s config."""

    name: str
    model_type: str
    config: Mapping[str, Any]
    source: str


@functools.cache
def _shapes() -> Mapping[str, ModelShape]:
    text = resources.files("tightfit.catalog").joinpath("models.toml").read_text(encoding="utf-8")
    shapes = {}
    for name, entry in tomllib.loads(text).items():
        shapes[name] = ModelShape(
            name=name,
            model_type=entry["model_type"],
            config=MappingProxyType(entry["config"]),
            source=entry["source"],
        )
    return MappingProxyType(shapes)


def model_names() -> tuple[str, ...]:
    """Every name in the catalog, in the catalog's order."""
    return tuple(_shapes())


def model_shape(name: str) -> ModelShape:
    """The shape called `name`; upper and lower case are the same. Raises `InvalidInput` for a name it does not have."""
    shape = _shapes().get(name.strip().lower())
    if shape is None:
        raise InvalidInput(f"unknown model {name!r}: {nearest(name)}")
    return shape


def nearest(name: str) -> str:
    """Advice for a name that is not in the catalog: the names like it, or all of them when none is."""
    close = difflib.get_close_matches(name.strip().lower(), model_names(), n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"the catalog has {', '.join(model_names())}"
