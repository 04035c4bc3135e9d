"""Named model shapes and GPUs, each with the place where its figures were published.

A model's name such as `llama-2-7b` stands for the shape alone; whoever builds it gets random weights, which is all that
memory and time depend on. A user's own file (`TIGHTFIT_CATALOG`) has the tables `[models.NAME]` and
`[gpus.NAME]` with the same fields and goes before the catalog's entries.

Invariant: reading the catalog imports no torch, opens no connection and runs no code; every entry has a source.
Refused: an unknown name, as `InvalidInput` with the nearest names that exist; a file of one's own that lacks a field.
"""

from __future__ import annotations

import difflib
import functools
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tightfit.core import Device, InvalidInput

__all__ = ["ModelShape", "driver_name", "gpu", "gpu_names", "model_names", "model_shape", "nearest", "require_model"]

#: Names a TOML file with models and GPUs of one's own.
VARIABLE = "TIGHTFIT_CATALOG"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What is needed to build a model with random weights: `config` holds fields of the `model_type`'s config."""

    name: str
    model_type: str
    config: Mapping[str, Any]
    source: str


def _read(file: str) -> dict[str, Any]:
    return tomllib.loads(resources.files("tightfit.catalog").joinpath(file).read_text(encoding="utf-8"))


def _own() -> dict[str, Any]:
    path = os.environ.get(VARIABLE)
    return _own_file(path) if path else {}


@functools.cache
def _own_file(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidInput(f"cannot read the catalog {path!r}: {error}") from None


def _entries(table: str, file: str) -> dict[str, Any]:
    own = _own().get(table, {})
    if not isinstance(own, dict) or not all(isinstance(entry, dict) for entry in own.values()):
        raise InvalidInput(f"the catalog {os.environ[VARIABLE]!r} needs tables [{table}.NAME]")
    return {**_packaged(file), **{name.lower(): entry for name, entry in own.items()}}


@functools.cache
def _packaged(file: str) -> Mapping[str, Any]:
    return MappingProxyType(_read(file))


def _field(name: str, entry: Mapping[str, Any], field: str) -> Any:
    if field not in entry:
        raise InvalidInput(f"the catalog's entry {name!r} has no {field!r}")
    return entry[field]


def _number(name: str, entry: Mapping[str, Any], field: str) -> float:
    value = _field(name, entry, field)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise InvalidInput(f"the catalog's entry {name!r} has {field} = {value!r}: expected a number above zero")
    return float(value)


# ------------------------------------------------------------------------------------------------- models


def model_names() -> tuple[str, ...]:
    """Every model's name, in the catalog's order."""
    return tuple(_entries("models", "models.toml"))


def model_shape(name: str) -> ModelShape:
    """The shape called `name`; upper and lower case are the same. Raises `InvalidInput` for a name it does not have."""
    key = name.strip().lower()
    entry = _entries("models", "models.toml").get(key)
    if entry is None:
        raise InvalidInput(f"unknown model {name!r}: {nearest(name)}")
    return ModelShape(
        name=key,
        model_type=_field(key, entry, "model_type"),
        config=MappingProxyType(_field(key, entry, "config")),
        source=_field(key, entry, "source"),
    )


def require_model(name: str) -> Path:
    """The folder that `name` would be, which need not be there where it is a name of the catalog or a hub id.

    Raises `InvalidInput` when `name` can be no model: neither in the catalog, nor a folder with `config.json`, nor of
    the form of a hub id. So a command refuses a misspelt name before it imports what models are built with.
    """
    if not name.strip():  # that is not the folder that one happens to be in
        raise InvalidInput(
            "the name of the model is empty: give a name in the catalog, a folder or a hub id; . is here"
        )
    folder = Path(name).expanduser()
    if name.strip().lower() in model_names():
        return folder
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            hint = "; it holds an adapter, give its base model" if (folder / "adapter_config.json").is_file() else ""
            raise InvalidInput(f"the folder {str(folder)!r} has no config.json{hint}")
        return folder
    if folder.is_file():
        raise InvalidInput(f"{name!r} is a file: give the folder that holds its config.json")
    if len(name.split("/")) != 2 or not all(name.split("/")) or name.startswith((".", "~")):
        raise InvalidInput(
            f"unknown model {name!r}: it is no folder, no hub id (owner/name) and not in the catalog; {nearest(name)}"
        )
    return folder


def nearest(name: str, names: Callable[[], Iterable[str]] = model_names) -> str:
    """Advice for a name that is not in the catalog: the names like it, or all of them when none is."""
    there = list(names())
    close = difflib.get_close_matches(name.strip().lower(), there, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"the catalog has {', '.join(there)}"


# --------------------------------------------------------------------------------------------------- GPUs

_GIB, _TERA, _GIGA = 2**30, 1e12, 1e9


def gpu_names() -> tuple[str, ...]:
    """Every GPU's name, in the catalog's order."""
    return tuple(_entries("gpus", "gpus.toml"))


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def _gpu_entry(name: str) -> tuple[str, Mapping[str, Any]]:
    entries = _entries("gpus", "gpus.toml")
    key = next((known for known in entries if _letters(known) == _letters(name)), None)
    if key is None:
        raise InvalidInput(f"unknown GPU {name!r}: {nearest(name, gpu_names)}")
    return key, entries[key]


def driver_name(name: str) -> str:
    """What the driver calls the GPU `name`, where that has other words than the catalog's name; empty where not."""
    return str(_gpu_entry(name)[1].get("driver_name", ""))


def gpu(name: str) -> Device:
    """The GPU called `name`; case and punctuation do not matter. Raises `InvalidInput` for an unknown one."""
    key, entry = _gpu_entry(name)
    fp32 = _number(key, entry, "fp32_tflops") * _TERA
    half = _number(key, entry, "half_tflops") * _TERA
    link = _number(key, entry, "pcie_gb_per_second") * _GIGA
    capability = None if "compute_capability" not in entry else _number(key, entry, "compute_capability")
    kind = entry.get("kind", "cuda")
    if kind not in ("cuda", "rocm", "mps", "xpu", "cpu"):
        raise InvalidInput(f"the catalog's entry {key!r} has the kind {kind!r}: use cuda, rocm, mps, xpu or cpu")
    return Device(
        name=key,
        memory_bytes=int(_number(key, entry, "memory_gib") * _GIB),
        flops_per_second={
            "float32": fp32,
            "float16": half,
            "bfloat16": half if entry.get("bf16", True) else fp32,  # emulated where the cores do not have it
        },
        memory_bytes_per_second=_number(key, entry, "memory_gb_per_second") * _GIGA,
        h2d_bytes_per_second=link,
        d2h_bytes_per_second=link,
        source=str(_field(key, entry, "source")),
        kind=kind,
        compute_capability=capability,
    )
