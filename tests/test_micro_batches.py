"""Micro-batches: the choice, the cut, the weights, and that cut and uncut are the same to rounding."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tightfit
from tightfit.core import InvalidInput, MicroBatch, Unsupported, dumps, from_json, loads, to_json
from tightfit.core import MicroBatches as Chosen
from tightfit.fitting.measuring import measure_micro_batches
from tightfit.fitting.micro_batches import Weigher
from tightfit.plan.micro_batches import largest_fitting, shares, sizes_of, solved
from tightfit.step.rows import Divisor, row_count, rows_taken, weights_of
from tightfit.verify.additive import compared_cut

#: Roundings that a float64 step of these few layers may add up to, of relative norms. A wrong weight is off by 1e-2,
#: and a step in float32 by 1e-7.
FLOAT64_ROUNDINGS = 64 * 2.0**-53


# ------------------------------------------------------------------------------------------- the choice


def attempts(largest: int, seconds: Callable[[int], float], slowdown: Callable[[int], float]) -> Any:
    """Planning of a step whose sizes up to `largest` fit, and what it was asked."""
    asked: list[int] = []

    def attempt(size: int) -> MicroBatch:
        asked.append(size)
        fits = size <= largest
        return MicroBatch(
            size=size, accumulation=-(-24 // size), fits=fits, unplanned_peak_bytes=2000 * size,
            least_peak_bytes=100 + 1000 * size, seconds=seconds(size) if fits else 0.0, slowdown=slowdown(size),
        )  # fmt: skip

    return attempt, asked


@pytest.mark.parametrize("rows", [1, 2, 7, 12, 64, 97])
def test_the_largest_that_fits_is_found(rows: int) -> None:
    sizes = sizes_of(rows)
    for largest in (0, *sizes):
        attempt, asked = attempts(largest, float, lambda _: 1.0)
        budget = 100 + 1000 * largest + 500
        assert largest_fitting(sizes, attempt, budget, {}) == (largest or None)
        assert len(asked) == len(set(asked)) <= 4, asked  # along the line; no size is planned twice


def test_the_largest_is_found_where_the_line_misleads() -> None:
    sizes = sizes_of(64)
    for largest in sizes:
        attempt, asked = attempts(largest, float, lambda _: 1.0)
        assert largest_fitting(sizes, attempt, 10, {}) == largest  # the budget says that nothing fits
        assert len(asked) <= len(sizes)


def test_rows_are_shared_out_evenly() -> None:
    for rows, size in itertools.product(range(1, 40), range(1, 45)):
        parts = shares(rows, size)
        assert sum(parts) == rows and max(parts) <= size and max(parts) - min(parts) <= 1
        assert len(parts) == -(-rows // size)
    assert sizes_of(10) == (1, 2, 3, 4, 5, 10)


def test_the_largest_is_taken_only_where_it_is_the_fastest() -> None:
    slow_when_large, _ = attempts(12, lambda size: 2.0 if size == 12 else 1.0, lambda size: 2.0 if size == 12 else 1.0)
    chosen = solved(24, slow_when_large, 12_600)
    assert chosen is not None and chosen.largest == 12 and chosen.size == 8
    assert "12 is the largest that fits but 8 is faster" in chosen.said
    fast, _ = attempts(12, lambda size: 1 + 1 / size, lambda _: 1.2)
    chosen = solved(24, fast, 12_600)
    assert chosen is not None and chosen.size == 12 and "the largest that fits and the fastest" in chosen.said
    alike, _ = attempts(12, lambda size: 1.0 - 0.001 * (size < 12), lambda _: 1.2)
    chosen = solved(24, alike, 12_600)
    assert chosen is not None and chosen.size == 12, "a difference within the noise is no reason for more parts"
    assert loads(Chosen, dumps(chosen), "here") == chosen
    assert from_json(Chosen, to_json(chosen), "a record") == chosen
    nothing, _ = attempts(0, float, lambda _: 1.0)
    assert solved(24, nothing, 10) is None


# ---------------------------------------------------------------------------------------------- the cut


def test_a_batch_is_cut_by_rows() -> None:
    batch = {"x": torch.arange(10).reshape(5, 2), "one": torch.ones(1, 3), "scale": torch.tensor(2.0), "k": [3, "a"]}
    assert row_count(batch) == 5
    part = rows_taken(batch, slice(1, 3))
    assert part["x"].tolist() == [[2, 3], [4, 5]] and part["one"].shape == (1, 3) and part["k"] == [3, "a"]
    assert part["x"].untyped_storage().data_ptr() == batch["x"].untyped_storage().data_ptr()
    with pytest.raises(Unsupported, match=r"disagree about how many there are \(x \(5, 2\), y \(7,\)\)"):
        row_count({"x": torch.ones(5, 2), "y": torch.ones(7)})


def test_weights_count_what_the_loss_divides_by() -> None:
    labels = torch.tensor([[1, 1, 1, 1], [1, -100, -100, -100], [-100, 1, 1, -100]])
    parts = [{"labels": labels[:1]}, {"labels": labels[1:]}]
    assert weights_of(Divisor.SUM, parts, (1, 2)) == (1, 1)
    assert weights_of(Divisor.ROWS, parts, (1, 2)) == (1 / 3, 2 / 3)
    assert weights_of(Divisor.LABELS, parts, (1, 2)) == (4 / 7, 3 / 7)
    assert weights_of(Divisor.NEXT_LABELS, parts, (1, 2)) == (3 / 5, 2 / 5)
    assert weights_of(Divisor.LABELS, [{"x": labels}], (3,)) is None


# ------------------------------------------------------------------------------- what can be cut at all


class Net(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.3)) for _ in range(3))
        self.norm, self.head = norm, nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        result: torch.Tensor = self.head(self.norm(x))
        return result


def mean(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def total(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def contrastive(model: nn.Module, batch: Any) -> torch.Tensor:
    points = nn.functional.normalize(model(batch[0]), dim=1)
    return nn.functional.cross_entropy(points @ points.roll(1, 0).T, torch.arange(len(points)))


def nearly_a_mean(model: nn.Module, batch: Any) -> torch.Tensor:
    """A mean, and beside it a millionth of something that is none: unseen in float32, and still wrong."""
    return mean(model, batch) + 1e-6 * model(batch[0]).softmax(1).mean(0).square().sum()


def images() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(7, 8), torch.randint(0, 3, (7,))


@pytest.mark.parametrize(
    ("norm", "loss", "divisor"),
    [
        (nn.LayerNorm(8), mean, Divisor.ROWS),
        (nn.LayerNorm(8), total, Divisor.SUM),
        (nn.LayerNorm(8), contrastive, None),
        (nn.LayerNorm(8), nearly_a_mean, None),
        (nn.BatchNorm1d(8), mean, None),
    ],
    ids=["mean", "sum", "contrastive", "nearly a mean", "batch norm"],
)
def test_what_a_loss_divides_by_is_found_by_comparing(norm: nn.Module, loss: Any, divisor: Divisor | None) -> None:
    torch.manual_seed(0)
    model, (x, y) = Net(norm).train(), images()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    held, check = compared_cut(model, (x[:3], y[:3]), [(x[:1], y[:1]), (x[1:3], y[1:3])], (1, 2), loss)
    assert held == ((divisor,) if divisor else ()) and check.passed == bool(divisor), check
    assert torch.equal(state, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert model.training and all(module.training for module in model.modules())


class Rows(nn.Module):
    """A number for each row, all of them by one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x).sum(1)


def by_advantage(model: nn.Module, batch: Any) -> torch.Tensor:
    found: torch.Tensor = (model(batch[0]) * batch[1]).sum()
    return found


def larger_in_one_row(model: nn.Module, batch: Any) -> torch.Tensor:
    return by_advantage(model, batch) * (1.5 if len(batch[0]) == 1 else 1.0)


@pytest.mark.parametrize("in_float64", [True, False])
@pytest.mark.parametrize("advantages", [(2.0, -1.0, -1.0), (0.7, 0.1, -0.8)], ids=["to the bit", "but for rounding"])
def test_a_loss_that_cancels_to_nothing_still_tells(advantages: tuple[float, ...], in_float64: bool) -> None:
    """Of equal rows: it is exactly zero in float32, and there is no relative distance from that."""
    torch.manual_seed(0)
    model, x, y = Rows(), torch.randn(8).expand(3, 8).clone(), torch.tensor(advantages)
    assert float(by_advantage(model, (x, y)).detach()) == 0
    parts = [(x[:1], y[:1]), (x[1:], y[1:])]
    held, check = compared_cut(model, (x, y), parts, (1, 2), by_advantage, in_float64=in_float64)
    assert held == (Divisor.SUM,), check
    held, check = compared_cut(model, (x, y), parts, (1, 2), larger_in_one_row, in_float64=in_float64)
    assert not held, check


def test_where_there_is_no_gradient_at_all_nothing_is_guessed() -> None:
    """All divisors pass where the loss and all gradients are zero. No batch is weighed by the first of them."""
    x, nothing = torch.randn(6, 8), torch.zeros(6)
    applied = tightfit.fit(Rows(), (x, nothing), "100MiB", loss=by_advantage, micro_batch=2)
    with pytest.raises(Unsupported, match="cannot be told"):
        applied.backward((x, nothing))
    y = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert float(applied.backward((x, y))) == pytest.approx(
        float(by_advantage(applied.model, (x, y)).detach()), rel=1e-5
    )
    applied.remove()


def test_a_load_balancing_loss_is_no_mean() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=50, num_local_experts=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config).train()
    ids = torch.randint(0, 50, (3, 12))
    labels = ids.clone()
    labels[0, :7] = -100
    for asks, expected in ((False, (Divisor.NEXT_LABELS,)), (True, ())):
        batch = {"input_ids": ids, "labels": labels} | ({"output_router_logits": True} if asks else {})
        parts = [rows_taken(batch, [0]), rows_taken(batch, [1, 2])]
        held, check = compared_cut(model, batch, parts, (1, 2))
        assert held == expected, check
        assert "in float64" in check.expected, "experts' products have no kernel for float64, and need one here"


def test_a_divisor_that_was_not_told_apart_is_looked_for_again() -> None:
    even, odd = torch.ones(2, 4, dtype=torch.long), torch.tensor([[1, 1, 1, 1], [1, 1, -100, -100]])
    asked = []

    def compare(batch: Any) -> Any:
        asked.append(batch)
        return (Divisor.LABELS,), None

    weigher = Weigher(compare)
    weigher.divisors = (Divisor.ROWS, Divisor.LABELS)

    def cut(labels: torch.Tensor) -> Any:
        return [{"labels": labels[:1]}, {"labels": labels[1:]}]

    assert weigher.weights("even", cut(even), (1, 1)) == (0.5, 0.5) and not asked
    assert weigher.weights("odd", cut(odd), (1, 1)) == (4 / 6, 2 / 6) and asked == ["odd"]
    silent = Weigher()
    silent.divisors = (Divisor.ROWS, Divisor.LABELS)
    with pytest.raises(Unsupported, match="cannot be told"):
        silent.weights("odd", cut(odd), (1, 1))


# ------------------------------------------------------------------------------------------ a plain loop


def relative(one: nn.Module, other: nn.Module) -> float:
    pairs = [(p.grad, q.grad) for p, q in zip(one.parameters(), other.parameters(), strict=True)]
    apart = sum(float((a - b).double().square().sum()) for a, b in pairs if a is not None and b is not None)
    assert all((a is None) == (b is None) for a, b in pairs)
    size = sum(float(a.double().square().sum()) for a, _ in pairs if a is not None)
    return float((apart / size) ** 0.5)


def gpt2(**changes: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 90, "n_positions": 64, "bos_token_id": 0,
             "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
    return GPT2LMHeadModel(GPT2Config(**(sizes | changes))).train()


def uneven(rows: int, seq: int = 24, words: int = 90) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, words, (rows, seq), generator=torch.Generator().manual_seed(rows))
    labels = ids.clone()
    for row in range(rows):
        labels[row, : (5 * row) % (seq - 2)] = -100
    labels[rows // 2] = -100  # a row, and so perhaps a part, without any label that counts
    return {"input_ids": ids, "labels": labels}


def test_the_whole_backward_of_a_plain_loop() -> None:
    """Unequal parts, unequal numbers of labels, and batches of other sizes than the planned one, in float64."""

    def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:  # the model's own is computed in float32
        logits = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())

    model = gpt2().double()
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters())
    applied = tightfit.fit(model, uneven(7), "10MiB", loss=loss_of, optimizer=optimizer, micro_batch=3)
    chosen = applied.micro_batches
    assert chosen is not None and (chosen.size, chosen.accumulation) == (3, 3) and chosen.check is not None
    assert "micro-batches of 3, 3 for each global batch of 7" in str(applied)
    assert "2 more additions" in str(applied)
    assert [p["labels"].shape[0] for p, _ in applied.parts(uneven(7))] == [3, 2, 2]
    for rows in (7, 2, 5, 9):
        batch = uneven(rows)
        loss = applied.backward(batch)
        expected = loss_of(reference, batch)
        expected.backward()
        assert abs(float(loss) / float(expected.detach()) - 1) <= FLOAT64_ROUNDINGS
        assert relative(reference, model) <= FLOAT64_ROUNDINGS
        optimizer.zero_grad()
        reference.zero_grad()
    assert applied.plan.settings.get("step_in_backward") is None
    applied.remove()


def test_rows_that_are_compared_are_no_longer_batch() -> None:
    """What the loss divides by, a later batch may have to show, by three rows. Their step is none to plan anew for."""
    model, ids = gpt2(n_layer=1), torch.arange(6 * 16).reshape(6, 16) % 40
    applied = tightfit.fit(model, {"input_ids": ids, "labels": ids}, "100MiB", micro_batch=2)
    plan, compared = applied.plan, []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: compared.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    applied.backward(uneven(6, 16))
    hook.remove()
    assert 3 in compared  # or nothing was compared, and this says nothing
    assert applied.plan is plan
    applied.remove()


def test_rows_are_compared_under_a_plan_where_masks_are_drawn() -> None:
    """Masks are off meanwhile, in what runs again too."""
    torch.manual_seed(0)
    model = Masked()
    batch = {"input_ids": torch.randint(0, 40, (12, 16))}
    batch["labels"] = batch["input_ids"].clone()
    applied = tightfit.fit(model, batch, "60%", loss=lambda model, batch: model(**batch), micro_batch=6)
    assert applied.plan.replays
    batch["labels"][:5, 3:] = -100  # the first batch in which tokens count, and rows do not
    applied.backward(batch)
    assert applied.stats().replays > 0 and all(p.grad is not None for p in model.parameters())
    applied.remove()


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = (
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 64))
            for _ in range(4)
        )
        self.words, self.blocks, self.head = nn.Embedding(40, 64), nn.ModuleList(blocks), nn.Linear(64, 40)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.words(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def test_rows_are_compared_under_a_plan_that_streams_weights() -> None:
    blocks = [nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(6)]
    model = nn.Sequential(nn.Linear(64, 64), *blocks, nn.Linear(64, 8))
    model[1:-1].requires_grad_(False)
    rows = torch.randn(48, 64)
    applied = tightfit.fit(
        model, rows, 450_000, loss=lambda model, rows: model(rows).square().mean(), beside="stream_weights",
        micro_batch=16,
    )  # fmt: skip
    assert "stream_weights" in applied.plan.settings and applied._cut is not None
    divisors, check = applied._cut.compared(rows)  # as where a later batch has to show what the loss divides by
    assert Divisor.ROWS in divisors and check.passed
    applied.remove()


def test_measure_records_the_uncut_step_once() -> None:
    model, ids = gpt2(n_layer=1), torch.arange(4 * 16).reshape(4, 16) % 40
    told: list[str] = []
    measured = measure_micro_batches(
        model, {"input_ids": ids, "labels": ids}, budget="90%", repeats=1, progress=told.append
    )
    assert measured.micro_batches is not None and measured.rows[0].predicted_peak_bytes > 0
    assert "tracing one step" not in told  # a percentage is of the uncut step, which was recorded for it
    assert abs(measured.rows[0].peak_bytes / measured.rows[0].predicted_peak_bytes - 1) < 5e-3


def test_what_does_not_go_together() -> None:
    model, batch = gpt2(n_layer=1), uneven(4)
    with pytest.raises(InvalidInput, match="exact=True asks for the bits of the whole batch"):
        tightfit.fit(model, batch, "90%", exact=True, micro_batch="auto")
    with pytest.raises(InvalidInput, match="micro_batch='largest': expected"):
        tightfit.fit(model, batch, "90%", micro_batch="largest")
    with pytest.raises(Unsupported, match="disagree about how many"):
        tightfit.fit(model, batch | {"positions": torch.ones(5)}, "90%", micro_batch="auto")
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.slow
def test_a_loss_that_is_no_mean_is_refused_and_nothing_stays() -> None:
    model, batch = Net(nn.BatchNorm1d(8)).train(), images()
    with pytest.raises(Unsupported, match="Batch normalisation, contrastive"):
        tightfit.fit(model, batch, "1MiB", loss=mean, micro_batch=2)
    assert all("forward" not in vars(module) for module in model.modules())
    assert not model._forward_pre_hooks


@pytest.mark.slow
def test_auto_holds_the_budget_that_the_whole_batch_does_not() -> None:
    from tightfit.verify.peak import PeakMeter, static_bytes

    model, batch = gpt2(n_embd=64, n_layer=3), uneven(12, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    applied = tightfit.fit(model, batch, "35%", optimizer=optimizer, beside="step_in_backward", micro_batch="auto")
    chosen = applied.micro_batches
    assert chosen is not None and chosen.accumulation > 1
    assert not next(each for each in chosen.tried if each.size == 12).fits
    assert "step_in_backward" not in applied.plan.settings
    for step in range(3):
        before = static_bytes(model, optimizer, batch)
        with PeakMeter("cpu") as meter:
            applied.backward(batch)
            optimizer.step()
            optimizer.zero_grad()
        if step:  # the optimizer makes its state in its first step
            assert before + meter.rise_bytes <= applied.plan.budget_bytes * 1.005
    assert applied.stats().fallbacks == 0
    applied.remove()


# ------------------------------------------------------------------------------------------- the Trainer


def trained(kind: str, folder: Path, callbacks: list[Any], **changes: Any) -> Any:
    from tests.integrations.runs import trainer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=260,
        max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double()
    more = {"ref_model": copy.deepcopy(model)} if kind == "dpo" else {}
    options = {"optim": "sgd", "max_steps": 5, "learning_rate": 0.1, **changes}
    run = trainer(kind, folder, callbacks, subject=model, more=more, **options)
    run.train(resume_from_checkpoint=bool(list(folder.glob("checkpoint-*"))) or None)
    return run


def apart(one: Any, other: Any) -> float:
    pairs = list(zip(one.model.parameters(), other.model.parameters(), strict=True))
    return max(float(((a - b).norm() / a.norm()).detach()) for a, b in pairs)


def test_the_trainers_batch_in_micro_batches(tmp_path: Path) -> None:
    """Batches that were to be accumulated are made one and cut anew; the last window of the epoch is smaller."""
    from tightfit.integrations.transformers import TightfitCallback

    plain = trained("trainer", tmp_path / "a", [], per_device_train_batch_size=12)
    callback = TightfitCallback("20MiB", micro_batch=5, verify=False)
    ours = trained("trainer", tmp_path / "b", [callback], per_device_train_batch_size=4, gradient_accumulation_steps=3)
    chosen = callback.micro_batches
    assert chosen is not None and (chosen.global_batch, chosen.size, chosen.accumulation) == (12, 5, 3)
    assert chosen.weighed == Divisor.SUM.value
    assert apart(plain, ours) <= 5 * FLOAT64_ROUNDINGS
    for name in ("epoch", "global_step", "num_input_tokens_seen"):
        assert getattr(plain.state, name) == getattr(ours.state, name)
    assert not hasattr(ours.get_train_dataloader().collate_fn, "size")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "packing", "dpo"])
def test_trls_batches_in_micro_batches(kind: str, tmp_path: Path) -> None:
    from tightfit.integrations.transformers import TightfitCallback

    changes = {"beta": 0.5} if kind == "dpo" else {}
    plain = trained(kind, tmp_path / "a", [], per_device_train_batch_size=12, **changes)
    callback = TightfitCallback("60%", batch="auto")
    ours = trained(kind, tmp_path / "b", [callback], per_device_train_batch_size=12, **changes)
    chosen = callback.micro_batches
    assert chosen is not None and chosen.accumulation > 1
    assert chosen.weighed == (Divisor.ROWS if kind == "dpo" else Divisor.SUM).value
    # TRL's fused head, which DPO has too, adds up in float32 whatever the model's dtype
    assert apart(plain, ours) <= 5 * 64 * 2.0**-24
    assert max(callback.peaks) <= callback.plan.budget_bytes  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_resumed_training_goes_on_in_the_same_pieces(tmp_path: Path) -> None:
    from tightfit.integrations.transformers import TightfitCallback

    def run(name: str, steps: int) -> Any:
        changes = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        callback = TightfitCallback("20MiB", micro_batch=3, verify=False)
        return trained(
            "trainer", tmp_path / name, [callback], per_device_train_batch_size=12, max_steps=steps, **changes
        )

    whole = run("whole", 5)
    run("cut", 2)
    resumed = run("cut", 5)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


@pytest.mark.slow
def test_a_trainers_loss_that_is_no_mean_is_refused(tmp_path: Path) -> None:
    from tests.integrations.runs import trainer
    from transformers import MixtralConfig, MixtralForCausalLM

    from tightfit.integrations.transformers import TightfitCallback

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=260, num_local_experts=4, output_router_logits=True,
    )  # fmt: skip
    run = trainer("trainer", tmp_path, [TightfitCallback("50MiB", micro_batch=2)], subject=MixtralForCausalLM(config))
    with pytest.raises(Unsupported, match="load-balancing losses of experts"):
        run.train()


def test_callbacks_that_ask_for_what_cannot_be(tmp_path: Path) -> None:
    from tightfit.integrations.transformers import TightfitCallback

    with pytest.raises(InvalidInput, match="exact=True"):
        TightfitCallback("60%", exact=True, batch="auto")
    with pytest.raises(InvalidInput, match="expected"):
        TightfitCallback("60%", batch="all")
    with pytest.raises(InvalidInput, match="auto_find_batch_size"):
        trained("trainer", tmp_path, [TightfitCallback("60%", batch="auto")], auto_find_batch_size=True)


def _masked(model: nn.Module, batch: Any) -> torch.Tensor:
    """The mean over the examples whose class is not 0: a divisor of the loss's own."""
    return nn.functional.cross_entropy(model(batch[0]), torch.where(batch[1] == 0, -100, batch[1]))


def test_where_labels_have_another_name_the_refusal_says_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))
    targets = torch.randint(0, 20, (6, 5))
    targets[2, :4] = -100

    def over(name: str) -> Any:
        def loss(model: nn.Module, batch: Any) -> torch.Tensor:
            return nn.functional.cross_entropy(model(batch["x"]).flatten(0, 1), batch[name].flatten())

        return loss

    batch = {"x": torch.randint(0, 20, (6, 5)), "y": targets}
    with pytest.raises(Unsupported, match="is known where the batch has them as 'labels'"):
        tightfit.fit(model, batch, "10MiB", loss=over("y"), micro_batch=2)
    batch = {"x": batch["x"], "labels": targets}
    applied = tightfit.fit(model, batch, "10MiB", loss=over("labels"), micro_batch=2)
    assert applied.micro_batches is not None and applied.micro_batches.weighed == Divisor.LABELS.value


def test_a_mask_that_only_other_rows_show_is_found() -> None:
    """The rows that are compared first have nothing that is left out, so the loss looks like a mean over rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 5))
    inputs, classes = torch.randn(12, 16), torch.randint(1, 5, (12,))
    masked = classes * (torch.arange(12) % 4 != 1)
    with pytest.raises(Unsupported, match="cannot be cut into micro-batches"):
        tightfit.fit(model, (inputs, masked), "10MiB", loss=_masked, micro_batch=5)
    applied = tightfit.fit(model, (inputs, classes), "10MiB", loss=_masked, micro_batch=5)
    applied.backward((inputs, classes))
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(Unsupported, match="cannot be cut into micro-batches"):
        for _ in range(8):
            applied.backward((inputs, classes * (torch.arange(12) % 2)))
            before = [p.grad.clone() for p in model.parameters()]
    assert all(torch.equal(p.grad, kept) for p, kept in zip(model.parameters(), before, strict=True))
