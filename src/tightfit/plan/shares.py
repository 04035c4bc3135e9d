"""Which lever of a plan buys which bytes, at which cost.

Idea: take one lever out of the plan, leave the others as they are, and have the referee walk the step again: the peak
rises by what the lever buys. Shares need not add up, since two levers may each be needed for the same bytes.

Invariant: the figures are the referee's. Refused: nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from tightfit.core import Action, Lever, Plan, Timeline, Trace
from tightfit.device.cost import copy_lanes
from tightfit.plan.lever import under
from tightfit.plan.simulate import simulate, simulate_choices

__all__ = ["Share", "shares"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one lever does in a plan: `bytes` that the peak would be higher without it, and what it costs."""

    lever: Lever
    bought_bytes: int
    seconds: float
    flops: int
    what: str


def shares(trace: Trace, plan: Plan) -> tuple[Share, ...]:
    """One entry for each lever that `plan` uses, in the order of `Lever`."""
    return tuple(_shares(trace, plan, simulate(trace, plan)))


def _shares(trace: Trace, plan: Plan, line: Timeline) -> Iterator[Share]:
    if line.replays:
        without = simulate(trace, _keeping(plan, Action.RECOMPUTE))
        unswept = simulate(trace, _unnested(plan))
        yield Share(
            lever=Lever.RECOMPUTE,
            bought_bytes=without.peak_bytes - line.peak_bytes,
            seconds=unswept.recompute_seconds,
            flops=unswept.recompute_flops,
            what=f"{unswept.replays} units make {_made_again(under(trace, plan), plan)} values again",
        )
    if plan.in_place_loss:
        without = simulate(trace, dataclasses.replace(plan, in_place_loss=False))
        yield Share(
            lever=Lever.LOSS_IN_PLACE,
            bought_bytes=without.peak_bytes - line.peak_bytes,
            seconds=0.0,
            flops=0,
            what="the loss makes its gradient in place of what it saved",
        )
    if plan.tiling is not None:
        choices = plan.choices if not plan.tiling.modules else ()
        untiled = simulate_choices(trace, choices, plan.advances if choices else ())
        head = plan.tiling.head
        what = [] if head is None else [f"{head} and the loss, {plan.tiling.rows} rows at a time"]
        what += [f"{module.name} in {module.tiles} chunks" for module in plan.tiling.modules]
        yield Share(
            lever=Lever.TILE,
            bought_bytes=untiled.peak_bytes - line.peak_bytes,
            seconds=plan.tile_seconds,
            flops=0,
            what="; ".join(what),
        )
    if plan.advances:
        unswept = simulate(trace, _unnested(plan))
        swept = sum(action is Action.RECOMPUTE for choice in plan.choices for action in choice.inputs)
        yield Share(
            lever=Lever.NEST,
            bought_bytes=unswept.peak_bytes - line.peak_bytes,
            seconds=line.recompute_seconds - unswept.recompute_seconds,
            flops=line.recompute_flops - unswept.recompute_flops,
            what=f"{swept} unit inputs are made again by {len(plan.advances)} sweeps",
        )
    if line.offloaded_bytes:
        without = simulate(trace, _keeping(plan, Action.OFFLOAD))
        out, back = copy_lanes(under(trace, plan))
        yield Share(
            lever=Lever.OFFLOAD,
            bought_bytes=without.peak_bytes - line.peak_bytes,
            seconds=out.waiting_seconds(line.offloaded_bytes) + back.waiting_seconds(line.fetched_bytes),
            flops=0,
            what=f"{line.offloaded_bytes:,} bytes wait off the device",
        )


def _made_again(trace: Trace, plan: Plan) -> int:
    """Values that backward reads and that the plan does not keep."""
    needed = {(frame.unit, value) for frame in trace.frames for value in trace.programs[frame.id].needed}
    recomputed = (
        (choice.unit, value)
        for choice in plan.choices
        for value, action in enumerate(choice.actions)
        if action is Action.RECOMPUTE
    )
    return len(needed.intersection(recomputed))


def _keeping(plan: Plan, gone: Action) -> Plan:
    """`plan` with everything kept on the device that it treats by `gone`; what sweeps need is left to them."""

    def kept(choice_actions: tuple[Action, ...], lends: tuple[int, ...] = ()) -> tuple[Action, ...]:
        return tuple(Action.KEEP if a is gone and v not in lends else a for v, a in enumerate(choice_actions))

    choices = tuple(
        dataclasses.replace(
            choice,
            actions=kept(choice.actions, choice.lends),
            inputs=choice.inputs if gone is Action.RECOMPUTE else kept(choice.inputs),
        )
        for choice in plan.choices
    )
    return dataclasses.replace(plan, choices=choices)


def _unnested(plan: Plan) -> Plan:
    choices = tuple(
        dataclasses.replace(
            choice,
            lends=(),
            inputs=tuple(Action.KEEP if action is Action.RECOMPUTE else action for action in choice.inputs),
        )
        for choice in plan.choices
    )
    return dataclasses.replace(plan, choices=choices, advances=())
