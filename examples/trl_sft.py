"""One line more in a TRL script: the budget. The losses are those of the run without it."""

import tempfile

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from tightfit.integrations.transformers import TightfitCallback
from tightfit.train import byte_tokenizer

tokenizer = byte_tokenizer()
rows = [{"prompt": f"{i} + 1 = ", "completion": f"{i + 1}"} for i in range(64)]


def losses(callbacks: list[TightfitCallback]) -> list[float]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=len(tokenizer)
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=LlamaForCausalLM(config),
            args=SFTConfig(output_dir=folder, max_steps=5, logging_steps=1, use_cpu=True, bf16=False, report_to="none"),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


callback = TightfitCallback(budget="95%")  # the one line; "22GiB" on a GPU
fitted = losses([callback])
assert callback.plan is not None and callback.proof is not None and callback.proof.passed
print(f"highest peak {max(callback.peaks):,} B, predicted {callback.plan.peak_bytes:,} B")
assert fitted == losses([])
