"""Models and batches from transformers; the `Trainer` callbacks are those of `tightfit.integrations.trainer`.

A model comes from the catalog (random weights), from a folder, or from the hub.

Invariant: no code that comes with a model is ever run.
Refused: weights that can only be read by running code (pickles, remote code); batches that the model has no positions
for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tightfit import accelerator
from tightfit.catalog import model_names, model_shape, require_model
from tightfit.core import InvalidInput, format_bytes, reason_of, refused_bytes
from tightfit.core.errors import unknown

if TYPE_CHECKING:
    from tightfit.integrations.peaks import PeakCallback
    from tightfit.integrations.trainer import TightfitCallback

__all__ = [
    "PeakCallback",
    "TightfitCallback",
    "config_named",
    "dtype_named",
    "load_model",
    "positions_of",
    "random_batch",
    "require_memory",
    "require_positions",
]

_DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
}


def __getattr__(name: str) -> Any:
    """The callbacks, when they are first asked for: with the `Trainer` come PEFT and bitsandbytes, and importing those
    takes longer than a small plan."""
    if name not in ("PeakCallback", "TightfitCallback"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tightfit.integrations import peaks, trainer

    return getattr(peaks if name == "PeakCallback" else trainer, name)


# ------------------------------------------------------------------------------------------------ models


def dtype_named(name: str) -> torch.dtype:
    """The dtype that `fp32`, `bf16`, `fp16` or their long names stand for. Raises `InvalidInput` for others."""
    dtype = _DTYPES.get(name.strip().lower().removeprefix("torch."))
    if dtype is None:
        raise unknown("dtype", name, ("fp32", "bf16", "fp16"))
    return dtype


def config_named(name: str) -> Any:
    """The config of a model of the catalog, of a folder with `config.json`, or of a hub id; no weights are read.

    Raises `InvalidInput` when there is no such model or its config lacks what it needs.
    """
    config = _config_named(name)
    text = config.get_text_config()
    heads, groups = (getattr(text, key, None) for key in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(groups, int) and groups > 0 and heads % groups:
        raise InvalidInput(f"the config of {name!r} has {heads} heads, which {groups} key-value heads do not divide")
    return config


def _config_named(name: str) -> Any:
    folder = require_model(name)
    if name.strip().lower() in model_names():
        shape = model_shape(name)
        with _one_line(f"the catalog's entry {name!r} is no config"):
            return AutoConfig.for_model(shape.model_type, **copy.deepcopy(dict(shape.config)))
    if folder.is_dir():
        with _one_line(f"cannot read the config in {str(folder)!r}"):
            return _sized(AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True))
    with _one_line(f"cannot load the config of {name!r} from the hub"):
        return _sized(AutoConfig.from_pretrained(name, trust_remote_code=False))


#: Without one of each there is no language model, whatever its architecture.
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def _sized(config: Any) -> Any:
    """`config` itself. Raises `ValueError` when a size that every language model has is zero or negative in it."""
    for part in (config, getattr(config, "text_config", None)):
        names = getattr(part, "attribute_map", {})  # gpt2 calls its layers n_layer
        values = vars(part) if part is not None else {}
        for name in _SIZES:
            value = values.get(names.get(name, name))
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} is {value}, and no model has less than one")
    return config


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
    folder = require_model(name)
    if name.strip().lower() in model_names():
        origin = f"random weights (seed {seed}) in the shape {model_shape(name).source}"
        return _random_model(config_named(name), dtype, device, seed, init), origin
    if folder.is_dir():
        return _model_in_folder(folder, dtype, device, seed, init)
    with _one_line(f"cannot load {name!r} from the hub"):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True, **init)
    commit = getattr(model.config, "_commit_hash", "") or ""
    return _ready(model, device), f"weights from the hub: {name} {commit}".strip()


def _model_in_folder(
    folder: Path, dtype: torch.dtype, device: torch.device, seed: int, init: Mapping[str, Any]
) -> tuple[PreTrainedModel, str]:
    has_weights = any((folder / file).is_file() for file in ("model.safetensors", "model.safetensors.index.json"))
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles and not has_weights:
        raise InvalidInput(
            f"the weights in {str(folder)!r} are a pickle ({pickles[0]}), and loading one can run any code: "
            "convert them to safetensors first, or remove the file to start from random weights"
        )
    with _one_line(f"cannot load the model in {str(folder)!r}"):
        trusted = init["trust_remote_code"]
        config = _sized(AutoConfig.from_pretrained(folder, trust_remote_code=trusted, local_files_only=True))
        if has_weights:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, local_files_only=True, **init
            )
            return _ready(model, device), f"weights from {folder}"
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
    except ZeroDivisionError as error:  # configs derive sizes from each other before anyone can look at them
        raise InvalidInput(f"{what}: a size in it is 0 ({error})") from error
    except Exception as error:  # config parsers, safetensors and the hub client raise types of their own
        if refused_bytes(error) is not None:  # the input is fine, the machine is small
            raise
        raise InvalidInput(f"{what}: {reason_of(error)}") from error


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


def require_memory(config: Any, batch: int, seq: int, *, dtype: torch.dtype, device: torch.device) -> None:
    """Raise `InvalidInput` when no step of `batch` x `seq` tokens can run in all the memory that `device` has.

    What is counted is a floor, whatever the plan: token ids and labels, one hidden state, and the logits, which the
    step without a plan, that every plan starts from, has whole.
    """
    try:
        text = config.get_text_config()
    except (AttributeError, ValueError):  # several text models in one, which no loader here takes
        return
    width = 2 * torch.int64.itemsize
    for name in ("hidden_size", "vocab_size"):
        size = getattr(text, name, None)
        width += dtype.itemsize * size if isinstance(size, int) else 0
    has = accelerator.memory_bytes(device)
    holder = "this machine" if accelerator.is_host(device) else accelerator.name_of(device)
    takes = batch * seq * width
    if has is not None and takes > has:
        raise InvalidInput(
            f"a batch of {batch} x {seq} tokens takes at least {format_bytes(takes)} (token ids, one hidden state, "
            f"logits), and {holder} has {format_bytes(has)}: give a smaller batch or shorter sequences"
        )


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
