"""A `Trainer` callback that counts each step's peak.

Invariant: it changes nothing but the figures in the logs. Refused: a device whose bytes nobody counts (`Unsupported`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from transformers import TrainerCallback

from tightfit.integrations.longest import plain
from tightfit.integrations.own_step import replaced, report_first, running_trainer, weights_beside
from tightfit.integrations.tracking import figures
from tightfit.step.optimizers import bare
from tightfit.step.run import tensors_in, unique_bytes
from tightfit.verify.peak import PeakMeter, require_counted, static_bytes

__all__ = ["PeakCallback"]


class PeakCallback(TrainerCallback):
    """Counts the peak of every optimizer step with the allocator's own count, and logs `tightfit/peak_bytes`.

    Attributes: `peaks`, one number of bytes per step: everything live at the step's start that belongs to it
    (parameters, a reference model's too, optimizer state, batches) plus what the step added at its highest. What is
    logged is the highest since the last log.
    """

    def __init__(self) -> None:
        self.peaks: list[int] = []
        self._logged = 0  # of `peaks`
        self._upcoming: list[Any] = []  # the batches of the optimizer step that is about to run
        self._beside: list[torch.Tensor] = []  # weights of other models that the step holds
        self._wrapped: Any = None  # the model as the Trainer calls it
        self._meter: PeakMeter | None = None
        self._highest_bytes = 0  # of the parts of the running step that were counted before
        self._states, self._static_bytes, self._base_bytes = -1, 0, 0
        self._patches = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
        require_counted(args.device)
        trainer = running_trainer()
        report_first(self, trainer)
        self.peaks, self._logged, self._upcoming, self._states = [], 0, [], -1
        self._wrapped = trainer.model_wrapped
        self._beside = weights_beside(trainer, kwargs["model"])
        self._patches.enter_context(replaced(trainer, "get_batch_samples", self._noting))
        # the Trainer calls no callback when a training fails
        self._patches.enter_context(replaced(trainer, "_run_epoch", self._closing))

    def _noting(self, fetch: Callable[..., Any]) -> Callable[..., Any]:
        def get_batch_samples(*args: Any, **kwargs: Any) -> Any:
            fetched = fetch(*args, **kwargs)
            self._upcoming = [plain(batch) for batch in fetched[0]]
            return fetched

        return get_batch_samples

    def _closing(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def run_epoch(*args: Any, **kwargs: Any) -> Any:
            try:
                return run(*args, **kwargs)
            except BaseException:
                self.close()
                raise

        return run_epoch

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = bare(kwargs["optimizer"])
        if len(optimizer.state) != self._states:  # it makes its state in its first step; nothing else changes
            self._states = len(optimizer.state)
            self._static_bytes = static_bytes(self._wrapped, optimizer, self._beside)
        self._base_bytes = self._static_bytes + unique_bytes(tensors_in(self._upcoming))
        self._highest_bytes = 0
        self._meter = PeakMeter(args.device)
        self._meter.__enter__()

    def count_again(self) -> None:
        """The running step is done again: its peak is to be that of the attempt that succeeds."""
        if self._meter is not None:
            self._meter.__exit__(None, None, None)
            self._meter = PeakMeter(self._meter.device).__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # the optimizer has stepped and the gradients are gone: the whole step lies behind
        self._upcoming = []
        if self._meter is not None:
            self._paused()
            self.peaks.append(self._highest_bytes)
            self._highest_bytes = 0

    def _paused(self) -> None:
        """What follows does not count, until `_counting`."""
        if self._meter is not None:
            meter, self._meter = self._meter, None
            meter.__exit__(None, None, None)
            self._highest_bytes = max(self._highest_bytes, self._base_bytes + meter.rise_bytes)

    def _counting(self, args: Any, optimizer: Any, batches: Any) -> None:
        """Count on, in the middle of a step: with the gradients and the batches that there are now."""
        self._base_bytes = static_bytes(self._wrapped, optimizer, self._beside) + unique_bytes(tensors_in(batches))
        self._meter = PeakMeter(args.device)
        self._meter.__enter__()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            told = self._figures()
            self._logged = len(self.peaks)
            logs.update(told)
            if state.log_history:  # the Trainer appended a copy of `logs` just before
                state.log_history[-1].update(told)

    def _figures(self) -> dict[str, float]:
        return figures(None, None, self.peaks[self._logged :])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the Trainer as it was, ending a count that an exception left open. Twice is once."""
        if self._meter is not None:
            meter, self._meter = self._meter, None
            meter.__exit__(None, None, None)
        self._patches.close()
        self._upcoming, self._beside = [], []
