"""At each eager peer's own measured peak: how much does it recompute, and how much does tightfit?

    python benchmarks/peers.py        # some minutes; writes benchmarks/results/peers.json

GPT-2 (8 layers, hidden 512, vocabulary 8192, batch 2 x 256, fp32, no dropout), fully trained with gradients present,
and with LoRA r=16 on all linear layers. A peer is applied to every block and measured: peak of forward and backward by
the allocator's count, FLOPs op by op. Then a plan is made for exactly that peak, and measured in the same way.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import tightfit
from tightfit.integrations.peft import add_lora
from tightfit.integrations.transformers import random_batch
from tightfit.measure import FlopCount
from tightfit.step import ForwardPatch, environment, find_units, no_key_value_cache, undisturbed
from tightfit.verify import Outcome, PeakMeter, differences, static_bytes

RESULTS = Path(__file__).parent / "results" / "peers.json"
aten = torch.ops.aten
PRODUCTS = [aten.mm.default, aten.addmm.default, aten.bmm.default]
ATTENTION = [aten._scaled_dot_product_flash_attention_for_cpu.default]


def model_named(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=8, n_embd=512, n_head=8, vocab_size=8192, n_positions=512, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: Any = transformers.GPT2LMHeadModel(config).train()
    if name == "lora":
        model = add_lora(model, rank=16)
    return model, random_batch(model, 2, 256)


@contextlib.contextmanager
def checkpointed(model: nn.Module, every: int = 1, save: list[Any] | None = None) -> Iterator[None]:
    """torch.utils.checkpoint around every n-th block, whole or with the ops in `save` kept."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            more: Any = {}
            if save is not None:
                more["context_fn"] = functools.partial(create_selective_checkpoint_contexts, save)
            return checkpoint(original, *args, use_reentrant=False, **more, **kwargs)

        return forward

    patches = [ForwardPatch(m, wrap) for i, m in enumerate(find_units(model).values()) if i % every == 0]
    try:
        yield
    finally:
        for patch in patches:
            patch.undo()


@contextlib.contextmanager
def own_switch(model: Any) -> Iterator[None]:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


PEERS: dict[str, Callable[[nn.Module], Any]] = {
    "every block (torch.utils.checkpoint)": checkpointed,
    "every second block": functools.partial(checkpointed, every=2),
    "every third block": functools.partial(checkpointed, every=3),
    "selective: save matrix products": functools.partial(checkpointed, save=PRODUCTS),
    "selective: save products and attention": functools.partial(checkpointed, save=PRODUCTS + ATTENTION),
    "selective: save attention": functools.partial(checkpointed, save=ATTENTION),
    "transformers' gradient_checkpointing_enable()": own_switch,
}


def measured(model: nn.Module, batch: Any, context: Any) -> tuple[int, int, Outcome]:
    """(peak bytes, FLOPs, gradients) of one step inside `context`."""
    with undisturbed(model, batch) as restart, no_key_value_cache(model):
        with context:
            before = static_bytes(model, None, batch)
            with PeakMeter("cpu") as meter:
                model(**batch).loss.backward()
            restart()
            with FlopCount() as count:
                model(**batch).loss.backward()
            return before + meter.rise_bytes, count.flops, Outcome(model)


def main() -> int:
    transformers.logging.set_verbosity_error()
    rows = []
    for name in ("full", "lora"):
        model, batch = model_named(name)
        if name == "full":  # as in accumulation: gradients exist
            model(**batch).loss.backward()
        whole, flops, reference = measured(model, batch, contextlib.nullcontext())
        trace = tightfit.trace(model, batch)
        for peer, context in PEERS.items():
            peak, peer_flops, found = measured(model, batch, context(model))
            row: dict[str, Any] = {
                "model": name, "peer": peer, "peak_share": peak / whole, "peer_extra_flops": peer_flops / flops - 1,
                "peer_gradients": "differ" if differences(reference, found) else "identical",
            }  # fmt: skip
            try:
                plan = tightfit.plan(trace, peak)
            except tightfit.BudgetInfeasible as error:
                row |= {"tightfit": "infeasible", "least_share": error.least_bytes / whole}
            else:
                ours, our_flops, found = measured(model, batch, tightfit.apply(model, plan))
                row |= {
                    "tightfit_peak_share": ours / whole, "tightfit_extra_flops": our_flops / flops - 1,
                    "tightfit_gradients": "differ" if differences(reference, found) else "identical",
                    "status": plan.status.value,
                }  # fmt: skip
            rows.append(row)
            print(json.dumps(row), flush=True)
    record = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment(), "rows": rows}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    beaten = [r for r in rows if r.get("tightfit_extra_flops", 1) > r["peer_extra_flops"] + 1e-9]
    print(f"{len(rows) - len(beaten)} of {len(rows)}: no more FLOPs than the peer at its own peak", file=sys.stderr)
    return 1 if beaten else 0


if __name__ == "__main__":
    sys.exit(main())
