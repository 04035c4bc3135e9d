"""Peaks on the card against what was registered: one step of the kit for each table.

Each case runs as it was forecast: no checkpointing, every block by `torch.utils.checkpoint`, or the registered plan
itself. Two whole steps are watched, behind one that makes the optimizer's state. A dry run forecasts tiny cases for the
CPU and measures those, which proves the path and no figure.

Invariant: the registered forecast is read and never made again. Where no plan was kept, one is made here and the row
says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import torch
from card import Card, as_row
from cases import (
    EVERY_BLOCK,
    LEAST,
    LEAST_STEPPED,
    LEAST_TILED,
    LONGEST,
    LONGEST_SETUP,
    MIDDLE,
    NONE,
    TABLES,
    TINY,
    TINY_LONGEST_SETUP,
    Case,
    forecast_of,
    kept_plans,
    longer,
    plan_of,
    step_of,
)
from predict import CARD, MODES, RESULTS, longest

import tightfit
from tightfit.catalog import gpu
from tightfit.core import Plan
from tightfit.forecast import trace_setup
from tightfit.step.patches import no_key_value_cache
from tightfit.step.run import compute_loss
from tightfit.verify.measure import every_block_checkpointed
from tightfit.verify.peak import static_bytes

Rows = Iterator[dict[str, Any]]


def failed(error: BaseException) -> dict[str, Any]:
    return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]}


def registered(table: str) -> dict[str, Any]:
    """The registered rows of a table, by case."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return {row["case"]: row for row in found.get(table, {}).get("rows", ())}


class _Built:
    """The model of the case before, kept while the next one differs only in its batch."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self._key: Any = None
        self._model: Any = None
        self._optimizer: Any = None

    def step(self, case: Case) -> tuple[Any, Any, Any]:
        from tightfit.integrations.transformers import random_batch

        key = dataclasses.replace(case.setup, batch=1, seq=2)
        if key != self._key:
            self._model = self._optimizer = self._key = None
            self.card.empty()
            self._model, _, self._optimizer = step_of(case, self.card.device)
            self._key = key
        return self._model, random_batch(self._model, case.setup.batch, case.setup.seq), self._optimizer


#: Steps of more tokens take seconds each.
_LONG_TOKENS = 8192


def _in_force(model: Any, mode: str, plan: Plan | None, optimizer: Any) -> Any:
    if mode == EVERY_BLOCK:
        return every_block_checkpointed(model)
    return contextlib.nullcontext() if plan is None else tightfit.apply(model, plan, optimizer=optimizer)


def _one_step(model: Any, batch: Any, optimizer: Any) -> None:
    compute_loss(model, batch).backward()
    optimizer.step()
    model.zero_grad(set_to_none=True)


def _measured(card: Card, built: _Built, case: Case, mode: str, plan: Plan | None) -> dict[str, Any]:
    """Peak and seconds of whole steps of a case. The first step makes the optimizer's state and is not counted. A long
    step is watched once."""
    model, batch, optimizer = built.step(case)
    repeats = 1 if case.setup.batch * case.setup.seq > _LONG_TOKENS else 2
    try:
        with no_key_value_cache(model), _in_force(model, mode, plan, optimizer) as applied:
            _one_step(model, batch, optimizer)
            held = static_bytes(model, optimizer, batch)
            seconds = []
            with card.peak(held) as peak:
                for _ in range(repeats if card.is_cuda else 1):
                    seconds.append(card.seconds(lambda: _one_step(model, batch, optimizer)))
            stats = applied.stats() if plan is not None and mode != EVERY_BLOCK else None
        row = {"static_bytes": held, "step_seconds": min(seconds), **as_row(peak)}
        return row | ({} if stats is None else {"fallbacks": stats.fallbacks})
    except (torch.OutOfMemoryError, RuntimeError, tightfit.TightfitError) as error:
        return failed(error)
    finally:
        model.zero_grad(set_to_none=True)
        card.empty()


def _plan(case: Case, mode: str) -> tuple[Plan | None, str]:
    """The registered plan of a mode, or one that is made here where none was kept; and which of the two."""
    if mode in (NONE, EVERY_BLOCK):
        return None, "none"
    text = kept_plans().get((case.name, mode))
    if text is not None:
        return tightfit.core.loads(Plan, text), "registered"
    return plan_of(trace_setup(case.setup, gpu(CARD), tiles=mode == LEAST_TILED), mode), "made here"


def _against(forecast: dict[str, Any] | None, measured: dict[str, Any]) -> dict[str, Any]:
    """How far a forecast was off, as a part of what was measured."""
    if forecast is None or "allocated_bytes" not in measured:
        return {}
    off = {}
    for key in ("allocated_bytes", "reserved_bytes"):
        said = forecast.get(key, forecast["peak_bytes"] if key == "allocated_bytes" else None)
        if said is not None and measured.get(key):
            off[key] = said / measured[key] - 1
    return {"off_by": off}


def _memory(card: Card, table: str, modes: tuple[str, ...], most: int = 1 << 62) -> Rows:
    """A table's cases by each of `modes`, the modes in the order of their importance."""
    said = {} if card.is_dry else registered(table)
    built = _Built(card)
    for mode in modes:
        for case in TINY[table] if card.is_dry else TABLES[table].cases:
            if mode not in case.modes:
                continue
            if card.is_dry:
                trace = trace_setup(case.setup, None, tiles=mode == LEAST_TILED)
                plan, origin = plan_of(trace, mode), "made here"
                forecast: dict[str, Any] | None = forecast_of(trace, plan)
            else:
                forecast = said.get(case.name, {}).get("modes", {}).get(mode)
                total = card.total_bytes() or most
                if forecast is not None and forecast["reserved_bytes"] > 0.97 * total:
                    yield {"case": case.name, "mode": mode, "forecast": forecast, "skipped": "more than the card has"}
                    continue
                try:
                    plan, origin = _plan(case, mode)
                except Exception as error:
                    yield {"case": case.name, "mode": mode, **failed(error)}
                    continue
            try:
                measured = _measured(card, built, case, mode, plan)
            except Exception as error:  # the model itself could not be built
                measured = failed(error)
            yield {
                "case": case.name, "mode": mode, "plan": origin, "forecast": forecast, "measured": measured,
                **_against(forecast, measured),
            }  # fmt: skip


def memory_a(card: Card) -> Rows:
    """Table A: Llama-2-7B in 4 bits from 1k to 32k tokens."""
    yield from _memory(card, "A", (EVERY_BLOCK, LEAST, NONE, LEAST_TILED))


def memory_b(card: Card) -> Rows:
    """Table B: Llama-2-7B with LoRA on query and value, in bf16 and in 4 bits."""
    yield from _memory(card, "B", (NONE, LEAST, LEAST_TILED, EVERY_BLOCK))


def memory_c(card: Card) -> Rows:
    """Table C: Llama-3.2-3B, full, LoRA and QLoRA."""
    yield from _memory(card, "C", (NONE, EVERY_BLOCK, LEAST_STEPPED, LEAST, LEAST_TILED))


def memory_s(card: Card) -> Rows:
    """Table S: small steps of several kinds."""
    yield from _memory(card, "S", (NONE, EVERY_BLOCK, MIDDLE))


def memory_d(card: Card) -> Rows:
    """Table D: does the longest context that was forecast run in as much memory as a smaller card has?"""
    if card.is_dry:
        case = Case(name="D-tiny", setup=TINY_LONGEST_SETUP, modes=())
        found, plan = longest(
            lambda seq, tiles: trace_setup(longer(case.setup, seq), None), LEAST, 1 << 20, first=128, most=512
        )
        rows = [{"case": "D-tiny", "room_bytes": 1 << 20, "modes": {LEAST: found}}]
        plans = {("D-tiny", LEAST): plan}
    else:
        rows, plans = list(registered("D").values()), {}
    for mode in (LEAST, EVERY_BLOCK, LEAST_TILED):
        for row in rows:
            forecast = row["modes"].get(mode)
            if not forecast or not forecast["tokens"]:
                continue
            setup = longer(TINY_LONGEST_SETUP if card.is_dry else LONGEST_SETUP, forecast["tokens"])
            case = Case(name=row["case"], setup=setup, modes=())
            card.cap(card.total_bytes() or 1)
            built = _Built(card)
            built.step(dataclasses.replace(case, setup=longer(setup, 64)))  # 16 bits first, so beyond the cap
            card.empty()
            card.cap(row["room_bytes"])
            made, origin = (plans[row["case"], mode], "made here") if card.is_dry else _plan(case, mode)
            measured = _measured(card, built, case, mode, made)
            yield {
                "case": row["case"], "mode": mode, "plan": origin, "tokens": forecast["tokens"],
                "room_bytes": row["room_bytes"], "forecast": forecast, "measured": measured,
                **_against(forecast, measured),
            }  # fmt: skip
            del built


def what_is_registered() -> dict[str, Any]:
    """Tables with the date of their forecast, and cases that have no forecast or no plan."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    plans, missing = kept_plans(), []
    for table, said in TABLES.items():
        rows = registered(table)
        asked = {(case.name, mode) for case in said.cases for mode in case.modes}
        asked |= {(f"D-{gib}", mode) for gib in LONGEST for mode in MODES} if table == "D" else set()
        for case, mode in sorted(asked):
            forecast = rows.get(case, {}).get("modes", {}).get(mode)
            if forecast is None:
                missing.append(f"{case}, {mode}: no forecast")
            elif mode not in (NONE, EVERY_BLOCK) and forecast.get("tokens") != 0 and (case, mode) not in plans:
                missing.append(f"{case}, {mode}: no plan")
    return {"dates": {table: each["date"] for table, each in found.items()}, "missing": missing}
