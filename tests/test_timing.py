"""What an op's seconds are, from timings that were made up: what they should say is known."""

from __future__ import annotations

import dataclasses
import math
import mmap

import pytest
import torch
from torch import nn

import tightfit
from tightfit.device.cost import fresh_seconds, unplanned_seconds
from tightfit.plan import every_block
from tightfit.trace import passes, timing
from tightfit.trace.timing import (
    Equal,
    Pace,
    Sample,
    Stopwatch,
    fitted,
    fresh_seconds_per_byte,
    in_doubt,
    is_disturbed,
    on_one_thread,
    spread,
)


def made(name: str, number: int, *seconds: float, flops: int = 0, moved_bytes: int = 10**7) -> Equal:
    return Equal(name, flops, moved_bytes, (number,), tuple(Sample(each) for each in seconds))


def products(count: int, *, slow: int | None = None) -> list[Equal]:
    """Matrix products at 1e-11 seconds a FLOP, timed three times each; all timings of one are `slow` ... too slow."""
    found = []
    for number in range(count):
        flops = (number + 1) * 10**8
        factor = 4.0 if number == slow else 1.0
        found.append(
            made("aten.mm", number, *(factor * flops * 1e-11 * each for each in (1.0, 1.01, 1.02)), flops=flops)
        )
    return found


def test_timings_that_agree_are_believed() -> None:
    groups = [*products(6, slow=3), made("aten.gelu", 6, 2e-3, 2.01e-3, 2.02e-3), made("aten.add", 7, 1e-3, 1e-3, 1e-3)]
    found = fitted(groups)
    for group in groups:
        (call,) = group.calls
        assert found[call] == pytest.approx(min(sample.seconds for sample in group.samples), rel=0.02)


def test_timings_that_scatter_are_weighed_against_what_such_ops_take() -> None:
    """The fourth product was disturbed each time it ran. As all are disturbed, it is not believed."""
    noise = ((1.0, 2.5, 4.0), (1.1, 1.9, 6.0), (0.9, 2.2, 3.0), (3.5, 8.0, 9.0), (1.0, 3.0, 3.5), (1.2, 2.0, 5.0))
    groups = []
    for number, factors in enumerate(noise):
        flops = (number + 1) * 10**8
        groups.append(made("aten.mm", number, *(flops * 1e-11 * each for each in factors), flops=flops))
    found = fitted(groups)
    off = [math.log(found[number] / ((number + 1) * 1e-3)) for number in range(len(noise))]
    assert off[3] < math.log(3.5) / 2
    assert max(abs(each) for each in (*off[:3], *off[4:])) < math.log(1.5)
    assert in_doubt(groups) and not in_doubt(products(6))


def test_one_long_timing_among_several_does_not_count() -> None:
    groups = products(6)
    disturbed = made("aten.mm", 2, 3e-3, 3.02e-3, 60e-3, flops=3 * 10**8)
    assert fitted([*groups[:2], disturbed, *groups[3:]])[2] == pytest.approx(3e-3, rel=0.02)


def test_ops_of_equal_work_take_the_same() -> None:
    group = Equal("aten.add", 0, 10**6, (4, 9), (Sample(1e-3), Sample(2e-3), Sample(1.5e-3)))
    found = fitted([group])
    assert found.keys() == {4, 9} and found[4] == found[9] > 0


def test_an_op_without_a_timing_has_no_seconds() -> None:
    assert fitted([Equal("aten.add", 0, 10**6, (0,), ())]) == {}
    assert fitted([]) == {}


def test_memory_that_was_new_by_chance_costs_nothing_and_that_is_always_new_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "_fault_seconds_per_byte", lambda threads: 1e-9)
    new = 10**8
    once = Equal("aten.add", 0, 10**8, (0,), (Sample(0.12, new), Sample(0.02), Sample(0.02)))
    always = Equal("aten.mul", 0, 10**8, (1,), (Sample(0.15, new), Sample(0.15, new), Sample(0.15, new)))
    found = fitted([once, always])
    assert found[0] == pytest.approx(0.02, rel=0.02)
    assert found[1] == pytest.approx(0.15, rel=0.02)


def test_where_threads_waited_the_step_is_timed_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = [Equal("aten.add", 0, 10**6, (0,), (Sample(1e-3, 0, 2e-3),))]
    quiet = [Equal("aten.add", 0, 10**6, (0,), (Sample(1e-3, 0, 1e-5),))]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert is_disturbed(waited) and not is_disturbed(quiet)
    assert spread(Sample(1e-3)).seconds == 0.5e-3
    assert spread(Sample(1e-5)).seconds == 1e-5  # too short to be divided
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert not is_disturbed(waited)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert not is_disturbed(waited)


def test_the_number_of_threads_is_put_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), on_one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_new_pages_are_counted(clock: None) -> None:
    """Mapped here: what the allocator gives may lie where other tests have been."""
    pytest.importorskip("resource")
    watch = Stopwatch(torch.device("cpu"))
    block = torch.frombuffer(mmap.mmap(-1, 2**26), dtype=torch.float32)
    watch.start()
    block.fill_(1.0)
    sample = watch.stop()
    assert sample.faulted_bytes >= 0.9 * block.nbytes and sample.seconds > 0
    watch.start()
    block.fill_(2.0)
    assert watch.stop().faulted_bytes < 0.1 * block.nbytes


def test_several_processes_run_the_step_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them would wait for the others in a collective that they do not come to."""
    runs = []

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        return model(x).sum()

    monkeypatch.setattr(passes, "in_doubt", lambda groups: True)
    monkeypatch.setattr(passes, "is_short", lambda groups: False)
    monkeypatch.setattr(passes, "run_together", lambda: True)
    tightfit.trace(nn.Linear(2, 2), torch.ones(1, 2), loss=loss, tiles=False)
    assert len(runs) == 3


def test_a_step_that_others_disturb_is_timed_anew_on_one_thread(clock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            threads.append(torch.get_num_threads())
            self.calls.add_(1)
            return self.inner(torch.dropout(x, 0.5, True)).relu()

    model = nn.Sequential(Block(), Block())
    samples: list[list[int]] = []
    monkeypatch.setattr(passes, "is_short", lambda groups: False)
    monkeypatch.setattr(passes, "is_disturbed", lambda groups: True)
    monkeypatch.setattr(passes, "in_doubt", lambda groups: samples.append([len(g.samples) for g in groups]) or True)
    state = torch.get_rng_state()
    trace = tightfit.trace(model, torch.ones(3, 4), loss=lambda m, x: m(x).sum(), tiles=False)
    assert len(threads) == 2 * (3 + 4) and set(threads[2 * 3 :]) == {1}
    assert max(samples[0]) == 0  # those that were disturbed are gone
    assert min(samples[-1]) == 3
    assert torch.equal(torch.get_rng_state(), state) and int(model[0].calls) == 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert min(op.seconds for op in trace.ops) > 0


def test_what_lies_between_ops_is_theirs() -> None:
    """A call takes up to 20 microseconds; what is more goes with the ops' own seconds."""
    own = {0: 1e-3, 1: 3e-3}
    assert Pace.of(own, Sample(4e-3 + 2e-5)).paced(own) == pytest.approx({0: 1e-3 + 1e-5, 1: 3e-3 + 1e-5})
    found = Pace.of(own, Sample(5e-3)).paced(own)
    assert sum(found.values()) == pytest.approx(5e-3) and found[1] == pytest.approx(3 * (found[0] - 2e-5) + 2e-5)
    assert Pace.of(own, Sample(2e-3)).paced(own) == own  # timings may be longer than the step, and are believed
    assert Pace.of({}, Sample(1.0)).paced({}) == {}


def test_new_memory_is_in_proportion_to_what_the_step_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_fault_seconds_per_byte", lambda threads: 1e-9)
    always = Equal("aten.mm", 1, 1, (0, 1), (Sample(1.0, 5 * 10**7), Sample(1.0, 6 * 10**7)))
    rate = fresh_seconds_per_byte([always], Sample(4.0, 5 * 10**8), 8 * 10**8)
    assert rate == pytest.approx(0.5e-9)  # 400 of 800 million bytes were met anew, beside those that always are
    assert fresh_seconds_per_byte([always], Sample(4.0, 10**8), 8 * 10**8) == 0.0
    trace = tightfit.trace(nn.Linear(2, 2), torch.ones(1, 2), loss=lambda m, x: m(x).sum())
    known = dataclasses.replace(trace, fresh_seconds_per_byte=rate)
    assert fresh_seconds(known, 10**9, 6 * 10**8) == pytest.approx(-0.2) and fresh_seconds(trace, 10**9, 1) == 0.0
    assert fresh_seconds(known, 10**9, 2 * 10**9) == 0.0
    own = sum(op.seconds for op in trace.ops)
    assert unplanned_seconds(trace, 10**9) == own
    assert unplanned_seconds(known, 10**9) + fresh_seconds(known, 10**9, 0) == pytest.approx(
        own
    )  # never below the ops'


def test_a_plan_says_what_its_lower_peak_saves() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)))
    trace = tightfit.trace(model, torch.ones(512, 64), loss=lambda m, x: m(x).sum())
    plain = every_block(trace)
    made = every_block(dataclasses.replace(trace, fresh_seconds_per_byte=1e-9))
    saved = 1e-9 * (made.unplanned_peak_bytes - made.peak_bytes)
    assert saved > 0 and plain.fresh_seconds == 0.0
    assert made.fresh_seconds == pytest.approx(-saved)
    risen = 1e-9 * (made.unplanned_peak_bytes - sum(trace.static_bytes.values()))
    assert made.step_seconds == pytest.approx(plain.step_seconds + risen - saved)
    assert made.slowdown < plain.slowdown
