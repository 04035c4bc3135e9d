"""How far apart the errors of a tiled and an untiled step are by chance: the basis of `tightfit.verify.rounding.limit`.

    python benchmarks/rounding.py            # minutes; writes benchmarks/results/rounding.json

Many seeds of four small models, in float32 and bfloat16, each under the kernels of every instruction set that this
processor has (`ATEN_CPU_CAPABILITY`), with one thread and with two. Of every tensor: the logarithm of the ratio of the
two errors, in the deviations that `limit` takes for one. Were the tensors' numbers less independent than it assumes,
the deviation seen would be above one; a false alarm needs 5.6 of them, and `TILE_FACTOR` besides.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

import drawn

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "rounding.json"
INSTRUCTIONS = ("default", "avx2", "avx512")


def observed(seeds: int) -> dict[str, object]:
    """Under the instruction set and threads of this process: per dtype how many tensors, and how far apart."""
    sys.path.insert(0, str(ROOT))
    import torch
    from tests.test_tiles import (
        SCALES,
        TileStats,
        Tiling,
        batch_of,
        beyond,
        gpt2,
        granite,
        head_of,
        in_float64,
        in_force,
        llama,
        steps,
        with_bias,
    )  # fmt: skip

    from tightfit.verify.rounding import _INDEPENDENT

    apart: dict[str, list[float]] = defaultdict(list)
    alarms = 0
    for seed in range(seeds):
        for make in (llama, gpt2, granite, with_bias):
            for dtype in (torch.float32, torch.bfloat16):
                torch.manual_seed(seed)
                model = make().to(dtype).train()
                batch = batch_of() | ({"num_items_in_batch": torch.tensor(57)} if seed % 2 else {})
                untiled = steps(model, batch)
                with in_force(model, Tiling(head=head_of(model, batch), rows=8), TileStats()):
                    tiled = steps(model, batch)
                exact = in_float64(model, batch)
                alarms += len(beyond(untiled, tiled, exact))
                for name, true in exact.items():
                    if name == "loss":
                        continue
                    one, other = (
                        math.sqrt(sum(float((e[name].double() - true * s).norm()) ** 2 for s, e in zip(SCALES, found)))
                        for found in (untiled, tiled)
                    )
                    if one and other:
                        independent = len(SCALES) * _INDEPENDENT * math.sqrt(true.numel()) - 1
                        apart[str(dtype)[6:]].append(math.log(other / one) * math.sqrt(independent))
    return {
        "alarms": alarms,
        "dtypes": {
            dtype: {
                "tensors": len(each),
                "deviation": math.sqrt(sum(x * x for x in each) / len(each)),
                "largest": max(each),
            }
            for dtype, each in apart.items()
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=25)
    parser.add_argument("--here", action="store_true", help="print what this process observes")
    asked = parser.parse_args()
    if asked.here:
        print(json.dumps(observed(asked.seeds)))
        return 0
    rows = []
    for instructions in INSTRUCTIONS:
        for threads in (1, 2):
            done = subprocess.run(
                [sys.executable, __file__, "--here", "--seeds", str(asked.seeds)],
                capture_output=True, text=True, check=False,
                env={**os.environ, "ATEN_CPU_CAPABILITY": instructions, "OMP_NUM_THREADS": str(threads)},
            )  # fmt: skip
            row: dict[str, object] = {"instructions": instructions, "threads": threads}
            row |= json.loads(done.stdout.splitlines()[-1]) if not done.returncode else {"ended": done.returncode}
            rows.append(row)
            print(json.dumps(row), flush=True)
    from tightfit.step.environment import environment

    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment(), "seeds": asked.seeds,
        "rows": rows,
    }  # fmt: skip
    drawn.write(RESULTS, record)
    return int(any(row.get("alarms") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
