"""Backward in another thread than forward, and several threads at once.

A card's backward runs in a thread of its own, which has none of the forward thread's modes, thread-locals, autocast or
grad mode. On the CPU the same is so when backward is called in another thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tightfit
from tightfit.core import Action, Plan, Trace
from tightfit.engine.ambient import is_active
from tightfit.plan import every_block, simulate


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.dropout(self.up(self.norm(x)).sigmoid()))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def batch() -> torch.Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def elsewhere(function: Callable[[], Any]) -> Any:
    """What `function` returns or raises, called in a thread that is nobody else's."""
    found: list[Any] = []

    def called() -> None:
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=called)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def gradients(
    model: nn.Module, loss_of: Callable[[], torch.Tensor], backward: Callable[[torch.Tensor], Any]
) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    loss = loss_of()
    torch.rand(7)  # somebody draws between forward and backward
    backward(loss)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(map(torch.equal, one, other))


def everything_away(trace: Trace) -> Plan:
    plan = every_block(trace)
    choices = []
    for choice in plan.choices:
        program = trace.programs[next(f for f in trace.frames if f.unit == choice.unit).id]
        away = set(program.needed) - set(program.held)
        choices.append(
            dataclasses.replace(
                choice, actions=tuple(Action.OFFLOAD if v in away else a for v, a in enumerate(choice.actions))
            )
        )
    plan = dataclasses.replace(plan, choices=tuple(choices))
    line = simulate(trace, plan)
    return dataclasses.replace(plan, peak_bytes=line.peak_bytes, budget_bytes=line.peak_bytes)


PLANS: dict[str, Callable[[Trace], Plan]] = {"tape": every_block, "offload": everything_away}
SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "plain": contextlib.nullcontext,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("around", SURROUNDINGS.values(), ids=SURROUNDINGS.keys())
@pytest.mark.parametrize("plan_of", PLANS.values(), ids=PLANS.keys())
def test_backward_of_a_plan(plan_of: Callable[[Trace], Plan], around: Callable[[], Any]) -> None:
    model, x = Model(), batch()

    def loss(model: nn.Module = model, x: torch.Tensor = x) -> torch.Tensor:
        with around():
            return model(x).float()

    expected = gradients(model, loss, lambda loss: loss.backward())
    with tightfit.apply(model, plan_of(tightfit.trace(model, x, loss))) as applied:
        assert same(expected, gradients(model, loss, lambda loss: elsewhere(loss.backward)))
        after = torch.get_rng_state()
        assert applied.stats().fallbacks == 0 and applied.stats().held == 0
        assert applied.stats().rerun_ops > 0 or applied.pool.copied_bytes > 0
    gradients(model, loss, lambda loss: loss.backward())
    assert torch.equal(torch.get_rng_state(), after)  # what runs again leaves the generator as it is


@pytest.mark.parametrize("around", SURROUNDINGS.values(), ids=SURROUNDINGS.keys())
@pytest.mark.parametrize("keep", [None, ["addmm"]], ids=["whole", "keep"])
def test_backward_of_a_region(keep: list[str] | None, around: Callable[[], Any]) -> None:
    block, x = Block(), batch().requires_grad_()

    def loss(run: Callable[..., torch.Tensor]) -> torch.Tensor:
        with around(), torch.device("cpu"):
            return run(block, x).float().square().sum()

    expected = gradients(block, lambda: loss(lambda block, x: block(x)), lambda loss: loss.backward())
    for _ in range(2):  # the first call of a region with `keep` learns
        found = gradients(
            block,
            lambda: loss(lambda block, x: tightfit.checkpoint(block, x, keep=keep)),
            lambda loss: elsewhere(loss.backward),
        )
        assert same(expected, found)


def test_modes_of_the_caller_do_not_follow() -> None:
    """A dispatch mode that stands around backward sees none of what another thread runs again; nor does it need to."""

    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    model, x = Model(), batch()
    expected = gradients(model, lambda: model(x), lambda loss: loss.backward())
    with tightfit.apply(model, every_block(tightfit.trace(model, x))):

        def backward(loss: torch.Tensor) -> None:
            with Seen() as seen, torch.no_grad(), torch.inference_mode(False):
                elsewhere(loss.backward)
            assert seen.count == 0

        assert same(expected, gradients(model, lambda: model(x), backward))


def test_a_replay_of_one_thread_is_none_of_another() -> None:
    """Units inside a replay run as they are, in its thread only: a forward in another thread is still planned."""
    model, x = Model(), batch()
    entered, go_on = threading.Event(), threading.Event()
    in_replay: list[bool] = []

    def region(x: torch.Tensor) -> torch.Tensor:
        if entered.is_set() or threading.current_thread() is not threading.main_thread():
            in_replay.append(is_active())
            entered.set()  # the other thread goes on in the middle of the replay, not before it
            assert go_on.wait(30)
        return model(x)

    loss = tightfit.checkpoint(region, x.clone().requires_grad_())
    thread = threading.Thread(target=loss.backward)
    thread.start()
    assert entered.wait(30)
    try:
        assert in_replay == [True] and not is_active()
        other = Model()
        with tightfit.apply(other, every_block(tightfit.trace(other, x))) as applied:
            other(x)
            assert applied.stats().frames == 3
    finally:
        go_on.set()
        thread.join()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("plan_of", PLANS.values(), ids=PLANS.keys())
def test_several_threads_at_once(plan_of: Callable[[Trace], Plan]) -> None:
    """Each thread trains a model of its own; forward and backward of all of them are mixed."""
    x = batch()
    models = [Model().eval() for _ in range(3)]  # without dropout: the threads share one generator
    expected = gradients(models[0], lambda: models[0](x), lambda loss: loss.backward())
    start = threading.Barrier(len(models))
    found: dict[int, Any] = {}

    def train(index: int) -> None:
        model = models[index]
        start.wait(30)
        steps = []
        for _ in range(8):
            model.zero_grad()
            loss = model(x)
            loss.backward() if index else elsewhere(loss.backward)
            steps.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        found[index] = steps

    with contextlib.ExitStack() as stack:
        applied = [stack.enter_context(tightfit.apply(m, plan_of(tightfit.trace(m, x)))) for m in models]
        threads = [threading.Thread(target=train, args=(index,)) for index in range(len(models))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(each.stats().fallbacks == 0 for each in applied)
    assert len(found) == len(models)
    assert all(same(expected, step) for steps in found.values() for step in steps)


def test_one_model_in_several_threads() -> None:
    """Data parallel in threads: frames of one unit live at once, one for each thread."""
    model, x = Model().eval(), batch()
    parts = list(x.chunk(4))
    alone = [torch.autograd.grad(model(part), list(model.parameters())) for part in parts]
    with tightfit.apply(model, every_block(tightfit.trace(model, parts[0]))) as applied:
        found: dict[int, Any] = {}

        def step(index: int) -> None:
            for _ in range(5):
                found[index] = torch.autograd.grad(model(parts[index]), list(model.parameters()))

        threads = [threading.Thread(target=step, args=(index,)) for index in range(len(parts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert applied.stats().fallbacks == 0
    assert len(found) == len(parts)
    for index, expected in enumerate(alone):
        assert same(list(expected), list(found[index]))
