"""`verify` catches engines that cheat. Each saboteur changes the engine from outside and must be found out."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tightfit
import tightfit.engine
from tightfit.core import BudgetInfeasible, Plan, ReplayDiverged
from tightfit.engine import frame as engine
from tightfit.engine import tape
from tightfit.verify.peak import PeakMeter, static_bytes

WIDTH = 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.norm = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(F.dropout(F.gelu(self.norm(self.inner(x))), 0.3))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@pytest.fixture
def subject() -> tuple[nn.Module, torch.Tensor, torch.optim.Optimizer, Plan]:
    torch.manual_seed(0)
    model, batch = Model(), torch.randn(256, WIDTH)
    optimizer = torch.optim.AdamW(model.parameters())
    trace = tightfit.trace(model, batch, optimizer=optimizer, tiles=False)
    return model, batch, optimizer, tightfit.plan(trace, "55%")


def proof_of(subject: Any) -> Any:
    model, batch, optimizer, plan = subject
    return tightfit.verify(model, batch, plan, optimizer=optimizer)


def test_the_honest_engine_passes(subject: Any) -> None:
    assert subject[3].replays == 3
    proof = proof_of(subject)
    assert [check.name for check in proof.checks] == ["gradients", "buffers", "peak", "prediction", "time"]
    assert proof.passed
    assert proof.environment["torch"]


def sabotage_slots(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let every slot hand out `change(tensor)` where that is not None."""
    honest = engine._Slot.get

    def get(slot: Any) -> torch.Tensor:
        tensor = honest(slot)
        changed = change(tensor)
        return tensor if changed is None else changed

    monkeypatch.setattr(engine._Slot, "get", get)


def test_stale_tensor(subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[Any, torch.Tensor] = {}

    def stale(tensor: torch.Tensor) -> torch.Tensor | None:
        key = (tensor.shape, tensor.dtype)
        old = seen.get(key)
        seen[key] = tensor.clone()
        return old

    sabotage_slots(monkeypatch, stale)
    assert not proof_of(subject)["gradients"].passed


def test_zeros(subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage_slots(monkeypatch, torch.zeros_like)
    assert not proof_of(subject)["gradients"].passed


def test_wrong_strides(subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def sheared(tensor: torch.Tensor) -> torch.Tensor | None:
        if tensor.dim() == 2 and tensor.is_contiguous():
            return tensor.flatten().as_strided(tensor.shape, (1, tensor.shape[0]))
        return None

    sabotage_slots(monkeypatch, sheared)
    assert not proof_of(subject)["gradients"].passed


def test_last_bit(subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def nudged(tensor: torch.Tensor) -> torch.Tensor | None:
        if tensor.dtype is not torch.float32:
            return None
        bits = tensor.clone().view(torch.int32)
        bits.view(-1)[0] ^= 1
        return bits.view(torch.float32)

    sabotage_slots(monkeypatch, nudged)
    assert not proof_of(subject)["gradients"].passed


def test_wrong_random_state(subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, optimizer, _ = subject
    trace = tightfit.trace(model, batch, optimizer=optimizer, tiles=False)
    from tightfit.plan import every_block

    plan = every_block(trace)  # every mask is drawn again
    assert tightfit.verify(model, batch, plan).checks[0].passed
    honest = tape.Tape.finish

    def forgetful(made: Any) -> None:
        honest(made)
        for entry in made.entries.values():
            if entry.state is not None:
                entry.state = torch.get_rng_state()

    monkeypatch.setattr(tape.Tape, "finish", forgetful)
    tightfit.engine._checked.clear()
    with pytest.raises(ReplayDiverged, match="came out different"):  # the first frame of a unit is always checked
        tightfit.verify(model, batch, plan)
    monkeypatch.setattr(engine, "differs", lambda tensor, mark: False)
    assert not tightfit.verify(model, batch, plan)["gradients"].passed


def test_dropped_gradient(subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = engine.Frame.run

    def run(frame: Any) -> Any:
        out = honest(frame)
        return out.detach().requires_grad_() if frame.name == "blocks.1" else out

    monkeypatch.setattr(engine.Frame, "run", run)
    check = proof_of(subject)["gradients"]
    assert not check.passed
    assert "missing" in check.measured


def test_running_statistics_updated_twice(subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "spare_running_statistics", lambda func, args, kwargs: (args, kwargs))
    model, batch, optimizer, _ = subject
    trace = tightfit.trace(model, batch, optimizer=optimizer, tiles=False)
    from tightfit.plan import every_block

    check = tightfit.verify(model, batch, every_block(trace))["buffers"]
    assert not check.passed
    assert "running_mean" in check.measured


def test_an_engine_that_holds_everything(subject: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.Frame, "_pack", lambda frame, tensor: engine._Held(tensor))
    proof = proof_of(subject)
    assert proof["gradients"].passed
    assert not proof["peak"].passed
    assert not proof["prediction"].passed


def test_verify_leaves_no_mark(subject: Any) -> None:
    model, batch, optimizer, plan = subject
    model(batch).backward()
    optimizer.step()  # so that there is a state to be left alone, and gradients
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    gradients = [p.grad.clone() for p in model.parameters()]
    generator = torch.get_rng_state()
    tightfit.verify(model, batch, plan, optimizer=optimizer)
    assert all(torch.equal(before[0][key], value) for key, value in model.state_dict().items())
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(before[1]["state"][index][key], value) for key, value in state.items())
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, model.parameters(), strict=True))
    assert torch.equal(generator, torch.get_rng_state())


def test_an_optimizer_without_a_state_has_none_afterwards(subject: Any) -> None:
    _, _, optimizer, _ = subject
    proof_of(subject)
    assert not optimizer.state


def test_peak_meter_counts_what_was_allocated() -> None:
    older = torch.empty(1_000_000)
    with PeakMeter("cpu") as meter:
        first = torch.empty(250_000)
        second = torch.empty(500_000)
        del first
        third = torch.empty(100_000)
        del older
    assert meter.rise_bytes == 4 * 750_000
    del second, third


def test_peak_meter_is_not_misled_by_sizes_of_earlier_blocks() -> None:
    size = 1 << 24
    with PeakMeter("cpu"):
        seen = torch.empty(size)
    address = seen.data_ptr()
    del seen
    unseen = torch.empty(size)
    if unseen.data_ptr() != address:
        pytest.skip("the allocator gave another address")
    with PeakMeter("cpu") as meter:
        del unseen  # torch would report it with the size that it saw at this address before
        fresh = torch.empty(size)
    assert meter.rise_bytes == 4 * size
    del fresh


def test_static_bytes_counts_each_storage_once() -> None:
    layer = nn.Linear(10, 10)
    other = nn.Linear(10, 10)
    other.weight = layer.weight
    model = nn.Sequential(layer, other)
    assert static_bytes(model) == 4 * (100 + 10 + 10)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    model(torch.randn(2, 10)).sum().backward()
    assert static_bytes(model, optimizer, torch.empty(7)) == 2 * 4 * 120 + 28
    optimizer.step()
    assert static_bytes(model, optimizer) == 3 * 4 * 120


class _Looped(nn.Module):
    """Two blocks that are called three times each, the first time with what needs no gradient."""

    def __init__(self, branches: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Calm(branches) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for turn in range(3):
            for block in self.blocks:
                x = block(x, turn)
        return x.square().mean()


class _Calm(nn.Module):
    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.branches = branches

    def forward(self, x: torch.Tensor, turn: int) -> torch.Tensor:
        inner = self.inner(x)
        return x + self.outer(torch.tanh(inner) if self.branches and turn == 1 else F.gelu(inner))


@pytest.mark.parametrize("share", ["80%", "60%", "45%", "38%"])
def test_calls_of_one_unit_that_save_different_tensors_share_a_plan(share: str) -> None:
    torch.manual_seed(0)
    model, batch = _Looped(), torch.randn(1024, WIDTH)
    trace = tightfit.trace(model, batch, tiles=False)
    assert len({program.slots for program in trace.programs.values()}) == 2
    plan = tightfit.plan(trace, share)
    assert plan.replays
    proof = tightfit.verify(model, batch, plan)
    assert proof.passed, str(proof)
    assert "replayed whole" not in proof["time"].measured
    assert "off by +0.000%" in proof["prediction"].measured


def test_a_unit_whose_calls_take_different_branches_is_kept_whole_and_says_so() -> None:
    torch.manual_seed(0)
    model, batch = _Looped(branches=True), torch.randn(1024, WIDTH)
    trace = tightfit.trace(model, batch, tiles=False)
    assert all("different ops" in unit.pinned for unit in trace.units)
    with pytest.raises(BudgetInfeasible):
        tightfit.plan(trace, "80%")


# --------------------------------------------------------------------- a step that is not the same twice


class _Unsteady(torch.autograd.Function):
    """As a kernel that adds in any order: another rounding error in each backward."""

    turns = itertools.count(1)

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad * (1 + 1e-6 * math.sin(next(_Unsteady.turns)))


class Unsteady(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.tail = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = _Unsteady.apply(self.head(x))  # type: ignore[no-untyped-call]
        for block in self.blocks:
            x = block(x)
        return self.tail(x).square().mean()


@pytest.fixture
def unsteady() -> tuple[nn.Module, torch.Tensor, None, Plan]:
    torch.manual_seed(0)
    model, batch = Unsteady(), torch.randn(256, WIDTH)
    return model, batch, None, tightfit.plan(tightfit.trace(model, batch, tiles=False), "60%")


def test_what_varies_without_the_plan_is_named_and_held_to_its_own_repeats(unsteady: Any) -> None:
    assert unsteady[3].replays == 3
    check = proof_of(unsteady)["gradients"]
    assert check.passed
    assert "bit for bit, but for 2 that vary without the plan too (head.weight, head.bias)" in check.tolerance
    assert "4 times what its repeats differ by" in check.tolerance
    assert (
        check.measured == f"{len(list(unsteady[0].parameters())) - 2} identical, 2 no farther off than without the plan"
    )


@pytest.mark.parametrize("name", ["head.weight", "tail.weight", "blocks.1.inner.bias"])
def test_an_error_beside_what_varies_is_found(name: str, unsteady: Any) -> None:
    """More than a gradient varies by; the least there is, of one that does not vary."""
    model = unsteady[0]
    factor = 1.0001 if name.startswith("head") else 1 + 2**-23

    def wrong(grad: torch.Tensor) -> torch.Tensor:
        in_force = any(getattr(each.forward, "__tightfit__", False) for each in model.modules())
        return grad * factor if in_force else grad

    dict(model.named_parameters())[name].register_hook(wrong)
    check = proof_of(unsteady)["gradients"]
    assert not check.passed
    assert f"wrong: {name}" in check.measured


def test_a_first_step_that_sets_things_up_loosens_nothing(subject: Any) -> None:
    """Its gradients are far from the later ones, which are all the same: these are held to their bits."""
    model, batch, _, plan = subject
    steps = itertools.count()
    weight = model.blocks[0].inner.weight
    weight.register_hook(lambda grad: grad * 2 if not next(steps) else grad)
    assert tightfit.verify(model, batch, plan)["gradients"].tolerance == "none: bit for bit"
    steps = itertools.count()
    in_force = lambda: any(getattr(each.forward, "__tightfit__", False) for each in model.modules())  # noqa: E731
    weight.register_hook(lambda grad: grad * (1 + 2**-20) if in_force() else grad)
    assert not tightfit.verify(model, batch, plan)["gradients"].passed
