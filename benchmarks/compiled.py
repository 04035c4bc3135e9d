"""Plans in compiled code against the compiler's own `activation_memory_budget`, at equal measured peak.

    python benchmarks/compiled.py [BACKEND ...]    # some 20 minutes; writes benchmarks/results/compiled.json

A small GPT-2 (full fine-tuning, dropout 0.1) and a small Llama (LoRA, no dropout), fp32, the whole model compiled, by
Inductor and by `aot_eager_decomp_partition` (the same partitioner, no generated code). For each value of
`torch._functorch.config.activation_memory_budget` its peak is measured, then `tightfit.fit` gets it as its budget.

Per row: `peak_bytes` (the allocator's own count of a whole step without optimizer), `recompute_flops` and
`recomputed_ops` (what the backward graph runs again, counted in the compiler's own graphs), `gradient_error` (against
the uncompiled step from the same random state; the compiler draws as it does, by `fallback_random`) and, where there is
dropout, whether it was replayed with the right mask. Every row is counted, nothing is timed. Plans are also put through
`tightfit.verify`, with the compiler's own random numbers too.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import drawn

os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch._functorch.config as functorch_config
import torch._functorch.partitioners as partitioners
import torch._inductor.config as inductor_config
import transformers
from torch import nn

import tightfit
from tightfit.core import BudgetInfeasible
from tightfit.integrations.peft import add_lora
from tightfit.integrations.transformers import random_batch
from tightfit.step.environment import environment
from tightfit.step.ops import op_flops
from tightfit.verify.peak import PeakMeter, static_bytes

RESULTS = Path(__file__).parent / "results" / "compiled.json"
BUDGETS = {"aot_eager_decomp_partition": (0.9, 0.7, 0.5, 0.3, 0.1), "inductor": (0.5,)}
#: Gradients of another mask are off by tens of percent, rounding by less than this.
WRONG = 1e-3


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=4, n_embd=256, n_head=4, vocab_size=1024, n_positions=256, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).train()


def llama_lora() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=4, hidden_size=256, intermediate_size=704, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=1024, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return add_lora(transformers.LlamaForCausalLM(config), rank=8).train()


class Graphs:
    """What the partitioner made of a step: FLOPs of both graphs, and ops of the forward that the backward has too."""

    def __init__(self) -> None:
        self.flops = self.recomputed = 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        split = partitioners._extract_fwd_bwd_modules

        def watched(*args: Any, **kwargs: Any) -> Any:
            forward, backward = split(*args, **kwargs)
            calls = [{n.name: n for n in g.graph.nodes if n.op == "call_function"} for g in (forward, backward)]
            again = [n for name, n in calls[1].items() if name in calls[0]]
            self.recomputed += sum(1 for n in again if isinstance(n.target, torch._ops.OpOverload) and not _is_view(n))
            self.flops += sum(_flops(node) for each in calls for node in each.values())
            return forward, backward

        partitioners._extract_fwd_bwd_modules = watched
        try:
            yield
        finally:
            partitioners._extract_fwd_bwd_modules = split


def _is_view(node: Any) -> bool:
    return bool(node.target.is_view) or node.target is torch.ops.aten._unsafe_view.default


def _flops(node: Any) -> int:
    if not isinstance(node.target, torch._ops.OpOverload) or "val" not in node.meta:
        return 0
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    return op_flops(node.target, args, kwargs, node.meta["val"])


def gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(11)
    model(**batch).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    off = sum(float((found[n] - expected[n]).double().norm()) ** 2 for n in expected)
    return float((off / sum(float(expected[n].double().norm()) ** 2 for n in expected)) ** 0.5)


def row(model: nn.Module, batch: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], drops: bool) -> Any:
    """A compiled step, compiled afresh and measured."""
    torch.compiler.reset()
    graphs = Graphs()
    with graphs.watching():
        off = error(gradients(model, batch), expected)
    with PeakMeter("cpu") as meter:
        gradients(model, batch)
    return {
        "peak_bytes": meter.rise_bytes + static_bytes(model, batch=batch),
        "flops": graphs.flops,
        "recomputed_ops": graphs.recomputed,
        "gradient_error": off,
        "dropout": ("wrong" if off > WRONG else "right") if drops else "none",
    }


def compared(make: Callable[[], nn.Module], backend: str) -> Any:
    plain = make()
    batch = random_batch(plain, 2, 256)
    plain.config.use_cache = False
    expected = gradients(plain, batch)
    drops = make is gpt2

    def compiled() -> nn.Module:
        model = make()
        model.config.use_cache = False
        model.compile(backend=backend)
        return model

    rows: list[Any] = [{"mode": "compiled"} | row(compiled(), batch, expected, drops)]
    alone = rows[0]["flops"]
    with PeakMeter("cpu") as meter:
        gradients(plain, batch)
    uncompiled_bytes = meter.rise_bytes + static_bytes(plain, batch=batch)
    for value in BUDGETS[backend]:
        with functorch_config.patch(activation_memory_budget=value):
            theirs = {"mode": "activation_memory_budget", "value": value} | row(compiled(), batch, expected, drops)
        rows.append(theirs)
        model = compiled()
        mine: Any = {"mode": "tightfit", "budget_bytes": theirs["peak_bytes"], "against": value}
        try:
            applied = tightfit.fit(model, batch, theirs["peak_bytes"])
        except BudgetInfeasible as refused:
            rows.append(mine | {"infeasible": True, "least_bytes": refused.least_bytes})
            continue
        mine |= row(model, batch, expected, drops)
        mine["units"] = len(applied.active_units)
        applied.remove()
        with inductor_config.patch(fallback_random=False):
            torch.compiler.reset()
            proof = tightfit.verify(model, batch, applied.plan)
        mine["proof"] = {check.name: check.passed for check in proof.checks}
        rows.append(mine)
        print(theirs, mine, sep="\n", flush=True)
    for each in rows:
        if "flops" in each:
            each["recompute_flops"] = each.pop("flops") - alone
    return {
        "model": make.__name__, "backend": backend, "batch": 2, "seq": 256, "uncompiled_peak_bytes": uncompiled_bytes,
        "step_flops": alone, "rows": rows,
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or list(BUDGETS)
    before = json.loads(RESULTS.read_text(encoding="utf-8"))["cases"] if RESULTS.exists() else []
    cases = {(case["backend"], case["model"]): case for case in before}
    # a graph from the compiler's cache on disk is not split anew, so it could not be counted
    with inductor_config.patch(fallback_random=True), functorch_config.patch(enable_autograd_cache=False):
        for backend in wanted:
            for make in (gpt2, llama_lora):
                print(backend, make.__name__, flush=True)
                cases[backend, make.__name__] = compared(make, backend)
                record = {
                    "date": datetime.now(UTC).strftime("%Y-%m-%d"), "environment": environment(),
                    "wrong_above": WRONG, "cases": [*cases.values()],
                }  # fmt: skip
                drawn.write(RESULTS, record, parts=[f"{backend}, {make.__name__}"])


if __name__ == "__main__":
    sys.exit(main())
