"""Limits that are set outside of tightfit: a share of a card, a slice of one, control groups, the machine's memory."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tightfit import accelerator
from tightfit.accelerator import control_groups
from tightfit.core import BudgetInfeasible, InvalidInput, PlanMismatch, Trace, parse_levers
from tightfit.engine import apply, limits
from tightfit.engine.offload import held_bytes
from tightfit.fitting import fit as fitting
from tightfit.fitting.micro_batches import gradients_in_place
from tightfit.plan import lowest
from tightfit.plan.account import host_bytes
from tightfit.train.record import RunRecord

GIB, MIB = 2**30, 2**20


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write files of a system that is not there; unset what they are not told of."""
    monkeypatch.setattr(control_groups, "ROOT", tmp_path)

    def write(groups: str, **files: str) -> None:
        (tmp_path / "proc/self").mkdir(parents=True, exist_ok=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
        for name, text in files.items():
            path = tmp_path / "sys/fs/cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


UNLIMITED = "9223372036854771712\n"


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("0::/\n", {"memory.max": "1000\n"}, 1000),
        ("0::/a/b\n", {"a/memory.max": "500\n", "a/b/memory.max": "max\n", "memory.max": "max\n"}, 500),
        ("0::/a/b\n", {"a/memory.max": "500\n", "a/b/memory.max": "400\n"}, 400),
        ("0::/docker/x\n", {"memory.max": "700\n"}, 700),  # a path of the host's, which is not there
        ("0::/\n4:memory:/job\n", {"memory/job/memory.limit_in_bytes": "300\n"}, 300),
        ("3:cpu,memory:/job\n", {"memory/job/memory.limit_in_bytes": "300\n", "job/memory.max": "1"}, 300),
        ("4:memory:/docker/x\n", {"memory/memory.limit_in_bytes": "200\n"}, 200),
        ("2:cpu:/a\n0::/b\n", {"unified/b/memory.max": "100\n", "cpu/a/memory.limit_in_bytes": "1"}, 100),
        ("no lines of that kind", {"memory.max": "90"}, 90),
        ("0::/a\n", {"memory.max": "0\n", "a/memory.max": "max\n"}, 0),
        ("0::/a\n", {"memory.max": "-1\n", "a/memory.max": "500\n"}, 500),
        ("0::/a\n", {"memory.max": "1_000\n", "a/memory.max": "4096 of it\n"}, None),
        ("0::/a\n", {"memory.max": "", "a/memory.max": "1e9\n"}, None),
        ("", {}, None),
    ],
)
def test_the_least_limit_of_the_control_groups(
    groups: str, files: dict[str, str], limit: int | None, system: Any
) -> None:
    system(groups, **files)
    assert control_groups.least_limit_bytes() == limit


def test_what_this_process_may_take_of_host_memory(system: Any) -> None:
    whole_bytes = accelerator.host_memory_bytes()
    assert whole_bytes is not None
    system("4:memory:/job\n", **{"memory/job/memory.limit_in_bytes": UNLIMITED})
    assert accelerator.limit_bytes(accelerator.HOST) == whole_bytes
    before = accelerator.free_bytes(accelerator.HOST)
    assert before is not None and 0 < before < whole_bytes
    system("0::/a\n", **{"a/memory.max": str(whole_bytes - 100 * MIB)})
    assert accelerator.limit_bytes(accelerator.HOST) == whole_bytes - 100 * MIB
    after = accelerator.free_bytes(accelerator.HOST)
    assert after is not None and abs(before - after - 100 * MIB) < 50 * MIB


class Card:
    """What torch tells of a card: of a MIG slice it tells the slice's memory, and the share that was set."""

    def __init__(self, memory_bytes: int, share: float | None) -> None:
        self.get_device_properties = lambda _: SimpleNamespace(total_memory=memory_bytes, name="Slice 1g.10gb")
        self.get_device_name = lambda _: "Slice 1g.10gb"
        if share is not None:
            self.get_per_process_memory_fraction = lambda _: share


@pytest.mark.parametrize(
    ("share", "limit"), [(None, 8 * GIB), (1.0, 8 * GIB), (0.5, 4 * GIB)], ids=["not told", "all", "half"]
)
def test_a_share_of_a_card_is_a_limit(share: float | None, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(8 * GIB, share)
    monkeypatch.setattr(accelerator, "_module", lambda _: card)
    here = torch.device("cuda", 0)
    assert accelerator.memory_bytes(here) == 8 * GIB and accelerator.limit_bytes(here) == limit
    # a percentage of train's is of the card, as ever, and never more than the share
    for budget, found in (("25%", 2 * GIB), ("80%", min(limit, 8 * GIB * 4 // 5))):
        record = SimpleNamespace(options=SimpleNamespace(budget=budget, plan=None), device=here)
        assert RunRecord._budget(record) == found  # type: ignore[arg-type]


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4)))


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = model(batch).square().mean()
    return out


@functools.cache
def recorded() -> Trace:
    return tightfit.trace(stack(), torch.randn(512, 64), loss=loss, tiles=False)


def test_a_budget_beyond_the_share_of_a_card_is_lowered_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = recorded()
    peak_bytes = tightfit.simulate(trace).peak_bytes
    card = Card(2 * peak_bytes, 0.4)
    monkeypatch.setattr(accelerator, "_module", lambda _: card)
    limit = int(0.4 * 2 * peak_bytes)

    def make(budget: str | int, host_budget: int | None) -> tightfit.Plan:
        return tightfit.plan(trace, budget, host_budget=host_budget)

    asked, honest = [], limits.share_of_device
    monkeypatch.setattr(limits, "share_of_device", lambda device: (asked.append(device), honest(device))[1])
    with pytest.warns(UserWarning, match=r"this process may take .* of Slice 1g.10gb: planned for that"):
        made = limits.planned_here(trace, "100%", None, torch.device("cuda", 0), make)
    assert len(asked) == 1
    assert made.budget_bytes == limit >= made.peak_bytes
    assert limits.planned_here(trace, "75%", None, torch.device("cuda", 0), make).budget_bytes == int(0.75 * peak_bytes)


def test_a_budget_beyond_the_control_groups_limit_is_lowered_and_said(system: Any) -> None:
    """On the CPU too; a limit beyond the budget changes nothing, and a machine without one is not looked at."""
    model, rows = stack(), torch.randn(512, 64)
    trace = recorded()
    peak_bytes = tightfit.simulate(trace).peak_bytes
    limit = int(peak_bytes * 0.8)
    system("0::/job\n", **{"job/memory.max": str(limit)})
    with (
        pytest.warns(UserWarning, match=r"may take .* of host memory, by its control group's limit: planned for that"),
        tightfit.fit(model, rows, "100%", loss) as applied,
    ):
        assert applied.plan.budget_bytes == limit >= applied.plan.peak_bytes
    for text in (str(2 * peak_bytes), "max", UNLIMITED):
        system("0::/job\n", **{"job/memory.max": text})
        with warnings.catch_warnings(), tightfit.fit(model, rows, "100%", loss) as applied:
            warnings.simplefilter("error")
            assert applied.plan.budget_bytes == applied.plan.unplanned_peak_bytes


def test_a_plan_that_was_given_names_the_limit_that_it_does_not_keep(
    system: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = stack(), torch.randn(512, 64)
    trace = recorded()
    whole, waits = tightfit.plan(trace, "100%"), tightfit.plan(trace, "60%", levers="recompute,offload")
    system("0::/job\n", **{"job/memory.max": str(int(whole.peak_bytes * 0.8))})
    with (
        pytest.warns(UserWarning, match="by its control group's limit: planned for that"),
        pytest.raises(PlanMismatch, match="may take of host memory, by its control group's limit; raise that limit"),
    ):
        tightfit.fit(model, rows, loss=loss, plan=whole)
    with (
        pytest.warns(UserWarning, match="by its control group's limit: planned for that"),
        pytest.raises(PlanMismatch, match=r"larger than that which it was made for; .*raise the budget"),
    ):
        tightfit.fit(model, rows.repeat(8, 1), loss=loss, plan=whole)  # whatever the limit
    system("0::/job\n", **{"job/memory.max": "max"})
    monkeypatch.setattr(limits, "_beside_step", lambda *_: 4096)
    with pytest.raises(
        PlanMismatch, match=r"may take 4.00 KiB: that is what this machine, or the limit of its control"
    ):
        tightfit.fit(model, rows, loss=loss, plan=waits)
    with pytest.raises(PlanMismatch, match="or raise the host budget"):
        tightfit.fit(model, rows, loss=loss, plan=waits, host_budget=4096)


@pytest.mark.parametrize("more", [{}, {"micro_batch": "auto"}])
@pytest.mark.parametrize("budget", ["100%", "1GiB"])
def test_a_limit_of_nothing_is_told_in_one_line(budget: str, more: Any, system: Any) -> None:
    system("0::/job\n", **{"job/memory.max": "0"})
    says = (
        r"a budget of .* was asked for, and this process may take nothing of host memory, by its control group's limit"
    )
    with pytest.raises(InvalidInput, match=says):
        tightfit.fit(stack(), torch.randn(512, 64), budget, loss, **more)


@pytest.mark.parametrize("micro_batch", ["auto", 512, 256])
@pytest.mark.parametrize("is_percentage", [False, True])
def test_so_it_is_for_micro_batches(micro_batch: Any, is_percentage: bool, system: Any) -> None:
    model, rows = stack(), torch.randn(512, 64)
    peak_bytes = tightfit.simulate(recorded()).peak_bytes
    limit = int(peak_bytes * 0.8)
    system("0::/job\n", **{"job/memory.max": str(limit)})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        budget: Any = "100%" if is_percentage else peak_bytes
        with tightfit.fit(model, rows, budget, loss, micro_batch=micro_batch) as applied:
            assert applied.plan.budget_bytes == limit >= applied.plan.peak_bytes
    assert sum("by its control group's limit: planned for that" in str(each.message) for each in said) == 1


def fitted(part: float, **more: Any) -> tuple[tightfit.Plan, int]:
    """The plan that `fit` makes by offload, and its bytes in host memory."""
    model, rows = stack(), torch.randn(512, 64)
    with tightfit.fit(model, rows, f"{part:.0%}", loss, levers="recompute,offload", **more) as applied:
        assert applied.trace is not None
        return applied.plan, sum(host_bytes(applied.trace, applied.plan).values())


def test_a_plan_beyond_what_the_machine_leaves_is_another_or_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # seconds that are measured anew give other plans
    monkeypatch.setattr(fitting, "trace", lambda *_, **__: recorded())
    free, wanted_bytes = fitted(0.6)
    assert wanted_bytes > 0 and free.host_budget_bytes is None
    monkeypatch.setattr(limits, "_beside_step", lambda *_: wanted_bytes)
    assert fitted(0.6)[0].host_budget_bytes is None  # there is room
    monkeypatch.setattr(limits, "_beside_step", lambda *_: wanted_bytes // 2)
    made, waiting_bytes = fitted(0.6)
    assert waiting_bytes <= wanted_bytes // 2 == made.host_budget_bytes
    with pytest.warns(UserWarning, match="and this machine leaves"):
        assert fitted(0.6, host_budget="1GiB")[1] == wanted_bytes  # the user's own word
    trace = recorded()
    floors = [lowest(trace, levers=parse_levers(n)).peak_bytes for n in ("recompute,offload", "recompute")]
    monkeypatch.setattr(limits, "_beside_step", lambda *_: 4096)
    assert fitted(0.6, spill=tmp_path)[1] == wanted_bytes  # what waits in a file needs none of it
    with pytest.raises(BudgetInfeasible, match=r"no host budget was given: 4.00 KiB is what this machine"):
        fitted(sum(floors) / 2 / tightfit.simulate(trace).peak_bytes)


@pytest.mark.parametrize("micro_batch", [256, pytest.param("auto", marks=pytest.mark.slow)])
def test_micro_batches_wait_within_what_the_machine_leaves(
    micro_batch: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, rows = stack()[:2], torch.randn(512, 64)

    def cut(**more: Any) -> tuple[tightfit.Plan, int]:
        asked = {"levers": "recompute,offload", "micro_batch": micro_batch} | more
        with tightfit.fit(model, rows, budget_bytes, loss, **asked) as applied:
            assert applied.trace is not None and applied.plan.peak_bytes <= budget_bytes
            return applied.plan, sum(host_bytes(applied.trace, applied.plan).values())

    # so little that only with offload half the rows run
    with gradients_in_place(model, True):
        trace = tightfit.trace(model, rows[:256], loss=loss, tiles=False)
    floors = [lowest(trace, levers=parse_levers(names)).peak_bytes for names in ("recompute,offload", "recompute")]
    budget_bytes = sum(floors) // 2
    free, wanted_bytes = cut()
    assert wanted_bytes > 4096 and free.host_budget_bytes is None
    monkeypatch.setattr(limits, "_beside_step", lambda *_: 4096)
    if micro_batch == "auto":  # fewer rows do
        assert cut()[1] <= 4096
    else:
        with pytest.raises(BudgetInfeasible, match=r"no host budget was given: 4.00 KiB is what this machine"):
            cut()
    assert cut(spill=tmp_path)[1] > 4096  # what waits in a file needs none of it
    with pytest.warns(UserWarning, match="and this machine leaves") as told:
        assert cut(host_budget="1GiB")[1] > 4096  # the user's own word
    assert len([each for each in told if "this machine leaves" in str(each.message)]) == 1


def test_what_is_left_counts_the_step_where_the_host_is_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = recorded()
    weights = sum(p.numel() * 4 for p in stack().parameters())
    monkeypatch.setattr(accelerator, "free_bytes", lambda _: 100 * MIB)
    held = 7 * MIB  # by pools, which counts as free
    monkeypatch.setattr(limits, "held_bytes", lambda: held)
    left = limits._beside_step(trace, 40 * MIB, torch.device("cpu"))
    assert left == 100 * MIB + held - (40 * MIB - weights)
    assert limits._beside_step(trace, 40 * MIB, torch.device("cuda", 0)) == 100 * MIB + held
    assert limits._beside_step(trace, 900 * MIB, torch.device("cpu")) == 0
    monkeypatch.setattr(accelerator, "free_bytes", lambda _: None)
    assert limits._beside_step(trace, 40 * MIB, torch.device("cpu")) is None


def test_what_pools_hold_is_no_reason_against_the_next_plan() -> None:
    model, rows = stack(), torch.randn(512, 64)
    before = held_bytes()
    trace = recorded()
    plan = tightfit.plan(trace, "60%", levers="recompute,offload")
    with apply(model, plan) as applied:
        loss(model, rows).backward()
        assert held_bytes() - before == applied.pool.taken_bytes > 0
