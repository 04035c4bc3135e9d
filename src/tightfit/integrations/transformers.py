"""Models, batches and a `Trainer` callback from transformers.

A model comes from the catalog (random weights), from a folder, or from the hub. The callback traces the step that
the Trainer is about to run, plans it for a byte budget, proves the plan on a real batch, applies it for the length of
the training and counts the peak of every step.

Invariant: the step that is traced and proven is the Trainer's own (`Trainer.compute_loss` on a batch that its own
collator made), and finding it moves no random state, so the losses are those of a run without the callback.
Refused: weights that can only be read by running code (pickles, remote code); batches that the model has no positions
for; a Trainer with checkpointing of its own, several devices, `torch.compile` or a sharded model.
"""

from __future__ import annotations

import copy
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainerCallback
from transformers.utils import logging

from tightfit.catalog import model_names, model_shape, nearest
from tightfit.core import InvalidInput, Plan, Proof, ReplayDiverged, Trace, Unsupported, format_bytes
from tightfit.engine import Applied, apply
from tightfit.plan import plan
from tightfit.step import no_key_value_cache, random_states, restore_random_states, tensors_in, unique_bytes
from tightfit.trace import trace
from tightfit.verify import PeakMeter, static_bytes, verify

__all__ = [
    "PeakCallback",
    "TightfitCallback",
    "config_named",
    "device_named",
    "dtype_named",
    "load_model",
    "positions_of",
    "random_batch",
    "require_positions",
]

logger = logging.get_logger(__name__)

_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}


# ------------------------------------------------------------------------------------------------ models


def dtype_named(name: str) -> torch.dtype:
    """The dtype that `fp32`, `bf16`, `fp16` or their long names stand for. Raises `InvalidInput` for others."""
    dtype = _DTYPES.get(name.strip().lower().removeprefix("torch."))
    if dtype is None:
        raise InvalidInput(f"unknown dtype {name!r}: use fp32, bf16 or fp16")
    return dtype


def device_named(name: str) -> torch.device:
    """The device called `name`. Raises `InvalidInput` when it is no device or this machine does not have it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidInput(f"unknown device {name!r}: use cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise InvalidInput(f"device {name!r} is not supported: use cpu or cuda")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InvalidInput(f"device {name!r} was asked for, but torch {torch.__version__} finds no GPU: use cpu")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise InvalidInput(f"device {name!r} was asked for, but there are {torch.cuda.device_count()} GPUs")
    return device


def config_named(name: str) -> Any:
    """The config of a model of the catalog, of a folder with `config.json`, or of a hub id; no weights are read.

    Raises `InvalidInput` when there is no such model or its config lacks what it needs.
    """
    folder = Path(name).expanduser()
    if name.strip().lower() in model_names():
        shape = model_shape(name)
        with _one_line(f"the catalog's entry {name!r} is no config"):
            return AutoConfig.for_model(shape.model_type, **copy.deepcopy(dict(shape.config)))
    if folder.is_dir():
        _require_config(folder)
        with _one_line(f"cannot read the config in {str(folder)!r}"):
            return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    _require_hub_id(name)
    with _one_line(f"cannot load the config of {name!r} from the hub"):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def _require_config(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        hint = "; it holds an adapter, give its base model" if (folder / "adapter_config.json").is_file() else ""
        raise InvalidInput(f"the folder {str(folder)!r} has no config.json{hint}")


def _require_hub_id(name: str) -> None:
    """Raise `InvalidInput` unless `name`, which is no folder and not in the catalog, can be a hub id."""
    if Path(name).expanduser().is_file():
        raise InvalidInput(f"{name!r} is a file: give the folder that holds its config.json")
    if len(name.split("/")) != 2 or not all(name.split("/")) or name.startswith((".", "~")):
        raise InvalidInput(
            f"unknown model {name!r}: it is no folder, no hub id (owner/name) and not in the catalog; {nearest(name)}"
        )


def load_model(
    name: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0, **init: Any
) -> tuple[PreTrainedModel, str]:
    """A causal language model in training mode, and one line that says where its weights come from.

    `name` is a name of the catalog (random weights made with `seed`), a folder with `config.json` (its safetensors if
    there are any, else random weights), or a hub id `owner/name`. Dropout is what the config says. No code that comes
    with a model is ever run, unless `trust_remote_code=True` is among `init`, which goes to `from_pretrained`.

    Raises `InvalidInput` when there is no such model, or when it cannot be read without running code.
    """
    init = {"trust_remote_code": False, **init}
    device = torch.device(device)
    folder = Path(name).expanduser()
    if name.strip().lower() in model_names():
        origin = f"random weights (seed {seed}) in the shape {model_shape(name).source}"
        return _random_model(config_named(name), dtype, device, seed, init), origin
    if folder.is_dir():
        return _model_in_folder(folder, dtype, device, seed, init)
    _require_hub_id(name)
    with _one_line(f"cannot load {name!r} from the hub"):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, **init)
    commit = getattr(model.config, "_commit_hash", "") or ""
    return _ready(model, device), f"weights from the hub: {name} {commit}".strip()


def _model_in_folder(
    folder: Path, dtype: torch.dtype, device: torch.device, seed: int, init: Mapping[str, Any]
) -> tuple[PreTrainedModel, str]:
    _require_config(folder)
    has_weights = any((folder / file).is_file() for file in ("model.safetensors", "model.safetensors.index.json"))
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles and not has_weights:
        raise InvalidInput(
            f"the weights in {str(folder)!r} are a pickle ({pickles[0]}), and loading one can run any code: "
            "convert them to safetensors first, or remove the file to start from random weights"
        )
    with _one_line(f"cannot load the model in {str(folder)!r}"):
        if has_weights:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, local_files_only=True, **init
            )
            return _ready(model, device), f"weights from {folder}"
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        return (
            _random_model(config, dtype, device, seed, init),
            f"random weights (seed {seed}) in the shape {folder / 'config.json'}",
        )


def _random_model(
    config: Any, dtype: torch.dtype, device: torch.device, seed: int, init: Mapping[str, Any]
) -> PreTrainedModel:
    known = {name: init[name] for name in ("attn_implementation", "trust_remote_code") if name in init}
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **known)
    return _ready(model, device)


def _ready(model: Any, device: torch.device) -> PreTrainedModel:
    if not getattr(model, "is_quantized", False):  # those are where they were loaded, and cannot all be moved
        model.to(device)
    model.train()
    ready: PreTrainedModel = model
    return ready


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn whatever a loader raises for input that it cannot take into one line."""
    try:
        yield
    except InvalidInput:
        raise
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # config parsers, safetensors and the hub client raise types of their own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InvalidInput(f"{what}: {lines[0] if lines else type(error).__name__}") from error


def positions_of(config: Any) -> int | None:
    """How many tokens the model has positions for, by the names that configs give it; `None`: no limit is known."""
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    names = ("max_position_embeddings", "max_target_positions", "max_seq_len", "n_positions")
    found = [value for name in names if isinstance(value := getattr(config, name, None), int) and value > 0]
    if not found:
        return None
    # RoBERTa and its kin count positions from after the padding token's
    kin = ("roberta", "camembert", "xlm-roberta", "xmod", "longformer", "data2vec", "mpnet")
    offset = 2 if str(getattr(config, "model_type", "")).startswith(kin) else 0
    return min(found) - offset


def require_positions(config: Any, seq: int) -> None:
    """Raise `InvalidInput` when the model has fewer positions than `seq` tokens."""
    positions = positions_of(config)
    if positions is not None and seq > positions:
        raise InvalidInput(f"a sequence of {seq} tokens was asked for, but the model has {positions} positions")


def random_batch(model: nn.Module, batch: int, seq: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """`input_ids` and `labels` of `batch` sequences of `seq` random tokens (int64) on the model's device.

    Raises `InvalidInput` for sizes below what a loss needs and for more tokens than the model has positions.
    """
    if batch < 1:
        raise InvalidInput(f"expected a batch of at least 1 sequence, not {batch}")
    if seq < 2:
        raise InvalidInput(f"expected a sequence of at least 2 tokens, not {seq}: the loss is on the next token")
    config: Any = model.config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    require_positions(config, seq)
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, int(config.vocab_size), (batch, seq), generator=generator)
    input_ids = input_ids.to(next(model.parameters()).device)
    return {"input_ids": input_ids, "labels": input_ids.clone()}


# ---------------------------------------------------------------------------------------------- callback


class PeakCallback(TrainerCallback):
    """Counts the peak of every optimizer step with the allocator's own count, and logs `tightfit/peak_bytes`.

    Attributes: `peaks`, one number of bytes per step: everything live at the step's start that belongs to it
    (parameters, optimizer state, batches) plus what the step added at its highest. `batch`, what the
    Trainer's collator makes of the longest examples it was given; it stands for the batches of every step.
    """

    def __init__(self, *, batch: Any = None) -> None:
        self.peaks: list[int] = []
        self.batch = batch
        self._given = batch is not None
        self._meter: PeakMeter | None = None
        self._base_bytes = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = _running_trainer()
        _report_first(self, trainer)
        self.close()
        self.peaks = []
        if not self._given:
            states = random_states()
            try:
                self.batch = _longest_batch(kwargs["train_dataloader"], args.train_batch_size)
            finally:
                restore_random_states(states)
        self.batch = trainer._prepare_inputs(self.batch)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # the Trainer fetches the batches of a whole optimizer step before it
        waiting_bytes = (args.gradient_accumulation_steps - 1) * unique_bytes(tensors_in(dict(self.batch)))
        self._base_bytes = static_bytes(kwargs["model"], _bare(kwargs["optimizer"]), self.batch) + waiting_bytes
        self._meter = PeakMeter(args.device)
        self._meter.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # the optimizer has stepped and the gradients are gone: the whole step lies behind
        if self._meter is not None:
            meter, self._meter = self._meter, None
            meter.__exit__(None, None, None)
            self.peaks.append(self._base_bytes + meter.rise_bytes)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        figures = self._figures()
        if logs is not None and "loss" in logs:
            logs.update(figures)
            if state.log_history:  # the Trainer appended a copy of `logs` just before
                state.log_history[-1].update(figures)

    def _figures(self) -> dict[str, float]:
        return {"tightfit/peak_bytes": self.peaks[-1]} if self.peaks else {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """End a count that an exception left open. The Trainer calls no callback when training fails."""
        if self._meter is not None:
            meter, self._meter = self._meter, None
            meter.__exit__(None, None, None)


class TightfitCallback(PeakCallback):
    """Fits the Trainer's step into `budget`: bytes (`"22GiB"`, an int) or a percentage of the unplanned step's peak.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[TightfitCallback("60%")])

    `verify=True` compares the gradients of one real batch with and without the plan before the first step.
    `batch` overrides the batch that is planned for; give it when the data cannot be looked at before training.

    Attributes, readable after training too: `trace`, `plan`, `proof` (none without `verify`), `peaks` (bytes per step),
    `batch`.
    After an exception (Ctrl-C) call `close()`: the Trainer does not say when it fails.

    Raises inside `trainer.train()`: `BudgetInfeasible`; `Unsupported` for a Trainer whose step cannot be planned;
    `ReplayDiverged` when the proof finds another gradient.
    """

    def __init__(self, budget: str | int, *, verify: bool = True, batch: Any = None) -> None:
        super().__init__(batch=batch)
        self.budget = budget
        self.verify = verify
        self.trace: Trace | None = None
        self.plan: Plan | None = None
        self.proof: Proof | None = None
        self.applied: Applied | None = None
        self._cache = ExitStack()
        self._warned = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, model, optimizer = _running_trainer(), kwargs["model"], _bare(kwargs["optimizer"])
        _refuse(trainer, model, args)
        super().on_train_begin(args, state, control, **kwargs)
        self.plan = self.proof = None
        self._warned = False
        self._cache.enter_context(no_key_value_cache(model))
        model.train()
        try:
            with _metrics_kept(trainer), _accumulating(model, args.gradient_accumulation_steps > 1):
                loss = _trainer_loss(trainer, self.batch)
                self.trace = trace(model, self.batch, loss=loss, optimizer=optimizer)
                self.plan = plan(self.trace, self.budget)
                if self.verify:
                    self.proof = verify(model, self.batch, self.plan, loss=loss, optimizer=optimizer)
                    _require_same_gradients(self.proof)
            self.applied = apply(model, self.plan)
        except BaseException:
            self.close()
            raise
        logger.info(
            f"tightfit: {len(self.plan.choices)} units planned for {format_bytes(self.plan.budget_bytes)}, "
            f"predicted peak {format_bytes(self.plan.peak_bytes)}, {self.plan.replays} replays a step"
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if self.plan and self.peaks and self.peaks[-1] > self.plan.budget_bytes * 1.005 and not self._warned:
            self._warned = True
            logger.warning(
                f"tightfit: step {state.global_step} reached {format_bytes(self.peaks[-1])}, more than the budget of "
                f"{format_bytes(self.plan.budget_bytes)}; is its batch longer than the one planned for? "
                "Give the longest as TightfitCallback(batch=...)"
            )

    def _figures(self) -> dict[str, float]:
        figures = super()._figures()
        if self.plan is not None:
            figures["tightfit/predicted_peak_bytes"] = self.plan.peak_bytes
        if self.proof is not None:
            figures["tightfit/gradients_identical"] = float(self.proof["gradients"].passed)
        return figures

    def close(self) -> None:
        """Take the plan off the model and restore its cache setting. Twice is once."""
        super().close()
        if self.applied is not None:
            self.applied.remove()
            self.applied = None
        self._cache.close()


def _running_trainer() -> transformers.Trainer:
    """The Trainer that is calling this callback.

    It hands its callbacks everything but itself, and only it knows how its loss is computed (a subclass, a
    `compute_loss_func`, label smoothing, the division by the tokens of all accumulated batches), so it is read from
    the call stack.
    """
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, transformers.Trainer):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    raise Unsupported("this callback plans the step of a transformers.Trainer, but no Trainer is running it")


def _report_first(callback: TrainerCallback, trainer: transformers.Trainer) -> None:
    """Move `callback` before the reporters, which read the logs in the order of the callbacks."""
    callbacks = trainer.callback_handler.callbacks
    callbacks.remove(callback)
    callbacks.insert(0, callback)


def _refuse(trainer: transformers.Trainer, model: nn.Module, args: Any) -> None:
    checkpointing = getattr(args, "activation_checkpointing", None) or getattr(args, "gradient_checkpointing", False)
    if checkpointing:
        raise Unsupported(
            "the Trainer's own checkpointing is on: set gradient_checkpointing=False (activation_checkpointing=False) "
            "in TrainingArguments, tightfit decides what to recompute"
        )
    for path, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False):
            raise Unsupported(
                f"gradient checkpointing is active in {path or 'the model'}: call "
                "model.gradient_checkpointing_disable() first, tightfit decides what to recompute"
            )
    if getattr(args, "torch_compile", False):
        raise Unsupported("a compiled model cannot be planned: set torch_compile=False in TrainingArguments")
    if args.n_gpu > 1:
        raise Unsupported(f"{args.n_gpu} GPUs are visible and the Trainer would copy the model to each: show it one")
    if args.world_size > 1 or trainer.model_wrapped is not model:
        raise Unsupported("a wrapped model (distributed, sharded, compiled) cannot be planned: train on one device")


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrapper."""
    bare: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return bare


def _trainer_loss(trainer: transformers.Trainer, batch: Any) -> Callable[[nn.Module, Any], torch.Tensor]:
    """What `Trainer.training_step` computes before it calls backward, as one function of model and batch."""
    count = trainer.args.gradient_accumulation_steps
    _, items = trainer.get_batch_samples(iter([batch] * count), count, trainer.args.device)
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        scaled = (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None

    def loss(model: nn.Module, inputs: Any) -> torch.Tensor:
        with trainer.compute_loss_context_manager():
            value: Any = trainer.compute_loss(model, dict(inputs), num_items_in_batch=items)
        result: torch.Tensor = value if scaled else value / count
        return result

    return loss


@contextmanager
def _metrics_kept(trainer: transformers.Trainer) -> Iterator[None]:
    """Undo what a subclass's `compute_loss` adds to its own statistics (TRL does) in steps that train nothing."""
    kept = {name: copy.deepcopy(vars(trainer)[name]) for name in _STATISTICS if name in vars(trainer)}
    try:
        yield
    finally:
        vars(trainer).update(kept)


_STATISTICS = ("_metrics", "_total_train_tokens")


@contextmanager
def _accumulating(model: nn.Module, accumulates: bool) -> Iterator[None]:
    """Zero gradients inside, for a step whose later batches find those of the earlier ones."""
    made = [p for p in model.parameters() if accumulates and p.requires_grad and p.grad is None]
    for parameter in made:
        parameter.grad = torch.zeros_like(parameter)
    try:
        yield
    finally:
        for parameter in made:
            parameter.grad = None


def _require_same_gradients(proof: Proof) -> None:
    check = proof["gradients"]
    if not check.passed:
        raise ReplayDiverged(
            f"the plan changes the gradients of this model (expected {check.expected}, found {check.measured}), "
            "so it was not applied"
        )


# ------------------------------------------------------------------------------------------ longest batch

_LOOK_SECONDS = 3.0  # how long to look through a data set for its longest examples


def _longest_batch(loader: Any, size: int) -> Any:
    """What the loader's own collator makes of the `size` longest examples, as far as they can be seen.

    When lengths differ, the shortest example takes the place of one of them: a padded batch also costs its mask.
    """
    dataset = loader.dataset
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        examples = iter(dataset)
        if examples is dataset:
            raise Unsupported(
                "looking at this data set would use it up: give the longest batch as TightfitCallback(batch=...)"
            )
        chosen = list(itertools.islice(examples, size))
    else:
        if len(dataset) == 0:
            raise InvalidInput("the training data set is empty")
        chosen = [dataset[i] for i in _longest(_lengths(dataset), size)]
    return loader.collate_fn(chosen)


def _lengths(dataset: Any) -> Sequence[int]:
    """Tokens of each example, in order, for as many as `_LOOK_SECONDS` allow."""
    end = time.monotonic() + _LOOK_SECONDS
    lengths = []
    for index in range(len(dataset)):
        lengths.append(_example_length(dataset[index]))
        if time.monotonic() > end:
            logger.warning(
                f"tightfit: looked at {index + 1} of {len(dataset)} examples for the longest; "
                "a longer one later may pass the budget"
            )
            break
    return lengths


def _example_length(example: Any) -> int:
    if not isinstance(example, Mapping):
        return 0
    if "input_ids" in example:
        return len(example["input_ids"])
    return max((len(value) for value in example.values() if hasattr(value, "__len__")), default=0)


def _longest(lengths: Sequence[int], size: int) -> list[int]:
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    chosen = order[:size]
    if len(chosen) > 1 and len({lengths[index] for index in chosen}) == 1:
        chosen[-1] = order[-1]
    return chosen
