"""A plan that is given in place of a budget: one file, made once, in every framework that trains the same model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integrations.runs import model, told, trainer
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import tightfit
from tightfit.core import Action, InvalidInput, Plan, PlanMismatch, Status, Trace, Unsupported
from tightfit.fitting.planning import what_is_given
from tightfit.integrations.longest import longest_batch
from tightfit.integrations.peft import add_lora
from tightfit.integrations.transformers import TightfitCallback
from tightfit.plan.micro_batches import QUICK
from tightfit.plan.rebase import rebased


class Wrapped(nn.Module):
    """What a framework does to a model: its units get other paths."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **batch: Any) -> Any:
        return self.inner(**batch)


def batch(rows: int = 4, length: int = 48) -> dict[str, torch.Tensor]:
    ids = torch.randint(260, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def gradients(subject: nn.Module, step: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(5)
    subject.zero_grad()
    subject(**step).loss.backward()
    found = [p.grad for p in subject.parameters() if p.grad is not None]
    subject.zero_grad()
    return found


@pytest.fixture(scope="module")
def bare() -> Trace:
    """The step of the bare model."""
    return tightfit.trace(model().train(), batch(), tiles=False)


@pytest.fixture(scope="module")
def plan(bare: Trace) -> Plan:
    return tightfit.plan(bare, "75%")


def test_the_file_fits_the_same_model_and_a_wrapped_one(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    for subject in (model().train(), Wrapped(model()).train(), Wrapped(Wrapped(model())).train()):
        plain = gradients(subject, batch())
        applied = tightfit.fit(subject, batch(), plan=tmp_path / "plan.json")
        assert applied.plan.budget_bytes == plan.budget_bytes
        assert applied.plan.status is Status.FEASIBLE and applied.plan.bound_seconds == 0  # nothing is proven here
        assert applied.plan.peak_bytes <= plan.budget_bytes
        found = gradients(subject, batch())
        assert applied.stats().replays == plan.replays > 0 and applied.stats().fallbacks == 0
        applied.remove()
        assert all(map(torch.equal, found, plain)) and len(found) == len(plain)
        proof = tightfit.verify(subject, batch(), applied.plan)
        assert proof.passed, proof.checks  # its peak is what this step takes, too


@pytest.mark.slow
def test_what_is_before_the_paths_goes_as_well(plan: Plan) -> None:
    wrapped = Wrapped(model()).train()
    theirs = tightfit.plan(tightfit.trace(wrapped, batch()), "75%")
    mine = tightfit.trace(model().train(), batch())
    assert [c.unit for c in rebased(theirs, mine).choices] == [c.unit for c in plan.choices]
    alone = tightfit.trace(model().train(), batch(), units=[""])  # the path of the model itself is empty
    within = tightfit.trace(Wrapped(model()).train(), batch(), units=["inner"])
    for one, other in ((alone, within), (within, alone)):
        found = rebased(tightfit.plan(one, "90%", levers="recompute"), other)
        assert [c.unit for c in found.choices] == [unit.path for unit in other.units]


@pytest.mark.slow
def test_sweeps_tiles_and_streamed_weights_are_renamed() -> None:
    bare, wrapped = model("lora").train(), Wrapped(model("lora")).train()
    here = tightfit.trace(bare, batch(), tiles=True)
    there = tightfit.trace(wrapped, batch(), tiles=True)
    for levers in ("recompute,nest", "tile", "recompute,tile", "recompute,stream_weights"):
        made = tightfit.plan.lowest(here, levers=f"recompute,{levers}")
        found = rebased(made, there)
        assert found.peak_bytes == made.peak_bytes and found.replays == made.replays
        back = rebased(found, here)
        assert back.decisions == made.decisions and back.peak_bytes == made.peak_bytes
    assert made.settings["stream_weights"] != found.settings["stream_weights"]


def test_sweeps_go_to_the_units_of_the_wrapped_model() -> None:
    def blocks() -> nn.Module:
        torch.manual_seed(0)
        parts = (nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh()) for _ in range(8))
        return nn.Sequential(*parts)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = blocks()

        def forward(self, rows: torch.Tensor) -> Any:
            return self.inner(rows)

    def loss(subject: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = subject(rows).square().mean()
        return found

    rows, subject = torch.randn(256, 32), Around()
    made = tightfit.plan.lowest(tightfit.trace(blocks(), rows, loss=loss, tiles=False))
    assert made.advances and not any(each.base.startswith("inner.") for each in made.advances)
    applied = tightfit.fit(subject, rows, loss=loss, plan=made)
    assert {path.partition(".")[0] for each in applied.plan.advances for path in (each.base, each.target)} == {"inner"}
    assert applied.plan.peak_bytes == made.peak_bytes and applied.plan.replays == made.replays
    applied.remove()
    proof = tightfit.verify(subject, rows, applied.plan, loss=loss)
    assert proof.passed, proof.checks


def test_a_smaller_batch_is_within_and_a_larger_one_is_told(plan: Plan) -> None:
    applied = tightfit.fit(model().train(), batch(2), plan=plan)
    assert applied.plan.peak_bytes < plan.peak_bytes and applied.plan.budget_bytes == plan.budget_bytes
    assert applied.plan.recompute_flops * 2 == plan.recompute_flops  # of half the rows
    assert applied.plan.unplanned_peak_bytes == tightfit.simulate(applied.trace).peak_bytes < plan.unplanned_peak_bytes
    applied.remove()
    subject = model().train()
    with pytest.raises(PlanMismatch, match=r"takes .* MiB of this step, and may take .* MiB: the batch"):
        tightfit.fit(subject, batch(8), plan=plan)
    assert not any("forward" in vars(m) for m in subject.modules())


def test_a_budget_beside_the_plan_takes_the_place_of_its_own(plan: Plan) -> None:
    applied = tightfit.fit(model().train(), batch(8), "64MiB", plan=plan)
    assert applied.plan.budget_bytes == 64 << 20 and applied.plan.peak_bytes > plan.budget_bytes
    applied.remove()
    with pytest.raises(PlanMismatch, match="and may take"):
        tightfit.fit(model().train(), batch(), plan.peak_bytes - 4096, plan=plan)
    with pytest.raises(InvalidInput, match="takes the place of its bytes, so it is a size, not '75%'"):
        tightfit.fit(model().train(), batch(), "75%", plan=plan)


def test_a_longer_batch_later_is_planned_for_the_plans_budget(plan: Plan) -> None:
    subject = model().train()
    applied = tightfit.fit(subject, batch(2, 40), plan=plan)
    gradients(subject, batch(4, 48))
    assert applied.plan.budget_bytes == plan.budget_bytes and applied.plan.peak_bytes <= plan.budget_bytes
    assert applied.plan.unplanned_peak_bytes == plan.unplanned_peak_bytes
    applied.remove()


def test_another_step_is_refused_with_what_differs(plan: Plan) -> None:
    mask = torch.ones(4, 48, dtype=torch.long)
    mask[0, :7] = 0
    others = {
        "runs other ops than the plan was made for (op ": (model().train(), {**batch(), "attention_mask": mask}),
        "differs: planned for LlamaDecoderLayer": (model().to(torch.bfloat16).train(), batch()),
        "which this step does not have (it has ": (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.ones(2, 4)),
    }
    for says, (subject, step) in others.items():
        loss = None if isinstance(step, dict) else lambda m, x: m(x).sum()
        with pytest.raises(PlanMismatch) as error:
            tightfit.fit(subject, step, loss=loss, plan=plan)
        assert says in str(error.value) and "make the plan anew, of this step" in str(error.value)


def test_a_model_that_has_the_units_twice_is_refused(plan: Plan) -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = model(), model()

        def forward(self, **step: Any) -> Any:
            return self.left(**step).loss + self.right(**step).loss

    with pytest.raises(PlanMismatch, match=r"'left.model.layers.0' or 'right.model.layers.0'"):
        tightfit.fit(Twins().train(), batch(), plan=plan)


def test_a_damaged_plan_is_refused(bare: Trace, plan: Plan) -> None:
    with pytest.raises(PlanMismatch, match="the plan is damaged"):
        rebased(dataclasses.replace(plan, programs={}), bare)
    first = next(choice for choice in plan.choices if not choice.keeps_all)
    short = dataclasses.replace(first, actions=(*first.actions, Action.KEEP))
    others = tuple(short if choice is first else choice for choice in plan.choices)
    with pytest.raises(PlanMismatch, match="the plan is damaged"):
        rebased(dataclasses.replace(plan, choices=others), bare)


def test_a_unit_that_must_keep_everything_is_refused(bare: Trace, plan: Plan) -> None:
    pinned = dataclasses.replace(
        bare, units=tuple(dataclasses.replace(unit, pinned="it is pinned") for unit in bare.units)
    )
    with pytest.raises(PlanMismatch, match=r"has to keep everything in this step .it is pinned."):
        rebased(plan, pinned)


@pytest.mark.slow
def test_tiles_are_taken_with_a_word_or_not_at_all() -> None:
    recorded = tightfit.trace(model().train(), batch(), tiles=True)
    made = tightfit.plan.lowest(recorded, levers="recompute,tile")
    assert not made.exact
    with pytest.warns(UserWarning, match="the plan that was given .*; exact=True forbids it"):
        tightfit.fit(model().train(), batch(), plan=made).remove()
    with pytest.raises(InvalidInput, match="exact=True was asked for, and the plan that was given"):
        tightfit.fit(model().train(), batch(), plan=made, exact=True)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "neither a budget nor a plan was given"),
        ({"plan": "nowhere.json"}, "cannot read the plan 'nowhere.json'"),
        ({"plan": 3}, "expected plan= to be a Plan or the path of its file, found int"),
        ({"plan": "nowhere.json", "micro_batch": "auto"}, "a plan is for one size of batch"),
    ],
)
def test_what_cannot_be_meant_is_told_in_one_line(given: dict[str, Any], says: str) -> None:
    for ask in (lambda: tightfit.fit(model(), batch(), **given), lambda: TightfitCallback(**given)):
        with pytest.raises(InvalidInput, match=says) as error:
            ask()
        assert "\n" not in str(error.value)
    assert what_is_given("75%", None) == "75%" and what_is_given(0, None) == 0


@pytest.mark.slow
def test_a_deeper_model_is_in_tiles_all_through() -> None:
    """Its other units are no choice of the plan's, and are tiled like those that are."""
    step = batch(4, 64)
    made = tightfit.plan(tightfit.trace(layers(3), step, tiles=True), "45%", levers="recompute,tile")
    assert made.tiling is not None and made.tiling.modules
    deeper = layers(5)
    with pytest.warns(UserWarning, match="the plan that was given"):
        applied = tightfit.fit(deeper, step, "1GiB", plan=made)
    assert len(applied.plan.choices) == 5
    applied.remove()
    tight = dataclasses.replace(applied.plan, budget_bytes=applied.plan.peak_bytes)
    proof = tightfit.verify(deeper, step, tight)
    assert proof["prediction"].passed and proof["peak"].passed, proof.checks


def layers(count: int) -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 260}
    config = LlamaConfig(num_hidden_layers=count, use_cache=False, **shape)
    return add_lora(LlamaForCausalLM(config), rank=8).train()


def test_levers_beside_a_plan_are_those_that_it_may_use(plan: Plan) -> None:
    with pytest.raises(InvalidInput, match="uses recompute, which the levers that were asked for leave out"):
        tightfit.fit(model().train(), batch(), plan=plan, levers="offload")
    tightfit.fit(model().train(), batch(), plan=plan, levers="recompute,offload").remove()


def test_the_host_budget_holds_for_a_given_plan_too() -> None:
    subject = model("lora").train()
    recorded = tightfit.trace(subject, batch(), tiles=False)
    made = tightfit.plan.lowest(recorded, effort=QUICK, levers="recompute,stream_weights")
    with pytest.raises(PlanMismatch, match=r"takes .* in host memory, and may take 0 B.*raise the host budget"):
        tightfit.fit(model("lora").train(), batch(), plan=made, host_budget=0)
    applied = tightfit.fit(model("lora").train(), batch(), plan=made, host_budget="1GiB")
    assert applied.plan.host_budget_bytes == 1 << 30
    applied.remove()


# ------------------------------------------------------------------------------------------- frameworks


def collated() -> dict[str, Any]:
    """The longest batch of the Trainer's, as its collator makes it."""
    run = trainer("trainer", Path("unused"))
    found, _ = longest_batch(run.get_train_dataloader(), 4)
    return {key: found[key] for key in ("input_ids", "attention_mask", "labels")}


def test_one_file_in_the_trainer_in_lightning_and_in_a_plain_loop(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    subject = model().train()
    optimizer = torch.optim.AdamW(subject.parameters())
    tightfit.plan(tightfit.trace(subject, collated(), optimizer=optimizer, tiles=False), "90%").save(file)
    made = Plan.load(file)

    plain = trainer("trainer", tmp_path, max_steps=5)
    plain.train()
    callback = TightfitCallback(plan=file)
    ours = trainer("trainer", tmp_path, [callback], max_steps=5)
    ours.train()
    assert told(ours) == told(plain)
    assert callback.proof is not None and callback.proof.passed, callback.proof.checks
    assert callback.plan is not None and callback.plans == 1 and callback.plan.replays == made.replays > 0
    assert [c.actions for c in callback.plan.choices] == [c.actions for c in made.choices]
    assert max(callback.peaks) <= callback.plan.budget_bytes == made.budget_bytes

    callback.plan.save(tmp_path / "trainers.json")  # and what the Trainer has saved goes elsewhere
    lightning = pytest.importorskip("lightning.pytorch")
    from tightfit.integrations.lightning import TightfitCallback as InLightning

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = model().train()

        def training_step(self, step: Any, _: int) -> Any:
            return self.net(**step).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    weights = []
    for path in (None, file, tmp_path / "trainers.json"):
        torch.manual_seed(0)
        module, taken = Module(), [] if path is None else [InLightning("5MiB", plan=path)]
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
        run = lightning.Trainer(max_steps=2, callbacks=taken, enable_model_summary=False, **quiet)
        run.fit(module, DataLoader([collated(), collated()], batch_size=None))  # type: ignore[arg-type]
        weights.append([p.detach().clone() for p in module.parameters()])
        for each in taken:
            assert each.plan is not None and each.plan.replays == made.replays and each.plans == 1
            assert each.plan.budget_bytes == 5 << 20  # it holds a batch's gradients while the next one runs forward
    assert all(all(map(torch.equal, weights[0], other)) for other in weights[1:])


@pytest.mark.slow
def test_a_plan_that_steps_in_backward_is_none_for_a_trainer_that_accumulates(tmp_path: Path) -> None:
    subject = model().train()
    optimizer = torch.optim.AdamW(subject.parameters())
    recorded = tightfit.trace(subject, collated(), optimizer=optimizer)
    made = tightfit.plan.lowest(recorded, levers="recompute,step_in_backward")
    assert "step_in_backward" in made.settings
    with pytest.raises(Unsupported, match="but gradient_accumulation_steps needs the gradients after backward"):
        changes = {"max_steps": 2, "gradient_accumulation_steps": 2}
        trainer("trainer", tmp_path, [TightfitCallback(plan=made)], **changes).train()
    for max_grad_norm in (0, 0.5):  # with a norm to clip to each step runs twice
        run = trainer("trainer", tmp_path, [TightfitCallback(plan=made)], max_steps=2, max_grad_norm=max_grad_norm)
        run.train()
        plain = trainer("trainer", tmp_path, max_steps=2, max_grad_norm=max_grad_norm)
        plain.train()
        assert told(run)[:2] == told(plain)[:2]


def test_a_compiled_model_takes_the_budget_in_its_place(plan: Plan) -> None:
    subject = torch.compile(model().train(), backend="eager")
    with pytest.raises(Unsupported, match="plan= was given for a compiled model"):
        tightfit.fit(subject, batch(), plan=plan)
