"""Models that are checkpointed by hand: what that holds and runs again, and what tightfit makes of the same.

    python benchmarks/by_hand.py              # writes benchmarks/results/by_hand.json
    python benchmarks/by_hand.py --only gru   # one row, the others as they were

By hand is either a library's own switch (timm, torchvision, diffusers, PyTorch Geometric, transformers), or
`torch.utils.checkpoint` where people put it: around turns of a recurrent loop, around the parts of a plain stack,
within another checkpoint. Each row has the measured peak of a step's activations (the allocator's count less what lives
throughout), and what runs again as a part of the forward: its FLOPs, and its seconds as the recording has them for each
op. tightfit is asked three times, for plans of the same bits: for the peak of the hand-made way, once in the seconds of
the recording and once with ops priced by their FLOPs, and for the lowest peak. Gradients are compared bit by bit with
the step without a plan.

The libraries are no dependencies: without one its row is left out, and says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import drawn

os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import tightfit
from tightfit.core import BudgetInfeasible, Phase, Plan, Trace
from tightfit.device.cost import NOMINAL_CPU, retimed
from tightfit.levers import allowed
from tightfit.plan import lowest, simulate
from tightfit.step.environment import environment
from tightfit.step.snapshot import undisturbed
from tightfit.verify.measure import FlopCount
from tightfit.verify.peak import measured_peak_bytes

RESULTS = Path(__file__).parent / "results" / "by_hand.json"

#: A device that multiplies slowly and does all else fast, so that a plan for it reruns the fewest FLOPs.
MULTIPLIES = replace(
    NOMINAL_CPU, name="FLOPs", flops_per_second={"float32": 2e10}, memory_bytes_per_second=4e11, launch_seconds=2e-7
)

Loss = Callable[[nn.Module, Any], torch.Tensor]


def classified(model: nn.Module, batch: Any) -> torch.Tensor:
    out = model(batch)
    return functional.cross_entropy(out, torch.arange(out.shape[0]) % 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A model without checkpointing, with the step that trains it."""

    said: str  # of the model, and of how it is checkpointed by hand
    model: nn.Module
    batch: Any
    by_hand: Callable[[bool], object]  # switches its hand-made checkpointing on and off
    loss: Loss = classified


class Turns(nn.Module):
    """A GRU cell over 120 turns; `chunk`: so many turns are checkpointed together."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(32, 64), nn.Linear(64, 10)
        self.chunk = 0

    def turns(self, state: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        for turn in range(inputs.shape[1]):
            state = self.cell(inputs[:, turn], state)
        return state

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        state = inputs.new_zeros(inputs.shape[0], 64)
        if not self.chunk:
            return self.head(self.turns(state, inputs))
        for begin in range(0, inputs.shape[1], self.chunk):
            state = checkpoint(self.turns, state, inputs[:, begin : begin + self.chunk], use_reentrant=False)
        return self.head(state)


class Stack(nn.Module):
    """Forty layers in a row, as `checkpoint_sequential` wants them."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.LayerNorm(256)) for _ in range(40)]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(256, 10)
        self.segments = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.segments:
            return self.head(checkpoint_sequential(self.layers, self.segments, inputs, use_reentrant=False))
        return self.head(self.layers(inputs))


class Layer(nn.Module):
    """A transformer's block, whose MLP can be checkpointed by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(64), nn.LayerNorm(64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.first(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.second(x))


class Nested(nn.Module):
    """Sixteen blocks. `group`: so many are checkpointed together, and each of them once more within."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(Layer() for _ in range(16)), nn.Linear(64, 10)
        self.group = 0

    def together(self, x: torch.Tensor, begin: int) -> torch.Tensor:
        for layer in self.layers[begin : begin + self.group]:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.group:
            for layer in self.layers:
                x = layer(x)
        else:
            for begin in range(0, len(self.layers), self.group):
                x = checkpoint(self.together, x, begin, use_reentrant=False)
        return self.head(x.mean(1))


def gru() -> Made:
    model = Turns()
    return Made(
        said="GRU cell over 120 turns, ten at a time",
        model=model,
        batch=torch.randn(64, 120, 32),
        by_hand=lambda on: setattr(model, "chunk", 10 if on else 0),
    )


def stack() -> Made:
    model = Stack()
    return Made(
        said="forty layers, `checkpoint_sequential` in six",
        model=model,
        batch=torch.randn(512, 256),
        by_hand=lambda on: setattr(model, "segments", 6 if on else 0),
    )


def nested() -> Made:
    model = Nested()
    return Made(
        said="sixteen transformer blocks, a checkpoint per four and per block within",
        model=model,
        batch=torch.randn(8, 64, 64),
        by_hand=lambda on: setattr(model, "group", 4 if on else 0),
    )


def _timm(name: str, said: str, images: torch.Tensor, **options: Any) -> Made:
    import timm

    model = timm.create_model(name, num_classes=10, **options)
    return Made(
        said=f"{said} (timm), `set_grad_checkpointing`",
        model=model,
        batch=images,
        by_hand=model.set_grad_checkpointing,
    )


def vit() -> Made:
    return _timm("vit_tiny_patch16_224", "ViT-Tiny", torch.randn(16, 3, 128, 128), img_size=128)


def convnext() -> Made:
    return _timm("convnext_atto", "ConvNeXt-Atto", torch.randn(8, 3, 64, 64))


def resnet() -> Made:
    return _timm("resnet26", "ResNet-26", torch.randn(8, 3, 64, 64))


def efficientnet() -> Made:
    return _timm("efficientnet_b0", "EfficientNet-B0", torch.randn(8, 3, 64, 64))


def densenet_timm() -> Made:
    import timm

    model = timm.create_model("densenet121", num_classes=10)

    def by_hand(on: bool) -> None:
        for module in model.modules():
            if type(module).__name__ == "DenseLayer":
                module.grad_checkpointing = module.memory_efficient = on

    return Made(
        said="DenseNet-121 (timm), `memory_efficient`", model=model, batch=torch.randn(8, 3, 64, 64), by_hand=by_hand
    )


def densenet_torchvision() -> Made:
    import torchvision

    model = torchvision.models.densenet121(num_classes=10)

    def by_hand(on: bool) -> None:
        for module in model.modules():
            if hasattr(module, "memory_efficient"):
                module.memory_efficient = on

    return Made(
        said="DenseNet-121 (torchvision), `memory_efficient`",
        model=model,
        batch=torch.randn(8, 3, 64, 64),
        by_hand=by_hand,
    )


def _denoised(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A diffusion model's loss: how far it is from the noise."""
    inputs = {name: value for name, value in batch.items() if name != "noise"}
    return functional.mse_loss(model(**inputs).sample, batch["noise"])


def _diffusers(model: Any, said: str, **batch: torch.Tensor) -> Made:
    return Made(
        said=f"{said} (diffusers), `enable_gradient_checkpointing`",
        model=model,
        batch={
            "sample": torch.randn(4, 3, 32, 32), "timestep": torch.tensor([3, 141, 592, 653]),
            "noise": torch.randn(4, 3, 32, 32), **batch,
        },
        by_hand=lambda on: model.enable_gradient_checkpointing() if on else model.disable_gradient_checkpointing(),
        loss=_denoised,
    )  # fmt: skip


def unet() -> Made:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=32, block_out_channels=(32, 64, 64), layers_per_block=2, norm_num_groups=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return _diffusers(model, "UNet2DModel")


def unet_conditioned() -> Made:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=32, in_channels=3, out_channels=3, block_out_channels=(32, 64), layers_per_block=2,
        norm_num_groups=8, attention_head_dim=8, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return _diffusers(model, "UNet2DConditionModel", encoder_hidden_states=torch.randn(4, 12, 32))


class Graph(nn.Module):
    """A deep graph network over the nodes of one graph, as PyTorch Geometric's own examples build it."""

    def __init__(self, layers: int, edges: torch.Tensor) -> None:
        super().__init__()
        from torch_geometric.nn import DeepGCNLayer, GENConv

        self.encoder, self.head = nn.Linear(32, 64), nn.Linear(64, 10)
        self.layers = nn.ModuleList(
            DeepGCNLayer(
                GENConv(64, 64, aggr="softmax", t=1.0, learn_t=True, num_layers=2, norm="layer"),
                nn.LayerNorm(64), nn.ReLU(inplace=True), block="res+", dropout=0.1,
            )
            for _ in range(layers)
        )  # fmt: skip
        self.register_buffer("edges", edges)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.encoder(x)
        x = self.layers[0].conv(x, self.edges)
        for layer in self.layers[1:]:
            x = layer(x, self.edges)
        first = self.layers[0]
        return self.head(functional.dropout(first.act(first.norm(x)), p=0.1, training=self.training))


def graph() -> Made:
    nodes = 600
    model = Graph(14, torch.randint(0, nodes, (2, 8 * nodes)))

    def by_hand(on: bool) -> None:
        for layer in model.layers:
            layer.ckpt_grad = on

    return Made(
        said="14 DeepGCNLayers of GENConv (PyTorch Geometric), `ckpt_grad`",
        model=model,
        batch=torch.randn(nodes, 32),
        by_hand=by_hand,
    )


class Attended(nn.Module):
    """Graph attention, with each layer checkpointed where `checkpoints` is set."""

    def __init__(self, edges: torch.Tensor) -> None:
        super().__init__()
        from torch_geometric.nn import GATConv

        self.encoder, self.head = nn.Linear(32, 64), nn.Linear(64, 10)
        self.layers = nn.ModuleList(GATConv(64, 16, heads=4, dropout=0.1) for _ in range(8))
        self.register_buffer("edges", edges)
        self.checkpoints = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.encoder(x)
        for layer in self.layers:
            turned = checkpoint(layer, x, self.edges, use_reentrant=False) if self.checkpoints else layer(x, self.edges)
            x = x + functional.elu(turned)
        return self.head(x)


def graph_attention() -> Made:
    nodes = 600
    model = Attended(torch.randint(0, nodes, (2, 8 * nodes)))
    return Made(
        said="8 GATConv layers (PyTorch Geometric), a checkpoint around each",
        model=model,
        batch=torch.randn(nodes, 32),
        by_hand=lambda on: setattr(model, "checkpoints", on),
    )


def _own_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


def mamba() -> Made:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=128, hidden_size=64, state_size=8, num_hidden_layers=6, use_cache=False, use_mambapy=False
    )
    model = MambaForCausalLM(config)
    tokens = torch.randint(0, 128, (4, 64))
    return Made(
        said="Mamba of 6 layers, 64 tokens (transformers), `gradient_checkpointing_enable`",
        model=model,
        batch={"input_ids": tokens, "labels": tokens},
        by_hand=lambda on: model.gradient_checkpointing_enable() if on else model.gradient_checkpointing_disable(),
        loss=_own_loss,
    )


ROWS: dict[str, Callable[[], Made]] = {
    "densenet121": densenet_timm, "densenet121-torchvision": densenet_torchvision, "vit": vit, "convnext": convnext,
    "resnet": resnet, "efficientnet": efficientnet, "unet": unet, "unet-conditioned": unet_conditioned,
    "graph": graph, "graph-attention": graph_attention, "mamba": mamba, "gru": gru, "stack": stack, "nested": nested,
}  # fmt: skip


class Ran(FlopCount):
    """Counts the ops of a step, by name and by the bytes of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        tensors = [each for each in (out if isinstance(out, (tuple, list)) else (out,)) if torch.is_tensor(each)]
        self.ops[str(func), sum(each.numel() * each.element_size() for each in tensors)] += 1
        return out


def priced(ops: Counter[tuple[str, int]], trace: Trace) -> float:
    """Seconds of the ops, each the mean of those in the trace's forward of the same name and size."""
    by_name: dict[str, list[float]] = defaultdict(list)
    by_size: dict[tuple[str, int], list[float]] = defaultdict(list)
    for op in trace.ops:
        if op.phase is Phase.FORWARD:
            by_name[op.name].append(op.seconds)
            size = sum(trace.values[v].size_bytes for v in op.outputs if v is not None)
            by_size[op.name, size].append(op.seconds)
    seconds = 0.0
    for (name, size), count in ops.items():
        alike = by_size.get((name, size)) or by_name.get(name) or [0.0]
        seconds += count * sum(alike) / len(alike)
    return seconds


def measured(made: Made, static: int) -> tuple[int, Ran]:
    """(peak of the activations in bytes, the ops of a step)."""
    peak = measured_peak_bytes(made.model, made.batch, contextlib.nullcontext(), loss=made.loss)
    with undisturbed(made.model, made.batch), Ran() as ran:
        made.loss(made.model, made.batch).backward()
    return peak - static, ran


def row(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    try:
        made = ROWS[name]()
    except ImportError as error:
        return {"model": name, "status": f"not measured: {error}"}
    model, batch, loss = made.model.train(), made.batch, made.loss
    began = time.perf_counter()
    trace = tightfit.trace(model, batch, loss=loss)
    traced = time.perf_counter() - began
    static = sum(trace.static_bytes.values())
    forward = [op for op in trace.ops if op.phase is Phase.FORWARD]
    flops, seconds = sum(op.flops for op in forward), sum(op.seconds for op in forward)

    def as_row(make: Callable[[], Plan]) -> dict[str, Any]:
        began = time.perf_counter()
        try:
            plan = make()
        except BudgetInfeasible as error:
            return {"status": str(error)}
        planned = time.perf_counter() - began
        proof = tightfit.verify(model, batch, plan, loss=loss)
        return {
            "peak_bytes": plan.peak_bytes - static, "rerun": round(plan.recompute_flops / flops, 4),
            "rerun_seconds": round(simulate(trace, plan).recompute_seconds / seconds, 4),
            "passed": proof.passed, "gradients": proof["gradients"].measured,
            "planning_seconds": round(planned, 1), "units": sum(not c.keeps_all for c in plan.choices),
        }  # fmt: skip

    plain, ran = measured(made, static)
    made.by_hand(True)
    hand, ran_by_hand = measured(made, static)
    made.by_hand(False)
    exact = {each.lever for each in allowed(None) if each.is_exact}
    budget = static + hand
    return {
        "model": name, "said": made.said, "status": "measured", "units": len(trace.units),
        "trace_seconds": round(traced, 1),
        "none": {"peak_bytes": plain},
        "by_hand": {
            "peak_bytes": hand, "rerun": round((ran_by_hand.flops - ran.flops) / flops, 4),
            "rerun_seconds": round(priced(ran_by_hand.ops - ran.ops, trace) / seconds, 4),
        },
        "tightfit_at_equal_peak": as_row(lambda: tightfit.plan(trace, budget, exact=True)),
        "tightfit_fewest_flops": as_row(lambda: tightfit.plan(retimed(trace, MULTIPLIES), budget, exact=True)),
        "tightfit_lowest": as_row(lambda: lowest(trace, levers=exact)),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(ROWS))
    only = parser.parse_args().only
    rows = {each["model"]: each for each in json.loads(RESULTS.read_text())["rows"]} if RESULTS.exists() else {}
    for name in (only,) if only else ROWS:
        rows[name] = row(name)
        print(json.dumps(rows[name]), flush=True)
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "rows": [rows[name] for name in ROWS if name in rows],
    }
    drawn.write(RESULTS, record, parts=[only] if only else list(ROWS))
    plans = [each for found in rows.values() for each in found.values() if isinstance(each, dict)]
    return int(any(each.get("passed") is False for each in plans))


if __name__ == "__main__":
    sys.exit(main())
