"""Dataclasses to JSON and back.

Invariant: a document carries its schema version. Refused: unknown keys, missing ones and
wrong types (`InvalidInput`, with the place).
"""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from tightfit.core.errors import InvalidInput

SCHEMA_VERSION = 1


T = TypeVar("T")


def to_json(thing: Any) -> Any:
    """`thing` as JSON-ready dicts, lists, strings and numbers. Enums become their value."""
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        return {f.name: to_json(getattr(thing, f.name)) for f in dataclasses.fields(thing)}
    if isinstance(thing, enum.Enum):
        return thing.value
    if isinstance(thing, Mapping):
        return {str(key): to_json(value) for key, value in thing.items()}
    if isinstance(thing, (tuple, list)):
        return [to_json(item) for item in thing]
    return thing


def from_json(cls: type[T], data: Any, source: str) -> T:
    """The `cls` of which `to_json` made `data`. Raises `InvalidInput` for anything else, naming `source`."""
    try:
        return typing.cast(T, _from_json(cls, data, cls.__name__.lower()))
    except InvalidInput as error:
        raise InvalidInput(f"{source} is no valid tightfit {cls.__name__.lower()}: {error}") from None


def dumps(thing: Any) -> str:
    """JSON text of one of the types above, with its name and the schema version."""
    return json.dumps({"type": type(thing).__name__, "schema_version": SCHEMA_VERSION, **to_json(thing)}) + "\n"


def loads(cls: type[T], text: str, source: str = "the text") -> T:
    """The `cls` that `dumps` wrote. Raises `InvalidInput` for any other text."""
    name = cls.__name__.lower()
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{source} is not JSON ({error}); expected a tightfit {name}") from None
    if not isinstance(data, dict) or data.pop("type", None) != cls.__name__:
        raise InvalidInput(f"{source} is JSON, but no tightfit {name}")
    version = data.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise InvalidInput(
            f"{source} has schema version {version}, this tightfit reads {SCHEMA_VERSION}: make the {name} anew"
        )
    return from_json(cls, data, source)


def _from_json(annotation: Any, data: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return _dataclass_from_json(annotation, data, where)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        try:
            return annotation(data)
        except ValueError:
            raise InvalidInput(f"{where} is {data!r}") from None
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in arguments:
            return None
        (inner,) = (a for a in arguments if a is not type(None))
        return _from_json(inner, data, where)
    if origin is tuple:
        if not isinstance(data, list):
            raise InvalidInput(f"{where} should be a list")
        return tuple(_from_json(arguments[0], item, where) for item in data)
    if origin is Mapping:
        if not isinstance(data, dict):
            raise InvalidInput(f"{where} should be an object")
        return {
            _from_key(arguments[0], key, where): _from_json(arguments[1], item, where) for key, item in data.items()
        }
    if annotation is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, annotation) or (isinstance(data, bool) and annotation is not bool):
        raise InvalidInput(f"{where} should be {annotation.__name__}, not {data!r}"[:200])
    return data


def _from_key(annotation: Any, key: str, where: str) -> Any:
    try:
        return annotation(key)
    except ValueError:
        raise InvalidInput(f"{where} has the key {key!r}") from None


def _dataclass_from_json(cls: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise InvalidInput(f"{where} should be an object")
    hints = typing.get_type_hints(cls)
    if unknown := sorted(set(data) - set(hints)):
        raise InvalidInput(f"{where} has the unknown key {unknown[0]!r}")
    required = {
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(data)):
        raise InvalidInput(f"{where} lacks {missing[0]!r}")
    return cls(**{key: _from_json(hints[key], item, f"{where}.{key}") for key, item in data.items()})
