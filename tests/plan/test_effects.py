"""What an option does in one block, moved to the blocks that are like it."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import nn

import tightfit
from tightfit.core import Trace
from tightfit.plan.choose import Model
from tightfit.plan.effects import Effects

BLOCKS = 5


def blocks(*, dropout: float, odd: bool = False) -> Trace:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(32, 4, 64, dropout=dropout, batch_first=True) for _ in range(BLOCKS)]
    if odd:  # of the same ops as the others, and of other sizes
        layers[3] = nn.TransformerEncoderLayer(32, 4, 96, dropout=dropout, batch_first=True)
    model = nn.Sequential(nn.Embedding(300, 32), nn.Sequential(*layers), nn.Linear(32, 300))
    tokens = torch.randint(0, 300, (4, 48))
    return tightfit.trace(
        model, tokens, loss=lambda m, b: nn.functional.cross_entropy(m(b).flatten(0, 1), b.flatten()), units="1.*"
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
