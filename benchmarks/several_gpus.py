"""DDP and FSDP2: what ranks measure against the forecast and against accelerate, and tables for many GPUs.

    python benchmarks/several_gpus.py [measured|scale ...]     # some 15 minutes; writes results/several_gpus.json

- `measured`: 2 and 4 processes on gloo. Peak per rank (the allocator's own count, the lowest of several steps: gloo's
  threads hold a buffer a little longer now and then) and seconds of a step, side by side in one process: no
  checkpointing, accelerate's FSDP2 activation checkpointing (its own function), `torch.utils.checkpoint` around every
  block, and the plan for accelerate's peak. Beside them the forecast by fake collectives, made without any other rank.
- `scale`: one step of 1 x 4,096 tokens a rank, bf16, full fine-tuning with AdamW on H100s, forecast: what fits, with
  how much recompute, and what it sends. Seconds of communication are bytes over an assumed link: 450 GB/s inside a
  node of eight (NVLink 4, one direction), 50 GB/s a GPU between nodes (400 Gb/s).
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import drawn

os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist

import tightfit
from tightfit.catalog import gpu
from tightfit.core import Category
from tightfit.forecast import Setup, trace_for, usable_bytes
from tightfit.forecast.recording import sent_bytes
from tightfit.integrations.fsdp import sharded
from tightfit.integrations.peft import add_lora
from tightfit.plan import Effort, every_block, plan, simulate
from tightfit.step.environment import environment
from tightfit.step.parallel import local_of
from tightfit.verify.measure import every_block_checkpointed
from tightfit.verify.peak import PeakMeter, static_bytes

RESULTS = Path(__file__).parent / "results" / "several_gpus.json"
REPEATS = 7
PEAK_STEPS = 24
TOKENS, BATCH = 256, 2
CASES = ("fsdp2 full", "fsdp2 lora", "ddp full")

# ------------------------------------------------------------------------------------------------ measured


def llama(method: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=2048, attention_dropout=0.1, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    return model if method == "full" else add_lora(model, rank=8, dropout=0.1)


def spread(case: str, prepare: Callable[[Any], Any] = lambda model: model) -> Any:
    strategy, method = case.split()
    model = prepare(llama(method))
    if strategy == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if type(module).__name__ == "LlamaDecoderLayer":
            fully_shard(module)
    return fully_shard(model)


def checkpointed_by_accelerate(model: Any) -> Any:
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_apply_ac

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
    )
    plugin.set_auto_wrap_policy(model)
    return fsdp2_apply_ac(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), model)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 2048, (BATCH, TOKENS), generator=torch.Generator().manual_seed(dist.get_rank()))
    return {"input_ids": ids, "labels": ids}


def step(model: Any, given: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    torch.manual_seed(11 + dist.get_rank())
    model(**given).loss.backward()


def gradients(model: Any) -> list[torch.Tensor]:
    return [local_of(p.grad).clone() for p in model.parameters() if p.grad is not None]


def rank_main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {case: measured_case(case) for case in CASES}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measured_case(case: str) -> list[dict[str, Any]]:
    given = batch()
    plain = spread(case)
    wrapped = spread(case, checkpointed_by_accelerate)
    modes: dict[str, tuple[Any, Callable[[], AbstractContextManager[Any]]]] = {
        "no checkpointing": (plain, nullcontext),
        "accelerate's checkpointing": (wrapped, nullcontext),
        "torch.utils.checkpoint": (plain, lambda: every_block_checkpointed(plain)),
    }
    rows: dict[str, dict[str, Any]] = {name: {"mode": name, "peaks": [], "seconds": []} for name in modes}
    for model in (plain, wrapped):
        for _ in range(2):  # DDP lays out its buckets anew after its first step, and sums in another order from then on
            step(model, given)
    for name, (model, context) in modes.items():
        with context():
            step(model, given)
            rows[name]["gradients"] = gradients(model)
            rows[name]["peak_bytes"] = peak(model, given)
    budget = torch.tensor(rows["accelerate's checkpointing"]["peak_bytes"])
    dist.all_reduce(budget, op=dist.ReduceOp.MAX)
    for parameter in plain.parameters():
        parameter.grad = None
    applied = tightfit.fit(plain, given, int(budget))
    applied.suspend()

    def planned() -> AbstractContextManager[Any]:
        stack = ExitStack()
        applied.resume(applied.plan, applied.trace)
        stack.callback(applied.suspend)
        return stack

    name = "tightfit at accelerate's peak"
    modes[name] = (plain, planned)
    rows[name] = {"mode": name, "seconds": [], "predicted_bytes": applied.plan.peak_bytes}
    with planned():
        step(plain, given)
        rows[name]["gradients"] = gradients(plain)
        rows[name]["peak_bytes"] = peak(plain, given)
    for _ in range(REPEATS):
        for name, (model, context) in modes.items():
            with context():
                dist.barrier()
                started = time.perf_counter()
                step(model, given)
                dist.barrier()
                rows[name]["seconds"].append(time.perf_counter() - started)
    reference = rows["no checkpointing"]["gradients"]
    base = statistics.median(rows["no checkpointing"]["seconds"])
    flops = applied.plan.recompute_flops / applied.plan.forward_flops
    return [
        {
            "mode": name, "peak_bytes": row["peak_bytes"], "predicted_bytes": row.get("predicted_bytes"),
            "step_ratio": round(statistics.median(row["seconds"]) / base, 3),
            "gradient_error": error(reference, row["gradients"]),
            "recompute_of_forward": round(flops, 4) if "predicted_bytes" in row else None,
        }
        for name, row in rows.items()
    ]  # fmt: skip


def error(reference: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Largest relative error of a gradient in the norm; 0: bit for bit."""
    if all(torch.equal(a, b) for a, b in zip(reference, found, strict=True)):
        return 0.0
    return max(
        float((a - b).double().norm() / a.double().norm().clamp_min(1e-30))
        for a, b in zip(reference, found, strict=True)
    )


def peak(model: Any, given: Any) -> int:
    found = []
    for _ in range(PEAK_STEPS):
        for parameter in model.parameters():
            parameter.grad = None
        before = static_bytes(model, None, given)
        with PeakMeter("cpu") as meter:
            step(model, given)
        found.append(before + meter.rise_bytes)
    return min(found)


def forecast_bytes(case: str, world: int, made_for: int) -> dict[str, int]:
    """The same steps without any other process."""
    strategy, method = case.split()
    with torch.device("meta"):
        model = llama(method)
    ids = torch.zeros(BATCH, TOKENS, dtype=torch.long)
    given = {"input_ids": ids, "labels": ids}
    with sharded(model, world) if strategy == "fsdp2" else nullcontext(model) as twin:
        recorded = tightfit.trace(twin, given, fake=True)
    if strategy == "ddp":
        buckets = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        static = {**recorded.static_bytes, Category.COLLECTIVES.value: buckets}
        recorded = dataclasses.replace(recorded, static_bytes=static)
    return {
        "no checkpointing": simulate(recorded).peak_bytes,
        "tightfit at accelerate's peak": plan(recorded, made_for).peak_bytes,
    }


def measured() -> list[dict[str, Any]]:
    found = []
    for world in (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [
                    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world),
                    __file__, "--rank", folder,
                ],
                check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            ranks = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]
        for case in CASES:
            for place, row in enumerate(ranks[0][case]):
                of_all = [rank[case][place] for rank in ranks]
                found.append(
                    {
                        "world": world, "case": case, **row,
                        "peak_bytes": [each["peak_bytes"] for each in of_all],
                        "gradient_error": max(each["gradient_error"] for each in of_all),
                        "step_ratio": statistics.median(each["step_ratio"] for each in of_all),
                    }
                )  # fmt: skip
            made_for = max(next(r for r in found if r["world"] == world and r["case"] == case
                                and r["mode"].startswith("accelerate"))["peak_bytes"])  # fmt: skip
            forecast = forecast_bytes(case, world, made_for)
            for row in found:
                if (row["world"], row["case"]) == (world, case):
                    row["forecast_bytes"] = forecast.get(row["mode"])
                    print(row, flush=True)
    return found


# --------------------------------------------------------------------------------------------------- scale

EFFORT = Effort(points=12, solver_seconds=0.5, proves=False)
NODE, NVLINK, NETWORK = 8, 450e9, 50e9
SCALE = (
    ("llama-2-7b", "full"), ("llama-3-70b", "full"), ("llama-3-70b", "lora"), ("llama-3.1-405b", "full"),
    ("llama-3.1-405b", "lora"),
)  # fmt: skip


def scale() -> list[dict[str, Any]]:
    target = gpu("h100-sxm")
    room = usable_bytes(target)
    found = []
    for model, method in SCALE:
        for strategy, reshard in (("ddp", True), ("fsdp2", True), ("fsdp2", False)):
            for world in (8, 64, 1024):
                if strategy == "ddp" and world != 64:
                    continue  # a rank of DDP holds the same in every world
                setup = Setup(
                    model=model, method=method, seq=4096, strategy=strategy, world_size=world, reshard=reshard
                )
                started = time.perf_counter()
                recorded = trace_for(setup, target)
                traced = time.perf_counter() - started
                row = {
                    "model": model, "method": method, "strategy": strategy, "reshard": reshard, "world": world,
                    "static_bytes": sum(recorded.static_bytes.values()), "room_bytes": room,
                    "none_bytes": simulate(recorded).peak_bytes,
                    "every_block_bytes": simulate(recorded, every_block(recorded, effort=EFFORT)).peak_bytes,
                }  # fmt: skip
                compute = sum(op.seconds for op in recorded.ops)
                gathered, reduced = sent_bytes(recorded, setup)
                link = NVLINK if world <= NODE else NETWORK
                try:
                    made = plan(recorded, room, effort=EFFORT)
                    row |= {
                        "planned_bytes": made.peak_bytes,
                        "recompute_of_forward": round(made.recompute_flops / made.forward_flops, 4),
                        "compute_seconds": round(compute + made.recompute_seconds, 3),
                    }
                except tightfit.BudgetInfeasible as refused:
                    row |= {"least_bytes": refused.least_bytes, "compute_seconds": round(compute, 3)}
                row |= {
                    "gathered_bytes": gathered, "reduced_bytes": reduced,
                    "communication_seconds": round((gathered + reduced) / link, 3),
                    "trace_seconds": round(traced, 1), "all_seconds": round(time.perf_counter() - started, 1),
                }  # fmt: skip
                found.append(row)
                print(row, flush=True)
    return found


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        rank_main(Path(sys.argv[2]))
        return
    parts = {"measured": measured, "scale": scale}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in sys.argv[1:] or list(parts):
        results[name] = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "result": parts[name]()}
        results["environment"] = environment()
        drawn.write(RESULTS, results, parts=[name])


if __name__ == "__main__":
    main()
