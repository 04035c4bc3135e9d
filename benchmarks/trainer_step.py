"""The forecast of a trainer's step against the allocator's own count of its `training_step`, on the CPU.

    python benchmarks/trainer_step.py             # minutes; writes benchmarks/results/trainer_step.json

The forecast is of the installed TRL's own SFT or DPO loss around a model without weights
(`tightfit.integrations.trainer_step`); the count is of a real `training_step` on a batch of its own collator. Beside it
what the model's own loss would have been forecast to need, which is what a forecast that does not look at the trainer
says.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import drawn

RESULTS = Path(__file__).parent / "results" / "trainer_step.json"
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32000,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 128, "n_layer": 2, "n_head": 4,
    "n_positions": 512, "vocab_size": 50257,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    config: dict[str, Any]
    trainer: str = "sft"
    method: str = "full"
    batch: int = 4  # with DPO, pairs
    seq: int = 128
    settings: dict[str, Any] = field(default_factory=dict)
    model_settings: dict[str, Any] = field(default_factory=dict)  # of TRL's ModelConfig, read from a YAML by the doctor


CASES: dict[str, Case] = {
    "llama, nll": Case(config=LLAMA, batch=8, seq=251),
    "llama, LoRA": Case(config=LLAMA, method="lora", batch=8, seq=251),
    "llama, dft": Case(config=LLAMA, settings={"loss_type": "dft"}),
    "llama, packing": Case(config=LLAMA, seq=256, settings={"packing": True}),
    "llama, padding-free": Case(config=LLAMA, settings={"padding_free": True}),
    "llama, NEFTune": Case(config=LLAMA, settings={"neftune_noise_alpha": 5.0}),
    "llama, label smoothing": Case(config=LLAMA, settings={"label_smoothing_factor": 0.1}),
    "llama, accumulation": Case(config=LLAMA, settings={"gradient_accumulation_steps": 4}),
    "llama, LoRA with dropout": Case(
        config=LLAMA, method="lora", model_settings={"use_peft": True, "lora_target_modules": ["all-linear"]}
    ),
    "llama, LoRA on PEFT's own targets": Case(
        config=LLAMA, method="lora", model_settings={"use_peft": True, "lora_dropout": 0.0}
    ),
    "llama, DoRA": Case(
        config=LLAMA,
        method="lora",
        model_settings={"use_peft": True, "use_dora": True, "lora_target_modules": ["q_proj", "up_proj"]},
    ),
    "llama, LoRA and the head whole": Case(
        config=LLAMA, method="lora", model_settings={"use_peft": True, "lora_modules_to_save": ["lm_head"]}
    ),
    "llama, eager attention": Case(config=LLAMA, seq=256, model_settings={"attn_implementation": "eager"}),
    "gpt2, nll": Case(config=GPT2, batch=8),
    "gpt2, LoRA and dft": Case(config=GPT2, method="lora", seq=256, settings={"loss_type": "dft"}),
    "llama, DPO": Case(config=LLAMA, trainer="dpo"),
    "llama, DPO, LoRA": Case(config=LLAMA, trainer="dpo", method="lora"),
    "llama, DPO, reference precomputed": Case(config=LLAMA, trainer="dpo", settings={"precompute_ref_log_probs": True}),
    "llama, DPO, two losses": Case(
        config=LLAMA, trainer="dpo", seq=64, settings={"loss_type": ("ipo", "sft"), "ld_alpha": 0.5}
    ),
    "gpt2, DPO, LoRA": Case(config=GPT2, trainer="dpo", method="lora", seq=256),
    "gpt2, DPO, accumulation": Case(
        config=GPT2, trainer="dpo", batch=2, seq=256, settings={"gradient_accumulation_steps": 2}
    ),
}


def measured_bytes(folder: str, case: Case) -> int:
    """Peak of one `training_step` of a real trainer, weights, gradients that wait and batch included."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tightfit.verify.peak import PeakMeter, static_bytes

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_config(
        config, attn_implementation=case.model_settings.get("attn_implementation")
    ).train()
    with tempfile.TemporaryDirectory() as place:
        common = {
            "output_dir": place, "report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
            "per_device_train_batch_size": case.batch, "save_strategy": "no", "disable_tqdm": True,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in case.settings.items()},
        }  # fmt: skip
        trainer, rows = (_sft if case.trainer == "sft" else _dpo)(model, case, common)
        if trainer.neftune_noise_alpha is not None:
            from transformers.integrations.neftune import activate_neftune

            activate_neftune(trainer.model, trainer.neftune_noise_alpha, trainer.accelerator)
        accumulates = trainer.args.gradient_accumulation_steps
        trainer.current_gradient_accumulation_steps = accumulates
        inputs = trainer.data_collator(rows)
        tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        items = (tensors["labels"] != -100).sum() if "labels" in tensors else None
        trainer.training_step(trainer.model, dict(inputs), items)
        if accumulates == 1:
            trainer.model.zero_grad(set_to_none=True)
        static = static_bytes(trainer.model, None, tensors)
        reference = getattr(trainer, "ref_model", None)
        if reference is not None:
            static += static_bytes(reference, None, {})
        with PeakMeter("cpu") as meter:
            trainer.training_step(trainer.model, dict(inputs), items)
    return static + meter.rise_bytes


def _sft(model: Any, case: Case, common: dict[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
    from datasets import Dataset
    from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

    from tightfit.integrations.peft import add_lora
    from tightfit.integrations.trainer_step import _tokenizer

    if case.method == "lora" and not case.model_settings:
        model = add_lora(model, rank=16)
    rows = [{"input_ids": [3] * case.seq, "labels": [3] * case.seq} for _ in range(case.batch)]
    args = SFTConfig(
        max_length=case.seq if case.settings.get("packing") else None,
        dataset_kwargs={"skip_prepare_dataset": True}, **common,
    )  # fmt: skip
    data = Dataset.from_list(rows)
    adapters = get_peft_config(ModelConfig(**case.model_settings))
    made = SFTTrainer(
        model=model, args=args, train_dataset=data, processing_class=_tokenizer(), peft_config=adapters
    )  # fmt: skip
    return made, rows


def _dpo(model: Any, case: Case, common: dict[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
    """The trainer as TRL's own script makes it: the adapters' config goes to it, and it prepares texts."""
    from datasets import Dataset
    from peft import LoraConfig, TaskType
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from trl import DPOConfig, DPOTrainer

    from tightfit.integrations.trainer_step import _tokenizer

    tokenizer = _tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    text = " a" * (case.seq - 2)  # and one token each for the prompt and the end
    given = [{"prompt": "a", "chosen": text, "rejected": text} for _ in range(case.batch)]
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=TaskType.CAUSAL_LM)
    kept = case.method == "lora" or case.settings.get("precompute_ref_log_probs")
    trainer = DPOTrainer(
        model=model, ref_model=None if kept else copy.deepcopy(model).eval(), args=DPOConfig(**common),
        train_dataset=Dataset.from_list(given), processing_class=tokenizer,
        peft_config=lora if case.method == "lora" else None,
    )  # fmt: skip
    return trainer, list(trainer.train_dataset)


def _read(folder: str, case: Case, setup: Any) -> Any:
    """`setup` as the doctor reads it from the YAML of a run."""
    import yaml

    from tightfit.doctor import case_of

    run = {
        "model_name_or_path": folder, "per_device_train_batch_size": case.batch, "max_length": case.seq, "bf16": False,
        **case.settings, **case.model_settings,
    }  # fmt: skip
    path = Path(folder) / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    found = case_of(str(path), trainer=case.trainer, optimizer="none").setup
    assert found is not None
    for same in ("method", "batch", "seq", "dtype", "trainer", "accumulate"):
        assert getattr(found, same) == getattr(setup, same), same
    return found


def compared(name: str, case: Case) -> dict[str, Any]:
    """The forecast and the count of one case."""
    from tightfit.forecast import Setup, trace_setup
    from tightfit.plan import simulate

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(case.config))
        setup = Setup(
            model=folder, method=case.method, batch=case.batch, seq=case.seq, dtype="fp32", optimizer="none",
            trainer=case.trainer, settings=tuple(case.settings.items()),
            accumulate=case.settings.get("gradient_accumulation_steps", 1) > 1,
        )  # fmt: skip
        if case.model_settings:
            setup = _read(folder, case, setup)
        predicted = simulate(trace_setup(setup)).peak_bytes
        sequences = case.batch * (2 if case.trainer == "dpo" else 1)
        own_loss = dataclasses.replace(setup, trainer="model", settings=(), batch=sequences)
        own = simulate(trace_setup(own_loss)).peak_bytes
        measured = measured_bytes(folder, case)
    return {
        "case": name, "predicted_bytes": predicted, "measured_bytes": measured, "off": predicted / measured - 1,
        "own_loss_bytes": own, "own_loss_off": own / measured - 1,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(CASES))
    asked = parser.parse_args()
    rows = []
    for name in [asked.only] if asked.only else CASES:
        rows.append(compared(name, CASES[name]))
        print(json.dumps(rows[-1]), flush=True)
    from tightfit.step.environment import environment

    if not asked.only:
        record = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment(), "rows": rows,
        }  # fmt: skip
        drawn.write(RESULTS, record)
    return int(any(abs(row["off"]) > 0.005 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
