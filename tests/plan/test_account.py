"""What a plan says of host memory is what its buffers there hold."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console
from tests.plan.stacks import half_frozen
from tests.plan.stacks import mean_square as loss
from torch import nn

import tightfit
from tightfit.core import parse_levers
from tightfit.engine import apply
from tightfit.plan import lowest
from tightfit.plan.account import host_bytes, host_said
from tightfit.report.text import explain

WIDTH, ROWS = 256, 2048


def stack() -> nn.Sequential:
    return half_frozen(WIDTH, [4 * WIDTH] * 4)


@pytest.mark.parametrize(
    ("lever", "said"),
    [("stream_weights", "frozen weights"), ("state_in_host", "optimizer state"), ("offload", "kept values")],
)
def test_host_memory_is_what_the_pool_holds(lever: str, said: str) -> None:
    model, batch = stack(), torch.randn(ROWS, WIDTH).requires_grad_()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    trace = tightfit.trace(model, batch, loss=loss, optimizer=optimizer)
    assert host_bytes(trace, tightfit.plan(trace, "100%")) == {}
    if lever == "offload":
        plan = tightfit.plan(trace, "90%", levers=["recompute", lever])
    else:
        plan = lowest(trace, levers=parse_levers(f"recompute,{lever}"))
    ((name, told_bytes),) = host_bytes(trace, plan).items()
    assert name == lever and told_bytes > 0
    with apply(model, plan, optimizer=optimizer) as applied:
        for _ in range(2):
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        buffers = 4096 * 16  # each is rounded up to a page; there are fewer than 16
        assert told_bytes <= applied.pool.most_bytes <= told_bytes + buffers
        applied.trace = trace
        assert f"in host memory: {host_said({lever: told_bytes})}" in str(applied)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(explain(trace, plan))
    assert f"in host memory: {host_said({lever: told_bytes})}" in console.export_text()
    assert said in host_said({lever: told_bytes})
