"""Models, batches and the Trainer: the callback changes no loss, and says so in the logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator

from tightfit.core import BudgetInfeasible, InvalidInput, Unsupported
from tightfit.integrations.peft import add_lora
from tightfit.integrations.transformers import TightfitCallback, load_model, random_batch


def small_model(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=200,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, attention_dropout=0.1, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def examples(count: int = 24, seq: int = 48) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 200, (count, seq), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def train(model: Any, folder: Path, callback: TightfitCallback | None, **changes: Any) -> list[float]:
    options: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "seed": 3,
        "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-3,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**{**options, **changes}),
        train_dataset=examples(),
        data_collator=default_data_collator,
        callbacks=[] if callback is None else [callback],
    )
    trainer.train()
    train.logs = trainer.state.log_history  # type: ignore[attr-defined]
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=pytest.mark.slow)])
@pytest.mark.parametrize("accumulation", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_losses_are_those_without_the_callback(method: str, accumulation: int, tmp_path: Path) -> None:
    def model() -> Any:
        return small_model() if method == "full" else add_lora(small_model(), rank=4)

    changes = {"gradient_accumulation_steps": accumulation}
    expected = train(model(), tmp_path, None, **changes)
    callback = TightfitCallback("80%")
    fitted = model()
    assert train(fitted, tmp_path, callback, **changes) == expected
    assert callback.plan is not None and callback.plan.replays > 0
    assert callback.proof is not None and callback.proof["gradients"].passed
    assert len(callback.peaks) == 4
    assert max(callback.peaks) <= callback.plan.budget_bytes * 1.005
    assert max(callback.peaks) == pytest.approx(callback.plan.peak_bytes, rel=0.005)
    logged = train.logs[0]  # type: ignore[attr-defined]
    assert logged["tightfit/predicted_peak_bytes"] == callback.plan.peak_bytes
    assert logged["tightfit/peak_bytes"] == callback.peaks[0]
    assert not any("forward" in module.__dict__ for module in fitted.modules()), "the plan was not taken off"


def test_bf16_training(tmp_path: Path) -> None:
    expected = train(small_model(), tmp_path, None, bf16=True)
    assert train(small_model(), tmp_path, TightfitCallback("85%"), bf16=True) == expected


@pytest.mark.slow
def test_a_budget_that_nothing_fits(tmp_path: Path) -> None:
    model = small_model()
    with pytest.raises(BudgetInfeasible):
        train(model, tmp_path, TightfitCallback("5%"))
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_the_trainers_own_checkpointing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="checkpointing"):
        train(small_model(), tmp_path, TightfitCallback("80%"), gradient_checkpointing=True)


def test_load_model(tmp_path: Path) -> None:
    model, origin = load_model("tightfit-demo")
    assert model.training and "random weights" in origin
    with pytest.raises(InvalidInput, match="did you mean gpt2"):
        load_model("gpt-2")
    small_model().save_pretrained(tmp_path / "saved")
    loaded, origin = load_model(str(tmp_path / "saved"))
    assert torch.equal(loaded.model.embed_tokens.weight, small_model().model.embed_tokens.weight)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text(json.dumps(small_model().config.to_dict(), default=str))
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"not loaded")
    with pytest.raises(InvalidInput, match="pickle"):
        load_model(str(tmp_path / "pickled"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    with pytest.raises(InvalidInput):
        load_model(str(tmp_path / "broken"))


def test_random_batch_and_lora_refuse_wrong_sizes() -> None:
    model = small_model()
    assert random_batch(model, 2, 8)["input_ids"].shape == (2, 8)
    for batch, seq in ((0, 8), (2, 1), (2, 65)):
        with pytest.raises(InvalidInput):
            random_batch(model, batch, seq)
    for wrong in ({"rank": 0}, {"dropout": 1.0}, {"targets": ["nothing_like_it"]}):
        with pytest.raises(InvalidInput):
            add_lora(small_model(), **wrong)
