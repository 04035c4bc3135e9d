"""What was measured on one device, as a file that every forecast for the same device takes its figures from.

`tightfit calibrate` writes such a file (`forecast.calibrating`). It lies in the user's configuration folder under the
device's name, and is found there by that name alone: a forecast for a card finds it on a machine without the card too.
`using` names a file instead, or `"none"` for no file, and so does the variable TIGHTFIT_CALIBRATION.

Invariant: without a file everything is as if this module did not exist. A file is only ever used for the device that it
was measured on, and whoever uses it says so (`Device.calibration`).
Refused, in one line each (`InvalidInput`): a file that was named and cannot be read, is none of these, has another
schema version, or has a figure that no device can have; a file that was named for a step on another device. Where
nobody named it, such a file is left out, with one line in the log: it came with an older release or was cut off, and a
step must not fail for it.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import datetime
import functools
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightfit.core import Device, InvalidInput, dumps, loads, write_text

__all__ = ["Calibration", "calibrated", "folder", "found", "named", "path_of", "read", "using"]

#: Names a device file, or is `none`.
VARIABLE = "TIGHTFIT_CALIBRATION"
NO_FILE = "none"

#: Two readings of one card's memory differ by what the driver and error correction take; two cards by more.
_SAME_MEMORY = 0.12


#: Least and most that any device has of what is measured, by orders of magnitude beyond those that there are.
POSSIBLE: Mapping[str, tuple[float, float]] = {
    "flops_per_second": (1e6, 1e18),
    "memory_bytes_per_second": (1e6, 1e15),
    "h2d_bytes_per_second": (1e5, 1e14),
    "d2h_bytes_per_second": (1e5, 1e14),
    "launch_seconds": (1e-9, 1.0),
    "usable_bytes": (1, 2**50),
    "workspace_bytes": (0, 2**40),
}


def require_possible(name: str, value: Any) -> None:
    """Raise `InvalidInput` for a figure that no device can have. Of rates by dtype each one is asked."""
    if isinstance(value, Mapping):
        for dtype, rate in value.items():
            _require_within(f"{name} of {dtype}", rate, *POSSIBLE[name])
    else:
        _require_within(name, value, *POSSIBLE.get(name, (2**20, 2**50)))


def _require_within(name: str, value: float | None, least: float, most: float) -> None:
    if value is None or not least <= value <= most:  # not a number is within nothing
        raise InvalidInput(f"a calibration with {name} = {value}: expected {least:g} to {most:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The figures of one device. `device.name` is what its driver calls it; for a CPU, its processor and threads."""

    device: Device
    date: str  # of the measurement, ISO
    seconds: float  # that it took
    samples: int  # timings that the figures rest on
    spread: Mapping[str, float]  # of each fitted figure: the median distance of its points from the fit, relative
    settings: Mapping[str, str]  # of the allocator and the arithmetic, when it was measured
    environment: Mapping[str, str]
    notes: tuple[str, ...] = ()  # what could not be measured, each in one line
    estimated: tuple[str, ...] = ()  # figures of `device` that could not be measured: whoever asks keeps his own

    def __post_init__(self) -> None:
        texts = [self.device.name, self.device.source, self.date, *self.notes, *self.spread]
        texts += [each for pair in (*self.settings.items(), *self.environment.items()) for each in pair]
        for text in texts:
            if not text.isprintable():
                raise InvalidInput(f"a calibration with control characters: {text!r}"[:200])
        if not self.device.name.strip():
            raise InvalidInput("a calibration without the name of its device")
        try:
            datetime.datetime.fromisoformat(self.date)
        except ValueError:
            raise InvalidInput(f"a calibration with date = {self.date!r}: expected one as 2026-11-28") from None
        if unknown := sorted(set(self.estimated) - POSSIBLE.keys()):
            raise InvalidInput(f"a calibration with {unknown[0]!r} among what was estimated: use {', '.join(POSSIBLE)}")
        if not self.device.flops_per_second:
            raise InvalidInput("a calibration without a rate of matrix products")
        require_possible("memory_bytes", self.device.memory_bytes)
        for name in POSSIBLE:
            value = getattr(self.device, name)
            if value is not None or name not in (*self.estimated, "workspace_bytes"):
                require_possible(name, value)
        if max(self.device.workspace_bytes or 0, self.device.usable_bytes or 0) > self.device.memory_bytes:
            too_much = (
                "usable_bytes" if (self.device.usable_bytes or 0) > self.device.memory_bytes else "workspace_bytes"
            )
            raise InvalidInput(f"a calibration with more {too_much} than memory_bytes")
        for name, value in {**self.spread, "seconds": self.seconds, "samples": self.samples}.items():
            if not 0 <= value < 1e9:
                raise InvalidInput(f"a calibration with {name} = {value}: expected 0 or more")

    def over(self, device: Device) -> Device:
        """What was measured, under the name of `device`; what could not be measured as it is there."""
        own = {name: getattr(device, name) for name in self.estimated}
        return dataclasses.replace(self.device, name=device.name, **own)

    def save(self, path: Path) -> None:
        """Write to a temporary file and rename it; the folder is made if it is not there."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(f"cannot make the folder {str(path.parent)!r}: {error.strerror or error}") from None
        write_text(path, dumps(self))


def folder() -> Path:
    """Where device files of this user lie: `$XDG_CONFIG_HOME/tightfit/devices`, by default in `~/.config`."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    # the standard has relative paths ignored
    return (Path(base) if os.path.isabs(base) else Path.home() / ".config") / "tightfit" / "devices"


def path_of(name: str) -> Path:
    """The file of the device that is called `name`."""
    return folder() / f"{'-'.join(_words(name))[:_LONGEST_NAME] or 'unnamed'}.json"


#: Of a file, in letters: file systems take 255 bytes, and a temporary file's name is longer.
_LONGEST_NAME = 160


def read(path: str | Path) -> Calibration:
    """The calibration in the file `path`. Raises `InvalidInput` for anything else."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise InvalidInput(f"cannot read the device file {str(path)!r}: {reason}") from None
    made = loads(Calibration, text, f"the device file {str(path)!r}")
    line = f"measured on {made.device.name} on {made.date[:10]} ({path})"
    return dataclasses.replace(made, device=dataclasses.replace(made.device, calibration=line))


_asked: contextvars.ContextVar[str] = contextvars.ContextVar("tightfit_calibration", default="")


@contextlib.contextmanager
def using(file: str | Path | None) -> Iterator[None]:
    """Inside, forecasts and plans take the device file `file`; `"none"`: they take none. None: as outside."""
    if file is not None and str(file) != NO_FILE:
        read(file)  # refused here, before anything else is done
    token = _asked.set(str(file)) if file is not None else None
    try:
        yield
    finally:
        if token is not None:
            _asked.reset(token)


def named() -> Calibration | None:
    """The calibration that `using` or the variable names; None where neither names one."""
    file = _asked.get() or os.environ.get(VARIABLE, "")
    return read(file) if file and file != NO_FILE else None


def found(
    name: str, *, kind: str, memory_bytes: int, driver_name: str = "", one_of_many: bool = False
) -> Calibration | None:
    """What was measured on the device called `name`, by its driver or in the catalog; None: nothing was.

    `driver_name`: what its driver calls it, where that has not the words of `name`. Raises `InvalidInput` for a file
    that was named and is none, or another device's, but for `one_of_many` devices.
    """
    file = _asked.get() or os.environ.get(VARIABLE, "")
    if file == NO_FILE:
        return None
    if file:
        made = read(file)
        if not _is_same(made.device, driver_name or name, kind, memory_bytes):
            if one_of_many:
                return None
            raise InvalidInput(
                f"the device file {file!r} was measured on {made.device.name} ({made.device.kind}), and this step is "
                f"for {name} ({kind}): calibrate that one, or leave the file out"
            )
        return made
    # the file's name is the device's, so no other file need be readable
    for path in sorted(folder().glob("*.json")):
        if path == path_of(name) or _is_named(path.stem, driver_name or name) or _words(path.stem) == _words(name):
            try:
                made = read(path)
            except InvalidInput as error:
                _leave_out(path, error)
                continue
            if _is_same(made.device, driver_name or name, kind, memory_bytes):
                return made
    return None


@functools.cache
def _said(line: str) -> None:
    """Say `line` in the log, once."""
    logging.getLogger("tightfit").warning("%s", line)


def _leave_out(path: Path, error: InvalidInput) -> None:
    reason = str(error) if str(path) in str(error) else f"the device file {str(path)!r}: {error}"
    _said(f"{reason}; it is left out: run tightfit calibrate again, or delete it")


def calibrated(device: Device, *, driver_name: str = "", one_of_many: bool = False) -> Device:
    """`device` with the figures that were measured on it, under its own name; as it is where none were."""
    made = found(
        device.name, kind=device.kind, memory_bytes=device.memory_bytes, driver_name=driver_name,
        one_of_many=one_of_many,
    )  # fmt: skip
    return device if made is None else made.over(device)


def _is_same(measured: Device, name: str, kind: str, memory_bytes: int) -> bool:
    if measured.is_host or (kind == measured.kind and measured.name == name):  # no catalog has processors
        return measured.kind == kind and measured.name == name
    near = abs(measured.memory_bytes - memory_bytes) <= _SAME_MEMORY * memory_bytes
    return measured.kind == kind and near and _is_named(measured.name, name)


def _is_named(measured: str, asked: str) -> bool:
    """Has the name of a driver (NVIDIA GeForce RTX 3080 Ti) the words of another (rtx-3080-ti), and no model's more?

    Sizes of memory are left out: some names have them, and the bytes are compared anyway.
    """
    has, wants = ([word for word in _words(name) if not re.fullmatch(r"\d+gb", word)] for name in (measured, asked))
    return set(wants) <= set(has) and set(has) - set(wants) <= _NO_MODEL


#: Words of drivers' names that do not tell one model from another.
_NO_MODEL = frozenset({
    "nvidia", "geforce", "tesla", "quadro", "amd", "instinct", "radeon", "intel", "r", "tm", "graphics", "generation",
    "gpu", "sxm", "sxm2", "sxm3", "sxm4", "sxm5", "pcie", "pci", "e", "hbm2", "hbm2e", "hbm3", "hbm3e", "workstation",
    "server", "edition", "apple",
})  # fmt: skip


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", name.lower())
