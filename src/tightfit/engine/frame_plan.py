"""What a plan says of one frame, prepared for its forward and its tape; and the counts of what the engine did."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tightfit.core import Action, Kind, Program
from tightfit.engine.casts import CastView
from tightfit.engine.tape import Reference, TapedOp
from tightfit.plan.program import Recipe, first_random, run_for_sweeps


@dataclass(slots=True)
class Stats:
    """What the engine did since `apply`. Counts, never estimates."""

    frames: int = 0  # forwards of planned units
    replays: int = 0  # frames that backward ran again
    fallbacks: int = 0  # frames that had to be replayed whole although the plan kept something
    rerun_ops: int = 0  # ops that replays really ran
    held: int = 0  # tensors that the plan would not hold, but the unit got another or the pool had no room
    levers: dict[str, Any] = dataclasses.field(default_factory=dict)  # what levers counted, by their names

    def __sub__(self, other: Stats) -> Stats:
        return Stats(
            frames=self.frames - other.frames,
            replays=self.replays - other.replays,
            fallbacks=self.fallbacks - other.fallbacks,
            rerun_ops=self.rerun_ops - other.rerun_ops,
            held=self.held - other.held,
            levers={name: counts - other.levers[name] for name, counts in self.levers.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FramePlan:
    """A unit's program with its recipe, in the form that the frame's forward reads."""

    names: tuple[str, ...]
    outputs: tuple[tuple[int | None, ...], ...]
    live: tuple[bool, ...]
    writes: tuple[bool, ...]  # does the op change something in place? Then it must not be something on the tape
    states: frozenset[int]
    first_random: int | None
    slots_dropped: tuple[bool, ...]
    slots: tuple[int, ...]
    wanted: tuple[bool, ...]
    rematerialised: frozenset[int]  # values that are made again and not kept
    settled: Mapping[int, int]  # kept values that are also made again -> ops after which they are as they stay
    inputs: tuple[Action, ...]  # by place among the distinct tensors that the unit is given
    lends: frozenset[int]  # values that later units have made again
    for_sweeps: frozenset[int]  # ops that only run for them
    offload: frozenset[int]  # values that leave the device when the forward is over
    offloads_here: frozenset[int]  # ops that write one of them for the last time
    values: int  # input k is value `values + k` to the tape
    offloads: bool
    replays: bool  # what its backward reads is made again; autocast's copies of its weights are then, too
    # once a forward has called the op; None before, and for casts, which need a closer look
    taped: list[TapedOp | None]
    funcs: list[Any]  # the ops themselves, as forwards have called them

    @classmethod
    def of(
        cls,
        program: Program,
        recipe: Recipe,
        inputs: tuple[Action, ...] = (),
        lends: Collection[int] = (),
        offload: frozenset[int] = frozenset(),
    ) -> FramePlan:
        steps = program.steps
        return cls(
            names=tuple(step.name for step in steps),
            outputs=tuple(step.outputs for step in steps),
            live=tuple(i in recipe.runs for i in range(len(steps))),
            writes=tuple(step.kind in (Kind.INPLACE, Kind.RANDOM, Kind.OPAQUE) for step in steps),
            states=recipe.states,
            first_random=first_random(program),
            slots_dropped=recipe.slots_dropped,
            slots=program.slots,
            wanted=program.wanted,
            rematerialised=recipe.rematerialised,
            settled={
                v: sum(v in step.writes for step in steps)
                for v in {v for op in recipe.runs for v in steps[op].writes} - recipe.rematerialised - offload
            },
            inputs=inputs,
            lends=frozenset(lends),
            for_sweeps=run_for_sweeps(program, recipe) if lends else frozenset(),
            offload=offload,
            offloads_here=frozenset(max(i for i, step in enumerate(steps) if v in step.writes) for v in offload),
            offloads=bool(offload) or Action.OFFLOAD in inputs,
            replays=recipe.replays,
            values=program.values,
            taped=[None] * len(steps),
            funcs=[None] * len(steps),
        )

    def brings_back(self, reference: Reference | CastView) -> bool:
        """Need autograd not hold what `reference` stands for?"""
        if isinstance(reference, CastView):
            return self.replays
        value = reference.value
        return value in self.rematerialised or value in self.offload or value >= self.values


class Comparison:
    """Which of a unit's saved tensors have been compared with what its forwards saved. All frames of one unit under one
    plan share it."""

    __slots__ = ("compared", "leaves")

    def __init__(self) -> None:
        self.compared: set[int] = set()  # saved tensors that came out right once, or cannot be compared
        self.leaves = False  # has a forward left the plan? The next may too, and then everything is compared

    def wants(self, index: int) -> bool:
        return self.leaves or index not in self.compared
