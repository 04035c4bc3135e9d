"""The loss in place: the same bits as torch's, a third of its peak, and a lever that the planner knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tightfit
from tightfit.core import EventKind, Trace
from tightfit.levers.loss_in_place import loss as loss_in_place
from tightfit.levers.loss_in_place import with_loss_in_place
from tightfit.levers.loss_in_place.loss import in_place
from tightfit.plan import lowest
from tightfit.plan.simulate import simulate_choices
from tightfit.step.run import static_bytes_by_category
from tightfit.verify.gradients import Outcome, differences
from tightfit.verify.peak import PeakMeter, measured_peak_bytes

ROWS, CLASSES = 96, 512


def loss_and_gradient(make: Any, dtype: torch.dtype, backwards: int = 1, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    logits = (torch.randn(ROWS, CLASSES) * 4).to(dtype).requires_grad_()
    target = torch.randint(0, CLASSES, (ROWS,))
    target[::7] = options.get("ignore_index", -100)
    loss = make(logits * 1.5, target, **options)
    scalar = loss.square().sum() if loss.dim() else loss
    for left in reversed(range(backwards)):
        scalar.backward(retain_graph=bool(left))
    return loss.detach(), logits.grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backwards", [1, 3])
@pytest.mark.parametrize("at_once", [7, ROWS])
def test_bit_for_bit(
    reduction: str, dtype: torch.dtype, backwards: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_in_place, "rows_at_once", lambda rows, row_bytes: at_once)
    expected = loss_and_gradient(F.cross_entropy, dtype, backwards, reduction=reduction)
    with in_place():
        # looked up again: the function that callers see is the one that is replaced
        found = loss_and_gradient(F.cross_entropy, dtype, backwards, reduction=reduction)
        assert F.cross_entropy.__module__ == "tightfit.levers.loss_in_place.loss"
    assert torch.equal(expected[0], found[0])
    assert torch.equal(expected[1], found[1])


def test_ignore_index_and_the_module() -> None:
    module = nn.CrossEntropyLoss(ignore_index=3)

    def call(logits: torch.Tensor, target: torch.Tensor, ignore_index: int) -> torch.Tensor:
        return module(logits, target)

    expected = loss_and_gradient(call, torch.float32, ignore_index=3)
    with in_place():
        found = loss_and_gradient(call, torch.float32, ignore_index=3)
    assert torch.equal(expected[1], found[1])


@pytest.mark.parametrize(
    "options", [{"label_smoothing": 0.1}, {"weight": torch.rand(CLASSES)}, {"size_average": False}]
)
def test_what_it_does_not_do_is_left_to_torch(options: dict[str, Any]) -> None:
    expected = loss_and_gradient(F.cross_entropy, torch.float32, **options)
    with in_place():
        found = loss_and_gradient(F.cross_entropy, torch.float32, **options)
    assert torch.equal(expected[1], found[1])


def test_removed_and_nested() -> None:
    torchs_own = F.cross_entropy
    with in_place():
        with in_place():
            pass
        assert F.cross_entropy is not torchs_own
    assert F.cross_entropy is torchs_own


def test_second_derivatives_are_refused() -> None:
    logits = torch.randn(4, 5, requires_grad=True)
    with in_place():
        loss = F.cross_entropy(logits, torch.tensor([0, 1, 2, 3]))
        with pytest.raises(RuntimeError, match="create_graph"):
            torch.autograd.grad(loss, logits, create_graph=True)


class Tagger(nn.Module):
    """A large head, so that the loss owns the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)) for _ in range(3))
        self.head = nn.Linear(32, 4096)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return F.cross_entropy(self.head(x), labels)


def batch_of(rows: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"x": torch.randn(rows, 32), "labels": torch.randint(0, 4096, (rows,))}


@pytest.mark.parametrize("autocast", [False, True])
def test_the_planner_takes_it_before_it_recomputes(autocast: bool) -> None:
    model, batch = Tagger(), batch_of(512)

    def loss(subject: nn.Module, given: Any) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return subject(**given)

    trace = tightfit.trace(model, batch, loss=loss)
    assert len(trace.losses) == 1
    # under autocast the logits exist in bf16 as well, and the forward's own peak is higher
    plan = tightfit.plan(trace, "90%" if autocast else "75%")
    assert plan.in_place_loss
    assert plan.replays == 0
    loss(model, batch).backward()
    expected = Outcome(model)
    model.zero_grad()
    before = sum(static_bytes_by_category(model, batch).values())
    with tightfit.apply(model, plan):
        with PeakMeter("cpu") as meter:
            loss(model, batch).backward()
        assert not differences(expected, Outcome(model))
    assert before + meter.rise_bytes <= plan.budget_bytes * 1.005
    assert before + meter.rise_bytes == pytest.approx(plan.peak_bytes, rel=0.005)


def test_a_fake_trace_has_the_lever_too() -> None:
    real, fake = (tightfit.trace(Tagger(), batch_of(512), fake=fake) for fake in (False, True))
    assert fake.losses == real.losses
    assert tightfit.plan(fake, "75%").in_place_loss


def test_another_models_plan_does_not_change_what_is_recorded() -> None:
    alone = tightfit.trace(Tagger(), batch_of(256))
    with in_place():
        beside = tightfit.trace(Tagger(), batch_of(256))
    assert beside.losses == alone.losses and len(alone.losses) == 1
    assert tightfit.simulate(beside).peak_bytes == tightfit.simulate(alone).peak_bytes


def test_the_lever_only_moves_bytes() -> None:
    trace = tightfit.trace(Tagger(), batch_of(256))
    logits_bytes = 256 * 4096 * 4
    plain, levered = simulate_choices(trace, ()), simulate_choices(with_loss_in_place(trace), ())
    assert plain.live_bytes[-1] == levered.live_bytes[-1]
    assert len(plain.live_bytes) == len(levered.live_bytes)
    at = next(i for i, label in enumerate(plain.labels) if "_log_softmax_backward_data" in label)
    # there were the log-probabilities and two gradients; now there is one, some rows, and the weight of the mean still
    rows_bytes, weight_bytes = trace.losses[0].rows_bytes, 4
    assert plain.live_bytes[at] - levered.live_bytes[at] == 2 * logits_bytes - 2 * rows_bytes - weight_bytes
    # after it only the gradient is left in both
    after = next(i for i in range(at + 1, len(plain.labels)) if "mm" in plain.labels[i])
    assert plain.live_bytes[after] == levered.live_bytes[after]


def test_the_lever_hands_the_saved_bytes_on_to_the_gradient() -> None:
    trace = tightfit.trace(Tagger(), batch_of(256))
    levered = with_loss_in_place(trace)
    (loss,) = trace.losses
    (saved,), (first,), (second,) = (
        trace.ops[op].outputs for op in (loss.log_softmax, loss.nll_backward, loss.softmax_backward)
    )

    def freed(which: Trace) -> dict[int, int]:
        return {e.subject: i for i, e in enumerate(which.events) if e.what is EventKind.FREE}

    before, after = freed(trace), freed(levered)
    # the log-probabilities' bytes are the gradient's: they go when the gradient went, and the gradient has none
    assert before[saved] < before[second]
    assert after[saved] == before[second]
    assert after[second] == before[saved]
    assert levered.values[first].size_bytes == levered.values[second].size_bytes == 0
    assert levered.values[saved].size_bytes == trace.values[saved].size_bytes
    moved = {before[saved], before[second]}
    assert len(levered.events) == len(trace.events)
    assert all(a == b for i, (a, b) in enumerate(zip(trace.events, levered.events, strict=True)) if i not in moved)
    # so from the loss's backward to the end of the gradient there is one tensor of that size at every event
    logits_bytes = trace.values[saved].size_bytes
    made = next(i for i, e in enumerate(levered.events) if e.what is EventKind.ALLOC and e.subject == saved)
    live = 0
    for index, event in enumerate(levered.events):
        if event.subject in (saved, first, second) and event.what in (EventKind.ALLOC, EventKind.FREE):
            size_bytes = levered.values[event.subject].size_bytes
            live += size_bytes if event.what is EventKind.ALLOC else -size_bytes
        assert live == (logits_bytes if made <= index < before[second] else 0)


def test_a_plan_that_fits_as_it_is_leaves_the_loss_alone() -> None:
    trace = tightfit.trace(Tagger(), batch_of(64))
    assert not tightfit.plan(trace, "100%").in_place_loss


def test_a_loss_that_cannot_be_replaced_is_not_promised() -> None:
    own = F.cross_entropy  # a name that was imported before the plan: nothing can be put in its place

    class Direct(Tagger):
        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return own(self.head(x), labels)

    assert tightfit.trace(Direct(), batch_of(64)).losses == ()


def test_saved_and_loaded(tmp_path: Any) -> None:
    model, batch = Tagger(), batch_of(256)
    plan = tightfit.plan(tightfit.trace(model, batch), "75%")
    plan.save(tmp_path / "plan.json")
    assert tightfit.Plan.load(tmp_path / "plan.json") == plan


def test_the_targets_are_there_until_the_gradient_of_the_logits_is() -> None:
    """Torch lets go of them between the two ops of the loss's backward, of which the plan makes one."""

    def shifted(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 192), nn.GELU(), nn.Linear(192, 48)) for _ in range(14)]
    model, ids = nn.Sequential(nn.Embedding(500, 48), *blocks, nn.Linear(48, 500)), torch.randint(0, 500, (8, 65))
    trace = tightfit.trace(model, ids, loss=shifted)
    levers = "recompute,loss_in_place,nest"
    for share in (1.001, 1.03, 1.1):
        budget = int(lowest(trace, levers=levers).peak_bytes * share)
        plan = tightfit.plan(trace, budget, levers=levers)
        assert plan.in_place_loss and "log_softmax_backward" in tightfit.simulate(trace, plan).peak_owner
        assert measured_peak_bytes(model, ids, tightfit.apply(model, plan), shifted) == plan.peak_bytes
