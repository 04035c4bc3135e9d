"""Checkpoints of a run: which of them are whole, and when each is due."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from tightfit.train.asked import Asked

_CHECKPOINT_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def last_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest whole checkpoint below `folder` and its step.

    The Trainer writes `trainer_state.json` last, so a checkpoint that a kill or a full disk cut short has none, or one
    that is no JSON; and it deletes old ones file by file, so one that was being deleted lacks something else.
    """
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            step = int(path.name.removeprefix("checkpoint-"))
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        whole = all((path / name).is_file() for name in _CHECKPOINT_FILES)
        if whole and state.get("global_step") == step and any((path / name).is_file() for name in _WEIGHT_FILES):
            found.append((step, path))
    return max(((path, step) for step, path in found), key=lambda each: each[1], default=None)


def keeps_checkpoints(asked: Asked) -> bool:
    """Did the user ask for checkpoints, or are they ours, for the case that the run is cut short?"""
    saving = [name for name in (asked.config or {}) if name.startswith(("save_", "load_best"))]
    return bool(saving) or any(a.lstrip("-").startswith(("save_", "save-")) for a in asked.options.arguments)


def is_older(path: Path, step: int) -> bool:
    try:
        return int(path.name.rpartition("-")[2]) < step
    except ValueError:
        return False


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of `losses.jsonl`; a kill may have cut the last one."""
    rows: list[dict[str, Any]] = []
    with suppress(OSError, ValueError):
        for line in path.read_text(encoding="utf-8").splitlines():
            rows.append(json.loads(line))
    return rows
