"""Is the largest micro-batch that is found the largest by trial? Ten models, three budgets each.

    python benchmarks/micro_batches.py [MODEL ...]     # some minutes; writes benchmarks/results/micro_batches.json

Found: `tightfit.plan.micro_batches.largest_fitting` among the sizes 1 to 5, which plans as many sizes as it needs. By
trial: each of the five sizes is really run under the plan of its lowest peak, and the allocator's count of the whole
step is held against the budget; nothing that was predicted decides. Gradients are in place, as every micro-batch but
the first finds them. The size that is found is run once more under its plan for the budget itself; if it holds the
budget there, it fits by trial too. With names, only those models are run, and the rest of the file stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import drawn

os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import nn

import tightfit
from tightfit.core import MicroBatch, Plan
from tightfit.fitting.micro_batches import exactly, gradients_in_place
from tightfit.integrations.peft import add_lora
from tightfit.plan import Effort, lowest
from tightfit.plan.micro_batches import attempted, largest_fitting
from tightfit.step.environment import environment
from tightfit.step.rows import rows_taken
from tightfit.verify.peak import measured_peak_bytes

RESULTS = Path(__file__).parent / "results" / "micro_batches.json"
ROWS, SEQ, WORDS = 5, 64, 500
#: How far the budget lies between the least peaks of one row and of all, as they were measured.
BUDGETS = (0.2, 0.5, 0.8)
EFFORT = Effort(points=12, solver_seconds=0.3, proves=False)


def _causal(config: Any) -> nn.Module:
    made: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return made.train()


def _decoder(kind: str, **more: Any) -> Any:
    sizes = {
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": WORDS, "max_position_embeddings": 256, "bos_token_id": 0,
        "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    return getattr(transformers, kind)(**(sizes | more))


class _Convolutions(nn.Module):
    """Images through convolutions with group norms, which know nothing of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3 if i == 0 else 16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU())
            for i in range(4)
        )
        self.head = nn.Linear(16, 10)

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            pixels = block(pixels)
        return nn.functional.cross_entropy(self.head(pixels.mean((2, 3))), labels)


def _tokens() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, WORDS, (ROWS, SEQ))
    return {"input_ids": ids, "labels": ids.clone()}


def _models() -> dict[str, Any]:
    gpt2 = transformers.GPT2Config(
        n_layer=2, n_embd=64, n_head=4, vocab_size=WORDS, n_positions=256, bos_token_id=0, eos_token_id=0
    )
    t5 = transformers.T5Config(
        d_model=64, d_kv=16, d_ff=160, num_layers=2, num_decoder_layers=2, num_heads=4, vocab_size=WORDS,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    bert = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=160, vocab_size=WORDS,
        max_position_embeddings=256,
    )  # fmt: skip
    vit = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=160, image_size=32, patch_size=4
    )
    images = {"pixel_values": torch.randn(ROWS, 3, 32, 32), "labels": torch.randint(0, 2, (ROWS,))}
    drawn_images = (torch.randn(ROWS, 3, 24, 24), torch.randint(0, 10, (ROWS,)))
    return {
        "gpt2": lambda: (_causal(gpt2), _tokens()),
        "llama": lambda: (_causal(_decoder("LlamaConfig")), _tokens()),
        "llama, lora": lambda: (add_lora(_causal(_decoder("LlamaConfig")), rank=4), _tokens()),
        "llama, bf16": lambda: (_causal(_decoder("LlamaConfig")).bfloat16(), _tokens()),
        "qwen2": lambda: (_causal(_decoder("Qwen2Config")), _tokens()),
        "mixtral": lambda: (_causal(_decoder("MixtralConfig", num_local_experts=4)), _tokens()),
        "bert": lambda: (transformers.BertForMaskedLM(bert).train(), _tokens()),
        "t5": lambda: (transformers.T5ForConditionalGeneration(t5).train(), _tokens()),
        "vit": lambda: (transformers.ViTForImageClassification(vit).train(), images),
        "convolutions": lambda: (_Convolutions().train(), drawn_images),
    }


def row(name: str, make: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    model, batch = make()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    traces, measured = {}, {}

    def run(size: int, plan: Plan) -> int:
        with gradients_in_place(model, size < ROWS):
            part = rows_taken(batch, slice(0, size))
            return measured_peak_bytes(model, part, _in_force(model, plan, optimizer), optimizer=optimizer)

    for size in range(1, ROWS + 1):
        with gradients_in_place(model, size < ROWS):
            traces[size] = tightfit.trace(model, rows_taken(batch, slice(0, size)), optimizer=optimizer, tiles=False)
        least = lowest(traces[size], effort=EFFORT)
        measured[size] = run(size, least)
    answers = []
    for place in BUDGETS:
        budget_bytes = measured[1] + int(place * (measured[ROWS] - measured[1]))
        plans: dict[int, Any] = {}

        def attempt(size: int, budget_bytes: int = budget_bytes, plans: dict[int, Any] = plans) -> MicroBatch:
            _, plans[size], _ = exactly(traces[size], budget_bytes, None, frozenset())
            return attempted(size, ROWS, traces[size], plans[size], None)

        found = largest_fitting(tuple(range(1, ROWS + 1)), attempt, budget_bytes, {}) or 0
        held = run(found, plans[found]) if found else None
        by_trial = max((size for size, peak in measured.items() if peak <= budget_bytes), default=0)
        if held is not None and held <= budget_bytes:  # it ran, so it fits, though the plan of the least peak did not
            by_trial = max(by_trial, found)
        answers.append(
            {
                "between_least_peaks": place,
                "budget_bytes": budget_bytes,
                "found": found,
                "by_trial": by_trial,
                "sizes_planned": len(plans),
                "predicted_peak_bytes": plans[found].peak_bytes if found else None,
                "measured_peak_bytes": held,
            }
        )
    return {"model": name, "least_measured_bytes": measured, "answers": answers}


@contextlib.contextmanager
def _in_force(model: nn.Module, plan: Plan, optimizer: Any) -> Iterator[None]:
    with tightfit.apply(model, plan, optimizer=optimizer):
        yield


def main() -> int:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = []
    named = sys.argv[1:]
    before = {one["model"]: one for one in json.loads(RESULTS.read_text())["rows"]} if named else {}
    for name, make in _models().items():
        rows.append(before[name] if named and name not in named else row(name, make))
        print(
            [(each["between_least_peaks"], each["found"], each["by_trial"]) for each in rows[-1]["answers"]],
            name,
            flush=True,
        )
    answers = [each for one in rows for each in one["answers"]]
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment(),
        "sizes": f"1 to {ROWS}", "rows": rows, "answers": len(answers),
        "found_is_largest_by_trial": sum(each["found"] == each["by_trial"] for each in answers),
        "over_budget": sum((each["measured_peak_bytes"] or 0) > each["budget_bytes"] for each in answers),
    }  # fmt: skip
    drawn.write(RESULTS, record)
    return 0 if record["found_is_largest_by_trial"] == len(answers) else 1


if __name__ == "__main__":
    sys.exit(main())
