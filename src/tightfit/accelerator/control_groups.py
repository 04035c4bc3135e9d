"""What the control groups of this process leave it of the machine's memory.

Idea: a container, a job scheduler or systemd puts a process into groups, each within another, and each may have a
limit. The least of all counts. Version 2 has it in `memory.max`, version 1 in `memory.limit_in_bytes`. The path of the
group is in `/proc/self/cgroup`. Inside a container that may be the host's path, which is not mounted there. So folders
that are not there are passed over, and the root of the mount, which is the container's own group then, is always
looked at.

Invariant: reading changes nothing. Refused: nothing; a system without control groups has no limit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

__all__ = ["least_limit_bytes"]

#: Where the system's files are. Tests have others.
ROOT = Path("/")


def least_limit_bytes() -> int | None:
    """The least limit of memory of this process's groups and of those around them. None: there is none.

    Without a limit version 1 has a number there that no machine has as memory, and version 2 "max". Zero is a limit.
    What is no number of bytes, as a negative one, is none of the kernel's, and says nothing.
    """
    found = []
    for file in dict.fromkeys(_files()):
        with contextlib.suppress(OSError, ValueError):
            text = file.read_text(encoding="ascii").strip()
            if text.isdecimal():
                found.append(int(text))
    return min(found, default=None)


def _files() -> Iterator[Path]:
    mount = ROOT / "sys/fs/cgroup"
    second = [(mount, "memory.max"), (mount / "unified", "memory.max")]
    first = [(mount / "memory", "memory.limit_in_bytes")]
    groups = [("", "/"), ("memory", "/")]
    with contextlib.suppress(OSError, ValueError):
        lines = (ROOT / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        groups += [(kinds, path) for _, kinds, path in (line.split(":", 2) for line in lines)]
    for kinds, path in groups:
        for folder, name in second if not kinds else first if "memory" in kinds.split(",") else []:
            group = PurePosixPath(path.lstrip("/"))
            yield from (folder / each / name for each in (group, *group.parents))
