"""Whether the seconds that plans are priced with are those that a step takes, and what other processes do to them.

    python benchmarks/seconds.py [busy|predicted ...]   # some 25 minutes; writes benchmarks/results/seconds.json

- `busy`: ten steps are recorded and planned in quiet, and again with two endless loops beside them, at the same budget
  in the middle between the lowest peak and the step's own. What the plans recompute is compared in FLOPs, which no
  clock has a part in.
- `predicted`: what a step takes without a plan, with every block recomputed and with plans at three budgets, predicted
  from one recording and measured in turns (medians). Run it on a machine that does nothing else.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import drawn

os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import optimum
import torch
import transformers
from torch import nn

import tightfit
from tightfit.core import Plan, Trace
from tightfit.device.cost import unplanned_seconds
from tightfit.integrations.peft import add_lora
from tightfit.plan import every_block, lowest, simulate
from tightfit.step.environment import environment
from tightfit.step.patches import no_key_value_cache
from tightfit.step.run import compute_loss
from tightfit.step.snapshot import undisturbed

RESULTS = Path(__file__).parent / "results" / "seconds.json"
BUSY_LOOPS = 2
#: It ends with whoever started it.
_LOOP = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
REPEATS = 7
SHARES = (0.25, 0.5, 0.75)  # of the way from the lowest peak to the step's own


def gpt2(layers: int) -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=768, n_layer=layers, n_head=12, vocab_size=8192, bos_token_id=1, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8
    )
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, vocab_size=4096)
    return transformers.BertForMaskedLM(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def vit() -> tuple[nn.Module, Any]:
    config = transformers.ViTConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536, image_size=96, patch_size=8
    )
    model = transformers.ViTForImageClassification(config).train()
    return model, {"pixel_values": torch.randn(8, 3, 96, 96), "labels": torch.zeros(8, dtype=torch.long)}


def words(model: nn.Module, rows: int, length: int) -> tuple[nn.Module, Any]:
    ids = torch.randint(0, 4096, (rows, length))
    return model.train(), {"input_ids": ids, "labels": ids}


STEPS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "gpt2, 12 layers, 2 x 128": lambda: words(gpt2(12), 2, 128),
    "gpt2, 4 layers, 4 x 256": lambda: words(gpt2(4), 4, 256),
    "llama, 2 x 256": lambda: words(llama(), 2, 256),
    "llama, LoRA, 2 x 256": lambda: words(add_lora(llama(), rank=8), 2, 256),
    "bert, 4 x 128": lambda: words(bert(), 4, 128),
    "mixture of experts, 2 x 128": lambda: words(mixtral(), 2, 128),
    "vit, 8 x 3 x 96 x 96": vit,
    "resnet, 64 x 3 x 64 x 64": lambda: (optimum.Mean(optimum.ResNet()), torch.randn(64, 3, 64, 64)),
    "unet, 32 x 3 x 64 x 64": lambda: (optimum.Mean(optimum.UNet()), torch.randn(32, 3, 64, 64)),
    "perceptron, 8192 x 128": lambda: (optimum.Mean(optimum.Perceptron()), torch.randn(8192, 128)),
}


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Two processes inside that do nothing, without end."""
    loops = [subprocess.Popen([sys.executable, "-c", _LOOP]) for _ in range(BUSY_LOOPS)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def step(model: nn.Module, batch: Any) -> None:
    compute_loss(model, batch, None).backward()
    model.zero_grad()


def warm(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model, batch = STEPS[name]()
    with no_key_value_cache(model):
        for _ in range(2):
            step(model, batch)
    return model, batch


def between(recorded: Trace, share: float) -> int:
    least_bytes, own_bytes = lowest(recorded).peak_bytes, simulate(recorded).peak_bytes
    return least_bytes + int(share * (own_bytes - least_bytes))


def beside_loops(name: str) -> dict[str, Any]:
    model, batch = warm(name)
    quiet = tightfit.trace(model, batch)
    budget_bytes = between(quiet, 0.5)
    plan = tightfit.plan(quiet, budget_bytes)
    found = []
    with busy():
        for _ in range(3):
            found.append(tightfit.plan(tightfit.trace(model, batch), budget_bytes).recompute_flops)
    seconds = sum(op.seconds for op in quiet.ops)
    return {
        "step": name, "predicted_seconds": round(seconds, 4), "recompute_flops": plan.recompute_flops,
        "beside_loops": found, "forward_flops": plan.forward_flops,
        "ratio": round(statistics.median(found) / plan.recompute_flops, 4) if plan.recompute_flops else None,
        "worst_ratio": round(max(found) / plan.recompute_flops, 4) if plan.recompute_flops else None,
    }  # fmt: skip


def against_measured(name: str) -> dict[str, Any]:
    model, batch = warm(name)
    recorded = tightfit.trace(model, batch)
    plans: dict[str, Plan | None] = {"none": None, "every block": every_block(recorded)}
    for share in SHARES:
        plans[f"plan at {share:.0%}"] = tightfit.plan(recorded, between(recorded, share))
    own_seconds = unplanned_seconds(recorded, simulate(recorded).peak_bytes)
    predicted = {key: own_seconds if plan is None else plan.step_seconds for key, plan in plans.items()}
    measured = _in_turns(model, batch, plans)
    return {
        "step": name,
        "modes": {
            key: {
                "predicted_seconds": round(predicted[key], 4), "measured_seconds": round(measured[key], 4),
                "predicted_of_measured": round(predicted[key] / measured[key], 4),
                "slowdown_predicted": round(predicted[key] / predicted["none"], 4),
                "slowdown_measured": round(measured[key] / measured["none"], 4),
            }
            for key in plans
        },
    }  # fmt: skip


def _in_turns(model: nn.Module, batch: Any, plans: dict[str, Plan | None]) -> dict[str, float]:
    """Median seconds of a step under each plan; they take turns."""
    found: dict[str, list[float]] = {key: [] for key in plans}
    with undisturbed(model, batch) as restart, no_key_value_cache(model):
        for repeat in range(REPEATS + 1):
            for key, plan in plans.items():
                restart()
                with contextlib.nullcontext() if plan is None else tightfit.apply(model, plan):
                    step(model, batch)  # what the allocator has from the turn before is not this turn's
                    started = time.perf_counter()
                    step(model, batch)
                    if repeat:
                        found[key].append(time.perf_counter() - started)
    return {key: statistics.median(seconds) for key, seconds in found.items()}


PARTS: dict[str, Callable[[str], dict[str, Any]]] = {"busy": beside_loops, "predicted": against_measured}


def main() -> int:
    transformers.logging.set_verbosity_error()
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in sys.argv[1:] or PARTS:
        rows = []
        for name in STEPS:
            rows.append(PARTS[part](name))
            print(json.dumps(rows[-1]), flush=True)
            gc.collect()
        record[part] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment(),
                        "rows": rows}  # fmt: skip
        drawn.write(RESULTS, record, parts=[part])
    return 0


if __name__ == "__main__":
    sys.exit(main())
