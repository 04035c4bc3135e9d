"""Three sentences of the usual checkpointing tutorial, measured.

    python benchmarks/switches.py     # a minute; writes benchmarks/results/switches.json; docs/switches.md shows it

1. "`model.get_memory_footprint()` before and after shows the saving": called before and after, beside real peaks.
2. "`model.is_gradient_checkpointing()` tells whether it is on": called as written.
3. "it saves 50 to 70 % of the memory for 20 to 30 % more time": the whole step's peak by the allocator's count, and the
   extra FLOPs as part of a step's, for several shapes; every block checkpointed by torch, as transformers does it.
"""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import drawn
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tightfit
from tightfit.integrations.peft import add_lora
from tightfit.step.environment import environment
from tightfit.verify.measure import measure

RESULTS = Path(__file__).parent / "results" / "switches.json"
SHAPES: dict[str, dict[str, Any]] = {
    "short sequences": {"batch": 2, "seq": 16},
    "long sequences": {"batch": 4, "seq": 256},
    "long sequences, LoRA": {"batch": 4, "seq": 256, "method": "lora"},
    "long sequences, 16,384 words": {"batch": 4, "seq": 256, "vocab_size": 16384},
    "two wide layers": {"batch": 4, "seq": 128, "num_hidden_layers": 2, "hidden_size": 512, "intermediate_size": 1376},
    "twelve narrow layers": {
        "batch": 4, "seq": 256, "num_hidden_layers": 12, "hidden_size": 128, "intermediate_size": 344,
    },
}  # fmt: skip


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4,
        "vocab_size": 1024,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(options | changes))).train()


def tokens(model: Any, batch: int, seq: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, model.config.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def footprint() -> dict[str, Any]:
    """What the call says with nothing on, with transformers' checkpointing, with ours; and what a step really took."""
    rows = []
    for name in ("nothing on", "model.activation_checkpointing_enable()", "tightfit.enable(model)"):
        model = llama()
        batch = tokens(model, 4, 256)
        if name.startswith("model"):
            model.activation_checkpointing_enable()
        elif name.startswith("tightfit"):
            tightfit.enable(model)
        found = tightfit.active(model, batch)
        rows.append({
            "switch": name, "footprint_bytes": model.get_memory_footprint(), "by": found.by, "units": len(found.units),
            "saves_bytes": found.saves_bytes or 0, "basis": found.basis if found else "nothing to measure",
            "model_says": model.is_activation_checkpointing,
        })  # fmt: skip
    return {"rows": rows}


def called_like_a_method() -> dict[str, str]:
    model = llama(num_hidden_layers=1)
    said = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("is_gradient_checkpointing", "is_activation_checkpointing"):
            if not hasattr(model, name):
                continue
            try:
                getattr(model, name)()
                said[name] = "no error"
            except TypeError as error:
                said[name] = f"TypeError: {error}"
    return said


def bargains() -> list[dict[str, Any]]:
    rows = []
    for name, shape in SHAPES.items():
        shape = dict(shape)
        batch, seq, method = shape.pop("batch"), shape.pop("seq"), shape.pop("method", "full")
        model = llama(**shape)
        data = tokens(model, batch, seq)
        if method == "lora":
            model = add_lora(model, rank=8)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
        found = measure(model, data, budget="100%", optimizer=optimizer, repeats=1)
        none, blocks = found.rows[0], found.rows[1]
        rows.append({
            "shape": name, "method": method, "batch": batch, "seq": seq, "peak_bytes": none.peak_bytes,
            "every_block_peak_bytes": blocks.peak_bytes, "saved": 1 - blocks.peak_bytes / none.peak_bytes,
            "extra_flops": blocks.recompute_flops / _step_flops(model, data), "gradients": blocks.gradients,
        })  # fmt: skip
        print(f"{name}: {rows[-1]['saved']:.1%} saved, {rows[-1]['extra_flops']:.1%} more FLOPs", file=sys.stderr)
    return rows


def _step_flops(model: Any, batch: Any) -> int:
    """Forward and backward."""
    return sum(op.flops for op in tightfit.trace(model, batch).ops)


def main() -> int:
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment(), "footprint": footprint(),
        "called_like_a_method": called_like_a_method(), "bargains": bargains(),
    }  # fmt: skip
    for one, other in itertools.pairwise(record["footprint"]["rows"]):  # type: ignore[index]
        assert one["footprint_bytes"] == other["footprint_bytes"], "the sentence would be right after all"
    drawn.write(RESULTS, record)
    print(json.dumps({k: v for k, v in record.items() if k != "environment"}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
