"""What an option does in one block, moved to the blocks that are like it."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import nn

import tightfit
from tightfit.core import Trace
from tightfit.device.cost import NOMINAL_CPU, retimed
from tightfit.plan import effects, table
from tightfit.plan.choose import Model
from tightfit.plan.effects import Effects

BLOCKS = 5


def blocks(*, dropout: float, odd: bool = False, longer: bool = False) -> Trace:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(32, 4, 64, dropout=dropout, batch_first=True) for _ in range(BLOCKS)]
    if odd:  # of the same ops as the others, and of other sizes
        layers[3] = nn.TransformerEncoderLayer(32, 4, 96, dropout=dropout, batch_first=True)
    first: nn.Module = nn.Embedding(300, 32)
    last: nn.Module = nn.Linear(32, 300)
    if longer:  # the same blocks at other places of the step
        first, last = nn.Sequential(first, nn.Tanh(), nn.Linear(32, 32)), nn.Sequential(nn.Tanh(), last)
    model = nn.Sequential(first, nn.Sequential(*layers), last)
    tokens = torch.randint(0, 300, (4, 48))
    return tightfit.trace(
        model,
        tokens,
        loss=lambda m, b: nn.functional.cross_entropy(m(b).flatten(0, 1), b.flatten()),
        units="1.*",
        tiles=False,
    )


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_is_moved_is_what_would_be_worked_out(dropout: float, odd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    work = Effects._worked_out
    monkeypatch.setattr(Effects, "_worked_out", lambda self, path, point: calls.append(path) or work(self, path, point))
    trace, draw = blocks(dropout=dropout, odd=odd), random.Random(0)
    ops = tuple(dataclasses.replace(op, seconds=op.seconds * draw.uniform(0.5, 2.0)) for op in trace.ops)
    model = Model(dataclasses.replace(trace, ops=ops))
    assert len(set(calls)) < BLOCKS, "nothing was moved"
    points = {point for options in model.options.values() for point in options[1::5] if point is not None}
    assert len(points) > 3
    for path in model.options:
        for point in points:
            moved, own = model._effect(path, point), work(model, path, point)
            assert list(moved.lives) == list(own.lives)
            assert list(moved.spikes) == list(own.spikes)
            assert moved.seconds == own.seconds, "each block has its own seconds"


def test_what_is_known_of_one_step_is_moved_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ways to plan a step have the same units, and so have longer steps. What their options do is worked out once, and
    the search for options with a lower moment of their own is made once."""
    effects.alike.cache_clear()
    calls: list[str] = []
    searches: list[int] = []
    work, search = Effects._worked_out, table.leaner
    monkeypatch.setattr(Effects, "_worked_out", lambda self, path, point: calls.append(path) or work(self, path, point))
    monkeypatch.setattr(table, "leaner", lambda *given, **more: searches.append(1) or search(*given, **more))
    trace = retimed(blocks(dropout=0.1), NOMINAL_CPU)
    Model(trace, lean=True)
    assert calls
    assert searches
    calls.clear()
    searches.clear()
    Model(dataclasses.replace(trace), lean=True)  # another trace, alike in everything
    assert not calls
    assert not searches
    longer = Model(retimed(blocks(dropout=0.1, longer=True), NOMINAL_CPU))
    assert len(set(calls)) < BLOCKS - 1, "nothing was moved"
    for path, options in longer.options.items():
        for point in options[1::4]:
            assert point is not None
            moved, own = longer._effect(path, point), work(longer, path, point)
            assert list(moved.lives) == list(own.lives)
            assert list(moved.spikes) == list(own.spikes)
            assert moved.seconds == own.seconds
