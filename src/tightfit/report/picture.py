"""Timeline and trade-off curve as a PNG, for papers and issues.

Invariant: drawn from a page's data alone. Refused: a page without a study; a missing matplotlib (`Unsupported`).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tightfit.core import InvalidInput, Unsupported, write_bytes

__all__ = ["draw"]


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Write the picture of `document`'s study to `path`."""
    study = document.get("study")
    if not study:
        raise InvalidInput("there is no study in this run, so there is nothing to draw; train again with this tightfit")
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise Unsupported(f"a picture needs the package matplotlib ({error}): pip install 'tightfit[png]'") from None
    points = study["points"]
    shown, base = points[study["chosen"]], next(p for p in points if p["name"] == "none")
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7), layout="constrained")
    at = [m["at"] for m in shown["moments"]]
    rows = [[m["by_category"][i] / 2**20 for m in shown["moments"]] for i in range(len(study["categories"]))]
    used = [i for i, row in enumerate(rows) if any(row)]
    above.stackplot(at, [rows[i] for i in used], labels=[study["categories"][i].replace("_", " ") for i in used])
    above.plot(
        [m["at"] for m in base["moments"]], [sum(m["by_category"]) / 2**20 for m in base["moments"]], "k--", lw=0.8,
        label="without a plan",
    )  # fmt: skip
    above.set_ylabel("live bytes, MiB")
    above.set_xlabel("the step: forward, backward, optimizer")
    above.legend(fontsize=7, ncols=3)
    line = [p for p in points if p["name"] != "every-block"]
    below.plot([p["peak_bytes"] / 2**20 for p in line], [p["slowdown"] for p in line], "o-", ms=3, label="tightfit")
    blocks = [p for p in points if p["name"] == "every-block"]
    below.plot([p["peak_bytes"] / 2**20 for p in blocks], [p["slowdown"] for p in blocks], "s", label="every block")
    real = [m for m in document.get("measured", []) if m.get("slowdown") is not None]
    if real:
        below.plot([m["peak_bytes"] / 2**20 for m in real], [m["slowdown"] for m in real], "^", label="measured")
        for m in real:
            below.annotate(
                m["mode"].replace("-", " "), (m["peak_bytes"] / 2**20, m["slowdown"]), (4, 4),
                textcoords="offset points", fontsize=7,
            )  # fmt: skip
    below.plot([shown["peak_bytes"] / 2**20], [shown["slowdown"]], "o", ms=9, mfc="none", label="this plan")
    below.set_xlabel("peak of the whole step, MiB")
    below.set_ylabel("slowdown")
    below.legend(fontsize=8)
    below.grid(alpha=0.3)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    plt.close(figure)
    write_bytes(path, drawn.getvalue())
