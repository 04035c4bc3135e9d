"""At each peer's own measured peak: how much does it recompute, and how much does tightfit?

    python benchmarks/peers.py                 # about 40 minutes; writes benchmarks/results/peers.json
    python benchmarks/peers.py --no-time gpt2  # one model, bytes and FLOPs only, printed only
    pip install torch-remat                    # a peer that is left out, and named, where it is not installed

Models: 8 blocks, hidden 512, vocabulary 8192, batch 2, fp32; GPT-2 with and without dropout, Llama, and both with LoRA
r=16 on all linear layers; 256 and 512 tokens. Fully trained models have their gradients present, as in accumulation.

A peer is applied and measured: peak of forward and backward by the allocator's count, FLOPs of every matrix product and
attention kernel that runs. Then a plan is made for exactly that peak and measured in the same way. Time: the plain
step, the peer's and tightfit's take turns in one process; medians.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import drawn

os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import tightfit
from tightfit.integrations.peft import add_lora
from tightfit.integrations.transformers import random_batch
from tightfit.step.environment import environment
from tightfit.step.modules import find_units
from tightfit.step.patches import MethodPatch, no_key_value_cache
from tightfit.step.snapshot import undisturbed
from tightfit.verify.gradients import Outcome, differences
from tightfit.verify.measure import FlopCount
from tightfit.verify.peak import PeakMeter, static_bytes

RESULTS = Path(__file__).parent / "results" / "peers.json"
MODELS = ("gpt2", "gpt2-dropout", "gpt2-lora", "llama", "llama-lora")
SEQUENCES = (256, 512)
REPEATS = 5
# timed at the shorter sequence; the other peers are variations of these
TIMED = (
    "every block (torch.utils.checkpoint)",
    "selective: save attention",
    "selective: save every second product",
    "selective: save products and attention",
    "torch_remat: save attention",
)
BLOCKS = 8

aten = torch.ops.aten
PRODUCTS = [aten.mm.default, aten.addmm.default, aten.bmm.default]
ATTENTION = [aten._scaled_dot_product_flash_attention_for_cpu.default]

Context = Callable[[Any], contextlib.AbstractContextManager[Any]]


def model_named(name: str, seq: int) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    drop = 0.1 if "dropout" in name else 0.0
    config: Any
    if name.startswith("gpt2"):
        config = transformers.GPT2Config(
            n_layer=BLOCKS, n_embd=512, n_head=8, vocab_size=8192, n_positions=512, resid_pdrop=drop, embd_pdrop=drop,
            attn_pdrop=drop, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model: Any = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            num_hidden_layers=BLOCKS, hidden_size=512, intermediate_size=1376, num_attention_heads=8,
            num_key_value_heads=8, vocab_size=8192, max_position_embeddings=512,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    if "lora" in name:
        model = add_lora(model, rank=16)
    model.train()
    batch = random_batch(model, 2, seq)
    if "lora" not in name:
        model(**batch).loss.backward()
    return model, batch


# ------------------------------------------------------------------------------------------------ the peers


@contextlib.contextmanager
def patched(modules: list[nn.Module], wrap: Callable[..., Any]) -> Iterator[None]:
    patches = [MethodPatch(module, wrap) for module in modules]
    try:
        yield
    finally:
        for patch in patches:
            patch.undo()


def checkpointed(model: Any, every: int = 1, save: Any = None) -> contextlib.AbstractContextManager[None]:
    """torch.utils.checkpoint around every n-th block, whole or with what `save` (ops or a policy) says kept."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            more: Any = {}
            if save is not None:
                policy = save() if callable(save) else save
                more["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
            return checkpoint(original, *args, use_reentrant=False, **more, **kwargs)

        return forward

    return patched([m for i, m in enumerate(find_units(model).values()) if i % every == 0], wrap)


def every_second_product() -> Callable[..., CheckpointPolicy]:
    """A policy with a count of its own for forward and for recompute."""
    seen: Counter[bool] = Counter()

    def policy(context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if op not in PRODUCTS:
            return CheckpointPolicy.PREFER_RECOMPUTE
        seen[context.is_recompute] += 1
        odd = seen[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if odd else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def all_but_the_widest() -> Callable[..., CheckpointPolicy]:
    def policy(_: Any, op: Any, *args: Any, **__: Any) -> CheckpointPolicy:
        if op not in PRODUCTS or args[-1].shape[-1] > 1024:
            return CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.MUST_SAVE

    return policy


class _Segment(nn.Module):
    """All blocks as one, run by checkpoint_sequential."""

    def __init__(self, blocks: nn.ModuleList, segments: int) -> None:
        super().__init__()
        self.blocks, self.segments = blocks, segments

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        functions = [lambda x, block=block: block(x, *args, **kwargs) for block in self.blocks]
        out: torch.Tensor = checkpoint_sequential(functions, self.segments, hidden, use_reentrant=False)
        return out


@contextlib.contextmanager
def sequential(model: Any, segments: int) -> Iterator[None]:
    path = next(iter(find_units(model))).rpartition(".")[0]
    parent = model.get_submodule(path.rpartition(".")[0])
    name = path.rpartition(".")[2]
    blocks = getattr(parent, name)
    setattr(parent, name, nn.ModuleList([_Segment(blocks, segments)]))
    try:
        yield
    finally:
        setattr(parent, name, blocks)


@contextlib.contextmanager
def own_switch(model: Any) -> Iterator[None]:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


@contextlib.contextmanager
def remat_regions(model: Any, saved: tuple[str, ...]) -> Iterator[None]:
    """torch_remat around every block, the submodules named in `saved` placed in regions that are kept."""
    import torch_remat

    def checkpointing(original: Callable[..., Any]) -> Callable[..., Any]:
        return torch_remat.checkpoint(region_name="block")(original)

    def keeping(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            out = torch_remat.region(functools.partial(original, **kwargs), "kept", recompute=False)(*args)
            torch_remat.recompute_needs_tensor(
                *[t for t in (out if isinstance(out, tuple) else [out]) if t is not None]
            )
            return out

        return forward

    blocks = list(find_units(model).values())
    inner = [getattr(block, name) for block in blocks for name in saved if hasattr(block, name)]
    with patched(inner, keeping), patched(blocks, checkpointing):
        yield


@contextlib.contextmanager
def partitioned(model: Any, budget: float) -> Iterator[None]:
    """torch's min-cut partitioner with its own memory budget; the kernels stay eager ones."""
    import torch._dynamo
    import torch._functorch.config as functorch

    torch._dynamo.reset()
    with functorch.patch(activation_memory_budget=budget):
        compiled = torch.compile(model, backend="aot_eager_decomp_partition")
        model.__dict__["_peer_call"] = compiled
        try:
            yield
        finally:
            del model.__dict__["_peer_call"]
            torch._dynamo.reset()


def peers(name: str, seq: int) -> dict[str, Context]:
    found: dict[str, Context] = {
        "every block (torch.utils.checkpoint)": checkpointed,
        "every second block": functools.partial(checkpointed, every=2),
        "every third block": functools.partial(checkpointed, every=3),
        "checkpoint_sequential, 2 segments": functools.partial(sequential, segments=2),
        "checkpoint_sequential, 4 segments": functools.partial(sequential, segments=4),
        "selective: save attention": functools.partial(checkpointed, save=ATTENTION),
        "selective: save products": functools.partial(checkpointed, save=PRODUCTS),
        "selective: save products and attention": functools.partial(checkpointed, save=PRODUCTS + ATTENTION),
        "selective: save every second product": functools.partial(checkpointed, save=every_second_product),
        "selective: save all but the widest products": functools.partial(checkpointed, save=all_but_the_widest),
        "transformers' own switch": own_switch,
    }
    with contextlib.suppress(ImportError):
        import torch_remat  # noqa: F401

        found["torch_remat: save attention"] = functools.partial(remat_regions, saved=("attn", "self_attn"))
        found["torch_remat: save MLP"] = functools.partial(remat_regions, saved=("mlp",))
    if seq == SEQUENCES[0] and "dropout" not in name:  # its budget gets dropout wrong
        for budget in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
            found[f"torch's partitioner, budget {budget}"] = functools.partial(partitioned, budget=budget)
    return found


# ------------------------------------------------------------------------------------------------ measuring


def step(model: Any, batch: Any) -> None:
    call = model.__dict__.get("_peer_call", model)
    call(**batch).loss.backward()


def compiled_flops(run: Callable[[], None]) -> int:
    """FLOPs of a compiled step, which no dispatch mode can watch, from the shapes that the profiler records."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        run()
    total = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        shapes = event.shapes()
        if event.name() == "aten::mm":
            (m, k), (_, n) = shapes[0], shapes[1]
            total += 2 * m * k * n
        elif event.name() == "aten::addmm":
            (m, k), (_, n) = shapes[1], shapes[2]
            total += 2 * m * k * n
        elif event.name() == "aten::bmm":
            (b, m, k), (_, _, n) = shapes[0], shapes[1]
            total += 2 * b * m * k * n
        elif event.name() == "aten::_scaled_dot_product_flash_attention_for_cpu":
            (b, h, q, d), (_, _, k, _) = shapes[0], shapes[1]
            total += 4 * b * h * q * k * d
        elif event.name() == "aten::_scaled_dot_product_flash_attention_for_cpu_backward":
            (b, h, q, d), (_, _, k, _) = shapes[1], shapes[2]
            total += 10 * b * h * q * k * d
    return total


def measured(model: Any, batch: Any, context: contextlib.AbstractContextManager[Any]) -> tuple[int, int, Outcome]:
    """(bytes that the step adds at its peak, FLOPs, gradients) of one step inside `context`."""
    with undisturbed(model, batch) as restart, no_key_value_cache(model):
        with context:
            compiled = "_peer_call" in model.__dict__
            if compiled:
                step(model, batch)
                restart()
            gc.collect()
            with PeakMeter("cpu") as meter:
                step(model, batch)
            restart()
            if compiled:
                flops = compiled_flops(lambda: step(model, batch))
            else:
                with FlopCount() as count:
                    step(model, batch)
                flops = count.flops
        return meter.rise_bytes, flops, Outcome(model)  # outside the context, where parameters have their own names


def seconds_in_turns(model: Any, batch: Any, contexts: list[Callable[[], Any]]) -> list[float]:
    """Median seconds of a step in each context; they take turns."""
    found: list[list[float]] = [[] for _ in contexts]
    with undisturbed(model, batch) as restart, no_key_value_cache(model):
        for repeat in range(REPEATS + 1):
            for seconds, context in zip(found, contexts, strict=True):
                restart()
                with context():
                    started = time.perf_counter()
                    step(model, batch)
                    if repeat:
                        seconds.append(time.perf_counter() - started)
    return [statistics.median(seconds) for seconds in found]


def relative_error(reference: Outcome, found: Outcome) -> float:
    """Largest relative error of a parameter's gradient."""
    worst = 0.0
    for name, gradient in reference.gradients.items():
        other = found.gradients.get(name)
        if other is None or gradient is None:
            return float("inf") if other is not gradient else worst
        worst = max(worst, float((gradient - other).norm() / gradient.norm().clamp(min=1e-30)))
    return worst


def rows_of(name: str, seq: int, timing: bool, only: str = "") -> Iterator[dict[str, Any]]:
    model, batch = model_named(name, seq)
    whole, flops, reference = measured(model, batch, contextlib.nullcontext())
    started = time.perf_counter()
    trace = tightfit.trace(model, batch)
    trace_seconds = time.perf_counter() - started
    fixed = static_bytes(model, None, batch)
    for peer, context in peers(name, seq).items():
        if only not in peer:
            continue
        subject, subject_batch = (model, batch) if peer != "transformers' own switch" else model_named(name, seq)
        row: dict[str, Any] = {"model": name, "seq": seq, "peer": peer}
        try:
            peak, peer_flops, found = measured(subject, subject_batch, context(subject))
        except Exception as error:
            yield row | {"peer_failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            continue
        row |= {
            "peer_peak": round(peak / whole, 5), "peer_extra_flops": round(peer_flops / flops - 1, 5),
            "peer_gradients": relative_error(reference, found) if differences(reference, found) else "identical",
        }  # fmt: skip
        try:
            started = time.perf_counter()
            plan = tightfit.plan(trace, fixed + peak)
            row["plan_seconds"] = round(time.perf_counter() - started, 2)
        except tightfit.BudgetInfeasible as error:
            yield row | {"tightfit": "infeasible", "least_peak": round((error.least_bytes - fixed) / whole, 5)}
            continue
        ours, our_flops, found = measured(model, batch, tightfit.apply(model, plan))
        gap = 1 - plan.bound_seconds / plan.recompute_seconds if plan.recompute_seconds else 0.0
        row |= {
            "peak": round(ours / whole, 5), "predicted_peak": round((plan.peak_bytes - fixed) / whole, 5),
            "extra_flops": round(our_flops / flops - 1, 5), "status": plan.status.value, "gap": round(gap, 4),
            "gradients": "differ" if differences(reference, found) else "identical",
            "trace_seconds": round(trace_seconds, 2),
        }  # fmt: skip
        if timing and peer in TIMED and seq == SEQUENCES[0]:
            plain, theirs, mine = seconds_in_turns(
                model, batch,
                [contextlib.nullcontext, lambda c=context: c(model), lambda p=plan: tightfit.apply(model, p)],
            )  # fmt: skip
            row |= {"peer_time": round(theirs / plain, 3), "time": round(mine / plain, 3)}
        yield row


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=[], help=f"of {', '.join(MODELS)}")
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--seq", type=int, action="append")
    parser.add_argument("--peer", default="", help="only peers whose name has this in it")
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = []
    for name in asked.models or MODELS:
        for seq in asked.seq or SEQUENCES:
            for row in rows_of(name, seq, not asked.no_time, asked.peer):
                rows.append(row)
                print(json.dumps(row), flush=True)
    if not (asked.models or asked.no_time or asked.seq or asked.peer):
        record = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment(), "rows": rows}
        drawn.write(RESULTS, record)
    compared = [r for r in rows if "extra_flops" in r]
    beaten = [r for r in compared if r["extra_flops"] > r["peer_extra_flops"] * 0.9 + 1e-6]
    for row in beaten:
        print("not reached:", json.dumps(row), file=sys.stderr)
    print(f"{len(compared) - len(beaten)} of {len(rows)}: at most 0.9 of the peer's FLOPs", file=sys.stderr)
    return 1 if beaten else 0


if __name__ == "__main__":
    sys.exit(main())
