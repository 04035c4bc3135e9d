"""A forward that leaves the plan runs again in Python: same values, same state after it, or an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tightfit
from tightfit.core import ReplayDiverged
from tightfit.engine import Applied
from tightfit.plan import every_block
from tightfit.verify.gradients import Outcome, differences

WIDTH = 16


class Net(nn.Module):
    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


class Block(nn.Module):
    """Takes another branch than in the trace when `other` is set; subclasses do something with state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.other = False

    def before(self, h: torch.Tensor) -> torch.Tensor:
        return h

    def after(self, h: torch.Tensor) -> torch.Tensor:
        return h

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.sin(self.before(self.first(x)))
        h = torch.relu(h) if self.other else F.gelu(h)
        return x + self.second(torch.tanh(self.after(h)))


def step(model: nn.Module, batch: torch.Tensor, other: bool) -> Outcome:
    for block in model.blocks:
        block.other = other
    model.zero_grad()
    model(batch).backward()
    return Outcome(model)


def both(make: Callable[[], nn.Module], steps: tuple[bool, ...] = (True,)) -> tuple[Any, Any, Applied]:
    """Models and outcomes of the steps without and with a plan; `True` is a step off the plan."""
    found = []
    for planned in (False, True):
        torch.manual_seed(0)
        model, batch = Net(make), torch.randn(8, WIDTH)
        plan = every_block(tightfit.trace(model, batch))
        model = Net(make)  # what the trace did to counters is not of interest
        applied = tightfit.apply(model, plan)
        if not planned:
            applied.remove()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
        found.append((model, [step(model, batch, other) for other in steps]))
    return *found, applied


class CountsAfter(Block):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def after(self, h: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return h * (1 + 0.1 * self.calls)


class CountsBefore(CountsAfter):
    """The counter changes a value that was saved before the plan was left, and by a trick none after it."""

    def before(self, h: torch.Tensor) -> torch.Tensor:
        return CountsAfter.after(self, h)

    def after(self, h: torch.Tensor) -> torch.Tensor:
        return h - h.detach()


class Smooths(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2 * WIDTH))

    def after(self, h: torch.Tensor) -> torch.Tensor:
        self.mean = 0.5 * self.mean + h.detach().mean(0)
        return h * self.mean


@pytest.mark.parametrize("make", [CountsAfter, CountsBefore, Smooths])
@pytest.mark.parametrize("steps", [(True,), (False, True), (False, True, False, True)])
def test_state_that_changes_values_is_an_error(make: Callable[[], nn.Module], steps: tuple[bool, ...]) -> None:
    with pytest.raises(ReplayDiverged, match=r"blocks\.2 does not do the same twice: saved tensor"):
        both(make, steps)


class KeepsBooks(Block):
    """State of every kind, none of which changes what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.sums, self.named, self.kinds = 0, [], {}, set()
        self.inner = nn.Module()
        self.inner.register_buffer("mean", torch.zeros(2 * WIDTH))
        self.inner.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.last = torch.zeros(1)

    def after(self, h: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.sums.append(float(h.detach().sum()))
        self.named[str(self.calls)] = self.calls
        self.kinds.add(self.calls)
        self.inner.mean = 0.5 * self.inner.mean + h.detach().mean(0)
        self.inner.count += 1
        self.inner.seen = self.calls
        self.last = h.detach().mean()
        return h


def test_state_ends_as_in_the_plain_step() -> None:
    (plain, expected), (planned, found), applied = both(KeepsBooks, (True, True))
    assert applied.stats().fallbacks == 6
    assert not any(differences(a, b) for a, b in zip(expected, found, strict=True))
    for one, other in zip(plain.blocks, planned.blocks, strict=True):
        assert (one.calls, one.sums, one.named, one.kinds) == (other.calls, other.sums, other.named, other.kinds)
        assert one.inner.seen == other.inner.seen == 2
        assert torch.equal(one.last, other.last)


def test_stateless_branches_fall_back() -> None:
    (_, expected), (_, found), applied = both(Block, (True, False, True))
    assert applied.stats().fallbacks == 6
    assert not any(differences(a, b) for a, b in zip(expected, found, strict=True))


class Experts(nn.Module):
    """Which experts run, and on how many rows, depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(4))
        self.other = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores, chosen = self.router(F.dropout(x, 0.1)).softmax(-1).topk(2 - self.other)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == i)
            if len(rows):
                out.index_add_(0, rows, F.dropout(expert(x[rows]), 0.1) * scores[rows, place, None])
        return x + out


def test_another_routing_falls_back() -> None:
    (_, expected), (_, found), applied = both(Experts, (True, False, True))
    assert applied.stats().fallbacks > 0
    assert not any(differences(a, b) for a, b in zip(expected, found, strict=True))


def test_a_region_with_state_of_its_module_finds_it_as_it_was() -> None:
    block, x = CountsAfter(), torch.randn(8, WIDTH)
    gradients = []
    for checkpointed in (False, True):
        block.calls = 0
        block.zero_grad()
        (tightfit.checkpoint(block, x) if checkpointed else block(x)).sum().backward()
        assert block.calls == 1
        gradients.append([p.grad.clone() for p in block.parameters() if p.grad is not None])
    assert gradients[0] and all(map(torch.equal, *gradients))


def test_a_region_with_state_elsewhere_is_an_error() -> None:
    block, x, calls = CountsAfter(), torch.randn(8, WIDTH), []

    def region(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return block(x * len(calls)).exp()  # type: ignore[no-any-return]

    out = tightfit.checkpoint(region, x)
    with pytest.raises(ReplayDiverged, match="other values in replay"):
        out.sum().backward()


class Casts(Block):
    """Copies of one weight in two dtypes, one of them changed where it lies."""

    def after(self, h: torch.Tensor) -> torch.Tensor:
        weight = self.second.weight
        half, double = weight.to(torch.bfloat16), weight.to(torch.float64)
        with torch.no_grad():
            half.mul_(2)
        wide = (h.double() @ double.mT @ double.exp()).float()
        return (wide.bfloat16() @ half.mT @ half.exp()).float() + h


@pytest.mark.parametrize("steps", [(True, True), (False, False)])
def test_casts_of_a_weight(steps: tuple[bool, ...]) -> None:
    (_, expected), (_, found), applied = both(Casts, steps)
    assert applied.stats().replays > 0
    assert not any(differences(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("leaf", [False, True])
def test_a_fallback_under_autocast(leaf: bool, cache: bool) -> None:
    """The unit's input is cast too; in a replay it must not look like a weight."""
    torch.manual_seed(0)
    model, batch = Net(Block), torch.randn(8, WIDTH, requires_grad=leaf)

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
            return model(batch) + model(batch.flip(0)).float()

    def run() -> Outcome:
        model.zero_grad()
        loss(model, batch).backward()
        return Outcome(model)

    plan = every_block(tightfit.trace(model, batch, loss=loss))
    for block in model.blocks:
        block.other = True
    expected = run()
    with tightfit.apply(model, plan) as applied:
        found = run()
        assert applied.stats().fallbacks > 0
    assert not differences(expected, found)


class Normed(Block):
    """Counts in a buffer, in place, and reads the count to average over all batches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2 * WIDTH, momentum=None)

    def after(self, h: torch.Tensor) -> torch.Tensor:
        return self.norm(h)


class Centred(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2 * WIDTH))

    def after(self, h: torch.Tensor) -> torch.Tensor:
        self.mean.lerp_(h.detach().mean(0), 0.1)
        return h - self.mean.exp() * h


@pytest.mark.parametrize("make", [Normed, Centred])
def test_a_buffer_that_is_updated_in_place_and_then_read(make: Callable[[], nn.Module]) -> None:
    (_, expected), (_, found), applied = both(make, (True, True))
    assert applied.stats().fallbacks == 6
    assert not any(differences(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("again", [True, False])
def test_a_buffer_that_was_read_and_is_gone(again: bool) -> None:
    class Late(Centred):
        def after(self, h: torch.Tensor) -> torch.Tensor:
            h = super().after(h)
            if again:
                self.mean.mul_(2)
            return h

    torch.manual_seed(0)
    model, batch = Net(Late), torch.randn(8, WIDTH)
    with tightfit.apply(model, every_block(tightfit.trace(model, batch))):
        for block in model.blocks:
            block.other = True
        loss = model(batch)
        if not again:
            model(batch)
        with pytest.raises(ReplayDiverged, match=r"what it read is gone|other values in replay"):
            loss.backward()


def test_a_region_with_batch_norm() -> None:
    torch.manual_seed(0)
    block, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.GELU()), torch.randn(8, WIDTH)

    def run(through: Callable[..., Any]) -> Outcome:
        block[1].reset_running_stats()
        block.zero_grad()
        through(block, x).square().sum().backward()
        return Outcome(block)

    assert not differences(run(lambda function, *args: function(*args)), run(tightfit.checkpoint))
