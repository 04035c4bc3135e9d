"""What a run is asked to do, and what came of it.

Refused: options that no run can have (`InvalidInput`).
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightfit.accelerator import device_named
from tightfit.core import (
    AUTO,
    InvalidInput,
    MicroBatches,
    Plan,
    Proof,
    parse_bytes,
    parse_host_budget,
    parse_levers,
)
from tightfit.core.errors import unknown
from tightfit.integrations.recovery import Retry
from tightfit.integrations.transformers import (
    dtype_named,
)

DEMO_MODEL = "tightfit-demo"


BUDGET = "60%"  # where nothing else is asked
OVER = 1.005  # a measured peak may exceed the budget by this much


END_STEPS = 10  # the loss at the end is the mean of so many steps


#: Where there is no config file: TRL's keys for a short run on any machine. With one, TRL's own defaults hold.
DEFAULTS: dict[str, Any] = {
    "model_name_or_path": DEMO_MODEL,
    "per_device_train_batch_size": 8,
    "max_length": 256,
    "max_steps": 130,
    "lr_scheduler_type": "cosine",
    "optim": "adamw_torch_fused",
    "seed": 0,
    "bf16": False,
    "use_cpu": True,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "save_steps": 50,
    "save_total_limit": 2,
    "report_to": "none",
    "dataloader_drop_last": True,
    "lora_dropout": 0.0,
    "lora_target_modules": ["all-linear"],
    "compare_steps": 5,
}


METHODS = {"full": (False, False), "lora": (True, False), "qlora": (True, True)}  # with adapters, in 4 bits


OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw8bit": "adamw_bnb_8bit", "sgd": "sgd"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """What was asked on the command line. `None`: not asked, so the config file or a default decides."""

    model: str | None = None
    data: str | None = None  # a file or folder, or an embedded text; None: Python's own reference text
    method: str | None = None  # full, lora or qlora
    batch: int | str | None = None  # sequences, or "auto": micro-batches of the global batch
    global_batch: int | None = None  # sequences between two steps of the optimizer; goes with batch="auto"
    seq: int | None = None
    steps: int | None = None
    lr: float | None = None  # None, without a config: 3e-3 for the demo model, 2e-4 with adapters, 2e-5 otherwise
    budget: str | None = None  # of the GPU's memory; on the CPU, of the unplanned step's peak
    plan: str | None = None  # the file of a plan of this step, which has a budget of its own
    seed: int | None = None
    device: str | None = None
    dtype: str | None = None
    optimizer: str | None = None  # adamw, adamw8bit or sgd
    out: str | None = None  # None: the config's output_dir, else runs/<utc time>
    compare_steps: int | None = None  # steps also run without a budget; 0: none
    json: bool = False
    config: str | None = None  # a YAML file of TRL's keys
    arguments: tuple[str, ...] = ()  # TRL's options, as on the command line
    resume: bool = False
    oom_retries: int | None = None
    levers: str | None = None  # what the plan may use, as `tightfit.core.parse_levers` reads it
    host_budget: str | None = None  # the most that plans may have wait in host memory
    spill: str | None = None  # the folder where what waits does so in a file; None: it waits in host memory


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run did. Bytes are peaks of whole steps; losses are those of single steps, in order."""

    folder: Path
    status: str  # completed or interrupted
    options: TrainOptions
    plan: Plan | None  # the last one in force
    proof: Proof | None
    losses: tuple[float, ...]
    budget_bytes: int | None  # that was asked; a plan after running out of memory is for less
    peak_bytes: int | None  # highest of all steps inside the budget
    unplanned_peak_bytes: int | None  # highest of the compared steps without one
    compared_losses: tuple[float, ...]  # of the run without a budget
    retries: tuple[Retry, ...]  # out-of-memory errors survived
    seconds: float
    tokens_per_second: float
    micro_batches: MicroBatches | None = None  # None: the batch was not to be cut

    @property
    def losses_identical(self) -> bool | None:
        """Are the first losses bit for bit those of the run without a budget? None: not compared."""
        both = tuple(zip(self.losses, self.compared_losses, strict=False))
        return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in both) if both else None

    @property
    def losses_apart(self) -> float:
        """The largest difference between a first loss and that of the run without a budget."""
        return max((abs(a - b) for a, b in zip(self.losses, self.compared_losses, strict=False)), default=0.0)

    @property
    def loss_start(self) -> float | None:
        return self.losses[0] if self.losses else None

    @property
    def loss_end(self) -> float | None:
        """Mean of the last steps."""
        return statistics.fmean(self.losses[-END_STEPS:]) if self.losses else None

    @property
    def passed(self) -> bool:
        """Nothing that was checked came out wrong."""
        gradients = self.proof is None or self.proof["gradients"].passed
        under = self.budget_bytes is None or self.peak_bytes is None or self.peak_bytes <= self.budget_bytes * OVER
        same = self.losses_identical is not False or self.tiled or self.cut  # proven otherwise than by bits
        return gradients and under and same

    @property
    def tiled(self) -> bool:
        """Does the plan add sums in another order, so that bits may differ?"""
        return self.plan is not None and not self.plan.exact

    @property
    def cut(self) -> bool:
        """Do batches run in micro-batches, which add up in another order?"""
        return self.micro_batches is not None and self.micro_batches.accumulation > 1


def check_options(options: TrainOptions) -> None:
    is_file_read = options.config is not None and options.batch is None  # its batch may be auto
    if options.global_batch is not None and options.batch != AUTO and not is_file_read:
        raise InvalidInput("--global-batch is what --batch auto cuts into micro-batches: give both, or --batch alone")
    numbers = (("batch", 1), ("global_batch", 1), ("seq", 2), ("steps", 1), ("compare_steps", 0), ("oom_retries", 0))
    for name, least in numbers:
        value = None if getattr(options, name) == AUTO else getattr(options, name)
        if value is not None and value < least:
            raise InvalidInput(f"expected --{name.replace('_', '-')} of at least {least}, not {value}")
    if options.lr is not None and not 0 < options.lr < 100:
        raise InvalidInput(f"expected a learning rate above 0, not {options.lr}")
    if options.seed is not None and not 0 <= options.seed < 2**32:
        raise InvalidInput(f"expected a seed from 0 to {2**32 - 1}, not {options.seed}")
    if options.method is not None and options.method not in METHODS:
        raise unknown("method", options.method, METHODS)
    if options.optimizer is not None and options.optimizer not in OPTIMIZERS:
        raise unknown("optimizer", options.optimizer, OPTIMIZERS)
    if options.dtype is not None:
        dtype_named(options.dtype)
    if options.device is not None:
        device_named(options.device)
    if options.plan is not None and options.batch == AUTO:
        raise InvalidInput("--plan is for one size of batch, and --batch auto looks for another: leave one of them out")
    if options.budget is not None:
        parse_bytes(options.budget, whole_bytes=2**40)  # what it is a percentage of is known later, its form is not
    parse_host_budget(options.host_budget)
    if options.levers is not None:
        parse_levers(options.levers)
