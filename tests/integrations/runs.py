"""Short trainings that the tests of the integrations share: Trainer, SFT, DPO; full, LoRA, 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.data.data_collator import DataCollatorForLanguageModeling
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from tightfit.integrations.bitsandbytes import quantise
from tightfit.integrations.peft import add_lora
from tightfit.train import byte_tokenizer

STEPS = 20


def tokenizer() -> Any:
    made = byte_tokenizer()
    made.pad_token = made.eos_token
    return made


def model(method: str = "full") -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, vocab_size=260,
        max_position_embeddings=256, attention_dropout=0.1,
    )  # fmt: skip
    plain = LlamaForCausalLM(config)
    if method == "4bit":
        plain = quantise(plain, torch.float32)
    return plain if method == "full" else add_lora(plain, rank=4, dropout=0.05)


def lines(count: int = 40, longest: int = 7) -> list[str]:
    words = ["the", "quick", "brown", "fox", "jumps", "over", "it"]
    return [" ".join(words[: 1 + (i * 3) % longest]) for i in range(count)]


def tokens(count: int = 40, longest: int = 7) -> list[dict[str, list[int]]]:
    return [{"input_ids": tokenizer()(line)["input_ids"]} for line in lines(count, longest)]


def _arguments(kind: type, folder: Path, changes: dict[str, Any]) -> Any:
    options: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4, "logging_steps": 1, "seed": 3,
        "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-3,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    if kind is not TrainingArguments:
        options["bf16"] = False
    return kind(**{**options, **changes})


def trainer(
    kind: str,
    folder: Path,
    callbacks: list[TrainerCallback] | None = None,
    *,
    method: str = "full",
    subject: Any = None,
    data: Any = None,
    more: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """A Trainer of `kind` (`trainer`, `sft`, `packing`, `dpo`); `more` goes to it, `changes` to its arguments."""
    subject = model(method) if subject is None else subject
    texts = lines()
    made: dict[str, Any] = {"model": subject, "callbacks": callbacks or [], "processing_class": tokenizer()}
    if kind == "trainer":
        made |= {
            "args": _arguments(TrainingArguments, folder, changes),
            "train_dataset": tokens() if data is None else data,
            "eval_dataset": tokens(6, 5),
            "data_collator": DataCollatorForLanguageModeling(tokenizer(), mlm=False),
        }
        return Trainer(**(made | (more or {})))
    if kind == "dpo":
        rows = [{"prompt": "say ", "chosen": text, "rejected": text[::-1][:9]} for text in texts]
        if method == "full":
            made["ref_model"] = model()
        made |= {"args": _arguments(DPOConfig, folder, changes)}
        made |= {"train_dataset": Dataset.from_list(rows), "eval_dataset": Dataset.from_list(rows[:6])}
        return DPOTrainer(**(made | (more or {})))
    if kind == "packing":
        changes = {"packing": True, "max_length": 48, **changes}
    rows = [{"prompt": "say ", "completion": text} for text in texts]
    made |= {"args": _arguments(SFTConfig, folder, changes)}
    made |= {"train_dataset": Dataset.from_list(rows), "eval_dataset": Dataset.from_list(rows[:6])}
    return SFTTrainer(**(made | (more or {})))


def told(run: Any) -> list[dict[str, Any]]:
    """What a run logged, without its clock and without what tightfit adds."""
    clock = ("runtime", "per_second", "tightfit/")
    return [{k: v for k, v in entry.items() if not any(c in k for c in clock)} for entry in run.state.log_history]


class Generates(TrainerCallback):
    """Generates in the middle of a training, as people do to see samples."""

    def __init__(self) -> None:
        self.texts: list[list[int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (3, 11):
            subject = kwargs["model"]
            subject.eval()
            ids = torch.arange(5, 9)[None]
            with torch.no_grad():
                out = subject.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
                )
            self.texts.append(out[0].tolist())
            subject.train()
