"""Tensors that wait in a pool: the same gradients bit for bit, the peak as predicted, and what can go wrong.

On the CPU the pool lies outside torch's allocator, so it is another device as far as a budget goes.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import tightfit
from tightfit.core import Action, Plan, Trace
from tightfit.engine import Applied
from tightfit.engine import offload as offload_module
from tightfit.engine.offload import Pool
from tightfit.plan import every_block, simulate


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_layer=4, n_embd=64, n_head=4, vocab_size=96, n_positions=256, bos_token_id=0, eos_token_id=0)
    ).train()  # dropout is on


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=96)
    ).train()


def tokens(batch: int = 2, seq: int = 128) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 96, (batch, seq), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


@functools.cache
def recorded(make: Callable[[], nn.Module]) -> Trace:
    """The step of a model as `make` makes it, recorded once for all tests that plan it."""
    return tightfit.trace(make(), tokens(), tiles=False)


def offloaded(trace: Trace, *, kept: bool, inputs: bool) -> Plan:
    """Offload what backward needs of each unit (`kept`), and its hidden states (`inputs`); recompute the rest."""
    plan = every_block(trace)
    choices = []
    for choice in plan.choices:
        frame = next(f for f in trace.frames if f.unit == choice.unit)
        program = trace.programs[frame.id]
        away = set(program.needed) - set(program.held) if kept else set()  # dropout's masks, written twice, too
        wide = [
            trace.values[v].size_bytes == max(trace.values[w].size_bytes for w in frame.inputs) for v in frame.inputs
        ]
        choices.append(
            dataclasses.replace(
                choice,
                actions=tuple(Action.OFFLOAD if v in away else action for v, action in enumerate(choice.actions)),
                inputs=tuple(Action.OFFLOAD if big and inputs else Action.KEEP for big in wide),
            )
        )
    plan = dataclasses.replace(plan, choices=tuple(choices))
    line = simulate(trace, plan)
    return dataclasses.replace(
        plan, peak_bytes=line.peak_bytes, budget_bytes=line.peak_bytes, recompute_flops=line.recompute_flops
    )


def gradients(model: nn.Module, batch: Any, backward: Any = torch.Tensor.backward) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    backward(model(**batch).loss)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize(("kept", "inputs"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_gradients_and_peak(make: Any, kept: bool, inputs: bool) -> None:
    model, batch = make(), tokens()
    trace = recorded(make)
    plan = offloaded(trace, kept=kept, inputs=inputs)
    proof = tightfit.verify(model, batch, plan)
    assert proof["gradients"].passed and proof["prediction"].passed, str(proof)
    assert abs(float(proof["prediction"].measured.split("off by ")[1].rstrip("%"))) <= 0.002, str(proof)
    expected = gradients(model, batch)
    with tightfit.apply(model, plan) as applied:
        assert same(expected, gradients(model, batch))
        assert applied.stats().fallbacks == 0 and applied.stats().held == 0
        assert applied.pool.copied_bytes == simulate(trace, plan).offloaded_bytes
        assert applied.pool.stored_bytes == 0  # every parcel was given back
        before = applied.pool.taken_bytes
        gradients(model, batch)
        assert applied.pool.taken_bytes == before  # and every buffer was used again


def test_offloading_lowers_the_peak() -> None:
    trace = tightfit.trace(llama(), tokens(4, 256), tiles=False)
    assert offloaded(trace, kept=False, inputs=True).peak_bytes < every_block(trace).peak_bytes


@pytest.mark.parametrize("ahead", [1, 2, 9])
def test_prefetching_changes_no_gradient(ahead: int) -> None:
    model, batch = gpt2(), tokens()
    plan = offloaded(recorded(gpt2), kept=True, inputs=True)
    expected = gradients(model, batch)
    pool = Pool(ahead=ahead)
    with Applied(model, plan, pool=pool):
        assert same(expected, gradients(model, batch))
        assert same(expected, gradients(model, batch))
    assert pool.stored_bytes == 0


def test_prefetching_has_the_unit_before_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = llama(), tokens()
    plan = offloaded(recorded(llama), kept=False, inputs=True)
    order: list[tuple[str, int]] = []
    pool = Pool(ahead=1)
    number: dict[int, int] = {}
    prefetch, fetch = offload_module.Parcel.prefetch, offload_module.Parcel.fetch

    def seen(what: str, parcel: Any) -> int:
        order.append((what, number.setdefault(id(parcel), len(number))))
        return 0

    monkeypatch.setattr(
        offload_module.Parcel,
        "prefetch",
        lambda self: (seen("copy", self) if self._coming is None and not self._is_given_back else 0, prefetch(self))[1],
    )
    monkeypatch.setattr(offload_module.Parcel, "fetch", lambda self: (seen("take", self), fetch(self))[1])
    with Applied(model, plan, pool=pool):
        gradients(model, batch)
    takes = [place for what, place in order if what == "take"]
    for place in takes[1:]:
        assert order.index(("copy", place)) < order.index(("take", place))


@pytest.mark.parametrize(("asked", "limit"), [("1MiB", 2**20), (0, 0), ("0", 0)])
def test_a_pool_without_room_leaves_tensors_where_they_are(asked: str | int, limit: int) -> None:
    model, batch = llama(), tokens()
    plan = offloaded(recorded(llama), kept=True, inputs=True)
    expected = gradients(model, batch)
    with tightfit.apply(model, plan, host_bytes=asked) as applied:
        assert same(expected, gradients(model, batch))
        assert applied.pool.taken_bytes <= limit
        assert applied.stats().held > 0


@pytest.mark.parametrize("asked", [-1, "50%", "much"])
def test_what_is_no_size_of_host_memory_is_refused(asked: str | int) -> None:
    model = llama()
    plan = offloaded(recorded(llama), kept=True, inputs=True)
    with pytest.raises(tightfit.InvalidInput, match="host budget"):
        tightfit.apply(model, plan, host_bytes=asked)


def test_a_graph_that_is_kept_can_be_walked_again() -> None:
    model, batch = llama(), tokens()
    plan = offloaded(recorded(llama), kept=True, inputs=True)

    def twice(loss: torch.Tensor) -> None:
        loss.backward(retain_graph=True)
        loss.backward()

    expected = gradients(model, batch, twice)
    with tightfit.apply(model, plan) as applied:
        assert same(expected, gradients(model, batch, twice))
        assert applied.pool.stored_bytes == 0
        loss = model(**batch).loss
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_shared_and_viewed_storages() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b, c = self.linear(x).tanh().chunk(3, dim=-1)  # three views of one storage, two of them transposed
            return (a.mul(b.t().contiguous().t()) @ c.t()) @ x + x.flip(0).sigmoid()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Views() for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x.square().mean()

    torch.manual_seed(0)
    model, x = Model(), torch.randn(24, 16, requires_grad=True)
    plan = offloaded(tightfit.trace(model, x, tiles=False), kept=True, inputs=True)

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        x.grad = None
        model(x).backward()
        assert x.grad is not None
        return [x.grad.clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected = step()
    with tightfit.apply(model, plan) as applied:
        assert same(expected, step())
        assert applied.pool.copied_bytes > 0


def test_spilling_to_a_file(tmp_path: Path) -> None:
    model, batch = llama(), tokens()
    plan = offloaded(recorded(llama), kept=True, inputs=True)
    expected = gradients(model, batch)
    with tightfit.apply(model, plan, spill=tmp_path) as applied:
        assert same(expected, gradients(model, batch))
        assert applied.pool.taken_bytes > 0
        assert os.listdir(tmp_path) == []  # the file has no name, so nothing is left behind, whatever happens


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = llama(), tokens()
    plan = offloaded(recorded(llama), kept=True, inputs=True)
    expected = gradients(model, batch)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with tightfit.apply(model, plan, spill=tmp_path):
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(tightfit.TightfitError, match="No space left on device; choose another folder"):
            gradients(model, batch)
        monkeypatch.undo()
        assert same(expected, gradients(model, batch))
    assert os.listdir(tmp_path) == []
    with pytest.raises(tightfit.InvalidInput, match="is no folder"):
        tightfit.apply(model, plan, spill=tmp_path / "missing")


def test_nothing_is_left_when_a_graph_is_thrown_away() -> None:
    model, batch = llama(), tokens()
    plan = offloaded(recorded(llama), kept=True, inputs=True)
    gc.disable()
    try:
        with tightfit.apply(model, plan) as applied:
            loss = model(**batch).loss
            assert applied.pool.stored_bytes > 0
            del loss
            assert applied.pool.stored_bytes == 0
            known = weakref.ref(applied.pool)
        del applied
        assert known() is None
    finally:
        gc.enable()


def test_a_broken_copy_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The saboteur: a parcel that comes back with one wrong byte must not become a gradient."""
    model, batch = llama(), tokens()
    plan = offloaded(recorded(llama), kept=False, inputs=True)
    fetch = offload_module.Parcel.fetch

    def wrong(self: Any) -> torch.Tensor:
        fresh = fetch(self)
        fresh[fresh.numel() // 2] ^= 1
        return fresh

    monkeypatch.setattr(offload_module.Parcel, "fetch", wrong)
    with tightfit.apply(model, plan), pytest.raises(tightfit.ReplayDiverged, match="came out different"):
        gradients(model, batch)
