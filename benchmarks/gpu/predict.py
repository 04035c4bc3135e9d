"""Register the forecast of every case, before a card is seen.

    python benchmarks/gpu/predict.py            # half an hour on two cores; writes results/gpu_predictions.json
    python benchmarks/gpu/predict.py A D        # these tables only; the others stay as they were registered

The file says when, at which commit, with which versions and for which card the figures were made. The kit's memory
steps measure the same cases against it. Nothing is tuned afterwards: a forecast that is made anew gets a new date.
"""

from __future__ import annotations

import json
import subprocess
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
    recorded,
)  # fmt: skip

from tightfit.catalog import gpu
from tightfit.core import Device, Plan, Trace
from tightfit.forecast import device_asked, usable_bytes
from tightfit.forecast.search import QUICK, bytes_reserved, fitted
from tightfit.levers import exact_only
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
            trace = recorded(case, device, tiles=True)
        else:
            trace = plain = plain or recorded(case, device)
        made = plan_of(trace, mode)
        modes[mode] = forecast_of(trace, made)
        if made is not None and mode != EVERY_BLOCK:
            plans[case.name, mode] = made
    return described(case) | {"modes": modes}


# ------------------------------------------------------------------------------------------ the longest context


def runs(trace: Trace, mode: str, room_bytes: int) -> tuple[Plan | None, int]:
    """The plan by which the step runs in `room_bytes` (None: none does), and what its lowest makes one reserve."""
    made = plan_of(trace, mode)
    reserved = bytes_reserved(trace, made)
    assert reserved is not None
    if bytes_reserved(trace, made, room_bytes) is not None:
        return made, reserved
    if mode == EVERY_BLOCK or (made is not None and made.peak_bytes > room_bytes):
        return None, reserved
    return fitted(trace, room_bytes, QUICK, exact_only(None) if mode == LEAST else None), reserved


def longest(
    traced: Callable[[int, bool], Trace], mode: str, room_bytes: int, *, first: int = 4096, most: int = 1 << 20
) -> tuple[dict[str, Any], Plan | None]:
    """The longest context, in steps of 64 tokens and to a part in a hundred, whose step runs in `room_bytes`, with its
    forecast and its plan. What is longer by `searched_to` does not run.

    Bytes are nearly affine in the tokens. So the line through two answers says where to look next, and every answer is
    a step that was traced, planned and laid out.
    """
    tiles = mode == LEAST_TILED
    reserved: dict[int, int] = {}
    best: tuple[int, Plan | None, Trace] | None = None
    low, high, guess = 0, most // STEP + 1, first // STEP
    while high - low > max(1, low // 100) and len(reserved) < 8:
        trace = traced(guess * STEP, tiles)
        made, reserved[guess] = runs(trace, mode, room_bytes)
        print(f"  {mode}: {guess * STEP} tokens, {reserved[guess] / 2**30:.2f} GiB, {made is not None}", flush=True)
        if made is not None:
            low, best = guess, (guess * STEP, made, trace)
        else:
            high = guess
        known = sorted(reserved, key=lambda n: abs(reserved[n] - room_bytes))[:2]
        if len(known) == 2 and reserved[known[0]] != reserved[known[1]]:
            slope = (reserved[known[1]] - reserved[known[0]]) / (known[1] - known[0])
            guess = int(known[0] + (room_bytes - reserved[known[0]]) / slope)
            guess += max(1, guess // 200) if guess <= low else -max(1, guess // 200) if guess >= high else 0
        else:
            guess = guess * 4 if low else guess // 4
        guess = min(max(guess, low + 1), high - 1)
    if best is None:
        return {"tokens": 0}, None
    tokens, made, trace = best
    return {"tokens": tokens, "searched_to": high * STEP} | forecast_of(trace, made), made


def of_longest(plans: Plans) -> list[dict[str, Any]]:
    known: dict[tuple[int, bool], Trace] = {}

    def traced(seq: int, tiles: bool) -> Trace:
        if (seq, tiles) not in known:
            known.clear()
            case = Case(name="D", setup=longer(LONGEST_SETUP, seq), modes=())
            known[seq, tiles] = recorded(case, gpu(CARD), tiles=tiles)
        return known[seq, tiles]

    rows = [
        {
            "case": f"D-{card_gib}", "card_gib": card_gib, "room_bytes": usable_bytes(device_asked(f"{card_gib}GiB")),
            "published_tokens": published, "modes": {},
        }
        for card_gib, published in LONGEST.items()
    ]  # fmt: skip
    for mode in MODES:
        for row in rows:
            room = row["room_bytes"]
            per_token = 2_600_000 if mode == EVERY_BLOCK else 1_600_000 if mode == LEAST else 400_000
            found, made = longest(traced, mode, room, first=max(1024, (room - 6 * 10**9) // per_token))
            row["modes"][mode] = found
            if made is not None and mode != EVERY_BLOCK:
                plans[row["case"], mode] = made
            print(row["case"], mode, row["modes"][mode], flush=True)
    return rows


# ------------------------------------------------------------------------------------------------- the file


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def registered(table: str) -> dict[str, Any]:
    said = TABLES[table]
    plans: Plans = {}
    rows = of_longest(plans) if table == "D" else []
    for case in said.cases:
        rows.append(of_case(case, gpu(CARD), plans))
        print(json.dumps(rows[-1]), flush=True)
    keep_plans(plans)
    return {
        "title": said.title, "source": said.source, "assumed": list(said.assumed),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(), "card": CARD,
        "environment": environment(), "rows": rows,
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    for table in arguments or list(TABLES):
        made = registered(table)
        found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        found = {name: each for name in TABLES if (each := made if name == table else found.get(name))}
        temporary = RESULTS.with_suffix(".json.part")
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        temporary.replace(RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
