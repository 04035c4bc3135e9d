"""Standard output belongs to the result of a command, by construction.

Idea: while a command runs, file descriptor 1 is standard error, and so is Python's `sys.stdout`. The result goes to a
descriptor of its own, which was descriptor 1 before. So a banner of a native library, a `print` of a Python package and
the output of a child process cannot end up inside a JSON document, whenever they come.

Invariant: afterwards descriptors and streams are what they were. A standard stream that is closed is the null device
while a command runs, so that no file that is opened can take its number and receive what was meant for it.
Refused: nothing; without a descriptor 1, as on some embedded interpreters, only Python's streams are turned.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, TextIO

__all__ = ["NotWritten", "for_libraries", "own", "results"]


class NotWritten(OSError):
    """The result cannot be written where it is sent; says why."""


_results: ContextVar[TextIO | None] = ContextVar("results", default=None)


def results() -> TextIO:
    """Where the result of the running command goes; outside a command `sys.stdout`."""
    return _results.get() or sys.stdout


@contextlib.contextmanager
def own() -> Iterator[None]:
    """Descriptor 1 is standard error within; `sys.stdout`, where it wrote there, writes to what descriptor 1 was.

    Within and on leaving, writing a result raises `BrokenPipeError` when its reader has gone, `NotWritten` when it
    cannot be written for another reason (a disk that is full). A message that cannot be written to standard error is
    lost, and nothing else is: nobody reads it, and the result is still wanted.
    """
    with _open_streams(), _messages():
        kept = os.dup(1)  # not inherited by children
        bound = _writes_to(sys.stdout, 1)
        before = sys.stdout
        before.flush()
        _flush_native()
        os.dup2(2, 1)
        if bound:
            sys.stdout = io.TextIOWrapper(  # closed below, without the descriptor
                io.BufferedWriter(_Descriptor(kept, "w", closefd=False)), encoding=before.encoding,
                errors=before.errors, line_buffering=getattr(before, "line_buffering", False),
            )  # fmt: skip
        try:
            yield
            sys.stdout.flush()
        finally:
            if bound:
                with contextlib.suppress(OSError):
                    sys.stdout.close()
                sys.stdout = before
            _flush_native()  # what a library has buffered is not to come out on descriptor 1 later
            os.dup2(kept, 1)
            os.close(kept)


@contextlib.contextmanager
def for_libraries() -> Iterator[None]:
    """`sys.stdout` is standard error within, and `results()` what it was."""
    token = _results.set(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _results.reset(token)


@contextlib.contextmanager
def _open_streams() -> Iterator[None]:
    """The standard streams exist within."""
    lent: list[int] = []
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest number that is free is the one that is opened
        lent.append(number)
    streams = sys.stdout, sys.stderr
    with open(number, "w") as nowhere:
        if sys.stdout is None:
            sys.stdout = nowhere
        if sys.stderr is None:
            sys.stderr = nowhere
        try:
            yield
        finally:
            sys.stdout, sys.stderr = streams
            for number in lent:
                os.close(number)


@contextlib.contextmanager
def _messages() -> Iterator[None]:
    """`sys.stderr` never fails within."""
    before = sys.stderr
    if not _writes_to(before, 2):
        yield
        return
    before.flush()
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(_Messages(2, "w", closefd=False)), encoding=before.encoding, errors=before.errors,
        line_buffering=True,
    )  # fmt: skip
    try:
        yield
    finally:
        sys.stderr.close()  # without the descriptor
        sys.stderr = before


class _Messages(io.FileIO):
    """Standard error. Once it cannot be written, it is the null device."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 2)
            os.close(nowhere)
            return len(data)


class _Descriptor(io.FileIO):
    """A descriptor that tells a result that cannot be written from every other error of the operating system."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise NotWritten(error.strerror or str(error)) from error


def _writes_to(stream: TextIO, number: int) -> bool:
    try:
        return stream.fileno() == number
    except (OSError, ValueError, AttributeError):  # a stream in memory, or a closed one
        return False


def _flush_native() -> None:
    """Write out what C libraries have printed and not flushed yet."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no C library to be asked by that name
        ctypes.CDLL(None).fflush(None)
