"""The fewest levers more with which a step would fit, where no plan does with those that were asked for.

Idea: the choices of the lowest peak are kept, and the step is told anew as other levers would have it. One walk says
what that takes. The most that a lever can have wait elsewhere is tried, which holds the least on the device.

Invariant: what is said is the referee's word on a plan that can be made. Refused: levers that are not exact.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from tightfit.core import Lever, Timeline, format_bytes
from tightfit.levers import allowed, every
from tightfit.levers.interface import LeverDefinition, Variant
from tightfit.plan.simulate import simulate_choices
from tightfit.plan.ways import Way


@dataclass(frozen=True, slots=True, kw_only=True)
class Enough:
    """Levers that were not asked for and that are enough, and the step as they would have it."""

    levers: tuple[LeverDefinition, ...]
    step: Variant
    line: Timeline

    @property
    def names(self) -> str:
        return ",".join(each.lever.value for each in self.levers)

    @property
    def nouns(self) -> str:
        return " and ".join(each.noun for each in self.levers)

    @property
    def said(self) -> str:
        return f"beside={self.names!r} would take {format_bytes(self.line.peak_bytes)}: {self.nouns}"


def fewest_more(
    ways: Collection[Way],
    way: Way,
    levers: Collection[Lever] | None,
    is_enough: Callable[[Variant, Timeline], bool],
) -> Enough | None:
    """The fewest levers beside `levers` that are enough with the choices of `way`, one of `ways` or a nesting of one;
    None: no levers are."""
    of_optimizer = [each for each in every() if each.steps_optimizer]
    others = [each for each in every() if each.is_exact and each not in allowed(levers)]
    # whatever is done to the optimizer's step now, the others would do it in their own way
    left = way.step.levers - {each.lever for each in of_optimizer}
    tiling = way.step.decided.get("tiling")  # a step in tiles has other ops, and choices are for its own
    alike = (each.step for each in ways if each.step.levers == left and each.step.decided.get("tiling") == tiling)
    plain = next(alike, None)
    if plain is None:
        return None
    tried: dict[tuple[LeverDefinition, ...], Variant] = {(): plain}
    while tried:  # one lever more in each turn: the fewest that are enough
        more: dict[tuple[LeverDefinition, ...], Variant] = {}
        for used, step in tried.items():
            for lever in others[others.index(used[-1]) + 1 if used else 0 :]:
                if (told := _most(lever.variants(step))) is not None:
                    more[*used, lever] = told
        for used, step in more.items():
            line = simulate_choices(step.trace, way.lowest.choices, way.advances)
            if is_enough(step, line):
                return Enough(levers=used, step=step, line=line)
        tried = more
    return None


def _most(variants: Iterable[Variant]) -> Variant | None:
    """The last of those that have room in host memory: a lever offers ever more of itself."""
    fitting = [each for each in variants if each.host_room_bytes is None or each.host_room_bytes >= 0]
    return fitting[-1] if fitting else None
