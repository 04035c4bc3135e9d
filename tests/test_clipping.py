"""Clipping by the total norm under plans that step in backward: torch's own numbers, at the price of a second pass."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tightfit.core import Lever, Phase
from tightfit.levers import used
from tightfit.levers.step_in_backward import hooks
from tightfit.plan import lowest
from tightfit.verify.peak import PeakMeter, static_bytes

BATCH = {"x": torch.randn(16, 96, generator=torch.Generator().manual_seed(0))}


class Model(nn.Module):
    """Dropout, running statistics, a tied weight and two dtypes: what a second pass could get wrong."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(96, 96)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(96, 384), nn.GELU(), nn.Dropout(0.2), nn.Linear(384, 96)) for _ in range(3)
        )
        self.norm = nn.BatchNorm1d(96)
        self.narrow = nn.Linear(96, 96, dtype=torch.bfloat16)
        self.last = nn.Linear(96, 96)
        self.last.weight = self.first.weight
        self.unused = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        hidden = self.narrow(self.norm(hidden).bfloat16()).float()
        return self.last(hidden).square().mean() * 5


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2),
}


def outcome(model: nn.Module, optimizer: torch.optim.Optimizer, step: Any, steps: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(7)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=3)
    found = []
    for _ in range(steps):
        found += [each.detach().clone() for each in step()]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    state = [v for each in optimizer.state.values() for v in each.values() if isinstance(v, torch.Tensor)]
    return [*found, *model.state_dict().values(), *state, torch.get_rng_state()]


def plain_outcome(name: str, max_norm: float) -> list[torch.Tensor]:
    model = Model()
    optimizer = OPTIMIZERS[name](model.parameters())

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        loss = model(**BATCH)
        loss.backward()
        return loss, torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    return outcome(model, optimizer, step)


def least_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    trace = tightfit.trace(model, BATCH, optimizer=optimizer)
    return lowest(trace, levers="recompute,step_in_backward").peak_bytes


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("max_norm", [0.05, 1e6])
@pytest.mark.parametrize("beside", ["step_in_backward", ""])
def test_bit_for_bit(name: str, max_norm: float, beside: str) -> None:
    expected = plain_outcome(name, max_norm)
    model = Model()
    optimizer = OPTIMIZERS[name](model.parameters())
    budget: Any = "100%"
    if beside:  # the least: replays run in both passes
        budget = least_bytes(model, optimizer)
    applied = tightfit.fit(model, BATCH, budget, optimizer=optimizer, beside=beside, max_norm=max_norm)
    assert (Lever.STEP_IN_BACKWARD in {each.lever for each in used(applied.plan)}) is bool(beside)
    assert not beside or applied.plan.replays  # replays run in both passes
    peak_bytes = 0

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal peak_bytes
        before_bytes = static_bytes(model, optimizer, BATCH)
        with PeakMeter("cpu") as meter:
            loss = applied.backward(BATCH)
        peak_bytes = max(peak_bytes, before_bytes + meter.rise_bytes)
        assert applied.total_norm is not None
        return loss, applied.total_norm

    found = outcome(model, optimizer, step)
    assert [torch.equal(*pair) for pair in zip(expected, found, strict=True)] == [True] * len(expected)
    assert peak_bytes <= applied.plan.budget_bytes * 1.01
    applied.remove()
    # as ever after it
    model(**BATCH).backward()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 0


def stepped_in_backward(**more: Any) -> tuple[Any, Any, Any]:
    model = Model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    budget = least_bytes(model, optimizer)
    return model, optimizer, tightfit.fit(model, BATCH, budget, optimizer=optimizer, beside="step_in_backward", **more)


def test_a_backward_that_would_not_clip_is_refused() -> None:
    model, optimizer, applied = stepped_in_backward(max_norm=1.0)
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(tightfit.Unsupported, match=r"call applied\.backward\(batch\)"):
        model(**BATCH).backward()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    optimizer.zero_grad()
    applied.backward(BATCH)
    # a loop that clips all the same is told the norm that was found, if it asks for the same
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) is applied.total_norm
    with pytest.raises(tightfit.Unsupported, match=r"fit\(max_norm="):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)


def test_an_error_in_either_pass_leaves_nothing() -> None:
    model, optimizer, applied = stepped_in_backward(max_norm=0.05)
    weights = copy.deepcopy(model.state_dict())
    calls = 0

    def fails(*_: Any) -> None:
        nonlocal calls
        calls += 1
        raise KeyError("stop")

    handle = model.norm.register_full_backward_pre_hook(fails)
    with pytest.raises(KeyError):
        applied.backward(BATCH)
    handle.remove()
    assert calls == 1 and all(torch.equal(v, weights[n]) for n, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    applied.backward(BATCH)
    optimizer.step()


def test_the_second_pass_has_its_price() -> None:
    _, _, applied = stepped_in_backward()
    seconds = applied.plan.slowdown
    applied.remove()
    _, _, clipped = stepped_in_backward(max_norm=1.0)
    assert clipped.plan.slowdown > seconds + 0.5  # forward and backward are most of a step


def test_the_second_pass_is_priced_with_its_replays() -> None:
    model = Model()
    trace = tightfit.trace(model, BATCH, optimizer=OPTIMIZERS["adamw"](model.parameters()))
    assert trace.optimizer is not None
    clipped = dataclasses.replace(trace, optimizer=dataclasses.replace(trace.optimizer, clipped=True))
    levers = "recompute,step_in_backward"
    least = lowest(trace, levers=levers).peak_bytes
    once, twice = (tightfit.plan(each, least, levers=levers) for each in (trace, clipped))
    assert once.recompute_seconds == twice.recompute_seconds > 0
    passes = sum(op.seconds for op in trace.ops if op.phase is not Phase.OPTIMIZER)
    assert twice.step_seconds - once.step_seconds == pytest.approx(passes + once.recompute_seconds)
    assert twice.added_seconds - once.added_seconds == pytest.approx(passes + once.recompute_seconds)


@pytest.mark.parametrize("max_norm", [0, -1.0, math.inf, math.nan, "1"])
def test_what_is_no_norm(max_norm: Any) -> None:
    with pytest.raises(tightfit.InvalidInput, match="no norm to clip to"):
        tightfit.fit(Model(), BATCH, "90%", max_norm=max_norm)


def test_a_loss_function_is_the_loops_own() -> None:
    model = nn.Linear(96, 8)
    kept = copy.deepcopy(model)
    applied = tightfit.fit(model, BATCH["x"], "100%", loss=lambda m, b: m(b).square().sum(), max_norm=0.5)
    applied.backward(BATCH["x"])
    kept(BATCH["x"]).square().sum().backward()
    torch.nn.utils.clip_grad_norm_(kept.parameters(), 0.5)
    assert kept.weight.grad is not None and model.weight.grad is not None
    assert torch.equal(kept.weight.grad, model.weight.grad)


def test_a_longer_batch_and_a_frozen_layer_are_planned_for_in_the_pass() -> None:
    """The plan is made anew in the forward of the first pass, which steps nothing."""
    longer = {"x": torch.randn(40, 96, generator=torch.Generator().manual_seed(1))}

    def trained(model: nn.Module, optimizer: torch.optim.Optimizer, step: Any) -> list[torch.Tensor]:
        torch.manual_seed(3)
        found = []
        for turn, batch in enumerate((BATCH, longer, BATCH, BATCH)):
            if turn == 3:
                model.blocks[0].requires_grad_(False)  # type: ignore[index]
            found.append(step(batch).detach().clone())
            optimizer.step()
            optimizer.zero_grad()
        return [*found, *(v.clone() for v in model.state_dict().values()), torch.get_rng_state()]

    plain = Model()
    optimizer = OPTIMIZERS["adamw"](plain.parameters())

    def by_hand(batch: Any) -> torch.Tensor:
        loss = plain(**batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        return loss  # type: ignore[no-any-return]

    expected = trained(plain, optimizer, by_hand)
    model = Model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    trace = tightfit.trace(model, longer, optimizer=optimizer)
    budget = lowest(trace, levers="recompute,step_in_backward").peak_bytes
    applied = tightfit.fit(
        model, BATCH, budget, optimizer=optimizer, levers="recompute,step_in_backward,optimizer_chunks", max_norm=0.05
    )
    found = trained(model, optimizer, applied.backward)
    assert [torch.equal(*pair) for pair in zip(expected, found, strict=True)] == [True] * len(expected)
    applied.remove()
    static = tightfit.trace(model, BATCH, optimizer=optimizer).static_bytes["optimizer_state"]
    held = sum(v.nbytes for each in optimizer.state.values() for v in each.values() if isinstance(v, torch.Tensor))
    never_used = sum(2 * p.nbytes + 4 for p in model.unused.parameters())  # has no state as long as it has no gradient
    assert static == held + never_used  # what was trained before still has its state


class Hidden(nn.Module):
    """What a first pass may leave: a weight that follows another, a generator of its own, a leaf outside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Model()
        self.slow = nn.Linear(96, 96).requires_grad_(False)
        self.average = torch.zeros(96)
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.slow.weight.lerp_(self.inner.first.weight, 0.1)
            self.average.mul_(0.9).add_(x.mean(0))
        noise = torch.rand(96, generator=self.generator)
        return self.inner(x + self.average + noise) + self.slow(x).square().mean()  # type: ignore[no-any-return]


def test_the_first_pass_leaves_no_mark() -> None:
    results = []
    for clips in (False, True):
        model, weight = Hidden(), torch.tensor(1.5, requires_grad=True)
        optimizer = OPTIMIZERS["adamw"]([p for p in model.parameters() if p.requires_grad])

        def loss(subject: nn.Module, batch: Any, weight: torch.Tensor = weight) -> torch.Tensor:
            return subject(**batch) * weight  # type: ignore[no-any-return]

        def by_hand(model: Any = model, loss: Any = loss) -> tuple[torch.Tensor, torch.Tensor]:
            found = loss(model, BATCH)
            found.backward()
            return found, torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)

        step: Any = by_hand
        if clips:
            trace = tightfit.trace(model, BATCH, loss=loss, optimizer=optimizer)
            budget = lowest(trace, levers="recompute,step_in_backward").peak_bytes
            applied = tightfit.fit(
                model, BATCH, budget, loss=loss, optimizer=optimizer, beside="step_in_backward", max_norm=0.05
            )
            assert applied.plan.settings["step_in_backward"]
            step = lambda applied=applied: (applied.backward(BATCH), applied.total_norm)  # noqa: E731
        results.append([*outcome(model, optimizer, step), model.average, model.generator.get_state(), weight.grad])
    assert [torch.equal(*pair) for pair in zip(*results, strict=True)] == [True] * len(results[0])


def test_a_norm_of_other_parameters_is_not_this_one() -> None:
    model, _, applied = stepped_in_backward(max_norm=1.0)
    other = nn.Linear(3, 3)
    other.weight.grad = torch.ones(3, 3)
    applied.backward(BATCH)
    for asked in ([*model.parameters(), *other.parameters()], list(model.first.parameters())):
        with pytest.raises(tightfit.Unsupported, match="finds no gradients"):
            torch.nn.utils.clip_grad_norm_(asked, 1.0)


def a_clipped_plan() -> tuple[Any, Any, Any]:
    model, optimizer, applied = stepped_in_backward(max_norm=0.05)
    applied.remove()
    assert "step_in_backward" in applied.plan.settings and applied.plan.replays
    return model, optimizer, applied.plan


def test_verify_compares_the_step_as_it_is_clipped() -> None:
    model, optimizer, plan = a_clipped_plan()
    proof = tightfit.verify(model, BATCH, plan, optimizer=optimizer, max_norm=0.05)
    assert proof.passed, str(proof)
    assert proof["optimizer"].passed and proof["prediction"].passed
    for max_norm in (0, math.nan):
        with pytest.raises(tightfit.InvalidInput, match="no norm to clip to"):
            tightfit.verify(model, BATCH, plan, optimizer=optimizer, max_norm=max_norm)


@pytest.mark.parametrize("sabotage", ["a wrong norm", "no clipping"])
def test_verify_finds_clipping_that_is_wrong(sabotage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, plan = a_clipped_plan()
    honest = hooks._Step.measured_norm
    if sabotage == "a wrong norm":
        monkeypatch.setattr(hooks._Step, "measured_norm", lambda self, given: honest(self, given) * 1.001)
    else:
        monkeypatch.setattr(hooks._Step, "clipping", lambda *_: contextlib.nullcontext())
        monkeypatch.setattr(hooks._Step, "limit", None, raising=False)
    proof = tightfit.verify(model, BATCH, plan, optimizer=optimizer, max_norm=0.05)
    assert [check.name for check in proof.checks if not check.passed and check.name != "prediction"] == ["optimizer"]
