"""What is seen of a run while it goes on: its progress line, its losses, its end."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.progress import Progress, Task, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import (
    Trainer,
    TrainerCallback,
)
from trl import SFTTrainer

from tightfit.core import (
    InvalidInput,
    format_bytes,
)
from tightfit.integrations.own_step import running_trainer


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


@dataclass(frozen=True, slots=True)
class Figures:
    """What the progress line says of a step, in words."""

    loss: str = ""
    speed: str = ""
    peak: str = ""


def figures_of(loss: float, tokens_per_second: float, peak_bytes: int, budget_bytes: int) -> Figures:
    peak, budget = format_bytes(peak_bytes), format_bytes(budget_bytes)
    if peak.split()[1:] == budget.split()[1:]:
        peak = peak.split()[0]
    number = f"{loss:.3f}" if abs(loss) < 1e6 else f"{loss:.3e}"
    return Figures(f"loss {number}", f"{tokens_per_second:,.0f} tokens/s", f"{peak} of {budget}")


class _OneLine(Progress):
    """A line for each task of which nothing is ever cut: what there is no room for is left out whole.

    rich's own columns all shrink at once where the line is too long, the counter of steps with them.
    """

    def get_renderables(self) -> Iterator[RenderableType]:
        for task in self.tasks:
            yield _line(task, self.console.width)


_GAP = 2  # columns between two of the figures
_LEAST_BAR = 8  # columns; a shorter one shows nothing


def _line(task: Task, width: int) -> RenderableType:
    """The counter of steps, then what fits: first the loss, then the time left, the peak, the speed and a bar."""
    figures: Figures = task.fields["figures"]
    total = "?" if task.total is None else str(int(task.total))
    counter = Text(f"step {int(task.completed):{len(total)}}/{total}", style="progress.download")
    loss, speed, peak = (Text(each) for each in (figures.loss, figures.speed, figures.peak))
    remaining = TimeRemainingColumn().render(task)
    known = [each for each in (loss, remaining, peak, speed) if each]
    room = width - counter.cell_len
    kept = 0
    while kept < len(known) and room >= known[kept].cell_len + _GAP:
        room -= known[kept].cell_len + _GAP
        kept += 1
    cells: list[RenderableType] = [counter]
    if kept == len(known) and room >= _LEAST_BAR + _GAP:
        cells.append(ProgressBar(total=task.total, completed=task.completed, width=room - _GAP))
    cells += [each for each in (loss, speed, peak, remaining) if any(each is it for it in known[:kept])]
    line = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
    for _ in cells:
        line.add_column(no_wrap=True, overflow="crop")
    line.add_row(*cells)
    return line


def progress_bar(console: Console) -> Progress:
    """A bar whose tasks have `figures`, a `Figures`. What is shown reads whole; the counter of steps always is."""
    return _OneLine(console=console)


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
    """No progress bars and no advice from transformers, TRL and datasets inside; their errors still come through.

    But for datasets, which logs an error and then raises it: it is told once.
    """
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
        other.setLevel(python_logging.CRITICAL if other.name == "datasets" else python_logging.ERROR)
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
