"""Custom autograd functions and custom ops in a block: replayed or kept whole, never misread."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tightfit.plan import lowest

WIDTH = 64


class Scaled(torch.autograd.Function):
    """Saves as is proper."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        inner = x.sigmoid()
        ctx.save_for_backward(inner, scale)
        return inner * scale

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        inner, scale = ctx.saved_tensors
        return grad * scale * inner * (1 - inner), (grad * inner).sum().reshape(scale.shape)


class Hidden(torch.autograd.Function):
    """Holds its tensors as attributes, which no saved-tensor hook sees."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.inner, ctx.scale = x.sigmoid(), scale
        return ctx.inner * scale

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad * ctx.scale * ctx.inner * (1 - ctx.inner), (grad * ctx.inner).sum().reshape(ctx.scale.shape)


class Chunked(torch.autograd.Function):
    """Makes its gradient in forward, a chunk at a time, into buffers of its own, as fused losses do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        out, slope = torch.empty_like(x), torch.zeros_like(x)
        buffer = torch.empty(x.shape[0] // 2, x.shape[1])
        for start in range(0, x.shape[0], len(buffer)):
            part = slice(start, start + len(buffer))
            torch.sigmoid(x[part], out=buffer)
            out[part] = buffer * scale
            slope[part].add_(buffer * (1 - buffer))
        ctx.save_for_backward(slope, out, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        slope, out, scale = ctx.saved_tensors
        return grad * scale * slope, (grad * out / scale).sum().reshape(scale.shape)


@torch.library.custom_op("tightfit_tests::scaled", mutates_args=())
def scaled(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x.sigmoid() * scale


@scaled.register_fake
def _(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    x, scale = ctx.saved_tensors
    inner = x.sigmoid()
    return grad * scale * inner * (1 - inner), (grad * inner).sum().reshape(scale.shape)


scaled.register_autograd(_backward, setup_context=_setup)

WAYS = {"saved": Scaled.apply, "attributes": Hidden.apply, "chunked": Chunked.apply, "custom op": scaled}


class Block(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.inner, self.outer = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.outer(WAYS[self.way](torch.tanh(self.inner(x)), self.scale))
        return out


def made(way: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(way) for _ in range(3)), nn.Linear(WIDTH, 1)), torch.randn(128, WIDTH)


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    out: torch.Tensor = model(batch).square().mean()
    return out


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_the_same_and_the_peak_is_predicted(way: str) -> None:
    model, batch = made(way)
    trace = tightfit.trace(model, batch, loss=loss)
    least = lowest(trace)
    unplanned = tightfit.simulate(trace, None).peak_bytes
    assert least.replays and least.peak_bytes < 0.95 * unplanned
    for budget in (least.peak_bytes, (least.peak_bytes + unplanned) // 2):
        proof = tightfit.verify(model, batch, tightfit.plan(trace, budget), loss=loss)
        assert proof.passed, [check for check in proof.checks if not check.passed]


@pytest.mark.parametrize("way", WAYS)
def test_the_fake_step_is_the_real_one(way: str) -> None:
    model, batch = made(way)
    real, fake = (tightfit.trace(model, batch, loss=loss, fake=each) for each in (False, True))
    assert tightfit.simulate(real, None).peak_bytes == tightfit.simulate(fake, None).peak_bytes
    assert lowest(real).peak_bytes == lowest(fake).peak_bytes


class Unseen(torch.autograd.Function):
    """Written by a kernel that no dispatch mode sees, as a Triton kernel called by hand is: NumPy plays it here."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        out.detach().numpy()[:] = x.detach().numpy() * 3 + 1
        ctx.save_for_backward(x)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return grad * 3


class WithUnseen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(Unseen.apply(nn.functional.gelu(self.up(x))))  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize("blocks", [1, 2])
def test_what_an_unseen_kernel_wrote_is_never_made_again(blocks: int) -> None:
    """The memory that a rerun allocates may still hold the old content, so that a comparison can pass by chance."""
    torch.manual_seed(0)
    model = nn.Sequential(*(WithUnseen() for _ in range(blocks)))
    batches = [torch.randn(64, WIDTH) for _ in range(8)]

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch).square().mean()  # type: ignore[no-any-return]

    def gradients() -> list[torch.Tensor]:
        found = []
        for batch in batches:
            model.zero_grad()
            loss(model, batch).backward()
            found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return found

    expected = gradients()
    model.zero_grad()
    applied = tightfit.apply(model, lowest(tightfit.trace(model, batches[0], loss=loss)))
    assert applied.plan.replays
    assert all(map(torch.equal, gradients(), expected))
    assert not applied.stats().fallbacks
    applied.remove()


def test_a_compiled_function_inside_a_block_is_refused() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)
            self.activation = torch.compile(lambda y: y.sin().exp(), backend="eager")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(self.activation(x))  # type: ignore[no-any-return]

    model = nn.Sequential(Block(), Block())
    with pytest.raises(tightfit.Unsupported, match=r"calls a function that is compiled \(0.activation\)"):
        tightfit.trace(model, torch.randn(4, WIDTH), loss=lambda m, b: m(b).square().mean())
