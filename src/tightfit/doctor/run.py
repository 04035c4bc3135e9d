"""What doctor is asked about: the YAML of a TRL, transformers or accelerate run, or a model's step.

Invariant: a run is its file's own keys over the defaults of the installed trainers' argument classes; nothing of it is
built or run. Refused: a YAML that is no run, a script, sizes that are no sizes (`InvalidInput`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightfit.accelerator import any_card
from tightfit.core import InvalidInput, Unsupported
from tightfit.core.errors import nearly, unknown
from tightfit.forecast import Adapters, Setup, default_length

__all__ = ["Case", "Run", "case_of", "is_true", "read_run", "setup_of"]

# ------------------------------------------------------------------------------------------ what is given

_TRAINERS = ("sft", "dpo", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A training run as its YAML says it, with the installed trainers' own defaults for what it leaves out."""

    source: str
    trainer: str  # sft, dpo, transformers; accelerate: the launcher's file alone
    values: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def get(self, key: str) -> Any:
        """The value of `key`: the file's, or the default of the trainer's arguments; `None` where there is none."""
        if key in self.values:
            return self.values[key]
        return _defaults(self.trainer).get(key)

    @property
    def checkpointing(self) -> bool:
        new = self.get("activation_checkpointing")
        return bool(self.get("gradient_checkpointing") if new is None else new)

    @property
    def asked_for_checkpointing(self) -> bool | None:
        """What the file itself says; `None`: nothing."""
        said = [self.values.get(f"{name}_checkpointing") for name in ("activation", "gradient")]
        return next((bool(value) for value in said if value is not None), None)

    @property
    def checkpoint_kwargs(self) -> Mapping[str, Any]:
        for name in ("activation", "gradient"):
            found = self.get(f"{name}_checkpointing_kwargs")
            if isinstance(found, Mapping):
                return found
        return {}

    @property
    def fsdp(self) -> Mapping[str, Any]:
        """The options of FSDP without accelerate's prefix; empty without FSDP."""
        found = self.values.get("fsdp_config")
        if not isinstance(found, Mapping):
            return {}
        return {str(key).removeprefix("fsdp_"): value for key, value in found.items()}

    @property
    def on_cpu(self) -> bool:
        return is_true(self.get("use_cpu")) or not any_card()


def is_true(value: Any) -> bool:
    return value is True or (isinstance(value, str) and value.strip().lower() in ("true", "yes", "1"))


@functools.cache
def _defaults(trainer: str) -> Mapping[str, Any]:
    """Keys and defaults of a trainer's arguments, read from the installed classes without making one."""
    found: dict[str, Any] = {}
    for cls in _argument_classes(trainer):
        for each in dataclasses.fields(cls):
            made = each.default_factory
            known = each.default if made is dataclasses.MISSING else made()
            found.setdefault(each.name, None if known is dataclasses.MISSING else known)
    return found


def _argument_classes(trainer: str) -> list[Any]:
    classes: list[Any] = []
    if trainer in ("sft", "dpo"):
        with contextlib.suppress(ImportError):
            from trl import DPOConfig, ModelConfig, ScriptArguments, SFTConfig

            classes += [SFTConfig if trainer == "sft" else DPOConfig, ModelConfig, ScriptArguments]
    with contextlib.suppress(ImportError):
        from transformers import TrainingArguments

        classes.append(TrainingArguments)
    return classes


def read_run(path: str | Path, trainer: str | None = None) -> Run:
    """The run in a YAML file of TRL, transformers or accelerate.

    `trainer`: sft, dpo or transformers; by default dpo when a key says so, else sft. Raises `InvalidInput` for a file
    that cannot be read, is no mapping, or has no key that one of them knows.
    """
    if trainer is not None and trainer not in _TRAINERS:
        raise unknown("trainer", trainer, _TRAINERS)
    try:
        import yaml  # noqa: F401  # what a base install lacks; the package of the reader asks for more

        from tightfit.train.settings import read_yaml
    except ImportError as error:
        raise Unsupported(
            f"reading a run's YAML needs the package pyyaml ({error}): pip install 'tightfit[trl]'"
        ) from None
    values = read_yaml(path, "run")
    if not isinstance(values, Mapping):
        raise InvalidInput(f"{str(path)!r} holds {_kind(values)}: expected the keys of a TRL or transformers run")
    values = {str(key): value for key, value in values.items()}
    if "distributed_type" in values:
        return Run(source=str(path), trainer="accelerate", values=values)
    known = {name: set(_defaults(name)) for name in _TRAINERS}
    if not any(known.values()):
        raise Unsupported("reading a run needs the package transformers: pip install 'tightfit[transformers]'")
    every = set().union(*known.values()) | {"model_name_or_path", "env"}
    if not every & set(values):
        raise InvalidInput(
            f"{str(path)!r} has no key of a TRL or transformers run (its first is {next(iter(values), None)!r}): "
            "expected some such as model_name_or_path, max_length, per_device_train_batch_size"
        )
    notes = []
    if trainer is None:
        only_dpo = sorted(set(values) & (known["dpo"] - known["sft"]))
        trainer = "dpo" if only_dpo else "sft"
        notes.append(
            f"read as a run of TRL's {trainer.upper()} trainer"
            + (f", since it has {only_dpo[0]}" if only_dpo else "; for another give --trainer")
        )
        if other := _another_trainer(set(values) - every):
            name, key = other
            raise Unsupported(
                f"{str(path)!r} is a run of TRL's {name} (it has {key}), whose step is not forecast: doctor reads runs "
                f"of {', '.join(_TRAINERS)}; with --trainer it is read as one of those"
            )
    if others := sorted(set(values) - every):
        near = {name: nearly(name, every) for name in others}
        said = ", ".join(f"{name} (did you mean {near[name]}?)" if near[name] else name for name in others)
        notes.append(f"not looked at, since TRL and transformers do not know it: {said}")
    return Run(source=str(path), trainer=trainer, values=values, notes=tuple(notes))


def _another_trainer(keys: Collection[str]) -> tuple[str, str] | None:
    """The trainer of TRL whose arguments have one of `keys`, and that key; None where none has."""
    try:
        import trl
    except ImportError:
        return None
    for name in sorted(keys):
        for config in sorted(each for each in dir(trl) if each.endswith("Config")):
            cls = getattr(trl, config, None)
            if dataclasses.is_dataclass(cls) and name in {each.name for each in dataclasses.fields(cls)}:
                trainer = config.removesuffix("Config") + "Trainer"
                if hasattr(trl, trainer):
                    return trainer, name
    return None


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


#: transformers' names of optimizers as `Setup` has them.
_OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw-fused", "adamw_8bit": "adamw8bit",
    "adamw_bnb_8bit": "adamw8bit", "paged_adamw_8bit": "paged-adamw8bit", "sgd": "sgd",
}  # fmt: skip


def setup_of(run: Run) -> tuple[Setup | None, tuple[str, ...]]:
    """The step of `run` as the forecast takes it (`None`: it names no model), and what had to be assumed."""
    name = run.values.get("model_name_or_path")
    if name is None:
        return None, ("the run names no model (model_name_or_path), so its peak is not looked at",)
    name, notes = str(name), []
    loaded_in_4bit = is_true(run.get("load_in_4bit"))
    method = "qlora" if loaded_in_4bit else "lora" if is_true(run.get("use_peft")) else "full"
    if is_true(run.get("load_in_8bit")):
        notes.append("8-bit weights are not forecast: they count in their plain dtype")
    asked_optimizer = run.get("optim")
    asked_optimizer = str(getattr(asked_optimizer, "value", asked_optimizer) or "adamw_torch_fused")
    optimizer = _OPTIMIZERS.get(asked_optimizer, "none")
    if optimizer == "none":
        notes.append(f"the optimizer {asked_optimizer} is not forecast: its state and step are left out")
    per_device = _whole(run, "per_device_train_batch_size", 8)
    if run.trainer == "dpo":
        notes.append(_of_dpo(run, method, per_device))
    attention = _attention(run)
    if attention not in (None, *_ATTENTIONS):
        notes.append(f"attn_implementation {attention}: forecast with transformers' own choice in its place")
        attention = None
    longest = run.get("max_length")
    seq = default_length(name) if longest is None else min(_whole(run, "max_length", 1024), _most_tokens(name))
    setup = Setup(
        model=name,
        method=method,
        batch=per_device,
        seq=seq,
        dtype=_dtype_of(run, name),
        optimizer=optimizer,
        rank=_whole(run, "lora_r", 16),
        accumulate=_whole(run, "gradient_accumulation_steps", 1) > 1,
        trainer=run.trainer if run.trainer in ("sft", "dpo") else "model",
        settings=_settings(run) if run.trainer in ("sft", "dpo") else (),
        adapters=Adapters() if method == "full" else _adapters(run),
        double_quantised=method != "qlora" or is_true(run.get("use_bnb_nested_quant")),
        attention=attention,
    )
    return setup.checked(), tuple(notes)


#: Values of attn_implementation that need no other package and no card.
_ATTENTIONS = ("eager", "sdpa")


def _made_with(run: Run) -> Mapping[str, Any]:
    """What the run gives to `from_pretrained`."""
    found = run.get("model_init_kwargs")
    return found if isinstance(found, Mapping) else {}


def _attention(run: Run) -> str | None:
    asked = run.get("attn_implementation") or _made_with(run).get("attn_implementation")
    return None if asked is None else str(asked)


def _adapters(run: Run) -> Adapters:
    """As TRL's scripts make them: what the file leaves out is TRL's default (a dropout of 0.05, PEFT's own targets)."""
    targets = _names(run, "lora_target_modules")
    return Adapters(
        targets=targets or None,
        parameters=_names(run, "lora_target_parameters"),
        saved=_names(run, "lora_modules_to_save"),
        dropout=_share(run, "lora_dropout"),
        dora=is_true(run.get("use_dora")),
    )


def _names(run: Run, key: str) -> tuple[str, ...]:
    """One name or several; a file may have them as a list or in one line."""
    value = run.get(key)
    found = [] if value is None else value.split() if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise InvalidInput(f"{key} in {run.source!r} is {value!r}: expected names")
    return tuple(found)


def _share(run: Run, key: str) -> float:
    value = run.get(key)
    try:
        share = float(value or 0)
        if isinstance(value, bool) or not 0 <= share < 1:
            raise ValueError
    except (TypeError, ValueError):
        raise InvalidInput(
            f"{key} in {run.source!r} is {value!r}: expected a share of at least 0 and below 1"
        ) from None
    return share


#: What a run may ask for that changes its step, and that its forecast leaves out.
_NOT_FORECAST = {
    "deepspeed": "deepspeed: its shards and its offload are not forecast; the peak is that of one device without it",
    "fsdp": "fsdp: the peak is that of one device without shards; tightfit check --strategy fsdp2 forecasts shards",
    "activation_offloading": "activation_offloading: what it moves to the host is not forecast; the peak is without it",
    "torch_compile": "torch_compile: the peak is that of the step without it; a compiled step has other temporaries",
}


def _hub_kernels(run: Run) -> bool:
    """Does the run replace layers by kernels of the hub?"""
    return is_true(run.get("use_kernels")) or is_true(_made_with(run).get("use_kernels"))


def _settings(run: Run) -> tuple[tuple[str, Any], ...]:
    """What the file says of how TRL computes a step."""
    from tightfit.integrations.trainer_step import settings_of

    plain = (bool, int, float, str)
    found = []
    for name in sorted(settings_of(run.trainer) & set(run.values)):
        value = run.values[name]
        if isinstance(value, list) and all(isinstance(each, plain) for each in value):
            value = tuple(value)
        if isinstance(value, (*plain, tuple)):
            found.append((name, value))
    return tuple(found)


def _of_dpo(run: Run, method: str, pairs: int) -> str:
    """What a batch of DPO is, and what it is compared with."""
    if is_true(run.get("precompute_ref_log_probs")):
        reference = "the reference's answers are in the data"
    elif method == "full":
        reference = "the reference is a second model, whose weights count"
    else:
        reference = "the reference is the model with its adapters off"
    said = "1 pair" if pairs == 1 else f"{pairs} pairs"
    return f"a batch of DPO is {said}, so {2 * pairs} sequences, chosen and rejected; {reference}"


def _whole(run: Run, key: str, default: int) -> int:
    value = run.get(key)
    if value is None:
        return default
    try:
        number = int(value)
        if isinstance(value, bool) or number != float(value) or number < 1:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise InvalidInput(f"{key} in {run.source!r} is {value!r}: expected a whole number of at least 1") from None
    return number


def _most_tokens(name: str) -> int:
    from tightfit.integrations.transformers import config_named, positions_of

    return positions_of(config_named(name)) or 1 << 20


def _dtype_of(run: Run, name: str) -> str:
    from tightfit.integrations.transformers import config_named

    made_with = _made_with(run)
    asked = run.values.get("torch_dtype") or run.values.get("dtype") or made_with.get("dtype")
    asked = asked or made_with.get("torch_dtype") or run.get("dtype") or "float32"
    said = str(asked).removeprefix("torch.")
    if said == "auto":
        said = str(getattr(config_named(name), "dtype", None) or "float32").removeprefix("torch.")
    half = {"bfloat16": "bf16", "float16": "fp16", "bf16": "bf16", "fp16": "fp16"}.get(said)
    if half is not None:
        return half
    if said not in ("float32", "fp32"):
        raise InvalidInput(f"dtype in {run.source!r} is {said!r}: expected float32, bfloat16, float16 or auto")
    fp16, bf16 = run.get("fp16"), run.get("bf16")
    if bf16 is None and run.trainer in ("sft", "dpo"):
        bf16 = not is_true(fp16)  # TRL's own rule
    return "bf16-mixed" if is_true(bf16) else "fp16-mixed" if is_true(fp16) else "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What doctor was asked about: a run, a model's step, or both."""

    asked: str
    run: Run | None
    setup: Setup | None  # none: no model is named, or its kernels are not those that can be traced
    notes: tuple[str, ...] = ()


def case_of(asked: str, *, trainer: str | None = None, **changed: Any) -> Case:
    """`asked`: a model as `check` takes it, or the YAML of a run. `changed`: fields of `Setup`; `None` leaves as is.

    Raises `InvalidInput` for neither.
    """
    given = {name: value for name, value in changed.items() if value is not None}
    path = Path(asked).expanduser()
    if path.suffix.lower() in (".yaml", ".yml") or (path.is_file() and path.suffix.lower() == ".json"):
        if not path.is_file():
            raise InvalidInput(f"there is no file {asked!r}")
        run = read_run(path, trainer)
        setup, notes = setup_of(run)
        if setup is not None:
            setup = dataclasses.replace(setup, **given).checked()
        elif given:
            raise InvalidInput(f"{asked!r} names no model, so there is no step to change")
        if setup is not None and is_true(run.get("use_liger_kernel")):
            setup, notes = None, (*notes, "Liger's kernels run on a GPU alone, so the peak is not looked at here")
        if setup is not None:
            notes = (*notes, *(note for key, note in _NOT_FORECAST.items() if run.get(key)))
        if _hub_kernels(run):
            notes = (
                *notes,
                "use_kernels: kernels of the hub run on a GPU alone; a plan reruns them as ops or keeps their blocks "
                "whole, and this forecast is of the layers that they stand in for",
            )
        return Case(asked=asked, run=run, setup=setup, notes=(*run.notes, *notes))
    if path.suffix == ".py":
        raise InvalidInput(
            f"{asked!r} is a script, which would have to be run: give its model or its YAML, or call "
            "tightfit.doctor.examine(model, batch) in it"
        )
    if trainer is not None:
        raise InvalidInput(f"--trainer says how a YAML is read, but {asked!r} is none")
    if "seq" not in given:
        given["seq"] = default_length(asked)
    return Case(asked=asked, run=None, setup=Setup(model=asked, **given).checked())
