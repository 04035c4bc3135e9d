"""What wrappers do to one process's step, without other processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tightfit
from tightfit.core import InvalidInput, Unsupported
from tightfit.step import parallel
from tightfit.step.parallel import Strategy, bucket_bytes, inside, local_of, resizes_told, strategy_of
from tightfit.step.ranks import anywhere, are_several, timeout_seconds


def test_a_plain_model_is_one_process() -> None:
    model = nn.Linear(4, 4)
    assert strategy_of(model) is Strategy.ONE and inside(model) is model
    assert not are_several(model) and bucket_bytes(model) == 0
    assert local_of(model.weight) is model.weight
    assert anywhere(model, True, False) == (True, False)


class FullyShardedDataParallel(nn.Module):
    """FSDP1's name is all that is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)


def test_fsdp1_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match=r"^the model is sharded by FSDP1"):
        strategy_of(FullyShardedDataParallel())
    with pytest.raises(Unsupported, match=r"^1 is sharded by FSDP1"):
        strategy_of(nn.Sequential(nn.Linear(4, 4), FullyShardedDataParallel()))


class _Whole:
    """Of FSDP2's record of a weight: up to torch 2.14."""

    def __init__(self) -> None:
        self._unsharded_param = nn.Parameter(torch.ones(2))
        self._unsharded_param.grad = torch.ones(2)
        self.unsharded_accumulated_grad: torch.Tensor | None = torch.ones(2)


class _WholeAlone:
    """The same from torch 2.15 on: gradients accumulate in the whole weight alone."""

    def __init__(self) -> None:
        self._unsharded_param = nn.Parameter(torch.ones(2))
        self._unsharded_param.grad = torch.ones(2)

    @property
    def unsharded_accumulated_grad(self) -> torch.Tensor | None:
        return self._unsharded_param.grad


@pytest.mark.parametrize("record", [_Whole, _WholeAlone])
def test_no_gradient_of_a_lost_step_waits(record: type[_Whole | _WholeAlone], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = record()
    group = SimpleNamespace(fsdp_params=[weight], _partial_reduce_output=None)
    state = SimpleNamespace(_fsdp_param_groups=[group], _is_root=False)
    module = SimpleNamespace(_get_fsdp_state=lambda: state)
    monkeypatch.setattr(parallel, "_sharded", lambda _: [module])
    assert parallel.gradients_wait(nn.Identity())
    parallel.forget_step(nn.Identity())
    assert not parallel.gradients_wait(nn.Identity())


def test_a_static_graph_is_refused() -> None:
    class DistributedDataParallel(nn.Module):
        static_graph = True

    with pytest.raises(Unsupported, match="static_graph"):
        strategy_of(DistributedDataParallel())


def test_a_span_for_a_profile_in_a_unit_is_no_op() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.profiler.record_function("block"):
                return torch.tanh(self.inner(x)).sin() + x

    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(3)))
    batch = torch.randn(64, 16)

    def gradients() -> list[torch.Tensor | None]:
        model.zero_grad()
        model(batch).square().mean().backward()
        return [p.grad for p in model.parameters()]

    expected = gradients()
    model.zero_grad()
    with tightfit.fit(model, batch, "80%", loss=lambda m, b: m(b).square().mean()) as applied:
        found = gradients()
        stats = applied.stats()
    assert all(a is not None and b is not None and a.equal(b) for a, b in zip(expected, found, strict=True))
    assert stats.replays and not stats.fallbacks


def test_a_storage_that_is_emptied_and_filled_is_told() -> None:
    told: list[tuple[int, int]] = []
    tensor = torch.empty(16)
    original = torch.UntypedStorage.resize_
    with resizes_told(lambda storage, before: told.append((before, storage.nbytes()))):
        tensor.untyped_storage().resize_(0)
        tensor.untyped_storage().resize_(0)  # nothing changes
        tensor.untyped_storage().resize_(64)
    tensor.untyped_storage().resize_(0)
    assert told == [(64, 0), (0, 64)]
    assert torch.UntypedStorage.resize_ is original


@pytest.mark.parametrize("asked", ["0", "-1", "soon", "nan", "inf"])
def test_a_time_to_wait_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setenv("TIGHTFIT_TIMEOUT_SECONDS", asked)
    with pytest.raises(InvalidInput, match="TIGHTFIT_TIMEOUT_SECONDS"):
        timeout_seconds()
