"""Register the forecast of every case, before a card is seen.

    python benchmarks/gpu/predict.py            # half an hour on two cores; writes results/gpu_predictions.json
    python benchmarks/gpu/predict.py A D        # these tables only; the others stay as they were registered

The file says when, at which commit, with which versions and for which card the figures were made. The kit's memory
steps measure the same cases against it. Nothing is tuned afterwards: a forecast that is made anew gets a new date.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cases import (
    EVERY_BLOCK,
    LEAST,
    LEAST_TILED,
    LONGEST,
    LONGEST_SETUP,
    TABLES,
    Case,
    described,
    forecast_of,
    keep_plans,
    longer,
    plan_of,
)  # fmt: skip
from run import git

from tightfit.catalog import gpu
from tightfit.core import Device, Plan, Trace
from tightfit.forecast import device_asked, trace_setup, usable_bytes
from tightfit.forecast.search import bytes_reserved
from tightfit.step.environment import environment

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "gpu_predictions.json"
CARD = "h100-sxm"
STEP = 64
MODES = (EVERY_BLOCK, LEAST, LEAST_TILED)


Plans = dict[tuple[str, str], Plan]


def of_case(case: Case, device: Device | None, plans: Plans) -> dict[str, Any]:
    """The case with the forecast of each of its modes; the plans that tightfit makes go into `plans`."""
    modes: dict[str, Any] = {}
    plain: Trace | None = None
    for mode in case.modes:
        if mode == LEAST_TILED:
            trace = trace_setup(case.setup, device, tiles=True)
        else:
            trace = plain = plain or trace_setup(case.setup, device)
        made = plan_of(trace, mode)
        modes[mode] = forecast_of(trace, made)
        if made is not None and mode != EVERY_BLOCK:
            plans[case.name, mode] = made
    return described(case) | {"modes": modes}


# ------------------------------------------------------------------------------------------ the longest context


def longest(
    traced: Callable[[int, bool], Trace],
    mode: str,
    room_bytes: int,
    *,
    first: int = 4096,
    most: int = 1 << 20,
    probes: int = 9,
) -> tuple[dict[str, Any], Plan | None]:
    """The longest context, in steps of 64 tokens and to two parts in a hundred, whose step runs in `room_bytes` by the
    plan of `mode`, with its forecast and that plan. `searched_to` is the shortest that was found not to run; None where
    none was. At most `probes` lengths are looked at.

    Bytes are nearly affine in the tokens. Where the reserved bytes meet the room the step surely runs; where the
    allocated ones do, nothing is left to give back. The answer is between the two, and every guess is a step that was
    traced, planned and laid out by the allocator's rules.
    """
    known: list[tuple[int, int, int]] = []  # guess, reserved, allocated
    best: tuple[int, Plan | None, Trace] | None = None
    low, high, guess, tried = 0, most // STEP + 1, max(1, first // STEP), 0
    while high - low > max(1, low // 50) and tried < probes:
        trace = traced(guess * STEP, mode == LEAST_TILED)
        made = plan_of(trace, mode)
        reserved = bytes_reserved(trace, made)
        assert made is not None and reserved is not None
        runs = made.peak_bytes <= room_bytes and bytes_reserved(trace, made, room_bytes) is not None
        print(f"  {mode}: {guess * STEP} tokens, {reserved / 2**30:.2f} GiB, {runs}", flush=True)
        if runs:
            low, best = guess, (guess * STEP, made, trace)
        else:
            high = guess
        tried += 1
        known.append((guess, reserved, made.peak_bytes))
        if len(known) == 1:
            known.append((0, *[sum(trace.static_bytes.values())] * 2))
        surely, at_most = (_meets(known, column, room_bytes) for column in (1, 2))
        guess = (max(low, surely) + min(high, at_most)) // 2
        guess = min(max(guess, low + 1), high - 1)
    if best is None:
        return {"tokens": 0}, None
    tokens, made, trace = best
    searched_to = None if high > most // STEP else high * STEP
    return {"tokens": tokens, "searched_to": searched_to} | forecast_of(trace, made, room_bytes), made


def _meets(known: list[tuple[int, int, int]], column: int, room_bytes: int) -> int:
    """Where the line through the two nearest answers meets the room."""
    one, other = sorted(known, key=lambda each: abs(each[column] - room_bytes))[:2]
    if one[column] == other[column]:
        return one[0]
    return int(one[0] + (room_bytes - one[column]) * (other[0] - one[0]) / (other[column] - one[column]))


def of_longest(plans: Plans, modes: tuple[str, ...] = MODES) -> list[dict[str, Any]]:
    """The rows of table D. Each search begins at the length that was registered before, if one was."""
    before = {row["case"]: row["modes"] for row in _kept().get("D", {}).get("rows", ())}
    known: dict[tuple[int, bool], Trace] = {}

    def traced(seq: int, tiles: bool) -> Trace:
        if (seq, tiles) not in known:
            known.clear()
            known[seq, tiles] = trace_setup(longer(LONGEST_SETUP, seq), gpu(CARD), tiles=tiles)
        return known[seq, tiles]

    rows = [
        {
            "case": f"D-{card_gib}", "card_gib": card_gib, "room_bytes": usable_bytes(device_asked(f"{card_gib}GiB")),
            "published_tokens": published, "modes": {},
        }
        for card_gib, published in LONGEST.items()
    ]  # fmt: skip
    for mode in modes:
        for row in rows:
            room = row["room_bytes"]
            per_token = 2_600_000 if mode == EVERY_BLOCK else 1_600_000 if mode == LEAST else 360_000
            first = before.get(row["case"], {}).get(mode, {}).get("tokens") or max(
                1024, (room - 66 * 10**8) // per_token
            )
            # a trace with tiles takes several times as long, so fewer are looked at
            found, made = longest(traced, mode, room, first=first, probes=4 if mode == LEAST_TILED else 9)
            row["modes"][mode] = found
            if made is not None and mode != EVERY_BLOCK:
                plans[row["case"], mode] = made
            print(row["case"], mode, row["modes"][mode], flush=True)
    return rows


# ------------------------------------------------------------------------------------------------- the file


def commit() -> str:
    """The last commit that changed what a forecast is made of. Refuses to register where git does not say it."""
    found = git("log", "-1", "--format=%H", "--", "src")
    if not found:
        raise SystemExit(f"git tells no commit of {ROOT}, and a forecast is registered with one: run it in a checkout")
    return found


def _kept() -> dict[str, Any]:
    """What is registered now, by table."""
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return found


def registered(table: str) -> dict[str, Any]:
    said, of_commit = TABLES[table], commit()
    plans: Plans = {}
    rows = of_longest(plans) if table == "D" else []
    for case in said.cases:
        rows.append(of_case(case, gpu(CARD), plans))
        print(json.dumps(rows[-1]), flush=True)
    keep_plans(plans)
    return {
        "title": said.title, "source": said.source, "assumed": list(said.assumed),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": of_commit, "card": CARD,
        "environment": environment(), "rows": rows,
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    for table in arguments or list(TABLES):
        made = registered(table)
        found = _kept()
        found = {name: each for name in TABLES if (each := made if name == table else found.get(name))}
        temporary = RESULTS.with_suffix(".json.part")
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        temporary.replace(RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
