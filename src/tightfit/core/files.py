"""Files that are written whole or not at all.

Invariant: a reader never sees half of a file. Refused: writing over what is no regular file (`InvalidInput`).
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from tightfit.core.errors import InvalidInput


def output_file(path: str | Path) -> Path:
    """The file that writing to `path` makes or replaces: where `path` is a symbolic link, what it points to.

    Raises `InvalidInput` where there is no folder for it, and where something is that is no regular file: a rename over
    a device or a pipe would take it away from everybody.
    """
    target = Path(os.path.realpath(path))
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        if not target.parent.is_dir():
            raise InvalidInput(f"cannot write to {str(path)!r}: there is no folder {str(target.parent)!r}") from None
        return target
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot write to {str(path)!r}: {error}") from None
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise InvalidInput(f"cannot write to {str(path)!r}: it is {what}, which is not replaced")
    return target


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` to `path` by way of a temporary file beside it, so that no reader sees half of it.

    A symbolic link is written through. Raises `InvalidInput` as `output_file` does.
    """
    target = output_file(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise InvalidInput(f"cannot write {str(path)!r}: {error}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
