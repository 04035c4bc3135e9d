"""The program over the whole step: its rows against the referee, and its answers against every combination."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from typing import Any

import pytest
import torch
import transformers
from benchmarks.optimum import ResNet, UNet
from tests.plan.stacks import Lean, brute_force, mean_square, traced
from torch import nn

import tightfit
from tightfit.core import BudgetInfeasible, Status, Trace, Unsupported
from tightfit.device.cost import NOMINAL_CPU, retimed
from tightfit.plan import choose, effects, exact, lowest, planning, solver, table, ways
from tightfit.plan.exact import WholeStep
from tightfit.plan.moments import Linear, LiveBytes
from tightfit.plan.program import clusters, live_clusters
from tightfit.plan.simulate import simulate_choices

SHAPES = [(2, 16, 4, 64), (2, 8, 64, 64), (3, 8, 8, 32), (3, 16, 4, 64, Lean), (2, 16, 64, 64, Lean)]


class InPlace(nn.Module):
    """Ops that write in place, dropout, and one block that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 48), nn.ReLU(inplace=True), nn.Tanh(), nn.Dropout(0.3), nn.Linear(48, 16))
            for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (*self.blocks, self.blocks[1]):
            x = x + block(x).mul_(0.5)
        return x


class Autocast(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: torch.Tensor = self.inner(x)
        return out.float()


def step_of(name: str) -> Trace:
    torch.manual_seed(0)
    if name in ("gpt2", "mixtral"):
        config: Any = transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2)
        if name == "mixtral":
            config = transformers.MixtralConfig(
                vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, num_local_experts=3,
            )  # fmt: skip
        ids = torch.randint(0, 100, (2, 16))
        model = transformers.AutoModelForCausalLM.from_config(config).train()
        return retimed(tightfit.trace(model, {"input_ids": ids, "labels": ids}), NOMINAL_CPU)
    inner, batch = {
        "in place": (InPlace(), torch.randn(32, 16)),
        "autocast": (Autocast(InPlace()), torch.randn(32, 16)),
        "resnet": (ResNet(), torch.randn(4, 3, 16, 16)),
        "unet": (UNet(), torch.randn(4, 3, 16, 16)),
    }[name]
    return retimed(tightfit.trace(inner, batch, loss=mean_square), NOMINAL_CPU)


def columns_of(step: WholeStep, kept: exact.Kept, walk: Any) -> dict[int, float]:
    """What each column is when the units keep `kept`, by the referee's walk."""
    live, values = step.live, {}
    for path, program in step.programs.items():
        for value in range(program.values):
            for column, _ in live.keeps[path, value].columns:
                values[column] = float(value in kept[path])
        again = live_clusters(program, kept[path])
        for cluster in range(len(clusters(program))):
            values[live.reruns[path, cluster].columns[0][0]] = float(cluster in again)
    for frame, call in live.calls.items():
        batches = dict(walk.replays[frame].batches) if frame in walk.replays else {}
        ran: set[int] = set()
        for load, (event, _) in enumerate(call.loads):
            ran.update(batches.get(event, ()))
            for cluster, ops in enumerate(clusters(call.program)):
                values[call.ran(cluster, load).columns[0][0]] = float(ops[0] in ran)
    return values


class Told:
    """What sums are, given their columns."""

    def __init__(self, live: LiveBytes, values: dict[int, float]) -> None:
        self.values = values
        self.holders = {found.columns[0][0]: wanted for wanted, found in live._any_of.items()}

    def of(self, row: Linear) -> float:
        total = row.constant
        for column, amount in row.columns:
            if column not in self.values:
                self.values[column] = max(0.0, *(self.of(each) for each in self.holders[column]))
            total += amount * self.values[column]
        return total


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "in place", "autocast", "resnet", "unet"])
def test_a_moments_bytes_are_the_referees(name: str) -> None:
    """They are never more, so that no row rules out what fits. And they are the same but where the module says."""
    trace = step_of(name)
    step, draw = WholeStep(trace), random.Random(0)
    told_moments = less = 0
    for _ in range(12):
        share = draw.choice((0.0, 0.2, 0.5, 0.8))
        kept = {
            path: frozenset(
                v for v in range(program.values) if not step.live.keeps[path, v].columns or draw.random() < share
            )
            for path, program in step.programs.items()
        }
        walk = exact._Noted(trace, step._choices(kept))
        try:
            line = walk.timeline()
        except Unsupported:
            continue
        moments = list(zip(walk.moments, line.live_bytes, strict=True))
        levels = [(step.live.at(moment), size) for moment, size in draw.sample(moments, min(60, len(moments)))]
        told = Told(step.live, columns_of(step, kept, walk))
        assert all(told.of(row) <= 1e-9 for row in step.live.rows_for([level for level, _ in levels]))
        for level, size in levels:
            difference = size - told.of(level)
            assert difference >= -0.5
            told_moments, less = told_moments + 1, less + (difference > 0.5)
    assert told_moments > 200
    if name not in ("autocast", "mixtral"):
        assert not less
    assert less < 0.2 * told_moments


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.5, 0.2, 0.05, 0.0])
def test_the_cheapest_choices_are_the_best_of_every_combination(shape: tuple[Any, ...], share: float) -> None:
    trace, every = traced(*shape), brute_force(*shape)
    step = WholeStep(trace)
    least, unplanned = min(peak for peak, _ in every), tightfit.simulate(trace).peak_bytes
    budget = least + int(share * (unplanned - least))
    best = min(seconds for peak, seconds in every if peak <= budget)
    found = step.cheapest((), budget, 1e-6)
    assert found.line is not None
    assert found.line.peak_bytes <= budget
    assert found.line.recompute_seconds == pytest.approx(best, abs=1e-6 * step.step_seconds)
    assert found.bound == pytest.approx(best, abs=2e-6 * step.step_seconds)
    again = step.cheapest(found.choices or (), budget, 1e-6)  # nothing is better than the best
    assert again.choices is None
    assert again.bound == pytest.approx(best, abs=2e-6 * step.step_seconds)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_search_that_ends_early_claims_no_more_than_it_proved(shape: tuple[Any, ...]) -> None:
    trace, every = traced(*shape), brute_force(*shape)
    least, unplanned = min(peak for peak, _ in every), tightfit.simulate(trace).peak_bytes
    budget = (least + unplanned) // 2
    best = min(seconds for peak, seconds in every if peak <= budget)
    every_block = tightfit.plan.every_block(trace)
    assert every_block.peak_bytes <= budget
    found = WholeStep(trace).cheapest(every_block.choices, budget, 10.0)
    assert found.bound <= best + 1e-9 < every_block.recompute_seconds


@pytest.mark.parametrize("shape", SHAPES)
def test_what_runs_for_nothing_costs_is_no_part_of_a_bound(
    shape: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each cluster costs in addition is here as much as the seconds of a large one."""
    monkeypatch.setattr(exact, "_HAIR", 300.0)
    trace, every = traced(*shape), brute_force(*shape)
    least, unplanned = min(peak for peak, _ in every), tightfit.simulate(trace).peak_bytes
    step = WholeStep(trace)
    moments = [moment for moment, _ in step._walked(())[0]]
    for share in (0.1, 0.5):
        budget = least + int(share * (unplanned - least))
        best = min(seconds for peak, seconds in every if peak <= budget)
        answer = exact._Assembled(step, moments, step._kept(()), budget, is_attainable=True).solved(1e-6)
        assert answer.kept is not None
        assert answer.bound <= best * (1 + 1e-6)


def test_moments_that_an_answer_fills_become_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One moment is added in each round, so the first answers are above the budget."""
    monkeypatch.setattr(exact, "_ROWS", 1)
    monkeypatch.setattr(exact, "_ROUNDS", 60)
    trace, every = traced(*SHAPES[2]), brute_force(*SHAPES[2])
    least, unplanned = min(peak for peak, _ in every), tightfit.simulate(trace).peak_bytes
    budget = least + (unplanned - least) // 10
    best = min(seconds for peak, seconds in every if peak <= budget)
    found = WholeStep(trace).cheapest((), budget, 1e-6)
    assert found.line is not None
    assert found.line.recompute_seconds == pytest.approx(best)


def test_the_lowest_peak_of_blocks_is_lower_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=500, hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4
    )
    ids = torch.randint(0, 500, (2, 96))
    model = transformers.LlamaForCausalLM(config).train()
    trace = retimed(tightfit.trace(model, {"input_ids": ids, "labels": ids}), NOMINAL_CPU)

    def lowest_bytes() -> int:
        monkeypatch.setattr(ways, "_latest", {})
        effects.alike.cache_clear()  # what was found for these units before
        return tightfit.plan.lowest(trace, levers=("recompute",)).peak_bytes

    monkeypatch.setattr(ways, "_WHOLE_EVENTS", 0)
    by_points = lowest_bytes()
    monkeypatch.setattr(table, "leaner", lambda *_, **__: [])
    without = lowest_bytes()
    monkeypatch.undo()
    with monkeypatch.context() as patched:
        patched.setattr(table, "leaner", lambda *_, **__: [])
        low_bytes = lowest_bytes()
    effects.alike.cache_clear()
    assert low_bytes < 0.97 * without
    assert by_points < 1.002 * low_bytes  # larger steps have no such program, and lean points come as low here


@pytest.mark.parametrize("shape", SHAPES)
def test_the_lowest_peak_is_that_of_the_best_alike_choices(shape: tuple[Any, ...]) -> None:
    trace, every = traced(*shape), brute_force(*shape)
    found = WholeStep(trace).lowest((), 1e-6)
    assert found.line is not None
    least = min(peak for peak, _ in every)
    depth = len(trace.units)
    many = round(len(every) ** (1 / depth))
    same = [every[sum(i * many**place for place in range(depth))][0] for i in range(many)]
    assert least <= found.line.peak_bytes <= min(same)


class Gates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gated = nn.functional.silu(self.a(x)) * torch.sigmoid(self.c(x))
        return x + torch.tanh(self.b(torch.exp(-gated.abs())))


class Cast(nn.Module):
    """Its input needs no gradient, so keeping a product of the first layers saves casting a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Gates()]), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: torch.Tensor = self.head(self.blocks[0](x)).float().square().mean()
        return out


def test_what_a_cast_takes_is_no_part_of_a_bound() -> None:
    """A kept set that takes longer by its ops may cast less, and the frontier does not know of casts."""
    torch.manual_seed(2)
    trace = retimed(tightfit.trace(Cast(), torch.randn(64, 8), units="blocks.*"), NOMINAL_CPU)
    step, every = WholeStep(trace), []
    ((path, program),) = step.programs.items()
    values = [v for v in range(program.values) if step.live.keeps[path, v].columns]
    for count in range(len(values) + 1):
        for chosen in itertools.combinations(values, count):
            fixed = frozenset(range(program.values)) - frozenset(values)
            try:
                line = simulate_choices(trace, step._choices({path: fixed | frozenset(chosen)}))
            except Unsupported:
                continue
            every.append((line.peak_bytes, line.recompute_seconds))
    least, unplanned = min(peak for peak, _ in every), tightfit.simulate(trace).peak_bytes
    for share in (0.0, 0.2, 0.4, 0.5, 0.6, 0.8):
        budget = least + int(share * (unplanned - least))
        best = min(seconds for peak, seconds in every if peak <= budget)
        made = tightfit.plan(trace, budget, levers=("recompute",))
        assert made.bound_seconds <= best * (1 + 1e-9)
        assert made.status is not Status.OPTIMAL or made.recompute_seconds == pytest.approx(best)


@pytest.mark.parametrize("name", ["resnet", "unet", "gpt2"])
def test_plans_are_proven_to_be_near_the_best(name: str) -> None:
    trace = step_of(name)
    seconds = sum(op.seconds for op in trace.ops)
    low = tightfit.plan.lowest(trace, levers=("recompute",))
    unplanned = tightfit.simulate(trace).peak_bytes
    for share in (0.0, 0.15, 0.3, 0.5, 0.75):
        made = tightfit.plan(trace, low.peak_bytes + int(share * (unplanned - low.peak_bytes)), levers=("recompute",))
        assert made.recompute_seconds - made.bound_seconds <= 0.01 * (seconds + made.bound_seconds)


def test_without_a_solver_plans_are_made_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = traced(*SHAPES[0])
    budget = int(0.95 * tightfit.simulate(trace).peak_bytes)

    def broken(*_: Any) -> solver.Claim:
        raise RuntimeError("no solver here")

    monkeypatch.setattr(solver, "engine", broken)
    monkeypatch.setattr(ways, "_latest", {})
    made = tightfit.plan(trace, budget)
    monkeypatch.setattr(ways, "_latest", {})
    assert made.peak_bytes <= budget
    assert WholeStep(trace).cheapest(made.choices, budget, 1e-3).choices is None


def test_a_way_that_leaves_no_more_room_is_not_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the loss in place or without, the units have the same room: the program over the whole step is put once."""
    config = transformers.GPT2Config(vocab_size=300, n_embd=48, n_layer=2, n_head=4)
    ids = torch.randint(0, 300, (2, 48), generator=torch.Generator().manual_seed(0))
    model: Any = transformers.AutoModelForCausalLM.from_config(config).train()
    trace = retimed(tightfit.trace(model, {"input_ids": ids, "labels": ids}, tiles=False), NOMINAL_CPU)
    budget, found, put = int(1.08 * lowest(trace).peak_bytes), [], []
    cheapest = WholeStep.cheapest
    monkeypatch.setattr(WholeStep, "cheapest", lambda self, *asked: put.append(self) or cheapest(self, *asked))
    for same in (planning._SAME, -math.inf):  # the latter: nothing is the same
        monkeypatch.setattr(planning, "_SAME", same)
        found.append((tightfit.plan(dataclasses.replace(trace), budget).step_seconds, len(put)))
        put.clear()
    (once_seconds, once), (twice_seconds, twice) = found
    assert (once, twice) == (1, 2)
    assert once_seconds <= 1.001 * twice_seconds


def test_below_the_lowest_peak_the_program_is_not_put(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would look for what there hardly is."""
    trace = traced(3, 16, 4, 64, Lean)
    least = lowest(trace, levers="recompute").peak_bytes
    put: list[int] = []
    cheapest = WholeStep.cheapest
    monkeypatch.setattr(WholeStep, "cheapest", lambda self, *asked: put.append(asked[1]) or cheapest(self, *asked))
    monkeypatch.setattr(planning, "_fitting", lambda *_: None)  # where the choice across the units finds nothing
    monkeypatch.setattr(choose.Model, "is_ruled_out", lambda *_: False)  # and its bound proves nothing
    with pytest.raises(BudgetInfeasible):
        tightfit.plan(trace, least - 1, levers="recompute")
    assert not put
    assert tightfit.plan(trace, least, levers="recompute").peak_bytes <= least
