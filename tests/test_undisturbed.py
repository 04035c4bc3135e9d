"""`trace`, `fit`, `verify` and `measure` leave a model as they found it, whatever its steps write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tightfit
from tightfit.core import BudgetInfeasible, TightfitError
from tightfit.step.snapshot import random_states, restore_random_states, undisturbed
from tightfit.verify.measure import measure

WIDTH = 16


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(F.gelu(self.inner(x)))


class Reassigned(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(WIDTH))
        self.state, self.calls = torch.zeros(WIDTH), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
        self.state = self.state + self.average
        self.calls += 1
        return super().forward(x - self.average) * (1 + 0.1 * self.calls) + self.state


class InPlace(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.state = torch.zeros(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.state[2:].add_(1)
        return super().forward(x)


class Data(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.shadow = nn.Parameter(torch.zeros(2 * WIDTH, WIDTH), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shadow.data = self.shadow.data * 0.9 + self.inner.weight.data * 0.1
        return super().forward(x)


class OwnGenerator(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * torch.empty_like(x).bernoulli_(0.5, generator=self.generator))


def stack(kind: Callable[[], nn.Module]) -> nn.Sequential:
    return nn.Sequential(*(kind() for _ in range(3)))


class Momentum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = stack(Plain), stack(Plain).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for mine, its in zip(self.key.parameters(), self.query.parameters(), strict=True):
                mine.lerp_(its, 0.1)
            target = self.key(x)
        return self.query(x) * target


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.stack = nn.Embedding(20, WIDTH, max_norm=1.0), stack(Plain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stack(self.embedding(torch.arange(len(x)) % 20) + x)


def optimized_in_backward() -> nn.Module:
    model = stack(Plain)
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.1)

        def step(_: Any, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "buffers, attributes and counters reassigned": lambda: stack(Reassigned),
    "a plain tensor written in place": lambda: stack(InPlace),
    "a parameter's data replaced": lambda: stack(Data),
    "a generator of its own": lambda: stack(OwnGenerator),
    "a momentum encoder": Momentum,
    "an embedding with a norm": Normed,
    "an optimizer in backward": optimized_in_backward,
}


def state(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {name: (tensor, tensor.detach().clone()) for name, tensor in model.state_dict().items()}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Generator):
                found[f"{path}.{name}"] = value, value.get_state()
            elif isinstance(value, torch.Tensor):
                found[f"{path}.{name}"] = value, value.clone()
            elif isinstance(value, (int, float)):
                found[f"{path}.{name}"] = None, torch.tensor(value)
    return found


def mean_square(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def everything(model: nn.Module, batch: torch.Tensor, loss: Any) -> None:
    trace = tightfit.trace(model, batch, loss=loss)
    for budget in ("90%", "100%"):
        try:
            plan = tightfit.plan(trace, budget)
        except BudgetInfeasible:
            continue
        tightfit.verify(model, batch, plan, loss=loss)
        tightfit.fit(model, batch, budget, loss=loss).remove()
    try:
        measure(model, batch, budget="100%", loss=loss, repeats=1)
    except TightfitError:  # torch's own checkpointing counts some of these twice
        return


@pytest.mark.parametrize("name", MODELS)
def test_what_a_step_writes_is_put_back(name: str) -> None:
    torch.manual_seed(0)
    model, batch = MODELS[name](), torch.randn(32, WIDTH)
    before = state(model)
    everything(model, batch, mean_square)
    after = state(model)
    assert before.keys() == after.keys()
    for key, (item, content) in before.items():
        assert torch.equal(content, after[key][1]), key
        if isinstance(item, torch.Tensor) and key not in model.state_dict():
            assert after[key][0] is item, key


def test_what_only_the_loss_function_knows_is_put_back() -> None:
    torch.manual_seed(0)
    model, batch, head, norm = stack(Plain), torch.randn(32, WIDTH), nn.Linear(WIDTH, 3), nn.BatchNorm1d(3)
    head.weight.grad = kept = torch.ones_like(head.weight)

    def loss(subject: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        return norm(head(subject(inputs))).square().sum()

    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    everything(model, batch, loss)
    assert head.weight.grad is kept
    assert bool((kept == 1).all())
    assert head.bias.grad is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())


def test_weights_that_nobody_writes_are_not_copied() -> None:
    model, batch = stack(Plain), torch.randn(32, WIDTH)
    with undisturbed(model, batch) as restart, restart.watching():
        model(batch).square().mean().backward()
        model(batch).square().mean().backward()
        assert not restart._written


def test_hooks_that_a_first_forward_installs_are_installed_once() -> None:
    """transformers does so for outputs that it is asked for, and notes it in an attribute."""

    class Installs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.seen = nn.Linear(WIDTH, WIDTH), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not getattr(self, "installed", False):
                self.inner.register_forward_hook(lambda module, args, out: out * 2)
                self.installed = True
            return torch.tanh(self.inner(x)).square().mean()

    model, x = Installs(), torch.randn(4, WIDTH)
    recorded = tightfit.trace(model, x)
    assert not model.inner._forward_hooks and not hasattr(model, "installed")
    model(x)
    assert len(model.inner._forward_hooks) == 1
    assert [op.name for op in tightfit.trace(model, x).ops] == [op.name for op in recorded.ops]


def test_random_states_are_kept_outside_of_torchs_memory() -> None:
    """A step in two passes keeps them while its peak is counted: 5 KB, which is a percent of a small step."""
    states = random_states()
    drawn = torch.rand(3)
    assert not [name for name, state in states.items() if isinstance(state, torch.Tensor)]
    restore_random_states(states)
    assert torch.equal(torch.rand(3), drawn)
