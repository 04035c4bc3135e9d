"""The process-wide switches of kernels (TF32, determinism, libraries) stand in a replay as they stood in its forward.

CUDA's switches can be set and read without a card; which bits they give is the kit's step `gradients`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import tightfit
from tightfit.accelerator import numerics
from tightfit.plan import every_block

CHANGES: dict[str, Callable[[], Any]] = {
    "float32 products": lambda: torch.set_float32_matmul_precision("high"),
    "TF32, the newer switch": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "TF32 of everything": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "TF32 in cuDNN": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "sums in bf16": lambda: setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    "cuDNN off": lambda: setattr(torch.backends.cudnn, "enabled", False),
    "determinism": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "another BLAS": lambda: torch.backends.cuda.preferred_blas_library("ck"),
    "attention in another order": lambda: torch._C._set_sdp_priority_order([0, 1, 2, 3, 4]),
    "oneDNN off": lambda: torch._C._set_mkldnn_enabled(False),
}


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    with numerics.restored(before := numerics.switches()):
        yield
    numerics._set(before)


class Seen(TorchDispatchMode):
    """The switches at every product."""

    def __init__(self) -> None:
        super().__init__()
        self.at_products: list[numerics.Switches] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.at_products.append(numerics.switches())
        return func(*args, **(kwargs or {}))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).sigmoid().square())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.sum()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("which", ["tape", "region"])
def test_a_replay_has_the_switches_of_its_forward(change: Callable[[], Any], which: str) -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(4, 8, requires_grad=True)
    if which == "tape":
        applied = tightfit.apply(model, every_block(tightfit.trace(model, x)))
    forward = numerics.switches()
    if which == "tape":
        loss = model(x)
    else:
        loss = tightfit.checkpoint(model.blocks[0], x).sum()
    change()
    changed = numerics.switches()
    assert changed != forward
    with Seen() as seen:
        loss.backward()
    if which == "tape":
        assert applied.stats().rerun_ops > 0
        applied.remove()
    # the products that run again, and those of backward itself, which run under what the caller set
    assert forward in seen.at_products and changed in seen.at_products
    assert set(seen.at_products) == {forward, changed}
    assert numerics.switches() == changed


def test_bits_follow_the_switch() -> None:
    """oneDNN and torch's own kernels give other sums: a case in which the CPU shows what TF32 does on a card."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Sigmoid(), nn.Conv2d(32, 16, 3), nn.Sigmoid())
    x = torch.randn(4, 16, 12, 12)

    def gradients(run: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        block.zero_grad()
        with torch.backends.mkldnn.flags(enabled=False):
            loss = run(x.clone().requires_grad_()).square().sum()
        loss.backward()
        return [p.grad.clone() for p in block.parameters() if p.grad is not None]

    with torch.backends.mkldnn.flags(enabled=False):
        without = block(x)
    if torch.equal(without, block(x)):
        pytest.skip("both libraries give the same bits here")
    expected = gradients(block)
    found = gradients(lambda given: tightfit.checkpoint(block, given))
    assert all(map(torch.equal, expected, found)) and len(expected) == len(found) == 4


def test_the_order_of_sdpa_kernel_comes_back() -> None:
    """What `sdpa_kernel` leaves around a forward is put in for its replay, and taken out again."""
    kinds = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]
    seen: list[list[int]] = []

    def attention(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch._C._get_sdp_priority_order())
        return nn.functional.scaled_dot_product_attention(x, x, x)

    usual = torch._C._get_sdp_priority_order()
    x = torch.randn(1, 2, 8, 4, requires_grad=True)
    with sdpa_kernel(kinds, set_priority=True):
        inside = torch._C._get_sdp_priority_order()
        loss = tightfit.checkpoint(attention, x).sum()
    loss.backward()
    assert inside != usual and seen == [inside, inside]
    assert torch._C._get_sdp_priority_order() == usual


def test_a_preferred_linalg_library_is_a_switch() -> None:
    """A build for CPUs cannot be set to another one, so what is asked is whether it would be."""
    wanted: Any = {"linalg": torch._C._get_linalg_preferred_backend(), "blas": torch._C._get_blas_preferred_backend()}
    assert all(value in numerics.switches() for value in wanted.values())


class _Doubled(TorchFunctionMode):
    """`gelu` gives twice as much, by one op more."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return 2 * out if func is nn.functional.gelu else out


@pytest.mark.parametrize("all_of_it", [True, False], ids=["the whole step", "the forward"])
def test_a_mode_that_changes_functions_is_there_in_a_replay(all_of_it: bool) -> None:
    """torch has a mode off while `backward` runs inside it. What the plan knows is the step without the mode."""

    def gradients(planned: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(3)))
        x = torch.randn(4, 8)
        trace = tightfit.trace(model, x, loss=lambda model, x: model(x).sum())
        with contextlib.ExitStack() as stack:
            applied = stack.enter_context(tightfit.apply(model, every_block(trace))) if planned else None
            with _Doubled():
                loss = model(x).sum()
                if all_of_it:
                    loss.backward()
            if not all_of_it:
                loss.backward()
            assert applied is None or applied.stats().fallbacks == 3
        return [parameter.grad for parameter in model.parameters()]

    assert all(map(torch.equal, gradients(True), gradients(False)))
