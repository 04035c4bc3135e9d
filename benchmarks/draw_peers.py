"""Draw `docs/peers.png` from `benchmarks/results/peers.json`: peers' points, and tightfit at each of their peaks.

python benchmarks/draw_peers.py     # needs matplotlib
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[1]
KINDS = {
    "torch.utils.checkpoint, by blocks": ("every", "checkpoint_sequential", "transformers"),
    "selective checkpointing": ("selective",),
    "torch_remat": ("torch_remat",),
    "torch's partitioner": ("torch's partitioner",),
}


def main() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "peers.json").read_text(encoding="utf-8"))["rows"]
    shortest = min(row["seq"] for row in rows)
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(4.2 * len(models), 4.0), layout="constrained")
    for axis, model in zip(axes, models, strict=True):
        mine: list[tuple[float, float]] = []
        theirs: list[dict[str, Any]] = [r for r in rows if r["model"] == model and r["seq"] == shortest]
        for (kind, starts), marker in zip(KINDS.items(), "osD^", strict=True):
            points = [
                (r["peer_peak"], 100 * r["peer_extra_flops"])
                for r in theirs
                if "peer_peak" in r and r["peer"].startswith(starts)
            ]
            axis.scatter([x for x, _ in points], [y for _, y in points], marker=marker, s=28, label=kind, alpha=0.8)
        mine = sorted((r["peak"], 100 * r["extra_flops"]) for r in theirs if "peak" in r)
        axis.plot([x for x, _ in mine], [y for _, y in mine], "k.-", label="tightfit at their peaks", zorder=0)
        axis.set_title(f"{model}, 2 x {shortest} tokens", fontsize=10)
        axis.set_xlabel("activation peak / that without checkpointing", fontsize=9)
        axis.set_xlim(0, 1)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("extra FLOPs, % of a step", fontsize=9)
    axes[-1].legend(fontsize=8)
    figure.savefig(ROOT / "docs" / "peers.png", dpi=90)


if __name__ == "__main__":
    main()
