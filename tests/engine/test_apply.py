"""The engine on modules that could trip it: the same loss, gradients, buffers and random state, bit for bit."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import random
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tightfit
from tightfit.core import Action, Choice, InvalidInput, Plan, PlanMismatch, ReplayDiverged, Status, Trace, Unsupported
from tightfit.engine import Applied
from tightfit.plan import every_block, lowest
from tightfit.plan.program import kept_values, recipe
from tightfit.plan.simulate import simulate_choices
from tightfit.step.run import compute_loss
from tightfit.step.snapshot import undisturbed
from tightfit.verify.gradients import Outcome, differences
from tightfit.verify.peak import PeakMeter, static_bytes

WIDTH = 8


class Stack(nn.Module):
    """Blocks between two linear layers; the loss is a scalar."""

    def __init__(self, *blocks: nn.Module, frozen_start: bool = False) -> None:
        super().__init__()
        self.start = nn.Linear(WIDTH, WIDTH).requires_grad_(not frozen_start)
        self.blocks = nn.ModuleList(blocks)
        self.end = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.start(x)
        for block in self.blocks:
            x = block(x)
        return self.end(x).square().mean()


def plan_keeping(trace: Trace, keep: Callable[[str, int], bool]) -> Plan:
    """A plan in which value v of unit u is kept where `keep(u, v)`."""
    choices = []
    programs = {}
    for unit in trace.units:
        program = trace.programs[next(f.id for f in trace.frames if f.unit == unit.path)]
        programs[unit.digest] = program
        actions = tuple(Action.KEEP if keep(unit.path, v) else Action.RECOMPUTE for v in range(program.values))
        if unit.pinned:
            actions = (Action.KEEP,) * program.values
        recipe(program, kept_values(actions))
        choices.append(Choice(unit=unit.path, actions=actions, signature=unit.signature, program=unit.digest))
    line = simulate_choices(trace, tuple(choices))
    return Plan(
        budget_bytes=line.peak_bytes, choices=tuple(choices), status=Status.FEASIBLE, peak_bytes=line.peak_bytes,
        step_seconds=1.0, recompute_seconds=line.recompute_seconds, bound_seconds=0.0,
        recompute_flops=line.recompute_flops, forward_flops=1, unplanned_peak_bytes=line.peak_bytes,
        replays=line.replays, trace_digest=trace.digest, versions={}, programs=programs,
    )  # fmt: skip


def some_plans(trace: Trace) -> list[Plan]:
    """Keeping nothing (or, where that is impossible, as little as the planner can), and random keep sets."""
    draw = random.Random(0)
    plans = [every_block(trace)]
    for share in (0.0, *[0.5] * 4, *[0.85] * 3):
        with contextlib.suppress(Unsupported):  # this keep set would run something twice that must not
            plans.append(plan_keeping(trace, lambda unit, value, share=share: draw.random() < share))
    return plans


def observe(model: nn.Module, batch: Any, loss: Any = None) -> tuple[Outcome, torch.Tensor, torch.Tensor]:
    with undisturbed(model):
        torch.manual_seed(7)
        value = compute_loss(model, batch, loss)
        value.backward()
        return Outcome(model), value.detach(), torch.get_rng_state()


def check(
    model: nn.Module, batch: Any = None, *, loss: Any = None, units: Any = "blocks.*", fallbacks: int | None = 0
) -> Trace:
    """Every plan gives the plain step's gradients, buffers, loss and random state."""
    batch = torch.randn(6, WIDTH) if batch is None else batch
    model.train()
    expected = observe(model, batch, loss)
    trace = tightfit.trace(model, batch, loss=loss, units=units)
    for plan in some_plans(trace):
        with tightfit.apply(model, plan) as applied:
            found = observe(model, batch, loss)
            stats = applied.stats()
        assert not differences(expected[0], found[0])
        assert torch.equal(expected[1], found[1])
        assert torch.equal(expected[2], found[2]), "the random state after the step differs"
        if fallbacks is not None:
            assert stats.fallbacks == fallbacks
            assert stats.replays == plan.replays
    after = observe(model, batch, loss)
    assert not differences(expected[0], after[0])
    return trace


class Block(nn.Module):
    """A residual block around a function of the normed input and a linear layer."""

    def __init__(self, function: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.batch_norm = nn.BatchNorm1d(WIDTH)
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(self.function(self, self.inner(self.norm(x))))


def _slices(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    whole = torch.empty_like(x)
    whole[:, :3].copy_(torch.sigmoid(x[:, :3]))
    whole[:, 3:].copy_(x[:, 3:] * 2)
    return whole


def _mask(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x * torch.empty_like(x).bernoulli_(0.6).div_(0.6)


def _attention(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    heads = x.view(1, 6, 2, 4).transpose(1, 2)
    out = F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.2, is_causal=True)
    return out.transpose(1, 2).reshape(6, WIDTH)


def _number_read(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x * (1 + abs(float(x.detach().sum().item())))


def _routed(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    weight, expert = torch.softmax(x[:, :2], -1).max(-1)
    out = torch.zeros_like(x)
    for index in range(2):
        rows = (expert == index).nonzero().squeeze(-1)
        layer = (block.inner, block.outer)[index]
        out = out.index_add(0, rows, layer(x[rows]) * weight[rows, None])
    return out


class Exponential(torch.autograd.Function):
    """Saves one tensor the usual way and hides another in an attribute."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        out = x.clamp(max=2).exp()
        ctx.save_for_backward(out)
        ctx.hidden = x * 1.0
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (out,) = ctx.saved_tensors
        return grad * out * (ctx.hidden <= 2)


FUNCTIONS: dict[str, Callable[[nn.Module, torch.Tensor], torch.Tensor]] = {
    "gelu": lambda b, x: F.gelu(x),
    "dropout": lambda b, x: F.dropout(F.gelu(F.dropout(x, 0.2)), 0.3),
    "dropout in place": lambda b, x: F.dropout(x.sin(), 0.3, inplace=True),
    "feature dropout": lambda b, x: F.alpha_dropout(x, 0.2),
    "rrelu": lambda b, x: F.rrelu(x, training=True),
    "mask made in place": _mask,
    "attention with dropout": _attention,
    "chunk": lambda b, x: torch.cat([h.tanh() for h in x.chunk(2, 1)], 1),
    "split and unbind": lambda b, x: torch.stack(x.split(4, 1)).sum(0).repeat(1, 2) * torch.stack(x.unbind(0)),
    "transposes": lambda b, x: (x.t() @ x).softmax(-1)[:6] * x,
    "expand": lambda b, x: x[:1].expand(6, WIDTH) * x.sin(),
    "as_strided": lambda b, x: torch.as_strided(x, (6, WIDTH), (WIDTH, 1)) * x,
    "narrow and permute": lambda b, x: x.view(6, 2, 4).permute(1, 0, 2).reshape(6, WIDTH).cos(),
    "relu in place": lambda b, x: F.relu(x, inplace=True),
    "add in place": lambda b, x: x.sin().add_(1).mul_(0.5),
    "masked fill in place": lambda b, x: x.sin().masked_fill_(x.detach() > 0.5, 0.1),
    "index put in place": lambda b, x: x.sin().index_put_((torch.tensor([0, 2]),), torch.zeros(2, WIDTH)),
    "slices written": _slices,
    "out argument": lambda b, x: x * torch.mul(x.detach(), 2, out=torch.empty(6, WIDTH)),
    "batch norm": lambda b, x: F.relu(b.batch_norm(x), inplace=True),
    "number read": _number_read,
    "routed": _routed,
    "own autograd function": lambda b, x: Exponential.apply(x),
    "parameter reused": lambda b, x: F.linear(x * b.scale, b.inner.weight) * b.scale,
    "cast": lambda b, x: x.bfloat16().tanh().float() * x,
    "cumulative": lambda b, x: x.cumsum(0).sort(1).values,
    "constants": lambda b, x: x * torch.arange(WIDTH, dtype=torch.float32).softmax(0),
    "detached": lambda b, x: x * x.detach().tanh(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    torch.manual_seed(0)
    check(Stack(Block(FUNCTIONS[name]), Block(FUNCTIONS[name])))


@pytest.mark.parametrize("name", ["dropout", "batch norm", "attention with dropout", "slices written"])
def test_frozen_parts(name: str) -> None:
    torch.manual_seed(0)
    model = Stack(Block(FUNCTIONS[name]), Block(FUNCTIONS[name]), frozen_start=True)
    model.blocks[0].inner.requires_grad_(False)
    model.blocks[1].norm.requires_grad_(False)
    check(model)


def test_a_frozen_prefix_is_not_replayed() -> None:
    torch.manual_seed(0)
    model = Stack(*(Block(FUNCTIONS["dropout"]) for _ in range(3)), frozen_start=True)
    model.blocks[0].requires_grad_(False)
    model.blocks[1].requires_grad_(False)
    trace = check(model)
    assert plan_keeping(trace, lambda unit, value: False).replays == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Stack(Block(FUNCTIONS["dropout"]), Block(FUNCTIONS["gelu"])).to(dtype)
    check(model, torch.randn(6, WIDTH, dtype=dtype))


def _under_autocast(model: nn.Module, batch: Any) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss: torch.Tensor = model(batch)
        return loss.float()


@pytest.mark.parametrize("name", ["dropout", "parameter reused", "batch norm", "attention with dropout"])
def test_autocast(name: str) -> None:
    torch.manual_seed(0)
    check(Stack(Block(FUNCTIONS[name]), Block(FUNCTIONS[name])), loss=_under_autocast)


def test_a_module_called_twice_in_one_autocast() -> None:
    """The second call takes the weights' copies from autocast's cache, so it has fewer ops than the first."""

    def both(model: nn.Module, batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (model(batch).float() - model(batch.flip(0)).float()).square().mean()

    torch.manual_seed(0)
    check(Stack(Block(FUNCTIONS["gelu"]), Block(FUNCTIONS["dropout"])), loss=both)


class Conjugating(nn.Module):
    """Saves and reads conjugated and negated views of what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.cfloat) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.complex(x, x.sin()) @ self.weight
        h = h.conj() @ self.weight.mT.conj()
        h = (h / (1 + h.abs())).exp()
        minus = h.conj().imag
        return x + h.real * minus.cos() + h.mT.conj().real.mT @ minus.mT.exp() @ x


def test_conjugated_and_negated_views() -> None:
    torch.manual_seed(0)
    trace = check(Stack(Conjugating(), Conjugating(), Conjugating()))
    assert not any(unit.pinned for unit in trace.units)


@pytest.mark.parametrize("budget", ["60%", "80%"])
def test_the_peak_with_conjugated_views(budget: str) -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64, dtype=torch.cfloat) * 0.1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = (x @ self.weight).conj() @ self.weight.mT.conj()
            return (h / (1 + h.abs())).exp() - 1

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).abs().square().mean()

    torch.manual_seed(0)
    model, batch = nn.Sequential(*(Complex() for _ in range(4))), torch.randn(512, 64, dtype=torch.cfloat)
    plan = tightfit.plan(tightfit.trace(model, batch, loss=loss), budget)
    proof = tightfit.verify(model, batch, plan, loss=loss)
    assert proof.passed, proof.checks


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_peak_of_a_module_called_twice_in_one_autocast(share: float) -> None:
    def both(model: nn.Module, batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (model(batch).float() - model(batch.flip(0)).float()).square().mean()

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 256), nn.Linear(256, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.second(F.gelu(self.first(x)))

    torch.manual_seed(0)
    model, batch = nn.Sequential(*(Wide() for _ in range(4))), torch.randn(256, 64)
    trace = tightfit.trace(model, batch, loss=both)
    with pytest.raises(tightfit.BudgetInfeasible) as refused:
        tightfit.plan(trace, 1000)
    least = refused.value.least_bytes
    top = tightfit.plan(trace, "100%").unplanned_peak_bytes
    assert least < 0.75 * top
    proof = tightfit.verify(model, batch, tightfit.plan(trace, int(least + share * (top - least))), loss=both)
    assert proof.passed, proof.checks


class Cast(nn.Module):
    """Its weights, of which autocast makes copies, are large beside what passes through it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 512), nn.Linear(512, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(F.gelu(self.first(x)))


#: Without random states, which only tiny steps show.
book_recipe = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class Large(nn.Module):
    """The step's peak is in the loss's backward, outside autocast."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks, self.checkpointed = nn.ModuleList(Cast() for _ in range(6)), checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for block in self.blocks:
                x = book_recipe(block, x) if self.checkpointed else block(x)
        return x.float().repeat(1, 64).exp().logsumexp(0).square().mean()


def peak_of(model: nn.Module, batch: torch.Tensor) -> int:
    model(batch).backward()
    model.zero_grad()
    with PeakMeter("cpu") as meter:
        model(batch).backward()
    model.zero_grad()
    return static_bytes(model, None, batch) + meter.rise_bytes


def test_every_block_under_autocast_is_what_torch_checkpoints() -> None:
    """Autocast's copies of weights go with its context. Nobody holds them until the block's backward."""
    torch.manual_seed(0)
    model, batch = Large(), torch.randn(64, 64)
    plan = every_block(tightfit.trace(model, batch))
    torchs = Large(checkpointed=True)
    with tightfit.apply(model, plan) as applied:
        assert peak_of(model, batch) == pytest.approx(plan.peak_bytes, rel=1e-3)
        assert applied.stats().fallbacks == 0
    assert plan.peak_bytes == pytest.approx(peak_of(torchs, batch), rel=5e-3)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_the_peak_where_autocast_ends_before_the_loss(share: float) -> None:
    torch.manual_seed(0)
    model, batch = Large(), torch.randn(64, 64)
    trace = tightfit.trace(model, batch)
    least, top = lowest(trace).peak_bytes, tightfit.plan(trace, "100%").unplanned_peak_bytes
    plan = tightfit.plan(trace, int(least + share * (top - least)))
    assert plan.replays
    proof = tightfit.verify(model, batch, plan)
    assert proof.passed, proof.checks


def test_copies_that_autocast_made_are_made_again_for_each_backward() -> None:
    torch.manual_seed(0)
    model, batch = Large(), torch.randn(4, 64)

    def gradients() -> list[torch.Tensor]:
        loss = model(batch)
        for last in (False, True):
            loss.backward(retain_graph=not last)
        found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad()
        return found

    expected = gradients()
    with tightfit.apply(model, every_block(tightfit.trace(model, batch))) as applied:
        found = gradients()
        assert applied.stats().fallbacks == 0
    assert len(found) == 24 and all(map(torch.equal, expected, found))


def test_a_weight_that_changes_before_its_copy_is_made_again_is_an_error() -> None:
    torch.manual_seed(0)
    model, batch = Large(), torch.randn(4, 64)
    with tightfit.apply(model, every_block(tightfit.trace(model, batch))):
        loss = model(batch)
        with torch.no_grad():
            model.blocks[2].second.weight.mul_(2)  # type: ignore[operator,union-attr]
        with pytest.raises(RuntimeError, match=r"a weight of shape \[64, 512\], of which autocast made a copy"):
            loss.backward()


def test_autocast_switched_off_inside() -> None:
    def partly(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            y = block.inner(x.float())
        return block.inner(y).float() + y

    torch.manual_seed(0)
    check(Stack(Block(partly), Block(partly)), loss=_under_autocast)


def test_shared_weights_and_one_module_twice() -> None:
    torch.manual_seed(0)
    first, second = Block(FUNCTIONS["dropout"]), Block(FUNCTIONS["gelu"])
    second.inner.weight = first.inner.weight
    model = Stack(first, second)
    model.end = nn.Linear(WIDTH, WIDTH)
    model.end.weight = model.start.weight
    check(model)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block(FUNCTIONS["dropout"]), Block(FUNCTIONS["batch norm"])])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.start(x)
        for _ in range(3):
            for block in self.blocks:
                x = block(x)
        return x.square().mean()


def test_a_unit_called_three_times() -> None:
    torch.manual_seed(0)
    check(Twice())


def test_a_unit_called_with_other_shapes() -> None:
    class Shapes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Linear(WIDTH, WIDTH)
            self.blocks = nn.ModuleList([Block(FUNCTIONS["dropout"])])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.start(x)
            whole, part = self.blocks[0](x), self.blocks[0](x[:2])
            return whole.square().mean() + part.mean()

    torch.manual_seed(0)
    check(Shapes())


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor | None


@dataclass
class Record:
    value: torch.Tensor
    extra: dict[str, Any]


class Structured(nn.Module):
    """Takes and gives structures: keywords, numbers, None, lists, dataclasses, named tuples."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Any, *, scale: float, extras: list[Any], flag: bool = True) -> Any:
        if isinstance(x, Record):
            x = x.value + x.extra["side"]
        if isinstance(x, dict):
            x = x["value"] + x["side"]
        if isinstance(x, tuple):
            x = x[0] if x[1] is None else x[0] + x[1]
        y = F.dropout(self.inner(x), 0.2) * scale + extras[0]
        side = torch.tanh(y) if flag else y
        if self.form == "dataclass":
            return Record(value=y, extra={"side": side, "name": "x", "nothing": None})
        if self.form == "dict":
            return {"value": y, "side": side}
        if self.form == "none":
            return Pair(first=side, second=None)
        return Pair(first=y, second=side)


class StructuredStack(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.start = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Structured(form) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: Any = self.start(x)
        for index, block in enumerate(self.blocks):
            out = block(out, scale=0.5, extras=[x, None, "text"], flag=bool(index))
        if isinstance(out, Record):
            return out.value.square().mean() + out.extra["side"].mean()
        if isinstance(out, dict):
            return out["value"].square().mean()
        return out[0].square().mean()


@pytest.mark.parametrize("form", ["dataclass", "dict", "tuple", "none"])
def test_structures(form: str) -> None:
    torch.manual_seed(0)
    check(StructuredStack(form))


def test_inputs_that_require_grad_and_are_not_contiguous() -> None:
    torch.manual_seed(0)
    model = Stack(Block(FUNCTIONS["dropout"]), Block(FUNCTIONS["transposes"]))
    x = torch.randn(WIDTH, 6).t()
    check(model, x)
    leaf = torch.randn(6, WIDTH, requires_grad=True)
    model.start = nn.Identity()
    trace = tightfit.trace(model, leaf, units="blocks.*")
    torch.manual_seed(7)
    model(leaf).backward()
    expected, leaf.grad = leaf.grad, None
    for plan in some_plans(trace):
        with tightfit.apply(model, plan):
            torch.manual_seed(7)
            model(leaf).backward()
        assert torch.equal(expected, leaf.grad)
        leaf.grad = None


def test_recursion_and_units_inside_units() -> None:
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor, depth: int = 2) -> torch.Tensor:
            x = F.dropout(torch.tanh(self.inner(x)), 0.1)
            return x if depth == 0 else x + self(x, depth - 1)

    torch.manual_seed(0)
    check(Stack(Recursive(), Recursive()))


class Pyramid(nn.Module):
    """A U-Net: what the first blocks make is read again by the last."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, d, 3, padding=1), nn.BatchNorm2d(d), nn.ReLU(inplace=True))
            for c, d in ((3, 4), (4, 8), (8, 4), (8, 3))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.blocks[0](x)
        second = self.blocks[1](F.max_pool2d(first, 2))
        third = self.blocks[2](F.interpolate(second, scale_factor=2))
        return self.blocks[3](torch.cat([first, third], 1)).square().mean()


def test_u_net_and_resnet() -> None:
    torch.manual_seed(0)
    check(Pyramid(), torch.randn(2, 3, 8, 8))

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True),
                nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3),
            )  # fmt: skip

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.body(x)
            out += x
            return F.relu(out, inplace=True)

    class ResNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Residual() for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x.square().mean()

    check(ResNet(), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent(kind: Any) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = kind(WIDTH, WIDTH, num_layers=2, dropout=0.2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(self.layer(x)[0], 0.1)

    torch.manual_seed(0)
    check(Stack(Recurrent(), Recurrent()), torch.randn(2, 5, WIDTH))


# ------------------------------------------------------------------------------------- ways to run backward


@pytest.fixture
def fitted() -> Any:
    """A model with dropout and batch norm, its batch and a plan that drops much."""
    torch.manual_seed(0)
    model = Stack(Block(FUNCTIONS["dropout"]), Block(FUNCTIONS["batch norm"]), Block(FUNCTIONS["slices written"]))
    batch = torch.randn(6, WIDTH)
    trace = tightfit.trace(model, batch, units="blocks.*")
    return model, batch, some_plans(trace)


def with_and_without(fitted: Any, run: Callable[[nn.Module, torch.Tensor], Any]) -> None:
    """`run` returns tensors; they must be the same with every plan."""
    model, batch, plans = fitted
    state = copy.deepcopy(model.state_dict())

    def fresh() -> Any:
        model.load_state_dict(state)
        model.zero_grad()
        torch.manual_seed(7)
        returned = run(model, batch)
        return [t.clone() for t in returned], {n: p.grad for n, p in model.named_parameters()}, Outcome(model)

    expected = fresh()
    for plan in plans:
        with tightfit.apply(model, plan) as applied:
            found = fresh()
            assert applied.stats().fallbacks == 0
        assert all(torch.equal(a, b) for a, b in zip(expected[0], found[0], strict=True))
        assert not differences(expected[2], found[2])


def test_accumulation(fitted: Any) -> None:
    def run(model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
        for _ in range(3):
            model(batch).backward()
        return []

    with_and_without(fitted, run)


def test_two_forwards_then_two_backwards_in_reverse(fitted: Any) -> None:
    def run(model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
        first, second = model(batch), model(batch * 2)
        second.backward()
        first.backward()
        return []

    with_and_without(fitted, run)


def test_retain_graph(fitted: Any) -> None:
    def run(model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
        loss = model(batch)
        loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        loss.backward()
        return []

    with_and_without(fitted, run)


def test_retain_graph_gives_the_bytes_back_and_replays_again(fitted: Any) -> None:
    model, batch, plans = fitted
    with tightfit.apply(model, plans[0]) as applied:
        loss = model(batch)
        for times in (1, 2, 3):
            loss.backward(retain_graph=True)
            assert applied.stats().replays == times * plans[0].replays


def test_backward_after_the_graph_was_freed_is_an_error(fitted: Any) -> None:
    model, batch, plans = fitted
    with tightfit.apply(model, plans[0]):
        loss = model(batch)
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_autograd_grad_of_some(fitted: Any) -> None:
    def run(model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
        wanted = [model.blocks[1].inner.weight, model.end.bias]
        return list(torch.autograd.grad(model(batch), wanted))

    with_and_without(fitted, run)


def test_hooks_run_as_often_and_see_the_same(fitted: Any) -> None:
    def run(model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        handles = [
            model.blocks[1].register_full_backward_hook(lambda m, i, o: seen.append(o[0])),
            model.blocks[0].register_forward_hook(lambda m, i, o: seen.append(o.detach())),
            model.blocks[2].register_forward_pre_hook(lambda m, i: seen.append(i[0].detach())),
            model.blocks[0].inner.weight.register_hook(seen.append),
            model.blocks[2].outer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad)),
        ]
        model(batch).backward()
        for handle in handles:
            handle.remove()
        assert len(seen) == 5
        return seen

    with_and_without(fitted, run)


def test_backward_from_inside_a_hook(fitted: Any) -> None:
    def run(model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
        other = model(batch * 3)
        loss = model(batch)
        fired: list[int] = []

        def hook(grad: torch.Tensor) -> None:
            if not fired:
                fired.append(1)
                with torch.enable_grad():
                    other.backward()

        handle = model.blocks[1].outer.weight.register_hook(hook)
        loss.backward()
        handle.remove()
        return []

    with_and_without(fitted, run)


def test_eval_and_no_grad_do_nothing_special(fitted: Any) -> None:
    model, batch, plans = fitted
    model.eval()
    torch.manual_seed(7)
    expected = model(batch)
    with tightfit.apply(model, plans[0]) as applied, torch.no_grad():
        torch.manual_seed(7)
        assert torch.equal(model(batch), expected)
        assert applied.stats().frames == 0
        with torch.inference_mode():
            torch.manual_seed(7)
            assert torch.equal(model(batch), expected)


def test_double_backward_is_right_or_refused(fitted: Any) -> None:
    model, batch, plans = fitted

    def penalty() -> torch.Tensor:
        torch.manual_seed(7)
        x = batch.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(x), x, create_graph=True)
        grad.square().sum().backward()
        found = model.blocks[0].inner.weight.grad.clone()
        model.zero_grad()
        return found

    expected = penalty()
    for plan in plans:
        with tightfit.apply(model, plan):
            try:
                found = penalty()
            except (RuntimeError, Unsupported):
                model.zero_grad()
                continue
        assert torch.equal(found, expected)


# -------------------------------------------------------------------------------------- things that go wrong


def test_another_branch_than_planned_falls_back() -> None:
    class Branching(Block):
        wild = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x)
            return F.dropout(torch.tanh(x), 0.5) + self.inner(x) if self.wild else x

    torch.manual_seed(0)
    model = Stack(Branching(FUNCTIONS["dropout"]), Branching(FUNCTIONS["gelu"]))
    batch = torch.randn(6, WIDTH)
    plans = some_plans(tightfit.trace(model, batch, units="blocks.*"))
    Branching.wild = True
    expected = observe(model, batch)
    for plan in plans:
        with tightfit.apply(model, plan) as applied:
            found = observe(model, batch)
            assert applied.stats().fallbacks > 0
        assert not differences(expected[0], found[0])


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_other_batch_sizes_than_planned(fitted: Any, rows: int) -> None:
    torch.manual_seed(0)
    model = Stack(Block(FUNCTIONS["dropout"]), Block(FUNCTIONS["gelu"]))
    plans = some_plans(tightfit.trace(model, torch.randn(6, WIDTH), units="blocks.*"))
    batch = torch.randn(rows, WIDTH)
    expected = observe(model, batch)
    for plan in plans:
        with tightfit.apply(model, plan) as applied:
            found = observe(model, batch)
            assert applied.stats().fallbacks == 0
        assert not differences(expected[0], found[0])


def test_python_randomness_is_pinned() -> None:
    def shaky(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x * random.random())

    torch.manual_seed(0)
    random.seed(0)
    model = Stack(Block(shaky), Block(FUNCTIONS["gelu"]))
    trace = tightfit.trace(model, torch.randn(6, WIDTH), units="blocks.*")
    assert "Python" in trace.units[0].pinned
    assert not trace.units[1].pinned
    assert all(choice.keeps_all for choice in tightfit.plan(trace, "100%").choices)


def test_a_replay_that_does_something_else_is_an_error() -> None:
    calls: list[int] = []

    class Counting(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(1)  # no state of the module's own, which a replay finds as it was
            return super().forward(x).tanh() if len(calls) % 2 else super().forward(x).sin()

    torch.manual_seed(0)
    model = Stack(Counting(FUNCTIONS["gelu"]), Block(FUNCTIONS["gelu"]))
    x = torch.randn(6, WIDTH, requires_grad=True)
    out = tightfit.checkpoint(model.blocks[0], x)
    with pytest.raises(tightfit.ReplayDiverged, match="not do the same twice"):
        out.sum().backward()


def test_a_unit_that_changes_its_input_is_pinned_or_refused() -> None:
    def greedy(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x

    class Greedy(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.add_(1)
            return self.inner(x)

    torch.manual_seed(0)
    model = Stack(Greedy(greedy), Block(FUNCTIONS["gelu"]))
    trace = tightfit.trace(model, torch.randn(6, WIDTH), units="blocks.*")
    assert "input" in trace.units[0].pinned
    x = torch.randn(6, WIDTH)
    with pytest.raises(Unsupported, match="in place"):
        tightfit.checkpoint(model.blocks[0], x)


class Adding(nn.Module):
    """Autograd saves nothing of its input, so the caller may go on and change it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner((x + 1).sin())


def test_an_input_that_is_changed_later_is_pinned() -> None:
    class Greedy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Linear(WIDTH, WIDTH)
            self.blocks = nn.ModuleList([Adding(), Adding()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.start(x)
            y = self.blocks[0](x)
            x.add_(y.detach())
            return self.blocks[1](x + y).square().mean()

    torch.manual_seed(0)
    trace = check(Greedy(), fallbacks=None)
    assert "changed in place" in trace.units[0].pinned
    assert not trace.units[1].pinned


@pytest.mark.parametrize("normed", [nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm])
def test_parametrized_weights(normed: Any) -> None:
    torch.manual_seed(0)
    blocks = [Block(FUNCTIONS["dropout"]) for _ in range(2)]
    for block in blocks:
        normed(block.inner)
    check(Stack(*blocks), fallbacks=None)


def test_hooks_and_buffers_that_count() -> None:
    class Counting(Block):
        def __init__(self) -> None:
            super().__init__(FUNCTIONS["gelu"])
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("mean", torch.zeros(WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
            return super().forward(x)

    torch.manual_seed(0)
    check(Stack(Counting(), Counting()), fallbacks=None)


def test_wrapped_models_are_refused() -> None:
    model = Stack(Block(FUNCTIONS["gelu"]), Block(FUNCTIONS["gelu"]))
    with pytest.raises(Unsupported, match="DataParallel"):
        tightfit.trace(nn.DataParallel(model), torch.randn(6, WIDTH))


def test_a_parameter_changed_before_backward_is_an_error(fitted: Any) -> None:
    model, batch, plans = fitted
    with tightfit.apply(model, plans[0]):
        loss = model(batch)
        with torch.no_grad():
            model.blocks[1].inner.weight.add_(1)
        with pytest.raises(RuntimeError, match="inplace operation"):
            loss.backward()


def test_an_exception_in_forward_leaves_the_model_usable(fitted: Any) -> None:
    model, batch, plans = fitted
    expected = observe(model, batch)
    with tightfit.apply(model, plans[0]):
        with pytest.raises(RuntimeError):
            model(torch.randn(6, WIDTH + 1))
        found = observe(model, batch)
    assert not differences(expected[0], found[0])


# ----------------------------------------------------------------------------------------- on and off again


def test_remove_restores_the_model_exactly(fitted: Any) -> None:
    model, _, plans = fitted
    before = [dict(module.__dict__) for module in model.modules()]
    applied = tightfit.apply(model, plans[0])
    assert applied.active_units == ("blocks.0", "blocks.1", "blocks.2")
    applied.remove()
    applied.remove()
    assert [dict(module.__dict__) for module in model.modules()] == before


def test_units_that_keep_all_are_not_touched(fitted: Any) -> None:
    model, batch, _ = fitted
    plan = tightfit.plan(tightfit.trace(model, batch, units="blocks.*"), "100%")
    before = [dict(module.__dict__) for module in model.modules()]
    applied = tightfit.apply(model, plan)
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert applied.active_units == ()


def test_a_plan_for_another_model_names_the_unit(fitted: Any) -> None:
    model, _, plans = fitted
    with pytest.raises(PlanMismatch, match=r"blocks\.2"):
        tightfit.apply(Stack(*list(model.blocks)[:2]), plans[0])
    other = copy.deepcopy(model)
    other.blocks[1].inner = nn.Linear(WIDTH, WIDTH, bias=False)
    with pytest.raises(PlanMismatch, match=r"blocks\.1"):
        tightfit.apply(other, plans[0])
    other = copy.deepcopy(model)
    other.blocks[0].requires_grad_(False)
    with pytest.raises(PlanMismatch, match=r"blocks\.0"):
        tightfit.apply(other, plans[0])


def test_two_plans_at_once_are_refused(fitted: Any) -> None:
    model, _, plans = fitted
    with tightfit.apply(model, plans[0]), pytest.raises(InvalidInput, match="already"):
        tightfit.apply(model, plans[1])


def test_fit_is_trace_plan_apply(fitted: Any) -> None:
    model, _, _ = fitted
    batch = torch.randn(600, WIDTH)
    model.blocks[2].function = FUNCTIONS["gelu"]
    model.blocks[1].function = FUNCTIONS["gelu"]
    expected = observe(model, batch)
    applied = tightfit.fit(model, batch, budget="80%", units="blocks.*")
    assert applied.active_units
    with pytest.raises(InvalidInput, match="in force"):
        tightfit.trace(model, batch)
    assert isinstance(applied, Applied)
    assert not differences(expected[0], observe(model, batch)[0])
    applied.remove()


def test_nothing_outlives_the_step(fitted: Any) -> None:
    model, batch, plans = fitted
    gc.collect()
    gc.disable()
    try:
        for plan in plans:
            with tightfit.apply(model, plan):
                x = batch.clone()
                hidden: list[weakref.ref[Any]] = []
                handles = [
                    block.register_forward_hook(functools.partial(_watch_output, hidden)) for block in model.blocks
                ]
                watched = weakref.ref(x.untyped_storage())
                loss = model(x)
                loss.backward()
                del loss, x
                for handle in handles:
                    handle.remove()
                assert watched() is None, "an input outlives its step until the next garbage collection"
                assert all(reference() is None for reference in hidden)
            model.zero_grad()
    finally:
        gc.enable()


def _watch_output(into: list[weakref.ref[Any]], module: nn.Module, inputs: Any, out: torch.Tensor) -> None:
    into.append(weakref.ref(out))


@pytest.mark.parametrize("make", [every_block, lowest])
def test_a_weight_that_changes_behind_its_version_is_seen_in_the_first_replay(make: Callable[..., Plan]) -> None:
    torch.manual_seed(0)
    model, batch = Large(), torch.randn(64, 64)
    plan = make(tightfit.trace(model, batch))
    assert plan.replays
    with tightfit.apply(model, plan):
        loss = model(batch)
        for block in model.blocks:
            block.second.weight.data.mul_(2)  # type: ignore[operator,union-attr]
        with pytest.raises(ReplayDiverged):
            loss.backward()
