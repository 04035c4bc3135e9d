"""How long planning takes, how it grows with the step, and how near to its bound a plan comes.

    python benchmarks/planning.py               # half an hour; writes benchmarks/results/planning.json
    python benchmarks/planning.py --only 7B     # one part, the others as they were

`rows`: fake traces (no weights, no memory) of Llama shapes with LoRA r=16 on all linear layers, batch 1 x 2,048, bf16;
then a plan at ten budgets from the lowest peak up. The gap is what a plan may be from the best at most, as a part of
the step's proven seconds.

`curve`: the same of more and more blocks, of blocks that all differ, and of one forward without any. The first plan of
a trace is made with nothing known of it. It is followed by the lowest peak and by plans at other budgets.

`fit`: `tightfit.fit` of real models of about a hundred million parameters, and steps of theirs in between.

All seconds are of the processor, so that other work beside it counts less.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import drawn
import torch
import transformers
from torch import nn

import tightfit
from tightfit.integrations.peft import add_lora
from tightfit.plan import effects, lowest, nest, program, table, ways

RESULTS = Path(__file__).parent / "results" / "planning.json"
SHAPES = {
    "7B, 32 blocks": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                      "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "70B, 80 blocks": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                       "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000},
}  # fmt: skip
OF_405B = {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "num_key_value_heads": 8,
           "vocab_size": 128256}  # fmt: skip
STEPS = 10  # budgets: the lowest peak, and so many tenths of the way from there to the peak without a plan


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Different(nn.Module):
    """Each block has a width of its own, so nothing that is worked out for one serves another."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(256, 256 + 8 * place) for place in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


class Flat(nn.Module):
    """One forward of so many ops, without any module."""

    def __init__(self, ops: int) -> None:
        super().__init__()
        self.turns, self.weight = ops // 4, nn.Parameter(torch.zeros(256, 256))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.turns):
            x = x + torch.tanh(nn.functional.layer_norm(x @ self.weight, (256,)))
        return x.square().mean()


def llama(**shape: int) -> tuple[nn.Module, Any]:
    with torch.device("meta"):
        config: Any = transformers.LlamaConfig(**shape, max_position_embeddings=4096, dtype=torch.bfloat16)
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model = add_lora(model, rank=16).train()
        ids = torch.zeros(1, 2048, dtype=torch.long)
    return model, {"input_ids": ids, "labels": ids}


def plain(kind: type[nn.Module], size: int) -> tuple[nn.Module, Any]:
    with torch.device("meta"):
        return kind(size), torch.zeros(1024, 256)


#: The growth of each kind of step, and the largest that was asked about.
CURVE: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    **{
        f"7B's block, {count} times": functools.partial(
            llama, **(SHAPES["7B, 32 blocks"] | {"num_hidden_layers": count})
        )
        for count in (8, 16, 32, 64, 126)
    },
    "405B, 126 blocks": functools.partial(llama, **OF_405B, num_hidden_layers=126),
    **{f"{count} different blocks": functools.partial(plain, Different, count) for count in (50, 100, 200)},
    **{f"{count:,} ops without blocks": functools.partial(plain, Flat, count) for count in (500, 1000, 2000)},
}


def words(model: Any, rows: int, length: int) -> tuple[nn.Module, Any]:
    ids = torch.randint(0, model.config.vocab_size, (rows, length))
    return model.train(), {"input_ids": ids, "labels": ids}


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config())


def small_llama() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4,
        vocab_size=32000,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


#: Real models: what they are made of, and the budget.
FITS: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], str]] = {
    "GPT-2 of 124 million, 4 x 256": (
        lambda: words(gpt2(), 4, 256),
        "75%",
    ),
    "GPT-2 of 124 million, 1 x 64": (
        lambda: words(gpt2(), 1, 64),
        "95%",
    ),
    "Llama of 125 million, 4 x 256": (lambda: words(small_llama(), 4, 256), "85%"),
}


def forget() -> None:
    """What the planner knows of programs and traces that it has seen."""
    for module in (program, table, nest, effects):
        for each in vars(module).values():
            if hasattr(each, "cache_clear"):
                each.cache_clear()
    ways._latest.clear()


def spent(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` returns, and the seconds of the processor that it takes."""
    started = time.process_time()
    found = work()
    return found, time.process_time() - started


def curve_of(name: str) -> dict[str, Any]:
    model, batch = CURVE[name]()
    trace, trace_seconds = spent(lambda: tightfit.trace(model, batch, fake=True))
    forget()
    unplanned, fixed = tightfit.simulate(trace).peak_bytes, sum(trace.static_bytes.values())
    _, first_seconds = spent(lambda: tightfit.plan(trace, (unplanned + fixed) // 2))
    low, lowest_seconds = spent(lambda: lowest(trace))
    more = []
    for tenths in (1, 3, 5, 7):
        budget = low.peak_bytes + tenths * (unplanned - low.peak_bytes) // 10
        more.append(spent(functools.partial(tightfit.plan, trace, budget))[1])
    return {
        "step": name,
        "units": len(trace.units),
        "ops": len(trace.ops),
        "trace_seconds": round(trace_seconds, 1),
        "first_plan_seconds": round(first_seconds, 2),
        "plan_seconds": [round(each, 2) for each in more],
        "lowest_seconds": round(lowest_seconds, 1),
    }


def fit_of(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    make, budget = FITS[name]
    model: Any
    model, batch = make()

    def step() -> None:
        model(**batch).loss.backward()
        model.zero_grad()

    step()  # what is set up once is no part of a step
    steps, fits = [spent(step)[1]], []
    for _ in range(2):
        forget()
        applied, seconds = spent(lambda: tightfit.fit(model, batch, budget=budget))
        fits.append(seconds)
        applied.remove()
        steps.append(spent(step)[1])
    return {
        "model": name,
        "budget": budget,
        "step_seconds": round(statistics.median(steps), 2),
        "fit_seconds": round(statistics.median(fits), 1),
        "fit_in_steps": round(statistics.median(fits) / statistics.median(steps), 1),
    }


def rows_of(name: str) -> Iterator[dict[str, Any]]:
    model, batch = llama(**SHAPES[name])
    trace, trace_seconds = spent(lambda: tightfit.trace(model, batch, fake=True))
    started = time.process_time()
    low = lowest(trace)
    lowest_seconds = time.process_time() - started
    unplanned = tightfit.simulate(trace).peak_bytes
    fixed = sum(trace.static_bytes.values())
    step_seconds = sum(op.seconds for op in trace.ops)
    for step in range(STEPS):
        budget = low.peak_bytes + step * (unplanned - low.peak_bytes) // STEPS
        started = time.process_time()
        plan = tightfit.plan(trace, budget)
        yield {
            "model": name,
            "activation_share": round((budget - fixed) / (unplanned - fixed), 4),
            "trace_seconds": round(trace_seconds, 1),
            "lowest_seconds": round(lowest_seconds, 1),
            "recompute_flops_share": round(plan.recompute_flops / max(1, plan.forward_flops), 4),
            "status": plan.status.value,
            "is_nested": bool(plan.advances),
            "gap_of_step": round(
                (plan.recompute_seconds - plan.bound_seconds) / (step_seconds + plan.bound_seconds), 5
            ),
            "plan_seconds": round(time.process_time() - started, 2),
        }


def main() -> int:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    everything = {each: each for each in (*CURVE, *FITS)} | {name.partition(",")[0]: name for name in SHAPES}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=everything, help="these parts alone")
    asked = parser.parse_args()
    names = [name for each, name in everything.items() if asked.only is None or each in asked.only]
    small, ids = plain(Different, 2)
    tightfit.trace(small, ids, fake=True)  # what is imported once is no part of a trace
    tightfit.trace(*llama(**SHAPES["7B, 32 blocks"] | {"num_hidden_layers": 1}), fake=True)
    for name in names:
        shapes = [name] if name in SHAPES else []
        record = drawn.record_of_rows(
            RESULTS, rows_of, shapes, order=list(SHAPES), key="model", then="activation_share"
        )
        before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        for part, key, order, found in (("curve", "step", CURVE, curve_of), ("fit", "model", FITS, fit_of)):
            rows = {row[key]: row for row in before.get(part, ())}
            if name in order:
                rows[name] = found(name)
                print(json.dumps(rows[name]), flush=True)
            record[part] = [rows[each] for each in order if each in rows]
        drawn.write(RESULTS, record, parts=[name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
