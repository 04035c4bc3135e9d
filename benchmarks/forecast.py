"""The forecast against the CPU allocator's own count, on real steps, total and by phase.

    python benchmarks/forecast.py                 # 72 cases of seed 0; writes benchmarks/results/forecast.json
    python benchmarks/forecast.py --seed 7 --cases 20    # others, printed only
    python benchmarks/forecast.py --part large    # what `check` says of large models, and how long it takes

A case is an architecture (one of them a mixture of experts), a method (full, LoRA, QLoRA), a dtype, a batch and a
length, an optimizer, and a way to run the step: no checkpointing, torch.utils.checkpoint around every block, or a plan
for a random budget. The forecast comes from fake tensors alone: the model that is traced lives on `meta`. The plan
that it gives is then applied to the real model.

The part `large` asks `tightfit check`, each time in a process of its own, about models that are large for the card: by
the default levers with both searches, and without searches by those that its advice names. A row has the answer and
the seconds of the processor that it took.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import time
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
from transformers import AutoConfig, AutoModelForCausalLM

import tightfit
from tightfit.core import Timeline
from tightfit.integrations.bitsandbytes import quantise
from tightfit.integrations.peft import add_lora
from tightfit.step.environment import environment
from tightfit.step.patches import no_key_value_cache
from tightfit.trace.profiler import memory_events
from tightfit.verify.measure import every_block_checkpointed
from tightfit.verify.peak import static_bytes

RESULTS = Path(__file__).parent / "results" / "forecast.json"
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 128, "n_head": 4, "n_layer": 4, "vocab_size": 2048, "n_positions": 512},
    "llama": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "vocab_size": 2048, **ATTENTION},
    "mixtral": {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "vocab_size": 2048,
                "num_local_experts": 4, **ATTENTION},
    "gemma2": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "vocab_size": 4096, "head_dim": 32,
               "sliding_window": 64, **ATTENTION},
    "qwen3": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "vocab_size": 4096, "head_dim": 32,
              **ATTENTION},
    "phi": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "vocab_size": 2048,
            "num_attention_heads": 4},
    "opt": {"hidden_size": 128, "ffn_dim": 344, "num_hidden_layers": 4, "vocab_size": 2048, "num_attention_heads": 4,
            "word_embed_proj_dim": 128, "max_position_embeddings": 512},
    "olmo2": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "vocab_size": 2048, **ATTENTION},
}  # fmt: skip
METHODS = ("full", "lora", "qlora")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODES = ("none", "every-block", "tightfit")
OPTIMIZERS = ("adamw", "adamw-foreach", "adamw-fused", "sgd", "none")
PHASES = ("forward", "backward", "optimizer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    arch: str
    method: str
    dtype: str
    batch: int
    seq: int
    optimizer: str
    mode: str
    share: float  # of the activations, for mode tightfit


def cases(count: int, seed: int) -> list[Case]:
    """`count` cases; architectures and modes take turns, the rest is drawn."""
    draw = random.Random(seed)
    found = []
    for i in range(count):
        arch = list(SHAPES)[i % len(SHAPES)]
        mode = MODES[i // len(SHAPES) % len(MODES)]
        method = draw.choice([m for m in METHODS if m != "qlora" or arch != "gpt2"])
        found.append(
            Case(
                arch=arch, method=method, dtype=draw.choice(list(DTYPES)), batch=draw.choice([1, 2, 3, 4]),
                seq=draw.choice([64, 96, 128, 200, 256, 384]), optimizer=draw.choice(OPTIMIZERS), mode=mode,
                share=draw.choice([0.5, 0.65, 0.8]),
            )
        )  # fmt: skip
    return found


def build(case: Case, device: str) -> Any:
    torch.manual_seed(0)
    with torch.device(device):
        config = AutoConfig.for_model(case.arch, **SHAPES[case.arch])
        model: Any = AutoModelForCausalLM.from_config(config, dtype=DTYPES[case.dtype]).train()
        if case.method == "qlora":
            model = quantise(model, DTYPES[case.dtype])
        if case.method != "full":
            model = add_lora(model, rank=8)
    return model


def optimizer_of(case: Case, model: torch.nn.Module) -> torch.optim.Optimizer | None:
    trained = [p for p in model.parameters() if p.requires_grad]
    if case.optimizer == "none":
        return None
    if case.optimizer == "sgd":
        return torch.optim.SGD(trained, lr=1e-4, momentum=0.9)
    made = torch.optim.AdamW(trained, lr=1e-4)
    for group in made.param_groups:
        group["foreach"] = case.optimizer == "adamw-foreach"
        group["fused"] = True if case.optimizer == "adamw-fused" else None
    return made


def phase_peaks(line: Timeline) -> dict[str, int]:
    found: dict[str, int] = {}
    for label, live in zip(line.labels, line.live_bytes, strict=True):
        phase = label.split()[0]
        phase = "backward" if phase == "replay" else phase
        found[phase] = max(found.get(phase, 0), live)
    return found


def measured(case: Case, model: Any, batch: Any, plan: tightfit.Plan | None) -> dict[str, int]:
    """The allocator's highest count in each phase of the second step."""
    optimizer = optimizer_of(case, model)
    context: Any = contextlib.nullcontext()
    if case.mode == "every-block":
        context = every_block_checkpointed(model)
    elif plan is not None:
        context = tightfit.apply(model, plan)

    def step(mark: Any) -> None:
        with mark("forward"):
            loss = model(**batch).loss
        with mark("backward"):
            loss.backward()
        del loss
        if optimizer is not None:
            with mark("optimizer"):
                optimizer.step()

    with no_key_value_cache(model), context:
        step(lambda _: contextlib.nullcontext())
        for parameter in model.parameters():
            parameter.grad = None
        before = static_bytes(model, optimizer, batch)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            step(lambda phase: torch.profiler.record_function(f"phase::{phase}"))
    results: Any = profiler.profiler
    spans = {
        e.name().removeprefix("phase::"): (e.start_ns(), e.start_ns() + e.duration_ns())
        for e in results.kineto_results.events()
        if e.name().startswith("phase::")
    }
    level, peaks = before, {}
    for at, change in memory_events(profiler):
        level += change
        for phase, (start, end) in spans.items():
            if start <= at <= end:
                peaks[phase] = max(peaks.get(phase, before), level)
    return peaks


def run(case: Case) -> dict[str, Any]:
    ids = torch.randint(0, 2048, (case.batch, case.seq), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    twin = build(case, "meta")
    optimizer = optimizer_of(case, twin)
    plan = None
    if case.mode == "every-block":
        with every_block_checkpointed(twin):  # the step as it is, its recompute included; nothing is planned
            recorded = tightfit.trace(twin, batch, optimizer=optimizer, units=[""], fake=True)
    else:
        recorded = tightfit.trace(twin, batch, optimizer=optimizer, fake=True)
    if case.mode == "tightfit":
        fixed = sum(recorded.static_bytes.values())
        top = tightfit.simulate(recorded).peak_bytes
        try:
            plan = tightfit.plan(recorded, fixed + int(case.share * (top - fixed)))
        except tightfit.BudgetInfeasible as error:
            plan = tightfit.plan(recorded, error.least_bytes)
    line = tightfit.simulate(recorded, plan)
    predicted = phase_peaks(line)
    del twin, recorded
    found = measured(case, build(case, "cpu"), batch, plan)
    phases = {
        phase: {"predicted_bytes": predicted[phase], "measured_bytes": found[phase],
                "error": predicted[phase] / found[phase] - 1}
        for phase in PHASES if phase in found and phase in predicted
    }  # fmt: skip
    peak = max(found.values())
    return {**dataclasses.asdict(case), "predicted_bytes": line.peak_bytes, "measured_bytes": peak,
            "error": line.peak_bytes / peak - 1, "phases": phases,
            "replays": 0 if plan is None else plan.replays}  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    totals = [abs(row["error"]) for row in rows]
    phases = [abs(each["error"]) for row in rows for each in row["phases"].values()]
    return {"cases": len(rows), "mean_error": statistics.fmean(totals), "worst_error": max(totals),
            "phases": len(phases), "mean_phase_error": statistics.fmean(phases),
            "worst_phase_error": max(phases)}  # fmt: skip


def each(count: int, seed: int) -> Iterator[dict[str, Any]]:
    for case in cases(count, seed):
        row = run(case)
        worst = max(row["phases"].items(), key=lambda item: abs(item[1]["error"]))
        print(f"{row['error']:+.4%} {worst[0]} {worst[1]['error']:+.4%} {dataclasses.astuple(case)}", flush=True)
        yield row


#: What is asked of `tightfit check`, by a name of its own: the model, and options.
LARGE = {
    "7B full on 24 GB": ("llama-2-7b", "--method", "full", "--gpu", "24GiB"),
    "8B QLoRA on 8 GB": ("llama-3-8b", "--method", "qlora", "--gpu", "8GiB"),
    "32B QLoRA on 12 GB": ("qwen2.5-32b", "--method", "qlora", "--gpu", "12GiB"),
    "70B QLoRA on 24 GB": ("llama-2-70b", "--method", "qlora", "--gpu", "24GiB"),
}
#: So many seconds of the processor an answer may take.
WITHIN_SECONDS = 60


def asked(*arguments: str) -> dict[str, Any]:
    """The answer of `tightfit check`, and the seconds that it took."""
    began, before = time.perf_counter(), os.times()
    command = [sys.executable, "-m", "tightfit.cli", "check", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = os.times()
    assert done.returncode in (0, 1), done.stderr
    answer = json.loads(done.stdout)
    mode = next(each for each in answer["modes"] if each["mode"] == "tightfit")
    return {
        "command": " ".join(["tightfit check", *arguments]),
        "cpu_seconds": after.children_user + after.children_system - before.children_user - before.children_system,
        "wall_seconds": time.perf_counter() - began,
        "fits": answer["fits"],
        "peak_bytes": mode["peak_bytes"], "room_bytes": answer["usable_bytes"], "host_bytes": answer["host_bytes"],
        "levers": answer["essence"], "tokens_per_second": mode["tokens_per_second"] if answer["fits"] else None,
        "largest_batch": answer["largest_batch"], "longest_seq": answer["longest_seq"], "advice": answer["advice"],
    }  # fmt: skip


def large() -> Iterator[dict[str, Any]]:
    for name, question in LARGE.items():
        row = asked(*question)
        yield {"case": name, "levers_asked": "", **row}
        for levers in [said.split()[1] for said in row["advice"] if said.startswith("--levers ")]:
            yield {"case": name, "levers_asked": levers, **asked(*question, "--levers", levers, "--no-search")}


def write(part: str, **drawn_now: Any) -> None:
    """Write what was drawn now, and leave the rest of the file as it was."""
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    drawn.write(RESULTS, {**before, **drawn_now}, parts=[part])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=72)
    parser.add_argument("--part", choices=("cases", "large"), default=None, help="one of the two; by default both")
    given = parser.parse_args()
    if given.part != "cases" and given.seed == 0:
        answers = []
        for answer in large():
            answers.append(answer)
            print(json.dumps(answer), flush=True)
            write("large", large={
                "date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment(),
                "within_seconds": WITHIN_SECONDS, "rows": answers,
            })  # fmt: skip
        if given.part == "large":
            return 0
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    rows = list(each(given.cases, given.seed))
    found = summary(rows)
    print(json.dumps(found))
    if given.seed == 0 and given.cases >= 60:
        write("cases", date=datetime.now(UTC).isoformat(timespec="seconds"), environment=environment(),
              seed=given.seed, summary=found, rows=rows)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
