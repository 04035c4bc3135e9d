"""What a lever says of itself: the one interface between levers and planner, referee, engine, proof and reports.

Invariant: no torch here, and no lever's name. A method that a lever does not override does nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from tightfit.core import Lever, Plan, Status, Timeline, Trace


class Grant(enum.Flag):
    """What a lever lets the planner do with the values of a unit. The planner and the engine have these mechanisms."""

    NOTHING = 0
    DROP = enum.auto()  # values need not be kept: what backward asks for is made again
    SWEEP = enum.auto()  # what a unit is given need not be kept: the units before it make it again
    MOVE = enum.auto()  # what is kept may wait off the device


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """The step as some levers would have it."""

    trace: Trace
    levers: frozenset[Lever] = frozenset()  # that made it from the recorded step
    seconds: float = 0.0  # beyond those of the recorded step
    eases_seconds: float = 0.0  # so many of them at most are saved where a plan has room left (`eased`)
    decided: Mapping[str, Any] = field(default_factory=dict)  # fields of the `Plan` that has it carried out
    host_bytes: int = 0  # that those levers have wait in host memory
    host_budget_bytes: int | None = None  # the most that may wait there; None: no limit

    @property
    def host_room_bytes(self) -> int | None:
        """What may wait in host memory beside what does already; below zero: too much does. None: no limit."""
        return None if self.host_budget_bytes is None else self.host_budget_bytes - self.host_bytes

    def by(
        self, lever: LeverDefinition, trace: Trace, *, seconds: float = 0.0, host_bytes: int = 0, **decided: Any
    ) -> Variant:
        """The step as `lever` would have it, at `seconds` more and with `host_bytes` more in host memory. `decided`:
        fields of the plan that say so."""
        return Variant(
            trace=trace,
            levers=self.levers | {lever.lever},
            seconds=self.seconds + seconds,
            eases_seconds=self.eases_seconds,
            decided={**self.decided, **decided},
            host_bytes=self.host_bytes + host_bytes,
            host_budget_bytes=self.host_budget_bytes,
        )

    def with_setting(
        self, lever: LeverDefinition, trace: Trace, setting: str, *, seconds: float = 0.0, host_bytes: int = 0
    ) -> Variant:
        """The same for a lever without fields of its own in `Plan`: its decision is the text `setting`."""
        settings = {**self.decided.get("settings", {}), lever.lever.value: setting}
        others = self.decided.get("other_seconds", 0.0) + seconds
        return self.by(lever, trace, seconds=seconds, host_bytes=host_bytes, settings=settings, other_seconds=others)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one lever does in a plan: `bought_bytes` that the peak would be higher without it, and what it costs."""

    lever: Lever
    bought_bytes: int
    seconds: float
    flops: int
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Walked:
    """A plan, what the referee says of it, and the referee."""

    planned: Trace  # what the levers of the plan make of the recorded step
    plan: Plan
    line: Timeline
    walk: Callable[[Plan], Timeline]  # of the recorded step under another plan

    def bought_by_setting(self, lever: Lever) -> int:
        """Bytes that the peak would be higher if the plan did not have its setting of `lever`."""
        settings = {name: value for name, value in self.plan.settings.items() if name != lever.value}
        return self.walk(dataclasses.replace(self.plan, settings=settings)).peak_bytes - self.line.peak_bytes


class RecordedStep(Protocol):
    """The step while it is being recorded; a lever may have it recorded again."""

    @property
    def model(self) -> Any: ...

    @property
    def modules(self) -> Mapping[str, Any]:
        """The units by path."""

    def again(self, opened: AbstractContextManager[Any], is_refused: Callable[[], bool]) -> Trace | None:
        """The step recorded with `opened` around it; None where `is_refused` says so after its forward."""

    def unplanned(self, trace: Trace) -> Timeline:
        """The referee's walk of `trace` without a plan."""

    def every_block(self, trace: Trace) -> Timeline:
        """The same with every unit recomputed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a plan in force has besides the model."""

    stats: Any = None  # what the lever's `new_stats` gave
    optimizer: Any = None  # the one that the plan was made with; None: nobody said
    pool: Any = None  # room off the device
    device: Any = None  # where the model is being put; None: it lies there


class LeverDefinition:
    """One lever. Class attributes say what it is, methods what it does where it is in use."""

    lever: ClassVar[Lever]
    noun: ClassVar[str]  # in sentences: "exact=True forbids tiles"
    summary: ClassVar[str]  # one line, for people who choose levers
    waits: ClassVar[str] = ""  # of a lever that moves bytes: what waits off the device
    is_exact: ClassVar[bool] = True  # loss and gradients are bit for bit those of the step without it
    caveat: ClassVar[str] = ""  # of an inexact lever: what its use means for the bits, as "the plan ..."
    is_default: ClassVar[bool] = True  # a plan may use it that is asked for no levers
    grants: ClassVar[Grant] = Grant.NOTHING
    #: with it a step can run for which the device is smaller than all weights, gradients and optimizer state together
    lowers_floor: ClassVar[bool] = False
    steps_optimizer: ClassVar[bool] = False  # it changes how the optimizer steps, and is given the optimizer
    eases_step_alone: ClassVar[bool] = False  # only while the optimizer steps is less there by it
    is_compiled: ClassVar[bool] = False  # its plans can be carried out inside compiled code
    is_compiled_around: ClassVar[bool] = False  # its plans can be carried out around compiled units

    # ------------------------------------------------------------ what it needs from the trace

    def watching(self, model: Any, units: list[str], is_fake: bool) -> AbstractContextManager[Any]:
        """Open while the first forward of a recording runs. What it yields is passed to `recorded`."""
        return contextlib.nullcontext()

    def recorded(self, step: RecordedStep, trace: Trace, seen: Any) -> Trace:
        """`trace` with what the lever needs to know of the step. `seen`: what `watching` yielded; None where the step
        has no units. Of an inexact lever it is only called where it may be needed, since recording takes long."""
        return trace

    def recorded_alone(self, step: RecordedStep, seen: Any) -> Trace | None:
        """The step recorded with the lever in force wherever it can be, and in no other way; None: it can be nowhere,
        or recording tells the lever nothing."""
        return None

    # -------------------------------------------------------------------- planner and referee

    def ruled_out(self, trace: Trace) -> str:
        """Why no plan for `trace` can use it, and behind a semicolon what to do; empty: one may, if it is worth it."""
        if self.grants is Grant.NOTHING or not trace.units or not all(unit.pinned for unit in trace.units):
            return ""
        first = trace.units[0]
        return f"every unit is kept whole, as {first.path or 'the model'}: {first.pinned}; leave it out"

    def variants(self, step: Variant) -> Iterable[Variant]:
        """Other tellings of `step` for the planner to choose from. Those with more in host memory than
        `Variant.host_room_bytes` are not looked at."""
        return ()

    def eased(self, trace: Trace, plan: Plan, peak_bytes: Callable[[Plan], int]) -> Plan:
        """`plan` for `trace` with as little of the lever as the budget has room for. `peak_bytes`: the referee's."""
        return plan

    def again_seconds(self, trace: Trace, seconds: float) -> float:
        """What of `seconds`, of one backward's replays and waiting for copies, is spent once more in a step."""
        return 0.0

    def ahead(self, trace: Trace, plan: Plan) -> Plan:
        """`plan` with the lever's copies begun before they are needed, so that they run beside the compute; itself,
        where it does not use the lever or nothing is won."""
        return plan

    def begun(self, trace: Trace) -> Mapping[str, Any]:
        """Fields of a plan for `trace`, where it was recorded with the lever in force; else empty."""
        return {}

    def under(self, trace: Trace, plan: Plan) -> Trace:
        """What the lever makes of `trace` where `plan` uses it. Events of forward keep their places, unless the step
        was recorded anew. Raises `PlanMismatch` where the trace does not know of it."""
        return trace

    def moved(self, plan: Plan, path: Callable[[str], str]) -> Plan:
        """`plan`, which uses it, with the modules that it names as `path` has them: in a model that is wrapped in
        another way."""
        return plan

    # ---------------------------------------------------------------------------------- engine

    def is_ahead(self, plan: Plan) -> bool:
        """Do its copies in `plan` begin before they are needed?"""
        return self.lever.value in plan.ahead

    def is_used(self, plan: Plan) -> bool:
        """Does `plan` use it? By default: does it have a setting of it, as `Variant.with_setting` makes one?"""
        return self.lever.value in plan.settings

    def host_bytes(self, planned: Trace, plan: Plan) -> int:
        """Bytes that `plan`, which uses it, has wait off the device at once. `planned`: what the levers of the plan
        make of the recorded step."""
        return 0

    def left_in_host(self, plan: Plan) -> Collection[str]:
        """Paths of modules whose frozen weights need never be on the device whole."""
        return ()

    def in_force(self, model: Any, plan: Plan, given: Given) -> AbstractContextManager[None]:
        """Open while `plan`, which uses it, is in force on `model`."""
        return contextlib.nullcontext()

    def new_stats(self) -> Any:
        """What it counts while it is in force; None: nothing."""
        return None

    def not_compiled(self, plan: Plan, whole: bool) -> str:
        """What of `plan` compiled code cannot do, as the rest of "its plan ..."; empty: nothing. `whole`: the loss is
        compiled too."""
        return ""

    # ----------------------------------------------------------------------------------- proof

    def pieces_in_float64(
        self,
        step: Callable[[], Any],
        model: Any,
        plan: Plan,
        doubled: Callable[[Any], Any],
        in_float64: Callable[[], AbstractContextManager[None]],
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Of an inexact lever: its own results without it, with it, and in float64, by name. For models whose whole
        step has no room in float64. `step` runs the loss; `doubled` gives a module's float64 twin, which
        runs inside `in_float64()`."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------ explanation

    def share(self, walked: Walked) -> Share | None:
        """What it buys in a plan that uses it, at what cost; None where there is nothing to say."""
        return None

    def how(self, plan: Plan) -> str:
        """How it makes the step fit, as in "the step fits ..."."""
        return ""

    def said(self, plan: Plan) -> str:
        """One line on what `plan` does by it; empty: the table of recomputed units says it."""
        return ""

    def fact(self, plan: Plan) -> tuple[str, str | int | None] | None:
        """A row of the page's facts: its name and what `plan` does (None: leave the row out)."""
        return None


def gone_ahead(plan: Plan, lever: Lever, less_seconds: float) -> Plan:
    """`plan` with the copies of `lever` ahead, which saves so many seconds; itself, where it saves none."""
    if less_seconds <= 0.0 or lever.value in plan.ahead:
        return plan
    return dataclasses.replace(
        plan, ahead=(*plan.ahead, lever.value), other_seconds=max(0.0, plan.other_seconds - less_seconds),
        step_seconds=plan.step_seconds - less_seconds, status=Status.FEASIBLE,
    )  # fmt: skip
