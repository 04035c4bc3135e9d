"""From options, a configuration file and the record of an earlier run to what this run does.

Invariant: a run that goes on does so with the options that it began with. Refused: others (`InvalidInput`).
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightfit.accelerator import device_named, is_host
from tightfit.core import (
    AUTO,
    InvalidInput,
    parse_batch,
    parse_bytes,
    parse_host_budget,
    parse_levers,
    parse_spill,
)
from tightfit.fitting.planning import what_is_given
from tightfit.integrations.transformers import (
    dtype_named,
)
from tightfit.train.options import BUDGET, DEFAULTS, DEMO_MODEL, METHODS, OPTIMIZERS, TrainOptions
from tightfit.train.recipe import Recipe, read_config, resolve


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Everything that was asked for, in a form that can be written down and read again."""

    options: TrainOptions
    config: dict[str, Any] | None  # the content of the config file
    model: str | None = None  # made by the base config

    def recipe(self) -> Recipe:
        """TRL's settings, made anew: a trainer changes the arguments that it is given."""
        made = self._resolved_settings()
        if made.fit.batch == AUTO:  # one batch for each step of the optimizer, which is cut later
            made.args.per_device_train_batch_size *= made.args.gradient_accumulation_steps
            made.args.gradient_accumulation_steps = 1
        return made

    def _resolved_settings(self) -> Recipe:
        options, config = self.options, self.config
        if config is not None and isinstance(options.batch, int):  # which goes over both keys of the file
            config = {key: value for key, value in config.items() if key not in ("batch", "global_batch")}
        defaults = DEFAULTS if config is None else None
        pairs: list[tuple[str, Any]] = [
            ("model_name_or_path", self.model or options.model),
            ("data", options.data),
            ("batch", options.batch),
            ("global_batch", options.global_batch),
            ("max_length", options.seq),
            ("max_steps", options.steps),
            ("learning_rate", options.lr),
            ("budget", options.budget),
            ("plan", options.plan),
            ("seed", options.seed),
            ("compare_steps", options.compare_steps),
            ("oom_retries", options.oom_retries),
            ("levers", options.levers),
            ("host_budget", options.host_budget),
            ("spill", options.spill),
        ]
        if options.device is not None:
            pairs.append(("use_cpu", is_host(device_named(options.device))))
        if options.dtype is not None:  # of the weights, without autocast
            dtype = str(dtype_named(options.dtype)).removeprefix("torch.")
            pairs += [("dtype", dtype), ("bf16", False), ("fp16", False)]
        if options.optimizer is not None:
            pairs.append(("optim", OPTIMIZERS[options.optimizer]))
        if options.method is not None:
            adapters, four_bit = METHODS[options.method]
            pairs += [("use_peft", adapters), ("load_in_4bit", four_bit), ("use_bnb_nested_quant", four_bit)]
        arguments = [f"--{name}={value}" for name, value in pairs if value is not None]
        if config is not None:
            return _with_batch(resolve(config, [*arguments, *options.arguments]), config)
        first = resolve(None, [*arguments, *options.arguments], defaults)
        depending = {
            "learning_rate": 3e-3
            if first.model.model_name_or_path == DEMO_MODEL
            else 2e-4
            if first.model.use_peft
            else 2e-5,
            "warmup_steps": max(1, first.args.max_steps // 10),
        }
        return _with_batch(resolve(None, [*arguments, *options.arguments], {**DEFAULTS, **depending}), {})

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
            batch=AUTO if recipe.fit.batch == AUTO else args.per_device_train_batch_size,
            global_batch=args.per_device_train_batch_size if recipe.fit.batch == AUTO else None,
            seq=args.max_length,
            steps=args.max_steps if args.max_steps > 0 else None,
            lr=args.learning_rate,
            budget=recipe.fit.budget or (BUDGET if recipe.fit.plan is None else None),
            plan=recipe.fit.plan,
            seed=args.seed,
            device=args.device.type,
            dtype=precision + ("-mixed" if (args.bf16 or args.fp16) and precision == "fp32" else ""),
            optimizer={v: k for k, v in OPTIMIZERS.items()}.get(str(args.optim.value), str(args.optim.value)),
            compare_steps=recipe.fit.compare_steps,
            oom_retries=recipe.fit.oom_retries,
            levers=recipe.fit.levers,
            host_budget=recipe.fit.host_budget,
            spill=recipe.fit.spill,
        )


def _with_batch(made: Recipe, config: Mapping[str, Any]) -> Recipe:
    """`made` with the batch of our keys in TRL's place. `config`: the keys of the file."""
    fit, args = made.fit, made.args
    size = None if fit.batch is None else parse_batch(fit.batch, "batch in the config")
    for name, value in (("batch", size), ("global_batch", fit.global_batch)):
        if isinstance(value, int) and value < 1:
            raise InvalidInput(f"expected {name} of at least 1, not {value}")
    if fit.global_batch is not None and size != AUTO:
        raise InvalidInput("global_batch in the config is what batch: auto cuts into micro-batches: give both, or none")
    fit.batch = AUTO if size == AUTO else None
    ours, sequences = ("global_batch", fit.global_batch) if size == AUTO else ("batch", size)
    theirs = "per_device_train_batch_size"
    if sequences is None:
        return made
    if {ours, theirs} <= set(config):
        raise InvalidInput(f"the config has {ours} and {theirs}, which say the same: give one of them")
    args.per_device_train_batch_size = sequences
    if size == AUTO:
        args.gradient_accumulation_steps = 1
    return made


def as_asked(options: TrainOptions) -> tuple[Asked, Path, dict[str, Any] | None]:
    """What is to be done, where, and the record of the run that is to go on, if there is one."""
    config = None if options.config is None else read_config(options.config)
    asked = Asked(options=options, config=config)
    recipe = asked.recipe()
    _require_names(options, recipe)
    budget, base = recipe.fit.budget, recipe.fit.base_config
    if budget is not None:
        parse_bytes(budget, whole_bytes=2**40)
    parse_levers(recipe.fit.levers)
    parse_host_budget(recipe.fit.host_budget)
    parse_spill(recipe.fit.spill)
    decay = recipe.args.weight_decay
    if not 0 <= decay < math.inf:  # the Trainer gives it to torch with the groups, where nobody looks at it
        raise InvalidInput(f"expected a weight_decay of at least 0, not {decay}")
    if recipe.fit.plan is not None and recipe.fit.batch == AUTO:
        raise InvalidInput("a plan is for one size of batch, and batch: auto looks for another: leave one of them out")
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
    if recipe.fit.plan is not None:
        what_is_given(budget, recipe.fit.plan)  # a file that is none is told before anything is made
    _require_new(folder, resumes=options.resume)
    if options.resume and not _says_what(options):
        raise InvalidInput(
            f"there is no run in {str(folder)!r} to resume: give the folder of one with --out, or say what to train too"
        )
    return asked, folder, None


def _require_names(options: TrainOptions, recipe: Recipe) -> None:
    """Raise `InvalidInput` for an empty name, as of `--data "$UNSET"`: it is not what leaving it out would be."""
    names = (
        ("--model or model_name_or_path", recipe.model.model_name_or_path),
        ("--data or data", recipe.fit.data),
        ("dataset_name", recipe.script.dataset_name),
        ("base_config", recipe.fit.base_config),
        ("--plan or plan", recipe.fit.plan),
        ("--out", options.out),
        ("output_dir", recipe.args.output_dir),
    )
    for name, value in names:
        if value is not None and not str(value).strip():
            raise InvalidInput(f"{name} is given, but empty: give a name, or leave it out")


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
_FREE = ("budget", "host_budget", "spill", "out", "json", "resume", "oom_retries", "config", "arguments")


def _same(asked: Asked, record: Mapping[str, Any], folder: Path) -> Asked:
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
    if asked.options.host_budget is not None:
        options = dataclasses.replace(options, host_budget=asked.options.host_budget)
    if asked.options.spill is not None:
        options = dataclasses.replace(options, spill=asked.options.spill)
    if asked.options.oom_retries is not None:
        options = dataclasses.replace(options, oom_retries=asked.options.oom_retries)
    return Asked(options=options, config=given["config"])
