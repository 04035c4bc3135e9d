"""All levers in one program: what each buys, that it can be forbidden, and that more levers are never worse."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tightfit
from tightfit.core import Action, BudgetInfeasible, Choice, InvalidInput, Lever, Trace, levers_named, parse_levers
from tightfit.device.cost import copy_lanes
from tightfit.plan import Effort, every_block, lowest, plan, simulate
from tightfit.plan.shares import shares
from tightfit.plan.simulate import simulate_choices

EXACT = frozenset(Lever) - {Lever.TILE}
QUICK = Effort(points=24, solver_seconds=60.0, proves=False)  # a limit that a busy machine does not reach


@pytest.fixture(scope="module")
def recorded() -> Trace:
    """A small Llama on fake tensors: seconds are estimated, so that plans are the same on every machine."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4, vocab_size=512)
    ).train()
    ids = torch.randint(0, 96, (4, 256))
    return tightfit.trace(model, {"input_ids": ids, "labels": ids}, fake=True)


def cost(made: tightfit.Plan) -> float:
    return made.recompute_seconds + made.offload_seconds + made.tile_seconds


def test_names_in_a_tuple_are_read_as_those_with_commas() -> None:
    assert levers_named(("all", "-tile")) == parse_levers("all,-tile")
    assert levers_named([Lever.TILE, "recompute"]) == {Lever.TILE, Lever.RECOMPUTE}
    assert levers_named(()) == frozenset()
    for wrong in (3, (None,), ("",), 1.5):
        with pytest.raises(InvalidInput):
            levers_named(wrong)  # type: ignore[arg-type]


def test_what_is_forbidden_is_not_done(recorded: Trace) -> None:
    budget = every_block(recorded).peak_bytes
    for lever in EXACT - {Lever.RECOMPUTE}:
        made = plan(recorded, budget, levers=EXACT - {lever}, effort=QUICK)
        assert lever not in {share.lever for share in shares(recorded, made)}
    made = plan(recorded, budget, effort=QUICK)
    assert not made.offloaded_bytes and made.exact
    with pytest.raises(BudgetInfeasible):
        plan(recorded, budget // 2, levers={Lever.LOSS_IN_PLACE}, effort=QUICK)


@pytest.mark.parametrize(
    "parts", [(0.1,), pytest.param((0.0, 0.3, 0.6, 0.9), marks=pytest.mark.slow)], ids=["one budget", "four budgets"]
)
def test_more_levers_never_cost_more(recorded: Trace, parts: tuple[float, ...]) -> None:
    """At each budget, no subset of the exact levers beats all of them; nor has it a lower floor."""
    others = (Lever.LOSS_IN_PLACE, Lever.NEST, Lever.OFFLOAD)
    subsets = [
        {Lever.RECOMPUTE, *chosen} for count in range(len(others)) for chosen in itertools.combinations(others, count)
    ]
    everything = lowest(recorded, levers=EXACT, effort=QUICK)
    unplanned = simulate(recorded).peak_bytes
    for subset in subsets:
        assert everything.peak_bytes <= lowest(recorded, levers=subset, effort=QUICK).peak_bytes * 1.002
    for part in parts:
        budget = int(everything.peak_bytes + part * (unplanned - everything.peak_bytes))
        found = cost(plan(recorded, budget, levers=EXACT, effort=QUICK))
        for subset in subsets:
            try:
                assert found <= cost(plan(recorded, budget, levers=subset, effort=QUICK)) * (1 + 1e-9)
            except BudgetInfeasible:
                continue


def test_the_floor_falls_with_each_lever(recorded: Trace) -> None:
    floors = [
        lowest(recorded, levers=levers, effort=QUICK).peak_bytes
        for levers in (
            {Lever.RECOMPUTE},
            {Lever.RECOMPUTE, Lever.LOSS_IN_PLACE},
            {Lever.RECOMPUTE, Lever.LOSS_IN_PLACE, Lever.NEST},
            EXACT,
            frozenset(Lever),
        )
    ]
    assert floors == sorted(floors, reverse=True) and floors[-1] < 0.8 * floors[0]


def test_shares_say_what_is_lost_without_a_lever(recorded: Trace) -> None:
    made = lowest(recorded, levers=EXACT, effort=QUICK)
    found = {share.lever: share for share in shares(recorded, made)}
    assert Lever.OFFLOAD in found
    for share in found.values():
        assert share.bought_bytes >= 0 and share.seconds >= 0
    assert max(share.bought_bytes for share in found.values()) > 0
    assert found[Lever.OFFLOAD].seconds == pytest.approx(made.offload_seconds)
    if Lever.RECOMPUTE in found:
        rerun = sum(share.seconds for lever, share in found.items() if lever in (Lever.RECOMPUTE, Lever.NEST))
        assert rerun == pytest.approx(made.recompute_seconds)


def test_offloaded_values_are_in_the_plan(recorded: Trace) -> None:
    made = lowest(recorded, levers={Lever.RECOMPUTE, Lever.OFFLOAD}, effort=QUICK)
    moved = [action for choice in made.choices for action in (*choice.actions, *choice.inputs)]
    assert Action.OFFLOAD in moved
    assert simulate(recorded, made).offloaded_bytes == made.offloaded_bytes > 0


def test_what_is_no_lever_is_refused(recorded: Trace) -> None:
    for wrong in ("nset", {"nset"}, [3]):
        for verb in (
            lambda levers: plan(recorded, "80%", levers=levers),
            lambda levers: lowest(recorded, levers=levers),
        ):
            with pytest.raises(InvalidInput, match="unknown lever"):
                verb(wrong)


def test_levers_by_name() -> None:
    assert parse_levers("") is None
    assert parse_levers("recompute, loss-in-place") == {Lever.RECOMPUTE, Lever.LOSS_IN_PLACE}
    assert parse_levers("all,-tile") == EXACT
    with pytest.raises(InvalidInput, match="unknown lever 'magic'"):
        parse_levers("magic")


class Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 2 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.inner(x).chunk(2, -1)
        return x + torch.tanh(a) * torch.sigmoid(b)


class Stack(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Gated(16) for _ in range(depth))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).exp().mean()


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_plans_with_offload_against_many_others(depth: int) -> None:
    """The oracle: plans drawn at random, each unit's values and input kept, made again or moved as chance has it.

    A unit's points are those of the fewest bytes kept for their seconds; what its own backward needs for a moment is
    not among what they are chosen by, so on blocks of five ops others can be a few percent lower.
    """
    torch.manual_seed(0)
    recorded = tightfit.trace(Stack(depth), torch.randn(64, 16), fake=True)
    lanes = copy_lanes(recorded)
    program = recorded.programs[0]
    values = sorted({*program.needed, *(v for step in program.steps for v in step.reads)} - set(program.held))
    draw = random.Random(depth)
    others = []
    for _ in range(700):
        choices = []
        for unit in recorded.units:
            actions = [Action.KEEP if v in program.held else Action.RECOMPUTE for v in range(program.values)]
            likely = draw.random()
            for v in values:
                if draw.random() < likely:
                    actions[v] = draw.choice([Action.KEEP, Action.OFFLOAD])
            inputs = (draw.choice([Action.KEEP, Action.OFFLOAD]),)
            choices.append(
                Choice(
                    unit=unit.path, actions=tuple(actions), signature=unit.signature, program=unit.digest, inputs=inputs
                )
            )
        line = simulate_choices(recorded, tuple(choices))
        waiting = lanes[0].waiting_seconds(line.offloaded_bytes) + lanes[1].waiting_seconds(line.fetched_bytes)
        others.append((line.peak_bytes, line.recompute_seconds + waiting))
    levers = {Lever.RECOMPUTE, Lever.OFFLOAD}
    least = lowest(recorded, levers=levers).peak_bytes
    assert least <= min(peak for peak, _ in others) * 1.12
    unplanned = simulate(recorded).peak_bytes
    for share in (0.1, 0.3, 0.5, 0.8):
        budget = least + int(share * (unplanned - least))
        best = min((seconds for peak, seconds in others if peak <= budget), default=float("inf"))
        assert cost(plan(recorded, budget, levers=levers)) <= best * 1.35
