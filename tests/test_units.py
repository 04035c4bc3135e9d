"""Units are found where the saved bytes are, whatever the module tree looks like."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

import tightfit
from tightfit.step.modules import find_units


class Layer(nn.Module):
    """A layer of a dense network: it reads everything made before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, 8, 3, padding=1, bias=False)

    def forward(self, before: list[torch.Tensor]) -> torch.Tensor:
        out: torch.Tensor = self.conv(torch.relu_(self.norm(torch.cat(before, 1))))
        return out


class DenseBlock(nn.ModuleDict):
    def __init__(self, count: int, channels: int) -> None:
        super().__init__({f"denselayer{i}": Layer(channels + 8 * i) for i in range(count)})

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        made = [inputs]
        for layer in self.values():
            made.append(layer(made))
        return torch.cat(made, 1)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), DenseBlock(6, 8), DenseBlock(5, 56))
        self.head = nn.Linear(96, 3)

    def forward(self, inputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(self.head(self.features(inputs).mean((2, 3))), target)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 128), nn.Linear(64, 32)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        gate, value = self.up(inputs).chunk(2, -1)
        out: torch.Tensor = inputs + self.down(functional.silu(gate) * value)
        return out


class Named(nn.Module):
    """Blocks in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth = (Gated() for _ in range(4))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.fourth(self.third(self.second(self.first(inputs)))).square().mean()


class Nested(nn.Module):
    """Everything in one attribute of one attribute, and what looks like blocks beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Module()
        self.trunk.body = Named()
        self.decoys = nn.ModuleList([nn.Sequential(nn.Linear(32, 2), nn.Tanh()) for _ in range(2)])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.trunk.body(inputs)  # type: ignore[operator]  # a module
        return loss + sum(decoy(inputs[:1]).sum() for decoy in self.decoys)


def saved_outside(trace: tightfit.Trace) -> float:
    """Which part of the saved bytes that the step makes no unit can let go of."""
    inside: dict[int, bool] = {}
    for saved in trace.saved:
        value = trace.values[saved.value]
        if value.producer is not None:
            here = saved.frame is not None and value.unit == trace.frames[saved.frame].unit
            inside[value.id] = here and inside.get(value.id, True)
    sizes = {value: trace.values[value].size_bytes for value in inside}
    return sum(size for value, size in sizes.items() if not inside[value]) / sum(sizes.values())


CASES: dict[str, tuple[type[nn.Module], Any, list[str]]] = {
    "dense": (
        Dense, (torch.randn(4, 3, 16, 16), torch.arange(4) % 3),
        [f"features.1.denselayer{i}" for i in range(6)] + [f"features.2.denselayer{i}" for i in range(5)],
    ),
    "attributes": (Named, torch.randn(256, 32), ["first", "second", "third", "fourth"]),
    "nested": (
        Nested, torch.randn(256, 32), [f"trunk.body.{name}" for name in ("first", "second", "third", "fourth")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_units_are_where_the_bytes_are(name: str) -> None:
    torch.manual_seed(0)
    kind, batch, expected = CASES[name]
    model = kind()
    trace = tightfit.trace(model, batch)
    assert [unit.path for unit in trace.units] == expected
    assert saved_outside(trace) < 0.12  # what one unit hands to the next
    fake = tightfit.trace(model, batch, fake=True)
    assert [unit.path for unit in fake.units] == expected
    applied = tightfit.fit(model, batch, budget="70%")
    applied.remove()
    assert tightfit.verify(model, batch, applied.plan).passed


def test_a_cell_that_is_called_often_is_no_unit() -> None:
    """One plan would have to serve all of its calls."""

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = Gated()

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            for _ in range(10):
                inputs = self.cell(inputs)
            return inputs.square().mean()

    assert [unit.path for unit in tightfit.trace(Loop(), torch.randn(64, 32)).units] == [""]


def test_blocks_that_containers_show_stay_units() -> None:
    config = GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    tokens = torch.randint(64, (2, 32))
    trace = tightfit.trace(model, {"input_ids": tokens, "labels": tokens})
    assert [unit.path for unit in trace.units] == list(find_units(model)) == [f"transformer.h.{i}" for i in range(3)]


def test_units_that_are_asked_for_are_taken() -> None:
    model = Named()
    trace = tightfit.trace(model, torch.randn(64, 32), units=["first", "third"])
    assert [unit.path for unit in trace.units] == ["first", "third"]


def test_no_hook_stays() -> None:
    model = Dense()
    kind, batch, _ = CASES["dense"]
    before = len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_forward_pre_hooks)
    tightfit.trace(model, batch)
    with pytest.raises(tightfit.InvalidInput):
        tightfit.trace(kind(), torch.randn(2, 3, 16, 16))
    after = len(nn.modules.module._global_forward_hooks), len(nn.modules.module._global_forward_pre_hooks)
    assert before == after
