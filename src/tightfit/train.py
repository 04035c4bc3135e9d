"""What `tightfit train` does: fine-tune inside a byte budget with TRL's `SFTTrainer`, and keep the evidence.

The training is TRL's, the settings are TRL's dataclasses and YAML; `TightfitCallback` plans the step, proves it and
counts its peaks, `Recovery` survives running out of memory. Around them: data that is on every machine, a tokenizer
that needs no files, a short run without a budget from the same start to compare losses bit by bit, and a run folder
with `record.json`, `plan.json`, `losses.jsonl`, `checkpoints/` and `model/`.

Invariant: nothing is written before model, data, options and plan are known to be good (the gradients are proven on
the first batch, when the folder is there); `record.json` is always whole
and says whether the run was completed, interrupted or failed; whatever a run was killed by, `resume` goes on from its
last whole checkpoint with the losses that the uninterrupted run would have had, bit for bit.
Refused: a run folder that is not empty, a run that is to go on with other options, data too short for one batch,
options that no run can have (`InvalidInput`).
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import math
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    DefaultFlowCallback,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
)
from trl import SFTTrainer, get_peft_config, get_quantization_config

from tightfit.core import (
    Check,
    InvalidInput,
    Plan,
    Proof,
    TightfitError,
    Unsupported,
    format_bytes,
    parse_bytes,
    parse_levers,
    reason_of,
    require_part,
    to_json,
    write_text,
)
from tightfit.integrations import conflicts, trl
from tightfit.integrations.bitsandbytes import no_repacking, quantise
from tightfit.integrations.peft import no_input_gradients
from tightfit.integrations.recovery import Recovery, Retry, TornStep, free_memory, lower
from tightfit.integrations.trainer import running_trainer
from tightfit.integrations.transformers import (
    PeakCallback,
    TightfitCallback,
    device_named,
    dtype_named,
    load_model,
    positions_of,
)
from tightfit.recipe import Recipe, load_data, read_config, resolve
from tightfit.report import study
from tightfit.step import environment

__all__ = ["RunResult", "TrainOptions", "byte_tokenizer", "last_checkpoint", "summary", "train"]

DEMO_MODEL = "tightfit-demo"
RECORD_VERSION = 1
_OVER = 1.005  # a measured peak may exceed the budget by this much
_END_STEPS = 10  # the loss at the end is the mean of so many steps

#: Where there is no config file: TRL's keys for a short run on any machine. With one, TRL's own defaults hold.
_DEFAULTS: dict[str, Any] = {
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
_METHODS = {"full": (False, False), "lora": (True, False), "qlora": (True, True)}  # with adapters, in 4 bits
_OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw8bit": "adamw_bnb_8bit", "sgd": "sgd"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """What was asked on the command line. `None`: not asked, so the config file or a default decides."""

    model: str | None = None
    data: str | None = None  # a file or folder, or an embedded text; None: Python's own reference text
    method: str | None = None  # full, lora or qlora
    batch: int | None = None
    seq: int | None = None
    steps: int | None = None
    lr: float | None = None  # None, without a config: 3e-3 for the demo model, 2e-4 with adapters, 2e-5 otherwise
    budget: str | None = None  # of the GPU's memory; on the CPU, of the unplanned step's peak
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
        return statistics.fmean(self.losses[-_END_STEPS:]) if self.losses else None

    @property
    def passed(self) -> bool:
        """Nothing that was checked came out wrong."""
        gradients = self.proof is None or self.proof["gradients"].passed
        under = self.budget_bytes is None or self.peak_bytes is None or self.peak_bytes <= self.budget_bytes * _OVER
        same = self.losses_identical is not False or self.tiled  # whose proof is that of `verify`, not the bits
        return gradients and under and same

    @property
    def tiled(self) -> bool:
        """Does the plan add sums in another order, so that bits may differ?"""
        return self.plan is not None and not self.plan.exact


def train(options: TrainOptions, progress: Console | None = None) -> RunResult:
    """Train, write the run folder, return what happened. Ctrl-C returns a result with `status="interrupted"`.

    Raises `InvalidInput` (nothing written), `BudgetInfeasible` (nothing written), and whatever the training raises
    after a record that says so.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise Unsupported(
            f"tightfit train is one process, and this is one of {os.environ['WORLD_SIZE']}: train with Trainer or "
            "SFTTrainer and TightfitCallback under torchrun (docs/how_to/several_gpus.md)"
        )
    _check(options)
    with _quiet_libraries():
        asked, folder, record = _asked(options)
        run = _Run(asked, folder, progress)
        if record is not None:
            run.take_up(record)
            if run.status == "completed":
                run.say(f"{folder} is completed, there is nothing to resume")
                return run.result()
        elif options.resume:
            run.say(f"there is no run in {folder} yet: it begins")
        with ExitStack() as stack:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="tightfit-"))
            try:
                if asked.recipe().fit.base_config is not None:
                    run.make_base()
                run.prepare()
                run.compare(scratch)
                run.train(scratch)
            except KeyboardInterrupt:
                run.finish("interrupted")
            except TightfitError as error:
                if run.opened:
                    run.error = str(error)
                    run.finish("failed")
                raise
            except BaseException as error:
                run.error = f"{type(error).__name__}: {error}"
                run.finish("failed")
                raise
    return run.result()


# ---------------------------------------------------------------------------------------------- checking


def _check(options: TrainOptions) -> None:
    for name, least in (("batch", 1), ("seq", 2), ("steps", 1), ("compare_steps", 0), ("oom_retries", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise InvalidInput(f"expected --{name.replace('_', '-')} of at least {least}, not {value}")
    if options.lr is not None and not 0 < options.lr < 100:
        raise InvalidInput(f"expected a learning rate above 0, not {options.lr}")
    if options.seed is not None and not 0 <= options.seed < 2**32:
        raise InvalidInput(f"expected a seed from 0 to {2**32 - 1}, not {options.seed}")
    if options.method is not None and options.method not in _METHODS:
        raise InvalidInput(f"unknown method {options.method!r}: train does full, lora or qlora")
    if options.optimizer is not None and options.optimizer not in _OPTIMIZERS:
        raise InvalidInput(f"unknown optimizer {options.optimizer!r}: train does {', '.join(_OPTIMIZERS)}")
    if options.dtype is not None:
        dtype_named(options.dtype)
    if options.device is not None:
        device_named(options.device)
    if options.budget is not None:
        parse_bytes(options.budget, whole_bytes=2**40)  # what it is a percentage of is known later, its form is not
    if options.levers is not None:
        parse_levers(options.levers)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """Everything that was asked for, in a form that can be written down and read again."""

    options: TrainOptions
    config: dict[str, Any] | None  # the content of the config file
    model: str | None = None  # made by the base config

    def recipe(self) -> Recipe:
        """TRL's settings, made anew: a trainer changes the arguments that it is given."""
        options, config = self.options, self.config
        defaults = _DEFAULTS if config is None else None
        pairs: list[tuple[str, Any]] = [
            ("model_name_or_path", self.model or options.model),
            ("data", options.data),
            ("per_device_train_batch_size", options.batch),
            ("max_length", options.seq),
            ("max_steps", options.steps),
            ("learning_rate", options.lr),
            ("budget", options.budget),
            ("seed", options.seed),
            ("compare_steps", options.compare_steps),
            ("oom_retries", options.oom_retries),
            ("levers", options.levers),
        ]
        if options.device is not None:
            pairs.append(("use_cpu", device_named(options.device).type == "cpu"))
        if options.dtype is not None:  # of the weights, without autocast
            dtype = str(dtype_named(options.dtype)).removeprefix("torch.")
            pairs += [("dtype", dtype), ("bf16", False), ("fp16", False)]
        if options.optimizer is not None:
            pairs.append(("optim", _OPTIMIZERS[options.optimizer]))
        if options.method is not None:
            adapters, four_bit = _METHODS[options.method]
            pairs += [("use_peft", adapters), ("load_in_4bit", four_bit), ("use_bnb_nested_quant", four_bit)]
        arguments = [f"--{name}={value}" for name, value in pairs if value is not None]
        if config is not None:
            return resolve(config, [*arguments, *options.arguments])
        first = resolve(None, [*arguments, *options.arguments], defaults)
        depending = {
            "learning_rate": 3e-3
            if first.model.model_name_or_path == DEMO_MODEL
            else 2e-4
            if first.model.use_peft
            else 2e-5,
            "warmup_steps": max(1, first.args.max_steps // 10),
        }
        return resolve(None, [*arguments, *options.arguments], {**_DEFAULTS, **depending})

    def resolved(self) -> TrainOptions:
        """The options with what the config and the defaults decided."""
        recipe = self.recipe()
        args, model = recipe.args, recipe.model
        method = "full" if not model.use_peft else "qlora" if model.load_in_4bit else "lora"
        precision = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(model.dtype, model.dtype)
        return dataclasses.replace(
            self.options,
            model=model.model_name_or_path,
            data=recipe.fit.data or recipe.script.dataset_name,
            method=method,
            batch=args.per_device_train_batch_size,
            seq=args.max_length,
            steps=args.max_steps if args.max_steps > 0 else None,
            lr=args.learning_rate,
            budget=recipe.fit.budget,
            seed=args.seed,
            device="cpu" if args.device.type == "cpu" else "cuda",
            dtype=precision + ("-mixed" if (args.bf16 or args.fp16) and precision == "fp32" else ""),
            optimizer={v: k for k, v in _OPTIMIZERS.items()}.get(str(args.optim.value), str(args.optim.value)),
            compare_steps=recipe.fit.compare_steps,
            oom_retries=recipe.fit.oom_retries,
            levers=recipe.fit.levers,
        )


def _asked(options: TrainOptions) -> tuple[_Asked, Path, dict[str, Any] | None]:
    """What is to be done, where, and the record of the run that is to go on, if there is one."""
    config = None if options.config is None else read_config(options.config)
    asked = _Asked(options=options, config=config)
    recipe = asked.recipe()
    budget, base = recipe.fit.budget, recipe.fit.base_config
    parse_bytes(budget, whole_bytes=2**40)
    parse_levers(recipe.fit.levers)
    if base is not None and recipe.model.model_name_or_path is not None:
        raise InvalidInput("give base_config, which makes the model, or model_name_or_path, not both")
    if base is None and recipe.model.model_name_or_path is None:
        raise InvalidInput("the config names no model: set model_name_or_path, or give --model")
    named = options.out or (recipe.args.output_dir if _sets_output(options, config) else None)
    if named is None:
        if options.resume:
            raise InvalidInput("--resume needs the folder of the run: give it with --out")
        named = f"runs/{datetime.datetime.now(datetime.UTC).strftime('%Y%m%dT%H%M%SZ')}"
    folder = Path(named).expanduser()
    if options.resume and (folder / "record.json").is_file():
        record = _read_record(folder)
        return _same(asked, record, folder), folder, record
    _require_new(folder, resumes=options.resume)
    if options.resume and not _says_what(options):
        raise InvalidInput(
            f"there is no run in {str(folder)!r} to resume: give the folder of one with --out, or say what to train too"
        )
    return asked, folder, None


def _says_what(options: TrainOptions) -> bool:
    """Is anything asked but where, and that it goes on?"""
    plain = TrainOptions(out=options.out, json=options.json, resume=options.resume)
    return options != plain


def _sets_output(options: TrainOptions, config: Mapping[str, Any] | None) -> bool:
    given = any(a.split("=")[0] in ("--output_dir", "--output-dir") for a in options.arguments)
    return given or (config or {}).get("output_dir") is not None


def _require_new(folder: Path, resumes: bool) -> None:
    """Raise `InvalidInput` unless a run can begin in `folder`. It is not made yet."""
    if folder.exists() and not folder.is_dir():
        raise InvalidInput(f"the run folder {str(folder)!r} is a file: choose another --out")
    if folder.is_dir():
        inside = {path.name for path in folder.iterdir()}
        if inside and not resumes:
            raise InvalidInput(f"the run folder {str(folder)!r} is not empty: choose another --out")
        if inside - {"base"}:
            raise InvalidInput(f"{str(folder)!r} has no record.json, so it is no run that could go on")
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InvalidInput(f"cannot make the run folder {str(folder)!r}: {str(above)!r} cannot be written to")


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot read the record in {str(folder)!r}: {error}") from None
    if not isinstance(record, dict) or record.get("type") != "Run" or "given" not in record:
        raise InvalidInput(f"{str(folder / 'record.json')!r} is no record of a run that can go on")
    return record


#: A run may go on with others of these; nothing that it computes depends on them.
_FREE = ("budget", "out", "json", "resume", "oom_retries", "config", "arguments")


def _same(asked: _Asked, record: Mapping[str, Any], folder: Path) -> _Asked:
    """What the run in `folder` was asked for. Raises `InvalidInput` when something else is asked now."""
    given, resolved = record["given"], record["options"]
    for field in dataclasses.fields(TrainOptions):
        now = getattr(asked.options, field.name)
        if field.name in _FREE or now is None:
            continue
        was = resolved.get(field.name)
        if now != was:
            raise InvalidInput(
                f"the run in {str(folder)!r} was made with --{field.name.replace('_', '-')} {was}, not {now}: resume "
                "goes on with what it was made with; leave the option out, or start another run"
            )
    if asked.options.arguments and list(asked.options.arguments) != given["arguments"]:
        raise InvalidInput(
            f"the run in {str(folder)!r} was made with the options {' '.join(given['arguments']) or '(none)'}, not "
            f"{' '.join(asked.options.arguments)}: leave them out, or start another run"
        )
    if asked.config is not None and asked.config != given["config"]:
        before: Mapping[str, Any] = given["config"] or {}
        key = next(k for k in (*asked.config, *before) if asked.config.get(k) != before.get(k))
        raise InvalidInput(
            f"the run in {str(folder)!r} was made with {key}: {before.get(key)}, the config now has "
            f"{asked.config.get(key)}: leave --config out, or start another run"
        )
    options = TrainOptions(
        **{
            **given["options"],
            "arguments": tuple(given["arguments"]),
            "out": asked.options.out,
            "json": asked.options.json,
            "resume": True,
        }
    )
    if asked.options.budget is not None:
        options = dataclasses.replace(options, budget=asked.options.budget)
    if asked.options.oom_retries is not None:
        options = dataclasses.replace(options, oom_retries=asked.options.oom_retries)
    return _Asked(options=options, config=given["config"])


# ---------------------------------------------------------------------------------------------- tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that needs no files: token i is byte i; 256 begins, 257 ends, 258 pads."""
    alphabet = _byte_characters()
    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<bos>", "<eos>", "<pad>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level tokenizers since GPT-2: itself where it can be printed."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = itertools.count(0x100)
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _tokenizer(model: str, trust_remote_code: bool) -> Any:
    """The tokenizer in the model's folder or hub entry; else, for shapes without one, the byte tokenizer."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
            return byte_tokenizer()
    elif "/" not in model:
        return byte_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(
            model, trust_remote_code=trust_remote_code, local_files_only=folder.is_dir()
        )
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot load the tokenizer of {model!r}: {reason_of(error)}") from error


# -------------------------------------------------------------------------------------------- checkpoints

_CHECKPOINT_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def last_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest whole checkpoint below `folder` and its step.

    The Trainer writes `trainer_state.json` last, so a checkpoint that a kill or a full disk cut short has none, or one
    that is no JSON; and it deletes old ones file by file, so one that was being deleted lacks something else.
    """
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            step = int(path.name.removeprefix("checkpoint-"))
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        whole = all((path / name).is_file() for name in _CHECKPOINT_FILES)
        if whole and state.get("global_step") == step and any((path / name).is_file() for name in _WEIGHT_FILES):
            found.append((step, path))
    return max(((path, step) for step, path in found), key=lambda each: each[1], default=None)


# ------------------------------------------------------------------------------------------------ the run


class _Run:
    """One run: what is known so far, and its folder once there is something to write."""

    def __init__(self, asked: _Asked, folder: Path, progress: Console | None) -> None:
        self.asked, self.folder, self.progress = asked, folder, progress
        self.options = asked.resolved()
        self.device = asked.recipe().args.device
        self.started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.data: dict[str, Any] = {}
        self.origin = ""
        self.parameters = self.trainable = 0
        self.total_steps = self.options.steps or 0
        self.callback: TightfitCallback | None = None
        self.plan: Plan | None = None
        self.proof: Proof | None = None
        self.steps: list[dict[str, Any]] = []  # the lines of losses.jsonl
        self.compared: list[float] | None = None  # None: not yet
        self.unplanned_peak_bytes: int | None = None
        self.budget: str | int = self._budget()
        self.budget_bytes: int | None = None
        self.retries: list[Retry] = []
        self.retries_before = 0  # of a process that this one goes on for: not counted against what is allowed
        self.resumed_at: list[int] = []
        self.notes: list[str] = []  # what was switched off, planned, proven, in one line each
        self.status = "running"
        self.error: str | None = None
        self.opened = False
        self.tokenizer: Any = None
        self.datasets: tuple[Any, Any, bool] = (None, None, False)

    def say(self, what: str) -> None:
        if self.progress is not None:
            self.progress.print(f"[dim]{what} ...[/dim]", highlight=False)

    def tell(self, line: str) -> None:
        if self.progress is not None:
            self.progress.print(line, highlight=False, markup=False, soft_wrap=True)

    def take_up(self, record: Mapping[str, Any]) -> None:
        """What the run knew when it wrote `record`."""
        observed = record["observed"]
        self.started, self.data = record["started"], dict(record["data"])
        self.origin = record["model"]["origin"]
        self.parameters, self.trainable = record["model"]["parameters"], record["model"]["trainable_parameters"]
        planned = (self.folder / "plan.json").is_file()  # so the comparison was done, if there was to be one
        self.compared = list(observed["compared_losses"]) if planned else None
        self.unplanned_peak_bytes = observed["unplanned_peak_bytes"]
        self.retries = [Retry(**retry) for retry in observed.get("retries", ())]
        self.retries_before = len(self.retries)
        self.resumed_at = list(observed.get("resumed_at", ()))
        self.notes = list(observed.get("notes", ()))
        if observed["checks"]:
            checks = tuple(Check(**check) for check in observed["checks"])
            self.proof = Proof(checks=checks, environment=record["environment"])
        if planned:
            self.plan = Plan.load(self.folder / "plan.json")
            if self.asked.options.budget == record["given"]["options"].get("budget"):
                self.budget = self.plan.budget_bytes
                self.budget_bytes = record["constraint"]["budget_bytes"]
        self.steps = _read_lines(self.folder / "losses.jsonl")
        self.opened = True
        if record["status"] == "completed":
            self.status = "completed"
        elif record["environment"] != environment():
            self.say(
                "the versions or the machine are not those that the run began with: losses may differ from there on"
            )

    # -- what is trained

    def make_base(self) -> None:
        """Run the config that makes the model, or go on with it, or find that it is done."""
        base = str(self.asked.recipe().fit.base_config)
        config = self.asked.options.config
        path = Path(base).expanduser()
        if not path.is_absolute() and config is not None:
            path = Path(config).expanduser().absolute().parent / path
        folder = self.folder / "base"
        self.say(f"the base model: {base}")
        known = (folder / "record.json").is_file()
        options = TrainOptions(config=None if known else str(path), out=str(folder), resume=True)
        made = train(options, self.progress)
        if made.status == "interrupted":
            raise KeyboardInterrupt
        self.asked = dataclasses.replace(self.asked, model=str(folder / "model"))
        self.options = self.asked.resolved()
        if made.loss_start is not None and made.loss_end is not None:
            self.say(f"the base model is there: loss {made.loss_start:.3f} to {made.loss_end:.3f}")

    def prepare(self) -> None:
        """Load tokenizer and data."""
        self.say("loading the model and the data")
        recipe = self.asked.recipe()
        name = str(recipe.model.model_name_or_path)
        self.tokenizer = _tokenizer(name, recipe.args.trust_remote_code)
        training, held_out, source, running = load_data(recipe)
        if self.data.get("sha256") not in (None, source.get("sha256")):
            raise InvalidInput(
                f"the data {source['path']!r} is not what the run in {str(self.folder)!r} began with (another sha256): "
                "put it back, or start another run"
            )
        self.data = source
        self.datasets = (training, held_out, running)

    def build(self) -> Any:
        """The model at its start; the same every time it is called."""
        recipe = self.asked.recipe()
        args, asked = recipe.args, recipe.model
        name = str(asked.model_name_or_path)
        init: dict[str, Any] = {
            "trust_remote_code": args.trust_remote_code,
            "attn_implementation": asked.attn_implementation,
            **(args.model_init_kwargs or {}),
        }
        if asked.model_revision != "main":
            init["revision"] = asked.model_revision
        dtype: Any = "auto" if asked.dtype == "auto" else dtype_named(asked.dtype or "float32")
        packed = get_quantization_config(asked)
        random_weights = not Path(name).expanduser().is_dir() and "/" not in name
        if packed is not None and not random_weights:
            init |= {"quantization_config": packed, "device_map": {"": self.device}}
        model: Any
        model, self.origin = load_model(
            name, dtype=dtype, device=self.device, seed=args.seed, **{k: v for k, v in init.items() if v is not None}
        )
        if packed is not None and random_weights:
            if not (packed.load_in_4bit and packed.bnb_4bit_quant_type == "nf4" and packed.bnb_4bit_use_double_quant):
                raise InvalidInput("random weights are quantised to nf4 with double quantisation only")
            quantise(model, model.dtype)
        if len(self.tokenizer) > int(model.config.get_text_config().vocab_size):
            raise InvalidInput(
                f"the tokenizer has {len(self.tokenizer)} tokens, but the model {name!r} knows "
                f"{model.config.get_text_config().vocab_size}: use the tokenizer it was made with"
            )
        return model

    def trainer(self, scratch: str, callbacks: list[TrainerCallback]) -> Any:
        """TRL's trainer on a new model, with its own checkpointing off."""
        recipe = self.asked.recipe()
        args = recipe.args
        args.output_dir = scratch
        args.disable_tqdm = True  # the bar here shows the peak too
        args.dataloader_pin_memory = args.dataloader_pin_memory and self.device.type != "cpu"
        self._switch_off_checkpointing(args)
        trl.refuse_offloading(args)  # before TRL's own context is made, which fails without a GPU
        training, held_out, running = self.datasets
        if running:  # not documents of their own: cut into windows of equal length
            args.packing, args.packing_strategy = True, "wrapped"
        with warnings.catch_warnings(), _one_line("TRL refuses this model, these data or these settings"):
            warnings.simplefilter("ignore")
            # with a config, TRL's own loss; its fused output layer computes tiles of 4,096 tokens on the CPU, however
            # few there are: more than the logits of the short runs that need no config
            made = _PlainLoss if self.asked.config is None else SFTTrainer
            trainer = made(
                model=self.build(),
                args=args,
                train_dataset=training,
                eval_dataset=held_out,
                processing_class=self.tokenizer,
                peft_config=get_peft_config(recipe.model),
            )
        if running:
            rows = trainer.train_dataset
            whole = [i for i, ids in enumerate(rows["input_ids"]) if len(ids) == args.max_length]
            trainer.train_dataset = rows.select(whole)
        conflicts.refuse(trainer, trainer.model, False)
        self._look_at(trainer)
        for unwanted in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(unwanted)
        # before the reporters, which read the logs in this order
        others = trainer.callback_handler.callbacks
        flow = [each for each in others if isinstance(each, DefaultFlowCallback)]
        trainer.callback_handler.callbacks = [*flow, *callbacks, *(each for each in others if each not in flow)]
        return trainer

    def _switch_off_checkpointing(self, args: Any) -> None:
        """A YAML serves unchanged: its own checkpointing gives way to the plan, in the steps to compare with too."""
        names = ("activation_checkpointing", "gradient_checkpointing")
        config, given = self.asked.config or {}, [a.lstrip("-").replace("-", "_") for a in self.asked.options.arguments]
        for name in names:
            if config.get(name) or any(a.split("=")[0] == name and not a.lower().endswith("=false") for a in given):
                self.note(f"{name} in these settings is off: the plan decides what is recomputed")
            setattr(args, name, False)

    def note(self, line: str) -> None:
        """Say `line` and write it into the record, once."""
        if line not in self.notes:
            self.notes.append(line)
            self.tell(line)

    def _look_at(self, trainer: Any) -> None:
        """Note what is trained on what. Raises `InvalidInput` where that cannot be."""
        model, args = trainer.model, trainer.args
        self.parameters = sum(p.numel() for p in model.parameters())
        self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows = trainer.train_dataset
        if not hasattr(rows, "data") or "input_ids" not in rows.column_names:
            return
        import pyarrow.compute as pc

        lengths = pc.list_value_length(rows.with_format("arrow")[:]["input_ids"]) if len(rows) else None
        tokens = 0 if lengths is None else int(pc.sum(lengths).as_py())
        self.data |= {"windows": len(rows), "tokens": tokens}
        least = args.per_device_train_batch_size if args.dataloader_drop_last else 1
        if len(rows) < least:
            raise InvalidInput(
                f"the data has {len(rows)} examples of at most {args.max_length} tokens, one batch takes "
                f"{args.per_device_train_batch_size}: give more data, or a smaller --batch or --seq"
            )
        longest = int(pc.max(lengths).as_py())
        positions = positions_of(model.config)
        if positions is not None and longest > positions:
            raise InvalidInput(f"--seq {longest} was asked for, but the model has {positions} positions")

    def _budget(self) -> str | int:
        """A percentage is of the GPU's memory where there is one, else of the unplanned step's peak."""
        budget = str(self.options.budget)
        if self.device.type != "cuda" or "%" not in budget:
            return budget
        require_part(budget, "the GPU's memory")
        return parse_bytes(budget, torch.cuda.get_device_properties(self.device).total_memory)

    # -- the steps

    def compare(self, scratch: str) -> None:
        """The first steps without a budget: their losses and their peak."""
        steps = self.options.compare_steps or 0
        if self.total_steps:
            steps = min(steps, self.total_steps)
        if self.compared is not None or not steps:
            self.compared = self.compared or []
            return
        self.compared = []
        peaks, losses = PeakCallback(), _Losses()
        with ExitStack() as stack:
            stack.callback(peaks.close)
            trainer = self.trainer(scratch, [peaks, losses, _Stop(steps)])
            stack.enter_context(no_repacking(trainer.model))
            self.say(f"{steps} steps without a budget, to compare with")
            try:
                trainer.train()
            except torch.OutOfMemoryError:
                # the usual reason to want a budget: there is nothing to compare with then
                losses.rows.clear()
                peaks.peaks.clear()
                self.say("they do not fit on this device, so there is nothing to compare with")
        self.compared = [row["loss"] for row in losses.rows]
        self.unplanned_peak_bytes = max(peaks.peaks, default=None)
        del trainer
        free_memory()

    def train(self, scratch: str) -> None:
        recipe = self.asked.recipe()
        while True:
            try:
                trainer = self._attempt(scratch, recipe)
                break
            except TornStep as error:
                self._after_torn(error, recipe.fit.oom_retries)
            free_memory()
        self.say("saving")
        self._save(trainer.model)
        if recipe.args.push_to_hub:
            trainer.args.output_dir = str(self.folder / "model")
            trainer.push_to_hub(dataset_name=recipe.script.dataset_name)
        if not _keeps_checkpoints(self.asked):
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        self._study()
        self.finish("completed")

    def _attempt(self, scratch: str, recipe: Recipe) -> Any:
        """From the last whole checkpoint, or from the start, to the end."""
        retries = recipe.fit.oom_retries
        found = last_checkpoint(self.folder / "checkpoints") if self.opened else None
        step = 0 if found is None else found[1]
        if self.opened:
            self._rewind(found)
        self.callback = TightfitCallback(self.budget, levers=parse_levers(recipe.fit.levers))
        recovery = Recovery(self.callback, retries - len(self.retries) + self.retries_before, self.tell)
        with ExitStack() as stack:
            stack.callback(self.callback.close)
            stack.callback(recovery.close)
            watch = stack.enter_context(_Watch(self, recovery))
            trainer = self.trainer(scratch, [self.callback, recovery, watch])
            stack.enter_context(no_repacking(trainer.model))
            stack.enter_context(no_input_gradients(trainer.model))
            if step:
                self.resumed_at.append(step)
                self.say(f"going on after step {step}")
            self.say("tracing and planning the step, proving its gradients on the first batch")
            trainer.train(resume_from_checkpoint=None if found is None else str(found[0]))
        return trainer

    def _rewind(self, checkpoint: tuple[Path, int] | None) -> None:
        """Forget what came after the checkpoint: unfinished checkpoints, losses of steps that are done again."""
        step = 0 if checkpoint is None else checkpoint[1]
        for path in (self.folder / "checkpoints").glob("checkpoint-*"):
            if checkpoint is None or int(path.name.rpartition("-")[2]) > step or path != checkpoint[0]:
                if checkpoint is not None and _is_older(path, step):
                    continue
                shutil.rmtree(path, ignore_errors=True)
        self.steps = [row for row in self.steps if row["step"] <= step]
        write_text(self.folder / "losses.jsonl", "".join(json.dumps(row) + "\n" for row in self.steps))

    def _after_torn(self, error: TornStep, retries: int) -> None:
        """The optimizer changed some parameters and not others: back to the last checkpoint, with a smaller plan."""
        callback = self.callback
        assert callback is not None and callback.plan is not None and callback.trace is not None
        if len(self.retries) - self.retries_before >= retries:
            raise error
        found = last_checkpoint(self.folder / "checkpoints")
        smaller = lower(callback.trace, callback.plan, callback.levers)
        self.retries.append(
            Retry(
                step=error.step,
                phase="optimizer",
                error=error.cause,
                budget_bytes_before=callback.plan.budget_bytes,
                budget_bytes_after=smaller.budget_bytes,
                peak_bytes_after=smaller.peak_bytes,
                went_back_to=0 if found is None else found[1],
            )
        )
        self.budget = smaller.budget_bytes
        self.say(f"out of memory in the optimizer's step {error.step}: back to step {self.retries[-1].went_back_to}")
        self._write_record()

    # -- the folder

    def open(self, args: Any) -> None:
        """Make the folder and say that the run has begun, or goes on."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(f"cannot make the run folder {str(self.folder)!r}: {error.strerror or error}") from None
        self.opened = True
        args.output_dir = str(self.folder / "checkpoints")
        self.note_plan()

    def note_plan(self) -> None:
        """The plan in force is another than before."""
        assert self.callback is not None
        if self.callback.plan is not None and self.callback.plan is not self.plan:
            self.plan = self.callback.plan
            self.plan.save(self.folder / "plan.json")
            if self.budget_bytes is None:
                self.budget_bytes = self.plan.budget_bytes
        self.proof = self.callback.proof or self.proof
        for line in self.callback.said:
            self.note(line)
        self._write_record()

    def finish(self, status: str) -> None:
        self.status = status
        if status == "completed":
            self._write_record()
            return
        # what ended the run may be a full disk: it must not hide behind an error of its own record
        with suppress(OSError, InvalidInput):
            if not self.opened:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.opened = True
            for path in (self.folder / "checkpoints").glob("checkpoint-*"):
                if not (path / "trainer_state.json").is_file():
                    shutil.rmtree(path, ignore_errors=True)
            self._write_record()

    def _study(self) -> None:
        assert self.callback is not None
        if self.callback.trace is not None and self.callback.plan is not None:
            self.say("planning for other budgets too, for the report")
            found = study(self.callback.trace, self.callback.plan)
            write_text(self.folder / "study.json", json.dumps(to_json(found), separators=(",", ":")) + "\n")

    def _save(self, model: Any) -> None:
        half = self.folder / ".model"
        try:
            shutil.rmtree(half, ignore_errors=True)  # of a run that was killed here
            model.save_pretrained(half, safe_serialization=True)
            self.tokenizer.save_pretrained(half)
            shutil.rmtree(self.folder / "model", ignore_errors=True)
            os.replace(half, self.folder / "model")
        except BaseException:
            shutil.rmtree(half, ignore_errors=True)
            raise

    def result(self) -> RunResult:
        seconds = math.fsum(row["seconds"] for row in self.steps)
        tokens = sum(row["tokens"] for row in self.steps)
        return RunResult(
            folder=self.folder,
            status=self.status,
            options=self.options,
            plan=self.plan,
            proof=self.proof,
            losses=tuple(row["loss"] for row in self.steps),
            budget_bytes=self.budget_bytes,
            peak_bytes=max((row["peak_bytes"] for row in self.steps), default=None),
            unplanned_peak_bytes=self.unplanned_peak_bytes,
            compared_losses=tuple(self.compared or ()),
            retries=tuple(self.retries),
            seconds=seconds,
            tokens_per_second=tokens / seconds if seconds else 0.0,
        )

    def _write_record(self) -> None:
        write_text(self.folder / "record.json", json.dumps(self._record(), indent=2) + "\n")

    def _record(self) -> dict[str, Any]:
        result, options, asked = self.result(), self.options, self.asked.options
        plan = result.plan
        given = {k: v for k, v in to_json(asked).items() if k not in ("arguments", "out", "json", "resume")}
        return {
            "type": "Run",
            "schema_version": RECORD_VERSION,
            "status": self.status,
            "error": self.error,
            "started": self.started,
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "given": {"options": given, "arguments": list(asked.arguments), "config": self.asked.config},
            "options": {**to_json(options), "steps": options.steps or self.total_steps},
            "model": {
                "name": options.model,
                "origin": self.origin,
                "parameters": self.parameters,
                "trainable_parameters": self.trainable,
            },
            "data": self.data,
            "seed": options.seed,
            "device": str(self.device)
            if self.device.type == "cpu"
            else f"{self.device}: {torch.cuda.get_device_name(self.device)}",
            "environment": environment(),
            "constraint": {
                "budget": options.budget,
                "budget_bytes": result.budget_bytes,
                "batch": options.batch,
                "seq": options.seq,
                "depends_on": "peaks hold for batches of this size on this device with these versions; losses are "
                "equal bit for bit only with the same versions, device and number of threads",
            },
            "observed": {
                "steps": len(self.steps),
                "seconds": result.seconds,
                "tokens_per_second": result.tokens_per_second,
                "loss_start": result.loss_start,
                "loss_end": result.loss_end,
                "loss_end_steps": min(_END_STEPS, len(self.steps)),
                "peak_bytes": result.peak_bytes,
                "predicted_peak_bytes": plan.peak_bytes if plan else None,
                "unplanned_peak_bytes": result.unplanned_peak_bytes,
                "predicted_unplanned_peak_bytes": plan.unplanned_peak_bytes if plan else None,
                "recompute_flops": plan.recompute_flops if plan else None,
                "forward_flops": plan.forward_flops if plan else None,
                "recompute_seconds": plan.recompute_seconds if plan else None,
                "replays": plan.replays if plan else None,
                "compared_steps": len(self.compared or ()),
                "compared_losses": list(self.compared or ()),
                "losses_identical": result.losses_identical,
                "checks": to_json(result.proof.checks) if result.proof else [],
                "retries": to_json(self.retries),
                "resumed_at": self.resumed_at,
                "notes": self.notes,
            },
            "files": sorted(path.name for path in self.folder.iterdir() if not path.name.startswith(".")),
        }


def _keeps_checkpoints(asked: _Asked) -> bool:
    """Did the user ask for checkpoints, or are they ours, for the case that the run is cut short?"""
    saving = [name for name in (asked.config or {}) if name.startswith(("save_", "load_best"))]
    return bool(saving) or any(a.lstrip("-").startswith(("save_", "save-")) for a in asked.options.arguments)


def _is_older(path: Path, step: int) -> bool:
    try:
        return int(path.name.rpartition("-")[2]) < step
    except ValueError:
        return False


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of `losses.jsonl`; a kill may have cut the last one."""
    rows: list[dict[str, Any]] = []
    with suppress(OSError, ValueError):
        for line in path.read_text(encoding="utf-8").splitlines():
            rows.append(json.loads(line))
    return rows


class _PlainLoss(SFTTrainer):  # type: ignore[misc]  # TRL is untyped
    """TRL's trainer with the loss that the model itself computes."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


class _Stop(TrainerCallback):
    """Ends the training after `steps` steps, without a checkpoint."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_evaluate = False
        if state.global_step >= self.steps:
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_evaluate = False


class _Losses(TrainerCallback):
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


def _progress_bar(console: Console) -> Progress:
    """One line of which nothing is cut at 80 columns: a bar is drawn where there is room for one besides."""
    columns: list[ProgressColumn] = [TextColumn("step"), MofNCompleteColumn()]
    if console.width >= 100:
        columns.append(BarColumn(bar_width=None))
    columns += [TextColumn("{task.fields[figures]}"), TimeRemainingColumn()]
    return Progress(*columns, console=console)


def _figures(loss: float, tokens_per_second: float, peak_bytes: int, budget_bytes: int) -> str:
    peak, budget = format_bytes(peak_bytes), format_bytes(budget_bytes)
    if peak.split()[1:] == budget.split()[1:]:
        peak = peak.split()[0]
    return f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  {peak} of {budget}"


class _Watch(_Losses):
    """Opens the run folder, writes each step's line to `losses.jsonl` and moves the progress bar."""

    def __init__(self, run: _Run, recovery: Recovery) -> None:
        super().__init__()
        self.run, self.recovery = run, recovery
        self.before = list(run.retries)
        self.file: IO[str] | None = None
        self.bar: Progress | None = None
        self.task = TaskID(0)

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.run.retries = [*self.before, *self.recovery.survived]
        if self.bar is not None:
            self.bar.stop()
        if self.file is not None:
            self.file.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        run = self.run
        run.total_steps = state.max_steps
        run.open(args)
        if state.global_step >= state.max_steps:  # cut short after the last step; the Trainer would train one more
            running_trainer()._run_epoch = lambda **kwargs: None
        self.file = open(run.folder / "losses.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        if run.progress is not None:
            self.bar = _progress_bar(run.progress)
            self.task = self.bar.add_task("train", total=state.max_steps, completed=state.global_step, figures="")
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        run, callback = self.run, self.run.callback
        assert self.file is not None and callback is not None and callback.plan is not None
        row = {**self.rows[-1], "peak_bytes": callback.peaks[-1]}
        run.steps.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if len(run.retries) < len(self.before) + len(self.recovery.survived):
            run.retries = [*self.before, *self.recovery.survived]
            run.note_plan()
        elif (
            callback.plan is not run.plan
            or callback.proof not in (None, run.proof)
            or set(callback.said) - set(run.notes)
        ):
            run.note_plan()
        if self.bar is not None:
            self.bar.update(
                self.task,
                completed=state.global_step,
                figures=_figures(row["loss"], row["tokens_per_second"], row["peak_bytes"], callback.plan.budget_bytes),
            )


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn what TRL raises for input that it cannot take into one line."""
    try:
        yield
    except (ValueError, TypeError, KeyError, ImportError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InvalidInput(f"{what}: {lines[0] if lines else type(error).__name__}") from error


@contextmanager
def _quiet_libraries() -> Iterator[None]:
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


# ------------------------------------------------------------------------------------------------ summary


def summary(result: RunResult) -> Table:
    """The run's evidence as a table: what was asked, what was predicted, what was measured."""
    table = Table(title=f"tightfit train: {result.status}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    plan, proof = result.plan, result.proof
    if plan is not None:
        whole = result.unplanned_peak_bytes or plan.unplanned_peak_bytes

        def of_whole(size_bytes: int) -> str:
            return f"{format_bytes(size_bytes)}  ({size_bytes / whole:.1%})"

        if result.unplanned_peak_bytes is not None:
            table.add_row("peak without a plan, measured", of_whole(result.unplanned_peak_bytes))
        else:
            table.add_row("peak without a plan, predicted", of_whole(plan.unplanned_peak_bytes))
        asked_bytes = plan.budget_bytes if result.budget_bytes is None else result.budget_bytes
        table.add_row("budget", of_whole(asked_bytes))
        table.add_row("peak predicted", of_whole(plan.peak_bytes))
        if result.peak_bytes is not None:
            over = result.peak_bytes > asked_bytes * _OVER
            measured = of_whole(result.peak_bytes)
            table.add_row("peak measured, all steps", f"[red]{measured} over budget[/red]" if over else measured)
        share = f" ({plan.recompute_flops / plan.forward_flops:.1%} of the forward)" if plan.forward_flops else ""
        table.add_row("recompute, FLOPs a step", f"{plan.recompute_flops / 1e9:,.2f} GFLOP{share}", end_section=False)
        seconds = f" ({plan.recompute_seconds / plan.step_seconds:.1%} of the step)" if plan.step_seconds else ""
        table.add_row("recompute, seconds a step", f"{plan.recompute_seconds:.4f} s{seconds}")
    if proof is not None:
        gradients = proof["gradients"]
        held = "within the tolerance of tiles" if result.tiled else "identical"
        table.add_row(
            "gradients on a real batch", held if gradients.passed else f"[red]differ: {gradients.measured}[/red]"
        )
    same = result.losses_identical
    if same is None:
        table.add_row("first losses against no budget", "not compared")
    else:
        steps = min(len(result.losses), len(result.compared_losses))
        table.add_row(
            f"first {steps} losses against no budget, same seed",
            "the same bit for bit"
            if same
            else f"differ by up to {result.losses_apart:.3g}, as tiles may"
            if result.tiled
            else "[red]differ[/red]",
        )
    if result.loss_start is not None and result.loss_end is not None:
        table.add_row("loss at the start", f"{result.loss_start:.3f}")
        table.add_row(f"loss at the end (mean of {min(_END_STEPS, len(result.losses))})", f"{result.loss_end:.3f}")
        table.add_row(
            "steps", f"{len(result.losses)} in {result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s"
        )
    if result.retries:
        last = result.retries[-1]
        table.add_row(
            f"out of memory, survived {len(result.retries)} times",
            f"last at step {last.step}, then a plan for {format_bytes(last.budget_bytes_after)}",
        )
    table.add_row("run folder", str(result.folder))
    return table


def to_report(result: RunResult) -> dict[str, Any]:
    """The result as JSON-ready data, without the plan's programs (they are in `plan.json`)."""
    data = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    plan = result.plan
    data["plan"] = (
        None if plan is None else {k: v for k, v in to_json(plan).items() if k not in ("choices", "programs")}
    )
    data["folder"] = str(result.folder)
    data["losses_identical"] = result.losses_identical
    data["loss_start"], data["loss_end"] = result.loss_start, result.loss_end
    data["passed"] = result.passed
    report: dict[str, Any] = to_json(data)
    return report
