"""Draw `docs/forecast.png` and `docs/scaling.png` from the results of `forecast.py` and `scaling.py`.

python benchmarks/draw_forecast.py     # needs matplotlib
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
MODES = (("none", "o"), ("every-block", "s"), ("tightfit", "^"))
WAYS = (("none", "k"), ("every-block", "tab:blue"), ("tightfit at 50%", "tab:orange"), ("tightfit at 25%", "tab:green"))


def read(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def draw_forecast() -> None:
    """Predicted against measured peaks, and the errors by phase."""
    found = read("forecast")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.0), layout="constrained")
    for mode, marker in MODES:
        rows = [row for row in found["rows"] if row["mode"] == mode]
        left.scatter(
            [row["measured_bytes"] / 2**20 for row in rows], [row["predicted_bytes"] / 2**20 for row in rows],
            marker=marker, s=26, alpha=0.8, label=mode,
        )  # fmt: skip
    ends = left.get_xlim()
    left.plot(ends, ends, "k-", lw=0.6, zorder=0)
    left.set_xlabel("measured peak, MiB (the CPU allocator's count)", fontsize=9)
    left.set_ylabel("forecast peak, MiB", fontsize=9)
    left.legend(fontsize=8)
    for at, phase in enumerate(("forward", "backward", "optimizer")):
        errors = [100 * row["phases"][phase]["error"] for row in found["rows"] if phase in row["phases"]]
        right.scatter([at] * len(errors), errors, s=14, alpha=0.5)
    right.set_xticks(range(3), ["forward", "backward", "optimizer"])
    right.axhspan(-0.05, 0.05, color="tab:green", alpha=0.08)
    right.set_ylim(-0.06, 0.06)
    right.set_ylabel("error of the phase's peak, %", fontsize=9)
    right.set_title("shaded: the bar of 0.05 %", fontsize=9)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(ROOT / "docs" / "forecast.png", dpi=90)


def draw_scaling() -> None:
    rows = read("scaling")["rows"]
    figure, (above, below) = plt.subplots(1, 2, figsize=(11.0, 4.0), layout="constrained")
    names = [row["model"] for row in rows]
    for i, (way, colour) in enumerate(WAYS):
        places = [at + (i - 1.5) * 0.2 for at in range(len(rows))]
        peaks = [row["modes"][way].get("activation_peak_bytes", 0) / 2**30 for row in rows]
        costs = [100 * (row["modes"][way].get("slowdown_estimated", 1.0) - 1) for row in rows]
        above.bar(places, peaks, 0.2, color=colour, label=way)
        below.bar(places, costs, 0.2, color=colour)
    above.set_yscale("log")
    above.set_ylabel("activation peak, GiB (gradients included)", fontsize=9)
    below.set_ylabel("estimated slowdown, %", fontsize=9)
    for axis in (above, below):
        axis.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
        axis.grid(alpha=0.3, axis="y")
    above.legend(fontsize=8)
    figure.savefig(ROOT / "docs" / "scaling.png", dpi=90)


if __name__ == "__main__":
    draw_forecast()
    draw_scaling()
