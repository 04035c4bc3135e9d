"""Plans with one lever taken out and the others left as they are, for the referee to walk again.

Invariant: what the lever treated stays on the device from forward to backward.
"""

from __future__ import annotations

import dataclasses

from tightfit.core import Action, Plan


def keeping(plan: Plan, gone: Action) -> Plan:
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


def without_sweeps(plan: Plan) -> Plan:
    """`plan` with every unit input kept."""
    choices = tuple(
        dataclasses.replace(
            choice,
            lends=(),
            inputs=tuple(Action.KEEP if action is Action.RECOMPUTE else action for action in choice.inputs),
        )
        for choice in plan.choices
    )
    return dataclasses.replace(plan, choices=choices, advances=())
