"""The loss in place for TRL's chunked loss where there is no Triton: a few rows at a time, the same bits."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tightfit.core import Lever
from tightfit.forecast import Setup, trace_setup
from tightfit.levers.loss_in_place import by_rows as module
from tightfit.levers.loss_in_place import with_loss_in_place
from tightfit.levers.loss_in_place.by_rows import by_rows, slices_of
from tightfit.trace.unroll import unroll
from tightfit.verify.peak import PeakMeter

chunked = pytest.importorskip("trl.kernels.chunked_logprob", reason="a TRL whose loss is chunked")


def outcome(
    rows: int, words: int, *, dtype: torch.dtype = torch.float32, chunk: int = 48, softcap: float | None = None,
    bias: bool = False, outputs: tuple[str, ...] = chunked.OPTIONAL_OUTPUTS,
) -> list[torch.Tensor]:  # fmt: skip
    torch.manual_seed(rows)
    leaves = [torch.randn(rows, 12), torch.randn(words, 12), torch.randn(words)]
    hidden, weight, shift = (each.to(dtype).requires_grad_() for each in leaves)
    targets = torch.randint(0, words, (rows,))
    given = (hidden, weight, shift if bias else None, targets, 0.7, chunk, softcap, 1.3, outputs)
    made = [each for each in chunked.ChunkedLogProbFunction.apply(*given) if each is not None]
    sum(each.float().square().sum() for each in made if each.requires_grad).backward()
    return [*made, *(each.grad for each in (hidden, weight, shift) if each.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("at_once", [1, 5, 64])
@pytest.mark.parametrize("threads", [1, 2])
def test_bit_for_bit(dtype: torch.dtype, at_once: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "rows_at_once", lambda rows, row_bytes, least_bytes: min(rows, at_once))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows, words, more in (
            (1, 97, {}), (3, 97, {}), (65, 97, {"softcap": 30.0}), (130, 1, {}), (33, 4099, {"chunk": 4096}),
            (7, 40_000, {"chunk": 40_000}), (64, 96, {"bias": True}), (31, 97, {"outputs": ()}),
            (33, 97, {"chunk": 32768}),
        ):  # fmt: skip
            expected = outcome(rows, words, dtype=dtype, **more)
            with by_rows():
                found = outcome(rows, words, dtype=dtype, **more)
            assert [torch.equal(*pair) for pair in zip(expected, found, strict=True)] == [True] * len(expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 63, 64, 65, 1000])
@pytest.mark.parametrize("row_bytes", [4, 2**17, 2**21])
def test_the_slices_are_all_rows_and_none_is_one_row(rows: int, row_bytes: int) -> None:
    slices = slices_of(rows, row_bytes)
    lengths = [each.stop - each.start for each in slices]
    assert [i for each in slices for i in range(each.start, each.stop)] == list(range(rows))
    assert max(lengths) == lengths[-1] and max(lengths) - min(lengths) <= 1
    assert rows == 1 or min(lengths) > 1


def test_the_functions_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    own = chunked._forward_tile, chunked._backward_tile
    with by_rows():
        with by_rows():
            pass
        assert chunked._forward_tile is not own[0] and chunked._backward_tile is not own[1]
    assert (chunked._forward_tile, chunked._backward_tile) == own
    assert "apply" not in vars(chunked.ChunkedLogProbFunction)
    monkeypatch.delitem(sys.modules, "trl.kernels.chunked_logprob")
    with by_rows():  # nothing to replace
        pass
    assert (chunked._forward_tile, chunked._backward_tile) == own


def test_a_package_that_is_loaded_under_a_plan_is_changed_by_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    own = chunked._forward_tile
    loaded = sys.modules["trl.kernels.chunked_logprob"]
    monkeypatch.delitem(sys.modules, "trl.kernels.chunked_logprob")
    with by_rows():
        monkeypatch.setitem(sys.modules, "trl.kernels.chunked_logprob", loaded)
        with by_rows():
            assert chunked._forward_tile is not own
    assert chunked._forward_tile is own


def test_another_models_plan_does_not_change_what_is_recorded() -> None:
    model, batch = Scored(2048), {"x": torch.randn(64, 32), "labels": torch.randint(0, 3000, (64,))}
    alone = tightfit.trace(model, batch)
    with by_rows():
        beside = tightfit.trace(model, batch)
        assert chunked._forward_tile.func is module._by_rows  # and goes on
    assert beside.rowwise == alone.rowwise and [op.name for op in beside.ops] == [op.name for op in alone.ops]
    assert tightfit.simulate(beside).peak_bytes == tightfit.simulate(alone).peak_bytes


def test_a_call_of_another_kind_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release whose function takes a tensor that has not the tile's rows."""
    seen = []
    monkeypatch.setattr(chunked, "_forward_tile", lambda tile, *rest, **_: seen.append((tile.shape, rest[0].shape)))
    with by_rows():
        chunked._forward_tile(torch.zeros(640, 4096), torch.zeros(4096))
        chunked._forward_tile(torch.zeros(640, 4096), torch.zeros(640))
    assert seen[0] == ((640, 4096), (4096,)) and len(seen) > 2 and {(len(a), len(b)) for a, b in seen} == {(2, 1)}


class Scored(nn.Module):
    """A few blocks under TRL's loss."""

    def __init__(self, chunk: int) -> None:
        super().__init__()
        self.chunk = chunk
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)) for _ in range(3))
        self.head = nn.Linear(32, 3000)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        scored = chunked.ChunkedLogProbFunction.apply(
            x, self.head.weight, self.head.bias, labels, 1.0, self.chunk, None, 1.0, ("entropy",)
        )
        return -scored[0].mean()


@pytest.mark.parametrize(("chunk", "columns"), [(2048, 2048), (8192, 4096)])
def test_the_plan_takes_it_for_nothing_and_its_peak_is_the_predicted_one(chunk: int, columns: int) -> None:
    torch.manual_seed(1)
    model, batch = Scored(chunk), {"x": torch.randn(512, 32), "labels": torch.randint(0, 3000, (512,))}
    kept = copy.deepcopy(model)
    recorded = tightfit.trace(model, batch)
    assert len(recorded.rowwise) == (4 if chunk == 2048 else 2)  # chunks of words, forward and backward
    assert {stretch.buffer_bytes for stretch in recorded.rowwise} == {512 * columns * 4}
    with pytest.raises(tightfit.BudgetInfeasible):
        tightfit.plan(recorded, "60%", levers={Lever.RECOMPUTE})
    plan = tightfit.plan(recorded, "60%")
    assert plan.in_place_loss and not plan.replays
    model.zero_grad(set_to_none=True)
    with tightfit.apply(model, plan):
        before = sum(recorded.static_bytes.values())
        with PeakMeter("cpu") as meter:
            model(**batch).backward()
    assert before + meter.rise_bytes == pytest.approx(plan.peak_bytes, rel=1e-3)
    kept(**batch).backward()
    for ours, plain in zip(model.parameters(), kept.parameters(), strict=True):
        assert ours.grad is not None and plain.grad is not None and torch.equal(ours.grad, plain.grad)


LLAMA = """{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
"num_hidden_layers": %d, "num_attention_heads": 4, "vocab_size": 4096, "max_position_embeddings": 256}"""


def test_a_fake_trace_has_it_and_so_has_one_that_is_unrolled(tmp_path: Path) -> None:
    made: dict[int, Any] = {}
    for blocks in (5, 8):
        (tmp_path / f"{blocks}").mkdir()
        (tmp_path / f"{blocks}" / "config.json").write_text(LLAMA % blocks)
        asked = Setup(
            model=str(tmp_path / f"{blocks}"), batch=4, seq=128, dtype="fp32", optimizer="none", trainer="sft"
        )
        made[blocks] = trace_setup(asked, None)
    deep = unroll(made[5], [unit.path for unit in made[8].units], 1)
    assert deep is not None and deep.rowwise == made[8].rowwise and len(deep.rowwise) == 2
    lean = with_loss_in_place(made[8])
    assert tightfit.simulate(lean).peak_bytes < 0.7 * tightfit.simulate(made[8]).peak_bytes
    deep = dataclasses.replace(with_loss_in_place(deep), static_bytes=lean.static_bytes)
    assert tightfit.simulate(deep) == tightfit.simulate(lean)
