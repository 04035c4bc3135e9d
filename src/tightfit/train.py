"""What `tightfit train` does: fine-tune inside a byte budget with transformers' `Trainer`, and keep the evidence.

The training itself is the Trainer's; `TightfitCallback` plans the step, proves it and counts its peaks. Around it: data
that is on every machine, a tokenizer that needs no files, a short run without a budget from the same start to compare
losses bit by bit, and a run folder with `record.json`, `plan.json`, `losses.jsonl` and `model/`.

Invariant: nothing is written before model, data, options and plan are known to be good; `record.json` is always whole
and says whether the run was completed, interrupted or failed; an interrupted run keeps the losses it reached.
Refused: a run folder that is not empty, data too short for one batch, options that no run can have (`InvalidInput`).
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib
import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import Dataset
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from tightfit.core import (
    InvalidInput,
    Plan,
    Proof,
    TightfitError,
    format_bytes,
    parse_bytes,
    to_json,
    write_text,
)
from tightfit.integrations.peft import add_lora
from tightfit.integrations.transformers import PeakCallback, TightfitCallback, device_named, dtype_named, load_model
from tightfit.report import study
from tightfit.step import environment

__all__ = ["RunResult", "TrainOptions", "byte_tokenizer", "summary", "train"]

DEMO_MODEL = "tightfit-demo"
RECORD_VERSION = 1
_OVER = 1.005  # a measured peak may exceed the budget by this much
_END_STEPS = 10  # the loss at the end is the mean of so many steps


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """What to train, on what, inside which budget. `None` stands for a default that depends on the rest."""

    model: str = DEMO_MODEL
    data: str | None = None  # a text file, or .jsonl with "text"; None: Python's own reference text
    method: str = "full"  # full or lora
    batch: int = 8
    seq: int = 256
    steps: int = 130
    lr: float | None = None  # None: 3e-3 for the demo model, 2e-4 for LoRA, 2e-5 otherwise
    budget: str = "60%"  # of the GPU's memory; on the CPU, of the unplanned step's peak
    seed: int = 0
    device: str = "cpu"
    dtype: str = "fp32"
    optimizer: str = "adamw"  # adamw or sgd
    out: str | None = None  # None: runs/<utc time>
    compare_steps: int = 5  # steps also run without a budget; 0: none
    json: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run did. Bytes are peaks of whole steps; losses are those of single steps, in order."""

    folder: Path
    status: str  # completed or interrupted
    options: TrainOptions
    plan: Plan | None
    proof: Proof | None
    losses: tuple[float, ...]
    peak_bytes: int | None  # highest of all steps inside the budget
    unplanned_peak_bytes: int | None  # highest of the compared steps without one
    compared_losses: tuple[float, ...]  # of the run without a budget
    seconds: float
    tokens_per_second: float

    @property
    def losses_identical(self) -> bool | None:
        """Are the first losses bit for bit those of the run without a budget? None: not compared."""
        both = tuple(zip(self.losses, self.compared_losses, strict=False))
        return all(a == b for a, b in both) if both else None

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
        under = self.plan is None or self.peak_bytes is None or self.peak_bytes <= self.plan.budget_bytes * _OVER
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
    device, dtype = _check(options)
    folder = _new_folder(options)
    text, source = _read_data(options.data)
    run = _Run(options, folder, device, progress)
    with _quiet_transformers(), ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="tightfit-"))
        try:
            run.say("loading the model and the data")
            tokenizer = _tokenizer(options.model)
            dataset = _Windows(text, tokenizer, options)
            run.data = {**source, "windows": len(dataset), "tokens": int(dataset.tokens.numel())}
            model = run.build(dtype)
            if len(tokenizer) > int(model.config.get_text_config().vocab_size):
                raise InvalidInput(
                    f"the tokenizer has {len(tokenizer)} tokens, but the model {options.model!r} knows "
                    f"{model.config.get_text_config().vocab_size}: use the tokenizer it was made with"
                )
            compare = min(options.compare_steps, options.steps)
            if compare:
                run.compare(model, dataset, scratch, compare)
                del model  # so that the second copy below is the only one
                model = run.build(dtype)
            run.train(model, dataset, tokenizer, scratch)
        except KeyboardInterrupt:
            run.finish("interrupted")
        except TightfitError:
            if run.opened:
                run.finish("failed")
            raise
        except BaseException as error:
            run.error = f"{type(error).__name__}: {error}"
            run.finish("failed")
            raise
    return run.result()


# ---------------------------------------------------------------------------------------------- checking


def _check(options: TrainOptions) -> tuple[torch.device, torch.dtype]:
    for name, least in (("batch", 1), ("seq", 2), ("steps", 1), ("compare_steps", 0)):
        if getattr(options, name) < least:
            raise InvalidInput(f"expected --{name.replace('_', '-')} of at least {least}, not {getattr(options, name)}")
    if options.lr is not None and not 0 < options.lr < 100:
        raise InvalidInput(f"expected a learning rate above 0, not {options.lr}")
    if not 0 <= options.seed < 2**32:
        raise InvalidInput(f"expected a seed from 0 to {2**32 - 1}, not {options.seed}")
    if options.method not in ("full", "lora"):
        raise InvalidInput(f"unknown method {options.method!r}: train does full or lora")
    if options.optimizer not in ("adamw", "sgd"):
        raise InvalidInput(f"unknown optimizer {options.optimizer!r}: train does adamw or sgd")
    dtype = dtype_named(options.dtype)
    parse_bytes(options.budget, whole_bytes=2**40)  # what it is a percentage of is known later, its form is not
    return device_named(options.device), dtype


def _new_folder(options: TrainOptions) -> Path:
    """The folder that the run may write to. It is not made yet."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    folder = Path(options.out if options.out is not None else f"runs/{stamp}").expanduser()
    if folder.exists() and not folder.is_dir():
        raise InvalidInput(f"the run folder {str(folder)!r} is a file: choose another --out")
    if folder.is_dir() and any(folder.iterdir()):
        raise InvalidInput(f"the run folder {str(folder)!r} is not empty: choose another --out")
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InvalidInput(f"cannot make the run folder {str(folder)!r}: {str(above)!r} cannot be written to")
    return folder


def learning_rate(options: TrainOptions) -> float:
    """`options.lr`, or the usual value for the kind of training."""
    if options.lr is not None:
        return options.lr
    if options.model == DEMO_MODEL:
        return 3e-3
    return 2e-4 if options.method == "lora" else 2e-5


# -------------------------------------------------------------------------------------------------- data


def _read_data(path: str | None) -> tuple[str, dict[str, Any]]:
    """The training text, and where it is from: path, size in bytes, sha256 of what was read."""
    if path is None:
        topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
        text = "\n\n".join(topics[name] for name in sorted(topics))
        raw, where = text.encode("utf-8"), "python:pydoc_data.topics"
    else:
        file = Path(path).expanduser()
        try:
            raw = file.read_bytes()
        except OSError as error:
            raise InvalidInput(f"cannot read the data {path!r}: {error.strerror or error}") from None
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidInput(f"the data {path!r} is not UTF-8 text (byte {error.start})") from None
        if file.suffix == ".jsonl":
            text = "\n\n".join(_texts(text, path))
        where = str(file.absolute())
    return text, {"path": where, "size_bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def _texts(lines: str, path: str) -> Iterator[str]:
    for number, line in enumerate(lines.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            raise InvalidInput(f"line {number} of {path!r} is not JSON") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise InvalidInput(f'line {number} of {path!r} has no "text"')
        yield entry["text"]


class _Windows(Dataset[dict[str, torch.Tensor]]):
    """The text as windows of `seq` tokens, one after the other."""

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerFast, options: TrainOptions) -> None:
        self.seq = options.seq
        self.tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if len(self) < options.batch:
            raise InvalidInput(
                f"the data has {self.tokens.numel()} tokens, one batch of {options.batch} x {options.seq} takes "
                f"{options.batch * options.seq}: give more data, or a smaller --batch or --seq"
            )

    def __len__(self) -> int:
        return int(self.tokens.numel()) // self.seq

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.tokens[index * self.seq : (index + 1) * self.seq]
        return {"input_ids": window, "labels": window}


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


def _tokenizer(model: str) -> Any:
    """The tokenizer in the model's folder or hub entry; else, for shapes without one, the byte tokenizer."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "tokenizer.json").is_file():
            return byte_tokenizer()
    elif "/" not in model:
        return byte_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False, local_files_only=folder.is_dir())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot load the tokenizer of {model!r}: {(str(error).splitlines() or [''])[0]}") from error


# ------------------------------------------------------------------------------------------------ the run


class _Run:
    """One run: what is known so far, and its folder once there is something to write."""

    def __init__(self, options: TrainOptions, folder: Path, device: torch.device, progress: Console | None) -> None:
        self.options, self.folder, self.device, self.progress = options, folder, device, progress
        self.started = datetime.datetime.now(datetime.UTC)
        self.data: dict[str, Any] = {}
        self.origin = ""
        self.parameters = self.trainable = 0
        self.callback: TightfitCallback | None = None
        self.losses: list[float] = []
        self.compared: list[float] = []
        self.unplanned_peak_bytes: int | None = None
        self.seconds = 0.0
        self.status = "running"
        self.error: str | None = None
        self.opened = False

    def say(self, what: str) -> None:
        if self.progress is not None:
            self.progress.print(f"[dim]{what} ...[/dim]", highlight=False)

    def build(self, dtype: torch.dtype) -> Any:
        """The model at its start; the same every time it is called."""
        options = self.options
        model: Any
        model, self.origin = load_model(options.model, dtype=dtype, device=self.device, seed=options.seed)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and options.seq > positions:
            raise InvalidInput(f"--seq {options.seq} was asked for, but the model has {positions} positions")
        torch.manual_seed(options.seed)
        if options.method == "lora":
            model = add_lora(model)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return model

    def trainer(self, model: Any, dataset: _Windows, scratch: str, callbacks: list[TrainerCallback]) -> Trainer:
        options = self.options
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=learning_rate(options),
            lr_scheduler_type="cosine",
            warmup_steps=max(1, options.steps // 10),
            optim="adamw_torch_fused" if options.optimizer == "adamw" else "sgd",
            seed=options.seed,
            use_cpu=self.device.type == "cpu",
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_drop_last=True,
            dataloader_pin_memory=self.device.type != "cpu",
            remove_unused_columns=False,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=default_data_collator,
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def compare(self, model: Any, dataset: _Windows, scratch: str, steps: int) -> None:
        """The first `steps` steps without a budget: their losses and their peak."""
        self.say(f"{steps} steps without a budget, to compare with")
        peaks = PeakCallback()
        try:
            self.trainer(model, dataset, scratch, [peaks, _Stop(steps, self.compared)]).train()
        except torch.OutOfMemoryError:
            # the usual reason to want a budget: there is nothing to compare with then
            self.compared.clear()
            self.say("they do not fit on this device, so there is nothing to compare with")
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        finally:
            peaks.close()
        self.unplanned_peak_bytes = max(peaks.peaks, default=None)

    def train(self, model: Any, dataset: _Windows, tokenizer: Any, scratch: str) -> None:
        self.say("tracing and planning the step, proving its gradients")
        self.callback = TightfitCallback(self._budget())
        with ExitStack() as stack:
            stack.callback(self.callback.close)
            watch = stack.enter_context(_Watch(self))
            self.trainer(model, dataset, scratch, [self.callback, watch]).train()
        self.say("saving")
        self._save(model, tokenizer)
        self.finish("completed")

    def _budget(self) -> str | int:
        """A percentage is of the GPU's memory where there is one, else of the unplanned step's peak."""
        if self.device.type != "cuda" or "%" not in self.options.budget:
            return self.options.budget
        return parse_bytes(self.options.budget, torch.cuda.get_device_properties(self.device).total_memory)

    def open(self) -> None:
        """Make the folder and say that the run has begun."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(f"cannot make the run folder {str(self.folder)!r}: {error.strerror or error}") from None
        self.opened = True
        if self.callback is not None and self.callback.plan is not None:
            self.callback.plan.save(self.folder / "plan.json")
            assert self.callback.trace is not None
            self.say("planning for other budgets too, for the report")
            found = study(self.callback.trace, self.callback.plan)
            write_text(self.folder / "study.json", json.dumps(to_json(found), separators=(",", ":")) + "\n")
        self._write_record()

    def finish(self, status: str) -> None:
        self.status = status
        if not self.opened:
            self.open()
        self._write_record()

    def _save(self, model: Any, tokenizer: Any) -> None:
        half = self.folder / ".model"
        try:
            model.save_pretrained(half, safe_serialization=True)
            tokenizer.save_pretrained(half)
            os.replace(half, self.folder / "model")
        except BaseException:
            shutil.rmtree(half, ignore_errors=True)
            raise

    def result(self) -> RunResult:
        plan = self.callback.plan if self.callback else None
        peaks = self.callback.peaks if self.callback else []
        tokens = len(self.losses) * self.options.batch * self.options.seq
        return RunResult(
            folder=self.folder,
            status=self.status,
            options=self.options,
            plan=plan,
            proof=self.callback.proof if self.callback else None,
            losses=tuple(self.losses),
            peak_bytes=max(peaks, default=None),
            unplanned_peak_bytes=self.unplanned_peak_bytes,
            compared_losses=tuple(self.compared),
            seconds=self.seconds,
            tokens_per_second=tokens / self.seconds if self.seconds else 0.0,
        )

    def _write_record(self) -> None:
        write_text(self.folder / "record.json", json.dumps(self._record(), indent=2) + "\n")

    def _record(self) -> dict[str, Any]:
        result, options = self.result(), self.options
        plan = result.plan
        return {
            "type": "Run",
            "schema_version": RECORD_VERSION,
            "status": self.status,
            "error": self.error,
            "started": self.started.isoformat(timespec="seconds"),
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "options": {**to_json(options), "lr": learning_rate(options)},
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
                "budget_bytes": plan.budget_bytes if plan else None,
                "batch": options.batch,
                "seq": options.seq,
                "depends_on": "peaks hold for batches of this size on this device with these versions; losses are "
                "equal bit for bit only with the same versions, device and number of threads",
            },
            "observed": {
                "steps": len(self.losses),
                "seconds": self.seconds,
                "tokens_per_second": result.tokens_per_second,
                "loss_start": result.loss_start,
                "loss_end": result.loss_end,
                "loss_end_steps": min(_END_STEPS, len(self.losses)),
                "peak_bytes": result.peak_bytes,
                "predicted_peak_bytes": plan.peak_bytes if plan else None,
                "unplanned_peak_bytes": result.unplanned_peak_bytes,
                "predicted_unplanned_peak_bytes": plan.unplanned_peak_bytes if plan else None,
                "recompute_flops": plan.recompute_flops if plan else None,
                "forward_flops": plan.forward_flops if plan else None,
                "recompute_seconds": plan.recompute_seconds if plan else None,
                "replays": plan.replays if plan else None,
                "compared_steps": len(self.compared),
                "compared_losses": list(self.compared),
                "losses_identical": result.losses_identical,
                "checks": to_json(result.proof.checks) if result.proof else [],
            },
            "files": sorted(path.name for path in self.folder.iterdir() if not path.name.startswith(".")),
        }


class _Stop(TrainerCallback):
    """Ends the training after `steps` steps and keeps their losses."""

    def __init__(self, steps: int, losses: list[float]) -> None:
        self.steps, self.losses = steps, losses

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.steps:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            self.losses.append(logs["loss"])


class _Watch(TrainerCallback):
    """Writes each step's line to `losses.jsonl` and moves the progress bar."""

    def __init__(self, run: _Run) -> None:
        self.run = run
        self.file: IO[str] | None = None
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.began = self.step_began = 0.0
        self.step_seconds = 0.0

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.file is not None:
            self.file.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.open()
        self.file = open(self.run.folder / "losses.jsonl", "w", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        if self.run.progress is not None:
            self.bar = Progress(
                SpinnerColumn(),
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=self.run.progress,
            )
            self.task = self.bar.add_task("train", total=self.run.options.steps, figures="")
            self.bar.start()
        self.began = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_seconds = time.perf_counter() - self.step_began

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        run, callback = self.run, self.run.callback
        assert self.file is not None and callback is not None and callback.plan is not None
        run.losses.append(logs["loss"])
        run.seconds = time.perf_counter() - self.began
        tokens_per_second = run.options.batch * run.options.seq / max(self.step_seconds, 1e-9)
        line = {
            "step": state.global_step,
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "tokens_per_second": round(tokens_per_second, 1),
            "peak_bytes": callback.peaks[-1],
        }
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        if self.bar is not None:
            figures = (
                f"loss {logs['loss']:.3f}  {tokens_per_second:,.0f} tokens/s  "
                f"peak {format_bytes(callback.peaks[-1])} of {format_bytes(callback.plan.budget_bytes)}"
            )
            self.bar.update(self.task, completed=state.global_step, figures=figures)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers inside; its errors still come through."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


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
        table.add_row("budget", of_whole(plan.budget_bytes))
        table.add_row("peak predicted", of_whole(plan.peak_bytes))
        if result.peak_bytes is not None:
            over = result.peak_bytes > plan.budget_bytes * _OVER
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
