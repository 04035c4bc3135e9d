"""A forward whose backward never comes, or comes for a part of it: what it saved goes with the graph.

An op that saves its own result is the case to see: whoever packs that result with its history makes a circle that
nobody collects.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from tests.plan.stacks import mean_square as loss_of
from torch import nn

import tightfit
from tightfit.core import Action, Trace
from tightfit.engine import apply
from tightfit.plan import every_block, plan
from tightfit.plan.simulate import simulate
from tightfit.step.snapshot import undisturbed
from tightfit.verify.peak import PeakMeter, static_bytes

WIDTH = 32

#: Ops that save their own results, alone and as GRU cells use them.
OWN_RESULT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tanh": torch.tanh,
    "softmax": lambda x: x.softmax(-1),
    "in place": lambda x: (x * 2).sigmoid_(),
    "in place on a view": lambda x: (x * 2).unsafe_split(WIDTH // 2, 1)[0].sigmoid_(),
    "exp of a view": lambda x: (x * 2).chunk(2, 1)[0].exp(),
}


class Block(nn.Module):
    """Its result is made with `op`; or beside it, if the result of `op` is of no use to it."""

    def __init__(self, op: str, *, used: bool) -> None:
        super().__init__()
        self.op, self.used = OWN_RESULT[op], used
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.seen: list[weakref.ref[torch.UntypedStorage]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x)
        made = self.op(hidden)
        self.seen.append(weakref.ref(made.untyped_storage()))
        out: torch.Tensor = x + self.down(hidden)
        return out + made.sum() if self.used else out


class Stack(nn.Module):
    def __init__(self, op: str, *, used: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(op, used=used) for _ in range(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.blocks(x)
        return out

    def seen(self) -> list[weakref.ref[torch.UntypedStorage]]:
        """Of the latest forward."""
        return [block.seen[-1] for block in self.blocks]  # type: ignore[union-attr, index, misc]


def built(op: str, *, used: bool) -> tuple[Stack, torch.Tensor]:
    torch.manual_seed(0)
    return Stack(op, used=used), torch.randn(64, WIDTH)


def traced(model: nn.Module, batch: torch.Tensor) -> Trace:
    return tightfit.trace(model, batch, loss=loss_of, units="blocks.*")


@pytest.mark.parametrize("op", OWN_RESULT)
@pytest.mark.parametrize("used", [True, False])
def test_what_a_plan_keeps_goes_with_the_graph(op: str, used: bool) -> None:
    """Forward after forward without a backward, as in an evaluation that forgot `no_grad`."""
    model, batch = built(op, used=used)
    recorded = traced(model, batch)
    made = plan(recorded, "95%", levers=("recompute",))
    assert any(Action.KEEP in choice.actions and Action.RECOMPUTE in choice.actions for choice in made.choices)
    with apply(model, made):
        loss = loss_of(model, batch)
        seen = model.seen()
        if used:
            assert any(reference() is not None for reference in seen)
        del loss
        assert [reference() for reference in seen] == [None] * 3


@pytest.mark.parametrize("op", OWN_RESULT)
@pytest.mark.parametrize("planned", [False, True])
def test_a_branch_that_nobody_uses_is_predicted_as_it_goes(op: str, planned: bool) -> None:
    model, batch = built(op, used=False)
    recorded = traced(model, batch)
    made = every_block(recorded) if planned else None

    def peak_bytes() -> int:
        with undisturbed(model):
            before = static_bytes(model, None, batch)
            with PeakMeter("cpu") as meter:
                loss_of(model, batch).backward()
        return before + meter.rise_bytes

    if made is None:
        assert peak_bytes() == simulate(recorded).peak_bytes
    else:
        with apply(model, made):
            loss_of(model, batch).backward()
            model.zero_grad(set_to_none=True)
            assert peak_bytes() == simulate(recorded, made).peak_bytes
