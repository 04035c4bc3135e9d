"""`tightfit.checkpoint`: what is expected of non-reentrant checkpointing, and `keep`."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tightfit
from tightfit.core import InvalidInput
from tightfit.engine.region import region_stats

WIDTH = 8


def gradients(run: Callable[[Callable[..., Any]], torch.Tensor], model: nn.Module, through: Callable[..., Any]) -> Any:
    model.zero_grad()
    torch.manual_seed(3)
    random.seed(3)
    run(through).backward()
    found = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return found, torch.get_rng_state(), random.getstate()


def plainly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def same(run: Callable[[Callable[..., Any]], torch.Tensor], model: nn.Module, keep: Any = None) -> None:
    """`run(checkpoint)` gives the gradients and random states of `run(call)`."""
    expected = gradients(run, model, plainly)
    for _ in range(3):  # with `keep`, the first call learns and the others follow
        found = gradients(run, model, lambda f, *a, **k: tightfit.checkpoint(f, *a, keep=keep, **k))
        for one, other in zip(expected[0], found[0], strict=True):
            assert (one is None and other is None) or torch.equal(one, other)
        assert torch.equal(expected[1], found[1])
        assert expected[2] == found[2]


@pytest.fixture
def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))


KEEPS = [None, "mm", ["aten.addmm"], ["addmm", "aten.tanh.default"], lambda name: "gelu" in name]


@pytest.mark.parametrize("keep", KEEPS[:1] + KEEPS[2:])
def test_dropout_views_and_in_place(layers: Any, keep: Any) -> None:
    def body(x: torch.Tensor) -> torch.Tensor:
        y = F.gelu(layers[0](x)).view(-1, 2, WIDTH // 2).transpose(0, 1).reshape(-1, WIDTH)
        y = F.dropout(y, 0.4)
        return torch.tanh(layers[1](y.mul_(0.5)))

    same(lambda through: layers[2](through(body, torch.ones(4, WIDTH))).square().sum(), layers, keep)


def test_keywords_structures_and_several_outputs(layers: Any) -> None:
    def body(x: dict[str, Any], *, scale: float, flag: bool, nothing: None = None) -> Any:
        y = layers[0](x["here"]) * scale
        return {"first": y.tanh() if flag else y, "rest": (layers[1](y), None, "text", 3)}

    def run(through: Callable[..., Any]) -> torch.Tensor:
        out = through(body, {"here": torch.ones(4, WIDTH), "text": "x"}, scale=0.5, flag=True)
        return out["first"].sum() + out["rest"][0].square().sum()

    same(run, layers)


def test_nested_regions(layers: Any) -> None:
    def run(through: Callable[..., Any]) -> torch.Tensor:
        def inner(x: torch.Tensor) -> torch.Tensor:
            return F.dropout(layers[0](x), 0.3).sin()

        def outer(x: torch.Tensor) -> torch.Tensor:
            return through(inner, layers[1](through(inner, x)).tanh())

        return through(outer, torch.ones(4, WIDTH)).sum()

    same(run, layers)


def test_python_and_numpy_randomness_is_restored(layers: Any) -> None:
    np = pytest.importorskip("numpy")

    def run(through: Callable[..., Any]) -> torch.Tensor:
        np.random.seed(5)

        def body(x: torch.Tensor) -> torch.Tensor:
            return F.gelu(layers[0](x) * random.random() + float(np.random.rand()))

        out = through(body, torch.ones(4, WIDTH)).sum()
        random.random()  # the replay comes later, when the state has moved on
        return out

    same(run, layers)


def test_retain_graph(layers: Any) -> None:
    def run(through: Callable[..., Any]) -> torch.Tensor:
        loss = through(lambda x: F.dropout(layers[0](x).sigmoid(), 0.5), torch.ones(4, WIDTH)).sum()
        loss.backward(retain_graph=True)
        return loss

    same(run, layers)


def test_early_stop_leaves_out_the_last_op(layers: Any) -> None:
    before = region_stats.rerun_ops
    out = tightfit.checkpoint(lambda x: layers[1](layers[0](x)), torch.ones(4, WIDTH))
    out.sum().backward()
    assert region_stats.rerun_ops - before == 1, "the second linear layer's output is not needed"


def test_keep_reruns_less(layers: Any) -> None:
    def body(x: torch.Tensor) -> torch.Tensor:
        return F.gelu(layers[1](F.gelu(layers[0](x)))).tanh()

    counts = {}
    for name, keep in (("nothing", None), ("products", ["addmm"])):
        for _ in range(2):
            before = region_stats.rerun_ops
            tightfit.checkpoint(body, torch.ones(4, WIDTH), keep=keep).sum().backward()
            counts[name] = region_stats.rerun_ops - before
    assert counts["products"] < counts["nothing"]


def test_keep_that_names_nothing(layers: Any) -> None:
    with pytest.raises(InvalidInput, match="addmm"):
        tightfit.checkpoint(layers[0], torch.ones(2, WIDTH), keep=["conv"])


def test_one_code_object_over_different_tensors(layers: Any) -> None:
    frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def make(layer: nn.Module, power: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def body(x: torch.Tensor) -> torch.Tensor:
            for _ in range(power):
                x = F.gelu(layer(x))
            return x

        return body

    def run(through: Callable[..., Any]) -> torch.Tensor:
        x = torch.ones(4, WIDTH)
        for layer, power in ((layers[0], 1), (layers[1], 2), (frozen, 1), (layers[2], 3)):
            x = through(make(layer, power), x)
        return x.sum()

    for keep in (None, ["addmm"], ["gelu"]):
        same(run, layers, keep)


def test_other_shapes(layers: Any) -> None:
    def body(x: torch.Tensor) -> torch.Tensor:
        return layers[1](F.gelu(layers[0](x)))

    def run(through: Callable[..., Any]) -> torch.Tensor:
        return sum(through(body, torch.ones(rows, WIDTH)).sum() for rows in (4, 1, 9))

    same(run, layers, ["addmm"])


def test_inputs_without_grad_and_with(layers: Any) -> None:
    x = torch.ones(4, WIDTH, requires_grad=True)
    tightfit.checkpoint(lambda a, b: (a * b).sin(), x, torch.full((4, WIDTH), 2.0)).sum().backward()
    assert torch.equal(x.grad, torch.cos(torch.tensor(2.0)).expand(4, WIDTH) * 2)
    assert not tightfit.checkpoint(lambda a: a.sin(), torch.ones(3)).requires_grad


def test_autocast(layers: Any) -> None:
    def run(through: Callable[..., Any]) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = through(lambda x: F.gelu(layers[0](F.dropout(layers[0](x), 0.1))), torch.ones(4, WIDTH))
        return x.float().sum()

    same(run, layers)


def test_an_exception_inside_passes_through_and_harms_nothing(layers: Any) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        layers[0](x)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        tightfit.checkpoint(broken, torch.ones(2, WIDTH))
    same(lambda through: through(lambda x: layers[0](x).sin(), torch.ones(2, WIDTH)).sum(), layers)


def test_an_exception_in_replay_passes_through(layers: Any) -> None:
    calls = []

    def fragile(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        y = layers[0](x)
        if len(calls) > 1:
            raise KeyError("second time")
        return y.sin()

    out = tightfit.checkpoint(fragile, torch.ones(2, WIDTH))
    with pytest.raises(KeyError, match="second time"):
        out.sum().backward()


def test_a_handler_inside_does_not_catch_the_stop(layers: Any) -> None:
    def careful(x: torch.Tensor) -> torch.Tensor:
        try:
            return layers[1](layers[0](x).sin())
        except Exception:
            return x

    same(lambda through: through(careful, torch.ones(4, WIDTH)).sum(), layers)


def test_an_input_changed_before_backward_is_an_error(layers: Any) -> None:
    x = torch.ones(4, WIDTH)
    out = tightfit.checkpoint(lambda x: layers[0](x).sin(), x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        out.sum().backward()


def test_backward_in_another_thread(layers: Any) -> None:
    import threading

    out = tightfit.checkpoint(lambda x: F.dropout(layers[0](x).sin(), 0.2), torch.ones(4, WIDTH)).sum()
    thread = threading.Thread(target=out.backward)
    thread.start()
    thread.join()
    assert layers[0].weight.grad is not None


def test_memory_is_given_back_without_the_collector(layers: Any) -> None:
    gc.collect()
    gc.disable()
    try:
        x = torch.ones(4, WIDTH)
        watched = weakref.ref(x.untyped_storage())
        out = tightfit.checkpoint(lambda x: F.gelu(layers[0](x)), x)
        out.sum().backward()
        del x, out
        assert watched() is None
    finally:
        gc.enable()


def test_no_grad_calls_the_function(layers: Any) -> None:
    before = region_stats.frames
    with torch.no_grad():
        tightfit.checkpoint(layers[0], torch.ones(2, WIDTH))
    assert region_stats.frames == before
