"""Frozen weights in host memory: the same bits with any of them away, a peak as the referee says, or a word."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tightfit
from tightfit.core import BudgetInfeasible, InvalidInput, Lever, Plan, PlanMismatch, ReplayDiverged, Trace, dumps, loads
from tightfit.engine import apply
from tightfit.levers.stream_weights import DEFINITION as STREAM
from tightfit.levers.stream_weights import host
from tightfit.plan import lowest, simulate
from tightfit.plan.effort import THOROUGH
from tightfit.plan.planning import feasible
from tightfit.plan.ways import way_of
from tightfit.step.mapped import Mapped
from tightfit.step.placement import in_host_bytes
from tightfit.step.run import is_elsewhere
from tightfit.step.weights import frozen_modules
from tightfit.verify.peak import measured_peak_bytes, static_bytes

WIDTH, WORDS = 48, 96
EXACT = "recompute,loss_in_place,nest,optimizer_chunks,stream_weights"


class Adapted(nn.Module):
    """A block whose own weights are frozen, with a trained path of low rank beside them."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.first, self.second = nn.Linear(width, 4, bias=False), nn.Linear(4, width, bias=False)
        self.drop = nn.Dropout(0.1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden)
        own = self.down(nn.functional.gelu(self.up(normed)))
        return hidden + own + self.second(self.first(self.drop(normed)))


class Model(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH).requires_grad_(False)
        self.blocks = nn.ModuleList(Adapted() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, WORDS, bias=False).requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), ids.flatten())


def adapted() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Model(), torch.randint(0, WORDS, (2, 24))


@functools.cache
def plan_of_adapted() -> Plan:
    """Everything streamed, in the model of `adapted`."""
    return all_streamed(tightfit.trace(*adapted()))


def all_streamed(trace: Trace) -> Plan:
    """Nothing recomputed, everything streamed that can be."""
    step = list(STREAM.variants(tightfit.levers.as_recorded(trace)))[-1]
    plan = tightfit.plan(trace, simulate(trace).peak_bytes, levers="recompute")
    return dataclasses.replace(plan, peak_bytes=simulate(step.trace).peak_bytes, settings=step.decided["settings"])


@contextlib.contextmanager
def in_force(model: nn.Module, plan: Plan, optimizer: Any) -> Iterator[None]:
    with apply(model, plan, optimizer=optimizer):
        yield


def measured(model: nn.Module, batch: Any, plan: Plan, optimizer: Any = None) -> int:
    return measured_peak_bytes(model, batch, in_force(model, plan, optimizer), optimizer=optimizer)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def stepped(model: nn.Module, batch: Any, plan: Plan | None, steps: int) -> list[torch.Tensor]:
    """Losses, gradients and trained weights of so many steps of a copy of `model`."""
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(trained(model))
    found = []
    with contextlib.nullcontext() if plan is None else apply(model, plan, optimizer=optimizer):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(batch)
            loss.backward()
            found += [loss.detach(), *(p.grad.clone() for p in trained(model) if p.grad is not None)]
            optimizer.step()
        found += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return [*found, *(p.detach().clone() for p in model.parameters())]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ------------------------------------------------------------------------------------------ plans


def test_the_trace_knows_what_can_be_streamed_and_when_it_is_read() -> None:
    model, batch = adapted()
    trace = tightfit.trace(model, batch)
    modules = {each.module: each for each in trace.frozen}
    of_blocks = {f"blocks.{i}.{name}" for i in range(2) for name in ("up", "down", "norm")}
    assert set(modules) == {"embedding", "head", *of_blocks}
    up = modules["blocks.0.up"]
    ((first, end),) = up.spans
    assert {op.name for op in trace.ops[first:end]} >= {"aten.addmm.default"}
    assert len(up.values) == 2  # weight and bias
    assert trace.values[up.values[0]].shape == (4 * WIDTH, WIDTH)
    old = loads(Trace, dumps(dataclasses.replace(trace, frozen=())).replace('"frozen": [],', ""), source="old")
    assert old.frozen == ()
    assert not list(STREAM.variants(tightfit.levers.as_recorded(old)))


def test_everything_streamed_leaves_one_modules_copy_on_the_device() -> None:
    model, batch = adapted()
    trace = tightfit.trace(model, batch)
    plan = all_streamed(trace)
    frozen = sum(p.numel() * 4 for p in model.parameters() if not p.requires_grad)
    before = static_bytes(model)
    with apply(model, plan):
        assert before - static_bytes(model) == frozen
        assert all(is_elsewhere(p) != p.requires_grad for p in model.parameters())
    assert static_bytes(model) == before
    assert measured(model, batch, plan) == pytest.approx(plan.peak_bytes, rel=1e-3)
    assert plan.peak_bytes < simulate(trace).peak_bytes - frozen + max(
        each.size_bytes for each in frozen_modules(model)
    )


def test_a_peak_at_a_copy_that_backward_reads_is_predicted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, WIDTH), nn.Linear(WIDTH, 20 * WIDTH, bias=False).requires_grad_(False))
    batch = torch.randn(2, 8)
    trace = tightfit.trace(model, batch, loss=lambda model, batch: model(batch).square().mean(), units=["0"])
    plan = all_streamed(trace)
    line = simulate(trace, plan)
    assert line.peak_owner.startswith("backward")
    found = measured_peak_bytes(
        model, batch, in_force(model, plan, None), loss=lambda model, batch: model(batch).square().mean()
    )
    assert found == pytest.approx(plan.peak_bytes, rel=1e-3)


def test_a_budget_between_is_used_and_time_falls_with_it() -> None:
    model, batch = adapted()
    trace = tightfit.trace(model, batch)
    least = simulate(trace, all_streamed(trace)).peak_bytes
    most = simulate(trace).peak_bytes
    seconds, host_bytes = [], []
    for k in range(10):
        budget = least + (most - least) * k // 9
        plan = tightfit.plan(trace, budget, levers="stream_weights")
        assert simulate(trace, plan).peak_bytes == plan.peak_bytes <= budget
        seconds.append(plan.added_seconds)
        host_bytes.append(int(plan.settings.get("stream_weights", "0").split()[0]))
        # what is left is less than the largest that is streamed
        left = budget - plan.peak_bytes
        sizes = [e.size_bytes for e in frozen_modules(model) if e.path in plan.settings.get("stream_weights", "")]
        assert left < max(sizes, default=most)
        assert loads(Plan, dumps(plan), source="plan") == plan
    assert seconds == sorted(seconds, reverse=True)
    assert host_bytes == sorted(host_bytes, reverse=True)
    assert host_bytes[0] > host_bytes[4] > host_bytes[-1] == 0
    assert seconds[-1] == 0


@pytest.mark.parametrize("part", [0.03, 0.5, 0.97])
def test_few_walks_tell_how_many_may_stay(part: float) -> None:
    torch.manual_seed(0)
    model = Model(blocks=40)
    trace = tightfit.trace(model, torch.randint(WORDS, (2, 8)), tiles=False)
    whole = all_streamed(trace)
    least, most = simulate(trace, whole).peak_bytes, simulate(trace).peak_bytes
    plan = dataclasses.replace(whole, budget_bytes=least + int(part * (most - least)), peak_bytes=least)
    walks = []

    def peak_bytes(tried: Plan) -> int:
        walks.append(simulate(trace, tried).peak_bytes)
        return walks[-1]

    eased = STREAM.eased(trace, plan, peak_bytes)
    found = simulate(trace, eased).peak_bytes
    largest = max(each.size_bytes for each in frozen_modules(model))
    assert plan.budget_bytes - largest < found <= plan.budget_bytes
    assert len(walks) <= 5, "to halve 121 modules takes 7"


def test_what_is_there_throughout_may_be_too_much_already() -> None:
    model, batch = adapted()
    trace, levers = tightfit.trace(model, batch), frozenset({Lever.RECOMPUTE, Lever.STREAM_WEIGHTS})
    budget = sum(trace.static_bytes.values()) - 1
    assert feasible(trace, budget, effort=THOROUGH, levers=levers) is not None
    ways = way_of(trace, THOROUGH).ways(levers)
    too_much = [way for way in ways if sum(way.trace.static_bytes.values()) > budget]
    assert too_much and all("model" not in vars(way) for way in too_much)
    assert any("model" in vars(way) for way in ways)


def test_the_lowest_peak_is_looked_for_where_it_can_be() -> None:
    """A step that begins with more than another way's peak is not planned: parts of the weights, where all of them may
    be streamed."""
    model, ids = adapted()
    trace, levers = tightfit.trace(model, ids[:1, :2]), frozenset({Lever.RECOMPUTE, Lever.STREAM_WEIGHTS})
    found = lowest(trace, levers=levers)
    ways = way_of(trace, THOROUGH).ways(levers)
    too_much = [way for way in ways if way.static_bytes >= found.peak_bytes]
    assert too_much and not any("_low" in vars(way) or "model" in vars(way) for way in too_much)
    assert min(way.lowered.line.peak_bytes for way in ways) == found.peak_bytes


@pytest.mark.slow
def test_verify_proves_a_plan_that_recomputes_what_it_streams() -> None:
    model, batch = adapted()
    optimizer = torch.optim.AdamW(trained(model))
    trace = tightfit.trace(model, batch, optimizer=optimizer)
    plan = lowest(trace, levers=EXACT)
    assert plan.replays
    assert plan.peak_bytes < 0.8 * lowest(trace).peak_bytes
    proof = tightfit.verify(model, batch, plan, optimizer=optimizer)
    assert proof.passed, str(proof)
    assert measured(model, batch, plan, optimizer) == pytest.approx(plan.peak_bytes, rel=1e-3)


def test_a_budget_that_does_not_fit_is_told_of_the_lever() -> None:
    model, batch = adapted()
    trace = tightfit.trace(model, batch)
    budget = lowest(trace).peak_bytes - 3 * 4 * WIDTH * WIDTH * 4
    with pytest.raises(BudgetInfeasible, match="beside='stream_weights' would take"):
        tightfit.plan(trace, budget)
    plan = tightfit.plan(trace, budget, beside="stream_weights")
    assert plan.exact
    assert STREAM.is_used(plan)
    assert "stream_weights" not in tightfit.plan(trace, "100%").settings
    assert "of frozen weights wait in host memory" in STREAM.said(plan)


def test_a_plan_for_other_weights_is_refused() -> None:
    model, batch = adapted()
    trace = tightfit.trace(model, batch)
    plan = all_streamed(trace)
    with pytest.raises(PlanMismatch, match="does not know when they are read"):
        simulate(dataclasses.replace(trace, frozen=()), plan)
    model.head.requires_grad_(True)
    with pytest.raises(PlanMismatch, match="'head', which this model does not have, trains, or ties"):
        apply(model, plan)
    assert not any(is_elsewhere(p) for p in model.parameters())


# ------------------------------------------------------------------------------------------ what stays


class Odd(nn.Module):
    """Weights that are tied, read by another module, written, or trained in part; and one that is none of this."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.tied = nn.Linear(WIDTH, WORDS, bias=False)
        self.tied.weight = self.embedding.weight
        self.read = nn.Linear(WIDTH, WIDTH)
        self.written = nn.Embedding(WORDS, WIDTH, max_norm=1.0)
        self.plain = nn.Linear(WIDTH, WIDTH)
        self.requires_grad_(False)
        self.partly = nn.Linear(WIDTH, WIDTH)
        self.partly.weight.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.partly(self.embedding(ids) + self.written(ids))
        hidden = nn.functional.linear(self.read(hidden), self.read.weight)
        return self.tied(self.plain(hidden)).square().mean()


def test_what_cannot_be_streamed_stays() -> None:
    model, batch = Odd(), torch.randint(0, WORDS, (2, 8))
    trace = tightfit.trace(model, batch, units=["plain"])
    assert {each.module for each in trace.frozen} == {"plain", "partly"}
    plan = all_streamed(trace)
    assert same(stepped(model, batch, None, 2), stepped(model, batch, plan, 2))
    with apply(model, plan):
        away = {name for name, p in model.named_parameters() if is_elsewhere(p)}
    assert away == {"plain.weight", "plain.bias", "partly.weight"}


# ------------------------------------------------------------------------------------------ bits


@pytest.mark.parametrize(
    "levers", ["", *(pytest.param(EXACT + more, marks=pytest.mark.slow) for more in ("", ",offload"))]
)
def test_ten_steps_are_the_same_bits(levers: str) -> None:
    model, batch = adapted()
    trace = tightfit.trace(model, batch)
    plan = lowest(trace, levers=levers) if levers else all_streamed(trace)
    assert "stream_weights" in plan.settings
    assert same(stepped(model, batch, None, 10), stepped(model, batch, plan, 10))


@pytest.mark.parametrize("levers", ["", pytest.param(EXACT, marks=pytest.mark.slow)])
def test_four_bit_weights_that_a_ctx_holds(levers: str) -> None:
    pytest.importorskip("bitsandbytes")
    from tightfit.integrations.bitsandbytes import no_repacking, quantise

    model, batch = adapted()
    base = [block for block in model.blocks]
    adapters = [(b.first, b.second) for b in base]
    for block in base:
        del block.first, block.second
    quantise(model, torch.float32)
    for block, (first, second) in zip(base, adapters, strict=True):
        block.first, block.second = first.requires_grad_(True), second.requires_grad_(True)
    with no_repacking(model):
        trace = tightfit.trace(model, batch)
        four_bit = [each for each in trace.frozen if each.is_quantised]
        assert len(four_bit) == 5  # the head is a plain linear layer of this model, too
        assert max(len(each.spans) for each in four_bit) == 2  # forward, and a backward that reads what ctx holds
        plain = stepped(model, batch, None, 10)
        plan = lowest(trace, levers=levers) if levers else all_streamed(trace)
        assert same(plain, stepped(model, batch, plan, 10))
        assert measured(model, batch, plan) == pytest.approx(plan.peak_bytes, rel=1e-3)
        before = static_bytes(model)
        with apply(model, plan):
            loss = model(batch)
            # what ctx keeps lies in host memory, too: nothing holds a copy from forward to backward
            assert not host_copies_alive()
            loss.backward()
        model.zero_grad()
        assert static_bytes(model) == before


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"], ids=["attention", "experts too"])
def test_stacked_experts_are_streamed_but_for_those_that_peft_adapts(targets: Any) -> None:
    """PEFT reads the experts that it adapts outside their module's own forward, so these stay, and nothing else."""
    pytest.importorskip("peft")
    from transformers import MixtralConfig, MixtralForCausalLM

    from tightfit.integrations.peft import add_lora

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
            config = MixtralConfig(vocab_size=WORDS, num_hidden_layers=1, num_local_experts=4, **shape)
            self.inner = add_lora(MixtralForCausalLM(config), rank=2, targets=targets)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.inner(input_ids=ids, labels=ids).loss
            return found

    torch.manual_seed(0)
    model, batch = Own().train(), torch.randint(0, WORDS, (2, 12))
    trace = tightfit.trace(model, batch)
    plan = all_streamed(trace)
    assert same(stepped(model, batch, None, 3), stepped(model, batch, plan, 3))
    assert measured(model, batch, plan) == pytest.approx(plan.peak_bytes, rel=1e-3)
    with apply(model, plan):
        resident = {
            name: p.nbytes for name, p in model.named_parameters() if not p.requires_grad and not is_elsewhere(p)
        }
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name and not p.requires_grad)
    adapted = [name for name in resident if ".experts." not in name and ".gate." not in name]
    assert experts > 0 and not adapted and len(resident) == (0 if isinstance(targets, list) else 3)
    assert sum(size for name, size in resident.items() if ".experts." in name) in (0, experts)


def host_copies_alive() -> int:
    from tightfit.step import weights

    return len(weights._lent)


def test_a_forward_that_leaves_the_plan_is_replayed_whole() -> None:
    class Either(Adapted):
        doubled = False

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            hidden = super().forward(hidden)
            return hidden + hidden.sin() if self.doubled else hidden

    torch.manual_seed(0)
    model, batch = nn.Sequential(Either(), Either()), torch.randn(4, WIDTH)
    loss = lambda model, batch: model(batch).square().mean()  # noqa: E731
    plan = lowest(tightfit.trace(model, batch, loss=loss), levers=EXACT)
    assert plan.replays
    found = []
    for each in (None, plan):
        torch.manual_seed(1)
        model.zero_grad()
        Either.doubled = True
        with contextlib.nullcontext() if each is None else apply(model, each) as applied:
            loss(model, batch).backward()
            assert applied is None or applied.stats().fallbacks
        found.append([p.grad.clone() for p in trained(model)])
    assert same(*found)


def test_a_slot_that_is_used_again_too_early_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The saboteur: copies of the same size share their memory, so the second overwrites the first."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.randn(WIDTH, WIDTH), requires_grad=False)
            self.two = nn.Parameter(torch.randn(WIDTH, WIDTH), requires_grad=False)
            self.bias = nn.Parameter(torch.randn(WIDTH))

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return (hidden + self.bias) @ self.one @ self.two

    model, batch = nn.Sequential(Two(), Two()), torch.randn(4, WIDTH)
    loss = lambda model, batch: model(batch).square().mean()  # noqa: E731
    plan = all_streamed(tightfit.trace(model, batch, loss=loss))
    slots: dict[int, torch.Tensor] = {}

    def into_slot(room: torch.Tensor, device: torch.device) -> torch.Tensor:
        slot = slots.setdefault(room.numel(), torch.empty(room.numel(), dtype=torch.uint8, device=device))
        return slot.copy_(room)

    with apply(model, plan):
        loss(model, batch).backward()  # right
        with monkeypatch.context() as sabotage:
            sabotage.setattr(host, "_copied", into_slot)
            with pytest.raises(ReplayDiverged, match="is not what it was while the step reads it"):
                loss(model, batch)


def test_a_slot_under_a_ctx_in_backward_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ctx.kept = weight.t()
            return hidden @ weight

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
            if sabotaged:
                ctx.kept.fill_(7.0)  # as whoever gets this memory next would
            return gradient @ ctx.kept, None

    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH), requires_grad=False)
            self.bias = nn.Parameter(torch.randn(WIDTH))

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return Keeps.apply(hidden + self.bias, self.weight)

    sabotaged = False
    model, batch = nn.Sequential(Kept(), Kept()), torch.randn(4, WIDTH)
    loss = lambda model, batch: model(batch).square().mean()  # noqa: E731
    plan = all_streamed(tightfit.trace(model, batch, loss=loss))
    loss(model, batch).backward()
    plain = [p.grad.clone() for p in trained(model)]
    model.zero_grad()
    with apply(model, plan):
        loss(model, batch).backward()
        assert same(plain, [p.grad for p in trained(model)])
    sabotaged = True
    with apply(model, plan), pytest.raises(ReplayDiverged, match="is not what it was while the step reads it"):
        loss(model, batch).backward()
    sabotaged = False
    model.zero_grad()
    loss(model, batch).backward()
    assert same(plain, [p.grad for p in trained(model)])


# ------------------------------------------------------------------------------------------ life around the step


@contextlib.contextmanager
def streamed() -> Iterator[tuple[nn.Module, torch.Tensor, Any]]:
    model, batch = adapted()
    with apply(model, plan_of_adapted()) as applied:
        yield model, batch, applied


def test_state_is_read_saved_copied_and_put_back(tmp_path: Any) -> None:
    plain, batch = adapted()
    with streamed() as (model, _, applied):
        assert same(list(plain.state_dict().values()), list(model.state_dict().values()))
        torch.save(model.state_dict(), tmp_path / "whole.pt")
        torch.save(plain.state_dict(), tmp_path / "plain.pt")
        assert (tmp_path / "whole.pt").stat().st_size == (tmp_path / "plain.pt").stat().st_size
        taken, twin = model.state_dict(), copy.deepcopy(model)
        applied.remove()
        assert not any(is_elsewhere(p) for p in model.parameters())
        assert all("forward" not in vars(module) for module in model.modules())
        assert same(list(plain.state_dict().values()), list(model.state_dict().values()))
        with torch.no_grad():
            model.head.weight.zero_()
        again = apply(model, plan_of_adapted())
        again.remove()
    assert same(list(plain.state_dict().values()), list(twin.state_dict().values()))
    assert same([plain.eval()(batch)], [twin.eval()(batch)])
    assert taken["embedding.weight"].sum() == plain.embedding.weight.sum()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_under_the_lever(context: Any) -> None:
    plain, batch = adapted()
    with streamed() as (model, _, applied), context():
        assert torch.equal(plain.eval()(batch), model.eval()(batch))
        assert applied.stats().levers["stream_weights"].copies > 0


def test_errors_in_the_middle_of_a_step() -> None:
    class Stumbles(Exception):
        pass

    def stumble(*_: Any) -> None:
        raise Stumbles

    model, batch = adapted()
    plan = plan_of_adapted()
    model.eval()
    model(batch).backward()
    plain = [p.grad.clone() for p in trained(model)]
    with apply(model, plan):
        for inner in (model.blocks[1].up.register_forward_hook, model.blocks[1].drop.register_forward_pre_hook):
            hook = inner(stumble)
            with pytest.raises(Stumbles):
                model(batch)
            hook.remove()
        hook = model.blocks[1].first.weight.register_hook(stumble)
        with pytest.raises(Stumbles):
            model(batch).backward()
        hook.remove()
        model.zero_grad()
        model(batch).backward()
        assert same(plain, [p.grad for p in trained(model)])
        assert all(is_elsewhere(p) != p.requires_grad for p in model.parameters())


def test_weights_that_change_are_noticed() -> None:
    other, batch = adapted()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    other.eval()
    expected = other(batch)
    with streamed() as (model, _, _applied):
        model.eval()
        before = model(batch)
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(batch), expected)
        for parameter in model.parameters():  # through .data, which counts no version
            parameter.data /= 1.5
        assert not torch.equal(model(batch), expected)
        for parameter, value in zip(model.parameters(), other.parameters(), strict=True):
            parameter.data = value.detach().clone()
        assert torch.equal(model(batch), expected)
        assert all(is_elsewhere(p) != p.requires_grad for p in model.parameters())
        loss = model(batch)
        with torch.no_grad():
            model.head.weight.add_(1)
        with pytest.raises(RuntimeError, match="was changed between forward and backward"):
            loss.backward()
        model.head.weight = nn.Parameter(other.head.weight.detach().clone(), requires_grad=False)
        assert torch.equal(model(batch), expected)
        assert is_elsewhere(model.head.weight)
        model.head.weight.requires_grad_(True)
        model(batch).backward()
        other.head.weight.requires_grad_(True)
        other(batch).backward()
        assert not is_elsewhere(model.head.weight)
        assert torch.equal(model.head.weight.grad, other.head.weight.grad)
        assert not torch.equal(before, expected)
    assert not any(is_elsewhere(p) for p in model.parameters())
    assert torch.equal(model(batch), expected)


def test_a_weight_of_another_dtype_is_refused_and_not_lost() -> None:
    plain, _ = adapted()
    with streamed() as (model, batch, _):
        model(batch).backward()
        model.to(torch.float64)
        with pytest.raises(PlanMismatch, match="another dtype or shape"):
            model(batch)
        assert same(list(model.parameters()), list(plain.double().parameters()))
    assert same(list(model.parameters()), list(plain.parameters()))
    model(batch).backward()


def test_graphs_outlive_the_plan_and_may_be_kept() -> None:
    model, batch = adapted()
    model.eval()
    model(batch).backward()
    plain = [p.grad.clone() for p in trained(model)]
    model.zero_grad()
    applied = apply(model, plan_of_adapted())
    loss = model(batch)
    loss.backward(retain_graph=True)
    assert same(plain, [p.grad for p in trained(model)])
    model.zero_grad()
    applied.remove()
    loss.backward()
    assert same(plain, [p.grad for p in trained(model)])


def test_only_one_plan_and_no_trace_at_once() -> None:
    with streamed() as (model, batch, applied):
        with pytest.raises(InvalidInput, match="a plan is in force on this model"):
            tightfit.trace(model, batch)
        with pytest.raises(InvalidInput, match="streamed by a plan that is in force already"):
            apply(model, applied.plan)
        assert is_elsewhere(model.head.weight)


def test_compiled_models_are_planned_without_it() -> None:
    model, batch = adapted()
    plan = plan_of_adapted()
    for block in model.blocks:
        block.compile(backend="eager")
    assert tightfit.trace(model, batch).frozen == ()
    assert STREAM.not_compiled(plan, whole=True)


def test_host_memory_that_is_full_leaves_weights_resident() -> None:
    model, batch = adapted()
    plan = plan_of_adapted()
    plain = stepped(model, batch, None, 1)
    with apply(model, plan, host_bytes=64 * 1024) as applied:
        assert applied.stats().levers["stream_weights"].resident > 0
        assert any(is_elsewhere(p) for p in model.parameters())
    assert same(plain, stepped(model, batch, plan, 1))


def test_weights_wait_in_a_file(tmp_path: Any) -> None:
    model, batch = adapted()
    plan = plan_of_adapted()
    plain = model.eval()(batch)
    with apply(model, plan, spill=tmp_path):
        assert torch.equal(model(batch), plain)


# ------------------------------------------------------------------------------------------ with the others


@pytest.mark.slow
@pytest.mark.parametrize("levers", ["all,-tile", EXACT + ",step_in_backward", EXACT + ",state_in_host", "all"])
def test_every_lever_at_once_over_ten_steps(levers: str) -> None:
    model, batch = adapted()
    optimizer = torch.optim.AdamW(trained(model))
    trace = tightfit.trace(model, batch, optimizer=optimizer)
    least = lowest(trace, levers=levers)
    assert "stream_weights" in least.settings
    most = simulate(trace).peak_bytes
    plain = stepped(model, batch, None, 10)
    for k in range(4):
        plan = tightfit.plan(trace, least.peak_bytes + (most - least.peak_bytes) * k // 4, levers=levers)
        if plan.exact and Lever.STEP_IN_BACKWARD.value not in plan.settings:
            assert same(plain, stepped(model, batch, plan, 10))
        proof = tightfit.verify(model, batch, plan, optimizer=optimizer)
        assert proof.passed, str(proof)
        assert measured(model, batch, plan, optimizer) == pytest.approx(plan.peak_bytes, rel=1e-3)


@pytest.mark.slow
def test_peft_merges_unmerges_and_unloads() -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
    ids = torch.randint(0, 64, (2, 12))
    batch = {"input_ids": ids, "labels": ids}
    plan = lowest(tightfit.trace(model, batch), levers=EXACT)
    assert "stream_weights" in plan.settings
    model.eval()
    twin = copy.deepcopy(model)

    def told(model: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(**batch).logits, model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)]

    with apply(model, plan):
        for act in ("eval", "merge_adapter", "unmerge_adapter"):
            getattr(model, act)()
            getattr(twin, act)()
            assert same(told(twin), told(model)), act
        base, plain = model.merge_and_unload(), twin.merge_and_unload()
        assert same(told(plain), told(base))
    assert same(list(plain.parameters()), list(base.parameters()))


def test_a_model_that_is_where_it_is_to_run_is_fitted_as_ever() -> None:
    model, batch = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8)), torch.randn(4, 8)
    model[1].requires_grad_(False)
    with tightfit.fit(model, batch, "100%", loss=lambda m, b: m(b).sum(), device="cpu") as applied:
        assert applied.device is None
    with pytest.raises(InvalidInput, match="finds no GPU: use cpu"):
        tightfit.fit(model, batch, "100%", loss=lambda m, b: m(b).sum(), device="cuda")


def test_what_lies_in_a_mapped_file_is_known(tmp_path: Path) -> None:
    save_file({"weight": torch.randn(64, 64)}, tmp_path / "weights.safetensors")
    loaded = load_file(tmp_path / "weights.safetensors")["weight"]
    mapped = Mapped.now()
    assert loaded in mapped and loaded[3:] in mapped
    assert loaded.clone() not in mapped and torch.empty(3, device="meta") not in mapped
    shared = torch.randn(1 << 20).share_memory_()  # a file in name only
    assert shared not in Mapped.now()


def test_bytes_in_host_memory_count_once() -> None:
    tied = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    tied[1].weight = tied[0].weight
    assert in_host_bytes(tied) == 16 * 4 + 2 * 4 * 4
