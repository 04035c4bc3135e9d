"""A copy of a planned model is a plain model with weights of its own."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import tightfit
from tightfit.verify.gradients import Outcome, differences

WIDTH = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(F.gelu(self.first(x)))


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def saved(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded: nn.Module = torch.load(stream, weights_only=False)
    return loaded


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "deepcopy of a copy": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "average": lambda model: AveragedModel(model).module,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": saved,
    "save of a copy": lambda model: saved(copy.deepcopy(model)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("units", [None, "", "own"])
def test_a_copy_is_plain(how: str, units: str | None) -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(*(Block() for _ in range(4))), torch.randn(256, WIDTH)
    if units == "own":  # a forward that was put on an object, as accelerate does
        for block in model:
            block.forward = block.forward
        units = None
    loss(model, batch).backward()
    expected = Outcome(model)
    model.zero_grad()
    applied = tightfit.fit(model, batch, "80%", loss=loss, units=units)
    assert applied.active_units
    other = COPIES[how](model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(other(batch), batch)
    loss(other, torch.randn(300, WIDTH)).backward()  # longer than planned, which is nothing to the copy
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in other.parameters())
    assert applied.stats().frames == 0
    loss(model, batch).backward()
    assert applied.stats().replays > 0
    assert not differences(expected, Outcome(model))
    applied.remove()
    assert torch.equal(other(batch), batch)
    assert not any("tightfit" in str(type(each)) for module in other.modules() for each in vars(module).values())


def test_a_copy_can_be_planned() -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(*(Block() for _ in range(4))), torch.randn(256, WIDTH)
    with tightfit.fit(model, batch, "80%", loss=loss):
        other = copy.deepcopy(model)
    with tightfit.fit(other, batch, "80%", loss=loss) as applied:
        loss(other, batch).backward()
        assert applied.stats().replays > 0
    loss(model, batch).backward()
    assert not differences(Outcome(model), Outcome(other))


def test_needs_no_tightfit_to_load() -> None:
    blocks = (nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8)) for _ in range(4))
    model, batch = nn.Sequential(*blocks), torch.randn(256, 8)
    with tightfit.fit(model, batch, "80%", loss=loss):
        written: Any = pickle.dumps(model)
    assert b"tightfit" not in written
