"""Processes of one run agree before they step: one plan, made once, in force on all of them or on none.

Idea: everything is said through the store that torch's processes met in (`torch.distributed`), not by collectives. A
process that is elsewhere in its program then mixes up nobody's tensors, and who is missing can be named.

Invariant: either every process leaves a meeting with the same answer, or every process raises the same error. Refused:
waiting for ever: a meeting ends after `TIGHTFIT_TIMEOUT_SECONDS` (600) with the ranks that did not come.
"""

from __future__ import annotations

import itertools
import json
import os
import zlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tightfit.accelerator import HOST, current
from tightfit.core import BudgetInfeasible, InvalidInput, TightfitError
from tightfit.step.parallel import Strategy, strategy_of

__all__ = ["Meeting", "anywhere", "are_several", "highest", "run_together", "timeout_seconds"]

_meetings = itertools.count()


def timeout_seconds() -> float:
    """How long a rank waits for the others. Raises `InvalidInput` for a setting that is no positive number."""
    asked = os.environ.get("TIGHTFIT_TIMEOUT_SECONDS", "600")
    try:
        seconds = float(asked)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise InvalidInput(f"TIGHTFIT_TIMEOUT_SECONDS={asked!r} is no positive number of seconds")
    return seconds


def are_several(model: nn.Module) -> bool:
    """Is `model` trained by several processes together?"""
    return run_together() and strategy_of(model) is not Strategy.ONE


def run_together() -> bool:
    """Is this process one of several, whatever they share?"""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def anywhere(model: nn.Module, *flags: bool) -> tuple[bool, ...]:
    """Which of `flags` are true on any rank. A collective: every rank calls it at the same place of its step."""
    return tuple(bool(each) for each in highest(model, *map(int, flags)))


def highest(model: nn.Module, *numbers: int) -> tuple[int, ...]:
    """Each of `numbers` as the rank says that has the highest. A collective, as `anywhere`."""
    if not are_several(model):
        return numbers
    device = HOST if "gloo" in dist.get_backend() or dist.get_backend() == "fake" else current()
    said = torch.tensor(numbers, device=device)
    dist.all_reduce(said, op=dist.ReduceOp.MAX)
    return tuple(said.tolist())


class Meeting:
    """One place of the program that every rank comes to. Ranks count their meetings, so the n-th of one is the n-th of
    all; `what` is compared, for a rank that is elsewhere."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._key = f"tightfit/{next(_meetings)}"
        self._store: Any = dist.distributed_c10d._get_default_store()
        self._round = itertools.count()
        self._seconds = timeout_seconds()

    def gathered(self, item: Any) -> list[Any]:
        """What every rank says, by rank; `item` is JSON. Raises `TightfitError` naming the ranks that did not come, or
        that came to something else."""
        key = f"{self._key}/{next(self._round)}"
        self._store.set(f"{key}/{self.rank}", json.dumps([self.what, item]))
        if self.rank == 0:
            self._store.set(f"{key}/all", json.dumps(self._collected(key)))
        said = json.loads(self._waited(f"{key}/all", self._seconds + 30, "rank 0"))
        if "error" in said:
            raise TightfitError(said["error"])
        return list(said["items"])

    def left(self, item: Any) -> None:
        """Say `item` for the next `gathered` of the others, and do not wait for them: this rank goes no further."""
        key = f"{self._key}/{next(self._round)}"
        self._store.set(f"{key}/{self.rank}", json.dumps([self.what, item]))
        if self.rank == 0:
            others = [None] * (self.world - 1)
            self._store.set(f"{key}/all", json.dumps({"items": [item, *others]}))

    def _collected(self, key: str) -> dict[str, Any]:
        found = []
        seconds, missing = self._seconds, []
        for rank in range(self.world):
            try:
                found.append(json.loads(self._waited(f"{key}/{rank}", seconds, f"rank {rank}")))
            except TightfitError:
                missing.append(rank)
                seconds = 1.0  # the others had all that time, too
                if len(missing) > 8:
                    break
        if missing:
            who = "rank " + ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
            return {
                "error": f"{who} did not come to {self.what!r} within {self._seconds:g} s: it has died, hangs, or does "
                "not run the same program; look at its own output first (TIGHTFIT_TIMEOUT_SECONDS sets the time)"
            }
        places = {what for what, _ in found}
        if len(places) > 1:
            of = {what: [r for r, (w, _) in enumerate(found) if w == what] for what in places}
            said = "; ".join(f"{what!r} on rank {', '.join(map(str, ranks))}" for what, ranks in sorted(of.items()))
            return {"error": f"the ranks are at different places of their programs: {said}; all must do the same"}
        return {"items": [item for _, item in found]}

    def published(self, leader: int, make: Callable[[], str]) -> str:
        """The text that rank `leader` makes, on every rank; where making it raises, every rank raises that."""
        key = f"{self._key}/{next(self._round)}/made"
        if self.rank == leader:
            try:
                said = json.dumps({"text": make()})
            except BaseException as error:
                said = json.dumps(_described(error))
                self._store.set(key, zlib.compress(said.encode()))
                raise
            self._store.set(key, zlib.compress(said.encode()))
        # planning takes its time
        said_by_leader = json.loads(zlib.decompress(self._waited(key, 6 * self._seconds, f"rank {leader}")))
        if "text" not in said_by_leader:
            raise _error_of(said_by_leader, leader)
        return str(said_by_leader["text"])

    def _waited(self, key: str, seconds: float, who: str) -> bytes:
        try:
            self._store.wait([key], timedelta(seconds=seconds))
        except RuntimeError as error:  # its own kind differs from release to release
            raise TightfitError(
                f"{who} did not come to {self.what!r} within {seconds:g} s, or the store of the run is gone: look at "
                "its own output first (TIGHTFIT_TIMEOUT_SECONDS sets the time)"
            ) from error
        return bytes(self._store.get(key))


def _described(error: BaseException) -> dict[str, Any]:
    if isinstance(error, BudgetInfeasible):
        return {
            "budget_bytes": error.budget_bytes, "least_bytes": error.least_bytes, "advice": error.advice,
            "host_budget_bytes": error.host_budget_bytes, "host_bytes": error.host_bytes,
        }  # fmt: skip
    return {"error": f"{type(error).__name__}: {error}"}


def _error_of(said: dict[str, Any], leader: int) -> TightfitError:
    if "budget_bytes" in said:
        return BudgetInfeasible(
            said["budget_bytes"], said["least_bytes"], said["advice"],
            host_budget_bytes=said["host_budget_bytes"], host_bytes=said["host_bytes"],
        )  # fmt: skip
    return TightfitError(f"rank {leader} could not go on: {said['error']}")
