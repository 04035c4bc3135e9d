"""What the offload lever does on a card that has streams, on the CPU: streams that only write down what they are told.

`test_pretend.py` runs the same on a card that does not exist, where a missing wait is a wrong number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import mmap
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tightfit import accelerator
from tightfit.core import Action, Plan, Trace
from tightfit.engine import offload
from tightfit.engine.offload import Pool, Shipment
from tightfit.levers.gradients_in_host.host import HostGradients
from tightfit.levers.optimizer_step import Waiting
from tightfit.levers.state_in_host.host import HostState
from tightfit.levers.stream_weights.host import Streamed, _Weight
from tightfit.plan import every_block, simulate
from tightfit.plan.shipping import Shipments
from tightfit.step.optimizers import Cut, stepping_in_chunks


class Event(str):
    """Its name; what the host waits for is written down too."""

    told: list[str]

    def synchronize(self) -> None:
        self.told.append(f"host waits for {self}")


class Stream:
    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    def wait_stream(self, other: Stream) -> None:
        self.told.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.told.append(f"{self.name} waits for {event}")

    def record_event(self) -> Event:
        found = Event(f"event {sum('event' in each for each in self.told)} of {self.name}")
        found.told = self.told
        return found

    def synchronize(self) -> None:
        self.told.append(f"host waits for {self.name}")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the streams were told, on a host that passes for a card."""
    found: list[str] = []
    names = iter(["out", "back", *(f"stream {i}" for i in range(100))])
    compute = Stream("compute", found)
    monkeypatch.setattr(accelerator, "has_streams", lambda device: True)
    monkeypatch.setattr(accelerator, "new_stream", lambda device: Stream(next(names), found))
    monkeypatch.setattr(accelerator, "running_stream", lambda device: compute)
    monkeypatch.setattr(accelerator, "on_stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(
        accelerator, "pinned", lambda size_bytes: torch.frombuffer(mmap.mmap(-1, size_bytes), dtype=torch.uint8)
    )
    offload._lanes_of.cache_clear()
    yield found
    offload._lanes_of.cache_clear()


def test_what_is_sent_out_stays_until_the_next_is(told: list[str]) -> None:
    pool = Pool()
    shipments = [Shipment(pool) for _ in range(2)]
    sources = []
    kept: list[Any] = []
    for shipment in shipments:
        tensor = torch.randn(100)
        parked = shipment.park(tensor)
        parked.seal()
        kept.append(parked)
        sources.append(weakref.ref(parked.parcel._leaving.source.untyped_storage()))  # type: ignore[union-attr]
        del tensor
        assert sources[-1]() is not None  # it is on its way
        shipment.sealed()
    assert sources[0]() is None and sources[1]() is not None
    assert "compute waits for event 0 of out" in told
    kept[1].take(keep=False)
    assert sources[1]() is None  # backward wants the first: the last has landed
    assert kept[0].parcel._coming is not None  # and the one before is on its way back


def test_the_order_of_the_copies(told: list[str]) -> None:
    pool = Pool()
    parcel = pool.store(torch.randn(100))
    assert parcel is not None
    parcel.land()
    parcel.fetch()
    assert told[:2] == ["out waits for compute", "compute waits for event 0 of out"] and len(told) == 5
    assert told[2] == "back waits for compute" and told[3].startswith("back waits for event") and "of out" in told[3]
    assert told[4].startswith("compute waits for event") and "of back" in told[4]


def test_who_takes_a_buffer_waits_for_the_last_copy_out_of_it(told: list[str]) -> None:
    """The copy may be of another thread's stream, which this one does not wait for otherwise."""
    device, pool = torch.device("cpu"), Pool()

    def given_back() -> str:
        parcel = pool.store(torch.randn(100))
        assert parcel is not None
        parcel.fetch()
        arrived = told[-1].removeprefix("compute waits for ")
        parcel.give_back()
        told.clear()
        assert "of back" in arrived
        return arrived

    arrived = given_back()
    assert pool.store(torch.randn(100)) is not None
    assert f"out waits for {arrived}" in told
    arrived = given_back()
    room = pool.room(400, device)
    assert room is not None and told == [f"compute waits for {arrived}"]
    pool.room_is_free(room, device)
    told.clear()
    assert pool.store(torch.randn(100)) is not None
    # what was copied out of the room comes first
    assert any(line.startswith("out waits for event") and line.endswith("of compute") for line in told)


def test_state_is_waited_for_by_its_own_step_and_by_the_host_at_the_end(told: list[str]) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))
    optimizer, at = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), [0]
    step = torch.optim.SGD.step

    def noted(self: Any, *given: Any) -> Any:
        told.append(f"step {at[0] % 3}")
        at[0] += 1
        return step.__wrapped__(self, *given)  # type: ignore[attr-defined]

    torch.optim.SGD.step = noted  # type: ignore[method-assign]
    try:
        with HostState(optimizer, Waiting(1), Pool(), ahead=True), stepping_in_chunks(optimizer, Cut(1, False)):
            for _ in range(2):
                told.clear()
                model(torch.ones(2, 8)).sum().backward()
                optimizer.step()
    finally:
        torch.optim.SGD.step = step  # type: ignore[method-assign]
    names = [" ".join(word for word in each.split() if not word.isdigit()) for each in told]
    comes, leaves = ["back waits for compute"], ["out waits for compute"]
    has_come, has_left = ["compute waits for event of back"], ["compute waits for event of out"]
    assert names == [
        *comes, "step", *leaves,
        *has_come, *comes, "step", *has_left, *leaves,
        *has_come, "step", *has_left, *leaves,
        *has_left, "host waits for out",
    ]  # fmt: skip


def test_the_host_waits_for_a_weights_copy(told: list[str]) -> None:
    """Whoever has the copy may write over the weight, and the copy that comes is not used before."""
    of: Any = SimpleNamespace(frozen=SimpleNamespace(path=""), pool=Pool(), stats=Streamed(), fetching=None)
    tensor = torch.randn(300)
    weight: Any = _Weight(of, tensor, of.pool.room_for(tensor), torch.device("cpu"))
    told.clear()
    begun = weight.begin()
    assert told == ["back waits for compute"]
    weight.fresh(begun)
    assert [each.split(" event")[0] for each in told[1:]] == ["host waits for", "compute waits for"]
    told.clear()
    weight.drop(weight.begin())
    assert [each.split(" event")[0] for each in told[1:]] == ["host waits for", "compute waits for"]


def test_the_host_waits_for_a_gradients_copy(told: list[str]) -> None:
    model = nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.ones(2, 8)).sum().backward()
    with HostGradients(model, optimizer, 1, Pool()) as waiting:
        told.clear()
        with waiting.on_device(model.parameters()):
            assert not told
        assert [each.split(" event")[0] for each in told] == ["host waits for"]


def test_all_pools_have_the_same_streams(told: list[str]) -> None:
    device = torch.device("cpu")
    assert Pool().lanes(device) is Pool().lanes(device)


def test_pinned_memory_comes_in_few_large_blocks(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    pinned = accelerator.pinned
    monkeypatch.setattr(accelerator, "pinned", lambda size_bytes: (asked.append(size_bytes), pinned(size_bytes))[1])
    pool = Pool()
    parcels = [pool.store(torch.zeros(2**20 + i * 5000)) for i in range(40)]  # each would be rounded up to 8 MiB
    assert all(parcels)
    assert len(asked) <= 3 and all(size & (size - 1) == 0 for size in asked)
    assert pool.taken_bytes == sum(asked) < 40 * 8 * 2**20
    assert pool.stored_bytes <= pool.taken_bytes
    starts = sorted((p.buffer.data_ptr(), p.buffer.numel()) for p in parcels if p is not None)
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(starts))


def test_a_pool_pins_no_more_than_it_may(told: list[str]) -> None:
    pool = Pool(capacity_bytes=3 * 2**20)
    stored = [pool.store(torch.zeros(2**17)) for _ in range(8)]  # half a MiB each
    assert sum(parcel is not None for parcel in stored) == 6
    assert pool.taken_bytes == 3 * 2**20


def test_a_system_that_pins_no_more(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    pinned = accelerator.pinned

    def refused(size_bytes: int) -> torch.Tensor:
        asked.append(size_bytes)
        if size_bytes > 2**21:
            raise RuntimeError("CUDA error: out of memory")
        return pinned(size_bytes)

    monkeypatch.setattr(accelerator, "pinned", refused)
    pool = Pool()
    assert pool.store(torch.zeros(2**20)) is None
    assert pool.store(torch.zeros(2**18)) is not None
    before = len(asked)
    assert pool.store(torch.zeros(2**20)) is None
    assert len(asked) == before  # it is not asked for again what it has refused
    shipment = Shipment(pool)
    parked = shipment.park(torch.ones(2**20))
    parked.seal()
    shipment.sealed()
    assert shipment.held == 1 and parked.take(keep=False).sum() == 2**20


def test_what_backward_fetches_with_the_first_parcel() -> None:
    def of(beside: bool) -> Shipments:
        return Shipments({7: 10, 3: 4, 9: 20}, [31, 40, 33], 99, copies_beside=beside)

    on_card, on_host = of(True), of(False)
    assert on_host.landed == {7: 10, 3: 4, 9: 20}
    assert on_card.landed == {3: 10, 7: 20, 9: 30}
    assert on_card.fetched_with(9) == (7,) and on_card.fetched_with(9) == ()
    assert on_card.fetched_with(3) == () and on_host.fetched_with(9) == ()
    assert Shipments({3: 4}, [], 99, copies_beside=True).landed == {3: 99}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).sigmoid().tanh())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def everything_away(trace: Trace) -> Plan:
    plan = every_block(trace)
    choices = []
    for choice in plan.choices:
        program = trace.programs[next(f for f in trace.frames if f.unit == choice.unit).id]
        away = set(program.needed) - set(program.held)
        actions = tuple(Action.OFFLOAD if v in away else a for v, a in enumerate(choice.actions))
        choices.append(dataclasses.replace(choice, actions=actions))
    plan = dataclasses.replace(plan, choices=tuple(choices))
    line = simulate(trace, plan)
    return dataclasses.replace(plan, peak_bytes=line.peak_bytes, budget_bytes=line.peak_bytes, recompute_flops=0)


def test_the_peak_has_what_is_under_way(told: list[str]) -> None:
    model, x = Model(), torch.randn(512, 64)
    trace = tightfit.trace(model, x)
    on_host = everything_away(dataclasses.replace(trace, copies_beside=False)).peak_bytes
    trace = dataclasses.replace(trace, copies_beside=True)
    plan = everything_away(trace)
    assert plan.peak_bytes > 1.1 * on_host
    proof = tightfit.verify(model, x, plan)
    assert proof["gradients"].passed and proof["prediction"].passed, str(proof)
    assert abs(float(proof["prediction"].measured.split("off by ")[1].rstrip("%"))) <= 0.05, str(proof)
