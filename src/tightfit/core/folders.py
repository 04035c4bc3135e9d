"""The folder in which what waits off the device is to do so, checked once, at the edge.

Refused: what is no folder, and one in which no file can be made (`InvalidInput`).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tightfit.core.errors import InvalidInput

__all__ = ["parse_spill"]


def parse_spill(asked: object) -> Path | None:
    """The folder meant by `asked`, in which a file was made and deleted again. `None` stays: what waits is in memory.

    A folder that cannot be written would show only in the first step, when the training is under way.
    """
    if asked is None:
        return None
    if not isinstance(asked, (str, os.PathLike)):
        raise InvalidInput(f"expected spill as the path of a folder, not {asked!r}")
    folder = os.fsdecode(asked)
    if not folder:
        raise InvalidInput("spill is an empty path: give '.' if the working directory is meant")
    if not os.path.isdir(folder):  # Path.is_dir raises for a path that may not be looked at
        raise InvalidInput(f"cannot spill to {folder!r}: it is no folder; make it, or choose another")
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".tightfit-"):
            pass
    except OSError as error:
        raise InvalidInput(
            f"cannot spill to {folder!r}: no file can be made there ({error.strerror}); choose another folder"
        ) from None
    return Path(folder)
