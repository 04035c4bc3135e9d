"""The installed wheel, as a user would try it: `make fresh` runs this on an environment that has no constraints.

    python tests/fresh.py .venv-fresh

From an empty folder, by the console script: plans at many budgets, and one JSON document in a pipe. What answers is the
wheel, not the editable install of the checkout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 6, "n_embd": 96, "n_head": 4,
    "n_positions": 64, "vocab_size": 1000, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

PLANS = """
import json, sys
import torch, transformers
import tightfit
from tightfit.integrations.transformers import random_batch
from tightfit.plan import lowest

assert "site-packages" in tightfit.__file__, tightfit.__file__
torch.manual_seed(0)
model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=6, n_embd=96, n_head=4, vocab_size=1000))
trace = tightfit.trace(model, random_batch(model, batch=2, seq=64))
least, most = lowest(trace).peak_bytes, tightfit.simulate(trace, None).peak_bytes
ways = set()
for turn in range(20):
    plan = tightfit.plan(trace, least + (most - least) * turn // 19)
    ways.update(plan.solved_by)
print(f"20 plans, solved by {', '.join(sorted(ways))}, highspy {plan.versions['highspy']}", file=sys.stderr)
"""


def main(environment: str) -> int:
    scripts = Path(environment).absolute() / "bin"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "plans.py").write_text(PLANS)
        clean = {**os.environ, "OMP_NUM_THREADS": "1"}
        clean.pop("PYTHONPATH", None)
        subprocess.run([scripts / "python", "plans.py"], cwd=folder, env=clean, check=True)
        (Path(folder) / "model").mkdir()
        (Path(folder) / "model" / "config.json").write_text(json.dumps(MODEL))
        line = "tightfit plan model --batch 4 --seq 64 --budget 70% --optimizer none --json | python -m json.tool"
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", line], cwd=folder, env={**clean, "PATH": f"{scripts}:{clean['PATH']}"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            print(f"{line}\nexit {done.returncode}\n{done.stdout[:500]}{done.stderr[-2000:]}", file=sys.stderr)
            return 1
        found = json.loads(done.stdout)
        if not found["solved_by"]:
            print(f"{line}\nwas no question for the solver, so this tries nothing", file=sys.stderr)
            return 1
        print(f"1 document: a plan of {found['peak_bytes']:,} bytes, solved by {', '.join(found['solved_by'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
