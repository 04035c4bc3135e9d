"""Long units in segments: a loop in Python and a flat forward fit as well as what is checkpointed by hand."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from tests.plan.stacks import steady
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import tightfit
from tightfit.core import Action, Choice, Trace
from tightfit.plan import lowest
from tightfit.plan.program import kept_values, recipe
from tightfit.plan.segments import Segmented, segmented
from tightfit.plan.simulate import simulate_choices
from tightfit.verify.peak import measured_peak_bytes


class Loop(nn.Module):
    """A recurrent cell, called turn after turn. What it saves is changed in place, as PyTorch's own cell does."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(16, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, inputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        state = inputs.new_zeros(inputs.shape[0], 32)
        for turn in range(inputs.shape[1]):
            state = self.cell(inputs[:, turn], state)
        return functional.cross_entropy(self.head(state), target)


class Flat(nn.Module):
    """Layers written as one forward, with dropout: no module holds any of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(32, 32) / 6 for _ in range(32))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            hidden = functional.dropout(functional.silu(inputs @ weight), 0.1, self.training)
            inputs = functional.layer_norm(inputs + hidden.sigmoid() * hidden, (32,))
        return inputs.square().mean()


@pytest.fixture(scope="module")
def loop() -> tuple[nn.Module, Any, Trace]:
    torch.manual_seed(0)
    model, batch = Loop(), (torch.randn(48, 16, 16), torch.randint(4, (48,)))
    return model, batch, tightfit.trace(model, batch)


@pytest.fixture(scope="module")
def flat() -> tuple[nn.Module, Any, Trace]:
    torch.manual_seed(0)
    model, batch = Flat().train(), torch.randn(256, 32)
    return model, batch, tightfit.trace(model, batch)


def cut(trace: Trace, length: int = 32) -> Segmented:
    found = segmented(trace, length)
    assert found is not None
    return found


def trace_bytes(trace: Trace) -> int:
    return sum(trace.static_bytes.values())


def activations(trace: Trace, peak_bytes: int) -> int:
    return peak_bytes - trace_bytes(trace)


@pytest.mark.parametrize("name", ["loop", "flat"])
def test_a_cut_trace_is_the_same_step(name: str, request: pytest.FixtureRequest) -> None:
    _, _, trace = request.getfixturevalue(name)
    parts = cut(trace).trace
    whole, line = simulate_choices(trace, ()), simulate_choices(parts, ())
    assert line.live_bytes == whole.live_bytes
    assert [op.id for op in parts.ops] == [op.id for op in trace.ops]
    assert len(parts.units) >= 3
    assert {len(parts.programs[frame.id].steps) for frame in parts.frames} <= set(range(10, 65 + 16))


def test_what_a_segment_reads_of_another_is_kept(flat: tuple[nn.Module, Any, Trace]) -> None:
    """Every segment keeps as little as it can; as one unit, nothing leads beyond its segment."""
    _, _, trace = flat
    parts = cut(trace)
    choices = []
    for frame in parts.trace.frames:
        program = parts.trace.programs[frame.id]
        unit = next(unit for unit in parts.trace.units if unit.path == frame.unit)
        keep = set(program.held)
        actions = tuple(Action.KEEP if v in keep else Action.RECOMPUTE for v in range(program.values))
        choices.append(Choice(unit=unit.path, actions=actions))
    (joined,) = parts.joined(choices)
    program = trace.programs[0]
    runs = recipe(program, kept_values(joined.actions)).runs
    apart = [
        {segment.start + op for op in recipe(segment.program, kept_values(choice.actions)).runs}
        for segment, choice in zip(parts.segments[""], choices, strict=True)
    ]
    assert runs <= set().union(*apart)
    line = simulate_choices(trace, (joined,))
    assert activations(trace, line.peak_bytes) < 0.5 * activations(trace, simulate_choices(trace, ()).peak_bytes)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part"), [("loop", 0.25), ("flat", 0.4)])
def test_a_long_unit_fits_into_a_small_part(name: str, part: float, request: pytest.FixtureRequest) -> None:
    model, batch, trace = request.getfixturevalue(name)
    unplanned = activations(trace, tightfit.simulate(trace).peak_bytes)
    least = lowest(trace)
    assert activations(trace, least.peak_bytes) < part * unplanned
    assert least.recompute_flops <= least.forward_flops
    proof = tightfit.verify(model, batch, least)
    assert proof.passed, [check for check in proof.checks if not check.passed]
    middle = tightfit.plan(trace, trace_bytes(trace) + int(0.6 * unplanned))
    assert 0 < middle.recompute_seconds < least.recompute_seconds
    assert tightfit.verify(model, batch, middle).passed


def test_chunks_of_turns_by_hand_are_beaten(loop: tuple[nn.Module, Any, Trace]) -> None:
    """`torch.utils.checkpoint` around six of the sixteen turns at a time."""
    model, batch, trace = loop
    assert isinstance(model, Loop)
    cell, head = model.cell, model.head

    class Chunked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = cell, head

        def turns(self, state: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
            for turn in range(inputs.shape[1]):
                state = self.cell(inputs[:, turn], state)
            return state

        def forward(self, inputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            state = inputs.new_zeros(inputs.shape[0], 32)
            for begin in range(0, inputs.shape[1], 6):
                state = checkpoint(self.turns, state, inputs[:, begin : begin + 6], use_reentrant=False)
            return functional.cross_entropy(self.head(state), target)

    by_hand = measured_peak_bytes(Chunked(), batch, contextlib.nullcontext())
    assert lowest(trace).peak_bytes < by_hand


class Reading(nn.Module):
    """Every layer reads all that was made before it, as in a dense network, so several units would hold one value."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(Layer(64 * (i + 2)) for i in range(8))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        made = [inputs, inputs * 2]
        for layer in self.inner:
            made.append(layer(made))
        return torch.cat(made, -1).square().mean()


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, 64)

    def forward(self, before: list[torch.Tensor]) -> torch.Tensor:
        out: torch.Tensor = self.down(functional.silu(self.up(self.norm(torch.cat(before, -1)))))
        return out


def test_what_several_units_read_is_not_counted_for_each() -> None:
    torch.manual_seed(0)
    model, batch = Reading(), torch.randn(512, 64)
    trace = steady(tightfit.trace(model, batch))
    static = trace_bytes(trace)
    room = int(0.6 * (tightfit.simulate(trace).peak_bytes - static))
    plan = tightfit.plan(trace, static + room, levers="recompute")
    assert plan.recompute_seconds > 0
    assert plan.bound_seconds <= plan.recompute_seconds
    assert 0.9 * room < plan.peak_bytes - static <= room
    assert tightfit.verify(model, batch, plan).passed


class Scan(nn.Module):
    """A state space layer: a wide value is made at once, and a loop reads it turn by turn."""

    def __init__(self) -> None:
        super().__init__()
        self.decay, self.rates = nn.Parameter(torch.rand(8)), nn.Linear(8, 8)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        gates = torch.exp(-self.rates(inputs).sigmoid().unsqueeze(-1) * self.decay)
        state, found = gates.new_zeros(gates.shape[0], 8, 8), []
        for turn in range(inputs.shape[1]):
            state = gates[:, turn] * state + inputs[:, turn].unsqueeze(-1)
            found.append(state.sum(-1))
        return inputs + torch.stack(found, 1).tanh()


class Scans(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Scan() for _ in range(3))
        self.checkpoints = False

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            inputs = checkpoint(layer, inputs, use_reentrant=False) if self.checkpoints else layer(inputs)
        return inputs.square().mean()


@pytest.mark.slow  # a minute
def test_long_layers_are_planned_whole_as_well() -> None:
    """Between segments a wide value that all of them read is kept, in every layer. A checkpoint around a layer keeps
    none."""
    torch.manual_seed(0)
    model, batch = Scans(), torch.randn(16, 96, 8)
    trace = tightfit.trace(model, batch, tiles=False)
    assert segmented(trace, 32) is not None
    least = lowest(trace)
    model.checkpoints = True
    by_hand = measured_peak_bytes(model, batch, contextlib.nullcontext())
    model.checkpoints = False
    assert least.peak_bytes <= by_hand
    assert tightfit.verify(model, batch, least).passed


def test_blocks_are_planned_whole() -> None:
    """Where there are many blocks, however long: their frontiers stay exact."""
    torch.manual_seed(0)
    assert segmented(tightfit.trace(Flat().train(), torch.randn(16, 32), tiles=False), 32) is not None

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(13))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                inputs = block(inputs)
            return inputs.square().mean()

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(8))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            for _ in range(90):
                inputs = (inputs @ self.weight).tanh() + 0.01
            return inputs

    trace = tightfit.trace(Deep(), torch.randn(4, 8), tiles=False)
    assert min(len(program.steps) for program in trace.programs.values()) >= 256
    assert segmented(trace, 32) is None
