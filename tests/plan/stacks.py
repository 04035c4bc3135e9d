"""Steps of small real modules whose every plan can be tried: keep sets of every unit, judged by `simulate`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import torch
from torch import nn

import tightfit
from tightfit.core import Action, Choice, Trace
from tightfit.plan.simulate import simulate_choices


class Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 2 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.inner(x).chunk(2, -1)
        return x + torch.tanh(a) * torch.sigmoid(b)


class Lean(nn.Module):
    """Nothing saves its input, so that whoever runs it again must hold that."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = torch.tanh(x)
        return x + torch.sigmoid(self.inner(a))


class Stack(nn.Module):
    def __init__(self, depth: int, width: int, head: int, block: type[nn.Module] = Gated) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(width) for _ in range(depth))
        self.head = nn.Linear(width, head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).exp().mean()


def half_frozen(width: int, inner: Sequence[int]) -> nn.Sequential:
    """A block for each width in `inner`, every second one frozen."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width)) for wide in inner]
    for block in blocks[::2]:
        block.requires_grad_(False)
    return nn.Sequential(*blocks)


def mean_square(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(batch).square().mean()
    return loss


@functools.cache
def traced(depth: int, width: int, head: int, rows: int, block: type[nn.Module] = Gated) -> Trace:
    torch.manual_seed(0)
    model = Stack(depth, width, head, block)
    trace = tightfit.trace(model, torch.randn(rows, width))
    return steady(trace)


def steady(trace: Trace) -> Trace:
    """`trace` with seconds that do not depend on the machine: bytes written, with a floor."""
    sizes = {v.id: v.size_bytes for v in trace.values}
    ops = tuple(
        dataclasses.replace(op, seconds=1e-3 + 1e-6 * sum(sizes[v] for v in op.outputs if v is not None))
        for op in trace.ops
    )
    return dataclasses.replace(trace, ops=ops)


@functools.cache
def brute_force(
    depth: int, width: int, head: int, rows: int, block: type[nn.Module] = Gated
) -> tuple[tuple[int, float], ...]:
    """(peak, recompute seconds) of every combination of what the units keep, keeping all among them."""
    trace = traced(depth, width, head, rows, block)
    program = trace.programs[0]
    candidates = sorted({v for v in program.needed} | {v for step in program.steps for v in step.reads})
    free = set(program.held)
    options = []
    for count in range(len(candidates) + 1):
        for chosen in itertools.combinations([v for v in candidates if v not in free], count):
            kept = frozenset(chosen) | free
            actions = tuple(Action.KEEP if v in kept else Action.RECOMPUTE for v in range(program.values))
            options.append(actions)
    options = list(dict.fromkeys([*options, (Action.KEEP,) * program.values]))
    found = []
    for combination in itertools.product(options, repeat=depth):
        choices = tuple(
            Choice(unit=unit.path, actions=actions, signature=unit.signature, program=unit.digest)
            for unit, actions in zip(trace.units, combination, strict=True)
        )
        line = simulate_choices(trace, choices)
        found.append((line.peak_bytes, line.recompute_seconds))
    return tuple(found)


#: What a folder's config.json says of a model that the command line plans in a moment.
TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
    "max_position_embeddings": 128,
}  # fmt: skip
