"""Tiles: the head with its loss, and token-wise modules, a tile of rows at a time.

Needs from the trace: which module makes the logits of the loss, which modules work row by row, and the step recorded
again with tiles in force (`recording`), as `Trace.tiled`.
Offers the planner: those recordings, at the seconds that they take longer. Walked by the referee like any step. Carried
out by `force`: deferred logits (`deferred`), the head and the loss tile by tile (`head`), modules in chunks
(`modules`). Sums are added in another order, so it is proven against float64, and only used by default where nothing
exact fits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from tightfit.core import Lever, Plan, PlanMismatch, Tiling, Trace
from tightfit.levers.interface import Given, LeverDefinition, RecordedStep, Share, Variant, Walked

__all__ = ["DEFINITION"]


class Tile(LeverDefinition):
    lever = Lever.TILE
    noun = "tiles"
    summary = "head and loss, and token-wise modules, a tile of rows at a time; not bit for bit"
    is_exact = False
    caveat = (
        "computes a part of the step in tiles: sums are added in another order, and the gradients are not bit for bit "
        "those without it (verify holds them against float64)"
    )

    def watching(self, model: Any, units: list[str], is_fake: bool) -> AbstractContextManager[Any]:
        from tightfit.levers.tile.recording import watching

        return watching(model, units, is_fake)

    def recorded(self, step: RecordedStep, trace: Trace, seen: Any) -> Trace:
        from tightfit.levers.tile.recording import with_tiled

        return trace if seen is None else with_tiled(step, trace, *seen)

    def recorded_alone(self, step: RecordedStep, seen: Any) -> Trace | None:
        from tightfit.levers.tile.recording import all_tiled

        return None if seen is None else all_tiled(step, *seen)

    def ruled_out(self, trace: Trace) -> str:
        if trace.tiled or trace.tiling is not None:
            return ""
        worth = (
            "it was recorded without tiles, since its head and modules cannot be tiled or are too small to matter, or "
            "several processes share it"
        )
        return f"{next((note for note in trace.notes if 'cannot be tiled' in note), worth)}; leave it out"

    def variants(self, step: Variant) -> Iterator[Variant]:
        if step.levers:  # the recordings are of the step without any other lever
            return
        for tiled in step.trace.tiled:
            tiling = tiled.tiling
            assert tiling is not None
            seconds = max(0.0, tile_seconds(step.trace, tiled))
            yield step.by(self, tiled, seconds=seconds, tiling=tiling, tile_seconds=seconds)

    def begun(self, trace: Trace) -> Mapping[str, Any]:
        return {} if trace.tiling is None else {"tiling": trace.tiling}

    def under(self, trace: Trace, plan: Plan) -> Trace:
        if plan.tiling == trace.tiling:
            return trace
        variant = next((each for each in trace.tiled if each.tiling == plan.tiling), None)
        if variant is None:
            raise PlanMismatch("the plan computes the step in tiles that this trace does not know; make the plan anew")
        return variant

    def moved(self, plan: Plan, path: Callable[[str], str]) -> Plan:
        tiling = plan.tiling
        if tiling is None or tiling.head is None:
            return plan
        return dataclasses.replace(plan, tiling=dataclasses.replace(tiling, head=path(tiling.head)))

    def is_used(self, plan: Plan) -> bool:
        return plan.tiling is not None

    def new_stats(self) -> Any:
        from tightfit.levers.tile.head import TileStats

        return TileStats()

    def in_force(self, model: Any, plan: Plan, given: Given) -> AbstractContextManager[None]:
        from tightfit.levers.tile.force import in_force

        assert plan.tiling is not None
        return in_force(model, plan.tiling, given.stats, [choice.unit for choice in plan.choices])

    def not_compiled(self, plan: Plan, whole: bool) -> str:
        tiled = plan.tiling is not None and (whole or plan.tiling.modules)
        return "computes modules in tiles" if tiled else ""

    def pieces_in_float64(
        self,
        step: Callable[[], Any],
        model: Any,
        plan: Plan,
        doubled: Callable[[Any], Any],
        in_float64: Callable[[], AbstractContextManager[None]],
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        from tightfit.levers.tile.proof import heads_in_float64

        assert plan.tiling is not None
        return heads_in_float64(step, model, plan.tiling, doubled, in_float64)

    def share(self, walked: Walked) -> Share | None:
        plan, tiling = walked.plan, walked.plan.tiling
        if tiling is None:
            return None
        # what a unit computes in chunks has another program, so its choices say nothing of the untiled one
        untiled = dataclasses.replace(
            plan,
            tiling=None,
            choices=() if tiling.modules else plan.choices,
            advances=() if tiling.modules else plan.advances,
        )
        what = [] if tiling.head is None else [f"{tiling.head} and the loss, {tiling.rows} rows at a time"]
        what += [f"{module.name} in {module.tiles} chunks" for module in tiling.modules]
        return Share(
            lever=self.lever,
            bought_bytes=walked.walk(untiled).peak_bytes - walked.line.peak_bytes,
            seconds=plan.tile_seconds,
            flops=0,
            what="; ".join(what),
        )

    def how(self, plan: Plan) -> str:
        return "in tiles"

    def said(self, plan: Plan) -> str:
        tiling = plan.tiling
        assert tiling is not None
        said = [] if tiling.head is None else [f"{tiling.head} with its loss, {tiling.rows} rows of logits at a time"]
        said += [f"every unit's {module.name} in {module.tiles} chunks of tokens" for module in tiling.modules]
        return (
            f"tiles: {'; '.join(said)}; {plan.tile_seconds:.4f} s; sums are added in another order, so the gradients "
            "are not bit for bit those of the untiled step: verify holds them against float64"
        )

    def fact(self, plan: Plan) -> tuple[str, str]:
        return "in tiles", "no" if plan.tiling is None else self.said(plan).removeprefix("tiles: ")


def tile_seconds(trace: Trace, tiled: Trace) -> float:
    """By how many seconds `tiled`, a variant of `trace`, takes longer."""
    assert tiled.tiling is not None
    return _seconds(tiled, tiled.tiling) - _seconds(trace, tiled.tiling)


def _seconds(trace: Trace, tiling: Tiling) -> float:
    # where only the head is tiled the units' seconds are the same, but for noise
    return sum(op.seconds for op in trace.ops if op.unit is None or tiling.modules)


DEFINITION = Tile()
