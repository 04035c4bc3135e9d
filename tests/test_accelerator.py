"""The room for devices, on cards that stand in for those that are not here: modules with the functions that torch's
have, so that what is asked of which, and what is said where there is no answer, can be seen on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tightfit import accelerator
from tightfit.core import InvalidInput, Unsupported
from tightfit.verify.peak import PeakMeter

MIB, GIB = 2**20, 2**30


class Card:
    """A module as torch has for a kind of card: one device, an allocator that counts."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.live_bytes, self.most_bytes = 100, 900
        self.state = torch.tensor([1, 2], dtype=torch.uint8)
        self.properties = SimpleNamespace(total_memory=8 * GIB)

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def synchronize(self, device: Any) -> None:
        self.asked.append("synchronize")

    def reset_peak_memory_stats(self, device: Any) -> None:
        self.asked.append("reset")
        self.most_bytes = self.live_bytes

    def memory_allocated(self, device: Any) -> int:
        return self.live_bytes

    def max_memory_allocated(self, device: Any) -> int:
        return self.most_bytes

    def memory_reserved(self, device: Any) -> int:
        return 2 * MIB

    def max_memory_reserved(self, device: Any) -> int:
        return 22 * MIB

    def take(self, size_bytes: int) -> None:
        self.most_bytes = max(self.most_bytes, self.live_bytes + size_bytes)

    def empty_cache(self) -> None:
        self.asked.append("empty_cache")

    def get_device_properties(self, device: Any) -> Any:
        return self.properties

    def get_device_name(self, device: Any) -> str:
        return "Stand-in 1"

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return [self.state.clone()]

    def set_rng_state_all(self, states: list[torch.Tensor]) -> None:
        self.state = states[0]


class Metal:
    """What torch.mps has: no peak, no streams, one device that needs no index."""

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def synchronize(self) -> None:
        pass

    def take(self, size_bytes: int) -> None:
        pass

    def current_allocated_memory(self) -> int:
        return 100

    def recommended_max_memory(self) -> int:
        return 12 * GIB


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Call it with a kind and a module: that is the card of this machine then."""

    def put(kind: str, module: Any) -> None:
        monkeypatch.setattr(accelerator, "_module", lambda asked: module if asked == kind else real(asked))
        monkeypatch.setattr(accelerator, "_kind_present", lambda: kind)

    real = accelerator._module
    monkeypatch.setattr(accelerator, "_take", lambda device, size: accelerator._module(device.type).take(size))
    monkeypatch.setattr(accelerator, "_counting", set())
    accelerator.has_streams.cache_clear()
    yield put
    accelerator.has_streams.cache_clear()


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mtia"])
def test_every_card_takes_the_same_path(kind: str, here: Any) -> None:
    card = Card()
    here(kind, card)
    device = accelerator.device_named(kind)
    assert accelerator.current() == torch.device(kind, 0) == accelerator.numbered(0)
    assert (accelerator.name_of(device), accelerator.memory_bytes(device)) == ("Stand-in 1", 8 * GIB)
    assert accelerator.counts_peak(device) and not accelerator.peak_unknown(device)
    card.asked.clear()
    with PeakMeter(device) as meter:
        assert card.asked == ["synchronize", "reset"]
        card.most_bytes = 700
    assert meter.rise_bytes == 600
    assert card.asked[-1] == "synchronize"
    accelerator.empty_cache()
    assert card.asked[-1] == "empty_cache"


def test_random_states_of_the_card_come_back(here: Any) -> None:
    from tightfit.step.snapshot import random_states, restore_random_states

    card = Card()
    here("xpu", card)
    states = random_states()
    card.state = torch.zeros(2, dtype=torch.uint8)
    restore_random_states(states)
    assert card.state.tolist() == [1, 2]


def test_what_metal_cannot_tell_is_said_in_one_line(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    metal = Metal()
    here("mps", metal)
    monkeypatch.setattr(torch.mps, "synchronize", metal.synchronize)
    device = accelerator.device_named("mps")
    assert accelerator.memory_bytes(device) == 12 * GIB
    assert not accelerator.counts_peak(device) and not accelerator.has_streams(device)
    line = accelerator.peak_unknown(device)
    assert "counts no peak of memory on mps" in line and "\n" not in line
    with pytest.raises(Unsupported, match="counts no peak of memory on mps"):
        PeakMeter(device).__enter__()


def test_a_count_that_stays_at_zero_is_none(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card()
    here("xpu", card)
    monkeypatch.setattr(card, "max_memory_allocated", lambda _: card.live_bytes)
    assert not accelerator.counts_peak(torch.device("xpu"))


def test_reading_a_count_keeps_the_peak(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that watches its own peak must not lose it because somebody asks what is live."""
    card, device = Card(), torch.device("xpu", 0)
    here("xpu", card)
    assert accelerator.allocated_bytes(device) == 100
    assert "reset" not in card.asked and card.most_bytes == 900
    card.live_bytes = 0
    assert accelerator.allocated_bytes(device) is None  # zero whatever lives: nothing counts
    answers = iter([0, 2**20])
    monkeypatch.setattr(card, "memory_allocated", lambda _: next(answers))
    assert accelerator.allocated_bytes(device) == 0
    assert "reset" not in card.asked


def test_reserved_memory_and_the_most_of_it(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    here("xpu", Card())
    device = torch.device("xpu", 0)
    assert accelerator.reserved_bytes(device) == 2 * MIB
    assert accelerator.reserved_peak_bytes(device) == 22 * MIB
    assert accelerator.reserved_peak_bytes(torch.device("cpu")) is None
    metal = Metal()
    here("mps", metal)
    monkeypatch.setattr(torch.mps, "synchronize", metal.synchronize)
    assert accelerator.reserved_peak_bytes(torch.device("mps")) is None


def test_a_disturbed_trial_is_not_remembered(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    card, device = Card(), torch.device("xpu", 0)
    here("xpu", card)

    def full(size_bytes: int) -> None:
        raise torch.OutOfMemoryError("the card is full")

    def disturbed(size_bytes: int) -> None:
        raise RuntimeError("an error of an op before")

    with monkeypatch.context() as patch:
        patch.setattr(card, "take", full)
        with pytest.raises(torch.OutOfMemoryError):  # not "counts no peak"
            accelerator.peak_unknown(device)
        patch.setattr(card, "take", disturbed)
        assert not accelerator.counts_peak(device)
    assert accelerator.counts_peak(device)
    card.asked.clear()
    assert accelerator.counts_peak(device) and not card.asked  # tried once


def test_a_peak_that_nothing_counts_is_not_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(2, 4)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch).sum()

    plan = tightfit.plan(tightfit.trace(model, batch, loss=loss), "100%")
    assert tightfit.verify(model, batch, plan, loss=loss).passed
    monkeypatch.setattr(accelerator, "peak_unknown", lambda _: "nobody counts")
    proof = tightfit.verify(model, batch, plan, loss=loss)
    assert proof["gradients"].passed
    assert not proof["peak"].passed and not proof.passed
    assert (proof["peak"].measured, proof["peak"].tolerance) == ("not measured", "nobody counts")
    notes = tightfit.trace(model, batch, loss=loss).notes
    assert any("taken to be none: nobody counts" in note for note in notes)


def test_the_forecast_for_another_kind_says_whose_kernels_it_takes() -> None:
    model, batch = nn.Linear(4, 1), torch.randn(2, 4)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch).sum()

    cuda = tightfit.trace(model, batch, loss=loss, fake=True, device="cuda")
    xpu = tightfit.trace(model, batch, loss=loss, fake=True, device="xpu")
    assert xpu.device == "xpu" and "whose" not in str(cuda.notes)
    assert [note for note in xpu.notes if note not in cuda.notes] == [
        "kernels are taken to be CUDA's, which xpu's resemble but are not"
    ]
    with pytest.raises(InvalidInput, match="no kernels of 'meta' are known"):
        tightfit.trace(model, batch, loss=loss, fake=True, device="meta")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tpu", "unknown device 'tpu': use cpu or "),
        ("meta", "device 'meta' is not supported: use cpu or "),
        ("vulkan", "device 'vulkan' is not supported: use cpu or "),
        ("mps", "finds no mps device: use cpu"),
        ("xpu", "finds no xpu device: use cpu"),
    ],
)
def test_the_door(name: str, said: str) -> None:
    if name in ("mps", "xpu") and accelerator._kind_present() == name:
        pytest.skip("this machine has one")
    with pytest.raises(InvalidInput) as refused:
        accelerator.device_named(name)
    assert said in str(refused.value)


def test_a_card_beyond_the_last_is_refused(here: Any) -> None:
    here("xpu", Card())
    assert accelerator.device_named("xpu:0") == torch.device("xpu", 0)
    with pytest.raises(InvalidInput, match="'xpu:1' was asked for, but there are 1"):
        accelerator.device_named("xpu:1")


def test_a_generator_is_the_same_object_each_time() -> None:
    assert accelerator.default_generator(torch.device("cpu")) is torch.default_generator
    with pytest.raises(Unsupported, match="random numbers on xpu cannot be drawn again"):
        accelerator.default_generator(torch.device("xpu", 7))
