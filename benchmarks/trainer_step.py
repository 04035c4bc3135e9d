"""The forecast of a trainer's step against the allocator's own count of its `training_step`, on the CPU.

    python benchmarks/trainer_step.py             # minutes; writes benchmarks/results/trainer_step.json

The forecast is of the installed TRL's own loss around a model without weights (`tightfit.integrations.trainer_step`);
the count is of a real `training_step` on a batch of its own collator. Beside it what the model's own loss would
have been forecast to need, which is what a forecast that does not look at the trainer says.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "trainer_step.json"
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 32000,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 128, "n_layer": 2, "n_head": 4,
    "n_positions": 512, "vocab_size": 50257,
}  # fmt: skip
#: name -> (config, method, batch, tokens, settings of the trainer)
CASES: dict[str, tuple[dict[str, Any], str, int, int, dict[str, Any]]] = {
    "llama, nll": (LLAMA, "full", 8, 251, {}),
    "llama, LoRA": (LLAMA, "lora", 8, 251, {}),
    "llama, dft": (LLAMA, "full", 4, 128, {"loss_type": "dft"}),
    "llama, packing": (LLAMA, "full", 4, 256, {"packing": True}),
    "llama, padding-free": (LLAMA, "full", 4, 128, {"padding_free": True}),
    "llama, NEFTune": (LLAMA, "full", 4, 128, {"neftune_noise_alpha": 5.0}),
    "llama, label smoothing": (LLAMA, "full", 4, 128, {"label_smoothing_factor": 0.1}),
    "llama, accumulation": (LLAMA, "full", 4, 128, {"gradient_accumulation_steps": 4}),
    "gpt2, nll": (GPT2, "full", 8, 128, {}),
    "gpt2, LoRA and dft": (GPT2, "lora", 4, 256, {"loss_type": "dft"}),
}


def measured_bytes(folder: str, method: str, batch: int, seq: int, settings: dict[str, Any]) -> int:
    """Peak of one `training_step` of a real trainer, weights, gradients that wait and batch included."""
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from tightfit.integrations.peft import add_lora
    from tightfit.integrations.trainer_step import _tokenizer
    from tightfit.verify.peak import PeakMeter, static_bytes

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).train()
    if method == "lora":
        model = add_lora(model, rank=16)
    rows = [{"input_ids": [3] * seq, "labels": [3] * seq} for _ in range(batch)]
    with tempfile.TemporaryDirectory() as place:
        args = SFTConfig(
            output_dir=place, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
            max_length=seq if settings.get("packing") else None,
            per_device_train_batch_size=batch, save_strategy="no", dataset_kwargs={"skip_prepare_dataset": True},
            disable_tqdm=True, **settings,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=_tokenizer()
        )
        if trainer.neftune_noise_alpha is not None:
            from transformers.integrations.neftune import activate_neftune

            activate_neftune(trainer.model, trainer.neftune_noise_alpha, trainer.accelerator)
        trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
        inputs = trainer.data_collator(rows)
        tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        items = (tensors["labels"] != -100).sum()
        trainer.training_step(trainer.model, dict(inputs), items)
        if args.gradient_accumulation_steps == 1:
            trainer.model.zero_grad(set_to_none=True)
        static = static_bytes(trainer.model, None, tensors)
        with PeakMeter("cpu") as meter:
            trainer.training_step(trainer.model, dict(inputs), items)
    return static + meter.rise_bytes


def compared(name: str) -> dict[str, Any]:
    """The forecast and the count of one case."""
    from tightfit.forecast import Setup, trace_setup
    from tightfit.plan import simulate

    config, method, batch, seq, settings = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        setup = Setup(
            model=folder, method=method, batch=batch, seq=seq, dtype="fp32", optimizer="none", trainer="sft",
            settings=tuple(settings.items()), accumulate=settings.get("gradient_accumulation_steps", 1) > 1,
        )  # fmt: skip
        predicted = simulate(trace_setup(setup)).peak_bytes
        own = simulate(trace_setup(dataclasses.replace(setup, trainer="model", settings=()))).peak_bytes
        measured = measured_bytes(folder, method, batch, seq, settings)
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
        rows.append(compared(name))
        print(json.dumps(rows[-1]), flush=True)
    from tightfit.step.environment import environment

    if not asked.only:
        record = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment(), "rows": rows,
        }  # fmt: skip
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(any(abs(row["off"]) > 0.005 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
