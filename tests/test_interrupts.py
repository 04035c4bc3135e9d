"""Ctrl-C at any moment: the next step of the process is as good as if it had not come, and it is told as what it was.

Python raises `KeyboardInterrupt` wherever it stands. Here it is raised at one event of Python's profiler after the
other: where a function is called, or returns, of Python's or of C.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack, _pop_mode

import tightfit
from tightfit.cli import program
from tightfit.cli.program import main
from tightfit.core import Interrupts
from tightfit.engine.ambient import is_active
from tightfit.engine.region import region_stats
from tightfit.step.modes import kept_in_force, modes_off
from tightfit.train import train
from tightfit.train.progress import Losses

from .test_train import options, place  # noqa: F401 - a fixture

#: Every so many events. A prime, so that all the places of a loop have their turn.
STRIDE = 37


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.narrow(torch.tanh(nn.functional.gelu(self.wide(x))))
        return out


class InterruptAt:
    """A profile function that raises at the event of that number."""

    def __init__(self, number: int) -> None:
        self.number, self.seen, self.where = number, 0, ""
        self.entering: list[int] = []  # the events where something is entered or left

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        self.seen += 1
        if frame.f_code.co_name in ("__enter__", "__exit__"):
            self.entering.append(self.seen)
        if self.seen == self.number:
            self.where = f"{frame.f_code.co_filename}:{frame.f_lineno} {event}"
            raise KeyboardInterrupt


def in_force() -> list[str]:
    """What is in force in this thread; it is taken away, so that the next look finds what came since."""
    found = []
    while modes := _get_current_dispatch_mode_stack():
        found.append(type(modes[-1]).__name__)
        _pop_mode()
    while torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
        found.append("hooks for saved tensors")
    if not torch.is_grad_enabled():
        torch.set_grad_enabled(True)
        found.append("no grad")
    if is_active():
        found.append("a frame")
    return found


def plain_step(model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model(batch).square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def storm(model: nn.Module, batch: torch.Tensor, fit: Callable[[], Callable[[], int]]) -> None:
    """`fit` makes the model train in less, and gives what counts the frames from then on."""

    def step() -> list[torch.Tensor]:
        return plain_step(model, batch)

    plain = step()
    model.zero_grad()
    frames = fit()
    for _ in range(2):
        step()
    at = InterruptAt(0)
    sys.setprofile(at)
    step()
    sys.setprofile(None)
    assert at.seen > 500
    numbers = sorted({*range(1, at.seen, STRIDE), *at.entering})
    came = 0
    for number in numbers:
        at = InterruptAt(number)
        sys.setprofile(at)
        try:
            step()
        except KeyboardInterrupt:
            came += 1
        at.number = 0  # where this step had fewer events
        sys.setprofile(None)
        assert not in_force(), at.where
        before = frames()
        assert all(map(torch.equal, step(), plain)), at.where
        assert frames() > before, f"the plan is off after {at.where}"
    assert came > 0.95 * len(numbers)


# an interrupted finaliser: its error goes no further
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("levers", ["recompute", "recompute,offload"])
def test_a_step_after_one_that_was_interrupted(levers: str) -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(*[Block() for _ in range(2)]), torch.randn(64, 16)

    def fit() -> Callable[[], int]:
        handle = tightfit.fit(
            model, batch, budget="80%", loss=lambda model, batch: model(batch).square().mean(), levers=levers
        )
        return lambda: handle.stats().frames

    storm(model, batch, fit)


class Regions(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self:
            x = tightfit.checkpoint(block, x)
        return x


def test_a_step_after_one_that_was_interrupted_in_a_region() -> None:
    torch.manual_seed(0)
    storm(Regions(Block()), torch.randn(64, 16), lambda: lambda: region_stats.frames)


class Torn(Block):
    """Ctrl-C while torch has the modes off, as it has for a while in much that it does."""

    torn = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.torn:
            _pop_mode()
            raise KeyboardInterrupt
        return super().forward(x)


@pytest.mark.parametrize("inside", [False, True])
def test_an_interrupt_while_the_modes_are_off(inside: bool) -> None:
    block = Torn()
    block.torn = True
    with Nothing() if inside else contextlib.nullcontext() as mode:
        with pytest.raises(KeyboardInterrupt):
            tightfit.checkpoint(block, torch.randn(4, 16, requires_grad=True))
        assert _get_current_dispatch_mode_stack() == [mode] * inside
    assert not in_force()


class Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_what_was_in_force_is_in_force_again() -> None:
    with Nothing() as outer:
        with pytest.raises(KeyboardInterrupt), kept_in_force():
            _pop_mode()  # an interrupted `_disable_current_modes` leaves it so
            Nothing().__enter__()
            raise KeyboardInterrupt
        assert _get_current_dispatch_mode_stack() == [outer]
        with modes_off():
            assert not _get_current_dispatch_mode_stack()
        assert _get_current_dispatch_mode_stack() == [outer]
    assert not in_force()


# ---------------------------------------------------------------------------------------- what is told


@pytest.fixture
def default_handler() -> Iterator[None]:
    """Python's own; a shell that runs the tests in the background has them ignore the interrupt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def another_error() -> None:
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise RuntimeError("trying to pop from empty mode stack") from None


def no_error() -> None:
    with contextlib.suppress(KeyboardInterrupt):  # as in a finaliser
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("becomes", [another_error, no_error])
def test_a_run_that_is_interrupted_says_so(
    becomes: Any, place: Path, tmp_path: Path, default_handler: None, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    real = Losses.on_pre_optimizer_step

    def on_pre_optimizer_step(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        real(self, args, state, control, **kwargs)
        if state.global_step == 2:
            becomes()

    monkeypatch.setattr(Losses, "on_pre_optimizer_step", on_pre_optimizer_step)
    run = train(options(place, tmp_path / "run"))
    assert run.status == "interrupted"
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (record["status"], record["error"], record["observed"]["steps"]) == ("interrupted", None, 2)


def one_of_ours() -> None:
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise tightfit.ReplayDiverged("a torn step") from None


@pytest.mark.parametrize("becomes", [another_error, one_of_ours])
def test_a_command_that_is_interrupted_says_so(
    becomes: Any, default_handler: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program.typer.main, "get_command", lambda _: becomes())
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "tightfit: interrupted\n"


def test_a_handler_of_the_users_own_stays(default_handler: None) -> None:
    def own(number: int, frame: Any) -> None:
        pass

    signal.signal(signal.SIGINT, own)
    with Interrupts() as interrupts:
        assert signal.getsignal(signal.SIGINT) is own
        signal.raise_signal(signal.SIGINT)
    assert not interrupts.came and signal.getsignal(signal.SIGINT) is own
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_blocks_may_be_nested_and_other_threads_take_nothing(default_handler: None) -> None:
    with Interrupts() as outer:
        with Interrupts() as inner, pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert inner.came and outer.came
        with Interrupts() as second:
            assert not second.came

    def elsewhere() -> None:
        with Interrupts():
            pass

    with ThreadPoolExecutor(1) as threads:
        threads.submit(elsewhere).result()
