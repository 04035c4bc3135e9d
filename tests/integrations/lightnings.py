"""Small LightningModules, and trainings of them that the tests of the callback share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel


class Base(pl.LightningModule):
    """Counts in Python what it sees, as people's modules do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.losses: list[float] = []
        self.kinds: dict[str, list[int]] = {}
        self.calls = 0

    def loss(self, batch: Any) -> torch.Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.calls += 1
        self.losses.append(loss.item())
        self.kinds.setdefault("seen", []).append(self.calls)
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=8)
        return {"loss": loss}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=4)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-3)


class Language(Base):
    """GPT-2 with dropout; its batches are dicts."""

    def __init__(self) -> None:
        super().__init__()
        config = GPT2Config(
            n_embd=32, n_layer=2, n_head=2, vocab_size=97, n_positions=96, bos_token_id=0, eos_token_id=0
        )
        self.net = GPT2LMHeadModel(config)

    def loss(self, batch: Any) -> torch.Tensor:
        found: torch.Tensor = self.net(**batch, labels=batch["input_ids"]).loss
        return found


class Pictures(Base):
    """A CNN with batch statistics and dropout."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [
            nn.Sequential(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1))
            for i in range(3)
        ]
        self.backbone = nn.Sequential(*blocks)
        self.head = nn.Linear(8 * 144, 5)

    def loss(self, batch: Any) -> torch.Tensor:
        pictures, labels = batch
        return nn.functional.cross_entropy(self.head(self.backbone(pictures).flatten(1)), labels)


def data_for(module: Base, sizes: tuple[int, ...] = ()) -> DataLoader[Any]:
    """Batches of 8, or of `sizes`. The same for every module of a kind."""
    drawn = torch.Generator().manual_seed(1)

    def batch(size: int) -> Any:
        if isinstance(module, Language):
            return {"input_ids": torch.randint(97, (size, 48), generator=drawn)}
        return [torch.randn(size, 3, 12, 12, generator=drawn), torch.randint(5, (size,), generator=drawn)]

    if not sizes and isinstance(module, Pictures):
        return DataLoader(TensorDataset(*batch(48)), batch_size=8, shuffle=True)
    return DataLoader([batch(size) for size in sizes or (8,) * 6], batch_size=None)  # type: ignore[arg-type]


def run(
    kind: type[Base], callbacks: list[Any], folder: Path, *, sizes: tuple[int, ...] = (), ckpt: Any = None, **more: Any
) -> Base:
    torch.manual_seed(3)
    random.seed(3)
    module = kind()
    options: dict[str, Any] = {
        "accelerator": "cpu", "max_steps": 3, "logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder, "limit_val_batches": 1,
        "check_val_every_n_epoch": None, "val_check_interval": 2,
    }  # fmt: skip
    trainer = pl.Trainer(callbacks=callbacks, **{**options, **more})
    trainer.fit(module, data_for(module, sizes), data_for(module, (4,)), ckpt_path=ckpt, weights_only=False)
    return module
