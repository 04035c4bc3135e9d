"""The nouns of a plan: what becomes of each value, and what the referee says of it.

Invariant: a plan is data. Reading one never runs code.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tightfit.core.documents import dumps, loads, to_json
from tightfit.core.errors import InvalidInput
from tightfit.core.files import write_text
from tightfit.core.formats import format_bytes
from tightfit.core.recorded import Program, Tiling


class Action(enum.Enum):
    """What becomes of one value between forward and backward."""

    KEEP = "keep"
    RECOMPUTE = "recompute"
    OFFLOAD = "offload"

    __hash__ = object.__hash__  # Enum's own is written in Python, and planning looks members up by the million


class Status(enum.Enum):
    OPTIMAL = "optimal"  # proven: no plan of the stated model takes fewer seconds
    FEASIBLE = "feasible"  # fits; `Plan.bound_seconds` is the proven lower bound
    INFEASIBLE = "infeasible"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What one unit does with each value that it makes, by ordinal."""

    unit: str
    actions: tuple[Action, ...]
    tiles: int = 1
    signature: str = ""
    program: str = ""  # key into `Plan.programs`
    inputs: tuple[Action, ...] = ()  # of what it is given, as in `Frame.inputs`; RECOMPUTE: the unit before makes it
    lends: tuple[int, ...] = ()  # values that it makes again for units whose inputs are not kept

    @property
    def keeps_all(self) -> bool:
        return not self.lends and all(action is Action.KEEP for action in (*self.actions, *self.inputs))


@dataclass(frozen=True, slots=True, kw_only=True)
class Advance:
    """One sweep in backward that makes a unit's input again by running the units before it: from `base`, whose input is
    there, up to `target`, whose backward asks. `stores`: units on the way whose inputs stay for their own backward."""

    base: str
    target: str
    stores: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Decisions as data: which values each unit keeps, and what that is known to cost."""

    budget_bytes: int
    choices: tuple[Choice, ...]
    status: Status
    peak_bytes: int
    step_seconds: float
    recompute_seconds: float
    bound_seconds: float  # no plan recomputes in less, under the planner's model
    recompute_flops: int
    forward_flops: int
    unplanned_peak_bytes: int
    replays: int  # frames replayed in a step
    trace_digest: str
    versions: Mapping[str, str]
    programs: Mapping[str, Program] = field(default_factory=dict)
    in_place_loss: bool = False  # the loss makes its gradient in place of what it saved; costs no recompute
    advances: tuple[Advance, ...] = ()  # in the order of backward
    tiling: Tiling | None = None  # what is computed in tiles; none: nothing
    tile_seconds: float = 0.0  # what the tiles cost
    settings: Mapping[str, str] = field(default_factory=dict)  # of levers without a field of their own, by name
    other_seconds: float = 0.0  # what those levers cost
    inexact: tuple[str, ...] = ()  # levers in use that do not give the same bits
    offloaded_bytes: int = 0  # that wait off the device
    offload_seconds: float = 0.0  # that the step waits for copies, estimated
    solved_by: tuple[str, ...] = ()  # the solver and the ways that found the points and chose among them
    fresh_seconds: float = 0.0  # that the step takes less, below zero, for new memory that it does not touch
    host_budget_bytes: int | None = None  # the most that was to wait in host memory; none: no limit was set
    ahead: tuple[str, ...] = ()  # levers whose copies begin before they are needed, and run beside the compute

    def __repr__(self) -> str:
        """One line for a prompt. `report.explain` and `save` say the rest."""
        planned = sum(not choice.keeps_all for choice in self.choices)
        return (
            f"<Plan for {format_bytes(self.budget_bytes)}: peak {format_bytes(self.peak_bytes)}, "
            f"{format_bytes(self.unplanned_peak_bytes)} without it; {planned} of {len(self.choices)} units recompute, "
            f"{self.slowdown:.2f} x the time, {self.status.value}>"
        )

    @property
    def added_seconds(self) -> float:
        """What the plan adds to the step without it."""
        costs = self.recompute_seconds + self.tile_seconds + self.offload_seconds + self.other_seconds
        return costs + self.fresh_seconds

    @property
    def slowdown(self) -> float:
        """Predicted time of the step under the plan over that of the step without it."""
        unplanned_seconds = self.step_seconds - self.added_seconds
        return self.step_seconds / unplanned_seconds if unplanned_seconds else 1.0

    @property
    def exact(self) -> bool:
        """Are loss and gradients bit for bit those of the step without the plan? Tiles add sums in another order."""
        return self.tiling is None and not self.inexact

    @property
    def decisions(self) -> str:
        """Digest of what the plan has the engine do: equal where two plans differ only in what they say it costs."""
        does: list[object] = [
            self.choices, self.programs, self.in_place_loss, self.advances, self.tiling, self.settings,
        ]  # fmt: skip
        does += [self.ahead] if self.ahead else []  # as digests of before have it
        return hashlib.sha256(json.dumps(to_json(does), sort_keys=True).encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON: whole or not at all."""
        write_text(path, dumps(self))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan. Raises `InvalidInput` when the file cannot be read or is no plan."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"cannot read the plan {str(path)!r}: {error}") from None
        return loads(cls, text, source=str(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Live bytes through a simulated step. `live_bytes[i]` and each `by_category[c][i]` belong to `labels[i]`."""

    labels: tuple[str, ...]
    live_bytes: tuple[int, ...]
    by_category: Mapping[str, tuple[int, ...]]
    peak_bytes: int
    peak_event: int
    peak_owner: str
    recompute_seconds: float
    recompute_flops: int
    replays: int
    offloaded_bytes: int = 0  # copied off the device in forward
    fetched_bytes: int = 0  # copied back in backward

    def __repr__(self) -> str:
        """One line for a prompt."""
        peak = format_bytes(self.peak_bytes)
        return f"<Timeline of {len(self.labels)} moments: peak {peak} at {self.peak_owner}, {self.replays} replays>"
