"""TRL's own settings and data for `tightfit train`: its dataclasses, its argument parser, its YAML, with ours beside.

`resolve` turns a YAML file, our short options and any of TRL's options into TRL's dataclasses, exactly as TRL's `sft`
script would read them; `FitArguments` adds the few keys that TRL does not have. `load_data` makes the data set: local
text, JSON lines, Parquet or CSV, a folder of them, a hub id, or text that is on every machine.

Invariant: a key that nobody reads is an error, and so is a value of another type than its key has; nothing is loaded by
running code. Refused (`InvalidInput`, one line): unknown keys with the nearest known one, broken files, data without
the column that is asked for, empty data.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import glob
import hashlib
import importlib
import itertools
import json
import os
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from datasets import Dataset, load_dataset
from datasets.data_files import get_data_patterns
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser, get_dataset

from tightfit.core import InvalidInput
from tightfit.core.errors import did_you_mean, reason_of
from tightfit.train.settings import read_yaml

__all__ = ["EMBEDDED", "FitArguments", "Recipe", "load_data", "read_config", "resolve"]

TOPICS, STDLIB = "python:pydoc_data.topics", "python:stdlib"
#: Texts that come with Python: its language reference, and its standard library's source.
EMBEDDED = (TOPICS, STDLIB)

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
#: Columns that TRL's SFT trainer knows how to read, besides the text column.
_COLUMNS = ("messages", "conversations", "prompt", "input_ids")


@dataclass
class FitArguments:
    """What `tightfit train` adds to TRL's keys."""

    budget: str | None = field(default=None, metadata={"help": "Peak of the whole step: a size, or a percentage."})
    plan: str | None = field(default=None, metadata={"help": "The file of a plan of this step, which has a budget."})
    data: str | None = field(default=None, metadata={"help": "A local file or folder, or one of the embedded texts."})
    compare_steps: int = field(default=0, metadata={"help": "Steps also run without a budget, to compare losses."})
    oom_retries: int = field(default=3, metadata={"help": "Times that running out of memory is survived."})
    levers: str = field(default="", metadata={"help": "What the plan may use: recompute, tile, ...; all; all,-tile."})
    host_budget: str | None = field(default=None, metadata={"help": "The most that may wait in host memory: a size."})
    spill: str | None = field(default=None, metadata={"help": "A folder: what waits does so in a file there."})
    base_config: str | None = field(default=None, metadata={"help": "A config that makes the model, run first."})
    batch: str | None = field(default=None, metadata={"help": "Sequences in a batch, or auto: micro-batches."})
    global_batch: int | None = field(default=None, metadata={"help": "Sequences in a step, with batch: auto."})


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Settings as TRL's dataclasses. `args` is the trainer's own and may be changed by it."""

    fit: FitArguments
    script: Any
    args: Any
    model: Any
    mixture: Any


# ------------------------------------------------------------------------------------------------ settings


class _Parser(TrlParser):  # type: ignore[misc]  # TRL is untyped
    """TRL's parser, which says what is wrong instead of leaving the process."""

    def error(self, message: str) -> Any:
        raise InvalidInput(message)


def _parser() -> Any:
    return _Parser((FitArguments, ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig), allow_abbrev=False)


def read_config(path: str | Path) -> dict[str, Any]:
    """The keys of a YAML file. Raises `InvalidInput` when it cannot be read or is no mapping."""
    found = read_yaml(path, "config")
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InvalidInput(f"the config {str(path)!r} is no mapping of names to values")
    return found


def resolve(
    config: Mapping[str, Any] | None, arguments: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> Recipe:
    """TRL's settings from `defaults`, the keys of a config file and command-line arguments, the later over the earlier.

    Raises `InvalidInput` for keys and options that nobody knows and for values that they cannot have.
    """
    parser = _parser()
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    # where there is no accelerator the Trainer wants to be told, as if there were a choice
    parser.set_defaults_with_config(**{"use_cpu": not torch.accelerator.is_available(), **(defaults or {})})
    if config:
        keys = dict(config)
        environment = keys.pop("env", {}) or {}
        if not isinstance(environment, dict):
            raise InvalidInput(f"env in the config: expected a mapping of names to values, not {environment!r}")
        for key in keys:
            if key not in actions:
                raise InvalidInput(f"unknown key {key!r} in the config{did_you_mean(key, actions)}")
        checked = {key: _value(key, value, actions[key]) for key, value in keys.items()}
        os.environ.update({str(name): str(value) for name, value in environment.items()})
        parser.set_defaults_with_config(**checked)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of keys that the user did not choose
        try:
            *parsed, left = parser.parse_args_into_dataclasses(
                list(arguments), return_remaining_strings=True, look_for_args_file=False
            )
        except InvalidInput:
            raise
        except (ValueError, TypeError, ImportError, argparse.ArgumentError) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            raise InvalidInput(f"TRL refuses these settings: {lines[0]}") from error
    if left:
        known = [option for action in parser._actions for option in action.option_strings]
        raise InvalidInput(f"unknown option {left[0]!r}{did_you_mean(left[0], known)}")
    fit, script, args, model, mixture = parsed
    return Recipe(fit=fit, script=script, args=args, model=model, mixture=mixture)


def _value(key: str, value: Any, action: Any) -> Any:
    """A YAML value for `action`, converted as the command line would where it is text. argparse checks only strings."""
    if value is None or (isinstance(value, (dict, list)) and _holds(action, value)):
        return value
    boolean = getattr(action.type, "__name__", "") == "string_to_bool"
    if isinstance(value, (dict, list)):
        raise InvalidInput(f"{key} in the config: expected one value, not {value!r}")
    wanted = "true or false" if boolean else getattr(action.type, "__name__", "a value").removeprefix("_")
    try:
        # by way of text, so that what a YAML file may hold is what the command line may hold
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if isinstance(value, bool) and not boolean and action.type in (int, float):
            raise ValueError
        converted = value if isinstance(value, bool) and boolean else action.type(text) if action.type else value
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        raise InvalidInput(f"{key} in the config: expected {wanted}, not {value!r}") from None
    if action.choices is not None and converted not in action.choices:
        known = ", ".join(str(choice) for choice in action.choices)
        raise InvalidInput(f"{key} in the config: {value!r} is none of {known}")
    if action.nargs == "+":
        return [converted]
    return converted


_MAPPINGS = (
    *getattr(SFTConfig, "_VALID_DICT_FIELDS", ()),
    "lr_scheduler_kwargs",
    "model_init_kwargs",
    "dataset_kwargs",
)


def _holds(action: Any, value: dict[str, Any] | list[Any]) -> bool:
    """May the option hold a list, or a mapping?"""
    if isinstance(value, dict):
        return action.dest in _MAPPINGS or action.type is dict
    return action.nargs == "+" or action.dest in ("report_to", "optim_target_modules", "debug", "fsdp")


# ---------------------------------------------------------------------------------------------------- data


def load_data(recipe: Recipe) -> tuple[Any, Any, dict[str, Any], bool]:
    """The training data, the evaluation data if one is asked for, where they are from, and: are they running text?

    Running text has one row for each file, to be cut into windows. Where it is from: path, size in bytes, sha256 of
    what was read, for what is local.
    """
    fit, script, mixture = recipe.fit, recipe.script, recipe.mixture
    wants_eval = str(getattr(recipe.args.eval_strategy, "value", recipe.args.eval_strategy)) != "no"
    if sum(map(bool, (fit.data, script.dataset_name, mixture.datasets))) > 1:
        raise InvalidInput("give one of data, dataset_name and datasets, not several")
    text_column = recipe.args.dataset_text_field
    if mixture.datasets:
        with _one_line("cannot load the datasets"):
            found: Any = get_dataset(mixture)
        source: dict[str, Any] = {"path": ", ".join(d.path for d in mixture.datasets)}
        running = False
    elif script.dataset_name and not Path(script.dataset_name).expanduser().exists():
        with _one_line(f"cannot load the dataset {script.dataset_name!r}"):
            found = load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
        source, running = {"path": script.dataset_name}, False
    else:
        found, source, running = _local(fit.data or script.dataset_name or TOPICS, text_column)
    split, test = script.dataset_train_split, script.dataset_test_split
    if isinstance(found, Mapping):
        if split not in found:
            raise InvalidInput(f"the data has no split {split!r}; it has {', '.join(found)}: set dataset_train_split")
        train, held_out = found[split], found.get(test)
    else:
        train, held_out = found, None
    if wants_eval and held_out is None:
        raise InvalidInput(
            f"eval_strategy asks for evaluation, but the data has no split {test!r}: set dataset_test_split, or "
            "eval_strategy: no"
        )
    _require_columns(train, text_column, source["path"])
    return train, held_out if wants_eval else None, source, running


def _require_columns(data: Any, text_column: str, path: str) -> None:
    names = getattr(data, "column_names", None)
    if names is None:
        return
    if hasattr(data, "__len__") and len(data) == 0:
        raise InvalidInput(f"the data {path!r} is empty: it has no rows")
    if text_column not in names and not any(name in names for name in _COLUMNS):
        raise InvalidInput(
            f"the data {path!r} has no column {text_column!r}; it has {', '.join(names)}: name the text with "
            "--dataset_text_field, or use the columns messages or prompt and completion"
        )
    if text_column in names and not any(name in names for name in _COLUMNS):
        kind = str(data.features[text_column].dtype) if data.features else "string"
        if kind not in ("string", "large_string"):
            raise InvalidInput(f"the column {text_column!r} of {path!r} holds {kind}, not text")
        if isinstance(data, Dataset) and any(value is None for value in data[text_column]):
            raise InvalidInput(f"the column {text_column!r} of {path!r} has rows without a text")


def _local(name: str, text_column: str) -> tuple[Any, dict[str, Any], bool]:
    if name == TOPICS:
        topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
        return _running_text(["\n\n".join(topics[topic] for topic in sorted(topics))], name, text_column)
    if name == STDLIB:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
        if not texts:
            raise InvalidInput("this Python has no source of its standard library: give other data")
        return _running_text(texts, name, text_column)
    path = Path(name).expanduser()
    if path.is_dir():
        with _one_line(f"cannot load the data in the folder {name!r}", path):
            try:
                found = load_dataset(str(path), data_files=_patterns(path))
            except (IndexError, FileNotFoundError):  # both mean that no file is one that `datasets` reads
                raise InvalidInput(
                    f"the folder {name!r} holds no data files: expected {', '.join(sorted(_BUILDERS))} or .txt"
                ) from None
        return found, {"path": str(path.absolute())}, False
    builder = _BUILDERS.get(path.suffix.lower())
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
    except OSError as error:
        raise InvalidInput(f"cannot read the data {name!r}: {error.strerror or error}") from None
    if size == 0:
        raise InvalidInput(f"the data {name!r} is empty")
    source = {"path": str(path.absolute()), "size_bytes": size, "sha256": digest}
    if builder is None:
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidInput(f"the data {name!r} is not UTF-8 text (byte {error.start})") from None
        return Dataset.from_dict({text_column: [text]}), source, True
    if builder == "json":
        _check_lines(path)
    if builder == "parquet":
        with _one_line(f"cannot read the data {name!r}", path):
            if pyarrow.parquet.read_metadata(path).num_rows == 0:
                raise InvalidInput(f"the data {name!r} is empty: it has no rows")
    with _one_line(f"cannot read the data {name!r}", path):
        # `datasets` takes it for a pattern, and the working folder too, which it would put in front
        found = load_dataset(builder, data_files=glob.escape(str(path.absolute())), split="train")
    return found, source, False


def _running_text(texts: Sequence[str], name: str, text_column: str) -> tuple[Any, dict[str, Any], bool]:
    raw = "\n\n".join(texts).encode("utf-8")
    source = {"path": name, "size_bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    return Dataset.from_dict({text_column: list(texts)}), source, True


def _patterns(folder: Path) -> dict[str, list[str]] | None:
    """The data files of a folder whose own path would be read as a pattern, for each split; else `datasets` finds them.

    `datasets` puts the path in front of its patterns as it is, so that `d[1]` would stand for `d1`.
    """
    path = folder.resolve().as_posix()
    literal = glob.escape(path)
    if literal == path:
        return None
    return {
        str(split): [f"{literal}/{pattern}" for pattern in found] for split, found in get_data_patterns(literal).items()
    }


def _check_lines(path: Path) -> None:
    """Say which line of a .jsonl file is none; `datasets` does not."""
    if path.suffix.lower() != ".jsonl":
        return
    with open(path, encoding="utf-8") as lines:
        try:
            _require_objects(lines, path)
        except UnicodeDecodeError:
            raise InvalidInput(f"the data {str(path)!r} is not UTF-8 text") from None


def _require_objects(lines: Iterable[str], path: Path) -> None:
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip() and not isinstance(json.loads(line), dict):
                raise InvalidInput(f"line {number} of {str(path)!r} is no JSON object")
        except (json.JSONDecodeError, RecursionError):
            raise InvalidInput(f"line {number} of {str(path)!r} is not JSON") from None


def _blame(path: Path) -> None:
    """Raise `InvalidInput` with what is wrong with this file, where that can be seen."""
    kind, name = path.suffix.lower(), repr(str(path))
    if kind == ".parquet":
        try:
            pyarrow.parquet.read_metadata(path)
        except Exception as error:
            raise InvalidInput(f"{name} is not Parquet ({reason_of(error)})") from None
        return
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InvalidInput(f"{name} cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{name} is not UTF-8 text (byte {error.start})") from None
    if kind == ".jsonl":
        _require_objects(text.split("\n"), path)
    elif kind == ".json":
        try:
            found = json.loads(text)
        except RecursionError:
            raise InvalidInput(f"{name} is nested too deep") from None
        except json.JSONDecodeError as error:
            # one object in each line will do too; whether that was meant, the first line says
            with contextlib.suppress(json.JSONDecodeError):
                json.loads(text.lstrip().partition("\n")[0])
                return _require_objects(text.split("\n"), path)
            raise InvalidInput(f"{name} is not JSON (line {error.lineno})") from None
        if not all(isinstance(row, dict) for row in (found if isinstance(found, list) else [found])):
            raise InvalidInput(f"{name} holds something else than JSON objects, which are its rows")


def _fault(path: Path, error: Exception) -> str | None:
    """What is wrong with the file, or with which file of the folder, that `datasets` could not read, and what to do.

    Looked for only now: what can be read is not read twice.
    """
    if not path.is_dir():
        files = [path]
    else:
        files = sorted(
            file
            for file in path.rglob("*")
            if file.is_file()
            and file.suffix.lower() in (*_BUILDERS, ".txt")
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        # `datasets` reads the files of the kind that most of them are of
        kinds = Counter(file.suffix.lower() for file in files)
        files.sort(key=lambda file: -kinds[file.suffix.lower()])
    sized = [file for file in files if file.stat().st_size]
    if files and not sized:
        return f"{str(files[0])!r} is empty" + (", as all its files are" if len(files) > 1 else "") + ": give text"
    for file in sized:
        try:
            _blame(file)
        except InvalidInput as fault:
            return f"{fault}: mend that file" + (", or move it elsewhere" if path.is_dir() else "")
    uneven = hasattr(error.__cause__, "table_column_names")  # `datasets.table.CastError`, which names no file
    columns = [(file, _columns(file)) for file in sized if uneven or file.suffix.lower() in (".csv", ".parquet")]
    for (first, wanted), (other, found) in itertools.pairwise(columns):
        if first.suffix.lower() == other.suffix.lower() and set(wanted) != set(found):
            return (
                f"{str(first)!r} has the columns {', '.join(wanted)} and {str(other)!r} has {', '.join(found)}: give "
                "all files the same columns"
            )
    return "its rows do not all have the same columns: give them the same" if uneven else None


def _columns(path: Path) -> list[str]:
    """The columns of a file of which `_blame` found nothing to say, by its first row."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        return list(pyarrow.parquet.read_schema(path).names)
    text = path.read_text(encoding="utf-8").lstrip()
    if kind == ".csv":
        return next(csv.reader(text.split("\n")), [])
    if kind not in (".json", ".jsonl"):
        return []
    row, _ = json.JSONDecoder().raw_decode(text)
    return list(row[0] if isinstance(row, list) and row else row)


@contextlib.contextmanager
def _one_line(what: str, path: Path | None = None) -> Iterator[None]:
    """Turn what `datasets` raises into one line. `path`: the file or folder that is read, where the fault may be."""
    try:
        yield
    except InvalidInput:
        raise
    except Exception as error:  # `datasets`, pyarrow and the hub client raise types of their own
        fault = None if path is None else _fault(path, error)
        cause = error.__cause__ or error
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        raise InvalidInput(f"{what}: {fault or (lines[0] if lines else type(cause).__name__)}") from error


def fields_of(thing: Any) -> dict[str, Any]:
    """A dataclass's fields, by name."""
    return {f.name: getattr(thing, f.name) for f in dataclasses.fields(thing)}
