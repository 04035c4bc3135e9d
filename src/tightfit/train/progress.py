"""What is seen of a run while it goes on: its progress line, its losses, its end."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from transformers import (
    Trainer,
    TrainerCallback,
)
from trl import SFTTrainer

from tightfit.core import (
    InvalidInput,
    format_bytes,
)
from tightfit.integrations.trainer import running_trainer


class PlainLoss(SFTTrainer):  # type: ignore[misc]  # TRL is untyped
    """TRL's trainer with the loss that the model itself computes."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


class Stop(TrainerCallback):
    """Ends the training after `steps` steps, without a checkpoint."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_evaluate = False
        if state.global_step >= self.steps:
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_evaluate = False


class Losses(TrainerCallback):
    """One row for each optimizer step, whatever the Trainer's own interval of logging."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._loss: torch.Tensor | None = None
        self._tokens = 0
        self._lr = 0.0
        self._last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sum up the losses of a step's batches as the Trainer does, outside of whatever guards the step already."""
        trainer: Any = running_trainer()
        inside = trainer.training_step

        def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = inside(model, inputs, *args, **kwargs)
            self._loss = loss if self._loss is None else self._loss + loss
            mask = inputs.get("attention_mask")
            self._tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
            return loss

        trainer.training_step = training_step
        self._last = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._loss, self._tokens = None, 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._lr = float(kwargs["lr_scheduler"].get_last_lr()[0])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._loss is not None
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        row = {
            "step": state.global_step,
            "loss": float(self._loss.item()),
            "lr": self._lr,
            "tokens": self._tokens,
            "seconds": round(seconds, 6),
            "tokens_per_second": round(self._tokens / max(seconds, 1e-9), 1),
        }
        self.rows.append(row)


def progress_bar(console: Console) -> Progress:
    """One line of which nothing is cut at 80 columns: a bar is drawn where there is room for one besides."""
    columns: list[ProgressColumn] = [TextColumn("step"), MofNCompleteColumn()]
    if console.width >= 100:
        columns.append(BarColumn(bar_width=None))
    columns += [TextColumn("{task.fields[figures]}"), TimeRemainingColumn()]
    return Progress(*columns, console=console)


def figures_of(loss: float, tokens_per_second: float, peak_bytes: int, budget_bytes: int) -> str:
    peak, budget = format_bytes(peak_bytes), format_bytes(budget_bytes)
    if peak.split()[1:] == budget.split()[1:]:
        peak = peak.split()[0]
    return f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  {peak} of {budget}"


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn what TRL raises for input that it cannot take into one line."""
    try:
        yield
    except (ValueError, TypeError, KeyError, ImportError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InvalidInput(f"{what}: {lines[0] if lines else type(error).__name__}") from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars and no advice from transformers, TRL and datasets inside; their errors still come through."""
    import logging as python_logging

    import datasets
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    data_bars = datasets.is_progress_bar_enabled() if hasattr(datasets, "is_progress_bar_enabled") else True
    others = [python_logging.getLogger(name) for name in ("trl", "datasets", "accelerate", "peft")]
    levels = [other.level for other in others]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for other in others:
        other.setLevel(python_logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if data_bars:
            datasets.enable_progress_bars()
        for other, before in zip(others, levels, strict=True):
            other.setLevel(before)
