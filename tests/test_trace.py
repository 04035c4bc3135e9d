"""The trace against the allocator's own count, and the marks that it must not leave."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tightfit
from tightfit.core import Category, InvalidInput, Kind, Phase, Trace, Unsupported, dumps, format_bytes, loads
from tightfit.plan import every_block
from tightfit.step import run
from tightfit.step.modules import find_units
from tightfit.step.snapshot import undisturbed
from tightfit.verify.peak import PeakMeter, static_bytes

WIDTH = 64


class Residual(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.dropout(self.outer(F.gelu(self.inner(x))), 0.1)


class Stack(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


class Summed(nn.Module):
    """Gradients of many readers meet at one tensor and are summed in place by autograd's engine."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        total = x.roll(1, 0)
        total += x.flip(0)
        total += x.roll(2, 1)
        return total.mean()


def convolutions() -> nn.Module:
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)) for _ in range(3)]
    return Stack(list(blocks))


def language_model(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_layer=2, n_embd=64, n_head=4, vocab_size=500, n_positions=64, bos_token_id=0, eos_token_id=0
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=4, vocab_size=500
    )
    return transformers.LlamaForCausalLM(config)


def case(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    if name in ("gpt2", "llama"):
        ids = torch.randint(0, 500, (2, 48))
        return language_model(name).train(), {"input_ids": ids, "labels": ids}
    if name == "convolutions":
        return convolutions(), torch.randn(4, 4, 32, 32)
    if name == "summed":
        return Summed(), torch.randn(512, WIDTH)
    return Stack([Residual() for _ in range(3)]), torch.randn(256, WIDTH)


CASES = ["mlp", "convolutions", "summed", "gpt2", "llama"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("accumulating", [False, True])
def test_the_simulated_peak_is_the_allocators(name: str, accumulating: bool) -> None:
    model, batch = case(name)

    def step() -> None:
        (model(**batch).loss if isinstance(batch, dict) else model(batch)).backward()

    if accumulating:
        step()
    predicted = tightfit.simulate(tightfit.trace(model, batch)).peak_bytes
    with undisturbed(model):
        before = static_bytes(model, None, batch)
        with PeakMeter("cpu") as meter:
            step()
    assert before + meter.rise_bytes == pytest.approx(predicted, rel=1e-3)


@dataclasses.dataclass
class Graph:
    """A batch that is an object, as graphs are."""

    nodes: torch.Tensor
    held: dict[str, torch.Tensor]


def test_the_bytes_of_a_batch_that_is_an_object_are_counted() -> None:
    model, _ = case("mlp")
    nodes, target = torch.randn(256, WIDTH), torch.randn(1)
    trace = tightfit.trace(model, (nodes, target), loss=lambda model, batch: model(batch[0]) - batch[1].sum())
    other = tightfit.trace(
        model, Graph(nodes, {"y": target}), loss=lambda model, graph: model(graph.nodes) - graph.held["y"].sum()
    )
    assert trace.static_bytes[Category.INPUTS.value] == 256 * WIDTH * 4 + 4
    assert other.static_bytes == trace.static_bytes and other.digest == trace.digest


class Slotted:
    """A batch without a mapping of its attributes, one of which is not set; the numbers hold nothing."""

    __slots__ = ("_nodes", "numbers", "unset")

    def __init__(self, nodes: torch.Tensor) -> None:
        self._nodes, self.numbers = nodes, [*range(1000), 0.5, b"", True]


class SlottedFurther(Slotted):
    __slots__ = ("more",)


def test_the_tensors_of_a_batch_are_found_in_slots_and_not_looked_for_in_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    held = run._held
    monkeypatch.setattr(run, "_held", lambda holder: asked.append(holder) or held(holder))
    batch = SlottedFurther(torch.ones(3))
    batch.more = torch.zeros(2)
    assert {id(each) for each in run.batch_tensors(batch)} == {id(batch._nodes), id(batch.more)}
    assert asked == [batch]


class Pick(torch.autograd.Function):
    """Rows of a table, whose gradient really is added to zeros out of place."""

    @staticmethod
    def forward(context: Any, table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(rows)
        context.shape = table.shape
        return table[rows]

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        (rows,) = context.saved_tensors
        return gradient.new_zeros(context.shape).index_add(0, rows, gradient), None


READS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "index_select": lambda table, rows: table.index_select(0, rows),
    "index": lambda table, rows: table[rows],
    "mask": lambda table, rows: table[torch.arange(len(table)) < 50],
    "masked_select": lambda table, rows: table.masked_select(torch.arange(len(table))[:, None] < 50),
    "gather": lambda table, rows: table.gather(0, rows[:, None].expand(-1, table.shape[1])),
    "take": lambda table, rows: table.take(rows),
    "topk": lambda table, rows: table.topk(3, 0).values,
    "cummax": lambda table, rows: table[:100].cummax(0).values,
    "scatter_reduce": lambda table, rows: table.new_zeros(9, table.shape[1]).scatter_reduce(
        0, (rows % 9)[:, None].expand(-1, table.shape[1]), table[:100], "mean", include_self=False
    ),
    "the largest of all": lambda table, rows: table.max(),
    "a function of one's own": Pick.apply,
}  # fmt: skip


@pytest.mark.parametrize("read", READS)
def test_zeros_that_backward_fills_in_place_are_counted_once(read: str) -> None:
    """Under a dispatch mode, thus while a step is recorded, torch puts the gradient of an indexed read into a tensor
    beside the zeros. In the step itself it does not."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(400, WIDTH))

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return READS[read](self.table, rows).sum()

    model, rows = Table(), torch.randint(400, (100,))
    trace = tightfit.trace(model, rows)
    with undisturbed(model):
        before = static_bytes(model, None, rows)
        with PeakMeter("cpu") as meter:
            model(rows).backward()
    assert before + meter.rise_bytes == pytest.approx(tightfit.simulate(trace).peak_bytes, rel=1e-3)
    if "mask" not in read:  # whose result's size depends on values
        assert tightfit.simulate(tightfit.trace(model, rows, fake=True)).peak_bytes == pytest.approx(
            before + meter.rise_bytes, rel=2e-3
        )


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.AdamW(p, foreach=True), lambda p: torch.optim.AdamW(p, foreach=False),
    lambda p: torch.optim.AdamW(p, fused=True), lambda p: torch.optim.SGD(p, lr=0.1),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), torch.optim.Adafactor,
])  # fmt: skip
def test_the_optimizers_step_is_part_of_it(make: Any) -> None:
    model, _ = case("mlp")
    batch = torch.randn(4, WIDTH)  # few activations: the peak is the optimizer's
    optimizer = make(model.parameters())
    trace = tightfit.trace(model, batch, optimizer=optimizer)
    assert not optimizer.state
    assert any(op.phase is Phase.OPTIMIZER for op in trace.ops)
    plan = tightfit.plan(trace, "100%")
    proof = tightfit.verify(model, batch, plan, optimizer=optimizer)
    assert proof["prediction"].passed, proof["prediction"]


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_left_changed(name: str) -> None:
    model, batch = case(name)
    before = copy.deepcopy(model.state_dict())
    attributes = [set(module.__dict__) for module in model.modules()]
    generator = torch.get_rng_state()
    tightfit.trace(model, batch)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [set(module.__dict__) for module in model.modules()] == attributes
    assert torch.equal(generator, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())

    def broken(model: nn.Module, batch: Any) -> torch.Tensor:
        model(**batch) if isinstance(batch, dict) else model(batch)
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        tightfit.trace(model, batch, loss=broken)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [set(module.__dict__) for module in model.modules()] == attributes
    assert torch.equal(generator, torch.get_rng_state())


def test_what_is_recorded() -> None:
    model, batch = case("mlp")
    trace = tightfit.trace(model, batch)
    assert [unit.path for unit in trace.units] == ["blocks.0", "blocks.1", "blocks.2"]
    assert trace.units[0].digest != trace.units[1].digest, "the first block's input needs no gradient"
    assert trace.units[1].digest == trace.units[2].digest, "equal blocks share a frontier"
    assert trace.static_bytes["parameters"] == sum(p.numel() * 4 for p in model.parameters())
    kinds = {op.kind for op in trace.ops if op.unit == "blocks.1" and op.phase is Phase.FORWARD}
    assert {Kind.PURE, Kind.RANDOM, Kind.INPLACE, Kind.VIEW} >= kinds >= {Kind.PURE, Kind.RANDOM}
    flops = sum(op.flops for op in trace.ops if op.phase is Phase.FORWARD)
    assert flops == 3 * 2 * 2 * 256 * WIDTH * 4 * WIDTH
    assert all(op.seconds >= 0 for op in trace.ops)
    assert loads(Trace, dumps(trace)) == trace
    assert trace.digest == tightfit.trace(model, batch).digest


def test_a_fake_trace_says_the_same_bytes() -> None:
    model, batch = case("llama")
    real, fake = tightfit.trace(model, batch), tightfit.trace(model, batch, fake=True)
    assert tightfit.simulate(fake).peak_bytes == pytest.approx(tightfit.simulate(real).peak_bytes, rel=0.02)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch": torch.randn(3, WIDTH + 1)}, None),
        ({"batch": {"nonsense": 1}}, "refuses this batch"),
        ({"loss": lambda m, b: m.blocks[0](b)}, "scalar"),
        ({"loss": lambda m, b: 3.0}, "scalar"),
        ({"loss": lambda m, b: m(b).detach()}, "trainable"),
        ({"units": "layers.*"}, "no module"),
        ({"units": ["blocks.0", "blocks.0.inner"]}, "inside"),
    ],
)
def test_wrong_input(change: dict[str, Any], said: str | None) -> None:
    model, batch = case("mlp")
    with pytest.raises((InvalidInput, RuntimeError)) as caught:
        tightfit.trace(model, **{"batch": batch, **change})
    if said is not None:
        assert isinstance(caught.value, InvalidInput)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_nothing_to_train_and_no_grad() -> None:
    model, batch = case("mlp")
    with torch.no_grad(), pytest.raises(InvalidInput, match="no_grad"):
        tightfit.trace(model, batch)
    with pytest.raises(InvalidInput, match="requires a gradient"):
        tightfit.trace(model.requires_grad_(False), batch)
    with pytest.raises(InvalidInput, match="Module"):
        tightfit.trace(lambda x: x, batch)


def test_a_step_that_changes_from_run_to_run_is_refused() -> None:
    model, batch = case("mlp")
    turn = itertools.count()

    def restless(model: nn.Module, batch: Any) -> torch.Tensor:
        loss: torch.Tensor = model(batch)
        return loss.sin() if next(turn) % 2 else loss

    with pytest.raises(Unsupported, match="not the same twice"):
        tightfit.trace(model, batch, loss=restless)


def test_find_units() -> None:
    blocks = Stack([Residual() for _ in range(3)])
    assert list(find_units(blocks)) == ["blocks.0", "blocks.1", "blocks.2"]
    assert list(find_units(blocks, "blocks.*")) == ["blocks.0", "blocks.1", "blocks.2"]
    assert list(find_units(blocks, [blocks.blocks[1]])) == ["blocks.1"]
    stages = nn.Sequential(nn.Sequential(Residual(), Residual()), nn.Sequential(Residual()))
    assert list(find_units(stages)) == ["0.0", "0.1", "1.0"]
    assert list(find_units(Residual())) == [""]


def test_a_backward_inside_the_forward_is_refused() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            point = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.blocks[0](point).sin().sum(), point)
            return self.blocks[1](slope).square().mean()

    with pytest.raises(Unsupported, match="a backward of its own"):
        tightfit.trace(Inner(), torch.randn(4, 8))


def mean_square(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(x).square().mean()
    return found


class Propagating(nn.Module):
    """A block of a graph network: its adjacency is a sparse buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 32), nn.Linear(32, 8)
        self.register_buffer("adjacency", torch.eye(64).to_sparse())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(F.gelu(self.inner(torch.sparse.mm(self.adjacency, x))))


def test_a_sparse_buffer() -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(*(Propagating() for _ in range(3))), torch.randn(64, 8)

    plan = tightfit.plan(tightfit.trace(model, batch, loss=mean_square), "70%")
    assert plan.replays
    proof = tightfit.verify(model, batch, plan, loss=mean_square)
    assert proof["gradients"].passed
    assert proof["prediction"].passed
    written = model[0].adjacency.clone()
    with undisturbed(model):
        model[0].adjacency.mul_(2)
    assert torch.equal(model[0].adjacency.to_dense(), written.to_dense())


def test_a_transform_inside_is_refused_with_the_reason() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.func.grad(lambda y: self.inner(y).square().sum())(x)

    model = nn.Sequential(Inner(), Inner())
    with pytest.raises(Unsupported, match=r"torch\.func\.grad"):
        tightfit.trace(model, torch.randn(4, 8), loss=lambda m, b: m(b).square().mean())
    assert "forward" not in model[0].__dict__


def test_a_first_forward_that_sets_something_up_is_not_the_step() -> None:
    """transformers wraps what a model returns when it is first asked for it."""

    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)
            self.table: list[torch.Tensor] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.table:
                self.table.append(torch.arange(8.0).sin())
            return (torch.tanh(self.inner(x)) + self.table[0]).square().mean()

    recorded = tightfit.trace(Lazy(), torch.randn(4, 8))
    assert "aten.sin.default" not in {op.name for op in recorded.ops}


@pytest.mark.parametrize("where", ["alone", "in a mapping"])
def test_a_jagged_batch_is_refused_in_one_line(where: str) -> None:
    class Jagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x.values().square().mean()

    rows = torch.nested.nested_tensor([torch.randn(3, WIDTH), torch.randn(5, WIDTH)], layout=torch.jagged)
    for call in (tightfit.trace, lambda model, batch: tightfit.fit(model, batch, "90%")):
        with pytest.raises(
            Unsupported, match=r"NestedTensor, and steps on nested .* are not recorded: pad it"
        ) as error:
            call(Jagged(), rows if where == "alone" else {"x": rows})
        assert "\n" not in str(error.value)


class SparseChange(nn.Module):
    """A frozen weight with trained entries at fixed places, as in PEFT's SHiRA: autograd saves what is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(96, 96) / 10, requires_grad=False)
        self.entries = nn.Parameter(torch.randn(2000) / 10)
        self.register_buffer("places", torch.randint(0, 96, (2, 2000), dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        changed = self.weight.clone()
        changed += torch.sparse_coo_tensor(self.places, self.entries * 2.0, (96, 96))
        return x + F.gelu(F.linear(x, changed))


def test_a_sparse_tensor_that_is_made_in_a_block_stays_and_is_counted() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(SparseChange() for _ in range(4))), torch.randn(128, 96)

    plan = every_block(tightfit.trace(model, x, mean_square, tiles=False))
    assert not all(choice.keeps_all for choice in plan.choices)
    proof = tightfit.verify(model, x, plan, loss=mean_square)
    assert proof.passed, str(proof)


def test_what_a_prompt_shows_is_short() -> None:
    """A trace printed whole is a megabyte, a plan's choices thousands of words."""
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(4)]
    model, x = nn.Sequential(*blocks), torch.randn(16, 8)

    recorded = tightfit.trace(model, x, mean_square, tiles=False)
    plan = every_block(recorded)
    for each in (recorded, plan, tightfit.simulate(recorded, plan)):
        assert len(repr(each)) < 200 and "\n" not in repr(each) and str(each) == repr(each)
    assert f"{len(recorded.ops)} ops" in repr(recorded) and recorded.digest in repr(recorded)
    assert format_bytes(plan.peak_bytes) in repr(plan) and plan.status.value in repr(plan)
    proof = tightfit.verify(model, x, plan, loss=mean_square)
    said = str(proof).splitlines()
    assert len(said) == len(proof.checks) and said[0].startswith("passed gradients: ")
